"""Five prompts answered by both models, looked over: do they end, say something, repeat themselves?"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from minillm.batches import prompt_batch
from minillm.decode import roll_out
from minillm.doctor.findings import Finding, note, ok, warning
from minillm.doctor.patient import Model, Patient
from minillm.loading import load
from minillm.models import CausalLM, ModelReader
from minillm.pairs import Pair
from minillm.preflight import decoding_record
from minillm.probes import probe_head
from minillm.ranks import Ranks
from minillm.text_stages import ReferenceStage
from minillm.types import DrawKey, Prompt, Purpose

PROMPTS = 5
NGRAM = 4
"""Tokens of a run that counts as repeated where it stood earlier in the same answer."""
REPEATED = 0.3
"""Share of such runs from which on an answer goes in circles; people's own text has under 0.05."""
CUT = 0.6
"""Share of answers without an end from which on something keeps the model from ending."""
EMPTY = 0.4
"""Share of answers without a word from which on that is no chance."""
SHOWN = 150
"""Characters of a prompt or an answer that are printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One of a model's."""

    model: str
    prompt: str
    text: str
    tokens: int
    ended: bool
    """Whether it came to an end token, and was not cut."""
    repeated: float
    """Share of its runs of ``NGRAM`` tokens that stood in it earlier."""


def answers(patient: Patient, pair: Pair, prompts: Sequence[Prompt]) -> Iterator[Answer]:
    """What student and teacher say, one model in memory at a time, each whole on one device."""
    ranks = Ranks(threads=patient.config.threads)
    for model in patient.models:
        yield from _answers_of(model, patient, pair, prompts[:PROMPTS], ranks=ranks)
        gc.collect()


def _answers_of(
    model: Model, patient: Patient, pair: Pair, prompts: Sequence[Prompt], *, ranks: Ranks
) -> Iterator[Answer]:
    dtype = torch.float32 if model.role == "student" else None
    loaded = load(model.card, model.facts, seed=patient.config.seed if model.role == "student" else 0, dtype=dtype)
    loaded.eval()
    root = CausalLM(loaded)
    root.head.real_ids = pair.real_ids
    probe_head(loaded, root)
    root.eval().to(ranks.device)
    rollout = roll_out(
        prompt_batch(prompts, [0] * len(prompts), pad_id=pair.ids.pad, device=ranks.device),
        student=ModelReader(root, device=ranks.device, lockstep=False),
        decoding=decoding_record(patient.config.decoding),
        key=DrawKey(seed=patient.config.seed, stage="doctor", purpose=Purpose.EVALUATION, rollout=0),
        eos_ids=pair.ids.eos,
        pad_id=pair.ids.pad,
    )
    drawn = zip(rollout.response_BT.tolist(), rollout.length_B.tolist(), rollout.stop_B, strict=True)
    for prompt, (ids_T, length, stop) in zip(prompts, drawn, strict=True):
        ended = str(stop) != "length"
        ids = ids_T[: length - int(ended)]
        text = str(pair.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        yield Answer(
            model=model.role, prompt=prompt.text, text=text, tokens=len(ids), ended=ended, repeated=repeated_share(ids)
        )


def repeated_share(ids: Sequence[int]) -> float:
    """Of all runs of ``NGRAM`` tokens, those that stood earlier; 0 for a text that is too short to have two."""
    runs = [tuple(ids[place : place + NGRAM]) for place in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def looked_over(patient: Patient, given: Sequence[Answer]) -> Iterator[Finding]:
    """What five answers show. A student that is going to be taught from references first is only told of."""
    for role in dict.fromkeys(answer.model for answer in given):
        own = [answer for answer in given if answer.model == role]
        raw = role == "student" and isinstance(patient.config.trained[0], ReferenceStage)
        cut = sum(not answer.ended for answer in own) / len(own)
        empty = sum(not answer.text for answer in own) / len(own)
        circles = sum(answer.repeated for answer in own) / len(own)
        words = f"{role}: {len(own)} answers, {cut:.0%} cut, {empty:.0%} empty, {circles:.0%} repeated"
        wrong = [
            (
                cut >= CUT,
                f"{CUT:.0%} or more are cut at decoding.max_new_tokens",
                "raise decoding.max_new_tokens, or see end-tokens and turn-end: does the model's own end token count?",
            ),
            (
                empty >= EMPTY,
                f"{EMPTY:.0%} or more are empty",
                "see the template and begin-token: is this the form of prompts that the model knows?",
            ),
            (
                circles >= REPEATED,
                f"{REPEATED:.0%} or more of the runs of {NGRAM} tokens stood there before",
                "fine-tune it on references first (an sft stage), or set decoding.no_repeat_ngram_size",
            ),
        ]
        if not any(found for found, _, _ in wrong):
            yield ok("rollout", words)
        for found, why, mend in wrong:
            if found and raw:
                yield note("rollout", words, why=f"{why}; stage {patient.config.trained[0].name} trains it first")
            elif found:
                yield warning("rollout", words, why=f"{why}: a MiniLLM stage learns from such text", mend=mend)


def shown(answer: Answer) -> str:
    """Two lines: the prompt's end, and what was said."""
    prompt, text = (" ".join(part.split()) for part in (answer.prompt, answer.text))
    kept = prompt if len(prompt) <= SHOWN else f"…{prompt[-SHOWN:]}"
    said = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
    how = f"{answer.tokens} tokens, {'ended' if answer.ended else 'cut'}"
    return f"{answer.model} ({how}) ← {kept}\n  {said or '(nothing)'}"
