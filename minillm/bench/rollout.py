"""The decode loop beside its slow twins: teacher mixing at every token with a scoring pass, and rows that stay to the
end; and what its rows cost by how many are left.

Legend: B rows, P prompt tokens, T new tokens, L = P + T, H hidden width, V vocabulary, G coin groups.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minillm.batches import prompt_batch
from minillm.bench.bare import Case, Sizes, draw_key, model_loader, random_prompts
from minillm.bench.pairs import Spread, in_turns, ratio, spread_of, threads
from minillm.cards import Kind
from minillm.decode import roll_out, rows_of_groups
from minillm.models import CausalLM, ModelReader
from minillm.probes import probe_packing
from minillm.reading import Reader
from minillm.sampling import draw, row_keys, uniforms
from minillm.types import Decoding, DrawKey, PromptBatch, Rollout

SHORT = 4
"""Where rows end early, responses are 1/4 as long as they may be, on average."""
MANY = 8
"""Times as many prompts wait for slots as there are slots."""
COIN_ROLLOUTS = 200
"""Of this many the mean number of heads is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCase(Case):
    """How responses are drawn, and where."""

    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFigures:
    """What was found for one case."""

    case: RolloutCase
    seconds: dict[str, Spread]
    lazy_speedup: Spread
    """Mixing at every token with a scoring pass, over lazy mixing."""
    teacher_forwards: list[int]
    teacher_forwards_over_bound: float
    """The greatest, over all rollouts, of teacher forwards over (heads drawn + 2 a group)."""
    mean_heads: float
    """Heads in a rollout, over ``COIN_ROLLOUTS`` of them and all groups."""
    mean_heads_sigmas: float
    """How far that is from its expectation, in standard deviations of the mean."""
    mean_length: float
    """Tokens of a response, where rows end early."""
    dropping_speedup: Spread
    """All rows to the end over rows dropped."""
    dropping_over_alive_cost: Spread
    """Rows dropped, over the sum of what each step costs with as many rows as are left."""
    many_over_refilled: Spread
    """``MANY`` times as many rows at once, finished ones dropped, over what B slots would take that pass to the next
    prompt without loss: as many tokens, each at the cost it has in a full batch."""
    step_cost: dict[int, float]
    """Median milliseconds of a decode step by its number of rows."""


def measure_rollout(case: RolloutCase, *, repeats: int) -> RolloutFigures:
    """Each pair in turns, in one process."""
    work = RolloutWork(case)
    device = torch.device(case.device)
    with threads(case.threads):
        mixed = in_turns({"lazy": work.lazy, "per_token": work.per_token}, repeats=repeats, device=device)
        ending = Ending(work)
        ended = in_turns(
            {"dropped": ending.dropped, "kept": ending.kept, "costs": ending.costs, "many": ending.many},
            repeats=repeats, device=device,
        )  # fmt: skip
    measured = range(1, repeats + 1)  # the first turn is not
    alive = [ending.alive_cost(turn) for turn in measured]
    refilled = [ending.refilled_cost(turn) for turn in measured]
    heads, sigmas = mean_heads(case)
    return RolloutFigures(
        case=case,
        seconds={name: spread_of(values) for name, values in (mixed | ended).items()},
        lazy_speedup=ratio(mixed["per_token"], mixed["lazy"]),
        teacher_forwards=work.teacher_forwards,
        teacher_forwards_over_bound=max(work.over_bound),
        mean_heads=heads,
        mean_heads_sigmas=sigmas,
        mean_length=statistics.mean(length for turn in measured for length in ending.lengths[turn]),
        dropping_speedup=ratio(ended["kept"], ended["dropped"]),
        dropping_over_alive_cost=ratio(ended["dropped"], alive),
        many_over_refilled=ratio(ended["many"], refilled),
        step_cost={
            rows: 1e3 * statistics.median(cost for turn in measured for cost in ending.curves[turn][rows][1:])
            for rows in ending.curves[0]
        },
    )


