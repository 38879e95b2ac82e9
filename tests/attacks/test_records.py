"""Records that we write, as somebody else may write them: nested without end, with numbers without end, of other kinds.

Each is refused with its file, or read without harm; none ends in a traceback.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm import manifests, report_files
from minillm.compare.command import compare
from minillm.errors import CacheError, MinillmError
from minillm.judge.samples import read_sides
from minillm.manifests import sha256_of
from minillm.report import build_report
from minillm.teacher_cache import IDS, LOGP, ROWS, read_cache
from tests.attacks.hostile import Place, Run, change, quiet, refused

DEEP = {"lists": "[" * 100_000, "objects": '{"a":' * 100_000, "in a list": '{"a": ' + "[" * 100_000}
NOT_JSON = {
    **DEEP,
    "a number of 5,000 digits": '{"schema": ' + "9" * 5000 + "}",
    "a number beyond all": '{"schema": 1, "measures": {}, "bootstrap": ' + "9" * 400 + "}",
    "a list": "[1]",
    "text": '"x"',
    "NaN": "NaN",
    "nothing": "",
    "no UTF-8": b"\xff\xfe{}",
    "NUL": "\0",
}
STRANGE: list[Any] = ["x\x1b[31m", [[1]]]


def write(file: Path, content: str | bytes) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


FILES: dict[str, tuple[str, Callable[[Place], tuple[object, ...]], str]] = {
    "config": ("student/config.json", lambda place: ("distill", "--config", place.config), "ModelError"),
    "tokenizer's settings": (
        "student/tokenizer_config.json",
        lambda place: ("distill", "--config", place.config),
        "ModelError",
    ),
    "tokenizer": ("student/tokenizer.json", lambda place: ("distill", "--config", place.config), "ModelError"),
    "generation": ("student/generation_config.json", lambda place: ("distill", "--config", place.config), "ModelError"),
    "index": (
        "student/model.safetensors.index.json",
        lambda place: ("distill", "--config", place.config),
        "ModelError",
    ),
    "engine": (
        "engine.json",
        lambda place: ("distill", "--config", place.config, f"engine.student={place.top / 'engine.json'}"),
        "ConfigError",
    ),
    "results": ("e/results.json", lambda place: ("report", place.top / "e", "--out", place.top / "r"), "DataError"),
    "results, judged": (
        "e/results.json",
        lambda place: ("judge", place.top / "e", "--url", "http://localhost:9/v1", "--model", "m", "--single"),
        "DataError",
    ),
    "samples": ("e/samples.jsonl", lambda place: ("compare", place.top / "e", f"b={place.top / 'e'}"), "DataError"),
    "results, evaluated again": (
        "e/results.json",
        lambda place: ("evaluate", place.student, "--config", place.config, "--out", place.top / "e"),
        "DataError",
    ),
    "a judging": (
        "j/judge.json",
        lambda place: (
            *("judge", place.top / "e", "--single", "--url", "http://localhost:9/v1"),
            *("--model", "m", "--out", place.top / "j"),
        ),
        "DataError",
    ),
    "manifest of text": (
        "g.jsonl.manifest.json",
        lambda place: ("generate", place.student, "--config", place.config, "--out", place.top / "g.jsonl"),
        "ManifestError",
    ),
    "manifest of pairs": (
        "g.jsonl.manifest.json",
        lambda place: (
            *("pairs", "--config", place.config, "--out", place.top / "g.jsonl"),
            *("--teacher", place.student, "--student", place.student),
        ),
        "ManifestError",
    ),
    "answers so far": (
        "new.jsonl.partial",
        lambda place: ("generate", place.student, "--config", place.config, "--out", place.top / "new.jsonl"),
        "DataError",
    ),
}


UNSAID = {("samples", "nothing"), ("samples", "a number beyond all"), ("generation", "a number beyond all")}
"""An empty file of rows is told in other words, and these numbers nobody reads."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest evaluation of six rows, written by hand."""
    from tests.unit.test_report import evaluation, metrics

    top = tmp_path_factory.mktemp("records")
    for name, skill in (("a", 0.5), ("b", 0.7)):
        evaluation(top / name, skill=skill, prompts=3, seeds=(10,))
    (top / "t").mkdir()
    metrics(top / "t" / "metrics.jsonl", stage="s", steps=4)
    return top


