"""Large sources, made ready once and mapped. Promises:

1. the prompts and blocks of the cache are those that are made in memory, with the same hash and the same words;
2. what decides them names the entry: nothing else is taken for it, and an edit shows though size and date are kept;
3. an entry is written whole or not at all, by one process, and one that is not as it was written is made again;
4. no more than a few batches of rows are alive at once, and what a run asks of all rows makes none of them;
5. a run over a table is the run over the same rows in memory, bit for bit.
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import gc
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from minillm import data_cache, fault, prepared, prompt_table
from minillm.api import distill
from minillm.config import SftStage
from minillm.data_cache import DataCache, default_folder
from minillm.errors import ConfigError, DataError, DiskError
from minillm.order import WindowedOrder
from minillm.prepared import Prepared, Wanted, prepared_blocks, prepared_prompts
from minillm.prompt_table import PromptTable, answered, lengths_of, named
from minillm.prompts import data_hash
from minillm.row_sources import CORPUS, PROMPTS, locate
from minillm.stages import usable
from minillm.types import Prompt
from tests import tiny

ROWS = 2500
EOS = tiny.WORDS.index(tiny.EOS)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether sources of more than five rows are large; they are from the start."""

    def set_to(yes: bool) -> None:
        monkeypatch.setattr(prepared, "LARGE_ROWS", 5 if yes else 10**9)

    set_to(True)
    return set_to


def save_rows(file: Path, *, rows: int = ROWS) -> Path:
    """Prompts of three to seven letters; some without a response, some blank, some too long, all with other fields."""
    with file.open("w", encoding="utf-8") as out:
        for n in range(rows):
            letters = [tiny.LETTERS[(n * 7 + step * 3) % 26] for step in range(3 + n % 5 + 20 * (n % 400 == 1))]
            row: dict[str, Any] = {"id": f"row-{n}", "prompt": " ".join(letters), "topic": f"t{n % 3}", "n": n}
            if n % 3:
                row["response"] = [" ".join(letters[:2]), "a b"] if n % 2 else "c d"
            if n % 700 == 3:
                row |= {"prompt": " ", "choices": ["a", "b"]}
            out.write(json.dumps(row) + "\n")
    return file


def wanted_of(source: Path | str, **changes: Any) -> Wanted:
    settings: dict[str, Any] = {
        "origin": locate(str(source), CORPUS if changes.get("corpus") else PROMPTS), "corpus": False, "name": "train",
        "broken": "error", "max_broken": 0, "limit": None, "responses": None, "template": "plain",
        "max_prompt_tokens": 12, "over_long": "keep_right", "max_response_tokens": 8, "eos_id": EOS,
        "need_response": False,
    }  # fmt: skip
    return Wanted(**{**settings, **changes})


SETTINGS: list[dict[str, Any]] = [
    {}, {"over_long": "drop"}, {"need_response": True}, {"limit": 1700}, {"limit": 3, "need_response": True},
    {"responses": 1100}, {"max_response_tokens": 2}, {"template": "alpaca", "max_prompt_tokens": 200},
    {"name": "validation"}, {"eos_id": 5}, {"corpus": True, "name": "corpus", "need_response": True},
]  # fmt: skip


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_prompts_of_the_cache_are_those_made_in_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, large: Callable[[bool], None], changes: dict[str, Any]
) -> None:
    wanted, cache = wanted_of(save_rows(tmp_path / "train.jsonl"), **changes), DataCache(tmp_path / "cache")
    first, again = (prepared_prompts(wanted, tokenizer, cache=cache) for _ in range(2))
    large(False)
    plain = prepared_prompts(wanted, tokenizer, cache=cache)
    assert type(plain.prompts) is list and plain.place == "" and "kept in" in first.place
    for mapped in (first, again):
        assert isinstance(mapped.prompts, PromptTable)
        assert list(mapped.prompts) == plain.prompts == [mapped.prompts[at] for at in range(len(mapped.prompts))]
        assert (mapped.sha256, mapped.words, mapped.report) == (plain.sha256, plain.words, plain.report)
        assert mapped.sha256 == data_hash(mapped.prompts)
    assert again.place == f"{wanted.name}: from the cache {first.place.rpartition(' ')[2]}"
    if changes:  # the test of the test: the settings matter, to the rows or to what is said of them
        other = prepared_prompts(wanted_of(tmp_path / "train.jsonl"), tokenizer, cache=cache)
        assert (other.sha256, other.words, other.report) != (plain.sha256, plain.words, plain.report)


