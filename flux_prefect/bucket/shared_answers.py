"""Paid answers that hosts share through a bucket, until their images are published."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pydantic import ValidationError

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.object_operations import ObjectHeaders
from flux_prefect.concurrency import run_in_thread, run_to_end
from flux_prefect.errors import BucketError, KeyOccupied
from flux_prefect.host.spool import KeptAnswer

__all__ = ["SharedAnswers"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedAnswers:
    """The newest answer to each request, as `answers/<fingerprint>.json` below a bucket's prefix.

    An answer holds the prompt, the cost and the image's URL or its bytes: leave `answers/` out of what a bucket policy
    opens to the public. Neither an image nor a manifest can have such a name.
    """

    bucket: ImageBucket

    def uri_of(self, fingerprint: str) -> str:
        """Where the answer to a request is, as `s3://bucket/key`."""
        return f"s3://{self.bucket.bucket_name}/{self._key(fingerprint)}"

    async def find(self, fingerprint: str) -> KeptAnswer | None:
        """Find the answer to a request, or return None. One GET.

        Raises:
            KeyOccupied: something else is in its place.
            BucketError: the bucket can't say.
        """
        found = await run_in_thread(self.bucket.objects.read, self._key(fingerprint))
        if found is None:
            return None
        try:
            return KeptAnswer.model_validate_json(found.content)
        except ValidationError as error:
            raise KeyOccupied(
                f"{self.uri_of(fingerprint)} exists but is not a paid answer that this release knows: upgrade, or "
                "remove it. It may be what was paid for, so nothing was sent."
            ) from error

    async def keep(self, kept: KeptAnswer) -> None:
        """Keep an answer, replacing an older one, also if the caller is cancelled meanwhile. One PUT.

        A failure is logged: the spool has the answer, and only other hosts do not find it.
        """
        key, content = self._key(kept.call.fingerprint), kept.model_dump_json().encode()
        try:
            await run_to_end(self.bucket.objects.put, key, content, ObjectHeaders("application/json", "no-store"))
        except BucketError as error:
            _logger.warning(
                "A paid answer could not be kept as %s, so another host may pay again until the image is published: %s",
                self.uri_of(kept.call.fingerprint),
                error,
            )

    async def drop(self, fingerprint: str) -> None:
        """Remove the answer, as its images are published. One DELETE. A failure is logged: it is in nobody's way."""
        try:
            await run_in_thread(self.bucket.objects.delete, self._key(fingerprint))
        except BucketError as error:
            _logger.warning(
                "%s stays behind and can be deleted at any time, as its images are published: %s",
                self.uri_of(fingerprint),
                error,
            )

    def _key(self, fingerprint: str) -> str:
        return f"{self.bucket.prefix}/answers/{fingerprint}.json".lstrip("/")
