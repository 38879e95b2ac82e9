"""A10: nothing of ours can run code out of a file that it reads, or a shell: every syntax tree is walked for it.

A name counts wherever it is used, called or not, under whatever name it was imported; what is safe is listed with its
reason, and each kind of danger is planted once to see that it is found.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "runpy", "code", "imp", "_pickle"}
NAMES = {
    *("eval", "exec", "compile", "__builtins__", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader"),
}
METHODS = {"extractall", "unpack_archive", "read_pickle", "load_checkpoint"}
"""Of whatever object. The last is DeepSpeed's, which reads pickles."""
KEYWORDS = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True}
"""Arguments, and the only value that they may have."""
NUMPY_LOAD = "numpy.load without allow_pickle=False"
IMPORTERS = ("importlib.import_module", "__import__", "importlib.__import__")
IMPORT, ATTRIBUTE = "a module by a computed name", "an attribute of a module by a computed name"

ALLOWED: dict[tuple[str, str], str] = {
    ("minillm/__init__.py", ATTRIBUTE): "names of the public API, from a fixed table; no file is read",
    ("minillm/loading.py", ATTRIBUTE): "torch by a card's dtype, one of three names that its class allows",
    ("minillm/bench/loss.py", ATTRIBUTE): "torch by a benchmark's dtype, an option with a fixed set of values",
    ("minillm/trackers.py", IMPORT): "one of three trackers, from a fixed table",
}
"""(file, finding) -> why it is safe there."""


def imported(tree: ast.Module) -> dict[str, str]:
    """What each name that an import binds stands for, in full."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module or ''}.{alias.name}"
    return found


def full(node: ast.expr, names: dict[str, str]) -> str:
    """A dotted name with its import undone; "" for any other expression."""
    parts = list[str]()
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything in a file that could run code out of data, or a shell."""
    tree = ast.parse(source)
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                whole = origin + alias.name
                if whole.split(".")[0] in MODULES:
                    yield node.lineno, whole.split(".")[0]
                elif whole in NAMES:
                    yield node.lineno, whole
        elif isinstance(node, ast.Attribute) and node.attr in METHODS:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name | ast.Attribute) and full(node, names) in NAMES:
            if not (isinstance(node, ast.Name) and node.id in names):  # told at its import
                yield node.lineno, full(node, names)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in of_call(node, names))


def of_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = full(node.func, names)
    given = {each.arg: each.value for each in node.keywords}
    for keyword, only in KEYWORDS.items():
        value = given.get(keyword)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is only):
            yield f"{keyword}={ast.unparse(value)}"
    if name == "numpy.load" and "allow_pickle" not in given:
        yield NUMPY_LOAD
    first = node.args[0] if node.args else None
    if name in IMPORTERS and not isinstance(first, ast.Constant):
        yield IMPORT
    of_module = isinstance(first, ast.Name) and first.id in names
    of_module |= first is not None and "sys.modules" in ast.unparse(first)
    if name == "getattr" and of_module and not isinstance(node.args[1], ast.Constant):
        yield ATTRIBUTE


def files() -> list[Path]:
    return sorted([*(ROOT / "minillm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])


def found() -> dict[tuple[str, str], list[int]]:
    """(file, finding) -> lines, over the library and its scripts."""
    told: dict[tuple[str, str], list[int]] = {}
    for path in files():
        for line, name in dangers(path.read_text("utf-8")):
            told.setdefault((path.relative_to(ROOT).as_posix(), name), []).append(line)
    return told


def test_nothing_runs_code_out_of_data() -> None:
    assert {where: lines for where, lines in found().items() if where not in ALLOWED} == {}


def test_every_exemption_is_still_needed_and_says_why() -> None:
    assert ALLOWED.keys() - found().keys() == set()
    assert len(ALLOWED) <= 6 and all(len(reason.split()) >= 5 for reason in ALLOWED.values())


def test_the_walk_sees_the_library_and_the_scripts() -> None:
    seen = {path.relative_to(ROOT).as_posix() for path in files()}
    assert {"minillm/cli/__init__.py", "minillm/types.py", "scripts/sgd_nlg.py"} <= seen and len(seen) > 150


PLANTED = {
    "import pickle": "pickle",
    "import _pickle": "_pickle",
    "from dill import loads": "dill",
    "import marshal as m": "marshal",
    "import shelve": "shelve",
    "import runpy": "runpy",
    "import torch\ntorch.load('x')": "torch.load",
    "from torch import load\nload('x')": "torch.load",
    "import torch as t\nt.load('x')": "torch.load",
    "import torch\nread = torch.load": "torch.load",
    "import torch\nlist(map(torch.load, files))": "torch.load",
    "import torch\ntorch.hub.load('a/b', 'c')": "torch.hub.load",
    "def late():\n    from torch import load as read": "torch.load",
    "eval('1')": "eval",
    "exec('1')": "exec",
    "run = eval": "eval",
    "compile('1', '', 'eval')": "compile",
    "import builtins\nbuiltins.exec('1')": "builtins.exec",
    "import yaml\nyaml.load('x', Loader=yaml.SafeLoader)": "yaml.load",
    "import yaml\nyaml.unsafe_load('x')": "yaml.unsafe_load",
    "import yaml\nclass Mine(yaml.Loader): pass": "yaml.Loader",
    "import subprocess\nsubprocess.run('ls', shell=True)": "shell=True",
    "import subprocess\nsubprocess.run('ls', shell=asked)": "shell=asked",
    "import os\nos.system('ls')": "os.system",
    "from os import popen": "os.popen",
    "import os\nos.popen('ls')": "os.popen",
    "AutoModel.from_pretrained('x', trust_remote_code=True)": "trust_remote_code=True",
    "AutoModel.from_pretrained('x', trust_remote_code=settings.trust)": "trust_remote_code=settings.trust",
    "import numpy\nnumpy.load('x', allow_pickle=True)": "allow_pickle=True",
    "import numpy as np\nnp.load('x')": NUMPY_LOAD,
    "read(x, weights_only=False)": "weights_only=False",
    "archive.extractall('x')": "extractall",
    "import shutil\nshutil.unpack_archive('x')": "unpack_archive",
    "engine.load_checkpoint('x')": "load_checkpoint",
    "import importlib\nimportlib.import_module(name)": IMPORT,
    "from importlib import import_module\nimport_module(f'minillm.{name}')": IMPORT,
    "__import__(name)": IMPORT,
    "import torch\ngetattr(torch, name)": ATTRIBUTE,
    "from minillm import loop\ngetattr(loop, config['kind'])(1)": ATTRIBUTE,
    "import sys\ngetattr(sys.modules[name], kind)": ATTRIBUTE,
}


@pytest.mark.parametrize("source", PLANTED)
def test_control_each_danger_is_found_where_it_is_planted(source: str) -> None:
    assert [name for _, name in dangers(source)] == [PLANTED[source]]


HARMLESS = """
import re, subprocess, yaml, torch, numpy, importlib
model.eval()
re.compile("x")
torch.compile(model)
yaml.safe_load("x")
yaml.compose("x", Loader=yaml.SafeLoader)
subprocess.run(["ls"])
load(trust_remote_code=False)
numpy.load("x", allow_pickle=False)
importlib.import_module("torch")
getattr(settings, name)
getattr(torch, "float32")
json.loads("1")
safetensors.torch.load_file("x")
"""


def test_control_harmless_look_alikes_pass() -> None:
    assert list(dangers(HARMLESS)) == []
