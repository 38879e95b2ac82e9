"""All checks, one after the other: printed as they end, and counted."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.results import versions
from minillm.selftest import decoding, divergence, draws, families, gradients, heads, policy, returns, steps, texts
from minillm.selftest.check import Check, device
from minillm.selftest.record import write_outcome
from minillm.store import Clock

CHECKS: tuple[Check, ...] = (
    *gradients.CHECKS,
    *policy.CHECKS,
    *returns.CHECKS,
    *divergence.CHECKS,
    *heads.CHECKS,
    *draws.CHECKS,
    *decoding.CHECKS,
    *families.CHECKS,
    *steps.CHECKS,
    *texts.CHECKS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one check; ``figure`` is an error's first line where it raised one."""

    name: str
    ok: bool
    figure: float | str
    limit: float | None
    seconds: float

    def line(self, width: int) -> str:
        """As it is printed."""
        found = f"{float(self.figure):.2g} (at most {self.limit:.2g})" if self.limit is not None else self.figure
        return f"{self.name:<{width}}  {'ok    ' if self.ok else 'FAILED'}  {found}"


def selftest(json_file: Path | None = None, *, tell: Callable[[str], None] = print) -> bool:
    """Runs all checks and tells of each; whether all passed. What was found is also written to ``json_file``, which
    must be usable (``record.require_usable``)."""
    clock, packages = Clock(), versions()
    found_versions = {"minillm": packages.pop("minillm"), "python": platform.python_version(), **packages}
    tell(", ".join(f"{name} {version}" for name, version in found_versions.items()))
    tell(
        f"device {device_name()}, default dtype {str(torch.get_default_dtype())[6:]}, threads {torch.get_num_threads()}"
    )
    outcomes = run_all(CHECKS, tell=tell)
    failed = [outcome.name for outcome in outcomes if not outcome.ok]
    passed = len(outcomes) - len(failed)
    summary = f"{passed} of {len(outcomes)} checks passed in {clock():.0f} s"
    tell(f"{summary}; FAILED: {'; '.join(failed)}" if failed else summary)
    if json_file is not None:
        checks = [dataclasses.asdict(outcome) for outcome in outcomes]
        write_outcome(
            json_file, {"passed": passed, "failed": len(failed), "versions": found_versions, "checks": checks}
        )
    return not failed


def run_all(checks: Sequence[Check], *, tell: Callable[[str], None]) -> list[Outcome]:
    """The outcome of each check; one that raises has failed, and the next one runs."""
    width, outcomes = max(len(check.name) for check in checks), []
    for check in checks:
        outcomes.append(outcome_of(check))
        tell(outcomes[-1].line(width))
    return outcomes


def outcome_of(check: Check) -> Outcome:
    """Runs one check."""
    start = time.perf_counter()
    try:
        figure, limit = found = check.run()
    except Exception as error:
        lines = str(error).splitlines()
        said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return Outcome(name=check.name, ok=False, figure=said, limit=None, seconds=_since(start))
    shown = figure if math.isfinite(figure) else str(figure)  # JSON has no NaN
    return Outcome(name=check.name, ok=found.ok, figure=shown, limit=limit, seconds=_since(start))


def device_name() -> str:
    """``cpu``, or ``cuda`` and what the first GPU is called."""
    return f"cuda ({torch.cuda.get_device_name()})" if device().type == "cuda" else "cpu"


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 3)
