"""Promises: several test sets are each what they are alone; their folders are reported and compared; mistakes are told
first."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from minillm import api, distill, measures, released
from minillm.compare.command import compare
from minillm.compare.summary import Options
from minillm.config import RunConfig, dump_config, load_config
from minillm.errors import ConfigError, DataError
from minillm.length_buckets import by_length
from minillm.records import parse_record
from minillm.report import build_report
from minillm.rows import read_rows
from tests import tiny
from tests.quick import undrawn

DATA = Path(os.environ.get("MINILLM_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
RELEASED = {
    "dolly": ("dolly/valid.jsonl.gz", 500),
    "self-inst": ("self_instruct/user_oriented.jsonl.gz", 252),
    "sinst": ("sni/eval.jsonl.gz", 1263),
}
SMALL = Options(resamples=100)


def save_rows(file: Path, *, offset: int, rows: int = 6, references: bool = True, prefix: str = "row") -> Path:
    """Prompts of a few letters whose references are 1, 6 and 11 words long in turn."""
    lines = []
    for number in range(rows):
        letters = [tiny.LETTERS[(number * 7 + step * 3 + offset) % 26] for step in range(2 + number % 3)]
        row: dict[str, Any] = {"id": f"{prefix}-{number}", "prompt": " ".join(letters)}
        if references:
            row["response"] = [" ".join(["a", *"bcdefghijkl"[: 5 * (number % 3)]]), "z"]
        lines.append(json.dumps(row))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    tiny.save_model(root / "teacher", "llama", seed=1)
    tiny.save_model(root / "student", "llama", seed=2)
    tiny.save_model(root / "other", "llama", seed=3)
    tiny.save_prompts(root / "train.jsonl")
    save_rows(root / "one.jsonl", offset=0)
    save_rows(root / "two.jsonl", offset=5, rows=5)  # with ids that "one" has, too
    save_rows(root / "bare.jsonl", offset=9, references=False, prefix="bare")
    return root


def config_of(folders: Path, test: Any, *, student: str = "student", **evaluation: Any) -> RunConfig:
    files = test if isinstance(test, dict) else {"": test}
    paths = {name: str(folders / file) for name, file in files.items()}
    return tiny.minillm_config(
        folders / "runs",
        teacher=folders / "teacher",
        student=folders / student,
        prompts=folders / "train.jsonl",
        run_data={
            "train": str(folders / "train.jsonl"),
            "test": paths if isinstance(test, dict) else paths[""],
            "max_prompt_tokens": 8,
        },
        run_evaluation={"seeds": (1, 2), "bootstrap": 50, **evaluation},
    )


BOTH = {"one": "one.jsonl", "two": "two.jsonl"}


def evaluated(folders: Path, out: Path, test: Any, **changed: Any) -> dict[str, Any]:
    config = config_of(folders, test, student=changed.pop("student", "student"), **changed)
    return api.evaluate(config.student, config, out=out)


@pytest.fixture(scope="module")
def both(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("both")
    evaluated(folders, out, BOTH)
    return out


@pytest.fixture(scope="module")
def others(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("others")
    evaluated(folders, out, BOTH, student="other")
    return out


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_set_among_several_is_what_it_is_alone(folders: Path, both: Path, tmp_path: Path, name: str) -> None:
    evaluated(folders, tmp_path, f"{name}.jsonl")
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "samples.jsonl"}, "today's layout"
    assert (tmp_path / "samples.jsonl").read_bytes() == (both / name / "samples.jsonl").read_bytes()
    alone, among = results(tmp_path), results(both / name)
    assert alone.pop("seconds") and among.pop("seconds")
    assert alone == among
    changed = tmp_path / "changed"  # negative control: another run seed draws other text
    config = config_of(folders, f"{name}.jsonl").model_copy(update={"seed": 11})
    api.evaluate(config.student, config, out=changed)
    assert (changed / "samples.jsonl").read_bytes() != (both / name / "samples.jsonl").read_bytes()


def test_the_list_of_sets_says_what_each_is(both: Path) -> None:
    index = results(both)
    assert list(index["sets"]) == ["one", "two"]
    for name, rows in (("one", 6), ("two", 5)):
        of, own = index["sets"][name], results(both / name)
        assert (of["rows"], of["sha256"], of["measures"]) == (rows, own["data"]["sha256"], own["measures"])
    assert index["decoding"] == results(both / "one")["decoding"]
    assert "measures" not in index, "nothing is averaged over sets"


def test_one_model_and_one_teacher_serve_all_sets(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minillm import evaluation_sets

    opened = []
    monkeypatch.setattr(
        evaluation_sets, "opened", lambda *a, _of=evaluation_sets.opened, **k: opened.append(1) or _of(*a, **k)
    )
    teachers = []
    monkeypatch.setattr(api, "load_teacher", lambda *a, _of=api.load_teacher, **k: teachers.append(1) or _of(*a, **k))
    evaluated(folders, tmp_path, BOTH)
    assert (len(opened), len(teachers)) == (1, 1)


def test_shared_ids_are_told_and_own_ids_are_not(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(folders, tmp_path / "a", BOTH)
    said = " ".join(capsys.readouterr().out.split())
    assert "note: 5 row ids in more than one of the sets one, two (row-0, row-1, row-2, …)" in said
    assert "same random numbers" in said
    evaluated(folders, tmp_path / "b", {"one": "one.jsonl", "bare": "bare.jsonl"})
    assert "more than one of the sets" not in capsys.readouterr().out


def test_results_are_kept_and_a_new_set_is_added(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(folders, tmp_path, {"one": "one.jsonl"})
    before = (tmp_path / "one" / "samples.jsonl").stat().st_mtime_ns
    index = evaluated(folders, tmp_path, BOTH)
    assert list(index["sets"]) == ["one", "two"]
    assert (tmp_path / "one" / "samples.jsonl").stat().st_mtime_ns == before
    capsys.readouterr()
    assert evaluated(folders, tmp_path, BOTH) == results(tmp_path)
    assert "evaluated already" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"sets that are not asked for now \(two\)"):
        evaluated(folders, tmp_path, {"one": "one.jsonl"})
    with pytest.raises(DataError, match="holds other results"):
        evaluated(folders, tmp_path, BOTH, seeds=(3,))
    with pytest.raises(DataError, match="results of several sets"):
        evaluated(folders, tmp_path, "one.jsonl")
    with pytest.raises(DataError, match="not a list of sets"):
        evaluated(folders, tmp_path / "one", BOTH)


def test_a_set_without_references_lacks_what_needs_them(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(folders, tmp_path, {"one": "one.jsonl", "bare": "bare.jsonl"})
    assert "bare: no row has a reference: no ROUGE-L" in capsys.readouterr().out
    bare, one = results(tmp_path / "bare"), results(tmp_path / "one")
    assert not {"rouge_l", "exact_match"} & set(bare["measures"]) and "by_length" not in bare
    assert {"rouge_l", "exact_match"} <= set(one["measures"]) and "by_length" in one
    assert bare["measures"]["reverse_kl"]["mean"] > 0.0


def test_buckets_hold_the_prompts_of_their_length(both: Path) -> None:
    found = results(both / "one")["by_length"]
    assert found["unit"] == "words of the first reference, split at white space"
    assert {name: of["words"] for name, of in found["buckets"].items()} == {
        "0-5": [0, 5], "6-10": [6, 10], "11+": [11, None],
    }  # fmt: skip
    rows = [json.loads(line) for line in (both / "one" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, of in found["buckets"].items():
        own = [row for row in rows if measures.reference_bucket(row) == name]
        assert of["prompts"] == 2 == len({row["uid"] for row in own})
        mean = sum(row["measures"]["rouge_l"] for row in own) / len(own)
        assert of["measures"]["rouge_l"]["mean"] == pytest.approx(mean, abs=1e-12)
        assert len(of["measures"]["rouge_l"]["ci95"]) == 2
        assert "distinct_4" not in of["measures"], "it grows and falls with the number of responses"


@pytest.mark.parametrize(
    ("words", "name"), [(0, "0-5"), (5, "0-5"), (6, "6-10"), (10, "6-10"), (11, "11+"), (99, "11+")]
)
def test_the_ends_of_a_bucket_belong_to_it(words: int, name: str) -> None:
    row = {"uid": "a", "seed": 1, "temperature": 1.0, "response": "a", "tokens": 1, "stop": "eos"}
    row |= {"references": [" ".join(["w"] * words), "one two"], "measures": {"rouge_l": 0.5, "repetition_3": 0}}
    bare = {**row, "uid": "b", "references": []}
    found = by_length([row, bare], resamples=10, seed=0)["by_length"]
    assert {label for label, of in found["buckets"].items() if of["prompts"]} == {name}
    assert found["without_reference"] == 1
    assert by_length([bare], resamples=10, seed=0) == {}


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ({"Dolly": "a.jsonl", "dolly": "b.jsonl"}, "another set has this name"),
        ({"a/b": "a.jsonl"}, "a set is a folder of results"),
        ({"..": "a.jsonl"}, "a set is a folder of results"),
        ({"results.json": "a.jsonl"}, "a set is a folder of results"),
        ({"student": "a.jsonl"}, "none of student, stages, tensorboard"),
        ({1: "a.jsonl"}, "set 1: a set is a folder"),
        ({}, "got no set"),
        ({"a": 3}, "set 'a': got 3, wanted a source"),
        ({"a": "a.csv"}, "set 'a': got 'a.csv', wanted"),
        ({"a": "set:doly"}, "did you mean 'dolly'?"),
        ("set:doly", "did you mean 'dolly'?"),
        (["a.jsonl"], "wanted a source, or a mapping of names to sources"),
        ("", "wanted a source"),
    ],
)
def test_bad_sets_are_told(folders: Path, test: Any, words: str) -> None:
    good = config_of(folders, "one.jsonl").model_dump()
    good["data"]["test"] = test
    with pytest.raises(ConfigError) as caught:
        RunConfig(**good)
    assert str(caught.value).startswith("data.test: ") and words in str(caught.value)


def test_two_sets_of_one_name_are_refused_by_the_reader(folders: Path, tmp_path: Path) -> None:
    text = dump_config(config_of(folders, BOTH))
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "run.yaml").data.test_sets == config_of(folders, BOTH).data.test_sets
    override = [f"data.test.three={folders / 'bare.jsonl'}"]
    assert list(load_config(tmp_path / "run.yaml", override).data.test_sets) == ["one", "two", "three"]
    (tmp_path / "twice.yaml").write_text(text.replace("    two:", "    one:"), encoding="utf-8")
    with pytest.raises(ConfigError, match="one"):
        load_config(tmp_path / "twice.yaml")


def test_an_empty_set_stops_before_any_model_is_read(folders: Path, tmp_path: Path) -> None:
    (folders / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"set nothing: .*is empty"):
        evaluated(folders, tmp_path / "out", {"one": "one.jsonl", "nothing": "empty.jsonl"})
    assert not (tmp_path / "out").exists()


def test_calibration_asks_every_set_for_references(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="set bare: "):
        evaluated(folders, tmp_path / "out", {"one": "one.jsonl", "bare": "bare.jsonl"}, calibration=True)


def test_a_run_ends_with_all_its_sets(folders: Path, tmp_path: Path) -> None:
    config = config_of(folders, BOTH, bootstrap=20).model_copy(update={"out": str(tmp_path)})
    with undrawn():
        folder = distill(config)
        assert list(results(folder)["sets"]) == ["one", "two"]
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert 'href="one/report.html"' in page and "Training" in page
        assert (folder / "two" / "report.html").is_file()
        assert "test one prompts" in json.loads((folder / "run.json").read_text(encoding="utf-8"))["made_from"]
        distill(config, fresh=True)
        changed = config.model_copy(
            update={"data": config.data.model_copy(update={"test": config.data.test_sets["one"]})}
        )
        distill(changed, fresh=True)
    assert not (folder / "two").exists(), "starting over removes what the run wrote"
    assert "measures" in results(folder)


def test_a_report_has_a_row_and_a_page_for_each_set(
    both: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with undrawn():
        found = build_report({"a": both, "b": others}, out=tmp_path, differences=[("b", "a")], resamples=50)
    assert list(found["sets"]) == ["one", "two"]
    for name in ("one", "two"):
        own = results(both / name)["measures"]["rouge_l"]
        assert found["sets"][name]["models"]["a"]["rouge_l"] == own
        assert found["sets"][name]["pairs"] == {"b,a": ["b", "a"]}
        assert (tmp_path / name / "report.html").is_file()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('href="one/report.html"') == page.count('href="two/report.html"') == 2
    assert "words of the first reference" in page and "11+" in page
    said = capsys.readouterr().out
    assert "All sets" in said and max(map(len, said.splitlines())) <= 80
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == found


def test_a_report_refuses_one_source_among_several_sets(both: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="wanted the same of all"):
        build_report({"a": both, "b": both / "one"}, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="no such model"):
        build_report({"a": both}, out=tmp_path / "out", differences=[("a", "zz")])
    with undrawn():
        single = build_report({"a": both / "one"}, out=tmp_path / "single", resamples=50)
    assert "sets" not in single and single["models"]["a"] == results(both / "one")["measures"]


def test_models_are_compared_set_by_set(both: Path, others: Path, tmp_path: Path) -> None:
    file = tmp_path / "compare.json"
    found = compare({"a": both, "b": others}, options=SMALL, json_file=file, out=tmp_path / "out", quiet=True)
    alone = compare({"a": both / "two", "b": others / "two"}, options=SMALL, quiet=True)
    assert found["sets"]["two"] == alone
    assert found["sets"]["one"]["prompts"] == 6 and found["sets"]["two"]["prompts"] == 5
    assert json.loads(file.read_text(encoding="utf-8")) == found
    assert (tmp_path / "out" / "one" / "compare.html").is_file() and not (tmp_path / "out" / "compare.html").exists()


def test_a_set_of_one_model_alone_is_left_out_and_said(
    folders: Path, both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(folders, tmp_path / "more", {"one": "one.jsonl", "bare": "bare.jsonl"}, student="other")
    found = compare({"a": both, "b": tmp_path / "more"}, options=SMALL)
    assert list(found["sets"]) == ["one"]
    assert "Set two is left out: only a was evaluated on it." in capsys.readouterr().out
    evaluated(folders, tmp_path / "else", {"bare": "bare.jsonl"}, student="other")
    with pytest.raises(DataError, match="no set that all of a, b were evaluated on"):
        compare({"a": both, "b": tmp_path / "else"}, options=SMALL, quiet=True)


def test_the_preset_is_seen_in_the_decoding_record(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(config_of(folders, BOTH)), encoding="utf-8")
    run = load_config(tmp_path / "run.yaml", released.preset("minillm"))
    assert run.decoding.no_repeat_ngram_size == 6 and run.decoding.max_new_tokens == 256
    assert run.evaluation.seeds == (10, 20, 30, 40, 50) and run.evaluation.temperatures == (1.0,)
    assert config_of(folders, BOTH).decoding.no_repeat_ngram_size == 0, "and nothing sets it by itself"
    with pytest.raises(ConfigError, match="did you mean 'minillm'"):
        released.preset("minilm")


def as_row(record: dict[str, Any]) -> Any:
    (part,) = released.unfolded(record)
    return parse_record(part, default_uid="x-1")[0]


def test_the_forms_of_the_public_sets_are_read_as_they_are() -> None:
    dolly = as_row({"instruction": "When?", "context": "In 2000.", "response": "2000", "category": "closed_qa"})
    assert (dolly.instruction, dolly.input, dolly.responses) == ("When?", "In 2000.", ("2000",))
    assert dolly.extra == {"category": "closed_qa"}
    mine = as_row({"instruction": "When?", "input": "", "context": "kept as before", "response": "2000"})
    assert mine.input == "" and mine.extra == {"context": "kept as before"}
    own = as_row(
        {
            "id": "user_0",
            "motivation_app": "Mail",
            "instruction": "Rewrite.",
            "instances": [{"input": "a", "output": "b"}],
        }
    )
    assert (own.uid, own.instruction, own.input, own.responses) == ("user_0", "Rewrite.", "a", ("b",))
    hub = as_row({"id": "user_0", "instruction": "Rewrite.", "instances": {"input": ["a"], "output": ["b"]}})
    assert (hub.input, hub.responses) == ("a", ("b",))
    sni = as_row({"task_name": "t", "id": "t-1", "definition": "Title.", "inputs": "Text", "targets": "Words"})
    assert (sni.uid, sni.instruction, sni.input, sni.responses) == ("t-1", "Title.", "Text", ("Words",))
    for asked in ({"turns": ["How?"]}, {"text": "How?"}):
        vicuna = as_row({"question_id": 3, "category": "generic", **asked})
        assert (vicuna.uid, vicuna.instruction, vicuna.responses) == ("3", "How?", ())
    ours = as_row({"instruction": "Go.", "input": "", "prompt": "### …", "output": ["a", "b"], "topic": "t"})
    assert ours.responses == ("a", "b"), "the released files"


def test_an_instruction_with_several_instances_is_several_rows(tmp_path: Path) -> None:
    record = {
        "instruction": "Add.",
        "instances": [{"input": "1", "output": "2", "constraints": "None."}, {"input": "3", "output": "4"}],
    }
    (tmp_path / "core.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    rows, report = read_rows(str(tmp_path / "core.jsonl"))
    assert [(row.uid, row.input, row.responses) for row in rows] == [
        ("core-1#0", "1", ("2",)), ("core-1#1", "3", ("4",)),
    ]  # fmt: skip
    assert rows[0].extra == {"constraints": "None."} and not report.ignored


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add.", "instances": "no list", "output": "3"},
        {"question_id": 1, "turns": ["a", "b"]},
        {"prompt": "a", "context": "b"},
        {"definition": "a", "inputs": "b", "prompt": "c"},
    ],
)
def test_what_only_looks_like_a_form_stays_as_it_is(record: dict[str, Any]) -> None:
    assert released.unfolded(record) == [record]


def test_a_known_set_is_one_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    file = save_rows(tmp_path / "valid.jsonl", offset=0)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *args, **options: asked.append((args, options)) or str(file)
    )
    rows, _ = read_rows("set:sinst")
    assert len(rows) == 6
    assert asked == [(("MiniLLM/sinst", "11_/valid.jsonl"), {"repo_type": "dataset"})]
    monkeypatch.undo()
    with pytest.raises(DataError, match="set:dolly could not be loaded"):
        read_rows("set:dolly")


@pytest.mark.parametrize("name", RELEASED)
def test_the_published_sets_are_read_whole(name: str) -> None:
    file, count = RELEASED[name]
    if not (DATA / file).is_file():
        pytest.skip(f"no {file} in {DATA}; set MINILLM_SHARED_DATA to a folder that has it")
    rows, report = read_rows(str(DATA / file))
    assert len(rows) == count and not report.skipped
    assert all(row.instruction and row.responses for row in rows)
    with gzip.open(DATA / file, "rt", encoding="utf-8") as lines:
        first = json.loads(next(lines))
    assert rows[0].responses == tuple(first["output"]) and rows[0].input == first["input"]
    long = [measures.reference_bucket({"references": list(row.responses)}) for row in rows]
    if name != "sinst":
        assert {"0-5", "6-10", "11+"} == set(long)
