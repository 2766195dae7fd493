"""`python -m luthier` is the program `luthier`."""

from __future__ import annotations

import sys

from luthier.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
