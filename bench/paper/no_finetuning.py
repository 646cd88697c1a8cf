"""Section 6.1: points lost right after pruning, one network, all ratios. Options: those of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "no-finetuning", *sys.argv[1:]]))