@pytest.mark.parametrize("file", FILES)
def test_what_is_no_record_is_refused_with_its_file(file: str, place: Place, results: Path, run: Run) -> None:
    name, arguments, kind = FILES[file]
    shutil.copytree(results / "a", place.top / "e")
    for folder in ("j", "out"):
        (place.top / folder).mkdir()
    (place.top / "g.jsonl").write_text("")
    taken = NOT_JSON if "tokenizer" not in file else DEEP
    for what, content in taken.items():
        write(place.top / name, content)
        if (file, what) in UNSAID:
            continue
        outcome = run(*arguments(place))
        refused(outcome, kind, name.rpartition("/")[2].partition(".partial")[0])


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a record; of a list its first entry."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return value


def commands(top: Path, out: Path) -> dict[str, Callable[[], object]]:
    named = {"a": top / "a", "b": top / "b"}
    return {
        "report": lambda: build_report(
            named, training={"t": top / "t"}, differences=[("a", "b")], out=out / "r", title="", resamples=2
        ),
        "compare": lambda: compare(named, quiet=True),
        "judge": lambda: read_sides([*named.values()], seed=None, temperature=None),
    }


def spoilt(results: Path, top: Path, file: str, *, by: tuple[str, ...], strange: list[Any]) -> tuple[int, list[str]]:
    """(Cases, those that end in something else than an error of ours): places of a record × strange values."""
    shutil.copytree(results, top, dirs_exist_ok=True)
    first, *rest = (top / file).read_text().split("\n") if file.endswith("l") else [(top / file).read_text()]
    record, cases, wrong = json.loads(first), 0, list[str]()
    for at in places(record):
        # Of the measures one stands for all; what was done is told and not reckoned with.
        if (len(at) > 1 and at[0] not in ("temperatures", "measures")) or (len(at) > 2 and "rouge_l" not in at):
            continue
        for value in strange:
            (top / file).write_text("\n".join([json.dumps(replaced(record, at, value)), *rest]))
            for name in by:
                cases += 1
                try:
                    commands(top, top / "made")[name]()
                except MinillmError:
                    pass
                except Exception as error:
                    wrong.append(f"{name}: {file} {at} = {str(value)[:20]}: {error!r}")
    return cases, wrong


SPOILT = {"b/results.json": ("report",), "b/samples.jsonl": ("compare", "judge"), "t/metrics.jsonl": ("report",)}


