"""A6: no name that stands in a file leads outside its folder, by itself or through a link."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minillm import inside as inside_module
from minillm import model_files
from minillm.cards import Card, load_card
from minillm.checkpoints import Checkpoints, OneRank
from minillm.errors import CheckpointError, ConfigError, MinillmError
from minillm.generated import read_generated
from minillm.loading import inspect
from minillm.report_files import set_folders
from minillm.store import RunFolder
from minillm.teacher_cache import read_cache
from minillm.yaml_reader import read_yaml_file
from tests.attacks.hostile import Place, Run, change, quiet, refused

NAMES = (
    *("..", ".", "", "../outside", "../../outside", "OUTSIDE", "a/../../outside", "a\\..\\outside", "..\\outside"),
    *("~", "~root", "~/x", "x\0", "x\n", "x" * 5000, "．．/outside", "․․", "a／b", "%2e%2e", "$HOME", "x:y", "-\u202e"),
)
"""``OUTSIDE`` stands for the absolute path of the folder outside."""


def spelt(name: str, place: Place) -> str:
    return str(place.outside) if name == "OUTSIDE" else name


def configured(place: Place, **values: object) -> Path:
    """The configuration that works, with some values replaced, as a file."""
    file = place.top / "hostile.yaml"
    before = read_yaml_file(place.config)
    file.write_text(json.dumps({**before, **values}))  # which YAML reads
    return file


@pytest.mark.parametrize("name", NAMES)
def test_a_run_cannot_be_called_so(name: str, place: Place, run: Run) -> None:
    refused(run("distill", "--config", configured(place, name=spelt(name, place))), "ConfigError")
    assert not (place.top / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_cannot_be_called_so(name: str, place: Place, run: Run) -> None:
    stage = {"kind": "sft", "steps": 1, "batch": 2, "optimiser": {"lr": 1e-2}}
    stages = [{**stage, "name": spelt(name, place)}, {**stage, "name": "last"}]
    refused(run("distill", "--config", configured(place, stages=stages)), "ConfigError")
    assert not (place.top / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_set_cannot_be_called_so(name: str, place: Place, run: Run) -> None:
    prompts = str(place.top / "prompts.jsonl")
    data = {"train": prompts, "test": {spelt(name, place): prompts, "other": prompts}, "max_prompt_tokens": 8}
    outcome = run("evaluate", place.student, "--config", configured(place, data=data), "--out", place.top / "e")
    refused(outcome, "ConfigError")
    assert not (place.top / "e").exists()


def test_control_honest_names_are_taken(place: Place, run: Run) -> None:
    prompts = str(place.top / "prompts.jsonl")
    data = {"train": prompts, "test": {"one": prompts, "two-2_b": prompts}, "max_prompt_tokens": 8}
    config = configured(place, data=data, name="a/b.c")
    assert run("evaluate", place.student, "--config", config, "--out", place.top / "e").code == 0
    assert sorted(set_folders(place.top / "e")) == ["one", "two-2_b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_cannot_be_called_so(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards are looked for by name in folders; only a path that ends in .yaml is one that the user gave."""
    (place.top / "outside.yaml").write_text("model: x\n")
    (place.top / "here" / "students").mkdir(parents=True)
    monkeypatch.chdir(place.top / "here")
    with pytest.raises(ConfigError):
        load_card(spelt(name, place), kind="students")
    with pytest.raises(ConfigError):
        load_card(f"students/{spelt(name, place)}", kind="students")


@pytest.mark.parametrize("name", NAMES)
def test_results_cannot_name_such_a_set(name: str, place: Place, run: Run) -> None:
    """``report``, ``compare`` and ``judge`` go from a list of sets to the folders of these names."""
    found = place.top / "found"
    (found / "x").mkdir(parents=True)
    (found / "results.json").write_text(json.dumps({"schema": 1, "sets": {spelt(name, place): {}}}))
    for arguments in (
        ("report", f"a={found}", "--out", place.top / "r"),
        ("compare", f"a={found}", f"b={found}"),
        ("judge", found, found, "--url", "http://localhost:9/v1", "--model", "m"),
    ):
        refused(run(*arguments), "DataError", "results.json")
    assert not (place.top / "r").exists()


def test_results_cannot_name_a_link_that_leads_out(place: Place, run: Run) -> None:
    found = place.top / "found"
    found.mkdir()
    (found / "linked").symlink_to(place.outside)
    (found / "results.json").write_text(json.dumps({"schema": 1, "sets": {"linked": {}}}))
    refused(run("report", f"a={found}", "--out", place.top / "r"), "DataError", "a link that leads out")


