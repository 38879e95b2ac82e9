"""Rows end to end in lines are read as each row alone, forwards and backwards, whatever lies beside them.

Legend: B rows, L positions, R lines, W their length, H hidden width.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.models import CausalLM, Packs
from minillm.packing import SURE_WIDTH, WIDER, Reads, first_places, lay_out, pack
from minillm.probes import probe_packing
from tests import tiny

LENGTHS = (9, 2, 5, 1, 7, 3, 3, 8)
WIDTH = 11
"""Wider than the longest row: columns of nothing but padding."""
TINY = 1e-12


def batch_of(*, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of ``LENGTHS`` tokens with padding on one side; the id there is a real one."""
    ids_BL = torch.randint(2, len(tiny.WORDS), (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(0))
    column_L = torch.arange(WIDTH)
    length_B1 = torch.tensor(LENGTHS)[:, None]
    return ids_BL, (column_L >= WIDTH - length_B1) if left else (column_L < length_B1)


@pytest.fixture(params=tiny.FAMILIES)
def root(request: pytest.FixtureRequest, tmp_path: Any) -> CausalLM:
    folder = tiny.save_model(tmp_path / "model", request.param, seed=1)
    root = CausalLM(AutoModelForCausalLM.from_pretrained(folder).double().eval())
    root.head.real_ids = len(tiny.WORDS)
    return root


def test_rows_of_5_2_and_3_tokens_lie_in_two_lines_of_5() -> None:
    ids_BL = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0], [8, 9, 1, 0, 0]])
    packed = pack(ids_BL, torch.arange(5) < torch.tensor([[5], [2], [3]]), reads=Reads(hidden=8))
    assert packed.ids_RW.tolist() == [[1, 2, 3, 4, 5], [8, 9, 1, 6, 7]]
    assert packed.position_RW.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert packed.place_BL.tolist() == [[0, 1, 2, 3, 4], [8, 9, -1, -1, -1], [5, 6, 7, -1, -1]]


def test_no_row_at_all_is_one_line_of_one_place() -> None:
    packed = pack(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.bool), reads=Reads(hidden=8))
    assert packed.ids_RW.shape == packed.position_RW.shape == (1, 1)
    assert packed.of_rows(torch.zeros(1, 1, 3), torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 3)


def test_a_place_that_holds_no_token_cannot_be_asked_for() -> None:
    ids_BL, mask_BL = batch_of(left=True)
    with pytest.raises(IndexError):
        pack(ids_BL, mask_BL, reads=Reads(hidden=8)).of_rows(torch.zeros(20, 9, 3), ~mask_BL)


