"""Table 5: VGG-19 on CIFAR-100, trained with a force, pruned, fine-tuned. Takes the options of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "table5", *sys.argv[1:]]))
