"""What must not stand in the tree.

1. No file names a package registry or a folder of somebody's machine: both break on the next machine.
2. Nothing in the library can run code out of a file that it reads, or a shell, except where ALLOWED says why.
"""

from __future__ import annotations

import ast
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

FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "torch.load", "os.system", "os.popen"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
}
FORBIDDEN_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}

ALLOWED: dict[tuple[str, str], str] = {}
"""(file under the library, finding) -> why it is safe there."""


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


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything in a file that could run code out of data, or a shell.

    A name imported from its module (``from torch import load``) is followed; a false keyword is no danger.
    """
    tree, real = ast.parse(source), dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                full = f"{origin}.{alias.name}" if origin else alias.name
                real[alias.asname or alias.name] = full
                if full.split(".")[0] in FORBIDDEN_MODULES:
                    yield node.lineno, full.split(".")[0]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        name = real.get(first, first) + dot + rest
        if name in FORBIDDEN_CALLS:
            yield node.lineno, name
        for keyword in node.keywords:
            false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in FORBIDDEN_KEYWORDS and not false:
                yield node.lineno, keyword.arg


def library_dangers() -> dict[tuple[str, str], list[int]]:
    """(file, finding) -> lines, over the library."""
    found: dict[tuple[str, str], list[int]] = {}
    for path in (ROOT / "minillm").rglob("*.py"):
        for line, name in dangers(path.read_text("utf-8")):
            found.setdefault((path.relative_to(ROOT / "minillm").as_posix(), name), []).append(line)
    return found


def test_no_file_names_a_package_registry() -> None:
    found = {str(path.relative_to(ROOT)): hosts(path.read_text("utf-8")) for path in text_files()}
    assert {name: names for name, names in found.items() if names} == {}


def test_no_file_names_a_folder_of_one_machine() -> None:
    found = {str(path.relative_to(ROOT)): machine_paths(path.read_text("utf-8")) for path in text_files()}
    assert {name: paths for name, paths in found.items() if paths} == {}


def test_the_library_runs_no_code_out_of_data() -> None:
    assert {where: lines for where, lines in library_dangers().items() if where not in ALLOWED} == {}


def test_every_exemption_is_still_needed() -> None:
    assert ALLOWED.keys() - library_dangers().keys() == set()


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


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "from torch import load\nload('x')",
        "import torch as t\nt.load('x')",
        "eval('1')",
        "exec('1')",
        "import yaml\nyaml.load('x', Loader=yaml.Loader)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_control_each_danger_is_seen(source: str) -> None:
    assert len(list(dangers(source))) == 1


def test_control_harmless_look_alikes_pass() -> None:
    assert list(dangers("model.eval()\nimport yaml\nyaml.safe_load('x')\nload(trust_remote_code=False)")) == []
