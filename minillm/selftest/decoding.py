"""The decode loop: whose tokens they are, how they are distributed, where they end, and what both models say of them.

Legend: B rows, T response positions, N distinct responses, V ids.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm import decode, sampling, scoring
from minillm.batches import prompt_batch
from minillm.models import CausalLM, ModelReader
from minillm.selftest.check import Check, Found, device, differing, gap, worst
from minillm.selftest.draws import DRAWS, KEY, chi_square
from minillm.selftest.listed import EOS, LONGEST, TableReader, listed, tables
from minillm.selftest.tiny import tiny
from minillm.types import Decoding, Prompt, PromptBatch, Rollout, Scored, Stop

TABLES = Decoding(max_new_tokens=LONGEST)
PLAIN = Decoding(max_new_tokens=8)
TRUNCATED = Decoding(max_new_tokens=8, temperature=0.8, top_k=20, top_p=0.9)
MIX, GROUPS = 0.4, 2
ENDS = (3, *range(100, 130))
"""Ids that end a response, many, so that some responses of random models are short."""


def many(count: int) -> PromptBatch:
    """Prompts of one token, which is the end-of-text id."""
    return prompt_batch([Prompt(uid=str(n), text="", ids=(EOS,)) for n in range(count)], [0] * count, pad_id=EOS,
                        device=device())  # fmt: skip


def from_tables(count: int, *, swap: bool = False, mix: float | None = None) -> Rollout:
    """Responses of the student's table (of the teacher's, where swapped), with a teacher where a share is named."""
    student, teacher = (TableReader(table_XV, device=device()) for table_XV in tables())
    guide = None if mix is None else teacher
    return decode.roll_out(
        many(count), student=teacher if swap else student, teacher=guide, teacher_mix=mix or 0.0, decoding=TABLES,
        key=KEY, eos_ids=(EOS,), pad_id=EOS, keep_hidden=True,
    )  # fmt: skip


def without_mixing() -> Found:
    """A teacher that draws nothing changes no id: with it and without it the responses are the same to the bit."""
    alone, beside = from_tables(256), from_tables(256, mix=0.0)
    names = ("response_BT", "mask_BT", "logq_BT")
    wrong = sum(differing(getattr(beside, name), getattr(alone, name)) for name in names)
    return Found(wrong + float(beside.teacher_drew_BT.sum()), 0.0)


def teacher_alone() -> Found:
    """A teacher that draws everything writes what it would write by itself."""
    taught, own = from_tables(256, mix=1.0), from_tables(256, swap=True)
    wrong = differing(taught.response_BT, own.response_BT) + differing(taught.teacher_drew_BT, own.mask_BT)
    return Found(wrong, 0.0)


def distribution() -> Found:
    """A few thousand responses come as often as the list of all of them says."""
    found, of = from_tables(DRAWS), listed(*tables())
    same_BN = (found.response_BT.cpu()[:, None] == of.response_NT).all(dim=2)
    same_BN &= (found.mask_BT.cpu()[:, None] == of.mask_NT).all(dim=2)
    assert bool((same_BN.sum(dim=1) == 1).all()), "a response that is not on the list"
    return chi_square(same_BN.sum(dim=0), of.chance_N)


def end_of_text() -> Found:
    """The first end-of-text id counts and closes its row, nothing after it does, and unfinished rows count whole;
    though the pad has the same id, and each prompt ends with it."""
    found = from_tables(256)
    wrong = 0
    for ids, kept, stop in zip(found.response_BT.tolist(), found.mask_BT.tolist(), found.stop_B, strict=True):
        ended = EOS in ids[: sum(kept)]
        length = ids.index(EOS) + 1 if EOS in ids else LONGEST
        reason = Stop.EMPTY if ids[0] == EOS else Stop.EOS if ended else Stop.LENGTH
        wrong += kept != [t < length for t in range(LONGEST)] or stop is not reason
    missing = set(Stop) - set(found.stop_B)
    off_mask = worst(found.logq_BT[~found.mask_BT].abs()) + float(not found.prompts.mask_BP.all())
    return Found(float(wrong) + len(missing) + off_mask, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a response, spelled out."""

    id: int
    drew: bool
    logq: Tensor
    logp: Tensor
    reverse_kl: Tensor
    entropy: Tensor


NUMBERS = ("logq", "logp", "reverse_kl", "entropy")


