"""The language-model loss on a corpus, through whole runs and through the objective. Promises:

1. its updates are those of plain cross-entropy, or the teacher's share of it, on the corpus's blocks (``corpus_twin``);
2. each update takes the next blocks of an order of its own, a function of seed and stage;
3. at coefficient 0 a corpus changes nothing, bit for bit, and the run says that it is not read;
4. prompts with responses as a corpus are the run's own anchor on other rows;
5. a run that is done is not done for another corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillm import distill
from minillm.cards import Card
from minillm.config import MinillmStage, RunConfig
from minillm.corpus import blocks_of
from minillm.errors import RunExists
from minillm.loading import inspect, load
from minillm.objectives import Minillm
from minillm.prompts import prepare
from minillm.ranks import Ranks
from minillm.records import Document, Row
from minillm.rows import read_corpus
from minillm.run_log import OF_THE_PROCESS
from minillm.student_engine import Student
from minillm.teacher_engine import Teacher
from minillm.types import Decoding, Examples, Ids, Prompt
from tests import tiny
from tests.corpus_twin import ALONE, EOS, OPTIMISER, REAL, CorpusTwin, Text, read_blocks, save_text

LENGTH, BATCH, SEED = 7, 4, 3
CLOSE, APART = 1e-5, 1e-3
RANKS = Ranks()
IDS = Ids(eos=(EOS,), pad=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("anchor")
    tiny.save_model(top / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(top / "student", "llama", seed=2, rows=30)
    tiny.save_prompts(top / "prompts.jsonl")
    tiny.save_prompts(top / "bare.jsonl", responses=False)
    save_text(top / "corpus.txt")
    return top


def config(folder: Path, out: Path, *, corpus: str | None, prompts: str = "prompts.jsonl", **changes: Any) -> RunConfig:
    data: dict[str, Any] = {"train": str(folder / prompts), "max_prompt_tokens": 8}
    if corpus is not None:
        data["corpus"] = corpus if ":" in corpus else str(folder / corpus)
        data["corpus_length"] = LENGTH if corpus.endswith(".txt") else None
    return tiny.minillm_config(
        out,
        teacher=folder / "teacher",
        student=folder / "student",
        prompts=folder / prompts,
        run_data=data,
        run_seed=SEED,
        **{"lm_batch": BATCH, "optimiser": OPTIMISER, **changes},
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in OF_THE_PROCESS} for line in tiny.logged(run)]


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight that both have."""
    return max(float((one[name] - other[name]).abs().max()) for name in one.keys() & other.keys())


def twin_of(folder: Path, share: float = 0.0) -> CorpusTwin:
    return CorpusTwin(
        folder / "student",
        folder / "teacher",
        blocks=read_blocks(folder / "corpus.txt", LENGTH),
        batch=BATCH,
        share=share,
    )


@pytest.mark.parametrize(
    ("share", "cut"), [(0.0, {}), (0.5, {}), (1.0, {}), (0.0, {"micro_batch": 1}), (0.5, {"micro_tokens": 15})]
)
def test_a_run_on_a_corpus_alone_is_plain_training_on_its_blocks(
    share: float, cut: dict[str, int], folder: Path, tmp_path: Path
) -> None:
    """Two rollouts, two passes over each: four updates, on 16 blocks: one is short, some are of a second epoch."""
    settings = config(
        folder, tmp_path, corpus="corpus.txt", **ALONE, inner_epochs=2, lm_teacher_share=share, teacher_mix=0.0, **cut
    )
    run = distill(settings)
    twin = twin_of(folder, share)
    assert len(twin.blocks) == 10 and len(twin.blocks[-1].ids) == 3 and twin.batch * 4 > 10
    steps = [twin.step(update, seed=SEED, purpose="minillm/corpus") for update in range(4)]
    for line, first, second in zip(lines(run), steps[::2], steps[1::2], strict=True):  # of both updates of a step
        (loss, norm), (later, after) = first, second
        assert line["lm_loss"] == pytest.approx((loss + later) / 2, rel=1e-5) == line["loss"]
        assert line["grad_norm"] == pytest.approx(max(norm, after), rel=1e-4)
    assert apart(weights(run), twin.weights()) < CLOSE
    assert weights(run).keys() <= twin.weights().keys()
    assert apart(weights(run), twin_of(folder).weights()) > APART, "the control: it has learnt something"


