"""Keys, uniform numbers, draws and truncation, each against a slow obvious twin or a known answer."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minillm import sampling
from minillm.errors import NonFinite, ShapeMismatch
from minillm.types import DrawKey, Purpose

KEY = DrawKey(seed=7, stage="minillm", purpose=Purpose.TOKEN, rollout=3)
LAST = 1.0 - 2.0**-53
"""The largest uniform number there is."""
GOLDEN_GROUPS = [0, 3, 2, 3, 2, 3, 0, 2]
GOLDEN_COINS = [-7318761768616756254, 1738012905962832983]
GOLDEN_KEYS = [-1323401536207414321, 4512063970714498954]


def _key_of(key: DrawKey, uid: str, sample: int) -> int:
    return int(sampling.row_keys(key, [uid], [sample], device="cpu"))


def _splitmix64(key: int, position: int) -> float:
    """The generator in Python's own integers."""
    word = (1 << 64) - 1
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    z ^= z >> 31
    return (z >> 11) * 2.0**-53


def test_uniforms_are_splitmix64() -> None:
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
    positions = torch.arange(50)
    got = sampling.uniforms(keys[:, None], positions)
    want = [[_splitmix64(key % 2**64, position) for position in range(50)] for key in keys.tolist()]
    assert got.tolist() == want  # to the bit
    assert sampling.uniforms(keys, 17).tolist() == got[:, 17].tolist()
    # The first word of the published generator for seed 0.
    assert float(got[0, 0]) == (0xE220A8397B1DCDAF >> 11) * 2.0**-53


def test_an_arithmetic_shift_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above."""
    monkeypatch.setattr(sampling, "_shift_right", lambda value, by: value >> by)
    got = sampling.uniforms(torch.tensor([0]), torch.arange(50))
    assert got.tolist() != [_splitmix64(0, position) for position in range(50)]


def test_keys_never_change() -> None:
    """A resumed run, or another machine, must draw the same tokens: these numbers are part of the format."""
    assert sampling.row_keys(KEY, ["gsm8k-7", "ü"], [0, 2], device="cpu").tolist() == GOLDEN_KEYS
    assert sampling.coin_keys(KEY, [0, 1]).tolist() == GOLDEN_COINS
    assert [sampling.coin_group(f"row-{n}", 4) for n in range(8)] == GOLDEN_GROUPS


def test_every_part_of_the_name_changes_the_key() -> None:
    variants = [
        _key_of(KEY, "a", 0),
        _key_of(replace(KEY, seed=8), "a", 0),
        _key_of(replace(KEY, stage="sft"), "a", 0),
        *(_key_of(replace(KEY, purpose=purpose), "a", 0) for purpose in Purpose if purpose is not Purpose.TOKEN),
        _key_of(replace(KEY, rollout=4), "a", 0),
        _key_of(KEY, "b", 0),
        _key_of(KEY, "a", 1),
    ]
    assert len(set(variants)) == len(variants)


def test_parts_of_a_name_cannot_run_into_each_other() -> None:
    assert _key_of(replace(KEY, seed=1, stage="1x"), "a", 0) != _key_of(replace(KEY, seed=11, stage="x"), "a", 0)
    assert _key_of(KEY, "a", 11) != _key_of(KEY, "a1", 1)
    assert _key_of(KEY, "\x00", 0) != _key_of(KEY, "\x00\x00", 0)
    assert _key_of(KEY, "\ud800", 0) != _key_of(KEY, "?", 0)  # a lone surrogate is a name like any other


def test_joining_without_lengths_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above."""
    plain = sampling._hash64
    monkeypatch.setattr(sampling, "_hash64", lambda *parts: plain("".join(parts)))
    assert _key_of(KEY, "a", 11) == _key_of(KEY, "a1", 1)


def test_a_coin_is_not_the_token_of_a_row_named_like_its_group() -> None:
    assert int(sampling.coin_keys(KEY, [5])) != _key_of(KEY, "5", 0)


def test_a_coin_is_the_same_whatever_the_rollout_is_for_but_not_in_another_rollout() -> None:
    assert torch.equal(sampling.coin_keys(KEY, range(3)), sampling.coin_keys(KEY, [0, 1, 2]))
    assert not torch.equal(sampling.coin_keys(KEY, [0]), sampling.coin_keys(replace(KEY, rollout=4), [0]))


