"""A teacher that read the references once teaches as if it stood beside the student; and what is not its own is refused
before any model is loaded.

1. With all ids kept, training is that with the teacher; with few, nearly.
2. A cache is written whole or not at all, and never over anything else.
3. Another teacher, other rows, another template or tokenizer, an edited or missing file: each is told and refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minillm import api, distill, teacher_cache, teacher_caching
from minillm.config import RunConfig
from minillm.divergences import kept_and_rest
from minillm.errors import CacheError, ConfigError, DataError, NonFinite, UnsupportedCombination
from minillm.pairs import check_alone
from minillm.preflight import read_split
from minillm.teacher_cache import FILES, IDS, LOGP, MANIFEST, ROWS, id_kind, read_cache
from minillm.teacher_caching import cache_teacher
from tests import tiny

REAL = len(tiny.WORDS)
FEW = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with padded rows, another one, a student, prompts, and caches of all ids and of few."""
    made = tmp_path_factory.mktemp("cache")
    tiny.save_model(made / "teacher", "gpt2", seed=1, rows=32)
    tiny.save_model(made / "other", "gpt2", seed=5)
    tiny.save_model(made / "student", "gpt2", seed=2)
    tiny.save_prompts(made / "prompts.jsonl")
    for name, top_k, precision in (("all", REAL, "float32"), ("few", FEW, "float16")):
        cache_teacher(made / "teacher", config(made), out=made / name, top_k=top_k, precision=precision)  # type: ignore[arg-type]
    return made


def config(place: Path, *, cache: str | None = None, name: str = "run", **changes: Any) -> RunConfig:
    data = {"train": str(place / "prompts.jsonl"), "max_prompt_tokens": 8, **changes.pop("data", {})}
    cached = {} if cache is None else {"teacher_cache": str(place / cache)}
    stage = {"kind": "kd", "steps": 3, "batch": 5, "micro_batch": 2, "teacher_share": 0.8, "optimiser": {"lr": 1e-2}}
    values: dict[str, Any] = {
        "name": name, "out": str(place / "runs"), "student": str(place / "student"), "teacher": str(place / "teacher"),
        "data": data, "decoding": {"max_new_tokens": 10}, "engine": {"student": "zero0"},
        "evaluation": {"batch": 7}, "stages": ({**stage, **cached},), **changes,
    }  # fmt: skip
    return RunConfig(**values)


def trained(place: Path, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and gradient norms of the steps, and the student's weights after them."""
    folder = distill(config(place, **options), fresh=True)
    figures = [line[name] for line in tiny.logged(folder) for name in ("loss", "grad_norm")]
    return figures, load_file(folder / "student" / "model.safetensors")


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((weight - other[name]).abs().max()) for name, weight in one.items())