def test_no_two_rows_share_a_place_and_lines_are_few() -> None:
    source = random.Random(0)
    for _ in range(200):
        width = source.randint(1, 60)
        lengths = [source.randint(0, width) for _ in range(source.randint(0, 80))]
        starts, lines = first_places(lengths, width=width)
        taken = [place for start, length in zip(starts, lengths, strict=True) for place in range(start, start + length)]
        assert len(set(taken)) == len(taken) and max(taken, default=0) < lines * width
        ends = [(start, start + max(length, 1) - 1) for start, length in zip(starts, lengths, strict=True)]
        assert all(first // width == last // width for first, last in ends if last < lines * width)
        assert lines <= max(1.0, 2 * sum(lengths) / width)  # no two lines could have been one


def test_few_places_are_left_over_where_half_of_a_padded_batch_would_be() -> None:
    """Lengths spread as the embedded world's."""
    source = random.Random(1)
    lengths = [source.choice([12, 14, 18, 20, 22, 24, 26, 48, 50]) for _ in range(64)]
    _, lines = first_places(lengths, width=50)
    assert sum(lengths) / (64 * 50) < 0.6
    assert sum(lengths) / (lines * 50) > 0.9


def test_wider_lines_never_take_more_places_and_few_are_left_over() -> None:
    """Negative control: of sixteen rows the longest row's width leaves over far more."""
    source = random.Random(2)
    tokens = wide = narrow = 0
    for _ in range(100):
        lengths = [source.choice([12, 14, 18, 20, 22, 24, 26, 33, 48, 50]) for _ in range(16)]
        lines = lay_out(lengths, reads=Reads(hidden=170))
        of_longest = first_places(lengths, width=max(lengths))[1] * max(lengths)
        assert sum(lengths) <= lines.places <= of_longest
        assert max(lengths) <= lines.width <= WIDER * max(lengths)
        assert (lines.starts, lines.count) == first_places(lengths, width=lines.width)
        tokens, wide, narrow = tokens + sum(lengths), wide + lines.places, narrow + of_longest
    assert 1 - tokens / wide < 0.07
    assert 1 - tokens / narrow > 0.1


@pytest.mark.parametrize(
    ("lengths", "width"),
    [
        ([], 1),
        ([7], 7),
        ([7, 7, 7], 7),
        ([4, 3, 3], 4),
        ([400, 300], 400),
        ([600, 500, 400], 600),
        ([230, 120, 120, 300], 300),
    ],
)
def test_lines_are_widened_only_where_it_helps(lengths: list[int], width: int) -> None:
    """The last: two lines of 431 would be 4 % fewer places than three of 300, and attend over 44 % more."""
    assert lay_out(lengths, reads=Reads(hidden=170)).width == width


def test_no_line_is_wider_than_the_model_has_positions() -> None:
    """Unless a row is. Negative control: with more positions lines are wider."""
    lengths = [120, 70, 70, 70, 70]
    assert lay_out(lengths, reads=Reads(hidden=4096, positions=128)).width <= 128
    assert lay_out(lengths, reads=Reads(hidden=4096, positions=1024)).width > 128
    assert lay_out([200, 10], reads=Reads(hidden=4096, positions=128)).width == 200


def test_a_narrow_model_keeps_narrow_lines() -> None:
    """There attention is most of the work, and a wide line costs more than the places it saves."""
    source = random.Random(2)
    rows = [[source.choice([12, 14, 18, 20, 22, 24, 26, 33, 48, 50]) for _ in range(16)] for _ in range(50)]
    narrow, wide = (sum(lay_out(lengths, reads=Reads(hidden=hidden)).width for lengths in rows) for hidden in (4, 1024))
    assert narrow < 1.02 * sum(map(max, rows)) < 1.1 * sum(map(max, rows)) < wide


def test_lines_grow_no_further_than_any_model_has_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [420, 300, 240, 300, 240, 300, 240]
    assert lay_out(lengths, reads=Reads(hidden=170)).width <= SURE_WIDTH
    monkeypatch.setattr("minillm.packing.SURE_WIDTH", 4096)
    assert lay_out(lengths, reads=Reads(hidden=170)).width > SURE_WIDTH  # the negative control


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_a_packed_row_reads_as_it_does_alone(root: CausalLM, left: bool) -> None:
    ids_BL, mask_BL = batch_of(left=left)
    probe_packing(root, name="probed")
    assert root.packs == ("mask" if type(root.backbone).__name__ == "OPTModel" else "positions")
    got_BLH = root("read", ids_BL=ids_BL, mask_BL=mask_BL)
    assert float(got_BLH[~mask_BL].abs().max()) == 0.0
    for ids_L, mask_L, got_LH in zip(ids_BL, mask_BL, got_BLH, strict=True):
        alone_1SH, _ = root("extend", ids_BS=ids_L[mask_L][None], mask_BL=mask_L[mask_L][None], cache=None)
        torch.testing.assert_close(got_LH[mask_L], alone_1SH[0], rtol=0, atol=TINY)


def gradients(root: CausalLM, *, packs: Packs) -> tuple[Tensor, list[Tensor]]:
    """Weighted negative log-likelihood of the rows' second halves, and its gradient."""
    ids_BL, mask_BL = batch_of(left=True)
    root.packs = packs
    root.zero_grad()
    predict_BL = mask_BL & (torch.arange(WIDTH) >= WIDTH - torch.tensor(LENGTHS)[:, None] // 2)
    weight_N = torch.arange(1.0, float(predict_BL.sum()) + 1, dtype=torch.float64)  # so that order matters

    def loss_of(numbers: Mapping[str, Tensor], here: slice) -> Tensor:
        return -(weight_N[here] * numbers["logq"]).sum()

    loss, _ = root("train", ids_BL=ids_BL, mask_BL=mask_BL, predict_BL=predict_BL, wanted=("logq",), loss=loss_of)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in root.parameters() if p.grad is not None]


def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(root: CausalLM) -> None:
    probe_packing(root, name="probed")
    (same, of_packed), (loss, of_padded) = gradients(root, packs=root.packs), gradients(root, packs="no")
    torch.testing.assert_close(same, loss, rtol=0, atol=1e-9)
    for one, other in zip(of_packed, of_padded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)


class Around(torch.nn.Module):
    """A backbone with its inputs changed."""

    def __init__(self, backbone: torch.nn.Module, change: Any) -> None:
        super().__init__()
        self.backbone, self.change, self.config = backbone, change, backbone.config

    def forward(self, **inputs: Any) -> Any:
        return self.backbone(**self.change(inputs))


def is_packed(inputs: dict[str, Any]) -> bool:
    """Whether these are lines; padded rows come with a mask of two axes."""
    mask = inputs["attention_mask"]
    return mask is None or mask.dim() == 4


def without_borders(inputs: dict[str, Any]) -> dict[str, Any]:
    """What an architecture does that knows nothing of sequences in a line."""
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])} if is_packed(inputs) else inputs


