"""The plan of a batch in numbers: its work, and the most that it can cost."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.money.budget import describe_credits

__all__ = ["Plan", "describe_plan"]


class Plan(BaseModel):
    """The planned work of a batch in numbers, and the most that it can cost."""

    model_config = ConfigDict(frozen=True)

    rows: int = Field(description="Rows of the table.")
    invalid: int = Field(description="Rows that are not valid requests.")
    published: int = Field(description="Rows whose images are all in the bucket; they cost nothing.")
    repeats: int = Field(description="Rows with the same request as an earlier row; each request is paid for once.")
    paid: int = Field(description="Rows whose images this host has paid for and only need publishing.")
    requests: int = Field(description="Calls to pay for, at most.")
    images: int = Field(description="Images to pay for, at most.")
    most_credits: float = Field(description="The most that those calls cost, in credits, at known prices.")
    max_credits: float | None = Field(description="The cap, in credits.")
    max_images: int | None = Field(description="The cap, in images paid for.")
    balance: float | None = Field(
        default=None, description="The account's balance, in credits; None where the service does not report it."
    )
    seconds: float | None = Field(
        default=None, description="The estimated duration at the pace of the last batch; None for the first batch."
    )
    warnings: tuple[str, ...] = Field(default=(), description="What to know before paying, such as a deprecated model.")
    table: dict[str, str] = Field(
        default_factory=dict, description="How the table was read: its delimiter, encoding and columns."
    )

    @property
    def spendable(self) -> float:
        """The most that this batch can cost under its cap, in credits."""
        return self.most_credits if self.max_credits is None else min(self.most_credits, self.max_credits)

    def summary(self) -> str:
        """Summarize the work and its cost in one line."""
        known = {
            "already there": self.published,
            "paid for and to be published": self.paid,
            "repeated in the table": self.repeats,
            "invalid": self.invalid,
        }
        others = "".join(f", {number} {name}" for name, number in known.items() if number)
        line = f"{self.rows} rows: {self.requests} to generate{others}; at most {describe_credits(self.most_credits)}"
        if self.spendable < self.most_credits:
            line += f", capped at {describe_credits(self.spendable)}"
        return line


def describe_plan(plan: Plan) -> dict[str, str]:
    """Format the plan's numbers as text, each under its label."""
    described = {
        "rows": f"{plan.rows:,}",
        "invalid rows": f"{plan.invalid:,}",
        "already published": f"{plan.published:,}",
        "paid for, to be published": f"{plan.paid:,}",
        "repeated in the table": f"{plan.repeats:,}",
        "to generate": f"{plan.requests:,} requests, {plan.images:,} images",
        "at most": describe_credits(plan.most_credits),
    }
    if plan.max_credits is not None:
        described["cap"] = describe_credits(plan.max_credits)
    if plan.max_images is not None:
        described["cap in images"] = f"{plan.max_images:,}"
    if plan.balance is not None:
        described["the account has"] = describe_credits(plan.balance)
    if plan.seconds is not None:
        described["time at the last pace"] = f"{plan.seconds:,.0f} s"
    described |= plan.table
    for number, warning in enumerate(plan.warnings, 1):
        described["warning" if number == 1 else f"warning {number}"] = warning
    return described
