"""The parity matrix: where the student lives, where the teacher lives, what is trained and in which precision.

Each cell is five MiniLLM steps on two ranks against the same steps in one process, or the reason why the configuration
check refuses it. ``python -m tests.dist.matrix`` (``scripts/parity.sh``) measures all cells and writes docs/parity.md;
with words (``lora``, ``zero2.tp``) it measures the cells whose names have one of them, and prints. ``test_matrix`` reads
the file; ``test_parity`` runs eight of the cells (``eight``), and looks at more of what a run does.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from minillm.run_log import OF_THE_PROCESS
from minillm import distill
from minillm.errors import MinillmError
from minillm.pairs import check_pair
from tests import quick, tiny
from tests.dist import parity_worker
from tests.dist.parity_worker import PLACEMENTS
from tests.dist.ranks import ROOT, start_ranks

TABLE = ROOT / "docs" / "parity.md"
STUDENTS = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
HOW = ("", ".lora", ".bf16", ".lora.bf16")
TITLES = {
    "": "All weights, fp32",
    ".lora": "LoRA, fp32",
    ".bf16": "All weights, bf16",
    ".lora.bf16": "LoRA, bf16",
}
CELLS = [f"{student}.{placement}{how}" for how, student, placement in itertools.product(HOW, STUDENTS, PLACEMENTS)]
PREFERRED = (
    *("zero0.replicated", "zero1.zero3", "zero2-offload.offload", "zero3.tp", "zero3-offload.replicated"),
    *("zero2.offload.lora", "zero3.zero3.lora", "zero3.zero3", "zero2-offload.zero3", "zero2.replicated"),
    *("zero3.replicated", "zero2.zero3", "zero3-offload.zero3"),
)
"""For the default run: the first eight of them that the table has a number for."""
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest deviation of any figure of any step, relative to the single process."""
SMALL = 0.1
"""A figure below it deviates by its share of this."""
SAME = (
    *("loss", "single_loss", "long_loss", "lm_loss", "reverse_kl", "tokens", "mean_length", "advantage_std"),
    *("grad_norm", "sampled_tokens", "kept_rows", "anchor_kl", "anchor_drift"),
)
OWN_COUNT = {"teacher_forwards", *OF_THE_PROCESS}
"""Of a rank, not of the text."""


def figures(folder: Path, name: str, *, steps: int = parity_worker.STEPS) -> list[dict[str, float]]:
    """What is compared, step by step."""
    lines = tiny.logged(folder / name)
    assert len(lines) == steps, name
    level = {key for line in lines for key in line if key.startswith("teacher_") and key not in OWN_COUNT}
    return [{key: line.get(key, 0.0) for key in (*SAME, *sorted(level))} for line in lines]


