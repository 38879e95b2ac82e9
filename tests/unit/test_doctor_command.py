"""``minillm doctor`` as a user meets it, its smoke test of ranks, its look at answers, and its part of every run."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from minillm import api
from minillm.config import load_config
from minillm.doctor import at_start, rollout, smoke
from minillm.doctor.findings import error, exit_code, note, of_error, ok, warning
from minillm.doctor.rollout import Answer, looked_over, repeated_share
from minillm.errors import ConfigError
from minillm.pairs import check_pair
from minillm.run_splits import read_splits
from tests.patients import healthy, levels, looked_at, of, run

SFT = "stages=[{kind: sft, steps: 1, batch: 4, optimiser: {lr: 1e-3}}]"


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("well")
    healthy(folder)
    return folder


def test_the_command_prints_the_worst_last_and_writes_a_record(
    well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, record = healthy(well), tmp_path / "found.json"
    assert run("doctor", "--config", str(file), "--json", str(record)) == 0
    assert run("doctor", "--config", str(file), "--json", str(record), "decoding.max_new_tokens=100") == 2
    told = capsys.readouterr().out
    last = told.rindex("error  ")
    assert told.rindex("ok     ") < last < told.rindex("2 errors") and "lower data.max_prompt_tokens" in told[last:]
    held = json.loads(record.read_text(encoding="utf-8"))
    assert held["counts"]["error"] == 2 and held["overrides"] == ["decoding.max_new_tokens=100"]
    assert {"id", "level", "found", "why", "mend"} == set(held["findings"][0])


def test_under_a_launcher_it_says_how_to_run_it(
    well: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(healthy(well))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run("doctor", "--rollout", "--config", file) == 2
    assert "doctor on 2 ranks of a launcher" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run("doctor", "--config", file) == 0, "control: one rank is alone"


def test_a_file_of_somebody_else_is_not_replaced(
    well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text("{}", encoding="utf-8")
    assert run("doctor", "--config", str(healthy(well)), "--json", str(mine)) == 2
    assert mine.read_text(encoding="utf-8") == "{}" and "nothing was touched" in capsys.readouterr().err


def test_the_exit_code_follows_the_worst_finding() -> None:
    fine, told = ok("a", "b"), note("a", "b", why="c")
    warned, wrong = warning("a", "b", why="c", mend="d"), error("a", "b", why="c", mend="d")
    assert exit_code([fine, told]) == exit_code([fine, told], strict=True) == exit_code([warned]) == 0
    assert exit_code([warned], strict=True) == exit_code([fine, wrong]) == 2


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"\x89PNG\r\n\x1a\n\x00\xff",
        b"- a\n- b\n",
        b"",
        b"name: [",
        b"name: 3\nstudent: {a: b}\n",
        b"\xff\xfe\x00",
        "folder",
    ],
)
def test_junk_is_told_without_a_traceback(
    content: bytes | str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "folder":
        file.mkdir()
    assert run("doctor", "--config", str(file)) == 2
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err and "configuration" in told.out and "1 errors" in told.out
    assert "packages" in told.out  # what needs no configuration is looked at all the same
    assert told.out.count("not looked at") == 1


def test_the_last_of_several_problems_is_not_how_to_mend_them(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: a\nstudent: b\nout: 3\nseeed: 1\n", encoding="utf-8")
    (found,) = of(looked_at(file), "configuration")
    assert "problems" in found.found and "out" in found.found and "seeed" in found.found
    assert found.mend == "mend what is named there"
    one = of_error("a", ConfigError("b: broken\n  write it again"), why="c")
    assert (one.found, one.mend) == ("ConfigError: b: broken", "write it again"), (
        "control: of one the last line says it"
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"[]", b'{"eos_token_id": "x", "vocab_size": []}'])
def test_junk_in_a_model_folder_is_told(name: str, content: bytes, well: Path, tmp_path: Path) -> None:
    import shutil

    student = Path(shutil.copytree(well / "student", tmp_path / "student"))
    (student / name).write_bytes(content)
    report = looked_at(healthy(well, student=student))
    healthy(well)
    assert any(finding.level == "error" for finding in report.findings)
    assert levels(report, "out-folder") == {"ok"}


def test_two_ranks_find_each_other(well: Path) -> None:
    report = looked_at(healthy(well), ranks=2)
    found = of(report, "collectives")
    assert [finding.level for finding in found] in (["ok"], ["warning"])  # how fast is the machine's
    assert "2 ranks on" in found[0].found and "all_gather" in found[0].found and "at 16 MiB" in found[0].found


def test_ranks_that_fail_are_a_finding_with_their_last_words() -> None:
    worker = (sys.executable, "-c", "print('no GPU for me'); raise SystemExit(3)")
    (found,) = smoke.collectives(2, worker=worker)
    assert found.level == "error" and "ended with exit code 3" in found.found and "no GPU for me" in found.found


def test_ranks_are_a_launch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a script has said which node this is, as those for clusters do."""
    node = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500"}
    rank = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    for name, value in {**node, **rank}.items():
        monkeypatch.setenv(name, value)
    told = ["RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    code = (
        "import os, sys\nif os.environ['RANK'] == '0':\n"
        f"    print({{name: os.environ.get(name) for name in {[*told, 'NNODES', 'NODE_RANK']}}})\n"
        "    print(os.environ['MASTER_PORT'] != '29500')\n    sys.exit(3)"
    )
    (found,) = smoke.collectives(2, worker=(sys.executable, "-c", code), limit_s=30.0)
    alone = dict(zip([*told, "NNODES", "NODE_RANK"], ["0", "2", "2", "127.0.0.1", None, None], strict=True))
    assert str(alone) in found.found and "True" in found.found, found.found


