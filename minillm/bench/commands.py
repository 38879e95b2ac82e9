"""``minillm bench …``: what each benchmark asks, measures and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minillm.errors import ConfigError

if TYPE_CHECKING:
    from minillm.bench.coins import CoinFigures
    from minillm.bench.loss import LossFigures
    from minillm.bench.padding import PaddingFigures

app = typer.Typer(
    no_args_is_help=True,
    help="Time the parts of a step beside slow twins; count padding.",
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
Precision = Annotated[str, typer.Option("--precision", help="fp32 or bf16, of both models.")]


@app.callback()
def bench() -> None:
    """Time the parts of a step beside slow twins; count padding.

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
    precision: Precision = "fp32",
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
    _check_precision(precision)
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
        print(
            f"a decoded token takes {one.decode_over_floor:.1f} times as long as reading the student's weights "
            f"({one.peaks.bytes_per_s / 1e9:,.1f} GB/s); the teacher {one.teacher_over_floor:.2f} times as long as its "
            f"products ({one.peaks.flops_per_s / 1e9:,.0f} GFLOP/s)"
        )
    if json_file is not None:
        mixed = {"over_parts_mixed": found[1].over_parts.median} if alpha else {}
        section = {
            "over_parts": found[0].over_parts.median, **mixed, "tokens_per_s": found[0].tokens_per_s,
            "threads": threads, "figures": [one.as_json() for one in found],
        }  # fmt: skip
        write_section(json_file, "step", section)


