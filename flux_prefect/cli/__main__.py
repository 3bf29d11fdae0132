"""`python -m flux_prefect.cli`: the command flux-prefect."""

from __future__ import annotations

import sys

from flux_prefect.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
