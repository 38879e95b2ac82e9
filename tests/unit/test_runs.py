"""``minillm runs``: what it says of runs that are there, and that it removes nothing that somebody may want."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minillm import checkpoint_manifest, run_listing
from minillm.checkpoint_manifest import REMEDY
from minillm.checkpoints import Checkpoints, OneRank
from minillm.cli import app
from minillm.errors import DataError, RunInUse
from minillm.run_listing import clean, describe, find_runs
from minillm.store import CHECKPOINTS, RunFolder

HOLDER = """
import sys, time
from pathlib import Path
from minillm.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def make(root: Path, name: str, *, state: str = "stopped", steps: int = 0, whole: int = 0, **fields: Any) -> Path:
    """A run's folder with ``steps`` logged and ``whole`` checkpoints of 1,000 bytes each."""
    path = root / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("stages:\n  - {kind: sft, name: sft, steps: 60}\n", encoding="utf-8")
    folder = RunFolder(path, writes=True)
    folder.set_status(state=state, **fields)
    for step in range(1, steps + 1):
        folder.log({"kind": "train", "stage": "sft", "step": step, "update": step, "loss": 1.0})
    if steps:
        folder.log({"kind": "validation", "stage": "sft", "step": steps, "loss": 0.25, "rouge_l": 0.5})
    saved = Checkpoints(path / CHECKPOINTS, ranks=OneRank(), say=print, keep=99)
    for step in range(1, whole + 1):
        saved.save(step=step, stage="sft", fingerprints={}, files={"x.json": lambda sink: sink.write(bytes(1000))})
    return path


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["runs", *words], env={"COLUMNS": "100"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def corrupt(path: Path, step: int) -> None:
    file = path / CHECKPOINTS / f"step-{step:08d}" / "x.json"
    file.write_bytes(b"\1" + file.read_bytes()[1:])


def test_runs_are_found_at_any_depth_and_parts_of_a_run_are_not_runs(tmp_path: Path) -> None:
    for name in ("a", "b/one", "b/student/10"):
        make(tmp_path, name)
    make(tmp_path, "a/student")  # a published student never is one
    make(tmp_path, ".hidden")
    assert [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)] == ["a", "b/one", "b/student/10"]
    with pytest.raises(DataError, match="no such folder"):
        find_runs(tmp_path / "none")


def test_a_run_inside_a_run_is_a_run_of_its_own(tmp_path: Path) -> None:
    outer = make(tmp_path, "q", steps=3)
    inner = make(tmp_path, "q/inner", whole=2)
    assert find_runs(tmp_path) == [outer, inner]
    assert describe(outer, root=tmp_path).bytes < 1000 and describe(inner, root=tmp_path).bytes > 2000


@pytest.mark.parametrize(
    ("told", "shown"),
    [("stopped", "stopped"), ("failed", "failed"), ("done", "done"), ("running", "broken off"), ("?", "unreadable")],
)
def test_the_state_of_a_run_that_nobody_works_in(told: str, shown: str, tmp_path: Path) -> None:
    assert describe(make(tmp_path, "a", state=told), root=tmp_path).state == shown


def test_a_run_that_somebody_works_in_is_running_and_left_alone(tmp_path: Path) -> None:
    path = make(tmp_path, "a", state="running", whole=4)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        info = describe(path, root=tmp_path)
        assert info.state == "running" and f"process {other.pid}" in info.owner
        with pytest.raises(RunInUse):
            clean(path, keep=2, say=print)
        code, text = run("clean", str(tmp_path))
        assert code == 0 and "left alone" in text and len(describe(path, root=tmp_path).checkpoints) == 4
        other.kill()
    assert describe(path, root=tmp_path).state == "broken off"


def test_the_table_says_step_best_checkpoints_and_reason(tmp_path: Path) -> None:
    path = make(tmp_path, "mine", steps=35, whole=3, reason="SIGTERM; saved at step 35")
    corrupt(path, 2)
    code, text = run(str(tmp_path))
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["mine"]]
    assert code == 0 and "35/60" in line and "rouge_l 0.5" in line and "2/3" in line and "KiB" in line
    assert "mine: SIGTERM; saved at step 35" in text and "goes on by the command" in text


def test_verify_names_the_broken_file_and_ends_with_one(tmp_path: Path) -> None:
    path = make(tmp_path, "mine", whole=3)
    code, text = run("verify", str(tmp_path))
    assert code == 0 and "3 checkpoints, 0 broken" in text
    corrupt(path, 2)
    code, text = run("verify", str(tmp_path))
    assert code == 1 and "step-00000002/x.json: its SHA-256" in text and "3 checkpoints, 1 broken" in text