def deviations(one: list[dict[str, float]], other: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure the largest of any step; the first run is what the second is measured against."""
    pairs = list(zip(one, other, strict=True))
    assert all(left.keys() == right.keys() for left, right in pairs)
    return {
        key: max(abs(left[key] - right[key]) / max(abs(left[key]), SMALL) for left, right in pairs) for key in one[0]
    }


def precision_of(cell: str) -> str:
    """fp32 or bf16."""
    return "bf16" if cell.endswith(".bf16") else "fp32"


def single_of(cell: str) -> str:
    """The cell that the single process runs: the plainest that its precision allows."""
    _, _, *how = cell.split(".")
    stage = "zero0" if precision_of(cell) == "fp32" else "zero1"
    return ".".join((stage, "replicated", *how))


def reason(folder: Path, cell: str) -> str | None:
    """Why the check before a run refuses the cell, in words without paths; None where it takes it."""
    try:
        check_pair(parity_worker.config(folder, f"{cell}.five"))
    except MinillmError as error:
        words = str(error).split("\n")[0]
        if "lora: no setting of this name" in words:
            return "lora is not built"
        if found := re.search(r"\bplacement: got ('\w+'), wanted", words):
            return f"placement {found[1]} is not built"
        return re.sub(rf"{re.escape(str(folder))}/?", "", words)
    return None


def eight() -> list[str]:
    """The cells of the default run."""
    table = read(TABLE.read_text(encoding="utf-8"))
    return [cell for cell in PREFERRED if isinstance(table[cell], float)][:8]


def measured(folder: Path, cells: Iterable[str]) -> dict[str, float]:
    """The largest deviation of each cell: all on two ranks in one launch, and their twins in this process."""
    named = {cell: f"{cell}.five" for cell in cells}
    singles = {single_of(cell) for cell in named}
    start_ranks("tests.dist.parity_worker", str(folder), *named.values(), limit_s=7200)
    for cell in sorted(singles):
        run = parity_worker.config(folder, f"{cell}.five").model_copy(update={"name": f"alone.{cell}"})
        with quick.undrawn():
            distill(run)
    read = {name: figures(folder, name, steps=parity_worker.FIVE) for name in named.values()}
    alone = {cell: figures(folder, f"alone.{cell}", steps=parity_worker.FIVE) for cell in singles}
    return {cell: max(deviations(alone[single_of(cell)], read[name]).values()) for cell, name in named.items()}


def render(found: Mapping[str, float | str]) -> str:
    """The table: by cell its deviation, or why it is refused."""
    reasons = sorted({value for value in found.values() if isinstance(value, str)})
    parts = [HEAD.format(**TOLERANCE)]
    for how in HOW:
        parts.append(f"## {TITLES[how]}\n\n| student | {' | '.join(PLACEMENTS)} |\n|---|{'---|' * len(PLACEMENTS)}")
        for student in STUDENTS:
            values = [found[f"{student}.{placement}{how}"] for placement in PLACEMENTS]
            shown = [f"{v:.1e}" if isinstance(v, float) else f"refused ({reasons.index(v) + 1})" for v in values]
            parts[-1] += f"\n| `{student}` | {' | '.join(shown)} |"
    if reasons:
        parts.append("## Refused\n\n" + "\n".join(f"{at}. {words}" for at, words in enumerate(reasons, 1)))
    return "\n\n".join(parts) + "\n"


def read(text: str) -> dict[str, float | str]:
    """What ``render`` was given."""
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", text, flags=re.MULTILINE))
    found: dict[str, float | str] = {}
    for how in HOW:
        part = text.partition(f"## {TITLES[how]}\n")[2].partition("\n## ")[0]
        lines = re.findall(r"^\|.+\|$", part, flags=re.MULTILINE)
        rows = [[value.strip(" `") for value in line.strip("|").split("|")] for line in lines]
        for student, *values in rows[2:]:
            for placement, value in zip(rows[0][1:], values, strict=True):
                number = re.fullmatch(r"refused \((\d+)\)", value)
                found[f"{student}.{placement}{how}"] = reasons[number[1]] if number else float(value)
    return found


HEAD = """# Parity

Five MiniLLM steps on two ranks (gloo, CPU) against the same steps in one process: where the student lives (an engine file), where
the teacher lives (`placement` of its card), what is trained, and in which precision. A number is the largest deviation of any figure in
the log (losses, reverse KL, gradient norm, lengths, the teacher's level) at any step, relative to the single process, and to 0.1 where
that is smaller. Limits: {fp32:.0e} in fp32, {bf16:.0e} in bf16. The single process is `zero0` with a replicated teacher in fp32, and
`zero1` in bf16, where `zero0` is refused. In bf16 both models compute in 16 bits, and the learning rate is 1e-5 in place of 3e-3: with
a larger one a weight soon rounds to its other neighbour, another token is drawn, and the figures are those of another text. For
comparison: gradients that are averaged over two ranks instead of added deviate by 0.5.

`bash scripts/parity.sh` writes this page; `tests/dist/test_matrix.py` holds it against the check before a run."""


def main(words: list[str]) -> int:
    """Measures and writes, or prints; 1 where a cell deviates too far."""
    with tempfile.TemporaryDirectory(prefix="parity-") as place:
        folder = Path(place)
        parity_worker.write_inputs(folder)
        asked = [cell for cell in CELLS if not words or any(word in cell for word in words)]
        found: dict[str, float | str] = {cell: reason(folder, cell) or 0.0 for cell in asked}
        found |= measured(folder, [cell for cell, value in found.items() if not isinstance(value, str)])
    if words:
        print("\n".join(f"{cell}: {value}" for cell, value in found.items()))
    else:
        TABLE.write_text(render(found), encoding="utf-8")
        print(f"{TABLE.relative_to(ROOT)}: {len(found)} cells")
    far = [cell for cell, v in found.items() if isinstance(v, float) and not v <= TOLERANCE[precision_of(cell)]]
    print("\n".join(f"{cell} deviates by {found[cell]:.1e}" for cell in far), file=sys.stderr)
    return int(bool(far))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the parity matrix and write docs/parity.md.")
    parser.add_argument("words", nargs="*", help="only cells whose name has one of these words; prints, writes nothing")
    sys.exit(main(parser.parse_args().words))