class Work:
    """An objective with a corpus, and its student; closed when the block ends."""

    def __init__(self, folder: Path, *, corpus: Examples | None, prompts: Sequence[Prompt], **changes: Any) -> None:
        self.stage = MinillmStage(**{"steps": 9, "prompts": 4, "lm_batch": BATCH, "optimiser": OPTIMISER, **changes})
        teacher, student = (Card(name=name, model=str(folder / name)) for name in ("teacher", "student"))
        guide = Teacher(
            lambda: load(teacher, inspect(teacher), seed=0), ranks=RANKS, placement="replicated", precision="fp32",
            real_ids=REAL,
        )  # fmt: skip
        self.objective = Minillm(
            self.stage, prompts=prompts, decoding=Decoding(max_new_tokens=8), teacher=guide, ids=IDS, ranks=RANKS,
            seed=SEED, corpus=corpus,
        )  # fmt: skip
        self.student = Student(
            lambda: load(student, inspect(student), seed=0), ranks=RANKS, settings="zero0", precision="fp32",
            optimiser=self.stage.optimiser, updates=9, real_ids=REAL,
        )  # fmt: skip

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        self.student._engine.destroy()

    def taken(self, steps: int) -> list[list[str]]:
        """Names of the rows of every update."""
        found: list[list[str]] = []

        def note(rows: Sequence[Any], *_: Any, **__: Any) -> Any:
            found.append([row.uid for row in rows])
            return [lambda: torch.zeros((), requires_grad=True)], None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("minillm.objectives.text_losses", note)
            for step in range(steps):
                collected, _ = self.objective.collect(step, self.student)
                with self.objective.learning(collected, self.student) as updates:
                    list(updates)
        return found


def examples(folder: Path) -> Examples:
    documents = [one for one in read_corpus(str(folder / "corpus.txt"))[0] if isinstance(one, Document)]
    blocks, _ = blocks_of(documents, tokenizer=tiny.tokenizer(), ends=IDS.eos, length=LENGTH, name="corpus")
    return blocks


def prompts_of(source: Path) -> list[Prompt]:
    rows = [one for one in read_corpus(str(source))[0] if isinstance(one, Row)]
    found, _ = prepare(
        rows, tokenizer=tiny.tokenizer(), template="plain", max_prompt_tokens=8, over_long="error",
        max_response_tokens=8, eos_id=EOS, need_response=True,
    )  # fmt: skip
    return found


def test_every_update_takes_the_next_blocks_of_a_shuffled_corpus(folder: Path) -> None:
    """In five updates of four every one of ten blocks comes twice, once in each epoch, and in another order."""
    blocks, prompts = examples(folder), prompts_of(folder / "prompts.jsonl")
    with Work(folder, corpus=blocks, prompts=prompts, lm_coefficient=1.0, inner_epochs=5) as work:
        taken = [uid for update in work.taken(1) for uid in update]
    with Work(folder, corpus=blocks, prompts=prompts, lm_coefficient=1.0, steps=5) as other:
        assert [uid for update in other.taken(5) for uid in update] == taken, "rollouts or passes, the stream is one"
    parted = {"inner_batches": 2, "lm_batch": 2, "inner_epochs": 5}
    with Work(folder, corpus=blocks, prompts=prompts, lm_coefficient=1.0, **parted) as other:
        assert [uid for update in other.taken(1) for uid in update] == taken
    everything = sorted(block.uid for block in blocks)
    assert len(taken) == 20 and sorted(taken[:10]) == sorted(taken[10:]) == everything
    assert taken[:10] != taken[10:] and taken[:10] != [block.uid for block in blocks]
    with Work(folder, corpus=blocks, prompts=prompts, lm_coefficient=1.0, inner_epochs=5, name="later") as other:
        assert [uid for update in other.taken(1) for uid in update] != taken, "each stage has its own order"


def test_without_a_corpus_the_passes_over_a_rollout_share_their_references(folder: Path) -> None:
    """As before there were corpora."""
    prompts = prompts_of(folder / "prompts.jsonl")
    with Work(folder, corpus=None, prompts=prompts, lm_coefficient=1.0, inner_epochs=2, inner_batches=2) as work:
        one, two, three, four = work.taken(1)
    assert (one, two) == (three, four) and not set(one) & set(two)