def test_coin_groups_are_of_about_equal_size_and_stay_in_range() -> None:
    groups = [sampling.coin_group(f"row-{n}", 4) for n in range(4000)]
    assert set(groups) == {0, 1, 2, 3}
    assert all(abs(groups.count(group) - 1000) < 120 for group in range(4))
    assert {sampling.coin_group(f"row-{n}", 1) for n in range(20)} == {0}


def test_uniforms_look_uniform_within_a_row_and_across_rows() -> None:
    keys = sampling.row_keys(KEY, [str(n) for n in range(400)], [0] * 400, device="cpu")
    u = sampling.uniforms(keys[:, None], torch.arange(400))
    assert u.dtype == torch.float64 and float(u.min()) >= 0 and float(u.max()) < 1
    error = 1 / math.sqrt(12 * u.numel())
    assert abs(float(u.mean()) - 0.5) < 4 * error
    centred = u - 0.5
    for pairs in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):  # next position, next row
        assert abs(float(pairs.mean())) < 4 / 12 / math.sqrt(pairs.numel())


def _slow_draw(logits: list[float], u: float) -> int:
    """The first id whose cumulated mass exceeds u x total, by adding up."""
    top = max(logits)
    mass = [math.exp(x - top) for x in logits]
    cdf = list(itertools.accumulate(mass))
    return next(v for v in range(len(mass)) if cdf[v] > u * cdf[-1])


def test_draw_is_the_inverse_cdf() -> None:
    noise = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(300, 11, generator=noise, dtype=torch.float64)
    u = torch.rand(300, generator=noise, dtype=torch.float64)
    want = [_slow_draw(row, x) for row, x in zip(logits.tolist(), u.tolist(), strict=True)]
    assert sampling.draw(logits, u).tolist() == want


def test_draw_at_the_edges_of_each_step() -> None:
    """Mass 1/4, 1/4, 1/2: an id owns its lower edge and not its upper one."""
    logits = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    edges = {0.0: 0, 0.25 - 2**-40: 0, 0.25 + 2**-40: 1, 0.5 - 2**-40: 1, 0.5 + 2**-40: 2, LAST: 2}
    for u, want in edges.items():
        assert sampling.draw(logits, torch.tensor([u], dtype=torch.float64)).item() == want, u
    equal = torch.zeros(1, 4)
    assert [int(sampling.draw(equal, torch.tensor([k / 4]))) for k in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("forbidden", [-torch.inf, -1e4])
def test_an_id_without_mass_never_comes_out(forbidden: float) -> None:
    """Wherever the massless ids stand, at every edge of the uniform number."""
    for allowed in itertools.product([False, True], repeat=5):
        if not any(allowed):
            continue
        logits = torch.tensor([[0.3 * v if a else forbidden for v, a in enumerate(allowed)]])
        if forbidden > -torch.inf:  # exp underflows to 0 beside the allowed ones
            assert float(logits.double().softmax(-1).min()) == 0 or all(allowed)
        for u in (0.0, 2.0**-53, 0.25, 0.5, LAST):
            assert allowed[int(sampling.draw(logits, torch.tensor([u], dtype=torch.float64)))]


def test_a_prefix_sum_that_rounds_upwards_draws_no_massless_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parallel prefix sums differ in the last bit from id to id, so the sum may step up where there is no mass."""
    plain = Tensor.cumsum
    wobble = torch.tensor([0.0, 0.0, 2.0**-50, 0.0, 2.0**-49], dtype=torch.float64)
    monkeypatch.setattr(Tensor, "cumsum", lambda self, dim: plain(self, dim) + wobble)
    logits = torch.tensor([[0.0, 0.0, -torch.inf, 0.0, -torch.inf]])
    third = 2.0 / 3.0
    for u in (0.0, third - 2**-53, third, third + 2**-53, third + 2**-51, LAST):
        assert int(sampling.draw(logits, torch.tensor([u], dtype=torch.float64))) in {0, 1, 3}


def test_broken_logits_are_refused() -> None:
    u = torch.zeros(2)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NonFinite, match="1 of 2 rows"):
            sampling.draw(torch.tensor([[0.0, 1.0], [bad, 0.0]]), u)
    with pytest.raises(AssertionError, match="forbids every id"):
        sampling.draw(torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]]), u)
    with pytest.raises(ShapeMismatch):
        sampling.draw(torch.zeros(2, 3), torch.zeros(3))


def test_no_rows_draw_nothing() -> None:
    assert sampling.draw(torch.zeros(0, 5), torch.zeros(0)).shape == (0,)
    assert sampling.row_keys(KEY, [], [], device="cpu").shape == (0,)


def test_a_draw_tells_the_log_probability_of_what_it_drew() -> None:
    """To float64's rounding that of the whole softmax, forbidden ids and far apart logits included."""
    noise = torch.Generator().manual_seed(3)
    logits = 30.0 * torch.randn(200, 17, generator=noise)
    logits[:, ::5] = -torch.inf
    ids, log_prob, drawable = sampling.draw_unchecked(logits, torch.rand(200, generator=noise, dtype=torch.float64))
    assert bool(drawable.all()) and log_prob.dtype == torch.float64
    torch.testing.assert_close(log_prob, sampling.log_probs_of(logits, ids), rtol=1e-13, atol=1e-13)


def test_log_probs_of_are_those_of_the_softmax() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, -3.0, 5.0]])
    got = sampling.log_probs_of(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(got, logits.double().log_softmax(-1)[[0, 1], [1, 0]])


def _slow_support(logits: list[float], top_k: int, top_p: float) -> list[bool]:
    order = sorted((v for v in range(len(logits)) if logits[v] > -math.inf), key=lambda v: (-logits[v], v))
    order = order[:top_k] if top_k else order
    mass = [math.exp(logits[v] - logits[order[0]]) for v in order]
    kept, reached = set[int](), 0.0
    for v, m in zip(order, mass, strict=True):
        if top_p < 1 and kept and reached >= top_p * sum(mass):
            break
        kept.add(v)
        reached += m
    return [v in kept for v in range(len(logits))]


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (0, 0.5), (0, 0.01), (4, 0.8), (99, 0.9)])
def test_support_equals_sorting_by_hand(top_k: int, top_p: float) -> None:
    """On logits with many ties (integers) and some forbidden ids."""
    noise = torch.Generator().manual_seed(1)
    logits = torch.randint(-2, 3, (200, 9), generator=noise).double()
    logits[torch.rand(200, 9, generator=noise) < 0.2] = -torch.inf
    logits[:, 4] = 0.0
    got = sampling.support_mask(logits, top_k=top_k, top_p=top_p)
    assert got is not None
    assert got.tolist() == [_slow_support(row, top_k, top_p) for row in logits.tolist()]


