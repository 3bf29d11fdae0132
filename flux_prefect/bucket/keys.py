"""Object keys: from the fingerprint alone, so that anybody can compute where an image is."""

from __future__ import annotations

import re
import string

from flux_prefect.api.models import ImageRequest

__all__ = [
    "DEFAULT_KEY_TEMPLATE",
    "DEFAULT_RECORDS_PREFIX",
    "check_key_template",
    "check_records_apart",
    "clean_prefix",
    "object_key",
    "record_key",
    "sidecar_key",
]

DEFAULT_KEY_TEMPLATE = "{fingerprint}-{index}.{extension}"
DEFAULT_RECORDS_PREFIX = "records"

_REQUIRED = {"fingerprint", "index"}
_ALLOWED = _REQUIRED | {"extension", "seed", "aspect_ratio", "model"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MAX_KEY_BYTES = 1024 - 22  # S3's limit, less what names a record


def check_key_template(template: str) -> str:
    """Return the template if every pair of different images gets different keys by it.

    Raises:
        ValueError: a field is unknown, missing or formatted, or a rendered key would leave its prefix.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"key_template {template!r} is broken: {error}") from error
    fields = {field for _, field, _, _ in parts if field is not None}
    if unknown := fields - _ALLOWED:
        raise ValueError(
            f"key_template has the unknown field {min(unknown)!r}: it may use {', '.join(sorted(_ALLOWED))}"
        )
    if missing := _REQUIRED - fields:
        raise ValueError(f"key_template lacks {{{min(missing)}}}: without it different images would share a key")
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise ValueError(  # {fingerprint:.8} would let different images share a key
            f"key_template {template!r} formats a field: write the name alone between the braces"
        )
    _check_key(_render(template, ImageRequest(prompt="x", seed=1), "0" * 64, 0))
    return template


def check_records_apart(records_prefix: str, template: str) -> None:
    """Verify that no image is published among the records, and no record among the images of a folder of their own.

    Raises:
        ValueError: one lies in the other, so that a policy that opens the images to the public would open the records.
    """
    folder, slash, _ = template.partition("{")[0].rpartition("/")
    images, records = f"{folder}/", f"{records_prefix}/"
    if slash and (images.startswith(records) or records.startswith(images)):
        raise ValueError(
            f"records_prefix {records_prefix!r} and key_template {template!r} share a folder: records hold prompts and "
            "costs, so they need one without images"
        )


def clean_prefix(prefix: str) -> str:
    """Return the prefix without slashes at its ends.

    Raises:
        ValueError: a segment is empty or a dot name, or a control character is in it; such keys can't be reached or
            listed on every S3 server.
    """
    prefix = prefix.strip("/")
    if prefix:
        _check_key(prefix)
    return prefix


def object_key(  # noqa: PLR0913 - the fields of a bucket, each with its name
    request: ImageRequest,
    fingerprint: str,
    index: int,
    *,
    prefix: str = "",
    template: str = DEFAULT_KEY_TEMPLATE,
    records_prefix: str = DEFAULT_RECORDS_PREFIX,
) -> str:
    """The key of one image of a request. Nothing of the prompt goes into it.

    Raises:
        ValueError: the key would leave its prefix, or be longer than S3 allows (1,024 bytes, the record's key
            included): found before anything is paid for.
    """
    key = _render(template, request, fingerprint, index)
    return _check_key(f"{prefix}/{key}" if prefix else key, extra=f"{records_prefix}/")


def record_key(key: str, sha256: str, *, prefix: str = "", records_prefix: str = DEFAULT_RECORDS_PREFIX) -> str:
    """The key of an image's JSON record: below `records_prefix`, as the image's own is below `prefix`.

    The digest of the bytes is part of it. So a record always describes the bytes under the image's key, also where
    two hosts publish different bytes under one key and one of them comes too late.
    """
    below = key.removeprefix(f"{prefix}/") if prefix else key
    return sidecar_key(f"{prefix}/{records_prefix}/{below}".lstrip("/"), sha256)


def sidecar_key(key: str, sha256: str) -> str:
    """The key of a JSON record beside its image, where 0.1.0 published it."""
    return f"{key}.{sha256[:16]}.json"


def _render(template: str, request: ImageRequest, fingerprint: str, index: int) -> str:
    return template.format(
        fingerprint=fingerprint,
        index=index,
        extension=request.extension,
        seed=request.seed,
        aspect_ratio=request.shape.replace(":", "x"),
        model=request.model.replace("/", "-"),
    )


def _check_key(key: str, *, extra: str = "") -> str:
    if any(segment in {"", ".", ".."} for segment in key.split("/")):
        raise ValueError(f"the object key {key!r} has an empty or dot segment: correct prefix or key_template")
    if _CONTROL.search(key):
        raise ValueError(f"the object key {key!r} has a control character in it: correct prefix or key_template")
    most = _MAX_KEY_BYTES - len(extra.encode())
    if len(key.encode()) > most:
        raise ValueError(
            f"the object key {key[:80]!r}… is longer than {most:,} bytes: shorten prefix, key_template or "
            "records_prefix"
        )
    return key
