"""The cache policy of the paid steps: one result for each prompt and seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from prefect.filesystems import WritableFileSystem
from prefect.locking.protocol import LockManager
from prefect.transactions import IsolationLevel

from flux_prefect.api.models import Generation, ImageRequest
from flux_prefect.credentials import AimlApiCredentials

__all__ = ["GENERATION", "IMAGE", "PromptSeedCachePolicy"]


@dataclass
class PromptSeedCachePolicy(CachePolicy):
    """Cache on prompt + seed: the step's name and the request's fingerprint at its endpoint, nothing else.

    The key changes with every field of the request that changes the image and with the endpoint. It does not
    change with the API key, the flow, the run, the task's code or any other argument. A request without a seed is
    not cached. A task with a `Generation` argument (a later step) is keyed by that generation's fingerprint
    and by its `index` argument, if it has one.

    READ_COMMITTED, without a lock: the step itself runs one at a time on a host (`custody.obtain`). A SERIALIZABLE
    transaction inside another task holds its lock until that task ends, so that the same request twice in one task
    waits for ever.

    Args:
        step: What the task makes of the request. Two tasks with different results need different steps.

    Example:
        ```python
        from prefect import task

        @task(cache_policy=PromptSeedCachePolicy(step="mean colour"), persist_result=True)
        async def measure_colour(generation: Generation, index: int = 0) -> str: ...
        ```
    """

    step: str = "generation"
    isolation_level: Literal["READ_COMMITTED", "SERIALIZABLE"] | IsolationLevel | None = IsolationLevel.READ_COMMITTED
    lock_manager: LockManager | None = None
    key_storage: WritableFileSystem | str | Any = None

    def compute_key(
        self,
        task_ctx: TaskRunContext,  # noqa: ARG002 - the task and its run don't change the image
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],  # noqa: ARG002 - nor does the flow
        **kwargs: Any,  # noqa: ARG002 - Prefect's to extend
    ) -> str | None:
        """Compute the cache key; None without a request with a seed, or without credentials, among the arguments."""
        generation = _one(inputs, Generation)
        if generation is not None:
            index = inputs.get("index")
            place = "" if index is None else f"-{index}"
            # Of the very answer: an image that was paid for anew is not the one cached for the old answer.
            answer = hashlib.sha256(generation.client_request_id.encode()).hexdigest()[:8]
            return f"flux-{self.step}-{generation.fingerprint}{place}-{answer}"
        request, credentials = _one(inputs, ImageRequest), _one(inputs, AimlApiCredentials)
        if request is None or request.seed is None or credentials is None:
            return None
        return f"flux-{self.step}-{request.fingerprint(credentials.base_url)}"


def _one(inputs: dict[str, Any], kind: type[Any]) -> Any:
    return next((value for value in inputs.values() if isinstance(value, kind)), None)


GENERATION = PromptSeedCachePolicy(step="generation")
IMAGE = PromptSeedCachePolicy(step="picture")  # the word of 0.1.0: cache keys outlive a release