def test_prompts_with_responses_as_a_corpus_are_the_anchor_on_other_rows(folder: Path) -> None:
    """The loss is on the responses alone, and the run's own anchor's where the order takes the same rows."""
    prompts = prompts_of(folder / "prompts.jsonl")
    taken = []
    for corpus in (None, prompts):
        with Work(folder, corpus=corpus, prompts=prompts, **ALONE, lm_batch=len(prompts)) as work:
            collected, _ = work.objective.collect(0, work.student)
            with work.objective.learning(collected, work.student) as (update,):
                work.student.update(update.losses)
                taken.append((update.figures()["lm_loss"], work.student.state()))
    assert taken[0][0] == pytest.approx(taken[1][0], rel=1e-5)
    assert apart(taken[0][1], taken[1][1]) < CLOSE
    twin = twin_of(folder)
    learnt = [Text([*prompt.ids, *prompt.response_ids], read=len(prompt.ids)) for prompt in prompts]
    assert taken[1][0] == pytest.approx(float(twin.loss(learnt).detach()), rel=1e-5)
    every = [Text([*prompt.ids, *prompt.response_ids]) for prompt in prompts]
    assert abs(taken[1][0] - float(twin.loss(every).detach())) > APART, "the control: the prompts learnt too"


def test_a_coefficient_of_zero_is_bitwise_a_run_without_a_corpus(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {}
    for name, corpus, coefficient, batch in (
        ("none", None, 0.0, 0), ("zero", "corpus.txt", 0.0, BATCH), ("some", "corpus.txt", 0.5, BATCH)
    ):  # fmt: skip
        settings = config(folder, tmp_path / name, corpus=corpus, lm_coefficient=coefficient, lm_batch=batch, steps=3)
        capsys.readouterr()
        runs[name] = (distill(settings), capsys.readouterr().out)
    without, zero, some = (run for run, _ in runs.values())
    assert lines(without) == lines(zero) and len(lines(zero)) == 3
    one, other = weights(without), weights(zero)
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
    assert f"corpus: {folder / 'corpus.txt'} is not read; no stage has an lm_coefficient above 0" in runs["zero"][1]
    assert "corpus" not in runs["none"][1] and "not read" not in runs["some"][1]
    assert apart(one, weights(some)) > APART, "the control: with a coefficient it is read"


def test_a_run_says_what_it_read_and_its_card_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = distill(config(folder, tmp_path, corpus="corpus.txt", lm_coefficient=1.0, steps=1))
    words = "10 blocks of 7 tokens, the last of 3"
    assert f"\ncorpus: 10 documents read, 10 used; {words}\n" in capsys.readouterr().out
    made_from = json.loads((run / "run.json").read_text(encoding="utf-8"))["made_from"]
    card = (run / "student" / "README.md").read_text(encoding="utf-8")
    row = f"| language-model loss on | `{folder / 'corpus.txt'}`, {words}, sha256 `{made_from['corpus']}` |"
    assert row in card and "language-model anchor" in card and len(made_from["corpus"]) == 64


def test_with_a_corpus_the_prompts_need_no_responses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"prompts": "bare.jsonl", "lm_coefficient": 1.0, "steps": 1}
    distill(config(folder, tmp_path / "text", corpus="corpus.txt", **settings))
    distill(config(folder, tmp_path / "rows", corpus="prompts.jsonl", **settings))
    assert "corpus: 24 rows read, 24 used; 24 prompts with a response" in capsys.readouterr().out


def test_blocks_are_as_long_as_the_models_allow_where_nothing_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 66 tokens the first 48 are one block: the model has no more positions."""
    settings = config(folder, tmp_path, corpus="corpus.txt", lm_coefficient=1.0, steps=1, lm_batch=2)
    data = settings.data.model_copy(update={"corpus_length": None})
    distill(settings.model_copy(update={"data": data}))
    assert "2 blocks of 48 tokens, the last of 18" in capsys.readouterr().out


def test_a_run_that_is_done_is_not_done_for_another_corpus(folder: Path, tmp_path: Path) -> None:
    text = save_text(tmp_path / "own.txt")
    settings = config(tmp_path, tmp_path, corpus="own.txt", lm_coefficient=1.0, steps=1)
    settings = settings.model_copy(
        update={
            "student": str(folder / "student"),
            "teacher": str(folder / "teacher"),
            "data": settings.data.model_copy(update={"train": str(folder / "prompts.jsonl")}),
        }
    )
    run = distill(settings)
    before = (run / "metrics.jsonl").read_bytes()
    assert distill(settings) == run
    save_text(text, documents=9)
    with pytest.raises(RunExists, match="made from another corpus"):
        distill(settings)
    assert (run / "metrics.jsonl").read_bytes() == before
