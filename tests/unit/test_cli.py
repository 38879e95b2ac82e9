"""The command line for a hostile and clumsy user: what is wrong is told in a few lines, before a model is loaded.

1. Every mistake in the tables ends with exit code 2, its own type of error, what was got and what is wanted.
2. None of them reads weights, shows a traceback, or leaves something behind that blocks the next try.
3. ``minillm --help`` answers in under a second, with a purpose and an example for every command.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minillm import api, cli, hub
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 12
CONFIG = """
name: run
out: {place}/out
student: {place}/student
teacher: {place}/teacher
data: {{train: {place}/prompts.jsonl, test: {place}/prompts.jsonl, max_prompt_tokens: 8}}
decoding: {{max_new_tokens: 10}}
engine: {{student: zero0}}
evaluation: {{seeds: [1, 2], bootstrap: 20}}
stages:
  - {{kind: minillm, steps: 2, prompts: 8, optimiser: {{lr: 1e-2}}}}
"""
ANCHOR = ("stages.0.lm_coefficient=1", "stages.0.lm_batch=2")
SFT = "stages=[{kind: sft, steps: 1, batch: 4, validate_every: 1, optimiser: {lr: 1e-2}}]"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")


def without_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(folder: Path) -> None:
    weights = {name: value * float("nan") for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def half(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "pickled": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "no-config": lambda f: (f / "config.json").unlink(),
    "garbage-weights": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 5000),
    "cut-weights": lambda f: half(f / "model.safetensors"),
    "cut-config": lambda f: half(f / "config.json"),
    "list-config": lambda f: (f / "config.json").write_text("[1]"),
    "no-tokenizer": lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
    "cut-tokenizer": lambda f: half(f / "tokenizer.json"),
    "empty-tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
    "cut-generation": lambda f: half(f / "generation_config.json"),
    "vision": lambda f: (f / "config.json").write_text('{"model_type": "vit"}'),
    "wrong-type": lambda f: rewrite(f / "config.json", lambda c: {**c, "hidden_size": "many"}),
    "own-code": lambda f: rewrite(
        f / "config.json", lambda c: {**c, "model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}
    ),
    "absent-part": lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"w": "part-2"}}'),
    "no-weight": without_one_weight,
    "other-width": lambda f: rewrite(f / "config.json", lambda c: {**c, "hidden_size": 32}),
    "nan": with_nan,
}
FILES: dict[str, str | bytes] = {
    "empty.yaml": "",
    "binary.yaml": bytes(range(128, 256)),
    "list.yaml": "- a\n",
    "card-typo.yaml": "model: {place}/student\nplacment: zero3\n",
    "card-nowhere.yaml": "model: {place}/nowhere\n",
    "card-width.yaml": "build: {architecture: llama, tokenizer: world, config: {hiden_size: 16}}\n",
    "list.json": "[]",
    "broken.json": "{",
    "optimiser.json": '{"optimizer": {}}',
    "accumulate.json": '{"gradient_accumulation_steps": 4}',
    "stage.json": '{"zero_optimization": {"stage": 7}}',
    "typo.json": '{"zero_optimisation": {"stage": 2}}',
    "unseen.json": '{"zero_optimization": {"stage": 2, "compute_grad_norm": false}}',
    "offload.json": '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
    "malformed.jsonl": '{"prompt": "a"}\n{"prompt": "b",}\n',
    "number.jsonl": '{"prompt": 3}\n',
    "empty.jsonl": "",
    "blank.jsonl": '{"prompt": ""}\n',
    "unanswered.jsonl": '{"prompt": "a"}\n',
    "long.jsonl": '{"prompt": "a b c d e f g h i j k"}\n',
    "a-file": "x",
    "corpus.txt": "a b c d e\n\nf g h\n",
    "empty.txt": "\n\n",
    "ended.txt": f"a {tiny.EOS} b\n",
    "mixed.jsonl": '{"text": "a"}\n{"prompt": "a", "response": "b"}\n',
    "neither.jsonl": '{"response": "a"}\n',
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config that works, and with everything that the tables below get wrong."""
    top = tmp_path_factory.mktemp("cli")
    tiny.save_model(top / "teacher", "llama", seed=1)
    tiny.save_model(top / "student", "llama", seed=2)
    tiny.save_model(top / "other-ids", "llama", seed=2, words=[*tiny.WORDS[:5], "B", "A", *tiny.WORDS[7:]])
    tiny.save_model(top / "longer", "llama", seed=2, positions=64)
    tiny.save_prompts(top / "prompts.jsonl")
    (top / "good.yaml").write_text(CONFIG.format(place=top), encoding="utf-8")
    for name, content in FILES.items():
        raw = content if isinstance(content, bytes) else content.replace("{place}", str(top)).encode()
        (top / name).write_bytes(raw)
    for name, damage in DAMAGE.items():
        damage(Path(shutil.copytree(top / "student", top / name)))
    return top


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the command line in this process; ``{place}`` in an argument stands for the folder."""

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        words = [argument.replace("{place}", str(place)) for argument in arguments]
        code = cli._guarded(lambda **options: cli.app(words, **options))
        return Outcome(code, *capsys.readouterr())

    yield run
    shutil.rmtree(place / "out", ignore_errors=True)


class Loaded(BaseException):
    """Weights were read or made. No ``Exception``, so that nothing on the way can turn it into an error of its own."""


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", refuse)


def told(outcome: Outcome, *words: str) -> None:
    """The outcome is a mistake of the user's, told as one should be."""
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err + outcome.out
    assert 1 <= len(outcome.err.strip().splitlines()) <= MOST_LINES, outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


