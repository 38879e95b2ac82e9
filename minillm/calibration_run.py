"""How sure a model is of reference responses, token by token, and of labelled choices.

Legend: B rows of a batch, L positions of prompt and response, N tokens, n some of them, H hidden width, V real ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from minillm.batches import ExampleBatch, example_batch
from minillm.calibration import BINS, Answers, calibration, chosen
from minillm.errors import DataError, did_you_mean
from minillm.evaluation import Judge
from minillm.micro_batches import alike
from minillm.models import ModelReader
from minillm.prompts import encode
from minillm.ranks import Ranks
from minillm.records import shown
from minillm.sweep import in_batches
from minillm.types import Prompt
from minillm.unfinished import Keeper, Key, Keyed

TOKENS_AT_ONCE = 256
"""Tokens whose logits are whole at a time: 150 MB for a vocabulary of 150,000."""
LEAST_CHOICES = 2


def require_answers(
    prompts: Sequence[Prompt], *, tokenizer: PreTrainedTokenizerBase, longest: int, setting: str
) -> None:
    """Raise ``DataError`` where there is nothing to be calibrated on, or a row's choices cannot be judged."""
    if not any(prompt.response_ids for prompt in prompts):
        raise DataError(
            f"{setting}: true, and none of the {len(prompts)} test prompts has a response of at most {longest} tokens "
            f"to compare with\n  give the rows a 'response' field, or set {setting}: false"
        )
    labelled = [prompt for prompt in prompts if prompt.choices]
    for prompt in labelled:
        _require_choices(prompt)
    for prompt, sets in zip(labelled, _choice_ids(labelled, tokenizer), strict=True):
        longest_choice = 1 + max(map(len, sets))  # with the end token
        if longest_choice > longest:
            raise DataError(
                f"row {shown(prompt.uid)}: a choice has {longest_choice} tokens, wanted at most "
                f"decoding.max_new_tokens {longest}\n  raise that, or shorten the choice"
            )


def _require_choices(prompt: Prompt) -> None:
    row, choices = f"row {shown(prompt.uid)}", prompt.choices
    if len(set(choices)) < max(len(choices), LEAST_CHOICES):
        raise DataError(f"{row}: got the choices {list(choices)}, wanted at least two, each once\n  mend the row")
    if not prompt.responses or prompt.responses[0] not in choices:
        got = shown(prompt.responses[0]) if prompt.responses else "none"
        near = did_you_mean(prompt.responses[0], choices) if prompt.responses else ""
        raise DataError(
            f"{row}: the response is {got}, wanted one of its choices {list(choices)}{near}\n"
            "  write the right choice as the response, or take 'choices' out of the row"
        )


def measure_calibration(
    reader: ModelReader, judge: Judge, *, resamples: int, ranks: Ranks, keeper: Keeper | None = None
) -> dict[str, Any]:
    """``{"references": …, "choices": …}``, each as ``calibration.calibration`` gives it, at temperature 1.

    ``references``: at each token of the reference responses (the end token included, after the reference's own tokens)
    the model says its likeliest id with that id's probability, and is right where the reference has it. ``choices``,
    where rows have them: each choice is weighed by its probability as the whole response, the end token included, and
    the model says the likeliest with its share among them. Neither batch size nor ranks change an answer, up to
    rounding. A ``keeper`` has what an earlier process read, which is not read again, and keeps what this one reads.
    """
    found = {"references": _reference_answers(reader, judge, ranks=ranks, keeper=keeper)}
    if any(prompt.choices for prompt in judge.prompts):
        found["choices"] = _choice_answers(reader, judge, ranks=ranks, keeper=keeper)
    return {
        name: calibration(answers, prompts=len(judge.prompts), resamples=resamples, seed=judge.seed, bins=BINS)
        for name, answers in found.items()
    }


def _reference_answers(reader: ModelReader, judge: Judge, *, ranks: Ranks, keeper: Keeper | None) -> Answers:
    rows: dict[Key, Prompt] = {(place,): prompt for place, prompt in enumerate(judge.prompts) if prompt.response_ids}
    heard = _read_on(rows, _likeliest, reader, judge, part="references", ranks=ranks, keeper=keeper)
    return Answers(
        confidence_K=np.concatenate([sure_T for _, (sure_T, _) in heard]),
        correct_K=np.concatenate([right_T for _, (_, right_T) in heard]).astype(bool),
        prompt_K=np.repeat([place for (place,), _ in heard], [len(sure_T) for _, (sure_T, _) in heard]),
    )


