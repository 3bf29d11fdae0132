"""Report the plan and build the flow run's final state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect.artifacts import acreate_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from flux_prefect.display.progress import Logger
from flux_prefect.display.run_names import initial_run_name, planned_run_name, rename_run
from flux_prefect.errors import BatchFailed
from flux_prefect.manifest.plan import Plan, describe_plan
from flux_prefect.manifest.report import BatchReport

__all__ = ["announce_plan", "batch_state", "cancelled_state", "copy_state", "finish_dry_run"]


async def announce_plan(plan: Plan, source: str | Sequence[Any], logger: Logger) -> None:
    """Report a plan in the log, in the artifact `flux-plan` and in the enclosing flow run's name.

    Raises:
        Exception: Prefect's server did not take the artifact.
    """
    await _show_plan(plan, logger)
    await rename_run(planned_run_name(source, plan), instead_of=initial_run_name(source))


async def finish_dry_run(plan: Plan, source: str | Sequence[Any], logger: Logger) -> State[Any]:
    """Report a plan as `announce_plan` does, and return the final state of a dry run.

    Raises:
        Exception: Prefect's server did not take the artifact.
    """
    await _show_plan(plan, logger)
    await rename_run(f"dry run of {planned_run_name(source, plan)}", instead_of=initial_run_name(source))
    return batch_state(BatchReport(plan=plan, dry_run=True), max_failed=0)


def batch_state(report: BatchReport, max_failed: int) -> State[Any]:
    """Build a run's final state. Its message is the summary on the run's page; its data is what the flow returns.

    Returns:
        Completed with the report, or Failed with a `BatchFailed` if more than `max_failed` items have no image.
    """
    if report.unsuccessful > max_failed:
        failed = f"{report.unsuccessful} of {report.rows} items without their images (max_failed {max_failed})"
        message = f"{failed}: {report.summary()}"
        return Failed(message=message, data=BatchFailed(message, report))
    return Completed(message=report.summary(), data=report)


def cancelled_state(manifest: str) -> State[Any]:
    """Build the final state of a cancelled run that has ended in order."""
    return Cancelled(message=f"What was paid for is published. The record of every row: {manifest}")


def copy_state(state: State[Any], result: Any) -> State[Any]:
    """Build a run's final state as a copy of its subrun's, so that the run's page shows the subrun's summary.

    Prefect would aggregate the subrun's own state into a new one. Callers of the flow get the result.
    """
    return State(type=state.type, name=state.name, message=state.message, data=result)


async def _show_plan(plan: Plan, logger: Logger) -> None:
    logger.info("Plan: %s", plan.summary())
    for name, value in plan.table.items():
        logger.info("Table: %s: %s", name, value)
    for warning in plan.warnings:
        logger.warning("%s", warning)
    await acreate_table_artifact(
        [{"plan": name, "value": value} for name, value in describe_plan(plan).items()],
        key="flux-plan",
        description=plan.summary(),
    )
