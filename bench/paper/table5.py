"""Table 5: VGG-19 on CIFAR-100, pruned and fine-tuned. Options: those of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "table5", *sys.argv[1:]]))
