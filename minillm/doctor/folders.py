"""Checks of what a model's folder says beside its tokens: settings of generation, positions, precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from minillm.doctor.findings import Finding, note, of_error, ok, warning
from minillm.doctor.patient import Patient
from minillm.errors import PositionsExceeded

LEFT_OVER = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("num_beams", "max_new_tokens", "max_length", "length_penalty", "suppress_tokens", "forced_eos_token_id"),
)
"""Settings of generation_config.json that change what a model says, or how much."""


def generation_settings(patient: Patient) -> Iterator[Finding]:
    """Settings that transformers' ``generate`` takes from a folder, and a run does not."""
    run = patient.config.decoding
    for model in patient.models:
        given = {} if model.facts.generation is None else model.facts.generation.to_diff_dict()
        left = {name: given[name] for name in LEFT_OVER if given.get(name) is not None}
        differs = {name: value for name, value in left.items() if getattr(run, name, None) != value}
        if differs:
            shown = ", ".join(f"{name} {value}" for name, value in differs.items())
            yield note(
                "generation-settings",
                f"{model.words}: generation_config.json has {shown}",
                why="a run uses none of it, and gives its student the settings of its own decoding section; other "
                "programs that open this folder use them, so their text is drawn otherwise",
                mend="compare scores only where text is drawn alike: set them in decoding if they are meant",
            )
        else:
            yield ok("generation-settings", f"{model.words}: none that the run would pass over")


def positions(patient: Patient) -> Iterator[Finding]:
    """Whether prompt and response fit into the models."""
    longest = patient.config.data.max_prompt_tokens + patient.config.decoding.max_new_tokens
    for model in patient.models:
        try:
            model.facts.require_positions(longest, what=model.role)
        except PositionsExceeded as raised:
            yield of_error("positions", raised, why="the models were never trained on longer text")
            continue
        limit = model.facts.positions
        yield ok(
            "positions", f"{model.words}: {longest:,} of {'any number of' if limit is None else f'{limit:,}'} positions"
        )


def stored_precision(patient: Patient) -> Iterator[Finding]:
    """What the teacher's weights are stored in against what its card reads them in; a student is read in 32 bits."""
    if patient.teacher is None:
        return
    card, stored = patient.teacher.card, getattr(patient.teacher.facts.config, "dtype", None)
    if not isinstance(stored, torch.dtype) or card.build is not None:
        return
    names = f"stored in {str(stored).removeprefix('torch.')}, and its card reads it in {card.dtype}"
    if stored is torch.float16 and card.dtype == "bfloat16":
        yield warning(
            "stored-precision",
            f"{patient.teacher.words}: {names}",
            why="bfloat16 has three bits less than the weights were trained with: every one of them is rounded",
            mend="set dtype: float32 in the card where it fits, or compare the teacher's loss in both once",
        )
    elif stored is torch.float32 and card.dtype == "bfloat16":
        yield note(
            "stored-precision", f"{patient.teacher.words}: {names}",
            why="its weights are rounded to 8 bits of precision, for half the memory",
        )  # fmt: skip
    else:
        yield ok("stored-precision", f"{patient.teacher.words}: {names}")


def precision(patient: Patient) -> Iterator[Finding]:
    """Whether what student and teacher compute in is something that this machine is made for."""
    wants = {"student (engine.precision)": patient.config.engine.precision == "bf16"}
    if patient.teacher is not None:
        wants["teacher (dtype of its card)"] = patient.teacher.card.dtype == "bfloat16"
    half = [name for name, wanted in wants.items() if wanted]
    where, able = bf16_hardware()
    if half and not able:
        yield warning(
            "precision",
            f"bf16 for {' and '.join(half)}, on {where}",
            why="each operation is emulated or converted: slower than 32 bits, and less precise",
            mend="set engine.precision: fp32 and dtype: float32 in the teacher's card, unless the run goes elsewhere",
        )
    elif able and where.startswith("GPU") and len(half) < len(wants):
        full = [name for name in wants if name not in half]
        yield note(
            "precision", f"32 bits for {' and '.join(full)}, on {where}, which has bf16",
            why="twice the memory, and several times the time", mend="set engine.precision: bf16, or dtype: bfloat16",
        )  # fmt: skip
    else:
        yield ok("precision", f"{'bf16' if half else '32 bits'}, on {where}")


def bf16_hardware() -> tuple[str, bool]:
    """What models run on here, and whether it computes in bf16 itself."""
    if torch.cuda.is_available():
        return f"GPU {torch.cuda.get_device_name(0)}", torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions a CPU computes in 32 bits and rounds after each operation.
    able = "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
    return "a CPU with bf16 instructions" if able else "a CPU without bf16 instructions", able


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next((set(line.split()) for line in file if line.startswith("flags")), set())
    except OSError:
        return set()