def test_control_without_the_one_function_a_report_reads_outside(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    found = place.top / "found"
    found.mkdir()
    (found / "results.json").write_text(json.dumps({"schema": 1, "sets": {"../outside": {}}}))
    monkeypatch.setattr(inside_module, "is_component", lambda name: True)
    monkeypatch.setattr(Path, "is_relative_to", lambda *_: True)
    assert set_folders(found)["../outside"].resolve() == place.outside


LINKED: dict[str, str] = {
    "tokenizer.json": "tokenizer.json",
    "chat_template.jinja": "deep/secret.txt",
    "config.json": "config.json",
    "special_tokens_map.json": "secret.json",
    "additional_chat_templates": "deep",
    "additional_chat_templates/a.jinja": "deep/secret.txt",
    "model.safetensors": "model.safetensors",
}


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_model_folder_cannot_link_to_files_outside(name: str, absolute: bool, place: Place, run: Run) -> None:
    """What a tokenizer or template holds is published with the student: it would carry a reader's own file along."""
    target, link = place.outside / LINKED[name], place.student / name
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        link.unlink()
        target = place.top / "teacher" / name  # whole and of the right kind, so that nothing but the link is wrong
    link.symlink_to(target if absolute else Path(*[".."] * (1 + name.count("/"))) / target.relative_to(place.top))
    refused(run("distill", "--config", place.config), "ModelError", "a link that leads out")


def test_a_link_in_a_ring_is_refused(place: Place, run: Run) -> None:
    (place.student / "generation_config.json").unlink()
    (place.student / "generation_config.json").symlink_to("generation_config.json")
    refused(run("distill", "--config", place.config), "ModelError", "link")


def test_control_without_the_guard_a_secret_stands_in_what_is_published(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.student / "chat_template.jinja").symlink_to(place.outside / "deep" / "secret.txt")
    monkeypatch.setattr(model_files, "require_own_files", lambda folder: None)
    inspect(Card(name="it", model=str(place.student))).tokenizer.save_pretrained(place.top / "published")
    assert "another secret" in (place.top / "published" / "chat_template.jinja").read_text()


def test_links_within_a_folder_and_into_the_hubs_cache_are_followed(place: Place) -> None:
    """The control of the refusals, in the layout of the hub's cache: snapshots/REVISION beside blobs."""
    blobs, snapshot = place.top / "models--x" / "blobs", place.top / "models--x" / "snapshots" / "0123"
    shutil.copytree(place.student, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    inspect(Card(name="it", model=str(snapshot)))
    (place.student / "again.json").symlink_to("config.json")
    inspect(Card(name="it", model=str(place.student)))


@pytest.mark.parametrize("name", ["../teacher/model.safetensors", "TEACHER", "x\0", "~/w.safetensors", ".."])
def test_an_index_of_weights_cannot_name_files_outside(name: str, place: Place, run: Run) -> None:
    named = str(place.top / "teacher" / "model.safetensors") if name == "TEACHER" else name
    index = {"metadata": {}, "weight_map": {"model.norm.weight": named}}
    (place.student / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(run("distill", "--config", place.config), "ModelError", "not there")


def test_a_tokenizers_settings_cannot_name_files_outside(place: Place) -> None:
    other = place.top / "teacher" / "tokenizer.json"
    change(other, added_tokens=[{"id": 28, "content": "SECRET", "special": True, "single_word": False,
                                 "lstrip": False, "rstrip": False, "normalized": False}])  # fmt: skip
    for name in ("tokenizer_file", "vocab_file", "merges_file", "chat_template_file", "added_tokens_file"):
        change(place.student / "tokenizer_config.json", **{name: str(other)})
    assert "SECRET" not in inspect(Card(name="it", model=str(place.student))).tokenizer.get_vocab()
    (place.student / "tokenizer.json").unlink()
    with pytest.raises(MinillmError):
        inspect(Card(name="it", model=str(place.student)))


@pytest.fixture
def cached(place: Place, run: Run) -> Path:
    out = place.top / "cached"
    arguments = ("--config", place.config, "--out", out, "--top-k", 2, "decoding.max_new_tokens=10")
    assert run("cache", place.top / "teacher", *arguments).code == 0
    return out


@pytest.mark.parametrize("name", ["../outside/secret.json", "OUTSIDE", "~/x"])
def test_a_manifest_of_a_cache_or_of_text_opens_no_file_that_it_names(
    name: str, cached: Path, place: Place, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which files there are is ours to know; what else a manifest lists is never opened."""
    text = place.top / "taught.jsonl"
    assert run("generate", place.student, "--config", place.config, "--out", text, "--keep-cut").code == 0
    manifests = (cached / "manifest.json", text.with_name("taught.jsonl.manifest.json"))
    plain, opened = Path.open, list[Path]()

    def listening(self: Path, *arguments: object, **options: object) -> object:
        opened.append(self.resolve())
        return plain(self, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", listening)
    for manifest, read in zip(manifests, (read_cache, read_generated), strict=True):
        before = json.loads(manifest.read_text())
        for changed in ({"source": str(place.outside)}, {"sha256": {spelt(name, place): "0" * 64}}, {"file": name}):
            values = {**before, **changed}
            if isinstance(before["sha256"], dict) and "sha256" in changed:
                values["sha256"] = {**before["sha256"], **changed["sha256"]}  # type: ignore[dict-item]
            manifest.write_text(json.dumps(values))
            with contextlib.suppress(MinillmError):
                read(cached if read is read_cache else text)  # type: ignore[operator]
    assert len(opened) > len(manifests)
    assert [path for path in opened if path.is_relative_to(place.outside)] == []


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


COMMANDS: dict[str, Callable[[Place], tuple[object, ...]]] = {
    "distill": lambda place: ("distill",),
    "evaluate": lambda place: ("evaluate", place.student, "--out", place.top / "e"),
    "generate": lambda place: ("generate", place.student, "--out", place.top / "g.jsonl", "--keep-cut"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_ids_of_rows_name_no_files(command: str, place: Place, run: Run) -> None:
    ids = [spelt(name, place) for name in NAMES if name.strip() and "\0" not in name]
    rows: list[dict[str, object]] = [{"id": uid, "prompt": "a b", "response": "c"} for uid in ids]
    (place.top / "prompts.jsonl").write_text(lines(rows))
    before = {path for path in place.top.rglob("*") if path.is_file()}
    outcome = run(*COMMANDS[command](place), "--config", place.config)
    assert outcome.code == 0, outcome
    quiet(outcome)
    new = {path.relative_to(place.top).parts[0] for path in place.top.rglob("*") if path.is_file()}
    assert new - {path.relative_to(place.top).parts[0] for path in before} <= {
        "out",
        "e",
        "g.jsonl",
        "g.jsonl.manifest.json",
    }
    assert len(ids) > 15


@pytest.mark.parametrize("section", ["tensorboard", "wandb", "csv_monitor", "nebula", "comet"])
def test_an_engine_file_cannot_say_where_something_is_written(section: str, place: Place, run: Run) -> None:
    settings = {"zero_optimization": {"stage": 0}, section: {"enabled": True, "output_path": str(place.outside)}}
    (place.top / "engine.json").write_text(json.dumps(settings))
    outcome = run("distill", "--config", place.config, f"engine.student={place.top / 'engine.json'}")
    refused(outcome, "ConfigError", section, "an engine file may not")


def test_an_engine_file_cannot_name_a_profile_to_write(place: Place, run: Run) -> None:
    settings = {"flops_profiler": {"enabled": True, "output_file": str(place.outside / "secret.json")}}
    (place.top / "engine.json").write_text(json.dumps(settings))
    outcome = run("distill", "--config", place.config, f"engine.student={place.top / 'engine.json'}")
    refused(outcome, "ConfigError", "flops_profiler.output_file")


def test_links_in_a_runs_folder_lead_nowhere(place: Place, run: Run) -> None:
    """Whoever made the folder may wait for a run to empty, or write into, what it links to."""
    outside, folder = place.top / "others", place.top / "out" / "r"
    (outside / "kept").mkdir(parents=True)
    (outside / "kept" / "file").write_text("mine")
    (outside / "file").write_text("mine")
    folder.mkdir(parents=True)
    for name in ("student", "stages", "tensorboard", "checkpoints", ".staging-student"):
        (folder / name).symlink_to(outside)
    for name in (".run.json.tmp", ".config.yaml.tmp", "metrics.jsonl", "run.json"):
        (folder / name).symlink_to(outside / "file")
    config = configured(place, name="r")
    assert run("distill", "--config", config, "--fresh").code == 0
    left = {path: path.read_text() for path in outside.rglob("*") if path.is_file()}
    assert left == {outside / "kept" / "file": "mine", outside / "file": "mine"}
    assert (folder / "student").is_dir() and not (folder / "student").is_symlink()


def test_a_lock_that_is_a_link_is_refused(place: Place, run: Run) -> None:
    folder, other = place.top / "out" / "r", place.top / "other"
    folder.mkdir(parents=True)
    other.write_text("mine")
    (folder / ".lock").symlink_to(other)
    refused(run("distill", "--config", configured(place, name="r"), "--fresh"), "DataError")
    assert other.read_text() == "mine"


def test_a_log_that_is_a_link_is_not_cut_back(place: Place) -> None:
    other = place.top / "other"
    other.write_text("mine\nand more\n")
    (place.top / "r").mkdir()
    (place.top / "r" / "metrics.jsonl").symlink_to(other)
    with pytest.raises(CheckpointError, match="a link, wanted the checkpoint's log"):
        RunFolder(place.top / "r", writes=True).cut_log(5)
    assert other.read_text() == "mine\nand more\n"
    (place.top / "r" / "metrics.jsonl").unlink()
    (place.top / "r" / "metrics.jsonl").write_text(other.read_text())
    RunFolder(place.top / "r", writes=True).cut_log(5)  # the control
    assert (place.top / "r" / "metrics.jsonl").read_text() == "mine\n"


REMOVED_BY: dict[str, Callable[[Checkpoints], object]] = {
    "clean": Checkpoints.clean,
    "remove": Checkpoints.remove,
    "remove_set_aside": Checkpoints.remove_set_aside,
    "remove_all_but": lambda checkpoints: checkpoints.remove_all_but(2),
    "set_aside_after": lambda checkpoints: (checkpoints.set_aside_after(0), checkpoints.remove_set_aside()),
    "save": lambda checkpoints: checkpoints.save(step=1, stage="a", fingerprints={}, files={}),
    "choose": lambda checkpoints: checkpoints.choose("auto"),
}
"""What removes checkpoints, or reads or writes one, in a run's folder."""
HIDDEN = (".removed-x", ".staging-step-00000001-00", "step-00000001", "aside-step-00000001-00")


def others(top: Path) -> Path:
    """A folder that is somebody else's, with names in it that checkpoints have."""
    outside = top / "others"
    for name in ("kept", *HIDDEN):
        (outside / name).mkdir(parents=True)
        (outside / name / "file").write_text("mine")
    return outside


def untouched(outside: Path) -> bool:
    return sorted(path.parent.name for path in outside.glob("*/file")) == sorted(("kept", *HIDDEN)) and all(
        sorted(path.name for path in folder.iterdir()) == ["file"] for folder in outside.iterdir()
    )


@pytest.mark.parametrize("act", REMOVED_BY)
@pytest.mark.parametrize("link", HIDDEN)
def test_what_is_removed_of_checkpoints_is_the_link(link: str, act: str, tmp_path: Path) -> None:
    """A link by the name of a checkpoint, or of what is left of one, to a folder that is not the run's."""
    outside, root = others(tmp_path), tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    for name in (link, f"{link}9"):  # of steps 1 and 19, so that one is not among the newest
        (root / name).symlink_to(outside)
    with contextlib.suppress(CheckpointError):  # a link is no checkpoint to go on from
        REMOVED_BY[act](Checkpoints(root, ranks=OneRank(), say=lambda line: None))
    assert untouched(outside)


@pytest.mark.parametrize("act", REMOVED_BY)
def test_checkpoints_that_are_a_link_are_refused(act: str, tmp_path: Path) -> None:
    outside, root = others(tmp_path), tmp_path / "run" / "checkpoints"
    root.parent.mkdir()
    root.symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link, wanted a folder"):
        REMOVED_BY[act](Checkpoints(root, ranks=OneRank(), say=lambda line: None))
    assert untouched(outside)


@pytest.mark.parametrize("link", [*HIDDEN, ""])
def test_runs_clean_follows_no_link(link: str, place: Place, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    outside, folder = others(place.top), place.top / "out" / "r"
    (folder / "checkpoints" if link else folder).mkdir(parents=True)
    (folder / "config.yaml").write_text("name: r\n")
    (folder / "run.json").write_text('{"state": "stopped"}')
    (folder / "checkpoints" / link if link else folder / "checkpoints").symlink_to(outside)
    assert run("runs", "clean", place.top / "out").code == 0 and untouched(outside)
    assert run("runs", place.top / "out").code == 0
    assert run("runs", "verify", place.top / "out").code == (1 if link in {"", "step-00000001"} else 0)
    (folder / "run.json").write_text('{"state": "done"}')
    assert run("runs", "clean", place.top / "out").code == 0 and untouched(outside)
    if link:
        assert not (folder / "checkpoints" / link).is_symlink(), "the link itself is gone"


def test_control_a_removal_that_follows_its_link_empties_what_it_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside, root = others(tmp_path), tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    (root / HIDDEN[0]).symlink_to(outside)
    monkeypatch.setattr(Path, "is_symlink", lambda path: False)
    Checkpoints(root, ranks=OneRank(), say=lambda line: None).clean()
    assert not untouched(outside)
