"""`python -m efreg`, and `torchrun -m efreg`: the console script."""

import sys

from efreg.cli import main

if __name__ == "__main__":
    sys.exit(main())
