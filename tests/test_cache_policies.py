from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, cast

import cloudpickle  # type: ignore[import-untyped]  # it has none
import pytest
from prefect.context import TaskRunContext
from prefect.transactions import IsolationLevel
from pydantic import SecretStr

from flux_prefect.api.models import GeneratedImage, Generation, ImageRequest
from flux_prefect.cache_policies import GENERATION, IMAGE, PromptSeedCachePolicy
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.host.locks import HostLockManager

REQUEST = ImageRequest(prompt="a lighthouse at dusk", seed=7)
ACCOUNT = AimlApiCredentials(api_key=SecretStr("key-one"))
NO_CONTEXT = cast("TaskRunContext", None)  # the policy looks at the arguments alone


def _key(policy: PromptSeedCachePolicy = GENERATION, **inputs: Any) -> str | None:
    return policy.compute_key(NO_CONTEXT, inputs, {})


def _generation(request: ImageRequest = REQUEST, fingerprint: str = "f" * 32) -> Generation:
    return Generation(
        request=request,
        endpoint=ACCOUNT.base_url,
        fingerprint=fingerprint,
        images=(GeneratedImage(index=0, url="https://cdn.example.com/1.jpg"),),
        seed=request.seed,
        client_request_id="fp-1",
        created_at=datetime(2026, 3, 1, tzinfo=timezone.utc),
    )


