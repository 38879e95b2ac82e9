"""The parts of a step as plainly as transformers allows: a cached decode loop, a forward of the teacher, a forward and
backward of the student with whole logits. What a step costs beyond them is ours.

Legend: B rows, P prompt tokens, T new tokens, L = P + T, N = B T, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.bench.loss import whole_logits_loss
from minillm.cards import Kind, load_card
from minillm.decode import rows_of_groups, toss
from minillm.errors import ConfigError
from minillm.loading import inspect, load
from minillm.scoring import HeadWeights, TeacherView
from minillm.types import DrawKey, Prompt, Purpose


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Which models, and how many tokens."""

    teacher: str
    student: str
    rows: int
    prompt_tokens: int
    new_tokens: int
    precision: str = "fp32"

    @property
    def length(self) -> int:
        """Most tokens of a sequence."""
        return self.prompt_tokens + self.new_tokens

    @property
    def dtype(self) -> torch.dtype:
        """What weights are held in."""
        return {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}[self.precision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sizes, and how responses are drawn."""

    sizes: Sizes
    threads: int
    teacher_mix: float = 0.0
    coin_groups: int = 1

    def of(self, **sizes: Any) -> Self:
        """The same with other sizes."""
        return dataclasses.replace(self, sizes=dataclasses.replace(self.sizes, **sizes))

    def heads_GT(self, rollout: int) -> list[list[bool]]:
        """Where the teacher draws in the rollout of this number: whether each group has heads at each position."""
        return toss(
            draw_key(rollout), teacher_mix=self.teacher_mix, coin_groups=self.coin_groups,
            positions=self.sizes.new_tokens,
        )  # fmt: skip


def check_pair(sizes: Sizes) -> None:
    """Raise ``ConfigError`` where the models differ in ids, ``PositionsExceeded`` where they are too short, before they
    are built."""
    models: tuple[tuple[str, Kind], ...] = ((sizes.teacher, "teachers"), (sizes.student, "students"))
    facts = [inspect(load_card(name, kind=kind)) for name, kind in models]
    rows = [one.config.vocab_size for one in facts]
    if rows[0] != rows[1]:
        raise ConfigError(
            f"teacher {sizes.teacher} has {rows[0]:,} ids and student {sizes.student} {rows[1]:,}; wanted as many.\n"
            "  name two models of one vocabulary"
        )
    for one, (_, kind) in zip(facts, models, strict=True):
        one.require_positions(sizes.length, what=kind.removesuffix("s"), lower="--prompt-tokens or --new-tokens")


def draw_key(rollout: int) -> DrawKey:
    """The key of a benchmark's rollout."""
    return DrawKey(seed=0, stage="minillm", purpose=Purpose.TOKEN, rollout=rollout)


def random_prompts(sizes: Sizes, *, vocabulary: int, ranks: int = 1) -> list[Prompt]:
    """As many prompts as all ranks have rows, of random ids, all of one length."""
    ids_BP = random_ids(sizes.rows * ranks, sizes.prompt_tokens, vocabulary=vocabulary, seed=0)
    return [Prompt(uid=f"row-{row}", text="", ids=tuple(ids.tolist())) for row, ids in enumerate(ids_BP)]


class Bare:
    """The parts, each by itself."""

    def __init__(self, sizes: Sizes, *, device: torch.device) -> None:
        self._sizes = sizes
        self._teacher: Any = model_loader(sizes.teacher, "teachers", dtype=sizes.dtype, device=device)().eval()
        self._student: Any = model_loader(sizes.student, "students", dtype=sizes.dtype, device=device)().eval()
        vocabulary = self._student.config.vocab_size
        prompts = random_prompts(sizes, vocabulary=vocabulary)
        self._uids = [prompt.uid for prompt in prompts]
        self._ids_BP = torch.tensor([prompt.ids for prompt in prompts], device=device)
        more_BT = random_ids(sizes.rows, sizes.new_tokens, vocabulary=vocabulary, seed=1).to(device)
        noise = torch.Generator().manual_seed(2)
        self._ids_BL = torch.cat([self._ids_BP, more_BT], dim=1)
        self._advantage_N = torch.randn(more_BT.numel(), generator=noise).to(device)
        states_NH = torch.randn(more_BT.numel(), self._teacher.config.hidden_size, generator=noise)
        self._view = TeacherView(head=_head(self._teacher), hidden_NH=states_NH.to(device, sizes.dtype))

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Ids of the new tokens, [B, T]."""
        ids_BS, cache, drawn = self._ids_BP, None, []
        for _ in range(self._sizes.new_tokens):
            output = self._student(input_ids=ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            ids_BS = torch.multinomial(output.logits[:, -1].softmax(dim=-1), 1)
            drawn.append(ids_BS)
        return torch.cat(drawn, dim=1)

    @torch.no_grad()
    def teacher(self) -> Tensor:
        """Hidden states [B, L, H]; its logits belong to the update that needs them."""
        states_BLH: Tensor = self._teacher.base_model(input_ids=self._ids_BL, use_cache=False).last_hidden_state
        return states_BLH

    @torch.no_grad()
    def mixed_teacher(self, heads_GT: list[list[bool]]) -> int:
        """The teacher of a mixed rollout: one cached forward at each heads, over all tokens since the last, with logits
        of the token to draw, and one over the rest. How many forwards that were."""
        forwards = 0
        for rows_R, heads_T in zip(rows_of_groups(self._uids, len(heads_GT)), heads_GT, strict=True):
            if not len(rows_R):
                continue
            stops = [self._sizes.prompt_tokens + t for t, heads in enumerate(heads_T) if heads]
            start, cache = 0, None
            for stop in stops:
                output = self._teacher(
                    input_ids=self._ids_BL[rows_R, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                start, cache = stop, output.past_key_values
            # Nothing follows the last token, so nobody reads it.
            rest_RS = self._ids_BL[rows_R, start:-1]
            if rest_RS.shape[1]:
                self._teacher.base_model(input_ids=rest_RS, past_key_values=cache, use_cache=True)
            forwards += len(stops) + bool(rest_RS.shape[1])
        return forwards

    def update(self) -> Tensor:
        """Loss and gradient of the student, both models' logits whole; no optimiser."""
        self._student.zero_grad()
        first = self._sizes.prompt_tokens
        states_BLH = self._student.base_model(input_ids=self._ids_BL, use_cache=False).last_hidden_state
        loss = whole_logits_loss(
            states_BLH[:, first - 1 : -1].flatten(0, 1),
            head=_head(self._student),
            teacher=self._view,
            taken_N=self._ids_BL[:, first:].flatten(),
            advantage_N=self._advantage_N,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def model_loader(
    name: str, kind: Kind, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Callable[[], PreTrainedModel]:
    """Builds or reads the model of a card or folder, whenever it is called; random weights are drawn on the device."""
    card = load_card(name, kind=kind)
    facts = inspect(card)

    def made() -> PreTrainedModel:
        with torch.device(device):
            model: Any = load(card, facts, seed=0, dtype=dtype)
        found: PreTrainedModel = model.to(device)
        return found

    return made


def random_ids(rows: int, columns: int, *, vocabulary: int, seed: int) -> Tensor:
    """Ids but for 0, [rows, columns]."""
    return torch.randint(1, vocabulary, (rows, columns), generator=torch.Generator().manual_seed(seed))


def _head(model: PreTrainedModel) -> HeadWeights:
    projection = model.get_output_embeddings()
    return HeadWeights(weight_VH=projection.weight, bias_V=projection.bias)