CONFIGS = {
    "missing.yaml": ("ConfigError", "No such file", "wanted a YAML file"),
    "teacher": ("ConfigError", "Is a directory", "wanted a YAML file"),
    "empty.yaml": ("ConfigError", "holds nothing", "wanted"),
    "binary.yaml": ("ConfigError", "binary.yaml:1:1", "not UTF-8"),
    "list.yaml": ("ConfigError", "no mapping", "wanted"),
    "student/config.json": ("ConfigError", "problems", "more; is this the right file?"),
}
DISTIL: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("sed=3",), ("ConfigError", "sed: no setting", "did you mean 'seed'?")),
    (("stages.0.stepz=3",), ("ConfigError", "stages.0.stepz", "did you mean 'steps'?")),
    (("stages.0.steps=many",), ("ConfigError", "got 'many', wanted a whole number")),
    (("decoding.temperature=-1",), ("ConfigError", "decoding.temperature: got -1, wanted a number above 0")),
    (("stages.0.teacher_mix=1.5",), ("ConfigError", "teacher_mix: got 1.5, wanted a number of at most 1")),
    (("stages.0.teacher_mix=-0.1",), ("ConfigError", "teacher_mix: got -0.1, wanted a number of at least 0")),
    (("stages.0.steps",), ("ConfigError", "wanted PATH=VALUE")),
    (("name=../x",), ("ConfigError", "name: got '../x'")),
    (("teacher=null",), ("UnsupportedCombination", "add 'teacher: NAME'")),
    # prompts
    (("data.train={place}/promts.jsonl",), ("DataError", "does not exist", "did you mean 'prompts.jsonl'?")),
    (("data.train={place}/malformed.jsonl",), ("DataError", "malformed.jsonl, line 2, column 16: not JSON")),
    (("data.train={place}/number.jsonl",), ("DataError", "line 1: field 'prompt' is a number, wanted text")),
    (("data.train={place}/empty.jsonl",), ("DataError", "is empty", "wanted one JSON object a line")),
    (("data.train={place}/blank.jsonl",), ("DataError", "0 used", "no prompt is left")),
    (("data.train={place}/long.jsonl",), ("DataError", "1 over-long prompt (> 8 tokens)", "data.over_long: drop")),
    (("data.test={place}/number.jsonl",), ("DataError", "number.jsonl, line 1")),
    (("data.train=hub:nobody/nothing@train",), ("DataError", "could not be loaded", "check name, split and network")),
    ((SFT, "data.validation={place}/unanswered.jsonl"), ("DataError", "no validation row has a response")),
    # corpus
    ((*ANCHOR, "data.corpus={place}/corpsu.txt"), ("DataError", "does not exist", "did you mean 'corpus.txt'?")),
    ((*ANCHOR, "data.corpus={place}/corpus.csv"), ("ConfigError", "data.corpus: got", ".jsonl.gz, .parquet, .txt")),
    ((*ANCHOR, "data.corpus=world:tran"), ("ConfigError", "data.corpus: got", "did you mean 'train'?")),
    ((*ANCHOR, "data.corpus={place}/empty.txt"), ("DataError", "empty.txt is empty", "lines of text")),
    ((*ANCHOR, "data.corpus={place}/ended.txt"), ("DataError", "1 document with an end token inside", "no document")),
    ((*ANCHOR, "data.corpus={place}/mixed.jsonl"), ("DataError", "1 document ('mixed-1'", "1 row with a prompt")),
    ((*ANCHOR, "data.corpus={place}/neither.jsonl"), ("DataError", "line 1: neither text nor prompt", "'response'")),
    (
        (*ANCHOR, "data.corpus={place}/unanswered.jsonl"),
        ("DataError", "dropped 1 prompt without a response", "no prompt"),
    ),
    (
        (*ANCHOR, "data.corpus={place}/corpus.txt"),
        ("DataError", "1 block of 10 tokens", "an update of stage minillm takes 2 (lm_batch)", "data.corpus_length"),
    ),
    (
        (*ANCHOR, "data.corpus={place}/corpus.txt", "data.corpus_length=49"),
        ("PositionsExceeded", "student", "a block of the corpus may be 49 tokens", "lower data.corpus_length by 1"),
    ),
    (
        (
            *ANCHOR,
            "student={place}/longer",
            "data.corpus={place}/corpus.txt",
            "data.corpus_length=49",
            "stages.0.lm_teacher_share=0.5",
        ),
        ("PositionsExceeded", "teacher teacher has 48 positions", "lower data.corpus_length by 1"),
    ),
    (
        (*ANCHOR, "data.corpus={place}/prompts.jsonl", "data.corpus_length=8"),
        ("UnsupportedCombination", "which holds prompts with responses", "nothing is cut"),
    ),
    ((*ANCHOR, "data.corpus_length=8"), ("UnsupportedCombination", "corpus_length 8 without a corpus", "add corpus")),
    (
        (*ANCHOR, "data.corpus={place}/corpus.txt", "data.corpus_length=1"),
        ("ConfigError", "corpus_length 1: wanted at least 2"),
    ),
    # names
    (("student=gpt3",), ("ConfigError", "'gpt3': no model folder", "did you mean 'gpt2'?")),
    (("teacher=teachers/micro-wrld",), ("ConfigError", "did you mean 'micro-world'?")),
    (("teacher=students/micro-world-16x1",), ("ModelError", "random weights", "give a card with 'model'")),
    (("student=owner/model",), ("ModelError", "owner/model: transformers cannot load it", "reachable hub name")),
    (("student={place}/card-typo.yaml",), ("ConfigError", "placment", "did you mean 'placement'?")),
    (
        ("student={place}/card-nowhere.yaml",),
        ("ModelError", "nowhere: there is no such folder", "the card card-nowhere names it", "mend the path"),
    ),
    (("student={place}/card-width.yaml",), ("ModelError", "no field 'hiden_size'", "did you mean 'hidden_size'?")),
    # model folders
    (("student={place}/no-config",), ("ConfigError", "a folder without config.json")),
    (("student={place}/pickled",), ("ModelError", "only pickled weights (pytorch_model.bin)", "wanted *.safetensors")),
    (("teacher={place}/pickled",), ("ModelError", "only pickled weights")),
    (("student={place}/garbage-weights",), ("ModelError", "not a whole safetensors file", "fetch or write it again")),
    (("teacher={place}/cut-weights",), ("ModelError", "cut-weights/model.safetensors: not a whole safetensors file")),
    (("student={place}/absent-part",), ("ModelError", "names part-2, not there")),
    (("student={place}/cut-config",), ("ModelError", "config.json, line", "column", "not JSON")),
    (("student={place}/list-config",), ("ModelError", "holds a list, wanted a JSON object")),
    (("student={place}/wrong-type",), ("ModelError", "hidden_size", "expected int, got str")),
    (("student={place}/vision",), ("ModelError", "'vit' is not a causal language model", "wanted")),
    (("student={place}/own-code",), ("ModelError", "Python code of its own")),
    (("student={place}/no-tokenizer",), ("ModelError", "no-tokenizer: transformers cannot load it")),
    (("student={place}/cut-tokenizer",), ("ModelError", "tokenizer.json, line", "not JSON")),
    (("student={place}/empty-tokenizer",), ("ModelError", "empty-tokenizer: transformers cannot load it")),
    (("student={place}/cut-generation",), ("ModelError", "generation_config.json, line", "not JSON")),
    # pairs
    (
        ("student={place}/other-ids",),
        ("VocabularyMismatch", "2 of 28 token ids", "id 5 is 'd' for the teacher and 'B' for the student", "id 6 is"),
    ),
    (("decoding.max_new_tokens=41",), ("PositionsExceeded", "student", "48 positions", "may be 49", "by 1 in all")),
    (
        ("student={place}/longer", "decoding.max_new_tokens=41"),
        ("PositionsExceeded", "teacher teacher has 48 positions", "may be 49"),
    ),
    (
        ("decoding.repetition_penalty=1.2",),
        ("UnsupportedCombination", "not be the one that sampled", "'minillm evaluate'", "no_repeat_ngram_size"),
    ),
    # engine files
    (("engine.student=zero9",), ("ConfigError", "'zero9': no such .json file", "did you mean 'zero")),
    (("engine.student={place}/nowhere.json",), ("ConfigError", "no such .json file")),
    (("engine.student={place}/broken.json",), ("ConfigError", "broken.json: not JSON")),
    (("engine.student={place}/list.json",), ("ConfigError", "holds a list; wanted a JSON object")),
    (("engine.student={place}/optimiser.json",), ("ConfigError", "optimizer is decided by the run's configuration")),
    (("engine.student={place}/accumulate.json",), ("ConfigError", "gradient_accumulation_steps is decided by")),
    (("engine.student={place}/stage.json",), ("ConfigError", "zero_optimization.stage: got 7")),
    (("engine.student={place}/typo.json",), ("ConfigError", "did you mean 'zero_optimization'?")),
    (("engine.student={place}/unseen.json",), ("UnsupportedCombination", "compute_grad_norm", "stepped on")),
    (("engine.student=zero2", "engine.gather=forward"), ("UnsupportedCombination", "nothing is gathered")),
    (
        ("engine.student=zero3", "engine.gather=forward", "evaluation.calibration=true"),
        ("UnsupportedCombination", "evaluation.calibration: false"),
    ),
    (("engine.student={place}/offload.json",), ("UnsupportedCombination", "offload_param", "ZeRO stage 2")),
    # places
    (("out={place}/a-file",), ("ConfigError", "a-file/run' cannot be used as a folder", "change out or name")),
    (('out="a\\0b"',), ("ConfigError", "null byte", "change out or name")),
]


