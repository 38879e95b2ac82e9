"""Four architectures, tied and untied: the student that is published is the one that was trained and measured.

Everything here is recomputed from the published folder with plain transformers: whole forwards over unpadded text, no
cache, a softmax over the rows that the folder has.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm import distill, evaluate
from minillm.config import RunConfig
from minillm.sampling import draw, row_keys, uniforms
from minillm.types import DrawKey, Purpose
from tests import tiny

REAL, EOS = len(tiny.WORDS), tiny.WORDS.index(tiny.EOS)
TEACHER_ROWS, STUDENT_ROWS = 32, 30
MODELS = [(family, tied) for family in tiny.FAMILIES for tied in (True, False)]
SEEDS, TEMPERATURES = (10, 20), (1.0, 0.7)
PROMPTS, LONGEST = 4, 10
CLOSE = 1e-4


class Family:
    """One finished run: its models' folders, its configuration and its samples."""

    def __init__(self, folder: Path, family: str, tied: bool) -> None:
        self.teacher = tiny.save_model(folder / "teacher", family, seed=1, tied=tied, rows=TEACHER_ROWS)
        self.start = tiny.save_model(folder / "start", family, seed=2, tied=tied, rows=STUDENT_ROWS)
        prompts = tiny.save_prompts(folder / "prompts.jsonl", rows=12)
        self.config: RunConfig = tiny.minillm_config(
            folder,
            teacher=self.teacher,
            student=self.start,
            prompts=prompts,
            run_decoding={"max_new_tokens": LONGEST},
            run_data={"train": str(prompts), "test": str(prompts), "test_limit": PROMPTS, "max_prompt_tokens": 8},
            run_evaluation={"seeds": SEEDS, "temperatures": TEMPERATURES, "bootstrap": 10},
        )
        self.run = distill(self.config)
        self.student = self.run / "student"

    def samples(self, folder: Path | None = None) -> list[dict[str, Any]]:
        lines = ((folder or self.run) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Family]:
    made: dict[tuple[str, bool], Family] = {}

    def family(name: str, tied: bool) -> Family:
        if (name, tied) not in made:
            made[name, tied] = Family(tmp_path_factory.mktemp(name), name, tied)
        return made[name, tied]

    return family