def without_positions(inputs: dict[str, Any]) -> dict[str, Any]:
    """Borders, but positions that count on through the line."""
    if not is_packed(inputs):
        return inputs
    position_RW = inputs["position_ids"]
    row_RW = (position_RW == 0).cumsum(dim=1)
    borders_R1WW = (row_RW[:, :, None] == row_RW[:, None, :]).tril()[:, None]
    counted_RW = torch.arange(position_RW.shape[1]).expand_as(position_RW)
    return {**inputs, "attention_mask": borders_R1WW, "position_ids": counted_RW}


@pytest.mark.parametrize(
    ("family", "change"), [("llama", without_borders), ("gpt2", without_borders), ("gpt2", without_positions)]
)
@torch.no_grad()
def test_an_architecture_that_cannot_be_packed_is_padded_and_said_to_be(
    family: str, change: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = CausalLM(AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "m", family, seed=1)).eval())
    root.head.real_ids = len(tiny.WORDS)
    probe_packing(root, name="probed")
    assert root.packs == "positions" and "note" not in capsys.readouterr().err
    ids_BL, mask_BL = batch_of(left=True)
    want_BLH = root("read", ids_BL=ids_BL, mask_BL=mask_BL)
    root.backbone = Around(root.backbone, change)
    wrong_BLH = root("read", ids_BL=ids_BL, mask_BL=mask_BL)  # negative control of the tests above
    assert float((wrong_BLH - want_BLH).abs().max()) > 1e-2
    probe_packing(root, name="odd")
    assert root.packs == "no"
    assert capsys.readouterr().err.startswith("note: odd: rows are padded")
    got_BLH = root("read", ids_BL=ids_BL, mask_BL=mask_BL)
    torch.testing.assert_close(got_BLH, want_BLH, rtol=0, atol=1e-4)


def test_every_wanted_state_comes_back_in_row_order() -> None:
    ids_BL, mask_BL = batch_of(left=False)
    packed = pack(ids_BL, mask_BL, reads=Reads(hidden=8))
    states_RWH = packed.ids_RW[:, :, None].double()
    assert packed.of_rows(states_RWH, mask_BL)[:, 0].tolist() == ids_BL[mask_BL].tolist()
    wanted_BL = mask_BL.clone()
    wanted_BL[:, 0] = False
    assert packed.of_rows(states_RWH, wanted_BL)[:, 0].tolist() == ids_BL[wanted_BL].tolist()
    assert list(itertools.chain.from_iterable(packed.position_RW.tolist())).count(0) >= len(LENGTHS)


def small(family: str, **more: Any) -> CausalLM:
    """A random model of a family whose weights are far from 0, so that a token that is wrongly seen shows."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=28, pad_token_id=1, **sizes, **more)
    )
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=0.3)
    return CausalLM(model.eval())


@torch.no_grad()
def test_a_sliding_window_shorter_than_the_rows_stays_within_them() -> None:
    root = small("mistral", num_key_value_heads=1, intermediate_size=24, head_dim=8, sliding_window=3)
    ids_BL, mask_BL = batch_of(left=True)
    want_BLH = root("read", ids_BL=ids_BL, mask_BL=mask_BL)
    probe_packing(root, name="window")
    assert root.packs == "positions"
    torch.testing.assert_close(root("read", ids_BL=ids_BL, mask_BL=mask_BL), want_BLH, rtol=0, atol=1e-5)
    root.packs = "mask"  # the negative control, and why a mask is not for all
    assert float((root("read", ids_BL=ids_BL, mask_BL=mask_BL) - want_BLH).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_biases_by_distance_are_padded_as_before(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    root = small("bloom").to(dtype)
    probe_packing(root, name="alibi")
    assert root.packs == "no" and "note: alibi: rows are padded" in capsys.readouterr().err


@torch.no_grad()
def test_a_model_in_16_bits_passes_and_one_with_wrong_positions_does_not() -> None:
    for change, packs in ((None, "positions"), (without_positions, "no")):
        root = small("gpt2", n_positions=48).bfloat16()
        if change is not None:
            root.backbone = Around(root.backbone, change)
        probe_packing(root, name="half")
        assert root.packs == packs


@torch.no_grad()
def test_a_pad_id_without_a_row_of_its_own_is_never_read() -> None:
    root = small("llama", intermediate_size=24)
    root.backbone.config.pad_token_id = 28
    probe_packing(root, name="padless")
    assert root.packs == "positions"
