"""The command that says what a run would take, before there is one."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillm import exits
from minillm.cli import options
from minillm.errors import ConfigError, did_you_mean
from minillm.own_files import OwnFile
from minillm.own_files import json_file as own_json

if TYPE_CHECKING:
    from minillm.plan.advice import Change
    from minillm.plan.sizes import Work
    from minillm.plan.traffic import Rates

OF_A_STAGE = (
    *("teacher", "student", "stage", "batch", "micro_batch", "lengths", "updates", "alpha", "lora", "precision"),
    "bottleneck",
    *("activation_checkpointing", "gather"),
)
"""Options that a run's file decides."""
UNSAID = ("overrides", "json_file")
"""What the command that is advised does not say as options."""
MOST = 1e9
"""GiB beyond which a memory is a slip of the pen."""


def plan(  # noqa: PLR0917 (typer reads options from parameters)
    ctx: typer.Context,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs in all.")],
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", min=0.1, help="Memory of each, in GiB.")],
    overrides: options.Overrides = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Plan this run's YAML file, in place of the options of a stage.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="A teacher's card, or a folder with config.json.")
    ] = None,
    student: Annotated[
        str | None, typer.Option("--student", help="A student's card, or a folder with config.json.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs of a node.")] = 8,
    host_memory: Annotated[
        float | None, typer.Option("--host-memory", min=1, help="Memory of a node, in GiB; not limited without.")
    ] = None,
    stage: Annotated[str, typer.Option("--stage", help="The student's engine: zero0 … zero3-offload.")] = "zero2",
    placement: Annotated[
        str | None, typer.Option("--placement", help="The teacher's; that of its card without.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Responses of a rollout, all GPUs together.")] = 256,
    micro_batch: Annotated[
        int, typer.Option("--micro-batch", min=0, help="Rows of a training forward on each GPU; 0: all.")
    ] = 8,
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of prompt and response, as 256,256.")] = "256,256",
    updates: Annotated[int, typer.Option("--updates", min=1, help="Updates on each rollout.")] = 1,
    alpha: Annotated[float, typer.Option("--alpha", min=0, max=1, help="Teacher mixing (teacher_mix).")] = 0.2,
    lora: Annotated[int, typer.Option("--lora", min=0, help="Rank of an adapter; 0: none.")] = 0,
    bottleneck: Annotated[
        int, typer.Option("--bottleneck", min=0, help="Units of an adapter beside each MLP; 0: none.")
    ] = 0,
    precision: Annotated[str, typer.Option("--precision", help="The student's: bf16 or fp32.")] = "bf16",
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Activations are made again in the backward pass.")
    ] = False,
    gather: Annotated[
        str, typer.Option("--gather", help="Gather a ZeRO-3 student once a rollout, or each forward.")
    ] = "rollout",
    flops: Annotated[float | None, typer.Option("--flops", min=1, help="FLOP/s that a GPU reaches.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", min=1, help="Bytes/s that a GPU sends to others.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure FLOP/s and memory of this machine.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the plan into this file.")] = None,
) -> None:
    """Say whether a run fits its GPUs, and how long a step is.

    Of two models, or of a run's file: of its stage that needs the most. Memory by item and phase, whether it fits, the
    largest batch that does, the cheapest change that makes it fit, what a step moves between GPUs and about how long it
    takes. Exit code 0 where it fits, 1 where it does not.

    \b
    Example:
      minillm plan --teacher llama-13b --student llama-7b --gpus 8 \\
        --gpu-memory 80
      minillm plan --config recipes/quickstart/minillm.yaml --gpus 2 \\
        --gpu-memory 8
    """
    from minillm.plan.advice import advise
    from minillm.plan.memory import memory_of
    from minillm.plan.possible import notes, require_possible
    from minillm.plan.show import as_json, print_plan
    from minillm.plan.sizes import GIB
    from minillm.plan.traffic import traffic_of

    _require_finite(ctx.params)
    own = None if json_file is None else _own_file(json_file)
    if own is not None:
        own.require()
    work = _of_options(ctx.params) if config is None else _of_file(config, overrides or [], ctx)
    require_possible(work)
    rates = _rates(flops=flops, bandwidth=bandwidth, measure=measure, precision=work.precision)
    host = None if host_memory is None else int(host_memory * GIB)
    advice = advise(work, gpu_bytes=int(gpu_memory * GIB), host_bytes=host)
    found = work, memory_of(work), traffic_of(work, rates), rates, advice
    command = _command(ctx, advice.change) if advice.change else ""
    print_plan(*found, command=command)
    for line in notes(work):
        print(f"note: {line}")
    if own is not None:
        own.write((json.dumps(as_json(*found, command=command), indent=2) + "\n").encode())
    if not advice.fits:
        raise typer.Exit(exits.CHECK_FAILED)


