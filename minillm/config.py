"""A whole run as one frozen record, read from strict YAML.

``load_config`` reads a file and ``dump_config`` writes one that reads back equal. "Official" in a default's source is
the paper's published code (Gu et al., ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from minillm.bottleneck_config import BottleneckConfig
from minillm.data_config import DataConfig
from minillm.errors import ConfigError, UnsupportedCombination
from minillm.lora_config import LoraConfig
from minillm.merge_stage import MergeStage
from minillm.preference_stage import PreferenceStage
from minillm.settings import Count, Flag, NonNegative, Positive, PositiveShare, Seed, Settings, Text, Whole, headed
from minillm.stage_base import BETTER, OF_PAIRS, KeepConfig, OptimiserConfig, is_component
from minillm.stage_config import AnyStage, MinillmStage, Stage
from minillm.stage_order import check_adapted, check_starts, source_of
from minillm.text_stages import SftStage, asks_teacher
from minillm.yaml_reader import read_yaml, read_yaml_file, write_yaml

__all__ = [
    "BETTER",
    "AnyStage",
    "BottleneckConfig",
    "CheckpointsConfig",
    "DataConfig",
    "DecodingConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExposureConfig",
    "KeepConfig",
    "LoraConfig",
    "MergeStage",
    "MinillmStage",
    "OptimiserConfig",
    "PreferenceStage",
    "RunConfig",
    "SftStage",
    "Stage",
    "dump_config",
    "load_config",
]

_SHOWN_OVERRIDES = 3
"""Overrides that an error names one by one."""
MEMORY_ONLY = ("batch", "batch_tokens")
"""Settings of ``evaluation`` that change no result."""


class DecodingConfig(Settings):
    """How text is drawn, in training, validation and evaluation alike."""

    max_new_tokens: Count
    """Longest response in tokens, its closing EOS included."""
    temperature: Positive = 1.0
    """Divides the logits of student and teacher, above 0; 1 as in the paper."""
    top_k: Whole = 0
    """Keep the student's k likeliest ids; 0 keeps all, as in the paper."""
    top_p: PositiveShare = 1.0
    """Keep the smallest set of ids with this share of the student's mass, above 0; 1 keeps all, as in the paper."""
    no_repeat_ngram_size: Whole = 0
    """Never complete an n-gram of so many ids that stands in prompt or response already, end tokens aside; 0 allows
    all."""
    repetition_penalty: Positive = 1.0
    """Divides positive logits of ids that stand in prompt or response, and multiplies negative ones; above 1 against
    repetition. 1 in training by a minillm stage, which refuses others."""

    @property
    def truncated(self) -> bool:
        """Whether some ids are never drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.no_repeat_ngram_size > 0

    @property
    def tempered(self) -> bool:
        """Whether text is drawn from other than the models' own probabilities."""
        return self.temperature != 1


class EngineConfig(Settings):
    """The DeepSpeed engine of the student."""

    student: Text = "zero2"
    """A name in ds_configs/ or a path to a DeepSpeed JSON file of engine settings."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the student computes in; the optimiser always keeps 32-bit weights."""
    activation_checkpointing: Flag = False
    """Keeps only the input of each layer between the passes and computes the rest again in the backward pass: less
    memory, about a third more work, the same numbers."""
    gather: Literal["rollout", "forward"] = "rollout"
    """When a ZeRO-3 student's weights are gathered to write or to be measured: all of them once for each rollout, or,
    where a rank has no room for the whole student, layer by layer in every forward, with many times the traffic."""


class CheckpointsConfig(Settings):
    """When a run saves what it needs to go on after an interruption. It saves besides where a stage ends, and where a
    signal ends the run."""

    every_minutes: NonNegative = 10.0
    """Minutes between two saves, at least; 0 saves none by the clock."""
    every_steps: Whole = 0
    """Steps of a stage between two saves; 0 saves none by their number."""
    keep: Annotated[int, Field(strict=True, ge=2)] = 2
    """Checkpoints that stay, 2 at least: one may turn out broken."""
    max_failed: Whole = 3
    """Saves in a row that may fail, on a full disk say, before the run ends."""


