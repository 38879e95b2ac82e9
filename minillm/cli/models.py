"""Commands on models before there is a run: the cards that are there, and what a run with them would take."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillm import exits
from minillm.errors import ConfigError, did_you_mean
from minillm.figures import PAPER_ROWS

if TYPE_CHECKING:
    from minillm.cards import Card, Kind
    from minillm.plan.traffic import Rates


def cards(
    name: Annotated[str | None, typer.Argument(help="A card, as teachers/gpt2-xl; all in a table without one.")] = None,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Training rows, by which epochs become steps.")
    ] = PAPER_ROWS,
) -> None:
    """List the cards of teachers and students, or show one.

    Of a student with published settings also the stages of a run that follow them, to be copied. Batches in them are of
    all ranks together, so they do not change with the number of GPUs.

    \b
    Example:
      minillm cards students/gpt2 --rows 12000
    """
    from minillm.cards import load_card

    if name is None:
        _table("teachers")
        _table("students")
        return
    _show(load_card(name, kind="students"), rows=rows)


def _table(kind: Kind) -> None:
    from minillm.cards import known_names, load_card
    from minillm.terminal import print_table

    found = [load_card(name, kind=kind) for name in known_names(kind, suffix=".yaml")]
    columns = [
        "",
        "parameters",
        "layers",
        "hidden",
        "template",
        *(["placement"] if kind == "teachers" else []),
        "terms",
    ]
    lines = []
    for card in found:
        sizes = card.figures
        many = f"{sizes.parameters / 1e9:.2f} B" if sizes.parameters else ""
        line = [card.name, many, *(str(size or "") for size in (sizes.layers, sizes.hidden)), card.template or ""]
        line += [*([card.placement] if kind == "teachers" else []), re.split("[;,(]", card.licence)[0].strip()]
        lines.append(line)
    print_table(f"{kind.capitalize()} (minillm cards {kind}/NAME shows one)", columns, lines)


def _show(card: Card, *, rows: int) -> None:
    from minillm.figures import stages_yaml

    print(f"name: {card.name}")
    told = card.model_dump(mode="json", exclude={"name", "training", "figures"}, exclude_none=True)
    for field, value in told.items():
        print(f"{field}: {value}")
    print("figures:")
    for field, value in card.figures.model_dump(exclude_none=True).items():
        print(f"  {field}: {value:,}" if type(value) is int else f"  {field}: {str(value).lower()}")
    if card.training is not None:
        print("\n# for the YAML file of a run; micro_batch is for the published GPUs and changes memory only")
        print(stages_yaml(card.training, rows=rows))


def plan(  # noqa: PLR0917 (typer reads options from parameters)
    teacher: Annotated[str, typer.Option("--teacher", help="A teacher's card, or a folder with config.json.")],
    student: Annotated[str, typer.Option("--student", help="A student's card, or a folder with config.json.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs in all.")],
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", min=0.1, help="Memory of each, in GiB.")],
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
    lora: Annotated[int, typer.Option("--lora", min=0, help="Rank of an adapter; 0: all weights learn.")] = 0,
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

    Memory by item and phase, whether it fits, the largest batch that does, the cheapest change that makes it fit, what
    a step moves between GPUs and about how long it takes. Exit code 0 where it fits, 1 where it does not.

    \b
    Example:
      minillm plan --teacher llama-13b --student llama-7b --gpus 8 \\
        --gpu-memory 80
    """
    from minillm.cards import load_card
    from minillm.plan.advice import advise
    from minillm.plan.memory import memory_of
    from minillm.plan.show import as_json, print_plan
    from minillm.plan.sizes import ENGINES, GIB, PLACEMENTS, Work, sizes_of
    from minillm.plan.traffic import traffic_of

    prompt, new = _lengths(lengths)
    teachers = load_card(teacher, kind="teachers")
    work = Work(
        student=sizes_of(load_card(student, kind="students")), teacher=sizes_of(teachers), gpus=gpus,
        gpus_per_node=gpus_per_node, engine=_one_of(stage, ENGINES, option="--stage"),
        placement=_one_of(placement or teachers.placement, PLACEMENTS, option="--placement"),
        precision=_one_of(precision, ("bf16", "fp32"), option="--precision"),
        teacher_precision="bf16" if teachers.dtype == "bfloat16" else "fp32", rows=batch, micro_batch=micro_batch,
        prompt_tokens=prompt, new_tokens=new, inner_epochs=updates, teacher_mix=alpha, lora=lora,
        recompute=activation_checkpointing, gather=_one_of(gather, ("rollout", "forward"), option="--gather"),
    )  # fmt: skip
    rates = _rates(flops=flops, bandwidth=bandwidth, measure=measure, precision=precision)
    host = None if host_memory is None else int(host_memory * GIB)
    advice = advise(work, gpu_bytes=int(gpu_memory * GIB), host_bytes=host)
    found = work, memory_of(work), traffic_of(work, rates), rates, advice
    print_plan(*found)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(*found), indent=2) + "\n", encoding="utf-8")
    if not advice.fits:
        raise typer.Exit(exits.CHECK_FAILED)


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
