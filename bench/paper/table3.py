"""Table 3: the time of a training step with each force. Options: those of `efreg paper`."""

import sys

from efreg.cli import main

sys.exit(main(["paper", "table3", *sys.argv[1:]]))
