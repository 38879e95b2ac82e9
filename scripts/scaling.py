"""Prints the tables of docs/scaling.md: plans on paper for 8, 64 and 512 GPUs, by the planner's own formulas."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.cards import load_card
from minillm.errors import ConfigError
from minillm.plan.memory import memory_of
from minillm.plan.sizes import GIB, Work, sizes_of
from minillm.plan.traffic import Rates, traffic_of

PAIRS = (("opt-13b", "opt-1.3b"), ("llama-13b", "llama-7b"))
FABRICS = {"50 GB/s": Rates(), "5 GB/s": Rates(bandwidth=5e9)}
COLUMNS = (
    "GPUs",
    "batch",
    "teacher",
    "alpha",
    "peak",
    "sent",
    *(f"step at {name}" for name in FABRICS),
    "tokens/s each",
)


def rows(teacher: str, student: str, *, each: int | None) -> Iterator[list[str]]:
    """Lines of a table: a batch of 256 for all GPUs together, or ``each`` responses for every GPU."""
    sizes = sizes_of(load_card(student, kind="students")), sizes_of(load_card(teacher, kind="teachers"))
    for gpus in (8, 64, 512):
        for placement, alpha in (("replicated", 0.2), ("zero3", 0.2), ("zero3", 0.0)):
            batch = 256 if each is None else each * gpus
            head = [str(gpus), str(batch), placement, f"{alpha:g}"]
            try:
                work = Work(
                    student=sizes[0], teacher=sizes[1], gpus=gpus, engine="zero2", placement=placement, rows=batch,
                    micro_batch=8, teacher_mix=alpha, recompute=True,
                )  # fmt: skip
            except ConfigError:
                yield [*head, *(["–"] * 5)]
                continue
            found = [traffic_of(work, rates) for rates in FABRICS.values()]
            sent = sum(found[0].sent.values()) / GIB
            speed = work.rows * work.new_tokens / found[0].step_s / gpus
            seconds = [f"{one.step_s:.1f} s" for one in found]
            yield [*head, f"{memory_of(work).peak / GIB:.0f} GiB", f"{sent:,.0f} GiB", *seconds, f"{speed:,.0f}"]


def main() -> None:
    """Markdown on the standard output."""
    for teacher, student in PAIRS:
        for title, each in (
            ("256 responses a step, whatever the GPUs", None),
            ("32 responses a step for each GPU", 32),
        ):
            print(f"\n### {teacher} → {student}: {title}\n")
            print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
            for row in rows(teacher, student, each=each):
                print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