@functools.cache
def opened(folder: Path) -> Any:
    """A model that is only read."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def spelled_out(
    run: Family, sample: dict[str, Any], *, student: Path, columns: int = REAL
) -> tuple[str, int, dict[str, float]]:
    """(text, tokens, nats by measure) of one sample, from plain forwards and the row's own random numbers.

    ``columns`` of the teacher take part in its softmax.
    """
    own, guide = opened(student), opened(run.teacher)
    tokenizer = AutoTokenizer.from_pretrained(student)
    key = DrawKey(seed=run.config.seed, stage="", purpose=Purpose.EVALUATION, rollout=0)
    key_1 = row_keys(key, [sample["uid"]], [sample["seed"]], device="cpu")
    ids: list[int] = tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
    start, nats = len(ids), dict.fromkeys(tiny.NATS, 0.0)
    gold: list[int] = [*tokenizer(sample["references"][0], add_special_tokens=False)["input_ids"], EOS]
    for place, token in enumerate(gold):
        nats["gold_nll"] -= float(next_token(own, ids + gold[:place], 1.0).log_softmax(-1)[token])
    while len(ids) - start < LONGEST and (len(ids) == start or ids[-1] != EOS):
        q_V, p_V = (next_token(model, ids, sample["temperature"]) for model in (own, guide))
        logq_V, logp_V = q_V[:REAL].log_softmax(-1), p_V[:columns].log_softmax(-1)[:REAL]
        nats["reverse_kl"] += float((logq_V.exp() * (logq_V - logp_V)).sum())
        nats["forward_kl"] += float((logp_V.exp() * (logp_V - logq_V)).sum())
        ids.append(int(draw(q_V[None], uniforms(key_1, len(ids) - start))))
        nats["teacher_nll"] -= float(logp_V[ids[-1]])
    written = ids[start:-1] if ids[-1] == EOS else ids[start:]
    return tokenizer.decode(written, skip_special_tokens=True).strip(), len(written), nats


def next_token(model: Any, ids: list[int], temperature: float) -> Tensor:
    logits: Tensor = model(torch.tensor([ids])).logits[0, -1].double() / temperature
    return logits


@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_the_published_student_has_the_text_and_the_nats_that_were_reported(
    name: str, tied: bool, families: Callable[..., Family]
) -> None:
    run = families(name, tied)
    samples = run.samples()
    assert len(samples) == PROMPTS * len(SEEDS) * len(TEMPERATURES)
    for sample in samples[:: 3 if name != "gpt2" else 1]:
        text, tokens, nats = spelled_out(run, sample, student=run.student)
        assert (sample["response"], sample["tokens"]) == (text, tokens), sample
        for measure, value in nats.items():
            assert sample["measures"][measure] == pytest.approx(value, abs=CLOSE), (measure, sample)
        assert sample["measures"]["kl_tokens"] == tokens + (sample["stop"] != "length")


@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_the_published_student_was_trained_and_has_real_rows_only(
    name: str, tied: bool, families: Callable[..., Family]
) -> None:
    """Negative control of the equality above: the student that it started from has another divergence."""
    run = families(name, tied)
    ended = AutoModelForCausalLM.from_pretrained(run.student)
    begun = AutoModelForCausalLM.from_pretrained(run.start)
    assert ended.get_output_embeddings().weight.shape[0] == REAL == ended.config.vocab_size
    tying = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (begun, ended)]
    assert tying == [tied, tied]
    theirs = dict(begun.named_parameters())
    changed = {name for name, p in ended.named_parameters() if not torch.equal(p, theirs[name][: p.shape[0]])}
    assert changed == set(theirs), "every weight moved"


def test_a_softmax_over_the_padded_rows_would_be_seen(families: Callable[..., Family]) -> None:
    """Negative control: with the teacher's four rows that mean nothing its figures are other ones, and with the student
    that was started from, those of the references."""
    run = families("llama", False)
    sample = run.samples()[0]
    _, _, wrong = spelled_out(run, sample, student=run.student, columns=TEACHER_ROWS)
    _, _, begun = spelled_out(run, sample, student=run.start)
    for name in tiny.NATS:
        other = begun if name == "gold_nll" else wrong
        assert abs(sample["measures"][name] - other[name]) > 100 * CLOSE, name


@pytest.mark.parametrize(("name", "tied"), [("gpt2", True), ("qwen2", False)])
def test_evaluating_the_published_folder_again_gives_the_same_samples_byte_by_byte(
    name: str, tied: bool, families: Callable[..., Family], tmp_path: Path
) -> None:
    run = families(name, tied)
    results = evaluate(run.student, run.config, out=tmp_path)
    assert (tmp_path / "samples.jsonl").read_bytes() == (run.run / "samples.jsonl").read_bytes()
    stored = json.loads((run.run / "results.json").read_text(encoding="utf-8"))
    assert results["measures"] == stored["measures"]
    other = run.config.model_copy(update={"seed": 11})
    evaluate(run.student, other, out=tmp_path / "other")
    assert run.samples(tmp_path / "other") != run.samples(), "the control: the seed is what decides"


@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_of_an_evaluation_changes_no_text(
    batch: int, families: Callable[..., Family], tmp_path: Path
) -> None:
    run = families("opt", True)
    settings = run.config.evaluation.model_copy(update={"batch": batch})
    evaluate(run.student, run.config.model_copy(update={"evaluation": settings}), out=tmp_path)
    for one, other in zip(run.samples(tmp_path), run.samples(), strict=True):
        for name in tiny.NATS:
            assert one["measures"].pop(name) == pytest.approx(other["measures"].pop(name), abs=CLOSE), name
        assert one == other
