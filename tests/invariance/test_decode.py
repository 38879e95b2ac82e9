"""A rollout is what a slow, obvious twin does row by row, and nothing of the batch around a row changes it.

The twin knows no cache, no padding and no batch: it runs both models on the whole text at every token.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from minillm import decode, reading
from minillm.decode import roll_out
from minillm.errors import NonFinite, ShapeMismatch
from minillm.repetition import Held, held_back
from minillm.sampling import coin_group, coin_keys, row_keys, uniforms, unpack_support
from minillm.types import Decoding, DrawKey, Purpose, Rollout
from tests.readers import EOS, FAMILIES, PAD, VOCABULARY, Recorder, TableReader, TinyReader, batch_of, some_prompts

KEY = DrawKey(seed=11, stage="minillm", purpose=Purpose.TOKEN, rollout=2)
GROUPS = 2
EOS_IDS = (EOS, 5, 6)
ROWS = 16
UIDS = [f"row-{n}" for n in range(ROWS)]
PROMPTS = some_prompts(ROWS)
PLAIN = Decoding(max_new_tokens=10)
TRUNCATED = Decoding(max_new_tokens=10, temperature=0.8, top_k=6, top_p=0.9)
NO_PAIR_TWICE = Decoding(max_new_tokens=10, temperature=0.8, top_k=12, no_repeat_ngram_size=2)
PENALISED = Decoding(max_new_tokens=10, temperature=0.8, no_repeat_ngram_size=1, repetition_penalty=1.7)
SETTINGS = [
    pytest.param(PLAIN, 0.0, id="plain"),
    pytest.param(PLAIN, 0.4, id="mixed"),
    pytest.param(TRUNCATED, 0.4, id="mixed-truncated"),
    pytest.param(NO_PAIR_TWICE, 0.4, id="mixed-no-pair-twice"),
    pytest.param(PENALISED, 0.4, id="mixed-penalised"),
]
TINY = 1e-9


def roll(rows: list[int], *, family: str, decoding: Decoding, mix: float, **options: Any) -> Rollout:
    """These rows as one batch, read by both models of a family."""
    options = {"student": TinyReader(family, seed=1), "teacher": TinyReader(family, seed=2), **options}
    options = {"keep_hidden": True, "key": KEY, "eos_ids": EOS_IDS, **options}
    batch = batch_of([PROMPTS[row] for row in rows], uids=[UIDS[row] for row in rows])
    return roll_out(batch, decoding=decoding, teacher_mix=mix, coin_groups=GROUPS, pad_id=PAD, **options)


def row_of(rollout: Rollout, row: int) -> dict[str, Any]:
    """Everything a rollout says about a row, without its padding."""
    kept_T = rollout.mask_BT[row]
    tensors = {
        "ids": rollout.response_BT,
        "drew": rollout.teacher_drew_BT,
        "logq": rollout.logq_BT,
        "student": rollout.student_hidden_BTH,
        "teacher": rollout.teacher_hidden_BTH,
        "support": rollout.support_BTC,
    }
    found = {name: value[row][kept_T] for name, value in tensors.items() if value is not None}
    return {**found, "stop": rollout.stop_B[row]}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs; floats may differ by rounding."""
    assert one.keys() == other.keys()
    return [name for name in one if not _same(one[name], other[name])]


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.allclose(one, other, rtol=0, atol=TINY) if one.is_floating_point() else torch.equal(one, other)


