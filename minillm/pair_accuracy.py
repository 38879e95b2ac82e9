"""Preferences that were held out: on how many pairs does a model give the preferred response the higher reward?

The reward of a response is implicit, as in direct preference optimisation: the model's log-probability of it less a
reference's, or without a reference the log-probability alone. It is in nats; the factor beta of a stage changes no
order, so it is left out.

Legend: N prompts, each with one pair or several.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minillm.compare.pairs import sign_test
from minillm.config import RunConfig
from minillm.errors import DataError
from minillm.loading import fingerprint
from minillm.pairs import Pair, check_alone
from minillm.preference_reading import PairSplit, read_preferences
from minillm.preflight import limits_record
from minillm.ranks import Ranks
from minillm.sequence_logps import ids_of, pair_logps
from minillm.stages import load_teacher
from minillm.statistics import Array, Ratio, estimate
from minillm.store import Clock
from minillm.types import PreferencePair
from minillm.vocabulary import agree

SCHEMA = 1
CHANCE = 0.5
"""Accuracy of a model that knows nothing; a tie counts as much."""
HELD_OUT = "preferences_validation"
"""What the rows are read as: pairs that answer held-out prompts are welcome here."""
Logps = Sequence[tuple[float, float]]
"""Of each pair, in nats: the chosen response, the rejected one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """What a model makes of one pair, in nats, or in nats a token."""

    chosen: float
    rejected: float

    @property
    def margin(self) -> float:
        """How much more the chosen response gets."""
        return self.chosen - self.rejected


