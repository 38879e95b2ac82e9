"""What the records of scripts/teacher_sizes.sh say: a row for each teacher, and size and reverse KL told apart.

    python scripts/teacher_sizes_told.py docs/results/teacher-sizes

Legend: R teachers, S draws.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BEST = "expected+ridge"
OURS = "expected+position_mean+norm"  # the quickstart's own choice
SHOWN = ("sampled", BEST, OURS)
BASE = "64x3-long"
"""What variances are over, draw by draw."""
ALIKE = 0.1
"""Difference of log reverse KL up to which two teachers count as equally far."""


@dataclass(frozen=True, slots=True)
class Told:
    """One teacher's records, in order of draws."""

    records: list[dict[str, Any]]

    @property
    def teacher(self) -> dict[str, Any]:
        """Name, size, training."""
        found: dict[str, Any] = self.records[0]["teacher"]
        return found

    def each_S(self, of: Callable[[dict[str, Any]], float]) -> np.ndarray:
        """One figure of every draw."""
        return np.array([of(record) for record in self.records])


def reverse_kl(record: dict[str, Any]) -> float:
    """Nats a response."""
    return float(record["drawn"]["reverse_kl"])


def variance(name: str) -> Callable[[dict[str, Any]], float]:
    """Absolute variance given the prompt of one choice."""
    return lambda record: float(record["absolute"]["variance"] * record["choices"][name]["variance"])


def whole_snr(name: str) -> Callable[[dict[str, Any]], float]:
    """Of single-step term and one choice together, one response."""
    return lambda record: float(record["choices"][name]["whole_snr"])


def single(record: dict[str, Any]) -> float:
    """Squared length of the expected single-step gradient."""
    return float(record["absolute"]["single_squared_length"])


def read(folder: Path) -> list[Told]:
    """By size, then updates, then temperature; only the draws that every teacher has."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(record["teacher"]["name"], {})[record["asked"]["sizes"]["seed"]] = record
    draws = sorted(set.intersection(*(set(of) for of in found.values())))
    teachers = [Told([of[draw] for draw in draws]) for of in found.values()]
    return sorted(teachers, key=lambda of: [of.teacher[key] for key in ("parameters", "updates", "temperature")])


def fit(log_size_R: np.ndarray, log_kl_R: np.ndarray, y_R: np.ndarray) -> np.ndarray:
    """Exponents of size and of reverse KL in a common power law, least squares in logarithms."""
    columns = np.stack([np.ones_like(y_R), log_size_R, log_kl_R], axis=1)
    found: np.ndarray = np.linalg.lstsq(columns, y_R, rcond=None)[0][1:]
    return found


def ranks(value_R: np.ndarray) -> np.ndarray:
    """Mean ranks where values tie."""
    return np.array([(value_R < each).sum() + ((value_R == each).sum() + 1) / 2 for each in value_R])


def rank_correlation(one_R: np.ndarray, other_R: np.ndarray) -> float:
    """Spearman's."""
    return float(np.corrcoef(ranks(one_R), ranks(other_R))[0, 1])


def partial(one_R: np.ndarray, other_R: np.ndarray, given_R: np.ndarray) -> float:
    """Correlation of what is left of two when a straight line in the third is taken away."""
    columns = np.stack([np.ones_like(given_R), given_R], axis=1)
    left = [of - columns @ np.linalg.lstsq(columns, of, rcond=None)[0] for of in (one_R, other_R)]
    return float(np.corrcoef(*left)[0, 1])


def tell_rows(teachers: list[Told]) -> None:
    """Two tables: means over draws, and their range."""
    base = next(of for of in teachers if of.teacher["name"] == BASE)
    print("| teacher | parameters | updates | loss | valid | reverse KL | variance | single, squared |")
    for of in teachers:
        facts = of.teacher
        loss = "–" if facts["validation_loss"] is None else f"{facts['validation_loss']:.3f}"
        valid = "–" if facts["validity"] is None else f"{facts['validity']['mean']:.2f}"
        ratio_S = of.each_S(variance("sampled")) / base.each_S(variance("sampled"))
        print(
            f"| {facts['name']} | {facts['parameters']:,} | {facts['updates']:,} | {loss} | {valid} | "
            f"{spread(of.each_S(reverse_kl))} | {spread(ratio_S)} | {spread(of.each_S(single))} |"
        )
    print(f"\n| teacher | 1000 SNR: single-step alone, whole with {', '.join(SHOWN)} | least errors over without |")
    for of in teachers:
        snrs = [of.each_S(figure) for figure in (single_snr, *(whole_snr(name) for name in SHOWN))]
        errors = [of.each_S(error_ratio(name)) for name in SHOWN]
        cells = [*(spread(1e3 * each) for each in snrs), *map(spread, errors)]
        print(f"| {of.teacher['name']} | {' | '.join(cells)} |")
    print(f"\nvariance of sampled for {BASE}: {spread(base.each_S(variance('sampled')))}")