@dataclass
class Twin:
    """The decoding of one row, spelled out."""

    student: Any
    teacher: Any
    decoding: Decoding
    mix: float

    def run(self, prompt: tuple[int, ...], uid: str) -> dict[str, Any]:
        text, steps = list(prompt), []
        coin = coin_keys(KEY, [coin_group(uid, GROUPS)])
        row = row_keys(KEY, [uid], [0], device="cpu")
        for t in range(self.decoding.max_new_tokens):
            own_H, q = self._next(self.student, text)
            guide_H, p = self._next(self.teacher, text)
            kept = self._kept(q, text)
            heads = float(uniforms(coin, t)) < self.mix
            drawn_from = p if heads else q
            mass = [math.exp(drawn_from[v]) if v in kept else 0.0 for v in range(VOCABULARY)]
            reach, chosen = 0.0, -1
            while reach <= float(uniforms(row, t)) * sum(mass):
                chosen += 1
                reach += mass[chosen]
            logq = q[chosen] - math.log(sum(math.exp(q[v]) for v in kept))
            steps.append((chosen, heads, logq, own_H, guide_H))
            text.append(chosen)
            if chosen in EOS_IDS:
                break
        ids, drew, logqs, own, guide = zip(*steps, strict=True)
        return {
            "ids": torch.tensor(ids),
            "drew": torch.tensor(drew),
            "logq": torch.tensor(logqs, dtype=torch.float64),
            "student": torch.stack(own),
            "teacher": torch.stack(guide),
        }

    def _next(self, reader: Any, text: list[int]) -> tuple[Tensor, list[float]]:
        ids_1S = torch.tensor([text])
        with torch.no_grad():
            hidden_H = reader.extend(ids_1S, torch.ones_like(ids_1S), None)[0][0, -1]
            logits_V = reader.logits(hidden_H[None])[0]
            for v in set(text):
                by = self.decoding.repetition_penalty
                logits_V[v] = logits_V[v] * by if logits_V[v] < 0 else logits_V[v] / by
        return hidden_H, (logits_V / self.decoding.temperature).log_softmax(-1).tolist()

    def _banned(self, text: list[int]) -> set[int]:
        n = self.decoding.no_repeat_ngram_size
        if n == 0:
            return set()
        stand = [tuple(text[at : at + n]) for at in range(len(text) - n + 1)]
        return {v for v in range(VOCABULARY) if v not in EOS_IDS and (*text[len(text) - n + 1 :], v) in stand}

    def _kept(self, q: list[float], text: list[int]) -> set[int]:
        allowed = set(range(VOCABULARY)) - self._banned(text)
        order = sorted(allowed, key=lambda v: (-q[v], v))[: self.decoding.top_k or VOCABULARY]
        total, reach, kept = sum(math.exp(q[v]) for v in order), 0.0, set[int]()
        for v in order:
            if reach < self.decoding.top_p * total:
                kept.add(v)
            reach += math.exp(q[v])
        return kept


@functools.cache
def spelled_out(row: int, *, family: str, decoding: Decoding, mix: float) -> dict[str, Any]:
    """What the twin says of a row; nothing that a test replaces takes part in it."""
    twin = Twin(TinyReader(family, seed=1), TinyReader(family, seed=2), decoding, mix)
    return twin.run(PROMPTS[row], UIDS[row])