def test_the_keys_never_change() -> None:
    """An upgrade finds what was paid for before it: these keys are as in every release."""
    assert _key(request=REQUEST, credentials=ACCOUNT) == "flux-generation-e8fb5a04f77f010945e5c6ada8a8b8a3"
    full = ImageRequest(
        prompt="Ünïcode 🗝\nand a line",
        seed=2**32 - 1,
        aspect_ratio="1:1",
        output_format="png",
        guidance_scale=3.5,
        safety_tolerance="5",
        num_images=4,
        model="flux/kontext-pro/text-to-image",
    )
    assert _key(request=full, credentials=ACCOUNT) == "flux-generation-7bc5af5625a409fa95a8825f3b194e52"
    assert _key(IMAGE, generation=_generation(), index=2) == f"flux-picture-{'f' * 32}-2-858c06cf"


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a lighthouse at dusk "},
        {"seed": 8},
        {"aspect_ratio": "1:1"},
        {"output_format": "png"},
        {"guidance_scale": 3.5},
        {"safety_tolerance": "3"},
        {"num_images": 2},
        {"model": "flux/kontext-pro/text-to-image"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_that_changes_the_image_changes_the_key(change: dict[str, Any]) -> None:
    """An image is never taken for another request's."""
    other = ImageRequest.model_validate({**REQUEST.model_dump(), **change})
    assert _key(request=other, credentials=ACCOUNT) != _key(request=REQUEST, credentials=ACCOUNT)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": "square"},
        {"num_inference_steps": 20},
        {"acceleration": "high"},
        {"enable_prompt_expansion": False},
        {"enable_safety_checker": False},
        {"loras": [{"path": "owner/name"}]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_of_the_other_models_changes_the_key(change: dict[str, Any]) -> None:
    """As above, for the model with the most fields."""
    fields = {"prompt": "a lighthouse at dusk", "seed": 7, "model": "blackforestlabs/flux-2-lora"}
    one, other = (ImageRequest.model_validate({**fields, **more}) for more in ({}, change))
    assert _key(request=other, credentials=ACCOUNT) != _key(request=one, credentials=ACCOUNT)


def test_the_tests_above_know_every_field() -> None:
    """A new field of a request has to be thought of here."""
    assert set(ImageRequest.model_fields) == {
        "prompt", "seed", "aspect_ratio", "output_format", "guidance_scale", "safety_tolerance", "num_images", "model",
        "image_size", "num_inference_steps", "acceleration", "enable_prompt_expansion", "enable_safety_checker",
        "loras", "strength", "extra_fields",  # tests/api/test_registry.py
    }  # fmt: skip


def test_another_endpoint_is_another_key() -> None:
    """A stand-in's image never passes for the real one."""
    stand_in = AimlApiCredentials(api_key=SecretStr("key-one"), base_url="http://127.0.0.1:8080")
    assert _key(request=REQUEST, credentials=stand_in) != _key(request=REQUEST, credentials=ACCOUNT)


def test_another_step_is_another_key() -> None:
    """The record of an answer is not the image's file."""
    generation = _generation()
    assert _key(GENERATION, generation=generation) != _key(IMAGE, generation=generation)


def test_another_image_of_the_answer_is_another_key() -> None:
    """Each index has its own, however many there are."""
    keys = {_key(IMAGE, generation=_generation(), index=index) for index in (0, 1, 2, 3, None)}
    assert len(keys) == 5


@pytest.mark.parametrize(
    "account",
    [
        {"api_key": SecretStr("key-two")},
        {"read_timeout": 1.0},
        {"max_in_flight": 3},
        {"base_url": "https://API.aimlapi.com/"},
    ],
    ids=lambda account: next(iter(account)),
)
def test_what_does_not_change_the_image_does_not_change_the_key(account: dict[str, Any]) -> None:
    """A new key, other time-outs or the same address written otherwise find what was paid for."""
    other = AimlApiCredentials.model_validate({**ACCOUNT.model_dump(), "api_key": ACCOUNT.api_key, **account})
    assert _key(request=REQUEST, credentials=other) == _key(request=REQUEST, credentials=ACCOUNT)


def test_only_request_and_endpoint_count() -> None:
    """Flow parameters, names and order of the arguments, and other arguments change nothing."""
    key = _key(request=REQUEST, credentials=ACCOUNT)
    inputs = {"who_pays": ACCOUNT, "note": "urgent", "what": REQUEST}
    assert GENERATION.compute_key(NO_CONTEXT, inputs, {"flow": "another"}, later="argument") == key


@pytest.mark.parametrize(
    "inputs",
    [
        {"request": REQUEST.model_copy(update={"seed": None}), "credentials": ACCOUNT},
        {"request": REQUEST},
        {"credentials": ACCOUNT},
        {"generation": None},
        {},
    ],
)
def test_what_cannot_be_recognised_is_not_cached(inputs: dict[str, Any]) -> None:
    """Without a seed, a request or an account there is no key, so Prefect caches nothing."""
    assert _key(**inputs) is None


def test_the_answer_of_a_request_without_a_seed_has_a_key() -> None:
    """Its image is downloaded once, though it can't be generated again."""
    seedless = _generation(REQUEST.model_copy(update={"seed": None}), fingerprint="e" * 32)
    assert _key(IMAGE, generation=seedless, credentials=ACCOUNT, index=0) == f"flux-picture-{'e' * 32}-0-858c06cf"


def test_the_api_key_is_in_no_cache_key() -> None:
    """Cache keys are shown in Prefect's pages."""
    key = _key(request=REQUEST.model_copy(update={"prompt": "x"}), credentials=ACCOUNT)
    assert key is not None
    assert "key-one" not in key


DUPLICATES: list[Callable[[PromptSeedCachePolicy], PromptSeedCachePolicy]] = [
    copy.deepcopy,
    lambda policy: pickle.loads(pickle.dumps(policy)),  # noqa: S301 - our own
    lambda policy: cloudpickle.loads(cloudpickle.dumps(policy)),
    lambda policy: policy.configure(),
]


@pytest.mark.parametrize("duplicate", [lambda policy: policy, *DUPLICATES])
def test_a_policy_holds_no_lock(duplicate: Callable[[PromptSeedCachePolicy], PromptSeedCachePolicy]) -> None:
    """A lock of a nested transaction is held until the enclosing task ends: custody takes turns instead."""
    policy = duplicate(GENERATION)
    assert policy.isolation_level is IsolationLevel.READ_COMMITTED
    assert policy.lock_manager is None
    assert _key(policy, request=REQUEST, credentials=ACCOUNT) == _key(request=REQUEST, credentials=ACCOUNT)


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_a_copy_excludes_the_original(
    duplicate: Callable[[PromptSeedCachePolicy], PromptSeedCachePolicy],
) -> None:
    """Tasks of one's own with copies of one SERIALIZABLE policy still wait for each other."""
    policy = GENERATION.configure(isolation_level=IsolationLevel.SERIALIZABLE, lock_manager=HostLockManager())
    one, other = policy.lock_manager, duplicate(policy).lock_manager
    assert one is not None
    assert other is not None
    one.acquire_lock("test_a_copy_excludes", "holder")
    assert not other.acquire_lock("test_a_copy_excludes", "another", acquire_timeout=0)
    one.release_lock("test_a_copy_excludes", "holder")


def test_it_can_be_configured() -> None:
    """Another isolation level or lock manager replaces the policy's own, in a copy."""
    manager = HostLockManager()
    policy = GENERATION.configure(isolation_level=IsolationLevel.SERIALIZABLE, lock_manager=manager)
    assert policy.isolation_level is IsolationLevel.SERIALIZABLE
    assert GENERATION.isolation_level is IsolationLevel.READ_COMMITTED
    assert policy.lock_manager is manager
    assert _key(policy, request=REQUEST, credentials=ACCOUNT) == _key(request=REQUEST, credentials=ACCOUNT)
