"""Table 4: ResNet-56 on CIFAR-10, trained with a force, pruned, fine-tuned. Takes the options of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "table4", *sys.argv[1:]]))