@pytest.mark.parametrize("file", SPOILT)
def test_no_value_of_another_kind_ends_in_a_traceback(
    file: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, wrong = spoilt(results, tmp_path, file, by=SPOILT[file], strange=STRANGE)
    capsys.readouterr()
    print(f"{cases} cases")
    assert cases >= 14 and wrong == []


def test_control_a_reader_that_trusts_them_does_end_in_one(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_files, "_strange", lambda found: iter(()))
    monkeypatch.setattr(report_files, "_is_number", lambda value: True)
    assert len(spoilt(results, tmp_path / "1", "b/results.json", by=("report",), strange=["x"])[1]) > 2
    monkeypatch.setattr(report_files, "parsed", json.loads)
    write(tmp_path / "1" / "b" / "results.json", DEEP["lists"])
    with pytest.raises(RecursionError):
        report_files.read_results(tmp_path / "1" / "b")


@pytest.mark.parametrize("text", [*DEEP.values(), "9" * 5000, "1" * 301, "\xff", "{", ""])
def test_every_failure_of_the_reader_is_one_kind(text: str) -> None:
    with pytest.raises(ValueError):
        manifests.parsed(text)
    assert manifests.parsed("1" * 300) == int("1" * 300)


CACHES: dict[str, Callable[[Path], None]] = {
    "an array of other numbers": lambda f: np.save(f / IDS, np.load(f / IDS).astype(np.int64)),
    "an array of text": lambda f: np.save(f / IDS, np.load(f / IDS).astype(str)),
    "one dimension": lambda f: np.save(f / LOGP, np.load(f / LOGP).ravel()),
    "a column less": lambda f: np.save(f / LOGP, np.load(f / LOGP)[:, 1:]),
    "a row less": lambda f: np.save(f / IDS, np.load(f / IDS)[1:]),
    "an id beyond the vocabulary": lambda f: np.save(f / IDS, np.full_like(np.load(f / IDS), 255)),
    "no array": lambda f: write(f / IDS, b"\x93NUMPY\x01\x00\x10\x00{'descr': __import__('os').system('x')}"),
    "half an array": lambda f: write(f / LOGP, (f / LOGP).read_bytes()[:200]),
    "a zip": lambda f: np.savez(f / "x.npz", a=np.zeros(3)) or shutil.move(f / "x.npz", f / IDS),  # type: ignore[func-returns-value]
    "a row beyond the end": lambda f: rows(f, start=10**6),
    "a row before the start": lambda f: rows(f, start=-5),
    "a row of half a token": lambda f: rows(f, tokens=1.5),
    "a row of no token": lambda f: rows(f, tokens=0),
    "a row of text": lambda f: rows(f, start="0"),
    "a row that is true": lambda f: rows(f, start=True),
    "an id that is a list": lambda f: rows(f, uid=[1]),
    "two rows of one id": lambda f: rows(f, uid="row-1"),
    "rows without end": lambda f: write(f / ROWS, DEEP["lists"]),
    "a row that is a list": lambda f: write(f / ROWS, "[1]\n"),
    "rows in other bytes": lambda f: write(f / ROWS, b"\xff\xfe\n"),
}


def rows(folder: Path, **values: Any) -> None:
    """Changes the first row of a cache."""
    first, *rest = (folder / ROWS).read_text().splitlines()
    write(folder / ROWS, "\n".join([json.dumps({**json.loads(first), **values}), *rest]) + "\n")


def test_a_teacher_cache_whose_hashes_fit_and_whose_content_does_not_is_refused(place: Place, run: Run) -> None:
    honest = place.top / "cached"
    arguments = ("--config", place.config, "--out", honest, "--top-k", 2, "decoding.max_new_tokens=10")
    assert run("cache", place.top / "teacher", *arguments).code == 0
    for what, spoil in CACHES.items():
        folder = Path(shutil.copytree(honest, place.top / what))
        spoil(folder)
        sums = {name: sha256_of(folder / name) for name in (IDS, LOGP, ROWS)}
        change(folder / "manifest.json", sha256=sums)
        with pytest.raises(CacheError, match="not what 'minillm cache' writes"):
            read_cache(folder)
    change(honest / "manifest.json", sha256={name: sha256_of(honest / name) for name in (IDS, LOGP, ROWS)})
    read_cache(honest)  # the control: it is the content that is refused


VALUES: list[tuple[str, dict[str, Any]]] = [
    *(("generation_config.json", {"eos_token_id": value}) for value in ([[1]], {"a": 1}, 1.5, True, "1", 10**30, -1)),
    *(("config.json", {"max_position_embeddings": value}) for value in ("many", -1, 0, [1])),
    *(("config.json", {"vocab_size": value}) for value in ("x", -5, 0, None, 10**12)),
    *(("config.json", {"model_type": value}) for value in (["llama"], {}, "../x", 3, "rag", "encoder-decoder")),
    *(("config.json", {"quantization_config": value}) for value in ("x", [], {"quant_method": "torchao"})),
    *(("config.json", {"hidden_size": value}) for value in (0, -16, 10**4, "16", None)),
    ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
    ("tokenizer_config.json", {"chat_template": [1]}),
    ("tokenizer_config.json", {"eos_token": ["a"]}),
]


@pytest.mark.parametrize(("file", "values"), VALUES, ids=[f"{name} {values}"[:70] for name, values in VALUES])
def test_a_value_of_another_kind_in_a_model_folder_is_refused(
    file: str, values: dict[str, Any], place: Place, run: Run
) -> None:
    change(place.student / file, **values)
    outcome = run("distill", "--config", place.config)
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    assert outcome.err.startswith(("ModelError: ", "PositionsExceeded: ", "VocabularyMismatch: ")), outcome.err
    quiet(outcome)
