"""`python -m ling` is `ling`."""

import sys

from ling.cli import main

if __name__ == "__main__":
    sys.exit(main())
