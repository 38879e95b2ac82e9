"""Answers that a frozen model draws to prompts: what ``minillm generate`` writes, and what refreshes pairs in a run.

What is drawn depends on model, prompt, decoding and key, and on nothing else: not on batches or ranks, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minillm.batches import prompt_batch
from minillm.decode import roll_out
from minillm.generation_parts import Cell
from minillm.micro_batches import Limits, alike
from minillm.models import ModelReader
from minillm.pairs import Pair
from minillm.ranks import Ranks
from minillm.types import Decoding, DrawKey, Prompt, Purpose, Stop


class Drawn(NamedTuple):
    """One answer."""

    cell: Cell
    ids: tuple[int, ...]
    """As drawn, without the end token."""
    text: str
    """What the ids say, spaces at its ends too: what is in the text is what is learnt."""
    stop: Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How answers are drawn: by which decoding, and under which random numbers."""

    pair: Pair
    """Tokenizer and special ids of the model that answers."""
    decoding: Decoding
    limits: Limits
    ranks: Ranks
    seed: int
    stage: str = ""
    """Part of every random key; "" outside of a run."""

    def batches(self, cells: Sequence[Cell], prompts: Sequence[Prompt]) -> list[list[Cell]]:
        """This rank's cells, those with prompts of similar length together; as many batches on every rank, of which the
        last may be empty."""
        mine = alike(
            [len(prompts[place].ids) for place, _ in cells], limits=self.limits, ranks=self.ranks.size,
            more=self.decoding.max_new_tokens,
        )[self.ranks.rank]  # fmt: skip
        return [[cells[index] for index in batch] for batch in mine]

    def draw(self, cells: Sequence[Cell], prompts: Sequence[Prompt], *, reader: ModelReader) -> list[Drawn]:
        """This rank's answers to one batch; with no cells it still keeps step with the other ranks."""
        ids, ranks = self.pair.ids, self.ranks
        batch = prompt_batch(
            [prompts[place] for place, _ in cells], [sample for _, sample in cells], pad_id=ids.pad,
            device=reader.device,
        )  # fmt: skip
        rollout = ranks.together(
            lambda: roll_out(
                batch,
                student=reader,
                decoding=self.decoding,
                key=DrawKey(seed=self.seed, stage=self.stage, purpose=Purpose.GENERATION, rollout=0),
                eos_ids=ids.eos,
                pad_id=ids.pad,
                anyone=ranks.anyone if reader.lockstep else bool,
            )
        )
        found = []
        for row, (cell, length, stop) in enumerate(zip(cells, rollout.length_B, rollout.stop_B, strict=True)):
            kept = int(length) - (stop != Stop.LENGTH)
            drawn = tuple(rollout.response_BT[row, :kept].tolist())
            found.append(Drawn(cell, drawn, self._text(drawn), stop))
        return found

    def _text(self, ids: tuple[int, ...]) -> str:
        text = self.pair.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).replace("\x00", "")  # a byte that a model may draw and no prompt file may hold
