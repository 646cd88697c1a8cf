"""Figure 3: the L1 norms of the filters of two layers. Options: those of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "figure3", *sys.argv[1:]]))
