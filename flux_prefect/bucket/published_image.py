"""A published image: its description, the metadata of its object, and its JSON record (sidecar)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote, unquote

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from pydantic_core import to_json

from flux_prefect.api.models import GeneratedImage, Generation, ImageRequest
from flux_prefect.host.spool import ImageFile

__all__ = ["ImageMetadata", "PublishedImage", "PublishingRun", "read_generation", "write_sidecar"]


class PublishedImage(BaseModel):
    """One image in the bucket, whole, with a JSON record of its own."""

    model_config = ConfigDict(frozen=True)

    bucket: str = Field(description="The bucket's name.")
    key: str = Field(description="The object's key.")
    uri: str = Field(description="s3://bucket/key.")
    url: str | None = Field(description="The public address, where the block has a public_base_url.")
    etag: str = Field(description="The server's ETag, without quotes.")
    sha256: str = Field(description="SHA-256 of the bytes, hex, verified by the server.")
    size: int = Field(description="Size in bytes.")
    content_type: str = Field(description="The MIME type.")
    width: int = Field(description="Width in pixels.")
    height: int = Field(description="Height in pixels.")
    fingerprint: str = Field(description="The identity of the request at its endpoint.")
    index: int = Field(description="The image's place in its generation.")
    seed: int | None = Field(description="The seed that makes it again.")
    sidecar_key: str = Field(description="The key of the JSON record.")
    published_at: AwareDatetime = Field(description="When it was written to the bucket.")
    created: bool = Field(description="True where this call wrote it, False where it was there before.")


class PublishingRun(BaseModel):
    """The run that publishes, for the image's record."""

    model_config = ConfigDict(frozen=True)

    flow_run_id: str | None = Field(default=None, description="Prefect's id of the flow run.")
    flow_run_name: str | None = Field(default=None, description="The flow run's name.")


class ImageMetadata(BaseModel):
    """The metadata of an image's object: what one HEAD reads back of the image.

    Attributes:
        records: the bucket's `records_prefix` when the image was published; None for a record beside the image, as
            0.1.0 wrote it.
    """

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    index: int
    sha256: str
    width: int
    height: int
    seed: int | None = None
    records: str | None = None

    @classmethod
    def of(cls, file: ImageFile, *, records: str) -> ImageMetadata:
        """The metadata of a file that is about to be published."""
        generation = file.generation
        return cls(
            fingerprint=generation.fingerprint,
            index=file.index,
            sha256=file.sha256,
            width=file.width,
            height=file.height,
            seed=generation.seed,
            records=records,
        )

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> ImageMetadata:
        """The metadata in an object's headers.

        Raises:
            KeyError, ValueError: the object was not published as an image.
        """
        return cls(
            fingerprint=headers["flux-fingerprint"],
            index=int(headers["flux-index"]),
            sha256=headers["flux-sha256"],
            width=int(headers["flux-width"]),
            height=int(headers["flux-height"]),
            seed=int(headers["flux-seed"]) if "flux-seed" in headers else None,
            records=unquote(headers["flux-records"]) if "flux-records" in headers else None,
        )

    def headers(self) -> dict[str, str]:
        """The metadata as S3 stores it, in ASCII."""
        return {f"flux-{name}": quote(str(value)) for name, value in self if value is not None}


def write_sidecar(file: ImageFile, key: str, published_at: datetime, run: PublishingRun) -> bytes:
    """The JSON record of an image: the whole request, seed, cost, ids and run, enough to make the image again."""
    generation = file.generation
    record = {
        "version": 1,
        "key": key,
        "sha256": file.sha256,
        "size": file.size,
        "content_type": file.content_type,
        "width": file.width,
        "height": file.height,
        "fingerprint": generation.fingerprint,
        "index": file.index,
        "seed": generation.seed,
        "reported_seed": generation.reported_seed,
        "request": generation.request.payload(),
        "endpoint": generation.endpoint,
        "credits_used": generation.credits_used,
        "usd_spent": generation.usd_spent,
        "client_request_id": generation.client_request_id,
        "inference_id": generation.inference_id,
        "generated_at": generation.created_at.isoformat(),
        "published_at": published_at.isoformat(),
        "run": run.model_dump(),
    }
    return to_json(record, indent=2)  # json's own encoder is Python where it indents


def read_generation(record: Mapping[str, Any], images: Sequence[PublishedImage], request: ImageRequest) -> Generation:
    """The generation of a request's published images, from the record of one of them.

    The images have no URLs: the bucket has their bytes.

    Raises:
        KeyError, ValueError: it is no such record.
    """
    return Generation(
        request=request,
        endpoint=record["endpoint"],
        fingerprint=record["fingerprint"],
        images=tuple(
            GeneratedImage(
                index=image.index, url=None, width=image.width, height=image.height, content_type=image.content_type
            )
            for image in images
        ),
        seed=record["seed"],
        reported_seed=record["reported_seed"],
        credits_used=record["credits_used"],
        usd_spent=record["usd_spent"],
        inference_id=record["inference_id"],
        client_request_id=record["client_request_id"],
        created_at=record["generated_at"],
    )