def test_blocks_of_the_cache_are_those_made_in_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, large: Callable[[bool], None]
) -> None:
    for name in ("a", "b"):
        texts = [" ".join(tiny.LETTERS[n % 26 :][: 1 + n % 9]) or " " for n in range(300)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join([*texts, "a <|endoftext|> b"]) + "\n")
    wanted, cache = wanted_of(tmp_path, corpus=True, name="corpus"), DataCache(tmp_path / "cache")
    assert prepared.holds_text(wanted)

    def made(length: int) -> Any:
        return prepared_blocks(wanted, tokenizer, ends=(EOS,), length=length, cache=cache)

    first, again, other = made(7), made(7), made(8)
    large(False)
    plain, plain_other = made(7), made(8)
    assert "kept in" in first.place and "from the cache" in again.place and not plain.place
    for mapped, own in ((first, plain), (again, plain), (other, plain_other)):
        assert list(mapped.blocks) == list(own.blocks) and mapped.sha256 == own.sha256 == data_hash(own.blocks)
        assert (mapped.report, str(mapped.blocks)) == (own.report, str(own.blocks))
    assert first.sha256 != other.sha256 and "2 documents with an end token inside" in first.report
    assert len(list(tmp_path.glob("cache/data/*"))) == 2


@pytest.mark.usefixtures("large")
def test_an_entry_is_taken_for_nothing_else(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file, cache = save_rows(tmp_path / "train.jsonl", rows=40), DataCache(tmp_path / "cache")

    def made(reader: Any = tokenizer, **changes: Any) -> Prepared:
        return prepared_prompts(wanted_of(file, **changes), reader, cache=cache)

    keys = {made(**changes).place.rpartition("/")[2] for changes in SETTINGS[:-1]}
    assert len(keys) == len(SETTINGS) - 1
    words = tiny.tokenizer([*tiny.WORDS[:2], *reversed(tiny.LETTERS)])
    assert "kept in" in made(words).place and made(words).sha256 != made().sha256
    lower = tiny.tokenizer()
    lower.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    assert "kept in" in made(lower).place  # the same vocabulary, read otherwise
    assert "from the cache" in made().place


@pytest.mark.usefixtures("large")
def test_a_chat_template_decides_too_and_the_day_where_it_writes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache, reader = save_rows(tmp_path / "train.jsonl", rows=40), DataCache(tmp_path / "cache"), tiny.tokenizer()

    def made(template: str, day: int) -> str:
        reader.chat_template = "{% for message in messages %}" + template + "{{ message.content }}{% endfor %}"
        monkeypatch.setattr(prepared, "date", SimpleNamespace(today=lambda: datetime.date(2026, 11, day)))
        return prepared_prompts(wanted_of(file, template="chat"), reader, cache=cache).place

    dated = "{% if false %}{{ strftime_now('%d') }}{% endif %}"
    assert "kept in" in made("a ", 1) and "from the cache" in made("a ", 2)
    assert "kept in" in made("b ", 2)
    assert "kept in" in made(dated, 1) and "from the cache" in made(dated, 1) and "kept in" in made(dated, 2)


@pytest.mark.usefixtures("large")
def test_an_edit_shows_though_size_and_date_are_kept(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_cache, "SETTLED_NS", 0)
    file, cache = save_rows(tmp_path / "train.jsonl", rows=40), DataCache(tmp_path / "cache")
    before, at = prepared_prompts(wanted_of(file), tokenizer, cache=cache), file.stat()
    time.sleep(0.05)
    file.write_bytes(file.read_bytes().replace(b'"c d"', b'"d c"', 1))
    os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (at.st_size, at.st_mtime_ns)
    after = prepared_prompts(wanted_of(file), tokenizer, cache=cache)
    assert after.sha256 != before.sha256 and "kept in" in after.place
    sums: list[Path] = []
    monkeypatch.setattr(data_cache, "sha256_of", lambda path: sums.append(path) or "")
    assert cache.sha256_of(file) and not sums  # one that stands as it stood is not read again


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("hurt", ["cut", "flipped", "manifest", "words", "empty", "pickle", "other table", "link"])
def test_what_is_not_as_it_was_written_is_made_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, hurt: str
) -> None:
    file, cache = save_rows(tmp_path / "train.jsonl", rows=40), DataCache(tmp_path / "cache")
    first = prepared_prompts(wanted_of(file), tokenizer, cache=cache)
    place = Path(first.place.rpartition(" ")[2])
    data, manifest, marker = place / "data", place / "manifest.json", tmp_path / "marker"
    whole, rows = data.read_bytes(), list(first.prompts)  # a mapped file that is cut can no longer be read
    if hurt == "cut":
        data.write_bytes(whole[:-9])
    elif hurt == "flipped":
        data.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    elif hurt == "manifest":
        manifest.write_text("[" * 100_000)
    elif hurt == "words":
        manifest.write_text(manifest.read_text().replace("40 rows", "41 rows"))
    elif hurt == "empty":
        manifest.unlink()
    elif hurt == "link":
        data.rename(tmp_path / "moved")
        data.symlink_to(tmp_path / "moved")
    else:
        # Sealed anew, as who can write there could: what is no table of ours is still not read.
        content = whole[:-40] if hurt == "other table" else pickle.dumps(_Marks(marker))
        data.write_bytes(content)
        record = data_cache.Manifest(**json.loads(manifest.read_text()))
        entry = data_cache.FileEntry(bytes=len(content), sha256=data_cache.sha256_of(data))
        sealed = data_cache._sealed(record.model_copy(update={"file": entry}))
        manifest.write_text(sealed.model_dump_json())
    again = prepared_prompts(wanted_of(file), tokenizer, cache=cache)
    assert again.place.startswith(f"train: {place} was not as it was written") and "made again" in again.place
    assert list(again.prompts) == rows and again.sha256 == first.sha256 and not marker.exists()
    assert "from the cache" in prepared_prompts(wanted_of(file), tokenizer, cache=cache).place


