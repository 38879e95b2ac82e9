"""A1 to A3: a pickle runs code when it is read, and nothing of ours reads one, wherever it is planted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from minillm.checkpoint_manifest import MANIFEST, FileEntry, Manifest, folder_name, manifest_text
from minillm.errors import CacheError, CheckpointError
from minillm.manifests import sha256_of
from minillm.rows import read_rows
from minillm.teacher_cache import IDS, LOGP, read_cache
from tests.attacks.hostile import Bomb, Place, Run, fired, pickled, refused
from tests.faults.test_corruption import three
from tests.faults.toy import store

LONG = "decoding.max_new_tokens=10"
NAMES = ("pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt")


def only_pickled(place: Place, name: str) -> None:
    (place.student / "model.safetensors").unlink()
    (place.student / name).write_bytes(pickled(place.marker))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["distill", "evaluate", "generate", "cache"])
def test_a_folder_with_pickled_weights_only_is_refused_with_the_command_that_converts_it(
    name: str, command: str, place: Place, run: Run
) -> None:
    only_pickled(place, name)
    more = {"distill": (), "cache": ("--top-k", 2)}.get(command, ())
    target = () if command == "distill" else (place.student, "--out", place.top / "out.jsonl")
    outcome = run(command, *target, "--config", place.config, *more)
    refused(outcome, "ModelError", f"only pickled weights ({name})", "save_pretrained(NEW_FOLDER)")
    assert not (place.top / "out").exists() and not (place.top / "out.jsonl").exists()


def test_pickles_beside_good_weights_are_not_read(place: Place, run: Run) -> None:
    for name in (*NAMES, "training_args.bin", "optimizer.pt", "adapter_model.bin", "scheduler.pkl"):
        (place.student / name).write_bytes(pickled(place.marker))
    assert run("evaluate", place.student, "--config", place.config, "--out", place.top / "e").code == 0


@pytest.mark.parametrize("named", ["model.safetensors", "adapter.safetensors"])
def test_a_pickle_under_a_good_name_or_behind_other_weights_is_not_read(named: str, place: Place, run: Run) -> None:
    payload = pickled(place.marker)
    (place.student / "model.safetensors").rename(place.student / "adapter.safetensors")
    (place.student / "pytorch_model.bin").write_bytes(payload)
    if named == "model.safetensors":
        (place.student / named).write_bytes(payload)
    outcome = run("evaluate", place.student, "--config", place.config, "--out", place.top / "e")
    refused(outcome, "ModelError", "safetensors")


def test_an_index_that_names_a_pickle_is_refused(place: Place, run: Run) -> None:
    (place.student / "part.bin").write_bytes(pickled(place.marker))
    (place.student / "model.safetensors.index.json").write_text('{"weight_map": {"w": "part.bin"}, "metadata": {}}')
    refused(run("distill", "--config", place.config), "ModelError", "names part.bin")


def test_control_weights_that_are_loaded_carelessly_do_run(place: Place) -> None:
    file = place.top / "pytorch_model.bin"
    torch.save({"w": Bomb(place.marker)}, file)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(file, weights_only=True)
    assert not place.marker.exists()
    torch.load(file, weights_only=False)
    fired(place.marker)


def as_deepspeed(folder: Path, payload: bytes) -> None:
    """What DeepSpeed's own saving leaves, by its names; its loading calls ``torch.load`` on them."""
    (folder / "global_step3").mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / "global_step3" / name).write_bytes(payload)


def test_shards_of_deepspeed_in_a_run_folder_are_not_read(place: Place, run: Run) -> None:
    for folder in ("out/run", "out/run/checkpoints", "out/run/student"):
        as_deepspeed(place.top / folder, pickled(place.marker))
    outcome = run("distill", "--config", place.config, "--fresh")
    assert outcome.code == 0, outcome


def test_shards_of_deepspeed_as_a_model_are_refused(place: Place, run: Run) -> None:
    (place.student / "model.safetensors").unlink()
    as_deepspeed(place.student, pickled(place.marker))
    refused(run("distill", "--config", place.config), "ModelError", "no weights", "*.safetensors")


@pytest.mark.parametrize("name", ["optim.pt", "rng.pkl", "mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_pickle_in_a_checkpoint_is_refused_even_where_the_manifest_lists_it(
    name: str, listed: bool, place: Place
) -> None:
    three(place.top / "run")
    folder = place.top / "run" / "checkpoints" / folder_name(3)
    file = folder / name
    file.write_bytes(pickled(place.marker))
    if listed:  # whoever plants the one can write the other
        before = json.loads((folder / MANIFEST).read_text())
        files = {**before["files"], name: FileEntry(bytes=file.stat().st_size, sha256=sha256_of(file))}
        (folder / MANIFEST).write_text(manifest_text(Manifest(**{**before, "files": files})))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        store(place.top / "run").choose(folder)
    chosen = store(place.top / "run").choose("auto")
    assert chosen is not None and chosen.manifest.step == 2


def test_an_array_of_objects_in_a_teacher_cache_is_refused(place: Place, run: Run) -> None:
    out = place.top / "cached"
    assert run("cache", place.top / "teacher", "--config", place.config, "--out", out, "--top-k", 2, LONG).code == 0
    read_cache(out)  # the control: as it was written, it is read
    honest = (out / "manifest.json").read_bytes()
    for name in (IDS, LOGP):
        whole = (out / name).read_bytes()
        np.save(out / name, np.array([Bomb(place.marker)], dtype=object), allow_pickle=True)
        manifest = json.loads((out / "manifest.json").read_text())
        manifest["sha256"][name] = sha256_of(out / name)  # consistent, so that the hashes do not refuse it
        (out / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CacheError, match="not what 'minillm cache' writes"):
            read_cache(out)
        np.load(out / name, allow_pickle=True)
        fired(place.marker)
        (out / name).write_bytes(whole)
        (out / "manifest.json").write_bytes(honest)
    read_cache(out)


def test_a_pickled_type_in_a_parquet_file_is_not_read(place: Place) -> None:
    """Versions of pyarrow before 14.0.1 made an object of it while reading (CVE-2023-47248)."""
    names = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    field = pyarrow.field(
        "prompt", pyarrow.string(), metadata={**names, b"ARROW:extension:metadata": pickled(place.marker)}
    )
    file = place.top / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table([pyarrow.array(["a b"])], schema=pyarrow.schema([field])), file)
    stored = pyarrow.parquet.read_metadata(file).schema.to_arrow_schema().field("prompt").metadata
    assert stored[b"ARROW:extension:name"] == b"arrow.py_extension_type"  # it is in the file
    assert [row.prompt for row in read_rows(str(file))[0]] == ["a b"]


def test_a_model_folder_that_is_a_pickle_is_refused(place: Place, run: Run) -> None:
    shutil.rmtree(place.student)
    place.student.write_bytes(pickled(place.marker))
    refused(run("distill", "--config", place.config), "ConfigError", "student")
