"""Commands that put results side by side: evaluations, and the cells of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minillm import exits
from minillm.cli import options
from minillm.errors import ConfigError


def report(
    evaluations: Annotated[
        list[str], typer.Argument(metavar="[NAME=]FOLDER", help="Evaluation folders, by the name to show.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for results.json and report.html.")],
    difference: Annotated[
        list[str] | None,
        typer.Option("--difference", metavar="A,B", help="Add the paired difference A - B; may be repeated."),
    ] = None,
    training: Annotated[
        list[str] | None,
        typer.Option("--training", metavar="[NAME=]RUN", help="Add a run's training curves; may be repeated."),
    ] = None,
    title: Annotated[str, typer.Option("--title", help="Heading of the page.")] = "minillm report",
) -> None:
    """Put evaluated models side by side.

    Prints tables, and writes report.html and results.json into the --out folder.

    \b
    Example:
      minillm report sft=runs/quickstart/sft minillm=runs/quickstart/minillm \\
        --difference minillm,sft --out runs/quickstart
    """
    from minillm.report_files import named_folders

    named = named_folders(evaluations)
    runs = named_folders(training or [], what="a run")
    pairs: list[tuple[str, str]] = []
    for text in difference or []:
        left, comma, right = text.partition(",")
        if not comma or not left or not right:
            raise ConfigError(f"--difference {text!r}: wanted two names with a comma between them, such as minillm,sft")
        pairs.append((left, right))
    from minillm.report import build_report  # not from api, which would load torch for it

    build_report(named, out=out, differences=pairs, training=runs, title=title)


def compare(  # noqa: PLR0917 (typer reads options from parameters)
    evaluations: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]FOLDER", help="Two evaluation folders or more; the first is compared with."),
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all figures into this file.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write compare.html into this folder.")] = None,
    across: Annotated[bool, typer.Option("--across", help="Allow different decoding settings.")] = False,
    by: Annotated[str, typer.Option("--by", metavar="FIELD", help="Also by this field of the samples: family.")] = "",
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Largest difference that is a tie; half of the last digit shown."),
    ] = None,
    resample_seeds: Annotated[
        bool, typer.Option("--resample-seeds", help="Resample the sampling seeds, too: wider intervals.")
    ] = False,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Bootstrap resamples.")] = 4000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap.")] = 0,
    shown: Annotated[int, typer.Option("--shown", min=0, help="Prompts side by side, in each direction.")] = 8,
    title: Annotated[str, typer.Option("--title", help="Heading of the page.")] = "minillm compare",
) -> None:
    """Say which of several models is better, and how surely.

    Paired differences with intervals, wins and losses, prompts that differ most, quality at equal diversity, and a
    verdict in words. The same prompts, references and decoding settings are needed.

    \b
    Example:
      minillm compare sft=runs/quickstart/sft minillm=runs/quickstart/minillm \\
        --out runs/quickstart
    """
    from minillm.compare.command import compare as run
    from minillm.compare.summary import Options
    from minillm.report_files import named_folders

    how = Options(
        resamples=resamples,
        seed=seed,
        also_seeds=resample_seeds,
        across=across,
        tolerance=tolerance,
        by=by,
        shown=shown,
    )
    run(named_folders(evaluations), options=how, json_file=json_file, out=out, title=title)


def study(  # noqa: PLR0917 (typer reads options from parameters)
    config: Annotated[Path, typer.Option("--config", help="The study's YAML file, as docs/results/long-horizon.yaml.")],
    overrides: options.Overrides = None,
    arms: Annotated[
        str | None, typer.Option("--arms", metavar="A,B,…", help="Make the cells of these arms only.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="1,2,…", help="Make those of these seeds only.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Make nothing; print what is there.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Make cells anew that are there already.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all figures into this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw them: .png, .svg or .pdf.")] = None,
    curves: Annotated[Path | None, typer.Option("--curves", help="Also draw validations during training.")] = None,
    against: Annotated[str, typer.Option(help="Drawn against what: tokens, update or seconds.")] = "tokens",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes that share the work on this machine.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="The file's short form, in folders of its own.")] = False,
    again_as: Annotated[
        str | None,
        typer.Option("--reproduce", metavar="ARM:SEED", help="Make this cell again, hold it against its file."),
    ] = None,
    compare_with: Annotated[
        str | None, typer.Option("--compare-with", metavar="ARM", help="Differences from this arm, not the file's.")
    ] = None,
    diversity: Annotated[
        str, typer.Option("--diversity", metavar="MEASURE", help="Equal diversity in what: distinct_4, self_bleu, …")
    ] = "distinct_4",
    html: Annotated[Path | None, typer.Option("--html", help="Also write all of it as one page.")] = None,
    dry_run: options.DryRun = False,
) -> None:
    """Compare ways to train over several training seeds.

    Each arm and seed is a cell: a run, its evaluation, and one small file that is kept. Cells that are there
    are not made again, so a table grows over several runs; seed by seed, so that it is balanced. KEY=VALUE replaces an
    entry of the study's file (name, results, seeds), or else a setting of the recipe in every cell, teacher and student
    among them.

    \b
    Example:
      minillm study --config docs/results/long-horizon.yaml --show
    """
    from minillm.study.command import describe, run, run_again

    if dry_run:
        from minillm.cli.dry_run import require_study, tell

        tell(require_study(describe(config, overrides=overrides or [], quick=quick)))
        return
    if again_as is not None:
        others = {"--arms": arms, "--seeds": seeds, "--show": show, "--again": again, "--json": json_file,
                  "--plot": plot, "--curves": curves, "--compare-with": compare_with, "--html": html}  # fmt: skip
        if unheard := [name for name, given in others.items() if given not in (None, False)]:
            raise ConfigError(f"--reproduce makes one cell and nothing else; leave {unheard[0]} out")
        if not run_again(config, again_as, overrides=overrides or [], quick=quick):
            raise typer.Exit(exits.CHECK_FAILED)
        return
    if seeds is not None and any(not each.strip().isdecimal() for each in seeds.split(",")):
        raise ConfigError(f"--seeds {seeds!r}: wanted whole numbers with commas between them, such as 1,2")
    run(
        config,
        overrides=overrides or [],
        arms=[arm.strip() for arm in arms.split(",")] if arms is not None else None,
        seeds=[int(seed) for seed in seeds.split(",")] if seeds is not None else None,
        show=show, again=again, json_file=json_file, plot=plot, curves=curves, against=against,
        jobs=jobs, quick=quick, compare_with=compare_with, diversity=diversity, html=html,
    )  # fmt: skip


def judge(  # noqa: PLR0917 (typer reads options from parameters)
    left: Annotated[Path, typer.Argument(metavar="A", help="Folder of an evaluation.")],
    url: Annotated[str, typer.Option("--url", help="Base of the endpoint, such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option("--model", help="The judge's name there.")],
    right: Annotated[Path | None, typer.Argument(metavar="B", help="Another evaluation, to compare with A.")] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="references", help="Compare A with the references of its prompts."),
    ] = None,
    single: Annotated[bool, typer.Option("--single", help="Score A, and B, beside the references.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="The sampling seed to judge; else the lowest.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="The temperature to judge; else 1, or the highest.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Judge the first so many prompts only.")] = None,
    template: Annotated[Path | None, typer.Option("--template", help="Text file of a question of your own.")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests under way at a time.")] = 4,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for one answer.")] = 60.0,
    retries: Annotated[int, typer.Option("--retries", min=0, help="Further tries of one question.")] = 4,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest reply, reasons included.")] = 1024,
    price_in: Annotated[float | None, typer.Option("--price-in", help="Money for a million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option("--price-out", help="Money for a million reply tokens.")] = None,
    max_cost: Annotated[
        float | None, typer.Option("--max-cost", help="Most to spend: money with prices, else tokens.")
    ] = None,
    unencrypted_key: Annotated[
        bool, typer.Option("--unencrypted-key", help="Send the key over http to another machine, readable on the way.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results; else one inside A.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the results of another judging.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures into this file.")] = None,
) -> None:
    """Let a model behind a chat endpoint judge the responses.

    One folder: each response is scored beside its reference, as in the paper. Two: they are compared, each pair in
    both orders; with --against references, A and the answers that its prompts came with. A key is read from
    MINILLM_JUDGE_KEY; OPENAI_API_KEY goes to https://api.openai.com alone. Answers are kept: nothing is asked twice.

    \b
    Examples:
      minillm judge runs/mine/again --url http://localhost:8000/v1 \\
        --model NAME --limit 50
      minillm judge runs/mine/again --against references \\
        --url http://localhost:8000/v1 --model NAME
    """
    from minillm.judge.command import run

    run(
        (left, right),
        settings={
            "url": url, "model": model, "concurrency": concurrency, "timeout": timeout, "retries": retries,
            "max_tokens": max_tokens, "price_in": price_in, "price_out": price_out, "max_cost": max_cost,
            "unencrypted_key": unencrypted_key,
        },
        against=against, single=single, seed=seed, temperature=temperature, limit=limit, template=template, out=out,
        fresh=fresh, json_file=json_file,
    )  # fmt: skip


def win_rate(  # noqa: PLR0917 (typer reads options from parameters)
    left: Annotated[Path, typer.Argument(metavar="A", help="Folder of an evaluation.")],
    by: Annotated[str, typer.Option("--by", metavar="MODEL", help="A model folder, a teacher card or a hub name.")],
    right: Annotated[Path | None, typer.Argument(metavar="B", help="Another evaluation, to compare with A.")] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="references", help="Compare A with the references of its prompts."),
    ] = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Compare means over tokens; sums favour short responses.")
    ] = False,
    tie: Annotated[float, typer.Option("--tie", min=0, help="Largest difference in nats that is a tie.")] = 1e-3,
    seed: Annotated[int | None, typer.Option("--seed", help="The sampling seed to compare; else the lowest.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="The temperature to compare; else 1, or the highest.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Compare the first so many prompts only.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Responses that a rank reads at once.")] = 8,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", min=1, help="Tokens that a rank reads at once, padding included.")
    ] = 8192,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results; else one inside A.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the results of another comparison.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures into this file.")] = None,
) -> None:
    """Count whose responses a model finds likelier.

    A stand-in where no judge can be asked: a frozen model, as a teacher, gives each response a log-probability, and the
    larger one wins. It says what that model would write, not what is good. Nothing is sent anywhere.

    \b
    Examples:
      minillm win-rate runs/mine runs/start --by teachers/gpt2-xl
      minillm win-rate runs/mine --against references --by teachers/gpt2-xl
    """
    from minillm.judge.likelihood_command import run
    from minillm.micro_batches import Limits

    run(
        (left, right), by=by, against=against, per_token=per_token, tie=tie, seed=seed, temperature=temperature,
        limit=limit, limits=Limits(rows=batch, places=batch_tokens), out=out, fresh=fresh, json_file=json_file,
    )  # fmt: skip
