"""How often the teacher runs in a rollout: at the heads of each coin group's coin, and once more at its end.

Against tests/invariance/test_decode.py, which holds a real model to the bound, a table stands for the models here, so
that hundreds of rollouts of 128 tokens can be counted to the call.

Legend: B rows, S new positions, L positions in the attention mask, G coin groups, T response positions, V ids.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import decode
from minillm.decode import roll_out
from minillm.sampling import coin_group, coin_keys, uniforms
from minillm.types import Decoding, DrawKey, Purpose, Rollout
from tests.coins import heads_of, lives, wanted
from tests.readers import Recorder, batch_of

V, EOS, ENDS_AT_ONCE = 6, 0, 5
KEY = DrawKey(seed=2, stage="minillm", purpose=Purpose.TOKEN, rollout=0)
ALPHAS = [0.0, 0.1, 0.2, 0.5, 1.0]
ROWS = 7
UIDS = [f"row-{n}" for n in range(ROWS)]
ROLLOUTS = 200
LONG, LONG_ROLLOUTS = 128, 25
ALPHA = 0.2

Toss = Callable[[DrawKey], list[bool]]


class Bigrams:
    """A language model whose next token depends on the last one alone; after ``ENDS_AT_ONCE`` comes the EOS."""

    def __init__(self, *, seed: int, eos: float = -1.0, lockstep: bool = False) -> None:
        noise = torch.Generator().manual_seed(seed)
        self.table_VV = torch.randn(V, V, generator=noise, dtype=torch.float64)
        self.table_VV[:, EOS] = eos
        self.table_VV[:, ENDS_AT_ONCE] = -torch.inf
        self.table_VV[ENDS_AT_ONCE, 1:] = -torch.inf
        self.table_VV[ENDS_AT_ONCE, EOS] = 0.0
        self.device = torch.device("cpu")
        self.lockstep = lockstep

    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        seen = 0 if cache is None else cache.shape[1]
        assert mask_BL.shape[1] == seen + ids_BS.shape[1]
        return ids_BS[:, :, None].double(), mask_BL

    def read(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return ids_BL[:, :, None].double() * mask_BL[:, :, None]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        return self.table_VV[hidden_NH[:, 0].long()]

    def select_rows(self, cache: Tensor, index: Tensor) -> Tensor:
        return cache[index]


def roll(
    mix: float, *, groups: int, rollout: int = 0, longest: int = 24, lockstep: bool = False, eos: float = -1.0,
    rows: int = ROWS, last: dict[int, int] | None = None, **options: Any,
) -> Rollout:  # fmt: skip
    """A rollout, with its count of forwards confirmed by the teacher; ``last`` gives some prompts another last id."""
    calls: Counter[str] = Counter()
    teacher = Recorder(Bigrams(seed=1, eos=eos, lockstep=lockstep), lambda name: calls.update([name]), name="teacher")
    prompts = [(*range(1, 4 - n % 3), (last or {}).get(n, 4)) for n in range(rows)]
    got = roll_out(
        batch_of(prompts, uids=UIDS[:rows]),
        student=Bigrams(seed=0, eos=eos),
        teacher=teacher,
        teacher_mix=mix,
        coin_groups=groups,
        decoding=Decoding(max_new_tokens=longest),
        key=replace(KEY, rollout=rollout),
        eos_ids=(EOS,),
        pad_id=EOS,
        **options,
    )
    assert got.teacher_forwards == calls["teacher.extend"] + calls["teacher.read"]
    return got


def heads_in(mix: float, *, groups: int, rollout: int, longest: int) -> list[list[int]]:
    return heads_of(replace(KEY, rollout=rollout), mix=mix, groups=groups, longest=longest)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mix", ALPHAS)
def test_the_teacher_runs_at_heads_and_once_more_a_group(mix: float, groups: int) -> None:
    """To the call, in twelve rollouts; so never more than heads + 2 a group."""
    lengths, spared = set(), 0
    for rollout in range(12):
        got = roll(mix, groups=groups, rollout=rollout)
        if mix == 0:  # no coin, no groups: all rows are read together
            assert got.teacher_forwards == 1
            continue
        heads_G, life_G = heads_in(mix, groups=groups, rollout=rollout, longest=24), lives(got, groups)
        drawn = sum(t < life for heads, life in zip(heads_G, life_G, strict=True) for t in heads)
        assert got.teacher_forwards == sum(map(wanted, heads_G, life_G)) <= drawn + 2 * groups
        lengths |= set(got.length_B.tolist())
        spared += sum(map(len, heads_G)) - drawn
    # Rows end at different times, and some groups before their last head.
    assert mix == 0 or (len(lengths) > 3 and spared > 0)


@pytest.mark.parametrize("mix", [0.1, 0.2, 0.5, 1.0])
def test_heads_after_the_end_of_a_groups_rows_cost_nothing(mix: float) -> None:
    """The rows of one of three groups end with their first token; the others go on to the limit."""
    short = coin_group(UIDS[0], 3)
    last = {n: ENDS_AT_ONCE for n, uid in enumerate(UIDS) if coin_group(uid, 3) == short}
    assert 0 < len(last) < ROWS
    options: dict[str, Any] = {"groups": 3, "eos": -math.inf, "last": last, "rollout": 3}  # EOS only where it must be
    got = roll(mix, **options)
    life_G = lives(got, 3)
    assert life_G[short] == 1 and {life for g, life in enumerate(life_G) if g != short} == {24}
    heads_G = heads_in(mix, groups=3, rollout=3, longest=24)
    assert got.teacher_forwards == sum(map(wanted, heads_G, life_G))
    assert wanted(heads_G[short], 1) == 1 and sum(t > 0 for t in heads_G[short]) > 0
    # Control, and the price of sharding: ranks in step cannot know whose rows ended, so all heads are called.
    stepped = roll(mix, lockstep=True, **options)
    assert stepped.teacher_forwards == sum(len(heads) + 1 for heads in heads_G) > got.teacher_forwards


@pytest.mark.parametrize("rows", [ROWS, 2, 0])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mix", ALPHAS)
def test_a_sharded_teacher_runs_at_all_heads_of_the_rollout_and_once_more_a_group(
    mix: float, groups: int, rows: int
) -> None:
    """Whatever rows this rank has; another one goes on for 20 tokens at least."""
    for rollout in range(4):
        asked: list[bool] = []

        def anyone(alive: bool) -> bool:
            asked.append(alive)  # noqa: B023 (called before the next turn)
            return alive or len(asked) <= 20  # noqa: B023

        got = roll(mix, groups=groups, rollout=rollout, rows=rows, lockstep=True, longest=20, anyone=anyone)
        heads_G = heads_in(mix, groups=groups, rollout=rollout, longest=20) if mix > 0 else [[]]
        assert got.teacher_forwards == sum(len(heads) + 1 for heads in heads_G)


def counts(toss: Toss) -> list[int]:
    """Heads in each of 200 rollouts."""
    return [sum(toss(replace(KEY, rollout=n))) for n in range(ROLLOUTS)]


def as_drawn(key: DrawKey) -> list[bool]:
    (heads_T,) = decode.toss(key, teacher_mix=ALPHA, coin_groups=1, positions=LONG)
    return heads_T


def independent(counts: list[int]) -> tuple[bool, bool]:
    """Whether mean and variance are those of independent coins, within three standard errors each."""
    count_N = torch.tensor(counts, dtype=torch.float64)
    variance = LONG * ALPHA * (1 - ALPHA)
    mean_off = abs(float(count_N.mean()) - ALPHA * LONG) / math.sqrt(variance / len(counts))
    variance_off = abs(float(count_N.var()) / variance - 1) / math.sqrt(2 / (len(counts) - 1))
    return mean_off < 3, variance_off < 3


def test_the_mean_number_of_heads_is_that_of_independent_coins() -> None:
    assert independent(counts(as_drawn)) == (True, True)


def stratified(key: DrawKey) -> list[bool]:
    """Broken: one head in every block of 1 / alpha positions, at a place that is drawn."""
    block = round(1 / ALPHA)
    place = (uniforms(coin_keys(key, [0]), torch.arange(LONG)) * block).long().tolist()
    return [t % block == place[t // block] for t in range(LONG)]


def test_stratified_coins_and_another_share_are_seen() -> None:
    """Negative controls: a variance that is too small, a mean that is too large, coins that all rollouts share."""
    assert independent(counts(stratified))[1] is False
    two_more = [count + 2 for count in counts(as_drawn)]
    assert independent(two_more)[0] is False
    assert independent(counts(lambda key: as_drawn(KEY)))[1] is False


def test_rollouts_of_128_tokens_run_the_teacher_as_often_as_their_coins_say() -> None:
    """Heads drawn are the coins counted above; forwards are heads and one more, unless the last token is a head."""
    for n, count in enumerate(counts(as_drawn)[:LONG_ROLLOUTS]):
        rollout = roll(ALPHA, groups=1, rollout=n, longest=LONG, rows=1, eos=-math.inf)
        assert rollout.mask_BT.shape == (1, LONG) and int(rollout.teacher_drew_BT.sum()) == count
        assert rollout.teacher_forwards == count + (not bool(rollout.teacher_drew_BT[0, -1])) <= count + 2


def test_a_teacher_that_runs_at_every_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of bound and mean."""
    plain = decode._open_guides

    def eager(*args: Any, heads_GT: list[list[bool]], **more: Any) -> Any:
        return plain(*args, heads_GT=[[True] * len(heads) for heads in heads_GT], **more)

    monkeypatch.setattr(decode, "_open_guides", eager)
    got = [roll(ALPHA, groups=1, rollout=n, longest=LONG, rows=1, eos=-math.inf) for n in range(5)]
    heads = [sum(as_drawn(replace(KEY, rollout=n))) for n in range(5)]
    assert all(rollout.teacher_forwards > h + 2 for rollout, h in zip(got, heads, strict=True))
    assert independent([rollout.teacher_forwards - 1 for rollout in got])[0] is False
