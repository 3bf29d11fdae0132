"""The tree of commands of `flux-prefect`.

Each command is imported when it is used: `--version`, `--help` and completion need no Prefect.
"""

from __future__ import annotations

import ast
import sys
from importlib.metadata import version
from importlib.resources import files

from cyclopts import App, CycloptsError

from flux_prefect.cli.exit_status import INTERRUPTED, MISUSED
from flux_prefect.cli.options import reflow

__all__ = ["app", "main"]

app = App(
    name="flux-prefect",
    help="Generate images with FLUX models and publish them to S3, as Prefect runs.",
    help_format="plaintext",
    version=lambda: version("flux_prefect"),
)
app.register_install_completion_command(name="--install-completion")
publish = App(name="publish", help="Publish the images of a request, a table or a day.")
app.command(publish)


def _help_of(flow: str) -> str:
    """A flow's own description, read from its file: importing it would take Prefect's two seconds."""
    tree = ast.parse(files("flux_prefect.flows").joinpath(f"{flow}.py").read_text(encoding="utf-8"))
    found = next(each for each in tree.body if isinstance(each, ast.AsyncFunctionDef) and each.name == flow)
    return reflow((ast.get_docstring(found) or "").partition("\n\nArgs:")[0])


# The commands. A path is imported when its command is used; what is registered here is seen by help and completion.
app.command("flux_prefect.cli.demo:demo", name="demo", help="Publish a dozen images on this machine alone, twice.")
app.command(
    "flux_prefect.cli.sandbox:sandbox",
    name="sandbox",
    help="Run a local stand-in for the image service, and an S3 server beside it, until Ctrl-C.",
    help_flags=[],
    version_flags=[],
)
publish.command("flux_prefect.cli.publish:image", name="image", help=_help_of("publish_image"))
publish.command("flux_prefect.cli.publish:batch", name="batch", help=_help_of("publish_batch"))
publish.command("flux_prefect.cli.publish:sharded", name="sharded", help=_help_of("publish_sharded"))
publish.command("flux_prefect.cli.publish:daily", name="daily", help=_help_of("publish_daily"))
app.command("flux_prefect.cli.backfill:backfill", name="backfill", help=_help_of("backfill"))
app.command("flux_prefect.cli.sweep:sweep", name="sweep", help=_help_of("sweep_seeds"))
app.command("flux_prefect.cli.audit:audit", name="audit", help=_help_of("audit_bucket"))
app.command(
    "flux_prefect.cli.recover:recover",
    name="recover",
    help=(
        "Read paid answers that could not be parsed at the time, and record their images. A row is then published by "
        "its next run, at no cost."
    ),
)
app.command(
    "flux_prefect.cli.forecast:forecast",
    name="forecast",
    help="Forecast the time, the cost and the S3 requests of a batch by simulating it. Times are in seconds.",
)

app.command(
    "flux_prefect.cli.deploy:deploy", name="deploy", help="Register the flows that ship as deployments on a work pool."
)


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
