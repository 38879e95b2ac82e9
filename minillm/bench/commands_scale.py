"""``minillm bench scale`` and ``padding``: what they ask, measure and print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from minillm.bench import options
from minillm.errors import ConfigError

if TYPE_CHECKING:
    from minillm.bench.padding import PaddingFigures
    from minillm.bench.pairs import Spread
    from minillm.bench.scale import ScaleFigures


LENGTHS, VOCABULARIES = (64, 128, 256, 512), (8192, 65_536)


@options.app.command()
def scale(  # noqa: PLR0917 (typer reads options from parameters)
    teacher: options.TeacherName = "bench-30m",
    student: options.StudentName = "bench-4m",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Responses in a rollout, for each rank.")] = 8,
    prompt_tokens: options.PromptTokens = 64,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Tokens of each response where ranks are compared.")
    ] = 64,
    inner_updates: Annotated[int, typer.Option("--inner-updates", min=1, help="Updates on each rollout.")] = 2,
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--lengths",
            min=1,
            help="New tokens by which time is fitted; to be repeated.",
            show_default=options.of(LENGTHS),
        ),
    ] = None,
    vocabularies: Annotated[
        list[int] | None,
        typer.Option(
            "--vocabularies",
            min=4096,
            help="Rows of the head by which memory is compared; to be repeated.",
            show_default=options.of(VOCABULARIES),
        ),
    ] = None,
    repeats: options.Repeats = 3,
    json_file: options.Json = None,
) -> None:
    """How a step grows with a second rank, with the length of responses and with the vocabulary; one thread a process.

    \b
    Example:
      minillm bench scale --batch 4 --lengths 32 --lengths 128 --json bench.json
    """
    from minillm.bench.bare import Sizes
    from minillm.bench.record import write_section
    from minillm.bench.scale import enough_devices, measure_scale
    from minillm.bench.step import StepCase

    sizes = Sizes(teacher=teacher, student=student, rows=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    case = StepCase(sizes=sizes, inner_updates=inner_updates, threads=1)
    if not enough_devices():
        print("note: two ranks need two GPUs, and there is one; how a step grows with ranks is left out", flush=True)
    print(f"{teacher} and {student}: {repeats + 1} turns of everything; some minutes …", flush=True)
    found = measure_scale(case, lengths=lengths or LENGTHS, vocabularies=vocabularies or VOCABULARIES, repeats=repeats)
    _print_scale(found)
    if json_file is not None:
        section = {
            **{f"weak_{stage}": one.efficiency.median for stage, one in found.weak.items()},
            "length_exponent": found.length.exponent.median,
            "memory_growth": found.memory.growth,
            "threads": 1,
            "figures": found,
        }
        write_section(json_file, "scale", section)


def _print_scale(found: ScaleFigures) -> None:
    from minillm.bench.record import mebibytes
    from minillm.terminal import print_table

    sizes, length, memory = found.case.sizes, found.length, found.memory
    rows = []
    for stage, weak in found.weak.items():
        rows += [[f"{stage}: {name}, s", *_middle_and_ends(one)] for name, one in weak.seconds.items()]
        rows.append([f"{stage}: apart / joined", *_middle_and_ends(weak.efficiency)])
    if rows:
        print_table(
            f"Two ranks of one run, and two runs of one rank: {sizes.rows} responses of {sizes.new_tokens} tokens each",
            ["", "median", "least to greatest"],
            rows,
        )
    print_table(
        f"A step of {sizes.rows} responses after prompts of {sizes.prompt_tokens} tokens",
        ["", "median", "least to greatest"],
        [
            *([f"{tokens} new tokens, s", *_middle_and_ends(one)] for tokens, one in length.seconds.items()),
            ["power of new tokens", *_middle_and_ends(length.exponent)],
            ["power of all tokens", *_middle_and_ends(length.exponent_with_prompts)],
        ],
    )
    print_table(
        f"Memory of one forward and backward of the student, {memory.tokens:,} new tokens, MiB",
        ["vocabulary", "beyond weights", "of it gradients", "the rest"],
        [
            [f"{size:,}", *map(mebibytes, (peak, memory.gradients[size], peak - memory.gradients[size]))]
            for size, peak in memory.peak.items()
        ],
    )
    print(f"the rest grows {memory.growth:.2f} times")


def _middle_and_ends(spread: Spread) -> list[str]:
    return [f"{spread.median:.3f}", f"{spread.low:.3f}–{spread.high:.3f}"]


@options.app.command()
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
    json_file: options.Json = None,
) -> None:
    """How many of the places that training computes hold no token.

    \b
    Example:
      minillm bench padding train.jsonl test.jsonl.gz --unit words
    """
    from minillm.bench.padding import UNITS, measure_padding
    from minillm.bench.record import write_section
    from minillm.terminal import print_table

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
            "micro_tokens": micro_tokens, "batches": batches, "files": found,
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