@dataclasses.dataclass
class _Marks:
    """Leaves a mark where it is unpickled."""

    at: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.at,))


def children(count: int, act: Callable[[int], int]) -> list[int]:
    """Exit codes of so many processes that run at once."""
    pids = []
    for number in range(count):
        pid = os.fork()
        if not pid:
            code = 99
            try:
                code = act(number)
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.mark.usefixtures("large")
def test_a_writer_that_is_killed_anywhere_leaves_nothing_that_is_taken(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = save_rows(tmp_path / "train.jsonl", rows=40)
    points: list[str] = []
    with fault.planned(lambda name, detail: points.append(name)):
        whole = prepared_prompts(wanted_of(file), tokenizer, cache=DataCache(tmp_path / "whole"))
    assert points.count("disk.write") > 3 and points.count("disk.rename") == 1
    last = points.index("disk.rename")
    for kill in range(len(points)):
        cache = DataCache(tmp_path / f"cache-{kill}")

        def act(_: int, kill: int = kill, cache: DataCache = cache) -> int:
            met = iter(range(len(points)))
            with fault.planned(lambda *_: os._exit(9) if next(met) == kill else None):
                prepared_prompts(wanted_of(file), tokenizer, cache=cache)
            return 0

        assert children(1, act) == [9]
        found = prepared_prompts(wanted_of(file), tokenizer, cache=cache)
        assert ("from the cache" if kill >= last else "kept in") in found.place
        assert found.sha256 == whole.sha256 and list(found.prompts) == list(whole.prompts)
        assert [path.name for path in cache.folder.glob("data/.*")] == []


@pytest.mark.usefixtures("large")
def test_one_process_makes_it_and_the_others_wait(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file, cache = save_rows(tmp_path / "train.jsonl"), DataCache(tmp_path / "cache")

    def act(number: int) -> int:
        found = prepared_prompts(wanted_of(file), tokenizer, cache=cache)
        (tmp_path / f"said-{number}").write_text(f"{found.sha256} {found.place}")
        return 0

    assert children(3, act) == [0, 0, 0]
    said = [(tmp_path / f"said-{number}").read_text() for number in range(3)]
    assert sum("kept in" in line for line in said) == 1 and sum("from the cache" in line for line in said) == 2
    assert len({line.split()[0] for line in said}) == 1


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("at", ["disk.write", "disk.sync", "disk.rename", "disk.make_folder"])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, at: str) -> None:
    file, cache = save_rows(tmp_path / "train.jsonl", rows=40), DataCache(tmp_path / "cache")

    def full(name: str, detail: str) -> None:
        if name == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        fault.planned(full),
        pytest.raises(DiskError, match=r"train: the data cache .*No space left.*(.|\n)*data.cache"),
    ):
        prepared_prompts(wanted_of(file), tokenizer, cache=cache)
    assert "kept in" in prepared_prompts(wanted_of(file), tokenizer, cache=cache).place or at == "disk.rename"


