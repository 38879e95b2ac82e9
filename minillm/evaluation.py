"""What a model is worth on held-out prompts: text drawn from it with keyed randomness, judged, and kept.

Legend: B rows of a batch, T response positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm.batches import prompt_batch
from minillm.config import BETTER
from minillm.decode import roll_out
from minillm.gold import Gold, read_gold, reference_loss
from minillm.measures import MEASURES, ratios_of
from minillm.micro_batches import Limits, alike
from minillm.models import ModelReader
from minillm.preference_reference import Prepared
from minillm.preference_stage import PreferenceStage
from minillm.preferences import pair_measures
from minillm.ranks import Ranks
from minillm.scoring import score
from minillm.statistics import mean_over_seeds
from minillm.student_engine import Student
from minillm.sweep import in_batches
from minillm.teacher_engine import Teacher
from minillm.text_measures import exact_match, repetition_3, rouge_l
from minillm.types import Decoding, DrawKey, Ids, Prompt, Purpose, Rollout, Scored
from minillm.unfinished import Keeper, Key
from minillm.world import check

Record = dict[str, Any]
VALIDATED = tuple(name for name in BETTER if name in MEASURES)
"""What validation measures beside the loss: what ``keep`` may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """All that an evaluation needs beside the model: one record for validation and for the final test (design D12)."""

    prompts: Sequence[Prompt]
    decoding: Decoding
    tokenizer: PreTrainedTokenizerBase
    ids: Ids
    teacher: Teacher | None
    """Gives the reverse KL; None leaves that measure out."""
    check: Callable[[str, str], Record] | None
    """Figures of a response to a prompt that an exact checker of such prompts has; None where there is none."""
    limits: Limits
    """Most rows decoded at once on a rank, and most tokens of them: memory and speed, never the result."""
    seed: int
    purpose: Purpose
    thorough: bool = False
    """Whether forward KL, the teacher's view of the text and the model's of the references are wanted too."""