class RolloutWork:
    """Both models over random prompts; rollout number after rollout number, each variant counting for itself."""

    def __init__(self, case: RolloutCase) -> None:
        sizes, device = case.sizes, torch.device(case.device)
        self.case = case
        student = _root(sizes.student, "students", sizes=sizes, device=device)
        teacher = _root(sizes.teacher, "teachers", sizes=sizes, device=device)
        self.student, self.teacher = (ModelReader(root, device=device, lockstep=False) for root in (student, teacher))
        self.vocabulary = student.head.real_ids
        prompts = random_prompts(sizes, vocabulary=self.vocabulary)
        self.batch = prompt_batch(prompts, [0] * sizes.rows, pad_id=0, device=device)
        self.decoding = Decoding(max_new_tokens=sizes.new_tokens)
        self.teacher_forwards: list[int] = []
        self.over_bound: list[float] = []
        self._lazy, self._per_token = 0, 0

    def lazy(self) -> Rollout:
        """The decode loop as a step runs it."""
        case, number = self.case, self._lazy
        self._lazy += 1
        rollout = roll_out(
            self.batch, student=self.student, teacher=self.teacher, decoding=self.decoding, key=draw_key(number),
            eos_ids=(), pad_id=0, teacher_mix=case.teacher_mix, coin_groups=case.coin_groups, keep_hidden=True,
        )  # fmt: skip
        heads = sum(map(sum, case.heads_GT(number)))
        self.teacher_forwards.append(rollout.teacher_forwards)
        self.over_bound.append(rollout.teacher_forwards / (heads + 2 * case.coin_groups))
        return rollout

    def per_token(self) -> tuple[Tensor, Tensor]:
        """The twin: both models at every token, then the teacher once more over the whole rows."""
        number = self._per_token
        self._per_token += 1
        return mixed_per_token(
            self.batch, student=self.student, teacher=self.teacher, key=draw_key(number),
            heads_GT=self.case.heads_GT(number),
        )  # fmt: skip


@torch.no_grad()
def mixed_per_token(
    batch: PromptBatch, *, student: Reader, teacher: Reader, key: DrawKey, heads_GT: list[list[bool]]
) -> tuple[Tensor, Tensor]:
    """Responses [B, T] drawn with both models at each token, and the teacher's states [B, T, H] before each of them."""
    ids_BL, mask_BL = batch.ids_BP, batch.mask_BP
    tokens = len(heads_GT[0])
    heads_BT = torch.zeros(len(ids_BL), tokens, dtype=torch.bool, device=ids_BL.device)
    for rows_R, heads_T in zip(rows_of_groups(batch.uid_B, len(heads_GT)), heads_GT, strict=True):
        heads_BT[rows_R] = torch.tensor(heads_T, device=ids_BL.device)
    keys_B = row_keys(key, batch.uid_B, batch.sample_B, device=ids_BL.device)
    caches: list[Any] = [None, None]
    ids_BS = ids_BL
    for t in range(tokens):
        logits = []
        for place, reader in enumerate((student, teacher)):
            hidden_BSH, caches[place] = reader.extend(ids_BS, mask_BL, caches[place])
            logits.append(reader.logits(hidden_BSH[:, -1]))
        drawn_B = draw(torch.where(heads_BT[:, t, None], logits[1], logits[0]), uniforms(keys_B, t))
        ids_BS = drawn_B[:, None]
        ids_BL = torch.cat([ids_BL, ids_BS], dim=1)
        mask_BL = torch.cat([mask_BL, torch.ones_like(ids_BS, dtype=torch.bool)], dim=1)
    hidden_BLH = teacher.read(ids_BL, mask_BL)
    return ids_BL[:, -tokens:], hidden_BLH[:, -tokens - 1 : -1]


