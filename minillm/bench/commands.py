"""``minillm bench loss`` and ``step``: what they ask, measure and print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from minillm.bench import options
from minillm.errors import ConfigError

if TYPE_CHECKING:
    from minillm.bench.loss import LossFigures
    from minillm.bench.step import StepFigures


WIDTHS = (256, 512)


@options.app.command()
def loss(  # noqa: PLR0917 (typer reads options from parameters)
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens in one pass.")] = 2048,
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=2, help="Rows of both heads.")] = 151_936,
    hidden: Annotated[
        list[int] | None,
        typer.Option("--hidden", min=1, help="Hidden widths; may be repeated.", show_default=options.of(WIDTHS)),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16, of heads and states.")] = "float32",
    repeats: options.Repeats = 3,
    threads: options.Threads = 2,
    json_file: options.Json = None,
) -> None:
    """The loss of a MiniLLM step, tile by tile against whole logits.

    Whole logits take about 10 GiB at the default sizes.

    \b
    Example:
      minillm bench loss --tokens 512 --vocabulary 32000 --json bench.json
    """
    if dtype not in {"float32", "bfloat16"}:
        raise ConfigError(f"--dtype {dtype!r}: wanted float32 or bfloat16")
    import torch

    from minillm.bench.loss import LossCase, measure_loss
    from minillm.bench.record import write_section
    from minillm.terminal import print_table

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for width in hidden or WIDTHS:
        case = LossCase(
            tokens=tokens, vocabulary=vocabulary, hidden=width, teacher_hidden=width, dtype=dtype, device=device,
            threads=threads,
        )  # fmt: skip
        print(f"hidden {width}: {repeats + 1} turns of both …", flush=True)
        found.append(measure_loss(case, repeats=repeats))
    print_table(
        f"Loss and gradient of {tokens:,} tokens, vocabulary {vocabulary:,}, {dtype}, {device}",
        ["hidden", "time: tiles, whole", "ratio", "memory: tiles, whole", "ratio"],
        [_row(one) for one in found],
    )
    if json_file is not None:
        section = {
            "memory_fraction": max(one.memory_fraction for one in found),
            "time_fraction": max(one.time_fraction.median for one in found),
            "threads": threads,
            "cases": found,
        }
        write_section(json_file, "loss", section)


@options.app.command()
def step(  # noqa: PLR0917 (typer reads options from parameters)
    teacher: options.TeacherName = "bench-30m",
    student: options.StudentName = "bench-4m",
    batch: options.Batch = 16,
    prompt_tokens: options.PromptTokens = 64,
    new_tokens: options.NewTokens = 128,
    alpha: options.Alpha = 0.2,
    coin_groups: options.CoinGroups = 1,
    inner_updates: Annotated[int, typer.Option("--inner-updates", min=1, help="Updates on each rollout.")] = 2,
    precision: options.Precision = "fp32",
    repeats: options.Repeats = 3,
    threads: options.Threads = 2,
    json_file: options.Json = None,
) -> None:
    """A whole MiniLLM step against the sum of its bare parts: without teacher mixing, and with --alpha of it (0: only
    without). --json also gets what `bench padding` finds in the embedded world, unless the file has a finding of it.

    \b
    Example:
      minillm bench step --batch 4 --new-tokens 32 --json bench.json
    """
    options.check_precision(precision)
    from minillm.bench.bare import Sizes, check_pair
    from minillm.bench.commands_scale import padding
    from minillm.bench.record import sections, write_section
    from minillm.bench.step import StepCase, measure_step

    sizes = Sizes(
        teacher=teacher, student=student, rows=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        precision=precision,
    )  # fmt: skip
    check_pair(sizes)
    found = []
    for mix in (0.0, alpha) if alpha else (0.0,):
        case = StepCase(
            sizes=sizes, inner_updates=inner_updates, threads=threads, teacher_mix=mix, coin_groups=coin_groups
        )
        print(f"{teacher} and {student}, alpha {mix:g}: {repeats + 1} turns of a step and its parts …", flush=True)
        one = measure_step(case, repeats=repeats)
        found.append(one)
        _print_step(one)
    if json_file is not None:
        mixed = {"over_parts_mixed": found[1].over_parts.median} if alpha else {}
        section = {
            "over_parts": found[0].over_parts.median, **mixed, "tokens_per_s": found[0].tokens_per_s,
            "threads": threads, "figures": found,
        }  # fmt: skip
        write_section(json_file, "step", section)
        if "padding" not in sections(json_file):
            padding(json_file=json_file)


def _print_step(figures: StepFigures) -> None:
    from minillm.terminal import print_table

    case, sizes, peaks = figures.case, figures.case.sizes, figures.peaks
    models = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in figures.parameters.items())
    print_table(
        f"One step of {sizes.rows} responses of {sizes.new_tokens} tokens, alpha {case.teacher_mix:g} ({models}, "
        f"{sizes.precision})",
        ["", "seconds", "least to greatest"],
        [
            [name, f"{of.median:.3f}", f"{of.low:.3f}–{of.high:.3f}"]
            for name, of in (*figures.seconds.items(), ("step / sum of parts", figures.over_parts))
        ],
    )
    print(f"{figures.tokens_per_s:,.0f} new tokens a second; the update counts {case.inner_updates} times in the sum")
    print(
        f"a decoded token takes {figures.decode_over_floor:.1f} times as long as reading the student's weights "
        f"({peaks.bytes_per_s / 1e9:,.1f} GB/s); the teacher {figures.teacher_over_floor:.2f} times as long as its "
        f"products ({peaks.flops_per_s / 1e9:,.0f} GFLOP/s)"
    )


def _row(figures: LossFigures) -> list[str]:
    from minillm.bench.record import mebibytes

    seconds, extra = figures.seconds, figures.extra_bytes
    time = figures.time_fraction
    return [
        str(figures.case.hidden),
        f"{seconds['tiles'].median:.3g}, {seconds['whole_logits'].median:.3g} s",
        f"{time.median:.2f} ({time.low:.2f}–{time.high:.2f})",
        f"{mebibytes(extra['tiles'])}, {mebibytes(extra['whole_logits'])} MiB",
        f"{figures.memory_fraction:.1%}",
    ]
