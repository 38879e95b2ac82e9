"""What stands where a merge is to be written: the same merge is left as it is, another is never lost unasked.

One eta and several behave alike, and so do the command and the functions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from minillm import api, merge_folders, merge_front
from minillm.cli import app
from minillm.errors import DataError
from minillm.merge_models import Merging, merge_at
from minillm.publish import weights_sha256
from minillm.yaml_reader import write_yaml
from tests import tiny
from tests.unit.test_liti_front import config
from tests.unit.test_merge_models import trained


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    start = tiny.save_model(folder / "start", "llama", seed=1)
    for number in range(3):
        trained(start, folder / f"model-{number}", seed=number, spread=0.2)
    tiny.save_model(folder / "teacher", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl", rows=4)
    (folder / "run.yaml").write_text(write_yaml(config(folder).model_dump(mode="json")), encoding="utf-8")
    return folder


def merge(home: Path, out: Path, *words: str, models: str = "01") -> Result:
    folders = [str(home / name) for name in ("start", *(f"model-{number}" for number in models))]
    return CliRunner().invoke(app, ["merge", *folders, "--out", str(out), *words])


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


ETAS = pytest.mark.parametrize("etas", ["0.5", "0,0.5"])


@ETAS
@pytest.mark.parametrize(
    "case",
    [
        ([], "02", "models"),
        ([], "0", "models, weights"),
        (["--method", "lerp"], "01", "method"),
        (["--weights", "3,1"], "01", "weights"),
    ],
)
def test_another_merge_is_never_replaced_unasked(
    home: Path, tmp_path: Path, etas: str, case: tuple[list[str], str, str]
) -> None:
    words, models, differs = case
    out = tmp_path / "out"
    assert merge(home, out, "--eta", etas).exit_code == 0
    before = state(out)
    refused = merge(home, out, "--eta", etas, *words, models=models)
    assert isinstance(refused.exception, DataError)
    assert f"holds another merge (it differs in: {differs}); nothing was touched" in str(refused.exception)
    assert "give another --out, or --fresh" in str(refused.exception)
    assert state(out) == before
    again = merge(home, out, "--eta", etas, *words, "--fresh", models=models)  # the control: it is replaced when asked
    assert again.exit_code == 0, again.output
    assert {path for path in before if state(out).get(path) != before[path]} >= {
        path for path in before if path.endswith("merge.json")
    }


@ETAS
def test_the_same_merge_is_left_as_it_is_wherever_its_models_lie_now(home: Path, tmp_path: Path, etas: str) -> None:
    out, moved = tmp_path / "out", shutil.copytree(home, tmp_path / "moved")
    assert merge(home, out, "--eta", etas).exit_code == 0
    before = state(out)
    again = merge(moved, out, "--eta", etas, "--weights", "2,2")
    assert again.exit_code == 0 and again.output.count("merged already; --fresh starts over") == len(etas.split(","))
    assert state(out) == before
    assert merge(home, out, "--eta", etas, "--fresh").exit_code == 0  # the control: made again
    assert state(out).keys() == before.keys() and state(out) != before


def test_one_eta_that_differs_keeps_all_others_from_being_written(home: Path, tmp_path: Path) -> None:
    """The last one in order is looked at before the first is written."""
    assert merge(home, tmp_path, "--eta", "0.5,1").exit_code == 0
    before = state(tmp_path)
    for words in (["--eta", "0,0.25,1", "--method", "lerp"], ["--eta", "0,1", "--method", "lerp"]):
        assert isinstance(merge(home, tmp_path, *words).exception, DataError)
        assert state(tmp_path) == before and not (tmp_path / "eta-0").exists()
    foreign = tmp_path / "eta-0.75" / "student"
    foreign.mkdir(parents=True)
    (foreign / "mine").write_text("mine", encoding="utf-8")
    before = state(tmp_path)
    assert isinstance(merge(home, tmp_path, "--eta", "0.5,0.75", "--fresh", models="02").exception, DataError)
    assert state(tmp_path) == before, "--fresh replaces what merges made, and nothing beside it first"


def test_an_interrupted_front_goes_on(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write: Callable[..., Any] = Merging.write

    def stopped(self: Merging, into: Path, *, eta: float, **options: Any) -> Any:
        if eta == 1.0:
            raise KeyboardInterrupt
        return write(self, into, eta=eta, **options)

    monkeypatch.setattr(Merging, "write", stopped)
    models = [home / "model-0", home / "model-1"]
    with pytest.raises(KeyboardInterrupt):
        merge_at(home / "start", models, into=tmp_path, method="slerp", etas=(0.0, 0.5, 1.0), say=lambda line: None)
    monkeypatch.undo()
    before = state(tmp_path)
    said: list[str] = []
    merge_at(home / "start", models, into=tmp_path, method="slerp", etas=(0.0, 0.5, 1.0), say=said.append)
    assert {path: state(tmp_path)[path] for path in before} == before
    assert [line.partition(": ")[2][:14] for line in said[:3]] == ["merged already", "merged already", "2 models merge"]


def test_weights_that_were_changed_since_and_records_that_cannot_be_read_are_told(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert merge(home, out).exit_code == 0
    shutil.copy(home / "start" / "model.safetensors", out / "model.safetensors")
    refused = merge(home, out)
    assert "the merged weights, which were changed since" in str(refused.exception)
    for text in ("{", "[]", '{"start": 3, "models": [1, 2], "groups": null}'):
        (out / "merge.json").write_text(text, encoding="utf-8")
        assert isinstance(merge(home, out).exception, DataError), text


def test_how_much_of_an_adapter_is_added_is_part_of_what_is_asked(home: Path, tmp_path: Path) -> None:
    """It stands beside the weights, so their hash does not tell."""
    out = tmp_path / "out"
    assert merge(home, out).exit_code == 0
    record = json.loads((out / "merge.json").read_text(encoding="utf-8"))
    for factor, fits in ((1 + 1e-12, True), (2.0, False)):
        groups = [{**group, "norms": [norm * factor for norm in group["norms"]]} for group in record["groups"]]
        (out / "merge.json").write_text(json.dumps({**record, "groups": groups}), encoding="utf-8")
        again = merge(home, out)
        assert (again.exit_code == 0) is fits and (fits or "how much of the adapters" in str(again.exception))


def test_a_model_and_models_at_several_etas_do_not_share_a_folder(home: Path, tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    assert merge(home, one).exit_code == 0 and merge(home, several, "--eta", "0,1").exit_code == 0
    before = state(tmp_path)
    for out, words, match in (
        (one, ["--eta", "0,1"], "holds a merged model"),
        (several, ["--eta", "1"], r"holds models at several etas \(eta-0, eta-1\), not one"),
    ):
        for fresh in ([], ["--fresh"]):
            with pytest.raises(DataError, match=match):
                raise merge(home, out, *words, *fresh).exception or AssertionError("it was written")
    assert state(tmp_path) == before


def test_a_front_is_refused_before_anything_is_lost_and_fresh_makes_it_again(home: Path, tmp_path: Path) -> None:
    run, out = ["--evaluate", str(home / "run.yaml")], tmp_path / "out"
    assert merge(home, out, "--eta", "0,1", *run).exit_code == 0
    before = state(out)
    for words in (["--eta", "0,1", *run], ["--eta", "0", *run], ["--eta", "0.5", *run], ["--eta", "0.25,0.5"]):
        refused = merge(home, out, "--method", "lerp", *words)
        assert isinstance(refused.exception, DataError) and "in: method)" in str(refused.exception), words
        assert state(out) == before
    again = merge(home, out, "--eta", "0,1", *run)
    assert again.exit_code == 0 and again.output.count("evaluated already") == 2
    fresh = merge(home, out, "--eta", "0,1", "--method", "lerp", "--fresh", *run)
    assert fresh.exit_code == 0, fresh.exception
    assert json.loads((out / "front.json").read_text(encoding="utf-8"))["method"] == "lerp"


def test_a_front_that_fresh_began_and_did_not_end_has_no_record_of_the_one_before(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [home / "model-0", home / "model-1"]
    (tmp_path / "front.json").write_text("{}", encoding="utf-8")

    def stopped(*given: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge_front(home / "start", models, config(home), into=tmp_path, method="lerp", etas=(0.0,), fresh=True,
                    say=lambda line: None)  # fmt: skip
    assert not (tmp_path / "front.json").exists()


def test_from_python_the_same_holds(home: Path, tmp_path: Path) -> None:
    start, models = home / "start", [home / "model-0", home / "model-1"]
    first = merge_folders(start, models, into=tmp_path / "it", method="slerp", say=lambda line: None)
    assert merge_folders(start, models, into=tmp_path / "it", method="slerp", say=lambda line: None) == first
    with pytest.raises(DataError, match="in: method"):
        merge_folders(start, models, into=tmp_path / "it", method="lerp", say=lambda line: None)
    assert weights_sha256(tmp_path / "it") == first.weights_sha256
    other = merge_folders(start, models, into=tmp_path / "it", method="lerp", fresh=True, say=lambda line: None)
    assert weights_sha256(tmp_path / "it") == other.weights_sha256 != first.weights_sha256
