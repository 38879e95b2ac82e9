"""One source in several files. Promises:

1. rows come in the order of sorted names, and each has an id of its own that new files do not change;
2. what cannot be one source is refused before a row is read: no file, several kinds, columns that differ;
3. what breaks is told with its own file, and an id that stands in two files is found, however many rows there are.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from minillm import row_names, row_sources
from minillm.config import load_config
from minillm.errors import ConfigError, DataError
from minillm.preflight import same_source
from minillm.row_names import RowNames
from minillm.row_sources import files_of
from minillm.rows import read_corpus, read_rows
from minillm.study.cells import _source_digest

RECIPE = Path(__file__).resolve().parents[2] / "recipes"


def shard(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    """One file of these rows; its kind is that of its name."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
        return file
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return file


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".jsonl.gz"])
def test_rows_come_in_the_order_of_names_each_with_its_own_id(tmp_path: Path, ending: str) -> None:
    for name in ("c", "a-1", "a"):
        shard(tmp_path, f"{name}{ending}", {"prompt": f"{name} one"}, {"prompt": f"{name} two"})
    shard(tmp_path, f"_{ending}", {"prompt": "of another program"})
    (tmp_path / "README.md").write_text("about them")
    wanted = [("a-1-1", "a-1 one"), ("a-1-2", "a-1 two"), ("a-1", "a one"), ("a-2", "a two")]
    wanted += [("c-1", "c one"), ("c-2", "c two")]
    for source in (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/[a-c]*{ending}"):
        rows, report = read_rows(source)
        assert [(row.uid, row.prompt) for row in rows] == wanted and report.rows == 6
    # One more file before them changes the id of none.
    shard(tmp_path, f"0{ending}", {"prompt": "new"})
    assert [row.uid for row in read_rows(str(tmp_path))[0]][1:] == [uid for uid, _ in wanted]
    assert [row.prompt for row in read_rows(f"{tmp_path}/c*{ending}")[0]] == ["c one", "c two"]


def test_files_of_several_folders_keep_their_folders_in_the_ids(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        shard(tmp_path, f"{folder}/part.jsonl", {"prompt": folder})
    rows, _ = read_rows(f"{tmp_path}/*/part.jsonl")
    assert [(row.uid, row.prompt) for row in rows] == [("x/part-1", "x"), ("y/part-1", "y")]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    shard(tmp_path, "a[1].jsonl", {"prompt": "itself"})
    shard(tmp_path, "a1.jsonl", {"prompt": "what the pattern fits"})
    assert [row.prompt for row in read_rows(str(tmp_path / "a[1].jsonl"))[0]] == ["itself"]


def test_what_cannot_be_one_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file fits this pattern"):
        read_rows(f"{tmp_path}/*.parquet")
    shard(tmp_path, "a.jsonl", {"prompt": "a"})
    shard(tmp_path, "b.parquet", {"prompt": "b"})
    with pytest.raises(DataError, match=r"files of 2 kinds \(a\.jsonl, b\.parquet\), wanted one"):
        read_rows(str(tmp_path))
    with pytest.raises(DataError, match=r"c\.csv is no prompt file"):
        (tmp_path / "c.csv").write_text("x")
        read_rows(f"{tmp_path}/c*")
    assert read_rows(f"{tmp_path}/*.jsonl")[1].rows == 1


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"prompt": "b"}, "column 'response' is text in a.parquet and not there in b.parquet"),
        ({"prompt": "b", "response": ["x"]}, "column 'response' is text in a.parquet and a list of text in b.parquet"),
        ({"prompt": "b", "response": "x", "id": 7}, "column 'id' is not there in a.parquet and a whole number in"),
        ({"prompt": "b", "response": None}, ""),
        ({"prompt": "b", "response": "x", "topic": 3}, ""),
    ],
)
def test_columns_that_decide_what_a_row_is_must_not_differ(tmp_path: Path, other: dict[str, Any], told: str) -> None:
    shard(tmp_path, "a.parquet", {"prompt": "a", "response": "y"})
    shard(tmp_path, "b.parquet", other)
    if told:
        with pytest.raises(DataError, match=told):
            read_rows(str(tmp_path))
    else:
        assert read_rows(str(tmp_path))[1].rows == 2


