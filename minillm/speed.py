"""How fast steps are and where their time goes: what the log has beside a step's figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from minillm import collectives, phases, work

PHASES = ("rollout", "scoring", "learning")
"""What a step is made of, in order: saves and validations are no part of it."""
SPEED = "speed"
"""The name under which a line of the log has these figures, which are never the same twice."""
TALK = "communication"


@dataclass(frozen=True, slots=True)
class _Clocks:
    """What this process has spent and done so far."""

    phases: dict[str, float]
    talked: float
    worked: float


class Speedometer:
    """The clocks of this rank over the steps of a stage."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._peak = device, work.peak(device)
        self._begun: _Clocks | None = None
        self._sums = defaultdict[str, float](float)

    def begin(self) -> None:
        """A step begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._begun = _Clocks(phases.seconds(), collectives.seconds(), work.done())

    def end(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Of the step, which ends with these figures: ``seconds``; ``tokens_per_second``, where it counted ``tokens``
        (those of all ranks); shares of the seconds in each phase that it had, and in ``communication`` (within the
        phases; waiting for other ranks included); ``tflops`` of this rank; on a known GPU ``mfu``, the share of its
        rate. On any GPU ``peak_bytes`` too: the most that tensors took of its memory."""
        begun = self._begun
        assert begun is not None, "a step that ends has begun"
        now = phases.seconds()
        spent = {
            **{name: now.get(name, 0.0) - begun.phases.get(name, 0.0) for name in PHASES},
            TALK: collectives.seconds() - begun.talked,
            "worked": work.done() - begun.worked,
            "tokens": figures.get("tokens", 0.0),
        }
        for name, value in spent.items():
            self._sums[name] += value
        told = {name: float(f"{value:.4g}") for name, value in self._told(spent).items()}
        if self._device.type == "cuda":
            told["peak_bytes"] = float(torch.cuda.max_memory_allocated(self._device))
        return told

    def words(self) -> str:
        """The same of all steps so far, for a person."""
        told = self._told(self._sums)
        shares = [f"{name} {told[name]:.0%}" for name in (*PHASES, TALK) if name in told]
        rates = [f"{told['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in told else []
        rates += [f"{told['tflops']:.3g} TFLOP/s a rank" + (f", MFU {told['mfu']:.0%}" if "mfu" in told else "")]
        return ", ".join([*rates, "of the time " + " + ".join(shares[:-1]) + f", {shares[-1]} within"])

    def _told(self, spent: Mapping[str, float]) -> dict[str, float]:
        whole = max(sum(spent[name] for name in PHASES), 1e-9)
        rate = spent["worked"] / whole
        return {
            "seconds": whole,
            **({"tokens_per_second": spent["tokens"] / whole} if spent["tokens"] else {}),
            **{name: spent[name] / whole for name in PHASES if spent[name] > 0},
            TALK: spent[TALK] / whole,
            "tflops": rate / 1e12,
            **({} if self._peak is None else {"mfu": rate / self._peak}),
        }
