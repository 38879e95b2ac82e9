"""What must not stand in the tree: names of package registries and of folders of somebody's machine, which break on the
next one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("minillm", "teachers", "students", "ds_configs", "recipes", "scripts", "tests", "docs", ".ci")
BINARY = {".pyc", ".png", ".gz", ".parquet", ".safetensors"}

# Cut in two, so that this file passes its own test.
REGISTRIES = tuple(
    "".join(halves)
    for halves in [
        ("pypi", ".org"),
        ("python", "hosted.org"),
        ("download.", "pytorch.org"),
        ("conda.", "anaconda.org"),
        ("hugging", "face.co"),
        ("hf-", "mirror.com"),
        ("--index", "-url"),
        ("--extra-index", "-url"),
        ("--find", "-links"),
    ]
)
MACHINE_PATH = re.compile(r"(?<![\w.~}$/-])/(?:home|root|Users|work|workspace|mnt|opt|scratch)/[\w.-]")


def text_files() -> Iterator[Path]:
    """The project's own text files: those at the top, and those in its folders."""
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".coverage")
    for folder in FOLDERS:
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in BINARY)


def hosts(text: str) -> list[str]:
    """Package registries that a text names, and options that choose one."""
    return [host for host in REGISTRIES if host in text]


def machine_paths(text: str) -> list[str]:
    """Absolute paths that hold on one machine only."""
    return [match.group() for match in MACHINE_PATH.finditer(text)]


def test_no_file_names_a_package_registry() -> None:
    found = {str(path.relative_to(ROOT)): hosts(path.read_text("utf-8")) for path in text_files()}
    assert {name: names for name, names in found.items() if names} == {}


def test_no_file_names_a_folder_of_one_machine() -> None:
    found = {str(path.relative_to(ROOT)): machine_paths(path.read_text("utf-8")) for path in text_files()}
    assert {name: paths for name, paths in found.items() if paths} == {}


def test_the_walk_sees_the_tree() -> None:
    seen = set(text_files())
    assert {ROOT / "setup.cfg", ROOT / "minillm" / "types.py", Path(__file__).resolve()} <= seen


@pytest.mark.parametrize("host", REGISTRIES)
def test_control_a_registry_is_seen(host: str) -> None:
    assert host in hosts(f"pip install from https://{host}/simple")


def test_control_a_machine_path_is_seen() -> None:
    for folder in ("home/me", "root/x", "Users/me", "opt/models"):
        assert machine_paths(f'path = "/{folder}/run"')
    for text in ("https://example.com/home/me", "a/root/b", "~/home/x", "$HOME/work/x", "/tmp/x"):
        assert machine_paths(text) == []