def test_ranks_that_hang_are_ended_in_time(tmp_path: Path) -> None:
    code = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(300)"
    began = time.monotonic()
    (found,) = smoke.collectives(2, worker=(sys.executable, "-c", code), limit_s=8.0)
    assert found.level == "error" and "did not come to an end in 8 s" in found.found
    assert time.monotonic() - began < 60
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 2 and not any(_lives(pid) for pid in pids)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"


def test_wrong_sums_and_slow_wires_are_told() -> None:
    speed = {name: {4: 1.0, 16: 900.0} for name in ("all_reduce", "all_gather")}
    found = {"ranks": 2, "device": "cpu", "backend": "gloo", "right": True, "mb_per_s": speed}
    assert smoke._told(found).level == "ok"
    assert smoke._told({**found, "right": False}).level == "error"
    assert smoke._told({**found, "mb_per_s": {**speed, "all_gather": {4: 1.0, 16: 9.0}}}).level == "warning"


def test_both_models_answer_five_prompts(well: Path) -> None:
    report = looked_at(healthy(well), ask_models=True)
    assert [answer.model for answer in report.answers] == ["student"] * 5 + ["teacher"] * 5
    assert all(0 <= answer.tokens <= 10 for answer in report.answers) and of(report, "rollout")
    assert all(len(rollout.shown(answer).splitlines()) == 2 for answer in report.answers)
    assert looked_at(healthy(well), ask_models=True).answers == report.answers


def test_models_are_not_asked_where_they_do_not_fit(well: Path) -> None:
    report = looked_at(healthy(well), ["decoding.max_new_tokens=100"], ask_models=True)
    assert not report.answers and "not looked at" in of(report, "rollout")[0].found


def answer(**changes: object) -> Answer:
    fields = {"model": "teacher", "prompt": "p", "text": "t", "tokens": 9, "ended": True, "repeated": 0.0, **changes}
    return Answer(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"ended": False}, "cut"), ({"text": ""}, "empty"), ({"repeated": 0.5}, "runs of 4 tokens"), ({}, "")],
)
def test_answers_are_held_against_thresholds(changes: dict[str, object], words: str, well: Path) -> None:
    from minillm.doctor.patient import Patient

    patient = Patient(config=load_config(healthy(well)))
    found = list(looked_over(patient, [answer(**changes)] * 5))
    assert [finding.level for finding in found] == ["warning" if words else "ok"]
    assert words in found[0].why
    raw = Patient(config=load_config(healthy(well), [SFT]))
    found = list(looked_over(raw, [answer(**{**changes, "model": "student"})] * 5))
    assert [finding.level for finding in found] == ["note" if words else "ok"]


def test_repetition_is_the_share_of_runs_that_stood_before() -> None:
    assert repeated_share([1, 2, 3]) == 0 and repeated_share([1, 2, 3, 4, 5]) == 0
    assert repeated_share([7] * 8) == pytest.approx(4 / 5)


def lines(file: Path, *overrides: str) -> list[str]:
    config = load_config(file, overrides)
    pair = check_pair(config)
    return list(at_start.words_at_start(config, pair, read_splits(config, pair), ranks=1))


def test_a_run_begins_in_silence_where_all_is_well(well: Path, tmp_path: Path) -> None:
    file = healthy(well)
    assert lines(file) == []
    found = lines(file, f"data.test={well / 'train.jsonl'}")
    assert len(found) == 2 and found[0].startswith("doctor: test: 24 of 24 prompts") and "take these rows" in found[0]
    assert "minillm doctor --config" in found[1]


def test_a_run_tells_what_the_doctor_finds_and_goes_on(
    well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(
        healthy(well), [SFT, f"out={tmp_path}", f"data.test={well / 'train.jsonl'}", "evaluation.seeds=[1]"]
    )
    folder = api.distill(config)
    assert "doctor: test: 24 of 24 prompts" in capsys.readouterr().out and (folder / "student").is_dir()
