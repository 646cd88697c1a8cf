"""Figure 2: accuracy against ratio and speedup, nothing trained again. Takes the options of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "figure2", *sys.argv[1:]]))