@pytest.mark.parametrize(("config", "words"), CONFIGS.items())
def test_a_file_that_is_no_configuration_is_told(
    config: str, words: tuple[str, ...], run: Run, no_weights: None
) -> None:
    told(run("distill", "--config", f"{{place}}/{config}"), *words)


@pytest.mark.parametrize(("changes", "words"), DISTIL, ids=[" ".join(changes) for changes, _ in DISTIL])
def test_bad_input_is_told_before_a_model_is_loaded_and_leaves_nothing(
    changes: tuple[str, ...], words: tuple[str, ...], run: Run, no_weights: None, place: Path
) -> None:
    told(run("distill", "--config", "{place}/good.yaml", *changes), *words)
    assert not (place / "out").exists()


def test_the_same_configuration_unspoilt_goes_on_to_load_a_model(run: Run, no_weights: None) -> None:
    """Negative control of the table above: the guard is there and is reached."""
    with pytest.raises(Loaded):
        run("distill", "--config", "{place}/good.yaml")
    with pytest.raises(Loaded):
        corpus = ("data.corpus={place}/corpus.txt", "data.corpus_length=5")
        run("distill", "--config", "{place}/good.yaml", *ANCHOR, *corpus)
    with pytest.raises(Loaded):  # a teacher that does not read the blocks may have fewer positions
        run(
            "distill",
            "--config",
            "{place}/good.yaml",
            *ANCHOR,
            "student={place}/longer",
            "stages.0.lm_batch=1",
            "data.corpus={place}/corpus.txt",
            "data.corpus_length=49",
        )


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ("no-weight", ("1 of the weights of a LlamaForCausalLM are not in its files: model.norm.weight",)),
        ("other-width", ("do not fit config.json", "is [28, 16], wanted [28, 32]")),
        ("nan", ("logits that are not finite numbers",)),
    ],
)
def test_weights_that_are_not_the_models_are_told_and_do_not_block_the_next_try(
    student: str, words: tuple[str, ...], run: Run, place: Path
) -> None:
    """They can only be seen when they are read; the run folder is made by then, but nothing in it is worth keeping."""
    told(run("distill", "--config", "{place}/good.yaml", f"student={{place}}/{student}"), "ModelError", *words)
    assert (place / "out" / "run" / "config.yaml").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "load_teacher", lambda *_, **__: (_ for _ in ()).throw(Loaded()))
        with pytest.raises(Loaded):  # the mended configuration, with no --fresh, gets as far as any
            run("distill", "--config", "{place}/good.yaml")