def _require_finite(given: Mapping[str, Any]) -> None:
    for name in ("gpu_memory", "host_memory", "flops", "bandwidth"):
        value, option = given[name], f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if not math.isfinite(value):
            raise ConfigError(f"{option} {value}: wanted a number\n  give what the hardware has")
        if name.endswith("memory") and value > MOST:
            raise ConfigError(f"{option} {value:g}: wanted GiB, as 80\n  give what the hardware has")


def _own_file(file: Path) -> OwnFile:
    return own_json(file, what="a plan of minillm plan", fits=lambda found: found.keys() >= {"settings", "peaks"})


def _of_options(given: Mapping[str, Any]) -> Work:
    from minillm.cards import load_card
    from minillm.plan.sizes import ENGINES, PLACEMENTS, Work, sizes_of

    if given["overrides"]:
        raise ConfigError(f"{given['overrides'][0]}: KEY=VALUE changes a run's file; name it with --config FILE")
    for name in ("teacher", "student"):
        if given[name] is None:
            raise ConfigError(
                f"--{name} is missing\n  give --teacher and --student, or a run's file with --config FILE"
            )
    prompt, new = _lengths(given["lengths"])
    teacher = load_card(given["teacher"], kind="teachers")
    return Work(
        student=sizes_of(load_card(given["student"], kind="students")), teacher=sizes_of(teacher), gpus=given["gpus"],
        gpus_per_node=given["gpus_per_node"], engine=_one_of(given["stage"], ENGINES, option="--stage"),
        placement=_one_of(given["placement"] or teacher.placement, PLACEMENTS, option="--placement"),
        precision=_one_of(given["precision"], ("bf16", "fp32"), option="--precision"),
        teacher_precision="bf16" if teacher.dtype == "bfloat16" else "fp32", rows=given["batch"],
        micro_batch=given["micro_batch"], prompt_tokens=prompt, new_tokens=new, inner_epochs=given["updates"],
        teacher_mix=given["alpha"], lora=given["lora"], bottleneck=given["bottleneck"],
        recompute=given["activation_checkpointing"],
        gather=_one_of(given["gather"], ("rollout", "forward"), option="--gather"),
    )  # fmt: skip


def _of_file(file: Path, overrides: Sequence[str], ctx: typer.Context) -> Work:
    """The run's hungriest stage."""
    from minillm.config import load_config
    from minillm.plan.of_run import hungriest, works_of_run
    from minillm.plan.sizes import PLACEMENTS

    doubled = [name for name in OF_A_STAGE if _is_given(ctx, name)]
    if doubled:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in doubled)
        raise ConfigError(
            f"{names} with --config: {file} decides that\n  leave out {names}, or change the file's with KEY=VALUE"
        )
    given = ctx.params
    placement = given["placement"]
    works = works_of_run(
        load_config(file, overrides), gpus=given["gpus"], gpus_per_node=given["gpus_per_node"],
        placement=None if placement is None else _one_of(placement, PLACEMENTS, option="--placement"),
    )  # fmt: skip
    return hungriest(works)


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _command(ctx: typer.Context, changes: Sequence[Change]) -> str:
    """This command with other settings, to be pasted."""
    settings = list(ctx.params["overrides"] or [])
    given = {name: value for name, value in ctx.params.items() if _is_given(ctx, name)}
    words = {f"--{name.replace('_', '-')}": value for name, value in given.items() if name not in UNSAID}
    for change in changes:
        if ctx.params["config"] is not None and change.setting is not None:
            settings.append(change.setting)
        else:
            option, _, value = change.option.partition(" ")
            words[option] = value or True
    line = ["minillm", "plan"]
    for option, value in words.items():
        if value is not False:
            line += [option] if value is True else [option, f"{value:.12g}" if type(value) is float else str(value)]
    return shlex.join([*line, *settings])


def _lengths(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--lengths {text!r}: wanted two numbers of tokens, prompt and response, as 256,256")
    return int(parts[0]), int(parts[1])


def _one_of(value: str, known: Sequence[str], *, option: str) -> Any:
    if value not in known:
        raise ConfigError(f"{option} {value!r}: wanted one of {', '.join(known)}{did_you_mean(value, known)}")
    return value


def _rates(*, flops: float | None, bandwidth: float | None, measure: bool, precision: str) -> Rates:
    from minillm.plan.traffic import Rates

    rates, told = Rates(), []
    if measure:
        import torch

        from minillm.bench.peaks import measure_peaks
        from minillm.plan.sizes import DTYPES

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        peaks = measure_peaks(device, DTYPES[precision])
        rates = replace(rates, flops=peaks.flops_per_s, memory=peaks.bytes_per_s)
        told.append(f"measured on this machine ({device.type}): {peaks.flops_per_s:.3g} FLOP/s")
    given = {name: value for name, value in {"flops": flops, "bandwidth": bandwidth}.items() if value is not None}
    told += [f"given: {name} {value:.3g}" for name, value in given.items()]
    source = "; ".join([*told, f"otherwise {rates.source}"])
    return replace(rates, **given, source=source) if told else rates
