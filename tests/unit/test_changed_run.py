"""A run that goes on is the same run: each setting that may differ is known, and what its change does is said."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from minillm import changed_run
from minillm.cards import Card
from minillm.changed_run import (
    EFFECTS,
    IN_FILES,
    Effect,
    changes,
    changes_in_files,
    effect_of,
    in_files,
    judge,
    paths_of,
)
from minillm.config import RunConfig, load_config
from minillm.engine_settings import ENGINE_SETTINGS
from minillm.errors import ConfigError, RunExists
from minillm.settings import Settings

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "minillm.yaml"


def paths(model: type[Settings], at: str = "") -> Iterator[str]:
    """Every setting of a configuration, with those of every kind of stage."""
    for name, setting in model.model_fields.items():
        sections = set(_sections(setting.annotation))
        if not sections:
            yield at + name
        for section in sections:
            yield from paths(section, f"{at}{name}.")


def _sections(annotation: object) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _sections(inner)


EVERY = sorted(set(paths(RunConfig)))
NOTHING = {
    "name", "out", "trackers", "data.test", "data.test_limit", "data.cache",
    *(path for path in EVERY if path.startswith(("evaluation.", "checkpoints."))),
}  # fmt: skip
LAST_BITS = {
    "threads",
    "engine.student",
    "engine.activation_checkpointing",
    "engine.gather",
    "stages.micro_batch",
    "stages.micro_tokens",
}
ANOTHER = {
    "seed", "student", "teacher", "stages.kind", "stages.name", "stages.start", "stages.keep.metric",
    "stages.keep.mode", "stages.optimiser.name", "stages.teacher_cache", "stages.student_share", "stages.replay",
    "stages.sources", "stages.chunk", "stages.refresh_rejected",
    *(
        path
        for path in EVERY
        if path.startswith(("data.", "lora.", "bottleneck.")) and not path.startswith(("data.test", "data.cache"))
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", EVERY)
def test_every_setting_is_known(path: str) -> None:
    wanted = (
        Effect.NOTHING if path in NOTHING else Effect.LAST_BITS if path in LAST_BITS
        else Effect.ANOTHER_RUN if path in ANOTHER else Effect.TRAINING
    )  # fmt: skip
    assert effect_of(path) is wanted


def test_control_a_new_section_is_not_known() -> None:
    with pytest.raises(KeyError):
        effect_of("rewards.scale")


def test_no_effect_is_listed_for_a_setting_that_is_gone() -> None:
    known = {".".join(path.split(".")[:length]) for path in EVERY for length in range(1, 5)}
    assert {path for paths in EFFECTS.values() for path in paths} <= known


IN_CARDS = ("student.dtype", "student.placement", "teacher.dtype", "teacher.placement")


@pytest.mark.parametrize(
    "path",
    [*IN_CARDS, *(f"engine.{role}.{name}" for role in ("student", "teacher") for name in sorted(ENGINE_SETTINGS))],
)
def test_all_that_files_may_say_is_known_by_its_own_name(path: str) -> None:
    assert sum(path in paths for paths in IN_FILES.values()) == 1


def test_nothing_is_listed_that_files_cannot_say() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for path in (path for paths in IN_FILES.values() for path in paths if path not in IN_CARDS):
        section, _, name = path.removeprefix("engine.").partition(".")[2].partition(".")
        assert section in ENGINE_SETTINGS and (not name or name in DeepSpeedZeroConfig.model_fields), path


def files(
    engine: dict[str, typing.Any], *, taught: dict[str, typing.Any] | None = None, **teacher: typing.Any
) -> dict[str, typing.Any]:
    return in_files(
        student=Card(name="s", model="s"), teacher=Card(name="t", model="t", **teacher), engine=engine,
        teacher_engine=taught or {},
    )  # fmt: skip


ENGINE = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "steps_per_print": 9}


@pytest.mark.parametrize(
    ("engine", "teacher", "path", "effect"),
    [
        (ENGINE, {"dtype": "bfloat16"}, "teacher.dtype", Effect.TRAINING),
        (ENGINE, {"placement": "zero3"}, "teacher.placement", Effect.LAST_BITS),
        ({**ENGINE, "steps_per_print": 1}, {}, "engine.student.steps_per_print", Effect.NOTHING),
        ({**ENGINE, "data_types": {"grad_accum_dtype": "bf16"}}, {}, "engine.student.data_types.grad_accum_dtype",
         Effect.TRAINING),
        ({**ENGINE, "zero_optimization": {"stage": 3, "reduce_bucket_size": 5}}, {},
         "engine.student.zero_optimization.stage", Effect.LAST_BITS),
        ({**ENGINE, "zero_optimization": {"stage": 2, "reduce_bucket_size": 5, "zero_quantized_gradients": True}}, {},
         "engine.student.zero_optimization.zero_quantized_gradients", Effect.TRAINING),
    ],
)  # fmt: skip
def test_what_cards_and_engine_files_say_is_compared(
    engine: dict[str, typing.Any], teacher: dict[str, typing.Any], path: str, effect: Effect
) -> None:
    (change,) = changes_in_files(files(ENGINE), files(engine, **teacher), named=())
    assert change.path == path and change.effect is effect


def test_of_an_engine_file_with_another_name_only_what_trains_is_told() -> None:
    other = {"zero_optimization": {"stage": 0}, "communication_data_type": "fp16"}
    named = one("engine.student=zero0")
    found = changes_in_files(files(ENGINE), files(other, placement="zero3"), named=named)
    assert [change.path for change in found] == ["teacher.placement", "engine.student.communication_data_type"]


def one(*overrides: str) -> list[changed_run.Change]:
    return changes(load_config(RECIPE), load_config(RECIPE, overrides))


def test_the_engine_file_of_a_sharded_teacher_is_compared() -> None:
    before, now = ({"zero_optimization": {"stage": 3, "reduce_bucket_size": size}} for size in (5, 6))
    (change,) = changes_in_files(files(ENGINE, taught=before), files(ENGINE, taught=now), named=())
    assert change.path == "engine.teacher.zero_optimization.reduce_bucket_size" and change.effect is Effect.LAST_BITS
    of_old = files(ENGINE, placement="zero3")  # by a version that did not look
    assert changes_in_files(of_old, files(ENGINE, taught=now, placement="zero3"), named=()) == []
    moved = changes_in_files(
        files(ENGINE, taught=before, placement="zero3"), files(ENGINE, taught=now, placement="offload"), named=()
    )
    assert [change.path for change in moved] == ["teacher.placement"]


def test_an_equal_run_has_no_changes() -> None:
    assert one() == [] and judge([], accepted=(), source="runs/x") == []


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("evaluation.bootstrap=7", "evaluation.bootstrap"), ("checkpoints.keep=5", "checkpoints.keep"),
        ("trackers=[wandb]", "trackers"), ("data.test_limit=5", "data.test_limit"),
    ],
)  # fmt: skip
def test_what_trains_nothing_is_only_told(override: str, path: str) -> None:
    (words,) = judge(one(override), accepted=(), source="runs/x")
    assert path in words and "trains nothing else" in words


def test_what_moves_the_last_bits_is_told_so() -> None:
    (words,) = judge(one("stages.0.micro_batch=3"), accepted=(), source="runs/x")
    assert "stages.0.micro_batch was" in words and "last bits" in words


def test_what_changes_training_wants_the_users_word() -> None:
    found = one("stages.0.steps=999", "stages.0.optimiser.lr=0.5")
    with pytest.raises(RunExists, match=r"--accept-change stages.0.steps --accept-change stages.0.optimiser.lr"):
        judge(found, accepted=(), source="runs/x")
    with pytest.raises(RunExists, match=r"other settings: stages.0.optimiser.lr was"):
        judge(found, accepted=["stages.0.steps"], source="runs/x")
    words = judge(found, accepted=["stages.0.steps", "stages.0.optimiser.lr"], source="runs/x")
    assert len(words) == 2 and all("no longer the unbroken run" in line for line in words)


@pytest.mark.parametrize("override", ["seed=3", "teacher=teachers/gpt2-xl", "data.train_limit=8", "student=x"])
def test_another_run_is_refused_whatever_is_accepted(override: str) -> None:
    path = override.partition("=")[0]
    with pytest.raises(RunExists, match=f"another run: {path} was"):
        judge(one(override), accepted=[path], source="runs/x")


def test_a_stage_more_is_one_change() -> None:
    config = load_config(RECIPE)
    stages = (*config.stages, config.stages[0].model_copy(update={"name": "more"}))
    (change,) = changes(config, config.model_copy(update={"stages": stages}))
    assert change.path == "stages" and change.effect is Effect.TRAINING
    assert change.now == [*change.before, "more"]


def test_a_stage_less_is_another_run() -> None:
    config = load_config(RECIPE)
    longer = config.model_copy(update={"stages": (*config.stages, config.stages[0].model_copy(update={"name": "b"}))})
    (change,) = changes(longer, config)
    assert change.path == f"stages.{len(config.stages)}.name" and change.effect is Effect.ANOTHER_RUN


KNOWN = set(paths_of(load_config(RECIPE).model_dump(mode="json")))


@pytest.mark.parametrize(
    ("accepted", "words"),
    [
        ("stages.0.step", r"no setting of this name; did you mean 'stages.0.steps'"),
        ("nosuch", r"no setting of this name\n  wanted its path"),
        ("sead", r"no setting of this name; did you mean 'seed'"),
        ("stages.0.batch_of_nothing.steps", r"no setting of this name"),
        ("stages.0.prompts", r"this setting is as it was.*\n  leave it out"),
        ("evaluation.seeds", r"this setting is as it was"),
        ("stages.0", r"a section, wanted each setting .*\n  name them: --accept-change stages.0.steps$"),
    ],
)
def test_accepting_what_has_not_changed_is_a_slip(accepted: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"--accept-change {accepted}: {words}"):
        judge(one("stages.0.steps=999"), accepted=["stages.0.steps", accepted], source="runs/x", known=KNOWN)


def test_the_paths_of_a_configuration_are_those_of_overrides() -> None:
    assert {
        "seed",
        "stages.0.steps",
        "stages.0.optimiser.lr",
        "decoding.top_k",
        "trackers",
        "evaluation.seeds",
    } <= KNOWN
    assert not {"", "stages", "stages.0", "decoding"} & KNOWN
