"""Table 4: ResNet-56 on CIFAR-10, pruned and fine-tuned. Options: those of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "table4", *sys.argv[1:]]))
