"""Each attack runs with the mark and the untouchable folder compared before and after it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minillm import cli
from tests import tiny
from tests.attacks.hostile import OUTSIDE, Outcome, Place, Run, held

CONFIG = """
name: run
out: {top}/out
student: {top}/student
teacher: {top}/teacher
data: {{train: {top}/prompts.jsonl, test: {top}/prompts.jsonl, max_prompt_tokens: 8}}
decoding: {{max_new_tokens: 4}}
engine: {{student: zero0}}
evaluation: {{seeds: [1], bootstrap: 5}}
stages:
  - {{kind: minillm, steps: 1, prompts: 4, optimiser: {{lr: 1e-2}}}}
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student and prompts, once."""
    top = tmp_path_factory.mktemp("honest")
    tiny.save_model(top / "teacher", "llama", seed=1)
    tiny.save_model(top / "student", "llama", seed=2)
    tiny.save_prompts(top / "prompts.jsonl", rows=6)
    return top


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Iterator[Place]:
    """A copy for one attack; afterwards there is no mark, and the folder outside is as it was."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "good.yaml").write_text(CONFIG.format(top=tmp_path), encoding="utf-8")
    for name, text in OUTSIDE.items():
        file = tmp_path / "outside" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    place = Place(tmp_path)
    before = held(place.outside)
    yield place
    assert not place.marker.exists(), "a payload ran"
    assert held(place.outside) == before, "something was written outside"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``minillm`` with these arguments, in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["minillm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run
