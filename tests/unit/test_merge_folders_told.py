"""What is no folder of a model is told as such, whatever else could be called so; and words fit their numbers."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minillm.cli import app
from minillm.errors import ModelError
from tests import tiny
from tests.unit.test_merge_models import changed, rewrite, stored, trained


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    start = tiny.save_model(folder / "start", "llama", seed=1)
    for number in range(2):
        trained(start, folder / f"model-{number}", seed=number)
    return folder


def refused(*words: str) -> ModelError:
    found = CliRunner().invoke(app, ["merge", *words])
    assert isinstance(found.exception, ModelError), found.output
    return found.exception


@pytest.mark.parametrize("name", ["students/micro-world-16x1", "gpt2", "runs/none/student"])
def test_cards_hub_names_and_missing_folders_are_told_with_what_was_looked_for(
    home: Path, tmp_path: Path, name: str
) -> None:
    start, out = str(home / "start"), str(tmp_path / "out")
    for words in ((start, name), (name, start)):
        said = str(refused(*words, "--out", out))
        assert said.startswith(f"{name}: there is no such folder; looked for {Path.cwd() / name} with config.json")
        assert "merging takes folders alone" in said and "huggingface" not in said and "the card student" not in said
    assert "adapter_config.json" in str(refused(start, name, "--out", out))
    assert not (tmp_path / "out").exists()


def test_a_folder_around_a_student_is_told_with_the_student_in_it(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "model-0", tmp_path / "run" / "student")
    said = str(refused(str(home / "start"), str(tmp_path / "run"), "--out", str(tmp_path / "out")))
    assert f"no config.json or adapter_config.json in it; looked for {tmp_path / 'run'}" in said
    assert f"did you mean {tmp_path / 'run' / 'student'}?" in said
    words = ["merge", str(home / "start"), str(tmp_path / "run" / "student"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, words).exit_code == 0  # the control: what is meant merges


@pytest.mark.parametrize(("value", "sick"), [(math.nan, "start"), (math.inf, "model-0"), (math.nan, "model-1")])
def test_a_number_that_is_none_is_told_with_its_folder_and_tensor(
    home: Path, tmp_path: Path, value: float, sick: str
) -> None:
    """Of one in the start every task vector has it, too."""

    def spoilt(name: str, weight: torch.Tensor) -> torch.Tensor:
        found = weight.clone()
        found.view(-1)[-1] = value if name == "model.layers.1.mlp.up_proj.weight" else found.view(-1)[-1]
        return found

    changed(home / sick, tmp_path / sick, spoilt)
    places = [tmp_path / name if name == sick else home / name for name in ("start", "model-0", "model-1")]
    said = str(refused(*map(str, places), "--out", str(tmp_path / "out")))
    assert said.startswith(f"{tmp_path / sick}: model.layers.1.mlp.up_proj.weight is not finite")
    assert not (tmp_path / "out").exists()


def test_words_fit_their_numbers(home: Path, tmp_path: Path) -> None:
    """One model; and one tensor of no use, which is a note and no refusal."""
    odd = shutil.copytree(home / "model-0", tmp_path / "odd")
    rewrite(odd, {**stored(odd), "spare": torch.ones(2)})
    one, both = tmp_path / "one", tmp_path / "both"
    said = CliRunner().invoke(app, ["merge", str(home / "start"), str(odd), "--out", str(one)]).output
    assert "left out 1 tensor that the model does not use: spare" in said and "one: 1 model merged" in said
    assert "spare" not in stored(one)
    models = [str(home / name) for name in ("start", "model-0", "model-1")]
    assert "both: 2 models merged" in CliRunner().invoke(app, ["merge", *models, "--out", str(both)]).output
