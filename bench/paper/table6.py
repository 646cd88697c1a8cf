"""Table 6: ResNet-34 on ImageNet, trained with a force, pruned, fine-tuned. Takes the options of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "table6", *sys.argv[1:]]))