@pytest.mark.parametrize(("decoding", "mix"), SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lazy_cached_batched_decoding_equals_the_slow_twin(family: str, decoding: Decoding, mix: float) -> None:
    rows = list(range(7))
    rollout = roll(rows, family=family, decoding=decoding, mix=mix)
    for row in rows:
        got = row_of(rollout, row)
        got.pop("stop"), got.pop("support", None)
        assert differences(got, spelled_out(row, family=family, decoding=decoding, mix=mix)) == []
    assert len(set(rollout.length_B.tolist())) > 1  # some rows ended early
    assert bool(rollout.teacher_drew_BT.any()) == (mix > 0)


@pytest.mark.parametrize(("decoding", "mix"), [(PLAIN, 0.0), (PLAIN, 0.2), (TRUNCATED, 0.2), (PENALISED, 0.2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_mates_dropping_and_order_change_nothing(family: str, decoding: Decoding, mix: float) -> None:
    """Each row alone, among 3, among 16, with finished rows kept or dropped, in another order."""
    everyone = list(range(ROWS))
    whole = roll(everyone, family=family, decoding=decoding, mix=mix)
    want = [row_of(whole, row) for row in everyone]
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3)).tolist()
    threes = [shuffled[at : at + 3] for at in range(0, ROWS - 2, 3)]
    alone = [([row], row % 2 == 0) for row in everyone]
    for rows, drop in [*alone, *itertools.product([*threes, shuffled], [True, False]), (everyone, False)]:
        part = roll(rows, family=family, decoding=decoding, mix=mix, drop_finished=drop)
        for at, row in enumerate(rows):
            assert differences(row_of(part, at), want[row]) == [], (rows, drop)
    assert len(set(whole.length_B.tolist())) > 2
    assert bool(whole.teacher_drew_BT.any()) == (mix > 0)


def test_numbers_that_belong_to_places_in_a_batch_fail_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a stream of random numbers, dealt out row by row."""
    monkeypatch.setattr(
        decode, "row_keys", lambda key, uids, samples, device: torch.arange(1, len(uids) + 1, device=device)
    )
    whole = roll(list(range(ROWS)), family="gpt2", decoding=PLAIN, mix=0.0)
    part = roll([4, 9, 2], family="gpt2", decoding=PLAIN, mix=0.0)
    assert any("ids" in differences(row_of(part, at), row_of(whole, row)) for at, row in enumerate([4, 9, 2]))


BLIND: dict[str, Callable[..., Held]] = {
    "to the prompt": lambda ids_NL, real_NL, **more: held_back(ids_NL[:, 7:], real_NL[:, 7:], **more),
    "to where a row begins": lambda ids_NL, real_NL, **more: held_back(ids_NL, real_NL | True, **more),
    "by one in n": lambda *past, ngram, **more: held_back(*past, ngram=ngram + 1, **more),
    "to who ends a row": lambda *past, eos_E, **more: held_back(*past, eos_E=eos_E[:0], **more),
    "to the ban": lambda *past, **more: held_back(*past, **more)._replace(banned_NV=None),
    "to the penalty": lambda *past, **more: held_back(*past, **more)._replace(seen_NV=None),
}


@pytest.mark.parametrize("name", BLIND)
def test_a_look_back_that_is_blind_fails_the_comparison(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls of the comparison with the twin, for what a row's past holds back."""
    assert max(map(len, PROMPTS)) == 7
    monkeypatch.setattr(decode, "held_back", BLIND[name])
    whole = roll(list(range(ROWS)), family="gpt2", decoding=PENALISED, mix=0.4)
    gone_wrong = 0
    for row in range(ROWS):
        got = row_of(whole, row)
        got.pop("stop"), got.pop("support", None)
        gone_wrong += bool(differences(got, spelled_out(row, family="gpt2", decoding=PENALISED, mix=0.4)))
    assert gone_wrong > 0


def test_what_is_off_costs_nothing_and_what_cannot_act_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(range(ROWS))
    plain = roll(rows, family="gpt2", decoding=PLAIN, mix=0.4)
    # An n-gram longer than any row cannot return.
    idle = roll(rows, family="gpt2", decoding=replace(PLAIN, no_repeat_ngram_size=40), mix=0.4)
    assert plain.support_BTC is None and idle.support_BTC is not None
    assert torch.equal(plain.response_BT, idle.response_BT) and torch.equal(plain.logq_BT, idle.logq_BT)
    acting = roll(rows, family="gpt2", decoding=replace(PLAIN, no_repeat_ngram_size=1), mix=0.4)  # negative control
    assert not torch.equal(plain.response_BT, acting.response_BT)
    monkeypatch.setattr(decode, "held_back", None)
    again = roll(rows, family="gpt2", decoding=PLAIN, mix=0.4)
    assert torch.equal(plain.response_BT, again.response_BT) and torch.equal(plain.logq_BT, again.logq_BT)


class CountedPositions(TinyReader):
    """Broken: position ids count the padding."""

    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: Any) -> tuple[Tensor, Any]:
        cache = DynamicCache() if cache is None else cache
        past = mask_BL.shape[1] - ids_BS.shape[1]
        output = self.model.base_model(
            input_ids=ids_BS,
            attention_mask=mask_BL.long(),
            position_ids=torch.arange(past, mask_BL.shape[1])[None],
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state, output.past_key_values


class NoMask(TinyReader):
    """Broken: padding is attended to."""

    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return super().extend(ids_BS, torch.ones_like(mask_BL), cache)


class WrongRows(TinyReader):
    """Broken: compaction keeps as many rows as asked, from the top."""

    def select_rows(self, cache: Any, index: Tensor) -> Any:
        return super().select_rows(cache, torch.arange(len(index)))


@pytest.mark.parametrize("broken", [CountedPositions, NoMask, WrongRows])
def test_a_broken_reader_fails_the_comparison(broken: type[TinyReader]) -> None:
    """Negative control of both tests above."""
    whole = roll(list(range(ROWS)), family="gpt2", decoding=PLAIN, mix=0.4, student=broken("gpt2", seed=1))
    gone_wrong = 0
    for row in range(ROWS):
        got = row_of(whole, row)
        got.pop("stop")
        gone_wrong += bool(differences(got, spelled_out(row, family="gpt2", decoding=PLAIN, mix=0.4)))
    assert gone_wrong > 0


def test_a_teacher_state_one_token_late_fails_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: hidden states must belong to the position from which the token is predicted."""
    plain = decode._lay_out
    monkeypatch.setattr(
        decode, "_lay_out", lambda pieces, **more: plain([p._replace(start=p.start + 1) for p in pieces], **more)
    )
    got = row_of(roll([0], family="llama", decoding=PLAIN, mix=0.4), 0)
    got.pop("stop")
    want = spelled_out(0, family="llama", decoding=PLAIN, mix=0.4)
    assert differences(got, want) == ["student", "teacher"]


def test_without_mixing_the_teacher_reads_once_at_the_end_and_no_coin_is_tossed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    student = Recorder(TinyReader("gpt2", seed=1), calls.append, name="student")
    teacher = Recorder(TinyReader("gpt2", seed=2), calls.append, name="teacher")
    monkeypatch.setattr(decode, "coin_keys", None)
    read = roll(list(range(ROWS)), family="gpt2", decoding=PLAIN, mix=0.0, student=student, teacher=teacher)
    assert calls.count("teacher.read") == read.teacher_forwards == 1 and calls[-1] == "teacher.read"
    assert "teacher.logits" not in calls
    plain = roll(list(range(ROWS)), family="gpt2", decoding=PLAIN, mix=0.0, teacher=None)
    assert plain.teacher_hidden_BTH is None and plain.teacher_forwards == 0
    assert torch.equal(read.response_BT, plain.response_BT) and torch.equal(read.logq_BT, plain.logq_BT)
    assert not bool(read.teacher_drew_BT.any())
    monkeypatch.undo()
    mixed = roll(list(range(ROWS)), family="gpt2", decoding=PLAIN, mix=0.4)  # negative control
    assert mixed.response_BT.shape != plain.response_BT.shape or not torch.equal(mixed.response_BT, plain.response_BT)


def test_with_nothing_but_the_teacher_it_draws_what_it_would_draw_alone() -> None:
    rows = list(range(ROWS))
    only = roll(rows, family="llama", decoding=PLAIN, mix=1.0)
    alone = roll(rows, family="llama", decoding=PLAIN, mix=0.0, student=TinyReader("llama", seed=2), teacher=None)
    assert torch.equal(only.response_BT, alone.response_BT)
    assert torch.equal(only.teacher_drew_BT, only.mask_BT)
    assert not torch.equal(only.logq_BT, alone.logq_BT)  # logq is the student's, whoever drew
    assert only.teacher_hidden_BTH is not None and alone.student_hidden_BTH is not None
    torch.testing.assert_close(only.teacher_hidden_BTH, alone.student_hidden_BTH, rtol=0, atol=TINY)


def _heads(mix: float, steps: int, key: DrawKey) -> int:
    return int((uniforms(coin_keys(key, range(GROUPS))[:, None], torch.arange(steps)) < mix).sum())


@pytest.mark.parametrize("mix", [0.1, 0.4, 1.0])
def test_the_teacher_runs_at_most_at_its_heads_and_once_more_a_group(mix: float) -> None:
    for rollout in range(4):
        key = replace(KEY, rollout=rollout)
        calls: list[str] = []
        teacher = Recorder(TinyReader("llama", seed=2), calls.append, name="teacher")
        got = roll(list(range(ROWS)), family="llama", decoding=PLAIN, mix=mix, teacher=teacher, key=key)
        assert got.teacher_forwards == sum(call in {"teacher.extend", "teacher.read"} for call in calls)
        assert got.teacher_forwards <= _heads(mix, got.mask_BT.shape[1], key) + GROUPS


def test_a_teacher_that_runs_at_every_token_breaks_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the bound."""
    plain = decode._open_guides

    def eager(*args: Any, heads_GT: list[list[bool]], **more: Any) -> Any:
        return plain(*args, heads_GT=[[True] * len(heads) for heads in heads_GT], **more)

    monkeypatch.setattr(decode, "_open_guides", eager)
    got = roll(list(range(ROWS)), family="llama", decoding=PLAIN, mix=0.1)
    assert got.teacher_forwards > _heads(0.1, got.mask_BT.shape[1], KEY) + GROUPS


def test_rows_of_all_groups_come_back_in_their_own_places() -> None:
    """The state of a table model is the number of its prefix, so states can be told from the tokens alone."""
    student, teacher = (TableReader(vocabulary=5, depth=4, seed=seed) for seed in (0, 1))
    got = roll_out(
        batch_of([(1,), (2, 3), (4, 4, 1), (2,)] * 5, uids=[f"u{n}" for n in range(20)]),
        student=student,
        teacher=teacher,
        teacher_mix=0.5,
        coin_groups=4,
        decoding=Decoding(max_new_tokens=4),
        key=KEY,
        eos_ids=(0,),
        pad_id=0,
        keep_hidden=True,
    )
    # A prompt of n tokens is n - 1 steps below the root of the table, by design of the reader.
    assert got.teacher_hidden_BTH is not None and got.student_hidden_BTH is not None
    assert torch.equal(got.teacher_hidden_BTH, got.student_hidden_BTH)
    for row in range(20):
        nodes = got.teacher_hidden_BTH[row, :, 0].long().tolist()
        ids = got.response_BT[row].tolist()
        for t in range(1, int(got.length_B[row])):
            assert nodes[t] == nodes[t - 1] * 5 + ids[t - 1] + 1


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_truncated_sampling_stays_on_the_students_support(mix: float) -> None:
    """Forbidden ids are never taken, log-probs stay finite, and the record of the support is the one sampled under."""
    got = roll(list(range(ROWS)), family="qwen2", decoding=TRUNCATED, mix=mix)
    assert got.support_BTC is not None and got.student_hidden_BTH is not None
    support = unpack_support(got.support_BTC, VOCABULARY)
    assert bool(support.gather(2, got.response_BT[..., None])[..., 0][got.mask_BT].all())
    assert bool(got.logq_BT.isfinite().all())
    sizes = support.sum(-1)[got.mask_BT]
    assert int(sizes.min()) >= 1 and int(sizes.max()) <= TRUNCATED.top_k
    assert bool(support[~got.mask_BT].all())  # padding keeps every id: no loss can make -inf of it
    logits = TinyReader("qwen2", seed=1).logits(got.student_hidden_BTH) / TRUNCATED.temperature
    logq = logits.masked_fill(~support, -torch.inf).log_softmax(-1).gather(2, got.response_BT[..., None])[..., 0]
    torch.testing.assert_close(got.logq_BT[got.mask_BT], logq.detach()[got.mask_BT], rtol=0, atol=TINY)


def test_a_teacher_drawing_off_the_support_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without restricting the teacher it takes ids that the student could not."""
    free = replace(TRUNCATED, top_k=2)
    monkeypatch.setattr(decode, "restrict", lambda logits, support: logits)
    got = roll(list(range(ROWS)), family="qwen2", decoding=free, mix=1.0)
    assert got.support_BTC is not None
    support = unpack_support(got.support_BTC, VOCABULARY)
    assert not bool(support.gather(2, got.response_BT[..., None])[..., 0][got.mask_BT].all())


class Scaled(TinyReader):
    """The same model with all logits multiplied."""

    factor = 4.0

    def logits(self, hidden_NH: Tensor) -> Tensor:
        return super().logits(hidden_NH) * self.factor


def test_temperature_acts_on_both_models_and_undoes_a_scale() -> None:
    rows = list(range(ROWS))
    plain = roll(rows, family="gpt2", decoding=TRUNCATED, mix=0.4)
    hot = replace(TRUNCATED, temperature=TRUNCATED.temperature * Scaled.factor)
    models = {"student": Scaled("gpt2", seed=1), "teacher": Scaled("gpt2", seed=2)}
    scaled = roll(rows, family="gpt2", decoding=hot, mix=0.4, **models)
    for row in rows:
        assert differences(row_of(scaled, row), row_of(plain, row)) == []
    one_model = roll(rows, family="gpt2", decoding=hot, mix=0.4, student=models["student"])  # negative control
    assert any(differences(row_of(one_model, row), row_of(plain, row)) for row in rows)


class Forbids(TinyReader):
    """Some ids at -inf, or everything NaN."""

    value = -torch.inf

    def logits(self, hidden_NH: Tensor) -> Tensor:
        logits_NV = super().logits(hidden_NH).clone()
        logits_NV[:, 3:9] = self.value
        return logits_NV


def test_ids_at_minus_infinity_are_never_taken() -> None:
    models = {"student": Forbids("opt", seed=1), "teacher": Forbids("opt", seed=2)}
    got = roll(list(range(ROWS)), family="opt", decoding=PLAIN, mix=0.4, **models)
    taken = got.response_BT[got.mask_BT]
    assert not bool(((taken >= 3) & (taken < 9)).any()) and bool(got.logq_BT.isfinite().all())
    free = roll(list(range(ROWS)), family="opt", decoding=PLAIN, mix=0.4)
    taken = free.response_BT[free.mask_BT]
    assert bool(((taken >= 3) & (taken < 9)).any())


def test_a_model_that_says_nan_is_refused() -> None:
    broken = Forbids("opt", seed=2)
    broken.value = torch.nan
    with pytest.raises(NonFinite, match="NaN"):
        roll([0, 1], family="opt", decoding=PLAIN, mix=1.0, teacher=broken)


def test_models_of_different_vocabularies_are_refused() -> None:
    class Wider(TinyReader):
        def logits(self, hidden_NH: Tensor) -> Tensor:
            return torch.nn.functional.pad(super().logits(hidden_NH), (0, 1))

    with pytest.raises(ShapeMismatch, match="teacher's logits"):
        roll([0, 1], family="opt", decoding=PLAIN, mix=1.0, teacher=Wider("opt", seed=2))


def test_a_rollout_carries_no_gradient_and_says_whose_weights_it_is_of() -> None:
    got = roll([0, 1], family="opt", decoding=PLAIN, mix=0.4, policy_step=17)
    assert got.policy_step == 17
    tensors = (got.logq_BT, got.student_hidden_BTH, got.teacher_hidden_BTH)
    assert not any(value.requires_grad for value in tensors if value is not None)


@pytest.mark.parametrize("look_every", [2, 3, 50])
@pytest.mark.parametrize(("decoding", "mix"), SETTINGS)
def test_looking_less_often_which_rows_have_ended_changes_nothing(
    decoding: Decoding, mix: float, look_every: int
) -> None:
    """Rows end at different tokens, most of them between two looks."""
    every, seldom = (
        roll(list(range(ROWS)), family="qwen2", decoding=decoding, mix=mix, look_every=look) for look in (1, look_every)
    )
    assert len(set(every.length_B.tolist())) > 2
    for row in range(ROWS):
        assert differences(row_of(every, row), row_of(seldom, row)) == []
    assert not bool(seldom.logq_BT[~seldom.mask_BT].any()) and not bool(seldom.teacher_drew_BT[~seldom.mask_BT].any())


@pytest.mark.parametrize("seed", range(12))
def test_heads_after_all_rows_have_ended_leave_nothing_behind(seed: int) -> None:
    """Seldom looked at, with many end tokens and heads: the teacher reads on in chunks beyond the longest response."""
    key = replace(KEY, rollout=seed)
    every, seldom = (
        roll([0, 1, 2], family="llama", decoding=PLAIN, mix=0.4, look_every=look, key=key, eos_ids=tuple(range(9)))
        for look in (1, 50)
    )
    for row in range(3):
        assert differences(row_of(every, row), row_of(seldom, row)) == []


def test_writing_past_the_end_between_two_looks_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: rows that have ended are written to until the next look."""
    want = roll(list(range(ROWS)), family="qwen2", decoding=PLAIN, mix=0.0)
    plain = reading.Page.write

    def careless(self: reading.Page, rows_N: Tensor, t: int, **more: Any) -> None:
        self.alive_B[rows_N] = True
        plain(self, rows_N, t, **more)

    monkeypatch.setattr(reading.Page, "write", careless)
    got = roll(list(range(ROWS)), family="qwen2", decoding=PLAIN, mix=0.0, look_every=3)
    assert got.length_B.tolist() != want.length_B.tolist()


@pytest.mark.parametrize("look_every", [2, 50])
def test_logits_that_are_no_numbers_are_refused_between_two_looks_too(look_every: int) -> None:
    class Late(TinyReader):
        """Says NaN at its second token, for one row."""

        calls = 0

        def logits(self, hidden_NH: Tensor) -> Tensor:
            Late.calls += 1
            logits_NV = TinyReader.logits(self, hidden_NH)
            if Late.calls == 2:
                logits_NV[0] = torch.nan
            return logits_NV

    with pytest.raises(NonFinite, match="NaN"):
        roll([0, 1, 2], family="opt", decoding=PLAIN, mix=0.0, student=Late("opt", seed=1), look_every=look_every)
