"""The library is a house of eight floors, and a file imports only from its own floor or from floors below.

1. Every module stands in the table, and the table names nothing that is not there.
2. An import points down or sideways, late imports inside functions included.
3. No two files import each other, directly or through others.
4. Floors 1 and 2 use the standard library and torch only: pure mathematics.
5. Configuration, order and errors can be imported without torch.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "minillm"

FLOORS: dict[int, tuple[str, ...]] = {
    1: ("exits", "errors", "types", "state"),
    2: (
        "sampling",
        "repetition",
        "divergences",
        "kept",
        "by_definition",
        "credit",
        "ridge",
        "policy_loss",
        "pairwise_loss",
        "weight_merging",
    ),
    3: (
        *("settings", "byte_pieces", "alarm_config", "published", "stage_base", "text_stages", "text_mix"),
        *(
            "minillm_settings",
            "stage_checks",
            "merge_stage",
            "stage_config",
            "stage_order",
            "preference_stage",
            "yaml_reader",
            "data_config",
            "lora_config",
            "config",
        ),
        "bottleneck_config",
        *(
            "figures",
            "cards",
            "hub",
            "model_files",
            "manifests",
            "inside",
            "records",
            *("pair_records", "pair_prompts"),
            "released",
            "shards",
            "row_sources",
            "row_names",
            "rows",
            "slots",
            "prompts",
            "prompt_table",
            "corpus",
            "batches",
            "packing",
            "micro_batches",
            "cache",
        ),
        *("order", "templates", "vocabulary", "world"),
    ),
    4: (
        *("loading", "shapes", "models", "probes", "reading", "decode", "scored_rows", "scoring", "token_loss"),
        *("adapter_files", "adapters", "adaptation", "picked_layers", "lora", "recompute", "work"),
        *("mlps", "bottleneck", "bottleneck_adapters"),
        "meta_models",
    ),
    5: (
        "ranks",
        "engine_settings",
        "engines",
        "collectives",
        "twins",
        "student_engine",
        "teacher_engine",
        "gathers",
        *("engine_state", "engine_files"),
        "bare_student",
        "muon",
        "optimisers",
        "store",
        "changed_run",
        *("fault", "disk", "run_lock", "run_log", "checkpoint_manifest", "checkpoints", "run_listing"),
        "tensor_files",
        "board",
        "phases",
        "stops",
        "lost",
        "guardian",
        "rank_process",
        "supervisor",
        *("hostfile", "leash", "hosts"),
        "own_files",
        "publish",
        "merging",
        *("plots", "merge_figures", "merge_report", "merge_places", "merge_sources", "merge_models"),
        "model_card",
        *("generated", "pair_manifest"),
        "generation_parts",
        "teacher_cache",
        "data_cache",
        "trackers",
    ),
    6: (
        "advantages",
        "alarms",
        "updates",
        "shadow",
        *("speed", "profiling"),
        "practice",
        "left_out",
        "rollout_figures",
        "bad_batches",
        *("gold", "sequence_logps"),
        "references",
        *(
            "preference_reference",
            "preference_chunks",
            "preference_refresh",
            "frozen_models",
            "drawing",
            "preferred_rows",
            "preferences",
        ),
        "distillation",
        "objectives",
        "moments",
        "loop",
        "saving",
        "stages",
        "prepared",
        *("pairs", "preflight", "preference_reading"),
        "stage_merging",
        "progress",
        "terminal",
    ),
    7: (
        *("measures", "evaluation", "generation", "teacher_caching", "results", "statistics"),
        "pair_making",
        *("diagnose", "doctor", "judge", "text_measures", "self_bleu", "exposure", "calibration"),
        *("pair_accuracy", "pair_accuracy_command"),
        "plan",
        *("exposure_run", "calibration_run", "extras", "report", "report_files", "report_html"),
        *("report_style", "report_text", "report_words", "report_extras", "report_sets", "compare"),
        *("report_parts", "report_lengths"),
        *(
            "unfinished",
            "sweep",
            "evaluation_sets",
            "length_buckets",
            "report_samples",
            "run_splits",
            "introduction",
        ),
    ),
    8: ("resuming", "run_training", "liti_front", "bench", "selftest", "study", "cli", "api", "__main__", "__init__"),
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
MATHEMATICS = 2
"""The highest floor that may use nothing beyond the standard library and torch."""
WITHOUT_TORCH = ("errors", "config", "order")


class Import(NamedTuple):
    """One name that a file imports: the line, and what is meant, in full ("torch", "minillm.types")."""

    line: int
    target: str
    late: bool


Sources = Mapping[str, str]
"""Module name without the package ("types", "world.grammar", "world" for its __init__) -> source text."""


def read_package() -> dict[str, str]:
    """The library's sources, every .py file under the package."""
    return {module_name(path.relative_to(PACKAGE)): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}