@pytest.mark.parametrize("when", ["manifest", "data"])
def test_what_retention_removes_while_it_is_read_is_not_broken(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest goes before its manifest is read, or between that and its data."""
    path, name = make(tmp_path, "mine", whole=3), "read_manifest" if when == "manifest" else "_compare_names"
    at, plain = path / CHECKPOINTS, getattr(checkpoint_manifest, name)

    def reading(folder: Path, *rest: Any) -> Any:
        found = plain(folder, *rest) if when == "data" else None
        if folder.name == "step-00000001":
            folder.rename(at / ".removed-step-00000001-aa")
        return plain(folder, *rest) if when == "manifest" else found

    monkeypatch.setattr(checkpoint_manifest, name, reading)
    code, text = run("verify", str(tmp_path))
    assert code == 0 and "2 checkpoints, 0 broken" in text and "step-00000001" not in text


def test_verify_names_every_problem_of_a_manifest_in_a_line(tmp_path: Path) -> None:
    path = make(tmp_path, "mine", whole=2)
    (path / CHECKPOINTS / "step-00000002" / "MANIFEST.json").write_text("{}", encoding="utf-8")
    code, text = run("verify", str(tmp_path))
    (line,) = [line for line in text.splitlines() if line.startswith("broken")]
    assert code == 1 and "5 problems; step: is missing" in line and REMEDY not in text
    assert all(f"{name}: is missing" in line for name in ("step", "stage", "ranks", "fingerprints", "files"))


def test_control_one_that_lost_its_files_and_stands_there_is_broken(tmp_path: Path) -> None:
    path = make(tmp_path, "mine", whole=3)
    (path / CHECKPOINTS / "step-00000001" / "x.json").unlink()
    code, text = run("verify", str(tmp_path))
    assert code == 1 and "3 checkpoints, 1 broken" in text


def test_clean_keeps_the_newest_two_that_are_whole(tmp_path: Path) -> None:
    path = make(tmp_path, "mine", whole=6)
    corrupt(path, 6)
    (path / CHECKPOINTS / ".staging-step-00000007-aa").mkdir()
    code, text = run("clean", str(tmp_path), "--keep", "2")
    kept = sorted(at.name for at in (path / CHECKPOINTS).iterdir())
    assert code == 0 and "freed" in text and kept == ["step-00000004", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("keep", [2, 3, 4])
def test_clean_counts_whole_checkpoints_alone(keep: int, tmp_path: Path) -> None:
    path = make(tmp_path, "mine", whole=8)
    for step in (4, 7):
        corrupt(path, step)
    run("clean", str(tmp_path), "--keep", str(keep))
    kept = {int(at.name[-2:]) for at in (path / CHECKPOINTS).iterdir()}
    assert kept == {2: {6, 7, 8}, 3: {5, 6, 7, 8}, 4: {3, 4, 5, 6, 7, 8}}[keep]


def test_clean_removes_none_where_fewer_are_whole_than_are_to_stay(tmp_path: Path) -> None:
    path = make(tmp_path, "mine", whole=5)
    for step in (1, 3, 4):
        corrupt(path, step)
    run("clean", str(tmp_path), "--keep", "3")
    assert len(list((path / CHECKPOINTS).iterdir())) == 5


def test_clean_leaves_nothing_of_a_run_that_is_done(tmp_path: Path) -> None:
    path = make(tmp_path, "mine", state="done", whole=3)
    run("clean", str(tmp_path))
    assert not (path / CHECKPOINTS).exists()


def test_long_reading_is_told_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a", whole=2)
    make(tmp_path, "b")
    words = ["runs", str(tmp_path), "--json"]
    assert CliRunner().invoke(app, words).stderr == ""
    monkeypatch.setattr(run_listing, "TOLD_BYTES", 2000)
    result = CliRunner().invoke(app, words)
    assert re.fullmatch(rf"reading 2\.\d+ KiB of checkpoints in {tmp_path}/a …\n", result.stderr)
    assert len([json.loads(line) for line in result.stdout.splitlines()]) == 2


def test_json_is_one_object_a_run(tmp_path: Path) -> None:
    make(tmp_path, "a", whole=1)
    make(tmp_path, "b", state="done")
    code, text = run(str(tmp_path), "--json")
    records = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and [record["state"] for record in records] == ["stopped", "done"]
    assert records[0]["checkpoints"][0]["fault"] == "" and not records[1]["checkpoints"]


def test_a_broken_status_or_log_is_no_reason_to_stop(tmp_path: Path) -> None:
    path = make(tmp_path, "a", steps=2)
    (path / "run.json").write_text("{", encoding="utf-8")
    (path / "metrics.jsonl").write_bytes(b"\xff\xfe\n{\n[]\n")
    (path / "config.yaml").write_text("]", encoding="utf-8")
    info = describe(path, root=tmp_path)
    assert info.state == "unreadable" and info.at == "–"


def test_two_folders_are_one_too_many() -> None:
    from minillm.errors import ConfigError

    with pytest.raises(ConfigError, match="wanted one folder"):
        run("a", "b")
