"""The command line: thin commands over the Python API, with errors told in a few lines and no traceback.

Exit codes: 0 done; 1 a check of ``minillm selftest`` failed; 2 something the user can mend (nothing was trained); 3
numbers that are not finite; 4 an alarm that stops the run; 130 interrupted.
In help texts, ``\\b`` keeps a paragraph's lines as they are, so that an example can be copied.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minillm.bench import commands, commands_rollout, commands_scale  # noqa: F401 (each adds its benchmarks)
from minillm.bench.options import app as bench_app
from minillm.errors import ConfigError, DataError, MinillmError

if TYPE_CHECKING:
    from minillm.config import RunConfig

CHECK_FAILED = 1
INTERRUPTED = 130
FIRST_RANK_SPEAKS_S = 10.0
"""How long the other ranks leave rank 0 to tell an error that all of them have; the launcher ends them once it did."""
EXAMPLES = """
\b
Examples:
  minillm sft --config recipes/quickstart/teacher.yaml threads=2
  minillm distill --config recipes/quickstart/minillm.yaml name=mine seed=3
  minillm evaluate runs/mine/student --out runs/mine/again \\
    --config recipes/quickstart/minillm.yaml
  minillm report a=runs/a b=runs/b --difference a,b --out runs/a-and-b
  minillm generate runs/quickstart/teacher/student --out taught.jsonl \\
    --config recipes/quickstart/minillm.yaml
  minillm cache runs/quickstart/teacher/student --top-k 16 --out cached \\
    --config recipes/quickstart/minillm.yaml
  minillm compare a=runs/a b=runs/b --out runs/a-or-b
  minillm world --out world
  minillm diagnose --config recipes/quickstart/minillm.yaml \\
    student=runs/mine/student --prompts 128
  minillm study --config docs/results/long-horizon.yaml --show
  minillm judge runs/a runs/b --url http://localhost:8000/v1 --model NAME
  minillm selftest --json selftest.json
  minillm bench loss --json bench.json

\b
On several processes or GPUs, under DeepSpeed's launcher:
  deepspeed --num_accelerators 2 --module minillm distill \\
    --config recipes/quickstart/minillm.yaml

More on a command: minillm COMMAND --help
"""

app = typer.Typer(
    name="minillm",
    help="Distil a large language model into a small one, on the small one's own text, and prove what it is worth.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path, typer.Option("--config", help="The run's YAML file, such as recipes/quickstart/minillm.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's: stages.0.steps=5"),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over: replace what an earlier run left in the same folder.")
]


def _tell_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"minillm {version('minillm')}")
        raise typer.Exit


@app.callback()
def _common(
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    # DeepSpeed's launcher puts --local_rank before the command; the environment says the same, and libraries read it
    # there.
    os.environ.setdefault("LOCAL_RANK", str(local_rank))


@app.command()
def sft(config: Config, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Train a model on reference responses (fine-tuning).

    \b
    Example:
      minillm sft --config recipes/quickstart/teacher.yaml threads=2
    """
    settings = _load(config, overrides)
    if any(stage.kind != "sft" for stage in settings.stages):
        raise ConfigError(f"{config}: holds a stage that is not sft; run it with: minillm distill --config {config}")
    _run(settings, fresh=fresh)