class Ending:
    """Responses of the student alone that end after T / ``SHORT`` tokens on average, and the cost of a step by rows.

    The random student finds all ids about equally likely, so that a share of ``SHORT`` / T of them as end tokens makes
    lengths geometric.
    """

    def __init__(self, work: RolloutWork) -> None:
        self._work = work
        ends = max(1, round(work.vocabulary * SHORT / work.case.sizes.new_tokens))
        any_order = torch.randperm(work.vocabulary, generator=torch.Generator().manual_seed(3))
        self._eos_ids = tuple(any_order[:ends].tolist())
        more = replace(work.case.sizes, rows=MANY * work.case.sizes.rows)
        prompts = random_prompts(more, vocabulary=work.vocabulary)
        self._many = prompt_batch(prompts, [0] * more.rows, pad_id=0, device=work.batch.ids_BP.device)
        self._lengths_of_many: list[list[int]] = []
        self.lengths: list[list[int]] = []
        """Of the responses of each turn."""
        self.curves: list[dict[int, list[float]]] = []
        """For each turn, by number of rows, the seconds of each step of a rollout in which no row ends."""
        self._kept = 0

    def dropped(self) -> Rollout:
        """Finished rows leave the batch."""
        rollout = self._rollout(self._work.batch, len(self.lengths), drop=True)
        self.lengths.append(rollout.length_B.tolist())
        return rollout

    def kept(self) -> Rollout:
        """Finished rows stay to the end of the longest."""
        self._kept += 1
        return self._rollout(self._work.batch, self._kept - 1, drop=False)

    def many(self) -> Rollout:
        """``MANY`` times as many rows, all at once, finished ones dropped."""
        rollout = self._rollout(self._many, len(self._lengths_of_many), drop=True)
        self._lengths_of_many.append(rollout.length_B.tolist())
        return rollout

    def costs(self) -> None:
        """Times rollouts of 1, 2, 4 … rows, step by step."""
        rows = len(self._work.batch.uid_B)
        sizes = sorted({rows, *(2**power for power in range(rows.bit_length()) if 2**power <= rows)})
        self.curves.append({size: self._step_times(size) for size in sizes})

    def alive_cost(self, turn: int) -> float:
        """Seconds that the responses of a turn would take if each step cost what as many rows alone cost there."""
        lengths, curve = self.lengths[turn], self.curves[turn]
        alive_T = [sum(length > t for length in lengths) for t in range(max(lengths))]
        return sum(_between(curve, rows, t) for t, rows in enumerate(alive_T))

    def refilled_cost(self, turn: int) -> float:
        """Seconds that the responses of ``many`` would take if B rows at once never waited for the longest of them."""
        rows = len(self._work.batch.uid_B)
        token_cost = sum(self.curves[turn][rows]) / rows / self._work.case.sizes.new_tokens
        return token_cost * sum(self._lengths_of_many[turn])

    def _step_times(self, rows: int) -> list[float]:
        batch = self._work.batch
        some = PromptBatch(
            uid_B=batch.uid_B[:rows],
            sample_B=batch.sample_B[:rows],
            ids_BP=batch.ids_BP[:rows],
            mask_BP=batch.mask_BP[:rows],
        )
        clocked = _Clocked(self._work.student)
        _plain(some, student=clocked, decoding=self._work.decoding, number=0, eos_ids=(), drop=True)
        marks = [*clocked.marks, time.perf_counter()]
        return [after - before for before, after in itertools.pairwise(marks)]

    def _rollout(self, batch: PromptBatch, number: int, *, drop: bool) -> Rollout:
        work = self._work
        return _plain(
            batch, student=work.student, decoding=work.decoding, number=number, eos_ids=self._eos_ids, drop=drop
        )


class _Clocked:
    """A reader that notes when each forward from its cache begins."""

    def __init__(self, reader: ModelReader) -> None:
        self._reader = reader
        self.device, self.lockstep = reader.device, reader.lockstep
        self.read, self.logits, self.select_rows = reader.read, reader.logits, reader.select_rows
        self.marks: list[float] = []

    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """As the reader's."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())
        return self._reader.extend(ids_BS, mask_BL, cache)


def mean_heads(case: RolloutCase) -> tuple[float, float]:
    """Mean number of heads in a rollout, and its distance from the expected one in standard deviations."""
    tokens, groups, mix = case.sizes.new_tokens, case.coin_groups, case.teacher_mix
    counts = [sum(map(sum, case.heads_GT(number))) for number in range(COIN_ROLLOUTS)]
    mean = sum(counts) / len(counts)
    spread = (groups * tokens * mix * (1 - mix) / COIN_ROLLOUTS) ** 0.5
    return mean, (mean - groups * tokens * mix) / spread


def _plain(
    batch: PromptBatch, *, student: Reader, decoding: Decoding, number: int, eos_ids: tuple[int, ...], drop: bool
) -> Rollout:
    return roll_out(
        batch, student=student, decoding=decoding, key=draw_key(number), eos_ids=eos_ids, pad_id=0, keep_hidden=True,
        drop_finished=drop,
    )  # fmt: skip


def _between(curve: dict[int, list[float]], rows: int, t: int) -> float:
    """The cost of step ``t`` with this many rows: measured, or on the straight line between its neighbours."""
    above = min(size for size in curve if size >= rows)
    below = max((size for size in curve if size <= rows), default=above)
    share = 0.0 if above == below else (rows - below) / (above - below)
    return (1 - share) * curve[below][t] + share * curve[above][t]


def _root(name: str, kind: Kind, *, sizes: Sizes, device: torch.device) -> CausalLM:
    root = CausalLM(model_loader(name, kind, dtype=sizes.dtype, device=device)().eval())
    probe_packing(root, name=name)
    return root