@pytest.mark.usefixtures("large")
def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = save_rows(tmp_path / "train.jsonl", rows=40), DataCache(tmp_path / "cache")
    prepare = prepared._prepare

    def meanwhile(*args: Any, **named: Any) -> Any:
        found = prepare(*args, **named)
        with file.open("a") as more:
            more.write('{"prompt": "a"}\n')
        return found

    monkeypatch.setattr(prepared, "_prepare", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        prepared_prompts(wanted_of(file), tokenizer, cache=cache)
    assert not list(tmp_path.glob("cache/data/*"))


def alive() -> int:
    """Prompts that are in memory."""
    return sum(type(thing) is Prompt for thing in gc.get_objects())


def test_few_prompts_are_alive_at_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, large: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    file, counts, before = save_rows(tmp_path / "train.jsonl", rows=6000), list[int](), alive()
    batch_of = prompt_table.record_batch

    def watched(prompts: Any) -> Any:
        counts.append(alive() - before)
        return batch_of(prompts)

    monkeypatch.setattr(prepared, "record_batch", watched)
    table = prepared_prompts(wanted_of(file), tokenizer, cache=DataCache(tmp_path / "cache")).prompts
    assert isinstance(table, PromptTable) and len(counts) == 6
    # What every stage asks of all rows makes none of them.
    stage = SftStage(name="sft", kind="sft", steps=2, batch=4, optimiser={"lr": 1e-3, "schedule": "constant"})
    rows = usable(stage, table)
    order = WindowedOrder(lengths_of(rows), batch=4, window=2, seed=1)
    taken = [rows[index] for index in order.batch(0)]
    counts.append(alive() - before)
    assert len(taken) == 4 and len(rows) < len(table) and counts[-1] == 4
    assert max(counts) <= prompt_table.BATCH_ROWS + 1
    large(False)  # the test of the test
    plain = prepared_prompts(wanted_of(file), tokenizer, cache=DataCache(tmp_path / "cache")).prompts
    assert alive() - before >= len(plain) > 5000


@pytest.fixture
def both(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, large: Callable[[bool], None]
) -> Iterator[tuple[PromptTable, list[Prompt]]]:
    wanted, cache = wanted_of(save_rows(tmp_path / "train.jsonl")), DataCache(tmp_path / "cache")
    table = prepared_prompts(wanted, tokenizer, cache=cache).prompts
    large(False)
    plain = prepared_prompts(wanted, tokenizer, cache=cache).prompts
    assert isinstance(table, PromptTable) and isinstance(plain, list)
    yield table, plain


def test_a_table_answers_as_a_list_does(both: tuple[PromptTable, list[Prompt]]) -> None:
    table, plain = both
    assert len(table) == len(plain) > 2 * prompt_table.BATCH_ROWS
    assert table[-1] == plain[-1] and table[1020:1030] == plain[1020:1030] and table[::-900] == plain[::-900]
    assert list(lengths_of(table)) == lengths_of(plain)
    some, own = answered(table), answered(plain)
    assert list(some) == own and 0 < len(own) < len(plain) and some[7:9] == own[7:9]
    assert list(lengths_of(some)) == lengths_of(own) and answered(some) is some
    uids = {"row-17", "row-2001", "nobody"}
    assert named(table, uids) == named(plain, uids) and len(named(table, uids)) == 2
    for index in (len(plain), -len(plain) - 1):
        with pytest.raises(IndexError):
            table[index]


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "hf" / "minillm" == DataCache().folder
    monkeypatch.delenv("HF_HOME")
    assert default_folder() == tmp_path / "xdg" / "minillm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "minillm" and DataCache("~/x").folder == tmp_path / "x"

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(ConfigError, match=r"set data\.cache"):
        _ = DataCache().folder


@pytest.mark.parametrize("kind", ["sft", "minillm", "gkd"])
def test_a_run_over_a_table_is_the_run_over_a_list(
    tmp_path: Path, large: Callable[[bool], None], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tiny.save_prompts(tmp_path / "train.jsonl", rows=24)
    teacher, student = (tiny.save_model(tmp_path / f"m{seed}", "gpt2", seed=seed) for seed in (1, 2))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(tiny.LETTERS[n : n + 6]) for n in range(20)))
    stage: dict[str, Any] = {"kind": kind, "steps": 2, "optimiser": {"lr": 1e-2, "schedule": "constant"}}
    stage |= {"prompts": 4, "lm_coefficient": 0.5, "lm_batch": 2} if kind == "minillm" else {"batch": 4}
    logs = []
    for name, yes in (("table", True), ("list", False)):
        large(yes)
        config = tiny.minillm_config(
            tmp_path / "runs", teacher=teacher, student=student, prompts=prompts, name=name, run_stages=(stage,),
            run_data={"train": str(prompts), "max_prompt_tokens": 8, "cache": str(tmp_path / "cache")}
            | ({"corpus": str(text), "corpus_length": 8} if kind == "minillm" else {}),
        )  # fmt: skip
        folder = distill(config)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logs.append(
            (
                [{key: value for key, value in line.items() if "second" not in key} for line in lines],
                (folder / "student" / "model.safetensors").read_bytes(),
                json.loads((folder / "run.json").read_text())["made_from"],
            )
        )
        assert ("train: kept in" in capsys.readouterr().out) == yes
    assert logs[0][1:] == logs[1][1:]
    assert [line.get("loss") for line in logs[0][0]] == [line.get("loss") for line in logs[1][0]]