def test_with_all_ids_training_is_that_with_the_teacher_and_with_few_nearly(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_teacher = trained(place, name="with")
    monkeypatch.setattr(api, "load_teacher", lambda *_, **__: pytest.fail("the teacher was loaded"))
    same = trained(place, cache="all", name="all")
    alone = trained(place, cache="all", name="alone", teacher=None)
    few = trained(place, cache="few", name="few")
    assert same[0] == pytest.approx(with_teacher[0], rel=1e-5)
    assert alone[0] == same[0] and apart(alone[1], same[1]) == 0.0
    # Few ids: less, since a bucket hides what is in it, and not much less; which is the control of the comparison.
    assert 0.7 * with_teacher[0][0] < few[0][0] < 0.99 * with_teacher[0][0]


def test_what_is_stored_is_what_the_teacher_says(place: Path) -> None:
    """Row by row with transformers alone."""
    cache, model = read_cache(place / "few"), AutoModelForCausalLM.from_pretrained(place / "teacher")
    settings = config(place)
    rows = read_split(
        settings, str(settings.data.train), pair=check_alone(settings, str(place / "teacher")), name="train",
        need_response=True,
    ).prompts  # fmt: skip
    assert len(rows) == len(cache.places) == cache.manifest.rows
    assert sum(len(row.response_ids) for row in rows) == cache.manifest.tokens == len(cache.ids)
    for row in rows[::5]:
        ids_1L = torch.tensor([row.ids + row.response_ids])
        with torch.no_grad():
            logp_NV = model(ids_1L).logits[0, len(row.ids) - 1 : -1, :REAL].log_softmax(-1)
        kept = cache.of([row], device="cpu")
        assert torch.equal(kept.ids_NK.sort(dim=1).values, logp_NV.topk(FEW, dim=1).indices.sort(dim=1).values)
        torch.testing.assert_close(kept.logp_NJ, kept_and_rest(logp_NV, kept.ids_NK), rtol=2e-3, atol=2e-3)
        assert kept.logp_NJ.exp().sum(dim=1).tolist() == pytest.approx([1.0] * len(row.response_ids), abs=1e-6)
    both = cache.of([rows[3], rows[0]], device="cpu").ids_NK
    assert torch.equal(both[: len(rows[3].response_ids)], cache.of([rows[3]], device="cpu").ids_NK)
    assert cache.of([], device="cpu").ids_NK.shape == (0, FEW)


def test_files_are_as_small_as_they_can_be_and_hold_no_objects(place: Path) -> None:
    arrays = {name: np.load(place / "few" / name, allow_pickle=False) for name in (IDS, LOGP)}
    tokens = read_cache(place / "few").manifest.tokens
    assert arrays[IDS].dtype == np.uint8 and arrays[IDS].shape == (tokens, FEW)
    assert arrays[LOGP].dtype == np.float16 and arrays[LOGP].shape == (tokens, FEW + 1)
    assert {file.name for file in (place / "few").iterdir()} == {*FILES}
    assert [str(id_kind(ids)) for ids in (256, 257, 65_536, 65_537)] == ["uint8", "uint16", "uint16", "uint32"]


def test_a_second_call_leaves_it_and_another_question_is_refused(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    cache_teacher(place / "teacher", config(place), out=out, top_k=3)
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()}
    cache_teacher(place / "teacher", config(place), out=out, top_k=3)
    for changes in ({"top_k": 2}, {"top_k": 3, "precision": "float32"}):
        with pytest.raises(DataError, match=rf"differs in: {list(changes)[-1]}.*nothing was touched"):
            cache_teacher(place / "teacher", config(place), out=out, **changes)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="differs in: weights"):
        cache_teacher(place / "other", config(place), out=out, top_k=3)
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()} == before
    assert cache_teacher(place / "teacher", config(place), out=out, top_k=2, fresh=True).manifest.asked.top_k == 2


@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_no_cache_is_never_replaced(place: Path, tmp_path: Path, fresh: bool) -> None:
    shutil.copytree(place / "few", tmp_path / "cache")
    note = tmp_path / "cache" / "note.txt"
    note.write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="is no teacher cache; nothing was touched"):
        cache_teacher(place / "teacher", config(place), out=tmp_path / "cache", top_k=2, fresh=fresh)
    assert note.read_text(encoding="utf-8") == "mine"


def test_an_interrupted_call_leaves_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    plain = teacher_caching._said

    def stopped(*arguments: Any, **options: Any) -> Any:
        reads.append(1)
        if len(reads) == 2:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(teacher_caching, "_said", stopped)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(place / "teacher", config(place), out=tmp_path / "cache", top_k=2)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_for_which_there_is_no_room_is_told_before_the_teacher_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files grow as they are filled: a full disk would end the process hours later, without a word."""
    out, free = tmp_path / "cache", [0]
    size = sum((place / "few" / file).stat().st_size for file in (IDS, LOGP, ROWS))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    with monkeypatch.context() as patch:
        patch.setattr(teacher_caching, "load_teacher", lambda *_, **__: pytest.fail("the teacher was loaded"))
        for there in (0, size // 2):
            free[0] = there
            with pytest.raises(DataError, match=rf"cache: needs about [\d,]+ bytes, and {there:,} are free") as caught:
                cache_teacher(place / "teacher", config(place), out=out, top_k=FEW)
            assert "a smaller --top-k" in str(caught.value) and list(tmp_path.iterdir()) == []
        # What a killed call left makes room.
        (tmp_path / ".staging-cache").mkdir()
        (tmp_path / ".staging-cache" / IDS).write_bytes(bytes(2 * size))
        with pytest.raises(pytest.fail.Exception, match="the teacher was loaded"):
            cache_teacher(place / "teacher", config(place), out=out, top_k=FEW)
    free[0] = 2 * size
    cache_teacher(place / "teacher", config(place), out=out, top_k=FEW)
    told = int(re.search(r"about ([\d,]+) bytes", capsys.readouterr().out)[1].replace(",", ""))  # type: ignore[index]
    assert told == pytest.approx(size, rel=0.2) and [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_a_teacher_that_says_no_numbers_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = teacher_caching.likeliest

    def broken(hidden_nH: Tensor, **more: Any) -> Any:
        return plain(hidden_nH * float("nan"), **more)

    monkeypatch.setattr(teacher_caching, "likeliest", broken)
    with pytest.raises(NonFinite, match="says no numbers in a batch of rows 'row-"):
        cache_teacher(place / "teacher", config(place), out=tmp_path / "cache", top_k=2)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing may be loaded."""
    monkeypatch.setattr("minillm.stages.load", lambda *_, **__: pytest.fail("a model was loaded"))
    yield


