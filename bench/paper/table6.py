"""Table 6: ResNet-34 on ImageNet, pruned and fine-tuned. Options: those of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "table6", *sys.argv[1:]]))
