"""Run the ``mrmae`` command: ``python -m mrmae_ds``."""

import sys

from mrmae_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