@torch.no_grad()
def _likeliest(reader: ModelReader, batch: ExampleBatch) -> list[tuple[list[float], list[int]]]:
    """Of each row (probability of the likeliest id, 1 where the reference has that id) at each response token."""
    hidden_NH = reader.read(batch.ids_BL, batch.mask_BL)[:, :-1][batch.target_BL[:, 1:]]
    wanted_N = batch.ids_BL[batch.target_BL]
    sure, right = [], []
    for start in range(0, len(hidden_NH), TOKENS_AT_ONCE):
        here = slice(start, start + TOKENS_AT_ONCE)
        logits_nV = reader.logits(hidden_NH[here])
        best_n, id_n = logits_nV.max(dim=1)
        sure.append((best_n.double() - logits_nV.logsumexp(dim=1).double()).exp().clamp(max=1.0))
        right.append((id_n == wanted_N[here]).long())
    ends = batch.target_BL.sum(dim=1).cumsum(dim=0).tolist()[:-1]
    rows = zip(torch.cat(sure).cpu().tensor_split(ends), torch.cat(right).cpu().tensor_split(ends), strict=True)
    return [(sure_T.tolist(), right_T.tolist()) for sure_T, right_T in rows]


def _choice_answers(reader: ModelReader, judge: Judge, *, ranks: Ranks, keeper: Keeper | None) -> Answers:
    labelled = [place for place, prompt in enumerate(judge.prompts) if prompt.choices]
    sets = _choice_ids([judge.prompts[place] for place in labelled], judge.tokenizer)
    rows: dict[Key, Prompt] = {
        (place, number): dataclasses.replace(judge.prompts[place], response_ids=(*ids, judge.ids.eos[0]))
        for place, choices in zip(labelled, sets, strict=True)
        for number, ids in enumerate(choices)
    }
    logq = dict(_read_on(rows, _log_probabilities, reader, judge, part="choices", ranks=ranks, keeper=keeper))
    answers = []
    for place in labelled:
        prompt = judge.prompts[place]
        each = [logq[place, number] for number in range(len(prompt.choices))]
        answers.append(chosen(each, right=prompt.choices.index(prompt.responses[0])))
    return Answers(
        confidence_K=np.array([sure for sure, _ in answers]),
        correct_K=np.array([right for _, right in answers]),
        prompt_K=np.array(labelled, dtype=np.int64),
    )


@torch.no_grad()
def _log_probabilities(reader: ModelReader, batch: ExampleBatch) -> list[float]:
    """Log-probability of each row's whole response."""
    hidden_BLH = reader.read(batch.ids_BL, batch.mask_BL)
    logq_N = reader.statistics(
        hidden_BLH[:, :-1][batch.target_BL[:, 1:]], taken_N=batch.ids_BL[batch.target_BL], wanted=("logq",)
    )["logq"]
    logq_BL = torch.zeros(batch.target_BL.shape, dtype=torch.float64, device=logq_N.device)
    logq_BL[batch.target_BL] = logq_N.double()
    return [float(value) for value in logq_BL.sum(dim=1)]


def _read_on(
    rows: Mapping[Key, Prompt],
    hear: Callable[[ModelReader, ExampleBatch], Sequence[Any]],
    reader: ModelReader,
    judge: Judge,
    *,
    part: str,
    ranks: Ranks,
    keeper: Keeper | None,
) -> list[Keyed]:
    """What ``hear`` says of each named row, of all ranks: read in batches of like length, those that are left."""
    names = list(rows)
    lengths = [len(row.ids) + len(row.response_ids) for row in rows.values()]
    cuts = alike(lengths, limits=judge.limits, ranks=ranks.size)[ranks.rank]

    def work(_: int, keys: Sequence[Key]) -> Sequence[Any]:
        if not keys:
            return []
        batch = example_batch([rows[key] for key in keys], pad_id=judge.ids.pad, device=reader.device)
        return hear(reader, batch)

    return in_batches([[names[row] for row in cut] for cut in cuts], work, part=part, ranks=ranks, keeper=keeper)


def _choice_ids(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[int, ...]]]:
    """Token ids of each prompt's choices, each by itself as a response is, without the end token."""
    texts = [choice for prompt in prompts for choice in prompt.choices]
    uids = [prompt.uid for prompt in prompts for _ in prompt.choices]
    ids = iter(encode(texts, tokenizer, uids=uids))
    return [[next(ids) for _ in prompt.choices] for prompt in prompts]
