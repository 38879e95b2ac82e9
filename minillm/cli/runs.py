"""Commands that read a run's configuration: train, measure, write down what a model says, look at the gradient."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from minillm.cli import options
from minillm.errors import ConfigError
from minillm.stops import told_ends

if TYPE_CHECKING:
    from minillm.config import RunConfig


@told_ends()
def sft(  # noqa: PLR0917 (typer reads options from parameters)
    config: options.Config,
    overrides: options.Overrides = None,
    fresh: options.Fresh = False,
    resume: options.Resume = "auto",
    accept_change: options.AcceptChange = None,
    profile: options.Profile = 0,
    dry_run: options.DryRun = False,
) -> None:
    """Train a model on reference responses (fine-tuning).

    \b
    Example:
      minillm sft --config recipes/quickstart/teacher.yaml threads=2
    """
    settings = _load(config, overrides)
    if any(stage.kind != "sft" for stage in settings.stages):
        raise ConfigError(f"{config}: holds a stage that is not sft; run it with: minillm distill --config {config}")
    _run(settings, fresh=fresh, resume=resume, accept_change=accept_change, profile=profile, dry_run=dry_run)


@told_ends()
def distill(  # noqa: PLR0917 (typer reads options from parameters)
    config: options.Config,
    overrides: options.Overrides = None,
    fresh: options.Fresh = False,
    resume: options.Resume = "auto",
    accept_change: options.AcceptChange = None,
    profile: options.Profile = 0,
    dry_run: options.DryRun = False,
) -> None:
    """Distil a teacher into a student, evaluate it, report.

    Runs all stages of the configuration, in one process or on every rank of a launcher. Stopped by SIGTERM or Ctrl-C
    it saves what it has and ends with code 75; the same command goes on from there, or from the last save of a run
    that was killed.

    \b
    Examples:
      minillm distill --config recipes/quickstart/minillm.yaml seed=3
      minillm launch --ranks 2 distill \\
        --config recipes/quickstart/minillm.yaml
    """
    settings = _load(config, overrides)
    _run(settings, fresh=fresh, resume=resume, accept_change=accept_change, profile=profile, dry_run=dry_run)


def evaluate(  # noqa: PLR0917 (typer reads options from parameters)
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a student card or a hub name.")],
    config: options.Config,
    out: Annotated[Path, typer.Option("--out", help="Folder for results.json and samples.jsonl.")],
    overrides: options.Overrides = None,
    preset: Annotated[
        str, typer.Option("--preset", help="A published protocol: minillm. Its settings replace the file's.")
    ] = "",
    fresh: options.Fresh = False,
    dry_run: options.DryRun = False,
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
    if dry_run:
        _show(settings, f"measures {model} into {out}", evaluated=model)
        return
    from minillm import api

    api.evaluate(model, settings, out=out, fresh=fresh)
    if os.environ.get("RANK", "0") == "0":
        from minillm.report import print_evaluation

        name = Path(model).name if Path(model).name != "student" else Path(model).absolute().parent.name
        print_evaluation(name, out, resamples=settings.evaluation.bootstrap, seed=settings.seed)


def prefers(  # noqa: PLR0917 (typer reads options from parameters)
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a teacher card or a hub name.")],
    config: options.Config,
    overrides: options.Overrides = None,
    pairs: Annotated[
        str | None, typer.Option("--pairs", metavar="FILE", help="Held-out pairs; else data.preferences_validation.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="MODEL", help="Count what MODEL adds to this model's.")
    ] = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="Compare means over tokens, not sums.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Read the first so many pairs only.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures into this file.")] = None,
) -> None:
    """Count held-out pairs whose chosen response a model prefers.

    The higher reward is the higher log-probability, less that of the reference where one is named. With intervals over
    prompts, and whether that is more than chance.

    \b
    Example:
      minillm prefers runs/mine/student --reference runs/sft/student \\
        --pairs held-out.jsonl --config recipes/preference/dpo.yaml
    """
    # Into the configuration, which is read as a whole: what it says of pairs is said of these.
    named = [] if pairs is None else [f"data.preferences_validation={json.dumps(pairs, ensure_ascii=False)}"]
    settings = _load(config, [*(overrides or []), *named])
    from minillm.pair_accuracy_command import run

    run(model, settings, reference=reference, per_token=per_token, limit=limit, json_file=json_file)


def generate(  # noqa: PLR0917 (typer reads options from parameters)
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a teacher card or a hub name.")],
    config: options.Config,
    out: Annotated[Path, typer.Option("--out", help="File of rows to write, ending in .jsonl.")],
    overrides: options.Overrides = None,
    split: Annotated[str, typer.Option("--split", help="Whose prompts: train, validation or test.")] = "train",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Responses to each prompt.")] = 1,
    keep_cut: Annotated[
        bool, typer.Option("--keep-cut", help="Also write responses that were cut or are empty, to be looked at.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace generated text that is there.")] = False,
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


def pairs(  # noqa: PLR0917 (typer reads options from parameters)
    config: options.Config,
    out: Annotated[Path, typer.Option("--out", help="File of pairs to write, ending in .jsonl.")],
    overrides: options.Overrides = None,
    student: Annotated[str | None, typer.Option("--student", help="Whose answers lose; the run's student.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Whose answers win; the run's teacher.")] = None,
    split: Annotated[str, typer.Option("--split", help="Whose prompts: train, validation or test.")] = "train",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many prompts, the first ones.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace pairs that are there.")] = False,
) -> None:
    """Make pairs to prefer: a teacher's answer and a student's.

    Both answer the prompts of a configuration's split. A pair has the log-probability of both answers under both
    models; FILE.manifest.json says who wrote them. Interrupted, the same command goes on with the answers it has.

    \b
    Example:
      minillm pairs --config recipes/quickstart/minillm.yaml \\
        --teacher runs/quickstart/teacher/student \\
        --student runs/mine/student --out pairs.jsonl
    """
    settings = _load(config, overrides)
    from minillm import api

    api.make_pairs(settings, out=out, student=student, teacher=teacher, split=split, limit=limit, fresh=fresh)


def cache(  # noqa: PLR0917 (typer reads options from parameters)
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A model folder, a teacher card or a hub name.")],
    config: options.Config,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Likeliest ids to keep of each token.")],
    overrides: options.Overrides = None,
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


def diagnose(  # noqa: PLR0917 (typer reads options from parameters)
    config: options.Config,
    overrides: options.Overrides = None,
    estimators: Annotated[
        str | None,
        typer.Option("--estimators", metavar="A,B,…", help="Choices of credit, such as expected+ridge+g0.95."),
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Training prompts to measure on.")] = 64,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Responses to each of them; even.")] = 4,
    directions: Annotated[int, typer.Option("--directions", min=1, help="Random directions in weight space.")] = 32,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of prompts, text and directions.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures into this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the variances: .png, .svg or .pdf.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the file that --json names.")] = False,
) -> None:
    """Measure noise and bias of the gradient on your models.

    Every choice of credit (returns, baseline, discount, horizon), on the configuration's teacher, student and prompts.
    Nothing is trained. The student is the one that the configuration starts from.

    \b
    Example:
      minillm diagnose --config recipes/quickstart/minillm.yaml \\
        student=runs/quickstart/sft/student --json diagnosis.json
    """
    settings = _load(config, overrides)
    from minillm.diagnose.command import run

    names = [name.strip() for name in estimators.split(",")] if estimators is not None else None
    run(
        settings, names=names, prompts=prompts, samples=samples, directions=directions, seed=seed,
        json_file=json_file, plot=plot, fresh=fresh,
    )  # fmt: skip


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


def _show(settings: RunConfig, what: str, *, evaluated: str | None = None) -> None:
    """Prints a configuration as a file that could be run, on the first rank; raises what the run would."""
    from minillm.cli.dry_run import require_startable, tell
    from minillm.config import dump_config
    from minillm.stage_order import start_words

    if os.environ.get("RANK", "0") == "0":
        print(f"# {what}, as the following says\n{dump_config(settings)}", end="", flush=True)
        for line in start_words(settings.stages) if evaluated is None else ():
            print(f"# {line}", flush=True)
    tell(require_startable(settings, evaluated=evaluated))


def _run(
    settings: RunConfig, *, fresh: bool, resume: str, accept_change: list[str] | None, profile: int, dry_run: bool
) -> None:
    if fresh and (resume != "auto" or accept_change):
        raise ConfigError("--fresh starts over, so there is nothing to go on from; leave out --resume, --accept-change")
    if dry_run:
        _show(settings, f"trains into {settings.out}/{settings.name}")
        return
    from minillm import api

    wanted: Literal["auto", True] | Path = "auto" if resume == "auto" else True if resume == "true" else Path(resume)
    api.distill(settings, fresh=fresh, resume=wanted, accept_changes=accept_change or (), profile=profile)
