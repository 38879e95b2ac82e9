"""A stand-in for a judge where none can be asked: which of two responses a frozen model finds likelier.

It is no opinion on the responses. A model finds likely what it would write itself, and a sum over tokens is the larger
the fewer tokens there are; so the record says how long both sides are, and how often the shorter one wins. There is no
order in which the two are shown, so nothing is asked twice.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm.errors import ConfigError, DataError
from minillm.judge.figures import mean, outcome_ratios, ratio
from minillm.judge.run import SCHEMA, default_out, require_opponent, stored_judging
from minillm.judge.samples import Sample, Side, asked_of_sides, comparable, read_sides
from minillm.loading import fingerprint
from minillm.micro_batches import Limits
from minillm.pairs import Pair, check_frozen
from minillm.prompts import encode
from minillm.ranks import Ranks
from minillm.sequence_logps import TokenIds, pair_logps
from minillm.stages import load_teacher
from minillm.statistics import estimate
from minillm.store import Clock, make_folder, write_jsonl, write_text

KIND = "log-probability"
"""Names this kind of judge in a record."""
TIE = 1e-3
"""Nats: about what rounding in 32 bits adds up to over a response."""
AT_ONCE = Limits(rows=8, places=8192)
PER_TOKEN = "mean"
NO_TOKEN = "a cut response without a token"
ENDED, CUT = ("eos", "empty"), "length"
VERDICTS = {1: "left", 0: "tie", -1: "right"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One of the two responses to a prompt, as the model reads it."""

    text: str
    ids: TokenIds
    """With the closing EOS, unless it was cut."""
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A prompt with the left and the right answer to it."""

    uid: str
    prompt_ids: TokenIds
    answers: tuple[Answer, Answer]

    @property
    def same(self) -> bool:
        """Whether both say the same, which no model need be asked."""
        return self.answers[0].text == self.answers[1].text

    @property
    def readable(self) -> bool:
        """Whether both have a token that a probability can be given to."""
        return all(answer.ids for answer in self.answers)


def win_rate(
    left: str | Path,
    right: str | Path | None = None,
    *,
    by: str | Path,
    against: str | None = None,
    per_token: bool = False,
    tie: float = TIE,
    seed: int | None = None,
    temperature: float | None = None,
    limit: int | None = None,
    limits: Limits = AT_ONCE,
    out: str | Path | None = None,
    fresh: bool = False,
    resamples: int = 2000,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compares responses of two evaluation folders, or of one with its references (``against="references"``), by what
    the model ``by`` gives to them; the record, as it is written to ``out/judge.json``.

    Each response has its log-probability after its prompt, in nats: the sum over its tokens, the closing EOS included
    where it was not cut, or with ``per_token`` their mean. The larger one wins; equal texts, and figures no more than
    ``tie`` apart, tie. Texts are read anew by the model's own tokenizer. To be called on every rank. Raises
    ``ConfigError`` for settings that mean nothing, ``DataError`` for folders that cannot be compared or an ``out`` that
    holds another judging, ``PositionsExceeded`` where a text is too long for the model.
    """
    clock, told = Clock(), say or (lambda _: None)
    if not (math.isfinite(tie) and tie >= 0):
        raise ConfigError(f"tie: got {tie:g}, wanted 0 or more nats, a finite number")
    sides = _sides(left, right, against=against, seed=seed, temperature=temperature)
    pair = check_frozen(str(by))
    places = comparable(sides, references=against is not None)
    without, places = len(sides[0].samples) - len(places), places[:limit]
    matches = _matches([_opponents(sides, n) for n in places], pair)
    asked = {
        **asked_of_sides(sides, mode="pairwise", against=against),
        "judge": KIND,
        "weights": fingerprint(pair.student_card),
        "dtype": pair.student_card.dtype,
        "score": PER_TOKEN if per_token else "sum",
        "tie": tie,
    }
    folders = [side.folder for side in sides]
    out = default_out(*folders, against=against, what="win-rate") if out is None else Path(out)
    ranks = Ranks()
    ranks.of_first(lambda: None if fresh else stored_judging(out, asked, prompts=len(matches)))
    ranks.of_first(lambda: make_folder(out, setting="--out"))
    told(f"{len(matches)} prompts, seed {sides[0].seed}, temperature {sides[0].temperature:g}: two responses each")
    logps = _logps(matches, pair, ranks=ranks, limits=limits, say=told)
    scores = [_scores(match, logp, per_token=per_token) for match, logp in zip(matches, logps, strict=True)]
    outcomes = [_outcome(match, score, tie=tie) for match, score in zip(matches, scores, strict=True)]
    record = {
        "schema": SCHEMA,
        "mode": "pairwise",
        "asked": asked,
        **_figures(matches, scores, outcomes, resamples=resamples),
        "prompts": len(matches),
        "without_reference": without,
        "judge": {"kind": KIND, "model": str(by), "score": asked["score"], "tie": tie},
        "bootstrap": {"resamples": resamples, "seed": 0},
        "seconds": round(clock(), 2),
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = _rows(matches, logps, outcomes, right="B" if against is None else "reference")
    ranks.of_first(lambda: _write(out, record, rows))
    return record


def _sides(
    left: str | Path, right: str | Path | None, *, against: str | None, seed: int | None, temperature: float | None
) -> list[Side]:
    require_opponent(right, against=against, single=False)
    if right is None and against is None:
        raise ConfigError(f"{left}: nothing to compare with; name another evaluation B, or --against references")
    folders = [Path(left)] if right is None else [Path(left), Path(right)]
    return read_sides(folders, seed=seed, temperature=temperature)


def _opponents(sides: Sequence[Side], place: int) -> tuple[Sample, Sample]:
    """The left sample and the right one of a prompt; a reference is the right one where there is no second side."""
    ours = sides[0].samples[place]
    theirs = sides[1].samples[place] if len(sides) > 1 else Sample(ours.uid, ours.prompt, ours.reference, "", "eos")
    for side, sample in zip(sides, (ours, theirs), strict=False):
        if sample.stop not in (*ENDED, CUT):
            raise DataError(
                f"{side.folder / 'samples.jsonl'}: row {sample.uid!r} does not say how its response ended (stop: "
                f"{sample.stop!r}), so nobody knows whether its end is part of it; evaluate the model again"
            )
    return ours, theirs


def _matches(samples: Sequence[tuple[Sample, Sample]], pair: Pair) -> list[Match]:
    """The pairs of responses as the model's tokenizer reads them, prompt and response each by itself."""
    uids, eos = [ours.uid for ours, _ in samples], pair.ids.eos[0]
    prompts = encode([ours.prompt for ours, _ in samples], pair.tokenizer, uids=uids)
    texts = [encode([both[side].response for both in samples], pair.tokenizer, uids=uids) for side in (0, 1)]
    if bare := [uid for uid, ids in zip(uids, prompts, strict=True) if not ids]:
        raise DataError(f"row {bare[0]!r}: the model's tokenizer reads its prompt as no token at all; leave it out")
    matches = []
    for n, both in enumerate(samples):
        left, right = (
            Answer(text=one.response, ids=ids[n] if one.stop == CUT else (*ids[n], eos), cut=one.stop == CUT)
            for one, ids in zip(both, texts, strict=True)
        )
        matches.append(Match(uid=uids[n], prompt_ids=prompts[n], answers=(left, right)))
    if not any(match.readable for match in matches):
        raise DataError(f"none of {len(matches)} pairs can be compared: {NO_TOKEN}; evaluate with longer responses")
    longest = max(len(each.prompt_ids) + len(answer.ids) for each in matches for answer in each.answers)
    pair.student.require_positions(longest, what="model", lower="the evaluation's data.max_prompt_tokens")
    return matches


def _logps(
    matches: Sequence[Match], pair: Pair, *, ranks: Ranks, limits: Limits, say: Callable[[str], None]
) -> list[tuple[float, float] | None]:
    """What the model gives to both answers, summed over their tokens; None where one has none."""
    readable = [
        (match.prompt_ids, left.ids, right.ids)
        for match in matches
        for left, right in [match.answers]
        if match.readable
    ]
    with closing(load_teacher(pair, ranks=ranks, say=say)) as model:
        found = iter(pair_logps(readable, model=model, ids=pair.ids, ranks=ranks, limits=limits))
    return [next(found) if match.readable else None for match in matches]


def _scores(match: Match, logp: tuple[float, float] | None, *, per_token: bool) -> tuple[float, float] | None:
    """What is compared."""
    if logp is None or not per_token:
        return logp
    left, right = match.answers
    return logp[0] / len(left.ids), logp[1] / len(right.ids)


def _outcome(match: Match, score: tuple[float, float] | None, *, tie: float) -> int | None:
    """1 where the left answer wins, -1 where the right one does, 0 for a tie, None where nothing can be said."""
    if score is None:
        return None
    gap = score[0] - score[1]
    return 0 if match.same or abs(gap) <= tie else 1 if gap > 0 else -1


def _figures(
    matches: Sequence[Match],
    scores: Sequence[tuple[float, float] | None],
    outcomes: Sequence[int | None],
    *,
    resamples: int,
) -> dict[str, Any]:
    """Shares and the mean ``margin`` (left less right) with intervals; and what a reader needs to see that length
    alone may have decided."""
    uids = [match.uid for match in matches]
    judged = [n for n, score in enumerate(scores) if score is not None]
    gap_N = np.array([0.0 if score is None else score[0] - score[1] for score in scores])
    judged_N = np.array([float(score is not None) for score in scores])
    lengths = [[len(matches[n].answers[side].ids) for n in judged] for side in (0, 1)]
    decided = [
        (outcomes[n], len(matches[n].answers[0].ids) - len(matches[n].answers[1].ids)) for n in judged if outcomes[n]
    ]
    return {
        **estimate(
            {**outcome_ratios(uids, outcomes), "margin": ratio(uids, gap_N, judged_N)}, resamples=resamples, seed=0
        ),
        "judged": len(judged),
        "unjudged": len(matches) - len(judged),
        "unanswered": dict(Counter([NO_TOKEN] * (len(matches) - len(judged)))),
        "same": sum(match.same for match in matches),
        "length": {
            "left": mean(lengths[0]),
            "right": mean(lengths[1]),
            "shorter_wins": mean([outcome != np.sign(longer) for outcome, longer in decided if longer]),
        },
        "cut": {name: sum(match.answers[side].cut for match in matches) for side, name in ((0, "left"), (1, "right"))},
    }


def _rows(
    matches: Sequence[Match],
    logps: Sequence[tuple[float, float] | None],
    outcomes: Sequence[int | None],
    *,
    right: str,
) -> list[dict[str, Any]]:
    return [
        {
            "uid": match.uid,
            "left": "A",
            "right": right,
            "verdict": None if outcome is None else VERDICTS[outcome],
            "reason": NO_TOKEN if outcome is None else "",
            "logp": logp,
            "tokens": [len(answer.ids) for answer in match.answers],
            "cut": [answer.cut for answer in match.answers],
        }
        for match, logp, outcome in zip(matches, logps, outcomes, strict=True)
    ]


def _write(out: Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    write_jsonl(out / "judgements.jsonl", rows)
    write_text(out / "judge.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