@pytest.mark.parametrize("rest", ["metrics.jsonl", "samples.jsonl", "student/config.json"])
def test_a_folder_with_another_runs_work_is_refused_until_fresh(
    rest: str, run: Run, no_weights: None, place: Path
) -> None:
    folder = place / "out" / "run"
    (folder / rest).parent.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: another\n")
    (folder / rest).write_text("{}\n")
    refused = run("distill", "--config", "{place}/good.yaml")
    told(refused, "RunExists", "another configuration; nothing was touched", "name=NAME", "--fresh")
    assert (folder / rest).exists() and (folder / "config.yaml").read_text() == "name: another\n"
    with pytest.raises(Loaded):
        run("distill", "--config", "{place}/good.yaml", "--fresh")
    assert not (folder / rest).exists()


def test_sft_refuses_a_stage_that_is_something_else(run: Run, no_weights: None) -> None:
    told(run("sft", "--config", "{place}/good.yaml"), "ConfigError", "not sft", "minillm distill --config")


EVALUATE: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("nomodel", (), ("ConfigError", "'nomodel': no model folder")),
    ("{place}/pickled", (), ("ModelError", "only pickled weights")),
    ("{place}/cut-weights", (), ("ModelError", "not a whole safetensors file")),
    ("{place}/other-ids", (), ("VocabularyMismatch", "id 5 is")),
    ("{place}/student", ("data.test=null",), ("DataError", "data.test is missing")),
    ("{place}/student", ("--out", "{place}/a-file"), ("ConfigError", "a-file' cannot be used as a folder", "--out")),
]


