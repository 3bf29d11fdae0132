"""`python -m flux_prefect.sandbox`: the stand-in and its S3 server, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from pydantic import ValidationError

from flux_prefect.sandbox.schema import explain
from flux_prefect.sandbox.settings import ServiceSettings


def main(arguments: list[str] | None = None, *, program: str = "python -m flux_prefect.sandbox") -> int:
    """Run the sandbox; returns the exit status. The program is its name in messages."""
    given = _parser(program).parse_args(arguments)
    missing = [package for package in ("starlette", "uvicorn") if find_spec(package) is None]
    if missing:
        return _fail(f"The sandbox needs {' and '.join(missing)}: pip install 'flux_prefect[sandbox]'")
    # Only now: these need the packages of the `sandbox` extra.
    from flux_prefect.sandbox.server import CannotStart, SandboxOptions, run  # noqa: PLC0415

    settings: dict[str, object] = {}
    if given.latency is not None:
        settings["latency"] = given.latency
    if given.fast is not None:
        settings |= {"fast": True, "fast_bytes": given.fast}
    try:
        ServiceSettings.model_validate(settings)
    except ValidationError as error:
        return _fail(explain(error))
    try:
        return run(
            SandboxOptions(
                data=given.data,
                host=given.host,
                port=given.port,
                api_key=given.api_key,
                s3_port=None if given.no_s3 else given.s3_port,
                bucket=given.bucket,
                s3_access_key=given.s3_access_key,
                s3_secret_key=given.s3_secret_key,
                env_file=given.env_file,
                quiet=given.quiet,
                access_log=given.access_log,
                until_stdin_closes=given.until_stdin_closes,
                settings=settings,
            )
        )
    except CannotStart as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return 1


def _parser(program: str) -> argparse.ArgumentParser:
    fields = ServiceSettings.model_fields
    parser = argparse.ArgumentParser(
        prog=program,
        description=(
            "A local stand-in for the image service, and an S3 server beside it. It needs no account. "
            "What it can do wrong on purpose: GET /sandbox/faults/names."
        ),
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path(".sandbox"), help="folder for everything it keeps (%(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=_port, default=8765, help="port of the image service, 0 for any free one (%(default)s)")
    add("--s3-port", type=_s3_port, default=8333, help="port of the S3 server, 0 for any free one (%(default)s)")
    add("--no-s3", action="store_true", help="leave the S3 server out")
    add("--bucket", default="images", help="the bucket that is there from the start (%(default)s)")
    add(
        "--api-key",
        default=_setting("API_KEY", "sandbox-key"),
        help="the key that clients must send; also FLUX_SANDBOX_API_KEY",
    )
    add("--s3-access-key", default=_setting("S3_ACCESS_KEY", "sandbox"), help="also FLUX_SANDBOX_S3_ACCESS_KEY")
    add("--s3-secret-key", default=_setting("S3_SECRET_KEY", "sandbox-secret"), help="also FLUX_SANDBOX_S3_SECRET_KEY")
    add(
        "--latency",
        type=_seconds,
        metavar="SECONDS",
        help=f"{fields['latency'].description} ({fields['latency'].default})",
    )
    add(
        "--fast",
        type=int,
        nargs="?",
        const=fields["fast_bytes"].default,
        metavar="BYTES",
        help=f"send prebuilt images of this size, for benchmarks ({fields['fast_bytes'].default})",
    )
    add("--env-file", type=Path, metavar="PATH", help="write NAME=value lines here once everything answers")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--access-log", action="store_true", help="print a line for each request")
    add("--until-stdin-closes", action="store_true", help="stop when standard input ends")
    return parser


def _setting(name: str, default: str) -> str:
    return os.environ.get(f"FLUX_SANDBOX_{name}") or default


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:  # noqa: PLR2004 - what TCP has
        raise argparse.ArgumentTypeError("ports are 0 to 65535")
    return port


def _s3_port(text: str) -> int:
    port = _port(text)
    if port >= 32768:  # noqa: PLR2004 - where outgoing connections begin on Linux
        raise argparse.ArgumentTypeError("choose a port below 32768: the server opens another one 10000 higher")
    return port


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError("seconds are 0 or more")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
