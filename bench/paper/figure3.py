"""Figure 3: the L1 norms of the filters of two layers. Takes the options of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "figure3", *sys.argv[1:]]))
