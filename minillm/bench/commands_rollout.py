"""``minillm bench rollout`` and ``coins``: what they ask, measure and print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from minillm.bench import options
from minillm.errors import ConfigError

if TYPE_CHECKING:
    from minillm.bench.coins import CoinFigures
    from minillm.bench.rollout import RolloutFigures


@options.app.command()
def rollout(  # noqa: PLR0917 (typer reads options from parameters)
    teacher: options.TeacherName = "bench-30m",
    student: options.StudentName = "bench-4m",
    batch: options.Batch = 16,
    prompt_tokens: options.PromptTokens = 64,
    new_tokens: options.NewTokens = 128,
    alpha: options.Alpha = 0.2,
    coin_groups: options.CoinGroups = 1,
    coin_rollouts: Annotated[
        int, typer.Option("--coin-rollouts", min=3, help="Rollouts for each variance of a gradient.")
    ] = 16,
    precision: options.Precision = "fp32",
    repeats: options.Repeats = 3,
    threads: options.Threads = 2,
    json_file: options.Json = None,
) -> None:
    """Lazy teacher mixing against mixing at every token, dropping of finished rows, and what shared coins cost. (The
    last with two small random models, whatever --teacher and --student are; `bench coins` takes yours.)

    \b
    Example:
      minillm bench rollout --batch 4 --new-tokens 32 --json bench.json
    """
    options.check_precision(precision)
    if alpha == 0:
        raise ConfigError("--alpha 0: nothing is mixed; wanted a share above 0, such as 0.2")
    if new_tokens == 1:
        raise ConfigError("--new-tokens 1: wanted at least 2, or no step of decoding follows the prompts")
    import torch

    from minillm.bench.bare import Sizes, check_pair
    from minillm.bench.coins import CoinCase, measure_coins
    from minillm.bench.record import write_section
    from minillm.bench.rollout import RolloutCase, measure_rollout

    sizes = Sizes(
        teacher=teacher, student=student, rows=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        precision=precision,
    )  # fmt: skip
    case = RolloutCase(
        sizes=sizes, teacher_mix=alpha, coin_groups=coin_groups, threads=threads,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    check_pair(sizes)
    print(f"{teacher} and {student}: {repeats + 1} turns of each variant …", flush=True)
    found = measure_rollout(case, repeats=repeats)
    _print_rollout(found)
    print(f"shared coins: {coin_rollouts} rollouts of each size and number of groups …", flush=True)
    coins = measure_coins(CoinCase(teacher_mix=alpha, rollouts=coin_rollouts, threads=threads))
    _print_coins(coins)
    if json_file is not None:
        section = {
            "lazy_speedup": found.lazy_speedup.median,
            "teacher_forwards_over_bound": found.teacher_forwards_over_bound,
            "coin_variance": coins.variance,
            "dropping_over_alive_cost": found.dropping_over_alive_cost.median,
            "many_over_refilled": found.many_over_refilled.median,
            "threads": threads, "figures": found, "coins": coins,
        }  # fmt: skip
        write_section(json_file, "rollout", section)


ROWS, GROUPS = (16, 64, 256), (1, 4)


@options.app.command()
def coins(  # noqa: PLR0917 (typer reads options from parameters)
    teacher: options.TeacherName,
    student: options.StudentName,
    prompts: Annotated[str, typer.Option("--prompts", metavar="FILE", help="Rows to draw from, or world:SPLIT.")],
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", min=2, help="Rows; may be repeated.", show_default=options.of(ROWS)),
    ] = None,
    groups: Annotated[
        list[int] | None,
        typer.Option("--groups", min=1, help="Coin groups; may be repeated.", show_default=options.of(GROUPS)),
    ] = None,
    new_tokens: options.NewTokens = 32,
    alpha: options.Alpha = 0.2,
    importance: Annotated[str, typer.Option("--importance", help="coin or per_step.")] = "coin",
    baseline: Annotated[str, typer.Option("--baseline", help="none or position_mean.")] = "position_mean",
    rollouts: Annotated[int, typer.Option("--rollouts", min=3, help="For each variance.")] = 24,
    threads: options.Threads = 2,
    json_file: options.Json = None,
) -> None:
    """How much variance shared coins add to the gradient of your own pair, on your own prompts.

    \b
    Example:
      minillm bench coins --teacher runs/a/teacher/student --student runs/a/student --prompts valid.jsonl
    """
    for name, value, known in (
        ("--importance", importance, ("coin", "per_step")), ("--baseline", baseline, ("none", "position_mean"))
    ):  # fmt: skip
        if value not in known:
            raise ConfigError(f"{name} {value!r}: wanted {' or '.join(known)}")
    from minillm.bench.coins import CoinCase, measure_coins, prompts_of
    from minillm.bench.record import write_section

    case = CoinCase(
        teacher=teacher, student=student, sharpness=None, new_tokens=new_tokens, teacher_mix=alpha,
        batches=tuple(batch or ROWS), groups=tuple(groups or GROUPS), rollouts=rollouts,
        importance=importance, baseline=baseline, threads=threads,
    )  # fmt: skip
    print(f"{teacher} and {student}: {rollouts} rollouts of each size and number of groups …", flush=True)
    rows, ends = prompts_of(prompts, student=student)
    found = measure_coins(case, prompts=rows, ends=ends)
    _print_coins(found)
    if json_file is not None:
        write_section(json_file, "coins", {"coin_variance": found.variance, "figures": found})


def _print_rollout(figures: RolloutFigures) -> None:
    from minillm.terminal import print_table

    sizes = figures.case.sizes
    print_table(
        f"Rollouts of {sizes.rows} responses of up to {sizes.new_tokens} tokens, alpha {figures.case.teacher_mix:g}, "
        f"{sizes.precision}",
        ["", "median", "least to greatest"],
        [
            [name, f"{of.median:.3f}", f"{of.low:.3f}–{of.high:.3f}"]
            for name, of in (
                ("lazy mixing, s", figures.seconds["lazy"]),
                ("mixing at every token and scoring, s", figures.seconds["per_token"]),
                ("the second over the first", figures.lazy_speedup),
                ("finished rows dropped, s", figures.seconds["dropped"]),
                ("all rows kept, s", figures.seconds["kept"]),
                ("dropped over the cost of the rows left", figures.dropping_over_alive_cost),
                ("eight times the rows at once, dropped, s", figures.seconds["many"]),
                ("that over refilled slots without loss", figures.many_over_refilled),
            )
        ],
    )
    print(
        f"teacher forwards over (heads + 2 a group), at most: {figures.teacher_forwards_over_bound:.3f}; "
        f"mean heads {figures.mean_heads:.2f} ({figures.mean_heads_sigmas:+.1f} sigma)"
    )


def _print_coins(figures: CoinFigures) -> None:
    from minillm.terminal import print_table

    groups = sorted({name for of in figures.variance.values() for name in of} - {"independent"}, key=int)
    case = figures.case
    print_table(
        f"Variance of a batch's gradient over that with independent coins ({case.teacher} and {case.student}"
        f"{', random and sharp' * (case.sharpness is not None)}, {case.rollouts} rollouts each, alpha "
        f"{case.teacher_mix:g}, weights {case.importance}, baseline {case.baseline})",
        ["rows", *(f"{name} group{'s' * (name != '1')}" for name in groups)],
        [
            [
                str(rows),
                *(f"{of[name]:.2f} ± {figures.error[rows][name]:.2f}" if name in of else "–" for name in groups),
            ]
            for rows, of in figures.variance.items()
        ],
    )