def sample_and_judge(
    reader: ModelReader,
    judge: Judge,
    *,
    seeds: Sequence[int],
    temperatures: Sequence[float],
    ranks: Ranks,
    title: str = "",
    keeper: Keeper | None = None,
) -> list[Record]:
    """One record a prompt, seed and temperature (a row of ``samples.jsonl``): all of them on every rank, in a fixed
    order.

    Randomness is keyed by (run seed, uid, sampling seed), so neither batch size nor ranks change a token. At
    temperature t the reverse KL is that of the t-scaled model from the t-scaled teacher, exact over the vocabulary at
    each state that the model itself visited. With a ``title`` there is a progress bar. A ``keeper`` has the rows that
    an earlier process drew, which are not drawn again, and keeps those of this one. Batches are cut as if none were
    there, so an evaluation that goes on has the figures of an unbroken one to the last bit.
    """
    batches = batches_of_rank(judge, numbers=seeds, ranks=ranks)
    there = 0 if keeper is None else len(keeper.kept("samples"))
    gold: list[Gold | None] = [None] * len(judge.prompts)
    if judge.thorough and there < len(judge.prompts) * len(seeds) * len(temperatures):
        gold = read_gold(reader, judge.prompts, pad_id=judge.ids.pad, limits=judge.limits, ranks=ranks)
    decodings = [dataclasses.replace(judge.decoding, temperature=temperature) for temperature in temperatures]

    def draw(piece: int, keys: Sequence[Key]) -> list[Record]:
        decoding = decodings[piece // len(batches)]
        cells = [(place, seed) for _, seed, place in keys]
        return _judge_batch(reader, judge, cells, gold=gold, decoding=decoding, ranks=ranks)

    pieces = [[(turn, seed, place) for place, seed in batch] for turn in range(len(temperatures)) for batch in batches]
    rows = in_batches(pieces, draw, part="samples", ranks=ranks, keeper=keeper, title=title)
    return [record for _, record in rows]


def batches_of_rank(judge: Judge, *, numbers: Sequence[int], ranks: Ranks) -> list[list[tuple[int, int]]]:
    """What this rank draws: (place of a prompt, one of ``numbers``, such as its sampling seed) in batches of prompts of
    similar length, as many on every rank."""
    cells = [(place, number) for place in range(len(judge.prompts)) for number in numbers]
    lengths = [len(judge.prompts[place].ids) for place, _ in cells]
    cuts = alike(lengths, limits=judge.limits, ranks=ranks.size, more=judge.decoding.max_new_tokens)
    return [[cells[index] for index in rows] for rows in cuts[ranks.rank]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairJudge:
    """What an evaluation of a student on held-out pairs needs beside it."""

    stage: PreferenceStage
    known: Prepared
    ids: Ids
    limits: Limits
    """Most pairs read at once on a rank, and most tokens of them."""


def validator(
    judge: Judge | None, *, ranks: Ranks, generate: bool, loss: bool, pairs: PairJudge | None = None
) -> Callable[[Student], dict[str, float]]:
    """Measures of a student in training: those of one sample a prompt (``generate``), the loss on references
    (``loss``), and those of ``pairs``. Without a ``judge`` there are no prompts to measure it on."""

    def measure(student: Student) -> dict[str, float]:
        figures: dict[str, float] = {}
        with student.whole() as reader:
            if pairs is not None:
                figures.update(
                    pair_measures(reader, pairs.stage, pairs.known, ids=pairs.ids, limits=pairs.limits, ranks=ranks)
                )
            if judge is None:
                return figures
            if loss:
                figures["loss"] = reference_loss(
                    reader, judge.prompts, pad_id=judge.ids.pad, limits=judge.limits, ranks=ranks
                )
            if generate:
                records = sample_and_judge(
                    reader, judge, seeds=(0,), temperatures=(judge.decoding.temperature,), ranks=ranks
                )
                figures.update(
                    {name: mean_over_seeds(ratio) for name, ratio in ratios_of(records, names=VALIDATED).items()}
                )
        return figures

    return measure


def _judge_batch(
    reader: ModelReader,
    judge: Judge,
    cells: Sequence[tuple[int, int]],
    *,
    gold: Sequence[Gold | None],
    decoding: Decoding,
    ranks: Ranks,
) -> list[Record]:
    rows = [judge.prompts[place] for place, _ in cells]
    batch = prompt_batch(rows, [seed for _, seed in cells], pad_id=judge.ids.pad, device=reader.device)
    lockstep = reader.lockstep or (judge.teacher is not None and judge.teacher.reader.lockstep)
    rollout = ranks.together(
        lambda: roll_out(
            batch,
            student=reader,
            teacher=None if judge.teacher is None else judge.teacher.reader,
            decoding=decoding,
            key=DrawKey(seed=judge.seed, stage="", purpose=judge.purpose, rollout=0),
            eos_ids=judge.ids.eos,
            pad_id=judge.ids.pad,
            keep_hidden=judge.teacher is not None,
            anyone=ranks.anyone if lockstep else bool,
        )
    )
    scored = None
    if judge.teacher is not None:
        with judge.teacher.head() as head, reader.scoring():
            scored = ranks.together(
                lambda: score(
                    rollout,
                    student=reader,
                    teacher_head=head,
                    temperature=decoding.temperature,
                    forward_kl=judge.thorough,
                    infinite=judge.thorough,
                )
            )
    drawn = _records(rows, judge, rollout, seeds=[seed for _, seed in cells], temperature=decoding.temperature)
    for record, of_teacher, (place, _) in zip(drawn, _divergences(scored, rows=len(cells)), cells, strict=True):
        record["measures"] |= of_teacher | _of_gold(gold[place])
    return drawn


def _records(
    rows: Sequence[Prompt], judge: Judge, rollout: Rollout, *, seeds: Sequence[int], temperature: float
) -> list[Record]:
    """The responses as text, with what can be measured on it."""
    records = []
    # As lists at once: a look into a tensor for each row costs as much as its text.
    drawn = zip(rollout.response_BT.tolist(), rollout.length_B.tolist(), rollout.stop_B, strict=True)
    for index, (row, (ids_T, length, stop)) in enumerate(zip(rows, drawn, strict=True)):
        ids = ids_T[: length - int(stop != "length")]
        text = str(judge.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        records.append(
            {
                "uid": row.uid,
                "temperature": temperature,
                "seed": seeds[index],
                "prompt": row.text,
                "response": text,
                "references": list(row.responses),
                "stop": str(stop),
                "tokens": len(ids),
                "extra": dict(row.extra),
                "measures": of_text(row, text, judge),
            }
        )
    return records


def of_text(row: Prompt, text: str, judge: Judge) -> dict[str, Any]:
    """What can be measured on a response's text, whoever wrote it."""
    measures: dict[str, Any] = {"repetition_3": int(repetition_3(text))}
    if row.responses:
        measures.update(rouge_l=rouge_l(text, row.responses), exact_match=int(exact_match(text, row.responses)))
    return measures if judge.check is None else measures | judge.check(row.text, text)


def world_check(prompt: str, response: str) -> Record:
    """What the embedded world's checker says."""
    verdict = check(prompt, response)
    return {"validity": int(verdict.valid), "reason": verdict.reason}


def _divergences(scored: Scored | None, *, rows: int) -> list[dict[str, Any]]:
    """What the teacher says about each response, summed over its tokens, the end included; None for an infinity."""
    if scored is None:
        return [{} for _ in range(rows)]
    columns = {"reverse_kl": _sums(scored.reverse_kl_BT), "kl_tokens": scored.rollout.length_B.tolist()}
    if scored.forward_kl_BT is not None:
        columns |= {"forward_kl": _sums(scored.forward_kl_BT), "teacher_nll": _sums(-scored.logp_BT)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _sums(value_BT: Tensor) -> list[float | None]:
    return [_finite(value) for value in value_BT.double().sum(dim=1).tolist()]


def _of_gold(gold: Gold | None) -> dict[str, Any]:
    return {} if gold is None else {"gold_nll": _finite(gold.nats), "gold_tokens": len(gold.logq)}


def _finite(value: float) -> float | None:
    """None for an infinity, for which JSON has no number: the measure is left out then."""
    return value if math.isfinite(value) else None
