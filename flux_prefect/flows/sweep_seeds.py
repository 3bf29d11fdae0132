"""Publish prompts in many variants, with a contact sheet of each prompt."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import anyio
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.api.models import AspectRatio, ImageRequest, OutputFormat, SafetyTolerance, Seed, TextToImageModel
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.display.contact_sheets import publish_contact_sheet
from flux_prefect.errors import BatchFailed, TooManyCombinations
from flux_prefect.flows.form_types import BucketChoice, CredentialsChoice, CreditCap, InFlight
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.host.spool import Spool
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport
from flux_prefect.money.budget import Budget, describe_credits
from flux_prefect.settings import current_settings

__all__ = ["SweepReport", "sweep_seeds"]

Prompt = Annotated[str, Field(min_length=1, max_length=4000)]
Guidance = Annotated[float, Field(ge=1, le=20, allow_inf_nan=False)]


class SweepReport(BaseModel):
    """The result of a sweep."""

    model_config = ConfigDict(frozen=True)

    batch: BatchReport = Field(description="The report of all images.")
    sheets: dict[str, str] = Field(description="The s3:// address of the contact sheet of each prompt.")


def _name_run() -> str:
    given = flow_run.parameters
    lists = (given[name] for name in ("prompts", "seeds", "aspect_ratios", "guidance_scales"))
    return f"sweep {' × '.join(str(max(1, len(values))) for values in lists)}"  # noqa: RUF001 - as people write it


@flow(name="sweep-seeds", flow_run_name=_name_run)
async def sweep_seeds(
    prompts: Annotated[list[Prompt], Field(min_length=1)],
    bucket: BucketChoice,
    seeds: Annotated[list[Seed], Field(min_length=1)] = [1, 2, 3, 4],  # noqa: B006 - never changed; the form's default
    aspect_ratios: Annotated[list[AspectRatio], Field(min_length=1)] = ["1:1"],  # noqa: B006 - as above
    guidance_scales: list[Guidance] = [],  # noqa: B006 - as above
    max_combinations: Annotated[int, Field(ge=1, le=1000)] = 64,
    output_format: OutputFormat = "jpeg",
    safety_tolerance: SafetyTolerance = "2",
    model: TextToImageModel = "flux/kontext-max/text-to-image",
    credentials: CredentialsChoice = None,
    max_in_flight: InFlight = 8,
    max_credits: CreditCap = None,
    dry_run: bool = False,  # noqa: FBT001, FBT002 - a field of the form, given by name
) -> SweepReport:
    """Publish every prompt with every seed, aspect ratio and guidance, and a contact sheet of each prompt.

    The number of images and their maximum cost are logged and checked before the first paid call. Images that are
    already published cost nothing, so a sweep can be widened list by list. If an image fails, its cell on the sheet
    shows its status, and the run ends as Failed.

    Args:
        prompts: The prompts of the images; each has its own contact sheet.
        bucket: s3://name/prefix, or a saved Image Bucket block or its name. The sheets go to contact-sheets/ in it.
        seeds: The seeds to compare, 1 to 4,294,967,295.
        aspect_ratios: The aspect ratios to compare.
        guidance_scales: The values of guidance_scale to compare, 1 to 20. Empty: the service's default.
        max_combinations: The most images of a sweep, so that long lists are not paid for by mistake.
        output_format: The images' file format.
        safety_tolerance: 1 is the strictest, 5 and 6 are the most permissive.
        model: The text-to-image model of the service.
        credentials: A saved AIMLAPI Credentials block or its name. Empty: AIMLAPI_KEY of the environment.
        max_in_flight: The most paid calls at the same time.
        max_credits: A hard cap on what this run spends, in credits (2,000,000 to the US dollar).
        dry_run: Make the plan, then stop. Costs nothing.

    Returns:
        The batch's report and the address of each prompt's sheet. A dry run returns only the plan.

    Raises:
        TooManyCombinations: there are more than max_combinations images. The message has their number and cost.
        BatchFailed: images failed. Its `report` is the whole report; the sheets are still published.

    Example:
        ```python
        report = await sweep_seeds(["a lighthouse at dusk"], "s3://images/sweeps", seeds=[1, 2, 3])
        ```
    """
    guidances: list[float | None] = [*guidance_scales] or [None]
    requests = [
        ImageRequest(
            prompt=prompt,
            seed=seed,
            aspect_ratio=aspect_ratio,
            guidance_scale=guidance,
            output_format=output_format,
            safety_tolerance=safety_tolerance,
            model=model,
        )
        for prompt, aspect_ratio, guidance, seed in itertools.product(
            dict.fromkeys(prompts),
            dict.fromkeys(aspect_ratios),
            dict.fromkeys(guidances),
            dict.fromkeys(seeds),
        )
    ]
    account = await AimlApiCredentials.resolve(credentials)
    _check_number(requests, max_combinations, account.base_url)
    destination = await ImageBucket.resolve(bucket)
    with tempfile.TemporaryDirectory(prefix="flux-sweep-") as folder:
        table = Path(folder, "sweep.jsonl")
        await anyio.Path(table).write_text("".join(f"{json.dumps(request.payload())}\n" for request in requests))
        state: State[Any] = await publish_batch.with_options(flow_run_name=f"{len(requests)} variants")(
            str(table),
            bucket,
            credentials,
            max_in_flight=max_in_flight,
            max_credits=max_credits,
            dry_run=dry_run,
            return_state=True,
        )
    result = await state.aresult(raise_on_failure=False)
    batch = result.report if isinstance(result, BatchFailed) else result
    sheets: dict[str, str] = {}
    if isinstance(batch, BatchReport) and not dry_run:
        for prompt, items in itertools.groupby(batch.read(), key=_prompt_of):
            sheets[prompt] = await publish_contact_sheet(prompt, list(items), destination, columns=len(set(seeds)))
            get_run_logger().info("Contact sheet: %s", sheets[prompt])
    if not isinstance(result, BatchReport):
        return cast("SweepReport", State(type=state.type, name=state.name, message=state.message, data=result))
    return cast("SweepReport", Completed(message=state.message, data=SweepReport(batch=result, sheets=sheets)))


def _check_number(requests: Sequence[ImageRequest], most: int, endpoint: str) -> None:
    if len(requests) > most:
        budget = Budget(
            prices=Spool().find_experience(endpoint).prices, default_price=current_settings().credits_per_image
        )
        cost = describe_credits(sum(budget.price_of(request).credits for request in requests))
        raise TooManyCombinations(
            f"The lists make {len(requests):,} images, at most {cost}, and max_combinations is {most}: "
            "shorten a list, or raise max_combinations. Nothing was sent."
        )


def _prompt_of(item: ItemRecord) -> str:
    return "" if item.request is None else item.request.prompt
