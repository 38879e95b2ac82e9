"""DeepSpeed's JSON files: engine settings and nothing else, checked before anything is loaded."""

from __future__ import annotations

from typing import Any

from minillm.cards import SHARDED, find_engine_settings
from minillm.errors import ConfigError, UnsupportedCombination, did_you_mean
from minillm.manifests import parsed
from minillm.ranks import prepare_deepspeed

DECIDED_BY_THE_RUN = {
    *("optimizer", "scheduler", "gradient_clipping", "fp16", "bf16", "bfloat16", "amp", "torch_autocast"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
}
ENGINE_SETTINGS = {
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type"),
    *("prescale_gradients", "gradient_predivide_factor", "disable_allgather", "data_types"),
    *("comms_logger", "flops_profiler", "memory_breakdown", "dump_state"),
    *("steps_per_print", "wall_clock_breakdown", "timers"),
}
"""Sections of DeepSpeed's JSON file that a run may set; others are the run's own or of training that we do not do."""
WRITES_ELSEWHERE = {"tensorboard", "wandb", "comet", "csv_monitor", "nebula"}
"""Sections that name files, folders and accounts: an engine file that somebody else wrote must not."""
OFFLOADS = {"offload_optimizer": 1, "offload_param": 3}
"""What DeepSpeed may keep in host memory, by the ZeRO stage from which it can."""
QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
"""What of a ZeRO section rounds numbers that travel between ranks."""


def read_engine_settings(name: str) -> dict[str, Any]:
    """The engine settings in ``ds_configs/NAME.json`` or in a JSON file by its path.

    ``ConfigError`` where there are none, where DeepSpeed would not take them or would pass over one of them, and where
    one is the run configuration's to decide.
    """
    file = find_engine_settings(name)
    try:
        settings: dict[str, Any] = parsed(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: holds a {type(settings).__name__}; wanted a JSON object of DeepSpeed settings")
    if taken := sorted(DECIDED_BY_THE_RUN & settings.keys()):
        raise ConfigError(
            f"{file}: {', '.join(taken)} is decided by the run's configuration, not by an engine file; take it out"
        )
    if elsewhere := sorted(WRITES_ELSEWHERE & settings.keys()):
        raise ConfigError(
            f"{file}: {elsewhere[0]} says where files are written, which an engine file may not\n"
            "  take it out; for curves set trackers in the run's configuration"
        )
    profiler = settings.get("flops_profiler")
    if isinstance(profiler, dict) and profiler.get("output_file") is not None:
        raise ConfigError(f"{file}: flops_profiler.output_file names a file to write; take it out, and it is printed")
    # DeepSpeed passes over a name that it does not know: a misspelt zero_optimization would be stage 0, silently.
    if unknown := sorted(settings.keys() - ENGINE_SETTINGS):
        raise ConfigError(
            f"{file}: {unknown[0]}: no engine setting of this name"
            f"{did_you_mean(unknown[0], ENGINE_SETTINGS) or '; known here: ' + ', '.join(sorted(ENGINE_SETTINGS))}"
        )
    zero = _check_zero(settings.get("zero_optimization", {}), file=str(file))
    _check_offload(zero, settings, file=str(file))
    return settings


def read_teacher_settings(placement: str) -> dict[str, Any]:
    """The engine settings of a sharded teacher, ``teacher-PLACEMENT``; {} of one that is whole on each rank.

    Raises what ``read_engine_settings`` does, and ``UnsupportedCombination`` where weights would be rounded on their
    way between ranks: forwards would be those of another teacher.
    """
    if placement not in SHARDED:
        return {}
    settings = read_engine_settings(f"teacher-{placement}")
    rounded = [name for name, value in settings.get("zero_optimization", {}).items() if name in QUANTISED and value]
    if rounded:
        raise UnsupportedCombination(
            f"{find_engine_settings(f'teacher-{placement}')}: zero_optimization.{rounded[0]}: the teacher's weights "
            "would be rounded whenever they are gathered, so another model would teach; take it out, or keep its "
            "layers in 8 bits by its card (quantise: int8)"
        )
    return settings


def _check_zero(section: Any, *, file: str) -> Any:
    """DeepSpeed's own record of the section, which checks it before a model is loaded."""
    prepare_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    if not isinstance(section, dict):
        raise ConfigError(f'{file}: zero_optimization: got {section!r}; wanted an object such as {{"stage": 2}}')
    try:
        zero = DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        near = did_you_mean(str(first["loc"][-1]), DeepSpeedZeroConfig.model_fields) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{file}: {at}: no setting of this name in DeepSpeed{near}") from error
        raise ConfigError(f"{file}: {at}: got {first['input']!r}: {first['msg'].lower()}") from error
    if not zero.compute_grad_norm:
        raise UnsupportedCombination(
            f"{file}: zero_optimization.compute_grad_norm: false: a gradient that is not finite would be stepped on, "
            "unseen; take it out"
        )
    return zero


def _check_offload(zero: Any, settings: dict[str, Any], *, file: str) -> None:
    """Raise ``UnsupportedCombination`` where weights or moments would be kept where this library does not find them."""
    section = settings.get("zero_optimization", {})
    if old := sorted({"cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"} & section.keys()):
        raise ConfigError(
            f"{file}: zero_optimization.{old[0]} is DeepSpeed's former name; "
            'write "offload_optimizer" or "offload_param": {"device": "cpu"}'
        )
    parts = {name: getattr(zero, name) for name in OFFLOADS}
    used = {name: part for name, part in parts.items() if getattr(part, "device", "none") != "none"}
    for name, part in used.items():
        at = f"{file}: zero_optimization.{name}"
        if part.device != "cpu":
            raise UnsupportedCombination(
                f"{at}: offloading to {section[name]['device']!r}: DeepSpeed compiles C++ for it, and what lies there "
                'is in no checkpoint; set "device": "cpu"'
            )
        if zero.stage < OFFLOADS[name]:
            raise UnsupportedCombination(
                f"{at}: at ZeRO stage {int(zero.stage)} there is nothing that DeepSpeed could offload; "
                f"set stage: {OFFLOADS[name]} or above, or take it out"
            )
    if used and settings.get("zero_force_ds_cpu_optimizer"):
        raise UnsupportedCombination(
            f"{file}: zero_force_ds_cpu_optimizer: true asks for DeepSpeed's own Adam, which compiles C++; an "
            "offloaded student is stepped by torch's; take it out"
        )
    optimiser = used.get("offload_optimizer")
    if optimiser is not None and (optimiser.ratio < 1 or optimiser.super_offload or zero.zenflow is not None):
        raise UnsupportedCombination(
            f"{file}: zero_optimization.offload_optimizer: with ratio below 1, super_offload or zenflow DeepSpeed "
            "keeps moments in optimisers of its own, which no checkpoint finds; take it out"
        )


def with_torch_optimiser(settings: dict[str, Any], *, pinned: bool) -> dict[str, Any]:
    """Engine settings with what offloading needs beside them: an optimiser of torch's, which DeepSpeed would refuse
    there, and page-locked memory where there is a GPU to copy to (``pinned``), unless the file says otherwise."""
    section = settings.get("zero_optimization", {})
    offloads = {name: {"pin_memory": pinned, **section[name]} for name in OFFLOADS if section.get(name)}
    if not offloads:
        return settings
    return {**settings, "zero_force_ds_cpu_optimizer": False, "zero_optimization": {**section, **offloads}}


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of engine settings; 0 where they name none."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))