class ExposureConfig(Settings):
    """How exposure bias is measured."""

    samples: Count
    """Continuations of each test prompt by the student, and as many by the teacher; 10 in the paper."""


class EvaluationConfig(Settings):
    """How a finished model is measured."""

    seeds: tuple[Seed, ...] = (10, 20, 30, 40, 50)
    """One sample per prompt and seed; the paper's five."""
    temperatures: tuple[Positive, ...] = (1.0,)
    """Temperatures to measure at, each above 0; the paper's 1."""
    batch: Count = 256
    """Most responses decoded at once on each rank. Changes memory and speed, never the result."""
    batch_tokens: Count = 65_536
    """Most tokens of those: rows times the longest prompt and decoding.max_new_tokens; of what is only read, rows times
    the longest. A row that is longer is decoded alone. Changes memory and speed, never the result."""
    bootstrap: Count = 2000
    """Resamples of the prompts behind each interval."""
    exposure: ExposureConfig | None = None
    """Measures exposure bias (ExAccErr) against the teacher, with so many samples; not measured where not given."""
    calibration: Flag = False
    """Measures calibration (ECE) on the references of the test prompts, and on their choices where they have any."""

    @field_validator("seeds", "temperatures")
    @classmethod
    def _different(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values:
            raise ConfigError("got an empty list, wanted at least one value")
        if len(set(values)) < len(values):
            raise ConfigError(f"got {list(values)}, wanted each value once")
        return values


class RunConfig(Settings):
    """Everything that decides a run's result."""

    name: Text
    """Folder of the run below ``out``: one or more components of letters, digits, '.', '_' and '-', joined by '/'."""
    out: Text = "runs"
    """Folder that holds all runs."""
    seed: Seed = 10
    """Key of all random numbers, from 0; official 10."""
    threads: Whole = 0
    """CPU threads per rank; 0 leaves torch's own choice."""
    student: Text
    """Student to start from: a card's name, a model folder or a hub name."""
    teacher: Text | None = None
    """Frozen teacher, named in the same ways; every kind of stage needs one but sft, seqkd, and kd with a
    teacher_cache."""
    data: DataConfig
    """Prompts and references."""
    decoding: DecodingConfig
    """How text is drawn, everywhere in the run."""
    stages: tuple[AnyStage, ...]
    """What is trained and merged, in order; each stage starts from the weights that the one before hands on, or that
    its ``start`` names."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed settings of the student."""
    lora: LoraConfig | None = None
    """Trains a low-rank adapter on a frozen student (needs pip install 'minillm[lora]'); all weights where not
    given."""
    bottleneck: BottleneckConfig | None = None
    """Trains a small MLP beside that of each block of a frozen student, of which it becomes a part; all weights where
    neither this nor ``lora`` is given."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How the result is measured."""
    checkpoints: CheckpointsConfig | None = CheckpointsConfig()
    """What a run that was interrupted goes on from, changing no result; null saves nothing."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the log's figures go beside metrics.jsonl, changing no result; each needs its package, such as
    pip install 'minillm[wandb]'."""

    @property
    def adapter(self) -> LoraConfig | BottleneckConfig | None:
        """What is put on a frozen student; None where all weights learn."""
        return self.lora or self.bottleneck

    @property
    def trained(self) -> tuple[Stage, ...]:
        """The stages that train, and so have steps, rows and an optimiser; the others merge what these hand on."""
        return tuple(stage for stage in self.stages if not isinstance(stage, MergeStage))

    @property
    def anchored(self) -> tuple[MinillmStage, ...]:
        """The stages with a language-model loss."""
        return tuple(stage for stage in self.stages if isinstance(stage, MinillmStage) and stage.lm_coefficient > 0)

    def source(self, stage: AnyStage) -> AnyStage | None:
        """The stage whose student this one starts from; None where that is the run's own."""
        return source_of(stage, self.stages)

    def reads_students_of(self, stage: AnyStage) -> tuple[AnyStage, ...]:
        """The stages whose students this one reads: where it starts, and those that it merges."""
        merged = stage.of if isinstance(stage, MergeStage) else ()
        return tuple(each for each in self.stages if each is self.source(stage) or each.name in merged)

    def responses_needed(self, stage: Stage) -> Literal["none", "some", "all"]:
        """Of the rows in data.train that the stage draws from, which must have a reference response."""
        anchored_elsewhere = self.data.corpus is not None and isinstance(stage, MinillmStage)
        return "none" if anchored_elsewhere else stage.responses_needed

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ConfigError(f"got {list(names)}, wanted each tracker once")
        return names

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not all(is_component(part) for part in name.split("/")):
            raise ConfigError(
                f"got {name!r}, wanted letters, digits, '.', '_' and '-', in one or more parts joined by '/' (no '..')"
            )
        return name

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.stages:
            raise ConfigError("stages: got an empty list, wanted at least one stage")
        check_starts(self.stages)
        readers = {stage.reads: stage.kind for stage in self.trained}
        if self.data.train is None and "train" in readers:
            raise ConfigError(f"data.train is missing; a stage of kind {readers['train']} trains on its rows")
        if self.data.teacher_text is None and "teacher_text" in readers:
            raise ConfigError(
                "data.teacher_text is missing; a seqkd stage trains on what the teacher wrote; make it with "
                "'minillm generate'"
            )
        if self.data.preferences is None and "preferences" in readers:
            raise ConfigError(
                f"data.preferences is missing; a stage of kind {readers['preferences']} trains on its pairs; make them "
                "with 'minillm pairs', or name a file of them"
            )
        if self.evaluation.exposure is not None and self.teacher is None:
            raise UnsupportedCombination(
                "evaluation.exposure compares the student with its teacher, but the run names none; "
                "add 'teacher: NAME', or leave evaluation.exposure out"
            )
        if self.lora is not None and self.bottleneck is not None:
            raise UnsupportedCombination("lora and bottleneck: a student learns by one adapter; leave one of them out")
        check_adapted(self.stages, adapter="" if self.adapter is None else self.adapter.SECTION)
        for stage in self.trained:
            self._check_stage(stage)
        return self

    def _check_stage(self, stage: Stage) -> None:
        """What the rest of the run does not let a stage be."""
        at = f"stages.{self.stages.index(stage)} ('{stage.name}')"
        if self.adapter is not None and stage.optimiser.name == "muon":
            setting = self.adapter.SECTION
            raise UnsupportedCombination(
                f"{at} has optimiser muon with {setting}: muon makes a step of a whole matrix orthogonal, and an "
                f"adapter's matrices are parts of one; set optimiser.name: adamw, or leave {setting} out"
            )
        if asks_teacher(stage) and self.teacher is None:
            raise UnsupportedCombination(f"{at} distils a teacher, but the run names none; add 'teacher: NAME'")
        if isinstance(stage, PreferenceStage):
            self._check_pairs(stage, at=at)
        needed = "preferences_validation" if stage.keep.metric in OF_PAIRS else "validation"
        if stage.validate_every > 0 and getattr(self.data, needed) is None:
            raise UnsupportedCombination(
                f"{at} validates every {stage.validate_every} steps without rows to validate on; "
                f"add data.{needed}, or set validate_every: 0"
            )
        if isinstance(stage, MinillmStage) and stage.anchor is not None and self.adapter is not None:
            setting = self.adapter.SECTION
            raise UnsupportedCombination(
                f"{at} has an anchor with {setting}: an average of adapters is not the adapter of an average, and "
                f"one of all weights would cost what {setting} saves; set anchor: null, or leave {setting} out"
            )
        if isinstance(stage, MinillmStage):
            _check_repetition(stage, self.decoding, at=at)
        if reason := self.data.unjudged(stage.keep.metric):
            anyones = " or ".join(name for name in ("rouge_l", "reverse_kl") if name in stage.measures)
            raise UnsupportedCombination(f"{at} keeps by {reason}, or keep.metric: {anyones}")

    def _check_pairs(self, stage: PreferenceStage, *, at: str) -> None:
        """Raise where nothing says what a stage's chunk is, or how likely its teacher holds a response."""
        if stage.chunk is not None and self.data.chunks is None:
            raise UnsupportedCombination(
                f"{at} has chunk {stage.chunk} without data.chunks, so nothing says what a chunk is; set "
                "data.chunks: {by: source}, or leave chunk out"
            )
        may_be_soft = stage.link == "sigmoid" and stage.target in {None, "soft"}
        if stage.refresh_rejected and may_be_soft and self.teacher is None:
            raise UnsupportedCombination(
                f"{at} has refresh_rejected with target '{stage.target or 'null'}' and the run names no teacher: "
                "nothing would say how likely the fresh responses are; add 'teacher: NAME', or set target: hard"
            )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes, with ``a.b=value`` overrides applied in order.

    An override's value is read as YAML and a number in its path is a list index (``stages.0.steps=5``); sections that
    the file leaves out are made. Raises ``ConfigError``, or its child ``UnsupportedCombination``, naming every problem.
    """
    values = read_yaml_file(Path(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {'nothing' if values is None else 'no mapping'}; wanted 'name: value' lines")
    for override in overrides:
        _apply(values, override)
    try:
        return RunConfig(**values)
    except ConfigError as error:
        source = f"{path} with {_few(overrides)}" if overrides else str(path)
        raise type(error)(headed(str(error).split("\n"), source=source)) from None


def dump_config(config: RunConfig) -> str:
    """YAML with every setting written out, defaults too; ``load_config`` reads it back to an equal record."""
    return write_yaml(_listed(config.model_dump()))


def _check_repetition(stage: MinillmStage, decoding: DecodingConfig, *, at: str) -> None:
    if stage.repetition_weight > 0 and 0 < decoding.no_repeat_ngram_size <= stage.repetition_ngram:
        raise UnsupportedCombination(
            f"{at} has repetition_weight {stage.repetition_weight:g} at repetition_ngram {stage.repetition_ngram}, but "
            f"under decoding.no_repeat_ngram_size {decoding.no_repeat_ngram_size} none of them is ever repeated; "
            "set one of the two to 0"
        )


def _few(overrides: Sequence[str]) -> str:
    """The last overrides, which win, and how many came before them."""
    before = len(overrides) - _SHOWN_OVERRIDES
    return ", ".join(([f"{before} more overrides"] if before > 0 else []) + list(overrides[-_SHOWN_OVERRIDES:]))


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one ``a.b=value`` in place."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: wanted PATH=VALUE such as stages.0.steps=5")
    value = read_yaml(text, source=f"override {override!r}")
    here: Any = values
    for depth, key in enumerate(keys):
        at = ".".join(keys[:depth]) or "the file"
        last = depth == len(keys) - 1
        slot: str | int = key
        if isinstance(here, list):
            if not (key.isascii() and key.isdigit() and int(key) < len(here)):
                raise ConfigError(
                    f"override {override!r}: {at} is a list of {len(here)}; wanted an index from 0, got {key!r}"
                )
            slot = int(key)
        elif not isinstance(here, dict):
            raise ConfigError(f"override {override!r}: {at} is {here!r}, which has nothing inside it")
        elif not last and here.get(key) is None:
            here[key] = {}
        if last:
            here[slot] = value
        else:
            here = here[slot]


def _listed(value: Any) -> Any:
    """The same value with tuples as lists, the only sequence that YAML has."""
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value