def test_a_broken_row_is_told_with_its_own_file(tmp_path: Path) -> None:
    shard(tmp_path, "a.jsonl", {"prompt": "a"}, {"prompt": "b"})
    shard(tmp_path, "b.jsonl", {"prompt": "c"}, {"promt": "d"})
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: no prompt"):
        read_rows(str(tmp_path))
    rows, report = read_rows(str(tmp_path), broken="skip", max_broken=1)
    assert len(rows) == 3 and report.skipped[0].where == f"line 2 of {tmp_path / 'b.jsonl'}"


@pytest.mark.parametrize("fresh", [1, 2, row_names.FRESH])
def test_an_id_that_stands_in_two_files_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: int) -> None:
    monkeypatch.setattr("minillm.rows.RowNames", lambda: RowNames(fresh=fresh))
    shard(tmp_path, "a.jsonl", *({"id": f"row-{n}", "prompt": "a"} for n in range(9)))
    shard(tmp_path, "b.jsonl", {"id": "row-x", "prompt": "b"}, {"id": "row-3", "prompt": "b"})
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: id 'row-3' already names line 4 of .*a\.jsonl"):
        read_rows(str(tmp_path))


def test_two_ids_of_one_digest_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_names, "_digest", lambda name: 7)
    names = RowNames(fresh=2)
    for number in range(9):
        assert names.first(f"row-{number}") is None
        names.add(f"row-{number}", f"line {number}")
    assert [names.first(f"row-{number}") for number in range(9)] == [f"line {number}" for number in range(9)]


def test_names_of_many_rows_take_a_few_bytes_each() -> None:
    names = RowNames(fresh=1000)
    for number in range(50_000):
        names.add(f"row-{number}", f"line {number}")
    assert len(names._fresh) < 1000 and len(names._digests) * names._digests.itemsize == 8 * 50_000
    assert names.first("row-31234") == "line 31234" and names.first("row-50000") is None


def test_a_parquet_file_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = shard(tmp_path, "a.parquet", *({"prompt": str(n)} for n in range(5000)))
    taken: list[int] = []
    batches = pyarrow.parquet.ParquetFile.iter_batches

    def counted(table: Any, **settings: Any) -> Any:
        for batch in batches(table, **settings):
            taken.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    assert len(read_rows(str(file))[0]) == 5000
    assert max(taken) == row_sources.PARQUET_ROWS < 5000


def test_a_corpus_may_be_a_folder_of_texts(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n\n{name} two\n")
    documents, _ = read_corpus(str(tmp_path))
    assert [one.uid for one in documents] == ["a-1", "a-3", "b-1", "b-3"]
    with pytest.raises(DataError, match="lies in it"):
        read_rows(str(tmp_path))


def test_a_configuration_takes_folders_and_patterns(tmp_path: Path) -> None:
    recipe = RECIPE / "quickstart" / "sft.yaml"
    (tmp_path / "shards").mkdir()
    for source in (f"{tmp_path}/*.parquet", f"{tmp_path}/shards", "later/"):
        assert load_config(recipe, [f"data.train={source}"]).data.train == source
    with pytest.raises(ConfigError, match="or a folder of them"):
        load_config(recipe, ["data.train=no-such-folder"])


def test_what_is_held_out_is_known_by_any_file_that_it_shares(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        shard(tmp_path, name, {"prompt": name})
    every, train = f"{tmp_path}/*.jsonl", f"{tmp_path}/train-*.jsonl"
    assert [file.name for file in files_of(train)] == ["train-0.jsonl", "train-1.jsonl"]
    assert same_source(every, f"{tmp_path}/test.jsonl") and same_source(str(tmp_path), train)
    assert not same_source(train, f"{tmp_path}/test.jsonl") and not same_source("world:train", "world:test")


def test_a_study_knows_what_all_files_of_a_source_hold(tmp_path: Path) -> None:
    files = [shard(tmp_path, f"{name}.jsonl", {"prompt": name}) for name in "ab"]
    before = _source_digest(str(tmp_path))
    assert before == _source_digest(f"{tmp_path}/*.jsonl") != _source_digest(str(files[0]))
    files[1].write_text(files[1].read_text().replace("b", "c"))
    _source_digest.cache_clear()  # sources are read once a process
    assert _source_digest(str(tmp_path)) != before