@app.command()
def distill(config: Config, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Distil a teacher into a student, evaluate it, report.

    Runs all stages of the configuration, in one process or on every rank of a launcher.

    \b
    Examples:
      minillm distill --config recipes/quickstart/minillm.yaml seed=3
      deepspeed --num_accelerators 2 --module minillm distill \\
        --config recipes/quickstart/minillm.yaml
    """
    _run(_load(config, overrides), fresh=fresh)


@app.command()
def evaluate(  # noqa: PLR0917 (typer reads options from parameters)
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a student card or a hub name.")],
    config: Config,
    out: Annotated[Path, typer.Option("--out", help="Folder for results.json and samples.jsonl.")],
    overrides: Overrides = None,
    preset: Annotated[
        str, typer.Option("--preset", help="A published protocol: minillm. Its settings replace the file's.")
    ] = "",
    fresh: Fresh = False,
) -> None:
    """Measure a model on a configuration's test prompts.

    Writes results.json and samples.jsonl into the --out folder; of several sets in data.test each into a folder of
    its name there. Interrupted, it goes on where it was when the same command is given again.

    \b
    Examples:
      minillm evaluate runs/mine/student --out runs/mine/again \\
        --config recipes/quickstart/minillm.yaml
      minillm evaluate runs/mine/student --out runs/mine/five --preset minillm \\
        --config recipes/jsonl.yaml 'data.test={dolly: set:dolly, sinst: set:sinst}'
    """
    settings = _load(config, [*_preset(preset), *(overrides or [])])
    from minillm import api

    api.evaluate(model, settings, out=out, fresh=fresh)


@app.command()
def generate(  # noqa: PLR0917 (typer reads options from parameters)
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a teacher card or a hub name.")],
    config: Config,
    out: Annotated[Path, typer.Option("--out", help="File of rows to write, ending in .jsonl.")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option("--split", help="Whose prompts: train, validation or test.")] = "train",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Responses to each prompt.")] = 1,
    keep_cut: Annotated[
        bool, typer.Option("--keep-cut", help="Also write responses that were cut or are empty.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: replace the file that is there.")] = False,
) -> None:
    """Have a model answer prompts, as rows to train on.

    The prompts are those of a configuration's split, drawn as its decoding section says. The file says beside it, in
    FILE.manifest.json, which weights wrote it. Interrupted, the same command goes on where it stopped.

    \b
    Example:
      minillm generate runs/quickstart/teacher/student --split train \\
        --out taught.jsonl --config recipes/quickstart/minillm.yaml
    """
    settings = _load(config, overrides)
    from minillm import api

    api.generate(model, settings, out=out, split=split, samples=samples, keep_cut=keep_cut, fresh=fresh)


@app.command()
def cache(  # noqa: PLR0917 (typer reads options from parameters)
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A model folder, a teacher card or a hub name.")],
    config: Config,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Likeliest ids to keep of each token.")],
    overrides: Overrides = None,
    precision: Annotated[
        str, typer.Option("--precision", help="Of stored log-probabilities: float16 or float32.")
    ] = "float16",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: replace the cache that is there.")] = False,
) -> None:
    """Store what a teacher says about reference responses.

    The teacher reads the responses of data.train once; a kd stage with teacher_cache then trains without it. For each
    token the likeliest ids are kept, and how likely all others are together.

    \b
    Example:
      minillm cache runs/quickstart/teacher/student --top-k 16 \\
        --out cached --config recipes/quickstart/minillm.yaml
    """
    if precision not in {"float16", "float32"}:
        raise ConfigError(f"--precision {precision!r}: wanted float16 or float32")
    settings = _load(config, overrides)
    from minillm import api

    api.cache_teacher(teacher, settings, out=out, top_k=top_k, precision=precision, fresh=fresh)  # type: ignore[arg-type]


@app.command()
def report(
    evaluations: Annotated[
        list[str], typer.Argument(metavar="NAME=FOLDER", help="Evaluation folders, by the name to show.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for results.json and report.html.")],
    difference: Annotated[
        list[str] | None,
        typer.Option("--difference", metavar="A,B", help="Add the paired difference A - B; may be repeated."),
    ] = None,
    training: Annotated[
        list[str] | None,
        typer.Option("--training", metavar="NAME=RUN", help="Add a run's training curves; may be repeated."),
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
    named = _named_folders(evaluations)
    runs = _named_folders(training or [])
    pairs: list[tuple[str, str]] = []
    for text in difference or []:
        left, comma, right = text.partition(",")
        if not comma or not left or not right:
            raise ConfigError(f"--difference {text!r}: wanted two names with a comma between them, such as minillm,sft")
        pairs.append((left, right))
    from minillm.report import build_report  # not from api, which would load torch for it

    build_report(named, out=out, differences=pairs, training=runs, title=title)


@app.command()
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
    """Say which of several evaluated models is better, and how surely.

    Paired differences with intervals, wins and losses, prompts that differ most, quality at equal diversity, and a
    verdict in words. The same prompts, references and decoding settings are needed.

    \b
    Example:
      minillm compare sft=runs/quickstart/sft minillm=runs/quickstart/minillm \
        --out runs/quickstart
    """
    from minillm.compare.command import compare as run
    from minillm.compare.command import named_folders
    from minillm.compare.summary import Options

    options = Options(
        resamples=resamples,
        seed=seed,
        also_seeds=resample_seeds,
        across=across,
        tolerance=tolerance,
        by=by,
        shown=shown,
    )
    run(named_folders(evaluations), options=options, json_file=json_file, out=out, title=title)


@app.command()
def world(
    out: Annotated[Path, typer.Option("--out", help="Folder for train.jsonl, validation.jsonl and test.jsonl.")],
    fresh: Fresh = False,
) -> None:
    """Write the embedded micro-world as JSON Lines files.

    They are there to read, and as an example of the format of prompts.

    \b
    Example:
      minillm world --out world
    """
    from minillm.store import make_folder, write_jsonl
    from minillm.world import rows

    splits = ("train", "validation", "test")
    standing = [out / f"{split}.jsonl" for split in splits if (out / f"{split}.jsonl").exists()]
    if standing and not fresh:
        raise DataError(f"{standing[0]} exists already; give another --out, or --fresh to replace it")
    make_folder(out, setting="--out")
    for split in splits:
        records = rows(split)
        write_jsonl(out / f"{split}.jsonl", records)
        print(f"{out / f'{split}.jsonl'}: {len(records):,} rows")


@app.command()
def diagnose(  # noqa: PLR0917 (typer reads options from parameters)
    config: Config,
    overrides: Overrides = None,
    estimators: Annotated[
        str, typer.Option("--estimators", metavar="A,B,…", help="Choices of credit, such as expected+ridge+g0.95.")
    ] = "",
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Training prompts to measure on.")] = 64,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Responses to each of them; even.")] = 4,
    directions: Annotated[int, typer.Option("--directions", min=1, help="Random directions in weight space.")] = 32,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of prompts, text and directions.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures into this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the variances: .png, .svg or .pdf.")] = None,
) -> None:
    """Measure how noisy and how biased the gradient is on your pair.

    Every choice of credit (returns, baseline, discount, horizon), on the configuration's teacher, student and prompts.
    Nothing is trained. The student is the one that the configuration starts from.

    \b
    Example:
      minillm diagnose --config recipes/quickstart/minillm.yaml \\
        student=runs/quickstart/sft/student --json diagnosis.json
    """
    settings = _load(config, overrides)
    from minillm.diagnose.command import run

    names = [name.strip() for name in estimators.split(",")] if estimators else None
    run(
        settings, names=names, prompts=prompts, samples=samples, directions=directions, seed=seed,
        json_file=json_file, plot=plot,
    )  # fmt: skip


@app.command()
def study(  # noqa: PLR0917 (typer reads options from parameters)
    config: Annotated[Path, typer.Option("--config", help="The study's YAML file, as docs/results/long-horizon.yaml.")],
    arms: Annotated[str, typer.Option("--arms", metavar="A,B,…", help="Make the cells of these arms only.")] = "",
    seeds: Annotated[str, typer.Option("--seeds", metavar="1,2,…", help="Make those of these seeds only.")] = "",
    show: Annotated[bool, typer.Option("--show", help="Make nothing; print what is there.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Make cells anew that are there already.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all figures into this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw them: .png, .svg or .pdf.")] = None,
    curves: Annotated[Path | None, typer.Option("--curves", help="Also draw validations during training.")] = None,
    against: Annotated[str, typer.Option(help="Drawn against what: tokens, update or seconds.")] = "tokens",
) -> None:
    """Compare ways to train over several training seeds.

    Each arm and seed is a cell: a run, its evaluation, and one small file that is kept. Cells that are there
    are not made again, so a table grows over several runs; seed by seed, so that it is balanced.

    \b
    Example:
      minillm study --config docs/results/long-horizon.yaml --show
    """
    from minillm.study.command import run

    if any(not each.strip().isdecimal() for each in seeds.split(",") if seeds):
        raise ConfigError(f"--seeds {seeds!r}: wanted whole numbers with commas between them, such as 1,2")
    run(
        config,
        arms=[arm.strip() for arm in arms.split(",")] if arms else None,
        seeds=[int(seed) for seed in seeds.split(",")] if seeds else None,
        show=show, again=again, json_file=json_file, plot=plot, curves=curves, against=against,
    )  # fmt: skip


@app.command()
def judge(  # noqa: PLR0917 (typer reads options from parameters)
    left: Annotated[Path, typer.Argument(metavar="A", help="Folder of an evaluation.")],
    url: Annotated[str, typer.Option("--url", help="Base of the endpoint, such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option("--model", help="The judge's name there.")],
    right: Annotated[Path | None, typer.Argument(metavar="B", help="Another evaluation, to compare with A.")] = None,
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
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results; else one inside A.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the results of another judging.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures into this file.")] = None,
) -> None:
    """Let a model behind a chat endpoint judge the responses.

    One folder: each response is scored beside its reference, as in the paper. Two: they are compared, each pair in
    both orders. A key is read from MINILLM_JUDGE_KEY, else OPENAI_API_KEY. Answers are kept: nothing is asked twice.

    \b
    Example:
      minillm judge runs/mine/again --url http://localhost:8000/v1 \\
        --model NAME --limit 50
    """
    from minillm.judge.command import run

    run(
        (left, right),
        settings={
            "url": url, "model": model, "concurrency": concurrency, "timeout": timeout, "retries": retries,
            "max_tokens": max_tokens, "price_in": price_in, "price_out": price_out, "max_cost": max_cost,
        },
        single=single, seed=seed, temperature=temperature, limit=limit, template=template, out=out, fresh=fresh,
        json_file=json_file,
    )  # fmt: skip


def _usable(file: Path | None) -> Path | None:
    if file is not None:
        from minillm.selftest.record import require_usable

        require_usable(file)  # before any check runs
    return file


@app.command()
def selftest(
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=_usable, help="Also write what was found into this file.")
    ] = None,
) -> None:
    """Prove on this machine that the library does what it says.

    Gradients by enumeration, golden numbers, sampling, models against plain forwards, DeepSpeed's steps against plain
    torch. Takes less than a minute on one core, needs no network and no tests/ folder. Exit code 0 when every check
    passes, 1 when one fails.

    \b
    Example:
      minillm selftest --json selftest.json
    """
    from minillm.selftest.run import selftest as run_checks

    if not run_checks(json_file):
        raise typer.Exit(CHECK_FAILED)


app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point of ``minillm`` and ``python -m minillm``."""
    sys.exit(_guarded(app))


def _guarded(command: Callable[..., object]) -> int:
    """Runs a command; its exit code, with an error of the user's told in a few lines."""
    try:
        result = command(standalone_mode=False)
    except MinillmError as error:
        _tell(f"{type(error).__name__}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        result = INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _tell(f"{type(error).__name__}: {where}\n  look at that path: what it is, its rights, the room on its disk")
        return MinillmError.exit_code
    except Exception as error:
        if not _is_usage_error(error):
            raise
        error.show()  # type: ignore[attr-defined]
        return MinillmError.exit_code
    # typer turns an interruption that reaches it into this code.
    if result == INTERRUPTED:
        print(
            "interrupted; the same command starts from the beginning again "
            "(a study keeps its finished cells, an evaluation and generate their answers, a judge its answers)",
            file=sys.stderr,
        )
    return result if isinstance(result, int) else 0


def _tell(text: str) -> None:
    """Prints an error once, although all ranks have it, and also where only one of them has it."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # The launcher ends all ranks as soon as one has ended, which must not be before rank 0 has spoken.
        time.sleep(FIRST_RANK_SPEAKS_S)
        text = f"rank {rank}: {text}"
    print(text, file=sys.stderr, flush=True)


def _is_usage_error(error: Exception) -> bool:
    """Whether the command line itself was wrong: an unknown option, a missing argument."""
    return hasattr(error, "show") and hasattr(error, "exit_code")


def _load(config: Path, overrides: list[str] | None) -> RunConfig:
    from minillm.config import load_config

    return load_config(config, overrides or [])


def _preset(name: str) -> tuple[str, ...]:
    """The overrides of a protocol, told, since some of them move every score; none without a name."""
    if not name:
        return ()
    from minillm.released import preset

    found = preset(name)
    if os.environ.get("RANK", "0") == "0":
        print(f"preset {name}: {' '.join(found)}", flush=True)
    return found


def _run(settings: RunConfig, *, fresh: bool) -> None:
    from minillm import api

    api.distill(settings, fresh=fresh)


def _named_folders(pairs: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not name or not folder:
            raise ConfigError(f"{pair!r}: wanted NAME=FOLDER, such as sft=runs/quickstart/sft")
        if not Path(folder).is_dir():
            got = "a file" if Path(folder).exists() else "not there"
            raise DataError(f"{name}: {folder} is {got}; wanted a folder")
        if name in found:
            raise ConfigError(f"{pair!r}: the name {name!r} is given twice; give each folder a name of its own")
        found[name] = Path(folder)
    return found
