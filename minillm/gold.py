"""What a model makes of reference responses: the log-prob of each of their tokens, from one forward pass.

At temperature 1 and over all ids, whatever the decoding settings are: this is about the model, not about sampling.

Legend: B rows, L positions, H hidden width, N tokens of one or several references.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.batches import example_batch
from minillm.micro_batches import Limits, alike
from minillm.models import ModelReader
from minillm.ranks import Ranks
from minillm.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """One reference response as a model reads it.

    Example: a reference of one word, which the model gives 1/2, and then the end, 1/4: logq (-0.69, -1.39), nats 2.08.
    """

    uid: str
    logq: tuple[float, ...]
    """Log-prob of each token given what stands before it, the closing EOS included."""

    @property
    def nats(self) -> float:
        """-log of the probability of the whole response."""
        return -sum(self.logq)


def read_gold(
    reader: ModelReader, prompts: Sequence[Example], *, pad_id: int, limits: Limits, ranks: Ranks
) -> list[Gold | None]:
    """A record for each prompt, in their order, all of them on every rank; None for a prompt without ``response_ids``.

    Ranks share the prompts; neither their number nor ``limits`` change a figure, up to rounding.
    """
    mine = [
        (place, Gold(uid=prompts[place].uid, logq=tuple(logq_N.tolist())))
        for place, logq_N in _own_share(reader, prompts, pad_id=pad_id, limits=limits, ranks=ranks)
    ]
    found = dict(ranks.gather_objects(mine))
    return [found.get(place) for place in range(len(prompts))]


def reference_loss(
    reader: ModelReader, prompts: Sequence[Example], *, pad_id: int, limits: Limits, ranks: Ranks
) -> float:
    """Mean cross-entropy of the reference responses, nats a token (closing EOS included), over the prompts that have
    one."""
    total, tokens = 0.0, 0
    for _, logq_N in _own_share(reader, prompts, pad_id=pad_id, limits=limits, ranks=ranks):
        total -= float(logq_N.sum())
        tokens += len(logq_N)
    summed = ranks.sum([total, float(tokens)]).tolist()
    return float(summed[0] / max(summed[1], 1.0))


@torch.no_grad()
def _own_share(
    reader: ModelReader, prompts: Sequence[Example], *, pad_id: int, limits: Limits, ranks: Ranks
) -> Iterator[tuple[int, Tensor]]:
    """(Which prompt, log-probs of its reference's tokens in float64) of every prompt that is this rank's to read."""
    answered = [place for place, prompt in enumerate(prompts) if prompt.response_ids]
    lengths = [len(prompts[place].ids) + len(prompts[place].response_ids) for place in answered]
    cuts = alike(lengths, limits=limits, ranks=ranks.size)[ranks.rank]
    for places in ([answered[index] for index in rows] for rows in cuts if rows or reader.lockstep):
        if not places:  # the other ranks read a batch, and in lockstep do not get it without this one
            ids_11 = torch.zeros(1, 1, dtype=torch.int64, device=reader.device)
            reader.read(ids_11, ids_11 == 0)
            with reader.scoring():
                continue
        rows = example_batch([prompts[place] for place in places], pad_id=pad_id, device=reader.device)
        hidden_BLH = reader.read(rows.ids_BL, rows.mask_BL)
        with reader.scoring():
            values = reader.statistics(
                hidden_BLH[:, :-1][rows.target_BL[:, 1:]], taken_N=rows.ids_BL[rows.target_BL], wanted=("logq",)
            )
        logq_N = values["logq"].double().cpu()
        ends = rows.target_BL.sum(dim=1).cumsum(dim=0).tolist()
        yield from zip(places, logq_N.tensor_split(ends[:-1]), strict=True)