@pytest.mark.usefixtures("light")
class TestRefused:
    """Each before a model is loaded and before a folder is made."""

    def refused(self, place: Path, told: str, **options: Any) -> None:
        with pytest.raises(CacheError, match=told):
            distill(config(place, name="refused", **{"cache": "few", **options}))
        assert not (place / "runs" / "refused").exists()

    def test_the_control_gets_as_far_as_loading(self, place: Path) -> None:
        with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
            distill(config(place, cache="few", name="control"), fresh=True)

    def test_another_teacher(self, place: Path) -> None:
        self.refused(place, "and the run's teacher other has", teacher=str(place / "other"))

    def test_another_template(self, place: Path) -> None:
        self.refused(
            place,
            "read with template 'plain', and data.template is",
            data={"template": "alpaca", "max_prompt_tokens": 30},
        )

    def test_other_rows(self, place: Path, tmp_path: Path) -> None:
        lines = (place / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        first = json.loads(lines[0]) | {"response": "z"}
        for name, rows, told in (
            ("edited", [json.dumps(first), *lines[1:]], r"1 rows of .* were other tokens when it was made \('row-0'\)"),
            ("more", [*lines, json.dumps(first | {"id": "new"})], r"1 rows of .* are not in it \('new'\)"),
        ):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
            self.refused(place, told, data={"train": str(tmp_path / f"{name}.jsonl")})

    def test_another_tokenizer(self, place: Path, tmp_path: Path) -> None:
        words = [*tiny.WORDS[:2], *reversed(tiny.WORDS[2:])]
        tiny.save_model(tmp_path / "student", "gpt2", seed=2, words=words)
        self.refused(place, "has another tokenizer than student", student=str(tmp_path / "student"), teacher=None)

    @pytest.mark.parametrize("file", [IDS, LOGP, ROWS])
    def test_an_edited_and_a_missing_file(self, place: Path, tmp_path: Path, file: str) -> None:
        shutil.copytree(place / "few", tmp_path / "cache")
        with (tmp_path / "cache" / file).open("r+b") as stream:
            stream.seek(-2, 2)
            stream.write(b"!")
        self.refused(place, f"{file} is not the file that", cache=str(tmp_path / "cache"))
        (tmp_path / "cache" / file).unlink()
        self.refused(place, "SHA-256 no file, wanted", cache=str(tmp_path / "cache"))

    def test_a_broken_manifest(self, place: Path, tmp_path: Path) -> None:
        shutil.copytree(place / "few", tmp_path / "cache")
        manifest = tmp_path / "cache" / MANIFEST
        for text, told in (("[]", "no JSON object"), ("{", "not JSON"), ("{}", "asked")):
            manifest.write_text(text, encoding="utf-8")
            self.refused(place, told, cache=str(tmp_path / "cache"))
        manifest.unlink()
        self.refused(place, "has no manifest.json", cache=str(tmp_path / "cache"))


def test_a_run_on_some_of_the_rows_may_use_it(place: Path) -> None:
    losses, _ = trained(place, cache="all", name="some", data={"train_limit": 11})
    want, _ = trained(place, name="some-taught", data={"train_limit": 11})
    assert losses == pytest.approx(want, rel=1e-5)


def test_what_cannot_be_meant_is_told(place: Path) -> None:
    with pytest.raises(ConfigError, match="wanted 1 to 28"):
        cache_teacher(place / "teacher", config(place), out=place / "wrong", top_k=REAL + 1)
    with pytest.raises(UnsupportedCombination, match="distils a teacher, but the run names none"):
        config(place, teacher=None)
    with pytest.raises(DataError, match="no such folder; wanted one that 'minillm cache' wrote"):
        distill(config(place, cache="nowhere"))
    assert not (place / "wrong").exists()


def test_a_run_that_is_done_is_of_its_cache(place: Path, tmp_path: Path) -> None:
    """The manifest's hash is among what a run is made from."""
    folder = distill(config(place, cache="few", name="of-cache"), fresh=True)
    made = json.loads((folder / "run.json").read_text(encoding="utf-8"))["made_from"]
    assert made["teacher cache of kd"] == teacher_cache.sha256_of(place / "few" / MANIFEST)
