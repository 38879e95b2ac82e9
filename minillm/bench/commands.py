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
TeacherName = Annotated[str, typer.Option("--teacher", metavar="CARD|DIR", help="The model that is imitated.")]
StudentName = Annotated[str, typer.Option("--student", metavar="CARD|DIR", help="The model that learns.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Responses in a rollout.")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of each prompt.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=1, help="Most tokens of a response.")]
Alpha = Annotated[
    float,
    typer.Option("--alpha", min=0.0, max=0.99, help="Share of tokens that the teacher draws, where it draws any."),
]
CoinGroups = Annotated[int, typer.Option("--coin-groups", min=1, help="Groups of rows with coins of their own.")]


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
    teacher: TeacherName = "bench-30m",
    student: StudentName = "bench-4m",
    batch: Batch = 16,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 128,
    alpha: Alpha = 0.2,
    coin_groups: CoinGroups = 1,
    inner_updates: Annotated[int, typer.Option("--inner-updates", min=1, help="Updates on each rollout.")] = 2,
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16, of both models.")] = "fp32",
    repeats: Repeats = 3,
    threads: Threads = 2,
    json_file: Json = None,
) -> None:
    """A whole MiniLLM step against the sum of its bare parts: without teacher mixing, and with --alpha of it (0: only
    without).

    \b
    Example:
      minillm bench step --batch 4 --new-tokens 32 --json bench.json
    """
    if precision not in {"fp32", "bf16"}:
        raise ConfigError(f"--precision {precision!r}: wanted fp32 or bf16")
    from minillm.bench.bare import Sizes
    from minillm.bench.record import print_table, write_section
    from minillm.bench.step import StepCase, measure_step

    sizes = Sizes(
        teacher=teacher, student=student, rows=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        precision=precision,
    )  # fmt: skip
    found = []
    for mix in (0.0, alpha) if alpha else (0.0,):
        case = StepCase(
            sizes=sizes, inner_updates=inner_updates, threads=threads, teacher_mix=mix, coin_groups=coin_groups
        )
        print(f"{teacher} and {student}, alpha {mix:g}: {repeats + 1} turns of a step and its parts …", flush=True)
        one = measure_step(case, repeats=repeats)
        found.append(one)
        models = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in one.parameters.items())
        print_table(
            f"One step of {batch} responses of {new_tokens} tokens, alpha {mix:g} ({models}, {precision})",
            ["", "seconds", "least to greatest"],
            [
                [name, f"{of.median:.3f}", f"{of.low:.3f}–{of.high:.3f}"]
                for name, of in (*one.seconds.items(), ("step / sum of parts", one.over_parts))
            ],
        )
        print(f"{one.tokens_per_s:,.0f} new tokens a second; the update counts {inner_updates} times in the sum")
    if json_file is not None:
        mixed = {"over_parts_mixed": found[1].over_parts.median} if alpha else {}
        section = {
            "over_parts": found[0].over_parts.median, **mixed, "tokens_per_s": found[0].tokens_per_s,
            "threads": threads, "figures": [one.as_json() for one in found],
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
