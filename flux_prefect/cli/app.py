"""The tree of commands of `flux-prefect`.

Each command is imported when it is used: `--version`, `--help` and completion need no Prefect.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

from cyclopts import App, CycloptsError

from flux_prefect.cli.exit_status import INTERRUPTED, MISUSED

__all__ = ["app", "main"]

app = App(
    name="flux-prefect",
    help="Generate images with FLUX models and publish them to S3, as Prefect runs.",
    help_format="plaintext",
    version=lambda: version("flux_prefect"),
)
app.register_install_completion_command(name="--install-completion")

# Commands, as `app.command("flux_prefect.cli.module:function", name="…", help="…")`: the path is imported on use.


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: Completed, 1: not Completed, 2: wrong arguments or settings, 130: stopped by Ctrl-C.
    """
    try:
        status = app(
            sys.argv[1:] if arguments is None else arguments, exit_on_error=False, result_action="return_value"
        )
    except CycloptsError:  # printed already
        return MISUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    return status if isinstance(status, int) else 0
