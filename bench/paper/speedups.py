"""MACs and parameters at the cuts of the paper, nothing trained. Options: those of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "speedups", *sys.argv[1:]]))
