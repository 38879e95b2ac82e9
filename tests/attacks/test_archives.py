"""A7: no archive is unpacked, and a compressed file of rows is read line by line."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
import zipfile

import pytest

from minillm.errors import DataError
from minillm.row_sources import MAX_LINE_BYTES
from minillm.rows import read_rows
from tests.attacks.hostile import Place, Run, refused

ESCAPE = "../outside/planted"


def tar() -> bytes:
    """One member that climbs out, and one that is a link out."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo(ESCAPE)
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "../outside"
        archive.addfile(link)
    return packed.getvalue()


def zipped() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(ESCAPE, "x")
    return packed.getvalue()


ARCHIVES = {"rows.tar.gz": tar, "rows.tgz": tar, "rows.zip": zipped, "rows.jsonl.tar": tar}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_no_file_of_rows(name: str, place: Place, run: Run) -> None:
    (place.top / name).write_bytes(ARCHIVES[name]())
    refused(run("distill", "--config", place.config, f"data.train={place.top / name}"), "ConfigError", "data.train")


@pytest.mark.parametrize("what", ["tar", "zip"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_an_archive_under_another_name_is_not_unpacked(what: str, name: str, place: Place, run: Run) -> None:
    (place.top / name).write_bytes({"tar": tar, "zip": zipped}[what]())
    refused(run("distill", "--config", place.config, f"data.train={place.top / name}"), "DataError", name)


@pytest.mark.parametrize("what", ["tar", "zip"])
def test_an_archive_is_no_model(what: str, place: Place, run: Run) -> None:
    file = place.top / "model.zip"
    file.write_bytes({"tar": tar, "zip": zipped}[what]())
    refused(run("distill", "--config", place.config, f"student={file}"), "ConfigError", "no model folder")
    (place.student / "model.safetensors").write_bytes(file.read_bytes())
    refused(run("distill", "--config", place.config), "ModelError", "not a whole safetensors file")


def test_control_careless_unpacking_does_climb_out(place: Place) -> None:
    (place.top / "at").mkdir()
    with tarfile.open(fileobj=io.BytesIO(tar())) as archive:
        # Newer Pythons refuse it unless they are told not to.
        trusting = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}
        archive.extractall(place.top / "at", **trusting)
    (place.outside / "planted").unlink()


@pytest.mark.parametrize("lines", [False, True])
def test_a_bomb_of_one_line_or_of_blank_ones_fills_no_memory(lines: bool, place: Place) -> None:
    file = place.top / "rows.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=9) as packed:
        packed.write(b'{"prompt": "')
        for _ in range(96):
            packed.write(b"\n" * 2**10 if lines else b"a" * 2**20)
    assert file.stat().st_size < 2**18
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="line 1"):
            read_rows(str(file))
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_LINE_BYTES
    finally:
        tracemalloc.stop()