def single_snr(record: dict[str, Any]) -> float:
    """Of the single-step gradient alone, one response."""
    return float(single(record) / (record["single"]["variance"] * record["absolute"]["total"]))


def error_ratio(name: str) -> Callable[[dict[str, Any]], float]:
    """Squared error of an update with one choice at its best weight, over that of the single-step term alone."""
    return lambda record: float(record["choices"][name]["error"] / record["single"]["error_alone"])


def spread(value_S: np.ndarray) -> str:
    """Mean and the draws' range."""
    return f"{value_S.mean():.3g} ({value_S.min():.3g}–{value_S.max():.3g})"


def tell_causes(teachers: list[Told], figure: Callable[[dict[str, Any]], float], *, what: str) -> None:
    """Correlations and exponents of one figure, over draws' mean logarithms; left-out teachers and single draws."""
    if min(of.each_S(figure).min() for of in teachers) <= 0:
        print(f"\n{what}: not above 0 in every draw, so no logarithms")
        return
    x_R = np.log([of.teacher["parameters"] for of in teachers])
    kl_SR = np.stack([np.log(of.each_S(reverse_kl)) for of in teachers], axis=1)
    y_SR = np.stack([np.log(of.each_S(figure)) for of in teachers], axis=1)
    kl_R, y_R = kl_SR.mean(axis=0), y_SR.mean(axis=0)
    keep = [[at != out for at in range(len(y_R))] for out in range(len(y_R))]
    left = np.array([fit(x_R[of], kl_R[of], y_R[of]) for of in keep])
    draws = np.array([fit(x_R, kl, y) for kl, y in zip(kl_SR, y_SR, strict=True)])
    print(f"\n{what}, {len(teachers)} teachers:")
    for place, (name, z_R, other_R) in enumerate((("size", x_R, kl_R), ("KL", kl_R, x_R))):
        print(
            f"  {name:4}: rank correlation {rank_correlation(z_R, y_R):+.2f}, "
            f"partial {partial(z_R, y_R, other_R):+.2f}, "
            f"exponent {fit(x_R, kl_R, y_R)[place]:+.2f} (one teacher out {left[:, place].min():+.2f} to "
            f"{left[:, place].max():+.2f}; single draws {', '.join(f'{each:+.2f}' for each in draws[:, place])})"
        )
    print(f"  rank correlation of size and KL {rank_correlation(x_R, kl_R):+.2f}; spread of log figure {y_R.std():.2f}")


def tell_pairs(teachers: list[Told]) -> None:
    """Two teachers at a time, on the same text and directions: one cause held, the other changed."""
    for one, other in itertools.combinations(teachers, 2):
        a, b = one.teacher, other.teacher
        apart_S = np.log(other.each_S(reverse_kl) / one.each_S(reverse_kl))
        ratio_S = other.each_S(variance("sampled")) / one.each_S(variance("sampled"))
        same_size = a["parameters"] == b["parameters"]
        if same_size or abs(apart_S.mean()) < ALIKE:
            print(
                f"  {'same size' if same_size else 'same KL':9} {a['name']} -> {b['name']}: parameters × "
                f"{b['parameters'] / a['parameters']:.2g}, KL × {np.exp(apart_S.mean()):.2f}, "
                f"variance × {spread(ratio_S)}"
            )


def main(folder: str) -> None:
    """Everything, as text."""
    teachers = read(Path(folder))
    tell_rows(teachers)
    trained = [of for of in teachers if of.teacher["temperature"] == 1.0]
    names: Iterable[str] = teachers[0].records[0]["choices"]
    for group in (teachers, trained):
        for name in names:
            tell_causes(group, variance(name), what=f"variance of {name}")
        tell_causes(group, single, what="squared length of the single-step gradient")
        for name in SHOWN:
            tell_causes(group, whole_snr(name), what=f"SNR of the whole gradient, {name}")
        tell_causes(group, single_snr, what="SNR of the single-step gradient alone")
    print()
    tell_pairs(teachers)


if __name__ == "__main__":
    main(sys.argv[1])