@app.command()
def rollout(  # noqa: PLR0917 (typer reads options from parameters)
    teacher: TeacherName = "bench-30m",
    student: StudentName = "bench-4m",
    batch: Batch = 16,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 128,
    alpha: Alpha = 0.2,
    coin_groups: CoinGroups = 1,
    coin_rollouts: Annotated[
        int, typer.Option("--coin-rollouts", min=3, help="Rollouts for each variance of a gradient.")
    ] = 16,
    precision: Precision = "fp32",
    repeats: Repeats = 3,
    threads: Threads = 2,
    json_file: Json = None,
) -> None:
    """Lazy teacher mixing against mixing at every token, dropping of finished rows, and what shared coins cost.

    \b
    Example:
      minillm bench rollout --batch 4 --new-tokens 32 --json bench.json
    """
    _check_precision(precision)
    if alpha == 0:
        raise ConfigError("--alpha 0: nothing is mixed; wanted a share above 0, such as 0.2")
    import torch

    from minillm.bench.bare import Sizes
    from minillm.bench.coins import CoinCase, measure_coins
    from minillm.bench.record import print_table, write_section
    from minillm.bench.rollout import RolloutCase, measure_rollout

    sizes = Sizes(
        teacher=teacher, student=student, rows=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        precision=precision,
    )  # fmt: skip
    case = RolloutCase(
        sizes=sizes, teacher_mix=alpha, coin_groups=coin_groups, threads=threads,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    print(f"{teacher} and {student}: {repeats + 1} turns of each variant …", flush=True)
    found = measure_rollout(case, repeats=repeats)
    print_table(
        f"Rollouts of {batch} responses of up to {new_tokens} tokens, alpha {alpha:g}, {precision}",
        ["", "median", "least to greatest"],
        [
            [name, f"{of.median:.3f}", f"{of.low:.3f}–{of.high:.3f}"]
            for name, of in (
                ("lazy mixing, s", found.seconds["lazy"]),
                ("mixing at every token and scoring, s", found.seconds["per_token"]),
                ("the second over the first", found.lazy_speedup),
                ("finished rows dropped, s", found.seconds["dropped"]),
                ("all rows kept, s", found.seconds["kept"]),
                ("dropped over the cost of the rows left", found.dropping_over_alive_cost),
            )
        ],
    )
    print(
        f"teacher forwards over (heads + 2 a group), at most: {found.teacher_forwards_over_bound:.3f}; "
        f"mean heads {found.mean_heads:.2f} ({found.mean_heads_sigmas:+.1f} sigma)"
    )
    coins = measure_coins(CoinCase(teacher_mix=alpha, rollouts=coin_rollouts, threads=threads))
    _print_coins(coins)
    if json_file is not None:
        section = {
            "lazy_speedup": found.lazy_speedup.median,
            "teacher_forwards_over_bound": found.teacher_forwards_over_bound,
            "coin_variance": coins.variance,
            "dropping_over_alive_cost": found.dropping_over_alive_cost.median,
            "threads": threads, "figures": found.as_json(), "coins": coins.as_json(),
        }  # fmt: skip
        write_section(json_file, "rollout", section)


@app.command()
def coins(  # noqa: PLR0917 (typer reads options from parameters)
    teacher: Annotated[str, typer.Option("--teacher", metavar="CARD|DIR", help="The model that is imitated.")],
    student: Annotated[str, typer.Option("--student", metavar="CARD|DIR", help="The model that learns.")],
    prompts: Annotated[str, typer.Option("--prompts", metavar="FILE", help="Rows to draw from, or world:SPLIT.")],
    batch: Annotated[list[int] | None, typer.Option("--batch", min=2, help="Rows; may be repeated.")] = None,
    groups: Annotated[list[int] | None, typer.Option("--groups", min=1, help="Coin groups; may be repeated.")] = None,
    new_tokens: NewTokens = 32,
    alpha: Alpha = 0.2,
    importance: Annotated[str, typer.Option("--importance", help="coin or per_step.")] = "coin",
    baseline: Annotated[str, typer.Option("--baseline", help="none or position_mean.")] = "position_mean",
    rollouts: Annotated[int, typer.Option("--rollouts", min=3, help="For each variance.")] = 24,
    threads: Threads = 2,
    json_file: Json = None,
) -> None:
    """How much variance shared coins add to the gradient of your own pair, on your own prompts.

    \b
    Example:
      minillm bench coins --teacher runs/a/teacher/student --student runs/a/student --prompts valid.jsonl
    """
    from minillm.bench.coins import CoinCase, measure_coins, prompts_of
    from minillm.bench.record import write_section

    case = CoinCase(
        teacher=teacher, student=student, sharpness=None, new_tokens=new_tokens, teacher_mix=alpha,
        batches=tuple(batch or (16, 64, 256)), groups=tuple(groups or (1, 4)), rollouts=rollouts,
        importance=importance, baseline=baseline, threads=threads,
    )  # fmt: skip
    rows, ends = prompts_of(prompts, student=student)
    found = measure_coins(case, prompts=rows, ends=ends)
    _print_coins(found)
    if json_file is not None:
        write_section(json_file, "coins", {"coin_variance": found.variance, "figures": found.as_json()})


@app.command()
def padding(  # noqa: PLR0917 (typer reads options from parameters)
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]...", help="Rows, as data.train names them; world:train where none is named."),
    ] = None,
    unit: Annotated[
        str, typer.Option("--unit", help="What a length counts: tokens, words, or bytes (in lots of four).")
    ] = "tokens",
    tokenizer: Annotated[
        str,
        typer.Option("--tokenizer", metavar="CARD|DIR", help="Whose tokens; 'world' knows the embedded world only."),
    ] = "world",
    micro_tokens: Annotated[
        int, typer.Option("--micro-tokens", min=1, help="Most places in a forward, as a stage's micro_tokens.")
    ] = 4096,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Random batches of each size.")] = 100,
    json_file: Json = None,
) -> None:
    """How many of the places that training computes hold no token.

    \b
    Example:
      minillm bench padding train.jsonl test.jsonl.gz --unit words
    """
    from minillm.bench.padding import UNITS, measure_padding
    from minillm.bench.record import print_table, write_section

    if unit not in UNITS:
        raise ConfigError(f"--unit {unit!r}: wanted {', '.join(UNITS)}")
    found = []
    for source in files or ["world:train"]:
        print(f"{source}: {batches} batches of each size …", flush=True)
        found.append(
            measure_padding(source, unit=unit, tokenizer=tokenizer, micro_tokens=micro_tokens, batches=batches)
        )
    counted = f"{UNITS[unit]} of {tokenizer}" if unit == "tokens" else UNITS[unit]
    for one in found:
        print(f"\n{one.source}: {one.rows:,} rows, mean length {one.mean:.0f}, longest {one.longest:,}, in {counted}")
        print_table(
            f"Places without a token; at most {micro_tokens:,} places in a forward, but for 'padded'",
            ["rows a batch", "padded", "sorted, cut", "forwards", "packed", "forwards"],
            _padding_rows(one),
        )
    worst = max(one.worst for one in found)
    print(f"packed, which is what training does: at most {worst:.1%}")
    if json_file is not None:
        section = {
            "fraction": worst, "unit": unit, "tokenizer": tokenizer if unit == "tokens" else None,
            "micro_tokens": micro_tokens, "batches": batches, "files": [one.as_json() for one in found],
        }  # fmt: skip
        write_section(json_file, "padding", section)


def _padding_rows(figures: PaddingFigures) -> list[list[str]]:
    return [
        [
            str(one.rows),
            f"{one.empty['padded']:.1%}",
            *(
                cell
                for variant in ("padded_cut", "packed")
                for cell in (f"{one.empty[variant]:.1%}", f"{one.micro_batches[variant]:.1f}")
            ),
        ]
        for one in figures.batches
    ]


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


def _check_precision(precision: str) -> None:
    if precision not in {"fp32", "bf16"}:
        raise ConfigError(f"--precision {precision!r}: wanted fp32 or bf16")


def _print_coins(figures: CoinFigures) -> None:
    from minillm.bench.record import print_table

    groups = [name for name in next(iter(figures.variance.values())) if name != "independent"]
    case = figures.case
    print_table(
        f"Variance of a batch's gradient over that with independent coins ({case.rollouts} rollouts each, alpha "
        f"{case.teacher_mix:g}, weights {case.importance}, baseline {case.baseline})",
        ["rows", *(f"{name} group{'s' * (name != '1')}" for name in groups)],
        [
            [str(rows), *(f"{of[name]:.2f} ± {figures.error[rows][name]:.2f}" for name in groups if name in of)]
            for rows, of in figures.variance.items()
        ],
    )