@pytest.mark.parametrize(("model", "more", "words"), EVALUATE)
def test_bad_input_to_evaluate_is_told_before_a_model_is_loaded(  # noqa: PLR0917 (pytest fills them by name)
    model: str, more: tuple[str, ...], words: tuple[str, ...], run: Run, no_weights: None, place: Path
) -> None:
    told(run("evaluate", model, "--config", "{place}/good.yaml", "--out", "{place}/out/e", *more), *words)
    assert not (place / "out").exists()


@pytest.fixture
def evaluated(run: Run, place: Path) -> Path:
    folder = place / "out" / "e"
    assert run("evaluate", "{place}/student", "--config", "{place}/good.yaml", "--out", str(folder)).code == 0
    return folder


def test_results_that_are_there_are_kept_and_others_are_refused(run: Run, evaluated: Path) -> None:
    before = (evaluated / "results.json").read_bytes()
    arguments = ("--config", "{place}/good.yaml", "--out", str(evaluated))
    again = run("evaluate", "{place}/student", *arguments)
    assert again.code == 0 and "evaluated already" in again.out
    told(run("evaluate", "{place}/teacher", *arguments), "DataError", "differ in: model", "--fresh")
    told(run("evaluate", "{place}/student", *arguments, "seed=3"), "DataError", "differ in: seed", "another --out")
    assert (evaluated / "results.json").read_bytes() == before
    for broken in ("{", "[1]", '{"model": 3}'):
        (evaluated / "results.json").write_text(broken)
        told(run("evaluate", "{place}/student", *arguments), "DataError", "results.json", "--fresh")
    assert run("evaluate", "{place}/student", *arguments, "--fresh").code == 0


