"""The language-model loss on a corpus, and nothing else, spelled out on plain models: the text is read and cut here,
and each update is one step of torch's AdamW.

Legend: L tokens of a block, V real ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minillm.order import permutation
from tests import tiny

REAL, EOS = len(tiny.WORDS), tiny.WORDS.index(tiny.EOS)
EPS = 1e-2
"""Of AdamW. At a large one the size of a gradient counts, and noise where it ought to be 0 is no whole step."""
LR = 3e-2
OPTIMISER = {"lr": LR, "schedule": "constant", "eps": EPS}
ALONE = {"single_weight": 0.0, "long_weight": 0.0, "lm_coefficient": 1.0}
"""Settings of a stage that learns from the corpus only."""


def save_text(file: Path, *, documents: int = 10) -> Path:
    """Documents of two to ten letters, with blank lines between."""
    texts = [
        " ".join(tiny.LETTERS[(number * 5 + step * 3) % len(tiny.LETTERS)] for step in range(2 + number % 9))
        for number in range(documents)
    ]
    file.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return file


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, of which the first few are read and the others learnt."""

    ids: list[int]
    read: int = 1


def read_blocks(file: Path, length: int) -> list[Text]:
    """The blocks of a text file."""
    stream: list[int] = []
    for text in file.read_text(encoding="utf-8").split("\n\n"):
        stream += [*(tiny.WORDS.index(word) for word in text.split()), EOS]
    blocks = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [Text(block) for block in blocks if len(block) > 1]


class CorpusTwin:
    """A student that takes such updates, one after the other."""

    def __init__(self, student: Path, teacher: Path, *, blocks: list[Text], batch: int, share: float) -> None:
        self.student = AutoModelForCausalLM.from_pretrained(student).eval()
        self.teacher = AutoModelForCausalLM.from_pretrained(teacher).eval()
        self.blocks, self.batch, self.share = blocks, batch, share
        self._adam = torch.optim.AdamW(self.student.parameters(), lr=LR, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)

    def rows(self, update: int, *, seed: int, purpose: str) -> list[Text]:
        """The blocks of an update, counted from 0: the next ones of an endless row of shuffled epochs."""
        count = len(self.blocks)
        epochs = range((update + 1) * self.batch // count + 1)
        order = [row for epoch in epochs for row in permutation(count, seed=seed, epoch=epoch, purpose=purpose)]
        return [self.blocks[row] for row in order[update * self.batch : (update + 1) * self.batch]]

    def loss(self, rows: list[Text]) -> Tensor:
        """The mean over all tokens that are learnt."""
        total, count = torch.zeros(()), 0
        for row in rows:
            row_1L = torch.tensor([row.ids])
            logq_LV = self.student(row_1L).logits[0, :-1, :REAL].log_softmax(-1)
            with torch.no_grad():
                logp_LV = self.teacher(row_1L).logits[0, :-1, :REAL].log_softmax(-1)
            for position in range(row.read, len(row.ids)):
                logq_V, logp_V = logq_LV[position - 1], logp_LV[position - 1]
                total = total - (1 - self.share) * logq_V[row.ids[position]]
                total = total + self.share * (logp_V.exp() * (logp_V - logq_V)).sum()
                count += 1
        return total / count

    def step(self, update: int, *, seed: int, purpose: str) -> tuple[float, float]:
        """One update: its loss, and the norm of its gradient before it is cut to 1."""
        self._adam.zero_grad()
        loss = self.loss(self.rows(update, seed=seed, purpose=purpose))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self._adam.step()
        return float(loss.detach()), float(norm)

    def weights(self) -> dict[str, Tensor]:
        """As a published student has them: without rows of the head that are padding."""
        state: dict[str, Tensor] = self.student.state_dict()
        return {name: value[:REAL] if value.shape[:1] > (REAL,) else value for name, value in state.items()}
