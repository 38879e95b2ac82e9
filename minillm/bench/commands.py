"""``minillm bench …``: what each benchmark asks, measures and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minillm.errors import ConfigError

if TYPE_CHECKING:
    from minillm.bench.loss import LossFigures

app = typer.Typer(
    no_args_is_help=True,
    help="Time the parts of a step beside their slow obvious twins.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[
    Path | None, typer.Option("--json", help="Also write the figures into this file, beside others there.")
]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="How often each variant is timed, in turns.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of torch, on a CPU.")]


@app.callback()
def bench() -> None:
    """Time the parts of a step beside their slow obvious twins.

    \b
    Example:
      minillm bench loss --json bench.json
    """


@app.command()
def loss(  # noqa: PLR0917 (typer reads options from parameters)
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens in one pass.")] = 2048,
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=2, help="Rows of both heads.")] = 151_936,
    hidden: Annotated[list[int] | None, typer.Option("--hidden", min=1, help="Hidden widths; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16, of heads and states.")] = "float32",
    repeats: Repeats = 3,
    threads: Threads = 2,
    json_file: Json = None,
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
    from minillm.bench.record import print_table, write_section

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for width in hidden or [256, 512]:
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
            "cases": [one.as_json() for one in found],
        }
        write_section(json_file, "loss", section)


@app.command()
def step(  # noqa: PLR0917 (typer reads options from parameters)
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="CARD|DIR", help="The model that is imitated.")
    ] = "bench-30m",
    student: Annotated[str, typer.Option("--student", metavar="CARD|DIR", help="The model that learns.")] = "bench-4m",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Responses in a rollout.")] = 16,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of each prompt.")] = 64,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Tokens of each response; none ends early.")
    ] = 128,
    inner_updates: Annotated[int, typer.Option("--inner-updates", min=1, help="Updates on each rollout.")] = 2,
    repeats: Repeats = 3,
    threads: Threads = 2,
    json_file: Json = None,
) -> None:
    """A whole MiniLLM step, without teacher mixing, against the sum of its bare parts.

    \b
    Example:
      minillm bench step --batch 4 --new-tokens 32 --json bench.json
    """
    from minillm.bench.record import print_table, write_section
    from minillm.bench.step import StepCase, measure_step

    case = StepCase(
        teacher=teacher, student=student, rows=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        inner_updates=inner_updates, threads=threads,
    )  # fmt: skip
    print(f"{teacher} and {student}: {repeats + 1} turns of a step and its parts …", flush=True)
    found = measure_step(case, repeats=repeats)
    sizes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in found.parameters.items())
    print_table(
        f"One step of {batch} responses of {new_tokens} tokens ({sizes})",
        ["", "seconds", "least to greatest"],
        [
            [name, f"{one.median:.3f}", f"{one.low:.3f}–{one.high:.3f}"]
            for name, one in (*found.seconds.items(), ("step / sum of parts", found.over_parts))
        ],
    )
    print(f"{found.tokens_per_s:,.0f} new tokens a second; the update counts {inner_updates} times in the sum")
    if json_file is not None:
        section = {
            "over_parts": found.over_parts.median, "tokens_per_s": found.tokens_per_s, "threads": threads,
            "figures": found.as_json(),
        }  # fmt: skip
        write_section(json_file, "step", section)


def _row(figures: LossFigures) -> list[str]:
    seconds, extra = figures.seconds, figures.extra_bytes
    time = figures.time_fraction
    return [
        str(figures.case.hidden),
        f"{seconds['tiles'].median:.3g}, {seconds['whole_logits'].median:.3g} s",
        f"{time.median:.2f} ({time.low:.2f}–{time.high:.2f})",
        f"{_mebibytes(extra['tiles'])}, {_mebibytes(extra['whole_logits'])} MiB",
        f"{figures.memory_fraction:.1%}",
    ]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f}"
