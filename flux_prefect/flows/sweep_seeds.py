"""Publish prompts in many variants, with a contact sheet of each prompt."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, cast

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.api.models import AspectRatio, OutputFormat, SafetyTolerance, Seed
from flux_prefect.api.registry import TextToImageModel
from flux_prefect.batch.final_state import copy_state
from flux_prefect.batch.planning import check_combinations
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.display.contact_sheets import publish_contact_sheets
from flux_prefect.errors import BatchFailed
from flux_prefect.flows.form_types import BucketChoice, CredentialsChoice, CreditCap, InFlight
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.manifest.report import BatchReport
from flux_prefect.tables.variants import combine_requests, write_requests

__all__ = ["MAX_COMBINATIONS", "SweepReport", "sweep_seeds"]

MAX_COMBINATIONS = 1000
"""The most images that max_combinations allows."""

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
    max_combinations: Annotated[int, Field(ge=1, le=MAX_COMBINATIONS)] = 64,
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
    requests = combine_requests(
        prompts,
        seeds,
        aspect_ratios,
        guidance_scales,
        output_format=output_format,
        safety_tolerance=safety_tolerance,
        model=model,
    )
    account = await AimlApiCredentials.resolve(credentials)
    check_combinations(requests, max_combinations, account.base_url)
    destination = await ImageBucket.resolve(bucket)
    with tempfile.TemporaryDirectory(prefix="flux-sweep-") as folder:
        table = Path(folder, "sweep.jsonl")
        await write_requests(requests, table)
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
        sheets = await publish_contact_sheets(batch.read(), destination, len(set(seeds)), get_run_logger())
    if not isinstance(result, BatchReport):
        return cast("SweepReport", copy_state(state, result))
    return cast("SweepReport", Completed(message=state.message, data=SweepReport(batch=result, sheets=sheets)))