def test_top_k_keeps_exactly_k_and_the_smaller_ids_of_equals() -> None:
    got = sampling.support_mask(torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), top_k=2, top_p=1.0)
    assert got is not None and got.tolist() == [[True, True, False, False], [True, True, False, False]]
    threshold = torch.zeros(1, 4) >= torch.zeros(1, 4).topk(2).values[:, -1:]
    assert int(threshold.sum()) == 4  # negative control: cutting at the k-th value keeps every tie


def test_top_p_stops_as_soon_as_the_share_is_reached() -> None:
    logits = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    for top_p, want in {0.5: [False, True, False], 0.51: [True, True, False], 0.76: [True, True, True]}.items():
        got = sampling.support_mask(logits, top_k=0, top_p=top_p)
        assert got is not None and got.tolist() == [want], top_p


def test_settings_that_keep_all_ids_give_no_support() -> None:
    logits = torch.zeros(2, 5)
    for top_k in (0, 5, 6):
        assert sampling.support_mask(logits, top_k=top_k, top_p=1.0) is None
    assert sampling.restrict(logits, None) is logits


def test_restricting_renormalises_on_the_support_and_leaves_exactly_nothing_off_it() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    p = sampling.restrict(logits, torch.tensor([[True, False, True]])).softmax(-1)
    full = logits.softmax(-1)
    torch.testing.assert_close(p[0, 2], full[0, 2] / (full[0, 0] + full[0, 2]))
    assert float(p[0, 1]) == 0 and math.isclose(float(p.sum()), 1)


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 9, 16, 21])
def test_packing_a_support_loses_nothing(vocabulary: int) -> None:
    support = torch.rand(3, 4, vocabulary, generator=torch.Generator().manual_seed(2)) < 0.5
    packed = sampling.pack_support(support)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 4, math.ceil(vocabulary / 8))
    assert torch.equal(sampling.unpack_support(packed, vocabulary), support)


def test_packed_bits_are_little_endian_and_the_wrong_width_is_refused() -> None:
    support = torch.zeros(10, dtype=torch.bool)
    support[[0, 3, 9]] = True
    packed = sampling.pack_support(support)
    assert packed.tolist() == [0b1001, 0b10]
    with pytest.raises(ShapeMismatch):
        sampling.unpack_support(packed, 17)
    with pytest.raises(ShapeMismatch):
        sampling.unpack_support(packed, 8)
