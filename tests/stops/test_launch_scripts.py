"""Every launch script says what it would start and with which settings, starts nothing then, and tells a mistake in two
lines."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.config import RunConfig
from minillm.yaml_reader import read_yaml
from tests.stops.jobs import ROOT

SCRIPTS = ("sft", "distill", "evaluate", "study")
RECIPES = {"sft": "recipes/sft.yaml", "distill": "recipes/jsonl.yaml", "evaluate": "recipes/jsonl.yaml",
           "study": "scripts/study.yaml"}  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that is asked for GPUs, and spared torch."""
    stub = tmp_path_factory.mktemp("bin") / "python"
    stub.write_text(f'#!/bin/sh\ncase $1$2 in -c*device_count*) echo 0; exit;; esac\nexec {sys.executable} "$@"\n')
    stub.chmod(0o700)
    return stub


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Rows for each split, as a dry run wants them to be there."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    return [f"data.{split}={file}" for split in ("train", "validation", "test")]


def script(
    name: str, *words: str, python: Path, where: Path = ROOT, path: str = "", **settings: str
) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in {"CONFIG", "RANKS", "OUT", "MASTER_PORT"}}
    return subprocess.run(
        ["bash", path or str(ROOT / "scripts" / f"{name}.sh"), *words],
        cwd=where, env={**kept, "MINILLM_PYTHON": str(python), **settings}, text=True, capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.stem)
def test_bash_can_read_the_script(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).stderr == b""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_prints_the_commands_and_the_settings_and_leaves_nothing(
    name: str, python: Path, data: list[str]
) -> None:
    before = sorted(path.name for path in (ROOT / "runs").glob("*"))
    done = script(
        name, "gpt2-xl", "students/gpt2", "decoding.max_new_tokens=77", *data, "--dry-run", python=python, RANKS="2"
    )
    assert done.returncode == 0, done.stderr
    started, _, told = done.stdout.partition("# on each rank\n")
    lines = [shlex.split(line) for line in started.splitlines()[1:]]
    assert [line[1] for line in lines] == ["RANK=0", "RANK=1"]
    for line in lines:
        assert line[line.index("minillm") + 1] == name and line[line.index("--config") + 1] == RECIPES[name]
        assert {"teacher=gpt2-xl", "decoding.max_new_tokens=77", "WORLD_SIZE=2"} <= set(line)
        assert "students/gpt2" in line or "student=students/gpt2" in line
    hub = "student openai-community/gpt2, teacher openai-community/gpt2-xl"
    assert f"\n# not looked at, since not on this machine: {hub}\n" in told
    settings = RunConfig(**read_yaml(told.rpartition("---\n")[2], source="told"))
    assert (settings.teacher, settings.decoding.max_new_tokens) == ("gpt2-xl", 77)
    assert settings.student == "students/gpt2" and settings.evaluation.bootstrap == 2000, "defaults are written out"
    assert sorted(path.name for path in (ROOT / "runs").glob("*")) == before


def test_a_dry_run_over_a_hostfile_prints_what_each_host_is_told(python: Path, data: list[str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("me@gpu-1 slots=8\ngpu-2 slots=8\n", encoding="utf-8")
    hosts = ["--hostfile", str(tmp_path / "hosts"), "--ssh", "bash -p"]
    done = script("distill", "gpt2-xl", "gpt2", "name=a b", *hosts, "--dry-run", python=python)
    assert done.returncode == 2 and "name" in done.stderr, "what a rank would refuse is refused here"
    done = script("distill", "gpt2-xl", "gpt2", *data, *hosts, "--dry-run", python=python)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[0].startswith("# hosts get of this environment: ") and "OMP_NUM_THREADS" in told[0]
    first, second = (shlex.split(line) for line in told[2:4])
    assert first[:3] == ["bash", "-p", "me@gpu-1"] and second[:3] == ["bash", "-p", "gpu-2"]
    for node, line in enumerate((first, second)):
        assert f"--leash --ranks 8 --nodes 2 --node-rank {node} --master gpu-1 --master-port 29500" in line[3]


def test_a_node_is_told_by_the_environment(python: Path) -> None:
    node = {"NODE_RANK": "1", "NNODES": "2", "MASTER_ADDR": "gpu-1", "RANKS": "2"}
    done = script("distill", "gpt2-xl", "gpt2", "--dry-run", python=python, **node)
    assert "RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 MASTER_ADDR=gpu-1 MASTER_PORT=29500" in done.stdout
    del node["NNODES"]
    done = script("distill", "gpt2-xl", "gpt2", "--dry-run", python=python, **node)
    assert done.returncode == 2 and "without --nodes (NNODES)" in done.stderr


def test_fine_tuning_goes_without_a_teacher(python: Path, data: list[str]) -> None:
    done = script("sft", "-", "teachers/gpt2-xl", *data, "--dry-run", python=python)
    assert (
        done.returncode == 0 and "\nteacher: null\n" in done.stdout and "\nstudent: teachers/gpt2-xl\n" in done.stdout
    )


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "got 0 of TEACHER and STUDENT"),
        (["gpt2-xl"], "got 1 of TEACHER and STUDENT"),
        (["gpt2-xl", "name=x"], "got name=x where a model is wanted"),
        (["--fresh", "gpt2-xl"], "got --fresh where a model is wanted"),
        (["gpt2-xl", "-"], "got no student"),
        (["gpt2-xl", "gpt2", "--hostfile"], "--hostfile without a value"),
    ],
)
def test_a_mistake_is_told_in_two_lines(name: str, words: list[str], told: str, python: Path) -> None:
    done = script(name, *words, python=python)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 2
    assert done.stderr.startswith(f"{name}.sh: {told}\n  want")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gpt2-xl", "gpt2", "--hostfile", "none"], "hostfile none: No such file"),
        (["gpt2-xl", "gpt2", "stages.0.stps=3", "--dry-run"], "did you mean 'steps'"),
        (["gpt2-xl", "gpt2", "surplus", "--dry-run"], "override 'surplus': wanted PATH=VALUE"),
        (["-", "gpt2"], "got no teacher"),
    ],
)
def test_what_the_command_refuses_is_told_without_a_traceback(words: list[str], told: str, python: Path) -> None:
    done = script("distill", *words, python=python)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 4