def pair_accuracy(
    model: str | Path,
    config: RunConfig,
    *,
    pairs: str | None = None,
    reference: str | Path | None = None,
    per_token: bool = False,
    limit: int | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """On how many of the pairs ``model`` gives the chosen response the higher reward, with what is known beside it.

    ``pairs`` is a source of preferences (``data.preferences_validation`` where not given), of which ``limit`` takes the
    first; ``config`` says how rows are read and how much at once, its models are not read. The reward is the
    log-probability under ``model`` less that under ``reference``, where there is one; ``per_token`` divides it by the
    response's tokens. To be called on every rank. Raises ``DataError`` without pairs and for rows that break the run's
    policy, ``VocabularyMismatch`` where the two models do not read the same ids.
    """
    clock, told = Clock(), say or (lambda _: None)
    source = config.data.preferences_validation if pairs is None else pairs
    if source is None:
        raise DataError("no pairs to measure on; give --pairs FILE, or set data.preferences_validation")
    pair = check_alone(config, str(model))
    base = None if reference is None else check_alone(config, str(reference))
    if base is not None:
        agree(base.tokenizer, pair.tokenizer)
    split = read_preferences(config, source, pair=pair, name=HELD_OUT, limit=limit)
    for line in split.words:
        told(line)
    ranks = Ranks(threads=config.threads)
    read = partial(_logps, split.pairs, config, ranks=ranks, say=told)
    own = read(pair)
    others = [(0.0, 0.0)] * len(own) if base is None else read(base)
    rewards = [rewards_of(*each, per_token=per_token) for each in zip(split.pairs, own, others, strict=True)]
    measure = partial(figures, resamples=config.evaluation.bootstrap, seed=config.seed)
    return {
        "schema": SCHEMA,
        "model": str(model),
        "reference": None if reference is None else str(reference),
        "asked": _asked(config, split, pair, base, per_token=per_token),
        **measure(split.pairs, rewards),
        **({"sources": _by_source(split, rewards, measure)} if len(split.sources) > 1 else {}),
        "bootstrap": {"resamples": config.evaluation.bootstrap, "seed": config.seed},
        "seconds": round(clock(), 2),
        "date": time.strftime("%Y-%m-%d"),
    }


def figures(
    pairs: Sequence[PreferencePair], rewards: Sequence[Rewards], *, resamples: int, seed: int
) -> dict[str, Any]:
    """``accuracy`` (the share of pairs with the higher reward on the chosen side, ties as half), ``margin``, ``chosen``
    and ``rejected`` (mean rewards), each with an interval over *prompts*: pairs of one prompt are drawn together.

    ``p``: the two-sided probability of a split of the prompts at least as uneven, were chosen and rejected equally
    likely to win most pairs of a prompt (the exact sign test; even prompts are left out). ``length``: mean tokens of
    both sides, and of the pairs of unequal length how often the chosen response is the longer one.
    """
    margins = [each.margin for each in rewards]
    points = [CHANCE if margin == 0 else float(margin > 0) for margin in margins]
    lengths = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    unequal = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    columns = {
        "accuracy": points,
        "margin": margins,
        "chosen": [each.chosen for each in rewards],
        "rejected": [each.rejected for each in rewards],
    }
    ratios = _by_prompt(pairs, columns)
    of_prompt_N = (ratios["accuracy"].numerator_SN / ratios["accuracy"].denominator_SN)[0]
    wins, losses = points.count(1.0), points.count(0.0)
    return {
        **estimate(ratios, resamples=resamples, seed=seed),
        "pairs": len(pairs),
        "prompts": len(of_prompt_N),
        "higher": {"chosen": wins, "rejected": losses, "neither": len(points) - wins - losses},
        "p": sign_test(int((of_prompt_N > CHANCE).sum()), int((of_prompt_N < CHANCE).sum())),
        "length": {
            "chosen": float(np.mean([chosen for chosen, _ in lengths])),
            "rejected": float(np.mean([rejected for _, rejected in lengths])),
            "longer_chosen": float(np.mean(unequal)) if unequal else None,
        },
    }


def _by_prompt(pairs: Sequence[PreferencePair], columns: Mapping[str, Sequence[float]]) -> dict[str, Ratio]:
    """Each column as a mean over pairs whose units of resampling are prompts."""
    numbers: dict[tuple[int, ...], int] = {}
    at = [numbers.setdefault(pair.prompt.ids, len(numbers)) for pair in pairs]
    uids = tuple(map(str, numbers.values()))

    def summed(values: Sequence[float]) -> Array:
        return np.bincount(at, weights=np.array(values, dtype=float), minlength=len(uids)).astype(float)[None]

    return {
        name: Ratio(uids=uids, seeds=(0,), numerator_SN=summed(values), denominator_SN=summed([1.0] * len(pairs)))
        for name, values in columns.items()
    }


def _by_source(
    split: PairSplit, rewards: Sequence[Rewards], measure: Callable[..., dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    found = {}
    for source in split.sources:
        places = [place for place, pair in enumerate(split.pairs) if pair.source == source]
        found[source] = measure([split.pairs[place] for place in places], [rewards[place] for place in places])
    return found


def rewards_of(
    pair: PreferencePair, own: tuple[float, float], other: tuple[float, float], *, per_token: bool
) -> Rewards:
    """Of the log-probabilities of both responses under the model and under its reference, chosen first."""
    chosen, rejected = (mine - theirs for mine, theirs in zip(own, other, strict=True))
    if per_token:
        chosen, rejected = chosen / len(pair.chosen_ids), rejected / len(pair.rejected_ids)
    return Rewards(chosen=chosen, rejected=rejected)


def _logps(
    pairs: Sequence[PreferencePair], config: RunConfig, read: Pair, *, ranks: Ranks, say: Callable[[str], None]
) -> Logps:
    """What a model gives to both responses of each pair. Its weights are gone afterwards: of two, one at a time."""
    with closing(load_teacher(read, ranks=ranks, say=say)) as model:
        limits = limits_record(config.evaluation)
        return pair_logps(map(ids_of, pairs), model=model, ids=read.ids, ranks=ranks, limits=limits)


def _asked(config: RunConfig, split: PairSplit, pair: Pair, base: Pair | None, *, per_token: bool) -> dict[str, Any]:
    return {
        "weights": fingerprint(pair.student_card),
        "reference_weights": None if base is None else fingerprint(base.student_card),
        "dtypes": [each.student_card.dtype for each in (pair, base) if each is not None],
        "source": split.source,
        "data": split.sha256,
        "template": config.data.template,
        "reward": "log-probability" if base is None else "log-ratio",
        "per_token": per_token,
    }