def test_a_penalty_is_refused_in_training_alone(run: Run, evaluated: Path, place: Path) -> None:
    """An evaluation draws under it, says that it has no reverse KL then, and has none; sft stages train beside it."""
    folder, penalty = place / "out" / "penalised", "decoding.repetition_penalty=4.0"
    plain = json.loads((evaluated / "results.json").read_text(encoding="utf-8"))
    done = run("evaluate", "{place}/student", "--config", "{place}/good.yaml", "--out", str(folder), penalty)
    assert done.code == 0 and "no reverse KL" in done.out
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    of_teacher = {"reverse_kl", "reverse_kl_per_token", "forward_kl", "teacher_nll"}
    assert set(plain["measures"]) - set(results["measures"]) == of_teacher
    assert results["measures"]["repetition_3"]["mean"] < plain["measures"]["repetition_3"]["mean"]
    assert (
        run("distill", "--config", "{place}/good.yaml", SFT, "data.validation={place}/prompts.jsonl", penalty).code == 0
    )


REPORT: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("=e",), ("ConfigError", "'=e': wanted FOLDER or NAME=FOLDER")),
    (("e={place}/nowhere",), ("DataError", "nowhere is not there; wanted the folder of an evaluation")),
    (("e={place}/a-file",), ("DataError", "a-file is a file; wanted the folder of an evaluation")),
    (("e={place}/student",), ("DataError", "results.json: no such file", "minillm evaluate")),
    (("e={e}", "e={e}"), ("ConfigError", "given twice")),
    (("e={e}", "--difference", "e"), ("ConfigError", "--difference 'e': wanted two names")),
    (("e={e}", "--difference", "e,z"), ("ConfigError", "no such model among e")),
    (("e={e}", "f={f}", "--difference", "e,f"), ("DataError", "top_k is", "wanted the same")),
    (("e={e}", "--training", "e={place}/student"), ("DataError", "metrics.jsonl: no such file")),
    (("e={e}", "--out", "{place}/a-file"), ("ConfigError", "a-file' cannot be used as a folder")),
    (("g={g}", "e={e}", "--difference", "g,e"), ("DataError", "samples.jsonl, row 1: no 'seed'")),
]


def test_bad_input_to_report_is_told_and_writes_nothing(run: Run, evaluated: Path, place: Path) -> None:
    other, broken = place / "out" / "f", place / "out" / "g"
    for folder in (other, broken):
        shutil.copytree(evaluated, folder)
    rewrite(other / "results.json", lambda found: {**found, "decoding": {**found["decoding"], "top_k": 7}})
    (broken / "samples.jsonl").write_text('{"uid": "1"}\n')
    names = {"{e}": str(evaluated), "{f}": str(other), "{g}": str(broken)}
    for arguments, words in REPORT:
        filled = [argument[:2] + names.get(argument[2:], argument[2:]) for argument in arguments]
        told(run("report", "--out", "{place}/out/report", *filled), *words)
        assert not list(place.glob("out/report/*"))
    assert run("report", "--out", "{place}/out/report", f"e={evaluated}").code == 0  # the control


def test_world_does_not_overwrite_what_is_there(run: Run, place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "test.jsonl").write_text("mine\n")
    told(run("world", "--out", "{place}/out"), "DataError", "exists already", "--fresh")
    told(run("world", "--out", "{place}/a-file"), "ConfigError", "cannot be used as a folder")
    assert (place / "out" / "test.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "Usage: "),
        (("distil",), "Did you mean 'distill'?"),
        (("distill", "--confg", "x"), "Possible options: --config"),
        (("distill",), "Missing option '--config'"),
        (("evaluate", "--config", "x", "--out", "y"), "Missing argument 'MODEL'"),
        (("report", "--out", "y"), "Missing argument '[NAME=]FOLDER"),
        (("world",), "Missing option '--out'"),
    ],
)
def test_a_wrong_command_line_is_told_with_what_is_near(arguments: tuple[str, ...], word: str, run: Run) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2 and word in outcome.err + outcome.out and "Traceback" not in outcome.err


