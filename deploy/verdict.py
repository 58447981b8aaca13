"""What the regression gate says: checks, each with an outcome and a reason, and their sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["pass", "fail", "not enough evidence"]
Kind = Literal["accuracy", "latency", "cost", "structure", "parity"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: Short, as ``AP``, ``AP of person``, ``latency p90``, ``file size``.
        kind: Of which family it is.
        outcome: ``pass``, ``fail`` or ``not enough evidence``.
        reason: One sentence with expected and found, and what to do where it did not pass.
        figures: Numbers behind it, as JSON.
        required: Whether it counts; one that does not only informs.
    """

    name: str
    kind: Kind
    outcome: Outcome
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)
    required: bool = True


@dataclass(frozen=True)
class Verdict:
    """The gate's answer for one new model against one baseline.

    Attributes:
        checks: All that was looked at.
    """

    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        """``fail`` if a required check failed, else ``not enough evidence`` if one lacks it."""
        found = {check.outcome for check in self.checks if check.required}
        if "fail" in found:
            return "fail"
        return "not enough evidence" if "not enough evidence" in found else "pass"

    @property
    def passed(self) -> bool:
        """Whether every required check passed; without evidence there is no pass."""
        return bool(self.checks) and self.outcome == "pass"