def module_name(path: Path) -> str:
    """ "world.grammar" for world/grammar.py, "world" for world/__init__.py, "__init__" for the package's own."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(module: str, source: str, known: Sources) -> Iterator[Import]:
    """Every import of a file, at the top or inside functions, relative ones resolved.

    ``from minillm import x`` is an import of the module x where there is one, else of the package itself;
    ``__version__`` is exempt, since it stands in no floor's way. ``import_module("…")`` counts like a statement.
    """
    tree = ast.parse(source)
    eager = set(map(id, eager_nodes(tree)))
    for node in ast.walk(tree):
        late = id(node) not in eager
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node, known)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if full != "minillm.__version__":
                    yield Import(node.lineno, full if full.removeprefix("minillm.") in known else base, late)
        elif isinstance(node, ast.Call) and (name := imported_by_call(node)):
            yield Import(node.lineno, name, late)


def imported_by_call(node: ast.Call) -> str:
    """What ``import_module("…")`` names, or "" for any other call, or where the name is computed."""
    if ast.unparse(node.func).split(".")[-1] not in ("import_module", "__import__") or not node.args:
        return ""
    return str(node.args[0].value) if isinstance(node.args[0], ast.Constant) else ""


def eager_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the file is imported: all but the insides of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from eager_nodes(child)


def absolute(module: str, node: ast.ImportFrom, known: Sources) -> str:
    """The package that a ``from … import`` names, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    is_package = module == "__init__" or any(name.startswith(f"{module}.") for name in known)
    inside = ["minillm", *([] if module == "__init__" else module.split("."))]
    up = node.level - 1 if is_package else node.level
    return ".".join([*inside[: len(inside) - up], *([node.module] if node.module else [])])


def own(target: str) -> str:
    """The library's module that an import means, or "" for another library's."""
    if target == "minillm":
        return "__init__"
    return target.removeprefix("minillm.") if target.startswith("minillm.") else ""


def floor(module: str) -> int:
    """The floor of a module or of anything inside it; 0 for one that the table does not place."""
    return FLOOR_OF.get(module.partition(".")[0], 0)


def unlisted(sources: Sources) -> list[str]:
    """Modules that the table does not place."""
    return sorted({name.split(".")[0] for name in sources} - FLOOR_OF.keys())


def upward(sources: Sources) -> list[str]:
    """Imports that point to a higher floor, one line each."""
    found = []
    for module, source in sources.items():
        here = floor(module)
        for item in imports(module, source, sources):
            target = own(item.target)
            there = floor(target)
            if there > here > 0:
                found.append(f"{module}:{item.line} (floor {here}) imports {target} (floor {there})")
    return found


def graph(sources: Sources) -> dict[str, set[str]]:
    """Which modules of the library each one imports, early or late."""
    edges: dict[str, set[str]] = {}
    for module, source in sources.items():
        targets = {own(item.target) for item in imports(module, source, sources)}
        edges[module] = {target for target in targets if target in sources} - {module}
    return edges


