"""`python -m trivium`: the same as the `trivium` command."""

import sys

from trivium.cli import main

if __name__ == "__main__":
    sys.exit(main())