@torch.no_grad()
def spelled_out(own: PreTrainedModel, guide: PreTrainedModel, prompt: Prompt, decoding: Decoding) -> list[Token]:
    """One row's tokens from plain forwards over its whole text at each of them: no cache, no batch, no padding."""
    row_1 = sampling.row_keys(KEY, [prompt.uid], [0], device="cpu")
    coin_1 = sampling.coin_keys(KEY, [sampling.coin_group(prompt.uid, GROUPS)])
    ids, found = list(prompt.ids), list[Token]()
    for t in range(decoding.max_new_tokens):
        ids_1L = torch.tensor([ids], device=device())
        q, p = (model(ids_1L).logits[0, -1].cpu() / decoding.temperature for model in (own, guide))
        kept = likeliest(q.softmax(0).tolist(), decoding)
        q, p = (logits[kept].log_softmax(0) for logits in (q, p))
        heads = float(sampling.uniforms(coin_1, t)) < MIX
        reach_K = (p if heads else q).exp().cumsum(0)
        at = int((reach_K <= float(sampling.uniforms(row_1, t)) * reach_K[-1]).sum())
        found.append(
            Token(
                id=kept[at], drew=heads, logq=q[at], logp=p[at], reverse_kl=(q.exp() * (q - p)).sum(),
                entropy=-(q.exp() * q).sum(),
            )
        )  # fmt: skip
        ids.append(kept[at])
        if kept[at] in ENDS:
            break
    return found


def likeliest(chance: list[float], decoding: Decoding) -> list[int]:
    """The ids that top-k and then top-p keep, in ascending order."""
    order = sorted(range(len(chance)), key=lambda v: (-chance[v], v))[: decoding.top_k or len(chance)]
    whole, reach, kept = sum(chance[v] for v in order), 0.0, list[int]()
    for v in order:
        if reach < decoding.top_p * whole:
            kept.append(v)
        reach += chance[v]
    return sorted(kept)


def twins(decoding: Decoding) -> tuple[Rollout, Scored, list[list[Token]]]:
    """Rows of several lengths in one batch, mixed from two tiny models in float64 and scored; and each spelled out."""
    made = tiny("gpt2", dtype="float64")
    own, guide = (made.load(seed=seed).eval().to(device()) for seed in (1, 2))
    lengths = (1, 5, 2, 7, 3, 4)
    ids = [tuple(5 + 11 * (n + 4 * row) % 90 for n in range(length)) for row, length in enumerate(lengths)]
    ids[3] = (*ids[3][:-1], made.eos)
    prompts = [Prompt(uid=f"row-{row}", text="", ids=each) for row, each in enumerate(ids)]
    readers = [ModelReader(CausalLM(model), device=device(), lockstep=False) for model in (own, guide)]
    rollout = decode.roll_out(
        prompt_batch(prompts, [0] * len(prompts), pad_id=made.eos, device=device()), student=readers[0],
        teacher=readers[1], decoding=decoding, key=KEY, eos_ids=ENDS, pad_id=made.eos, teacher_mix=MIX,
        coin_groups=GROUPS, keep_hidden=True,
    )  # fmt: skip
    head = CausalLM(guide).head.weights()
    scored = scoring.score(rollout, student=readers[0], teacher_head=head, temperature=decoding.temperature)
    return rollout, scored, [spelled_out(own, guide, prompt, decoding) for prompt in prompts]


def batched_decoding() -> Found:
    """Cached, batched, mixed decoding writes the ids, and tosses the coins, of a loop that knows none of these."""
    wrong = 0.0
    for decoding in (PLAIN, TRUNCATED):
        rollout, _, rows = twins(decoding)
        for row, tokens in enumerate(rows):
            kept_T = rollout.mask_BT[row]
            wrong += differing(rollout.response_BT[row, kept_T].cpu(), torch.tensor([token.id for token in tokens]))
            wrong += differing(
                rollout.teacher_drew_BT[row, kept_T].cpu(), torch.tensor([token.drew for token in tokens])
            )
    return Found(wrong, 0.0)


def scores() -> Found:
    """Log-probabilities, KL and entropy of every token, from states that sampling kept, are those of plain forwards."""
    errors = []
    for decoding in (PLAIN, TRUNCATED):
        rollout, scored, rows = twins(decoding)
        tokens = list(itertools.chain.from_iterable(rows))
        for name in NUMBERS:
            got_N = getattr(scored, f"{name}_BT")[rollout.mask_BT].cpu()
            errors.append(gap(got_N, torch.stack([getattr(token, name) for token in tokens])))
        errors.append(gap(rollout.logq_BT[rollout.mask_BT].cpu(), torch.stack([token.logq for token in tokens])))
    return Found(worst(*errors), 1e-9)


CHECKS = (
    Check(name="decoding: a teacher at share 0 changes no id", run=without_mixing),
    Check(name="decoding: share 1 is the teacher alone", run=teacher_alone),
    Check(name="decoding: responses, chi-square", run=distribution),
    Check(name="decoding: masks from lengths, end of text", run=end_of_text),
    Check(name="decoding: batch and cache against a plain loop", run=batched_decoding),
    Check(name="decoding: scores against plain forwards", run=scores),
)