def cycle(sources: Sources) -> list[str]:
    """Modules that import each other in a ring, in order; [] where there is none."""
    edges, done = graph(sources), set[str]()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        found = next(filter(None, (walk(target, [*path, module]) for target in sorted(edges[module]))), [])
        done.add(module)
        return found

    return next(filter(None, (walk(module, []) for module in sorted(edges))), [])


def impure(sources: Sources) -> list[str]:
    """Imports on the floors of pure mathematics that are neither torch, nor ours, nor the standard library."""
    return [
        f"{module}:{item.line} imports {item.target}"
        for module, source in sources.items()
        if 0 < floor(module) <= MATHEMATICS
        for item in imports(module, source, sources)
        if item.target.split(".")[0] not in {"torch", "minillm", *sys.stdlib_module_names}
    ]


def brings_torch(module: str, sources: Sources) -> bool:
    """True where importing the module runs an import of torch, in it or in what it imports."""
    seen, queue = {module}, [module]
    while queue:
        here = queue.pop()
        for item in imports(here, sources[here], sources):
            if item.late:
                continue
            if item.target.split(".")[0] == "torch":
                return True
            target = own(item.target)
            if target in sources and target not in seen:
                seen.add(target)
                queue.append(target)
    return False


def test_every_module_stands_in_the_table() -> None:
    assert unlisted(read_package()) == [], "give these a floor in FLOORS"


def test_the_table_names_only_modules_that_are_there() -> None:
    there = {name.split(".")[0] for name in read_package()}
    assert sorted(FLOOR_OF.keys() - there) == []


def test_imports_point_down_or_sideways() -> None:
    assert upward(read_package()) == []


def test_no_two_files_import_each_other() -> None:
    assert cycle(read_package()) == []


def test_the_mathematics_needs_torch_alone() -> None:
    assert impure(read_package()) == []


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_modules_do_not_bring_torch(module: str) -> None:
    assert not brings_torch(module, read_package())


def test_the_walk_sees_the_whole_package() -> None:
    files = [path for path in PACKAGE.glob("**/*") if path.suffix == ".py"]
    assert len(read_package()) == len(files) > len(FLOORS)


@pytest.mark.parametrize(
    "statement",
    [
        "from minillm.loop import train",
        "from minillm import loop",
        "from .loop import train",
        "from . import loop",
        "import minillm.loop",
        "import minillm",
        "from minillm import load_config",
        "def late():\n    from minillm.loop import train",
        "def late():\n    import importlib\n    importlib.import_module('minillm.loop')",
    ],
)
def test_control_an_upward_import_is_seen(statement: str) -> None:
    planted = {"types": statement, "loop": "", "__init__": ""}
    assert len(upward(planted)) == 1


def test_control_a_relative_import_in_a_subpackage_is_seen() -> None:
    planted = {"world": "", "world.grammar": "from ..loop import train", "loop": ""}
    assert len(upward(planted)) == 1
    assert upward({**planted, "world.grammar": "from .words import NAMES", "world.words": ""}) == []


def test_control_downward_imports_are_allowed() -> None:
    planted = {"loop": "from minillm import __version__\nfrom minillm.types import Prompt\nimport json", "types": ""}
    assert upward(planted) == []


def test_control_a_ring_is_seen() -> None:
    planted = {"credit": "from minillm.sampling import draw", "sampling": "def f():\n    import minillm.credit"}
    assert cycle(planted) == ["credit", "sampling", "credit"]


def test_control_a_foreign_library_in_the_mathematics_is_seen() -> None:
    assert impure({"credit": "import math\nimport torch.nn\nfrom numpy import array"}) == ["credit:3 imports numpy"]


def test_control_an_unlisted_module_is_seen() -> None:
    assert unlisted({"types": "", "utils": ""}) == ["utils"]


def test_control_torch_through_another_file_is_seen() -> None:
    assert brings_torch("config", {"config": "import minillm.types", "types": "from torch import Tensor"})
    assert not brings_torch("config", {"config": "def late():\n    import torch"})