def test_help_is_the_head_of_the_script(python: Path) -> None:
    for name in SCRIPTS:
        done = script(name, "--help", python=python)
        assert done.returncode == 0 and f"bash scripts/{name}.sh TEACHER STUDENT [key=value ...]" in done.stdout
        assert "set -e" not in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_found_from_any_folder(name: str, python: Path, tmp_path: Path) -> None:
    ways = {ROOT / "scripts": f"{name}.sh", ROOT: f"scripts/{name}.sh", tmp_path: str(ROOT / f"scripts/{name}.sh")}
    for where, path in ways.items():
        done = script(name, "--help", python=python, where=where, path=path)
        assert done.returncode == 0 and done.stderr == "" and f"bash scripts/{name}.sh TEACHER" in done.stdout
        assert "count from where you stand" in done.stdout


def echoing(folder: Path) -> Path:
    """An interpreter that says what it was to start."""
    stub = folder / "echo"
    stub.write_text(
        "#!/bin/sh\ncase $1$2 in -c*device_count*) echo 0; exit;; -c*find_spec*) echo both; exit;; esac\n"
        'for word; do echo "$word"; done\n',
        encoding="utf-8",
    )
    stub.chmod(0o700)
    return stub


def test_paths_count_from_where_the_user_stands(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    python = echoing(tmp_path)

    def told(*words: str, **settings: str) -> list[str]:
        done = script("evaluate", "gpt2-xl", "gpt2", *words, python=python, where=tmp_path, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    own = told("--hostfile", "hosts", CONFIG="mine.yaml", OUT="found", MINILLM_PYTHON="./echo")
    assert own[own.index("--hostfile") + 1] == f"{tmp_path}/hosts"
    assert (
        own[own.index("--config") + 1] == f"{tmp_path}/mine.yaml" and own[own.index("--out") + 1] == f"{tmp_path}/found"
    )
    assert f"--hostfile={tmp_path}/hosts" in told("--hostfile=hosts")
    assert "/etc/hosts" in told("--hostfile", "/etc/hosts")
    whole = told(CONFIG="recipes/sft.yaml")  # of the checkout: there is none where the user stands
    assert whole[whole.index("--config") + 1] == "recipes/sft.yaml"


@pytest.mark.parametrize("other", ["/bin/true", "/bin/false"])
def test_an_interpreter_without_the_library_is_refused(other: str, data: list[str]) -> None:
    done = script("distill", "gpt2-xl", "students/gpt2", *data, python=Path(other))
    assert done.returncode == 2 and "it is no Python that has torch and minillm" in done.stderr
    assert done.stderr.count("\n") == 2


@pytest.mark.parametrize("ranks", ["0", "-1", "two"])
def test_a_number_of_ranks_that_is_none_is_refused(ranks: str, python: Path, data: list[str]) -> None:
    done = script("distill", "gpt2-xl", "students/gpt2", *data, "--dry-run", python=python, RANKS=ranks)
    assert done.returncode == 2 and f"RANKS={ranks}: wanted" in done.stderr and "Traceback" not in done.stderr