def test_an_interruption_ends_with_130_and_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(api, "read_splits", interrupted)  # before there is anything to save
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    outcome = run("distill", "--config", "{place}/good.yaml")
    signal.signal(signal.SIGINT, before)
    assert outcome.code == 130 and outcome.err.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in outcome.err


def test_an_error_of_ours_is_not_dressed_up_as_the_users(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        assert not "an invariant"

    monkeypatch.setattr(api, "distill", wrong)
    with pytest.raises(AssertionError, match="an invariant"):
        run("distill", "--config", "{place}/good.yaml")


def test_rank_0_tells_an_error_at_once_and_the_others_wait_for_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher ends all ranks as soon as one has ended: on another rank's haste, the message would be lost."""
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "0")
    told(run("distill", "--config", "{place}/missing.yaml"), "ConfigError")
    assert waited == []
    monkeypatch.setenv("RANK", "1")
    told(run("distill", "--config", "{place}/missing.yaml"), "rank 1: ConfigError", "wanted a YAML file")
    assert waited == [cli.FIRST_RANK_SPEAKS_S]


def test_a_hub_that_does_not_answer_is_asked_once(run: Run, monkeypatch: pytest.MonkeyPatch, no_weights: None) -> None:
    """Its libraries would ask each file six times, for most of a minute; a busy machine takes a few seconds."""
    asked: list[bool] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answers", lambda: bool(asked.append(True)))
    start = time.monotonic()
    told(run("distill", "--config", "{place}/good.yaml", "student=owner/model"), "ModelError", "owner/model")
    assert len(asked) == 1 and time.monotonic() - start < 10
    assert constants.HF_HUB_OFFLINE is False, "only for as long as it was asked"


def test_an_unreachable_hub_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub._answers() is False


def commands() -> list[str]:
    return list(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def minillm_help() -> tuple[str, float]:
    start = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-m", "minillm", "--help"],
        capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    return shown.stdout, time.monotonic() - start


def test_help_answers_in_under_a_second_with_a_purpose_and_an_example_for_every_command() -> None:
    for _ in range(10):  # other processes may hold the machine for a while
        text, seconds = minillm_help()
        if seconds < 1.0:
            break
    assert seconds < 1.0
    assert {"sft", "distill", "evaluate", "report", "world"} <= set(commands())
    for name in commands():
        lines = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
        assert len(lines) == 1 and lines[0].endswith(".") and not lines[0].endswith("..."), lines
        assert f"  minillm {name} " in text


def test_the_version_is_that_of_the_package(run: Run) -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out) == (0, f"minillm {importlib.metadata.version('minillm')}\n")


def test_a_purpose_that_is_too_long_would_be_cut() -> None:
    """Negative control: what the check above looks for is what typer writes."""
    app = typer.Typer(rich_markup_mode=None)
    app.command(help="A purpose " * 20)(lambda: None)
    app.command("other")(lambda: None)
    group = typer.main.get_command(app)
    assert "..." in group.get_help(group.make_context("x", [], resilient_parsing=True))


def examples() -> list[list[str]]:
    """Every example of a command in the help texts, as words after ``minillm``."""
    group: Any = typer.main.get_command(cli.app)
    texts = [cli.EXAMPLES, *(command.help for command in group.commands.values())]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line.strip().startswith(("minillm ", "deepspeed "))]
    return [line[line.index("minillm") + 1 :] for line in words if "COMMAND" not in line]


@pytest.mark.parametrize("words", examples(), ids=" ".join)
def test_every_example_is_a_command_line_that_is_understood(words: list[str]) -> None:
    group: Any = typer.main.get_command(cli.app)
    context = group.commands[words[0]].make_context(words[0], words[1:])
    config = context.params.get("config")
    assert config is None or (ROOT / str(config)).is_file()


def test_the_examples_are_found() -> None:
    """So that the test above cannot pass by finding none."""
    assert len(examples()) >= 10 and {words[0] for words in examples()} == set(commands())
