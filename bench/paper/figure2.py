"""Figure 2: accuracy against ratio and speedup, nothing trained again. Options: those of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "figure2", *sys.argv[1:]]))
