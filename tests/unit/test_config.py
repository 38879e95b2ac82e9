"""Promises of the configuration:

1. a wrong value is told as one line with its dotted path, what was got and what was wanted, all problems at once;
2. settings that exclude each other are an ``UnsupportedCombination`` with its cures;
3. a dumped configuration loads back equal, and every shipped recipe loads;
4. ``bias_reasons`` lists exactly the reasons that hold.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from minillm import cards, config, settings, stage_config
from minillm.config import (
    DecodingConfig,
    MinillmStage,
    OptimiserConfig,
    RunConfig,
    SftStage,
    dump_config,
    load_config,
)
from minillm.errors import ConfigError, UnsupportedCombination

ROOT = Path(config.__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
MINILLM = """\
name: a/b
student: gpt2
teacher: gpt2-xl
data: {train: 'world:train', max_prompt_tokens: 24}
decoding: {max_new_tokens: 48}
stages:
  - {kind: minillm, steps: 10, prompts: 8, teacher_mix: 0.2, optimiser: {lr: 1e-3}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINILLM, encoding="utf-8")
    return path


def problem(path: Path, *overrides: str) -> str:
    """The message that the overrides earn."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "pydantic" not in str(caught.value)
    assert "http" not in str(caught.value)
    return str(caught.value)


def stage(**changes: Any) -> MinillmStage:
    values: dict[str, Any] = {"steps": 10, "prompts": 8, "teacher_mix": 0.0, "optimiser": OptimiserConfig(lr=1e-3)}
    return MinillmStage(**{**values, **changes})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.stepz=5", "stages.0.stepz: no setting of this name; did you mean 'steps'?"),
        ("decoding.topk=5", "decoding.topk: no setting of this name; did you mean 'top_k'?"),
        ("stages.0.optimiser.lrr=5", "stages.0.optimiser.lrr: no setting of this name; did you mean 'lr'?"),
        ("zzz=5", "zzz: no setting of this name; known here: name, out,"),
        ("stages.0.steps=5.0", "stages.0.steps: got 5.0, wanted a whole number"),
        ("stages.0.steps='5'", "stages.0.steps: got '5', wanted a whole number"),
        ("seed=true", "seed: got true, wanted a whole number"),
        ("seed=-1", "seed: got -1, wanted a number of at least 0"),
        ("stages.0.optimiser.lr=true", "stages.0.optimiser.lr: got true, wanted a number"),
        ("stages.0.optimiser.lr=0", "stages.0.optimiser.lr: got 0, wanted a number above 0"),
        ("stages.0.optimiser.lr=.nan", "stages.0.optimiser.lr: got nan, wanted a finite number"),
        ("stages.0.optimiser.lr=1e999", "stages.0.optimiser.lr: got inf, wanted a finite number"),
        ("stages.0.optimiser={}", "stages.0.optimiser.lr: is missing; add it"),
        ("decoding.no_repeat_ngram_size=-1", "no_repeat_ngram_size: got -1, wanted a number of at least 0"),
        ("decoding.repetition_penalty=0", "decoding.repetition_penalty: got 0, wanted a number above 0"),
        ("decoding.top_p=1.5", "decoding.top_p: got 1.5, wanted a number of at most 1"),
        ("stages.0.length_norm=1", "stages.0.length_norm: got 1, wanted true or false"),
        ("student=", "student: got nothing, wanted text"),
        ("student=''", "student: got '', wanted text of at least 1 character"),
        ("stages=3", "stages: got 3, wanted a list"),
        ("stages=[]", "stages: got an empty list, wanted at least one stage"),
        ("stages=[3]", "stages.0: got 3, wanted a mapping of names to values"),
        (
            "stages=[{}]",
            "stages.0: 'kind' is missing; wanted one of sft, seqkd, kd, imitkd, gkd, rkl, skew_fkl, skew_rkl, minillm, "
            "preference, merge",
        ),
        (
            "stages.0.kind=minilm",
            "stages.0.kind: got 'minilm', wanted 'sft', 'seqkd', 'kd', 'imitkd', 'gkd', 'rkl', 'skew_fkl', 'skew_rkl', "
            "'minillm', 'preference', 'merge'; did you mean 'minillm'?",
        ),
        ("stages.0.kind=tdpo2", "did you mean kind: preference with value: tdpo2?"),
        ("stages.0.kind=ipo", "did you mean kind: preference with link: ipo?"),
        ("stages.0.kind=slerp", "did you mean kind: merge with method: slerp?"),
        ("stages.0.kind=5", "stages.0.kind: got '5', wanted 'sft', "),
        ("stages.0.importance=coins", "'per_decision' or 'truncated'; did you mean 'coin'?"),
        ("evaluation.seeds=[]", "evaluation.seeds: got an empty list"),
        ("evaluation.seeds=[1,1]", "evaluation.seeds: got [1, 1], wanted each value once"),
        ("evaluation.seeds=[1,a]", "evaluation.seeds.1: got 'a', wanted a whole number"),
        (
            "trackers=[wandbb]",
            "trackers.0: got 'wandbb', wanted 'tensorboard', 'wandb' or 'trackio'; did you mean 'wandb'",
        ),
        ("trackers=[wandb,wandb]", "trackers: got ['wandb', 'wandb'], wanted each tracker once"),
        ("trackers=wandb", "trackers: got 'wandb', wanted a list"),
        ("data.train=world:tran", "wanted world: and one of train, validation, test; did you mean 'train'?"),
        ("data.train=a.csv", "a file ending in .jsonl, .jsonl.gz, .parquet"),
        ("data.train=a.txt", "a file ending in .jsonl, .jsonl.gz, .parquet"),
        ("data.corpus=a.csv", "a file ending in .jsonl, .jsonl.gz, .parquet, .txt"),
        ("data.train=hub:x", "wanted 'hub:NAME@SPLIT'"),
        ("data.train=null", "data.train is missing"),
        ("stages.0.keep.metric=rouge", "no validation measure of this name; did you mean 'rouge_l'?"),
        (
            "stages=[{kind: sft, steps: 1, batch: 1, optimiser: {lr: 1}, keep: {metric: reverse_kl}}]",
            "does not measure 'reverse_kl'; wanted loss, rouge_l, validity,",
        ),
        ("stages.0.name=a/b", "name: got 'a/b'"),
    ],
)
def test_a_wrong_value_is_told_in_the_users_words(recipe: Path, override: str, words: str) -> None:
    message = problem(recipe, override)
    assert message.startswith(f"{recipe} with {override}: ")
    assert words in message
    assert "\n" not in message


def test_all_problems_are_told_at_once(recipe: Path) -> None:
    message = problem(recipe, "seed=x", "stages.0.steps=0", "stages.0.optimiser.lr=-1", "teachers=y")
    assert ": 4 problems\n" in message
    paths = {line.split(":")[0].strip() for line in message.split("\n")[1:]}
    assert paths == {"seed", "stages.0.optimiser.lr", "stages.0.steps", "teachers"}


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/../b", "/etc", "a//b", "a/", ".", "a b", "ä", "a/./b", "a\\\\b", '"a\\n"']
)
def test_a_run_name_cannot_leave_its_folder(recipe: Path, name: str) -> None:
    assert "joined by '/'" in problem(recipe, f"name={name}")


@pytest.mark.parametrize("name", ["a", "quickstart/teacher", "v1.2_x-y/z", "a..b"])
def test_an_ordinary_run_name_is_taken(recipe: Path, name: str) -> None:
    assert load_config(recipe, [f"name={name}"]).name == name


@pytest.mark.parametrize(
    ("overrides", "cures"),
    [
        (["importance=none"], ["importance: coin", "teacher_mix: 0"]),
        (["teacher_mix=1"], ["teacher_mix below 1", "importance: per_step"]),
        (["importance=per_step"], ["coin_groups: 2", "importance: coin"]),
        (["importance=per_step", "coin_groups=1"], ["coin_groups: 2", "importance: coin"]),
        (
            ["importance=per_step", "coin_groups=4", "baseline=leave_one_out", "samples_per_prompt=4"],
            ["importance: coin", "baseline: position_mean"],
        ),
        (["baseline=leave_one_out"], ["samples_per_prompt: 2", "baseline: position_mean"]),
        (["baseline=grpo"], ["samples_per_prompt: 2"]),
        (["baseline=group_mean"], ["samples_per_prompt: 2"]),
        (["baseline=grpo", "samples_per_prompt=2", "gamma=0.9", "horizon=3"], ["gamma, horizon", "another baseline"]),
        (["inner_batches=1000"], ["responses in a rollout", "set fewer"]),
        (["inner_kl=0.1", "dual_clip=3"], ["inner_kl and dual_clip", "inner_epochs"]),
        (["importance=truncated", "coin_groups=2"], ["weight_cap", "set both or neither"]),
        (["weight_cap=1.1"], ["importance 'coin'", "set both or neither"]),
        (["importance=truncated", "weight_cap=1.25", "coin_groups=2"], ["no factor exceeds 1.25", "per_decision"]),
        (["importance=per_decision", "baseline=ridge"], ["coin_groups: 2", "importance: coin"]),
        (
            ["importance=per_decision", "coin_groups=4", "baseline=grpo", "samples_per_prompt=4"],
            ["importance: coin", "baseline: position_mean"],
        ),
        (["lm_coefficient=1"], ["lm_batch: 1", "lm_coefficient: 0"]),
        (["single_weight=0", "long_weight=0"], ["nothing is trained"]),
        (["repetition_weight=0.1", "long_weight=0"], ["long_weight above 0", "repetition_weight: 0"]),
        (["optimiser.muon_lr=1e-2"], ["name: muon"]),
        (["validate_every=5"], ["data.validation", "validate_every: 0"]),
        (["patience=5"], ["validate_every", "patience: 0"]),
        (["optimiser.warmup_steps=11"], ["fewer warm-up steps"]),
        (["keep.metric=rouge_l"], ["mode: max"]),
        (["keep.mode=max"], ["mode: min"]),
    ],
)
def test_excluding_settings_are_refused_with_their_cures(
    recipe: Path, overrides: Sequence[str], cures: Sequence[str]
) -> None:
    with pytest.raises(UnsupportedCombination) as caught:
        load_config(recipe, [f"stages.0.{each}" for each in overrides])
    assert all(cure in str(caught.value) for cure in cures), str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.0.importance=none", "stages.0.teacher_mix=0"],
        ["stages.0.teacher_mix=1", "stages.0.importance=per_step", "stages.0.baseline=none"],
        ["stages.0.importance=per_step", "stages.0.coin_groups=2"],
        ["stages.0.baseline=leave_one_out", "stages.0.samples_per_prompt=2"],
        ["stages.0.baseline=grpo", "stages.0.samples_per_prompt=2"],
        ["stages.0.baseline=ridge", "stages.0.gamma=0.9", "stages.0.horizon=3", "stages.0.length_norm=true"],
        ["stages.0.importance=truncated", "stages.0.weight_cap=1.2", "stages.0.coin_groups=2"],
        ["stages.0.importance=per_decision", "stages.0.baseline=ridge", "stages.0.coin_groups=2"],
        ["stages.0.lm_coefficient=1", "stages.0.lm_batch=4"],
        ["stages.0.optimiser.name=muon", "engine.student=zero0"],
        ["stages.0.optimiser.name=muon", "engine.student=ds_configs/zero0.json"],
        ["stages.0.validate_every=5", "data.validation=world:validation", "stages.0.patience=2"],
        ["stages.0.optimiser.warmup_steps=20", "stages.0.inner_epochs=2"],
        ["stages.0.inner_batches=2", "stages.0.inner_kl=0.1", "stages.0.dual_clip=3"],
        ["stages.0.keep.metric=validity", "stages.0.keep.mode=max"],
        ["stages.0.clip=null", "stages.0.single_weight=0"],
        ["stages.0.anchor={}", "stages.0.anchor.rate=1", "stages.0.estimator=exact"],
        ["stages.0.repetition_weight=0.1", "stages.0.repetition_ngram=2", "decoding.no_repeat_ngram_size=3"],
        ["stages.0.repetition_ngram=2", "decoding.no_repeat_ngram_size=2"],
    ],
)
def test_every_cure_cures(recipe: Path, overrides: Sequence[str]) -> None:
    """Negative control of the test above: the checks let the neighbouring good settings pass."""
    assert load_config(recipe, overrides) != load_config(recipe)


def test_a_combination_beside_another_problem_is_a_config_error(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, ["stages.0.importance=none", "seed=x"])
    assert type(caught.value) is ConfigError
    assert "teacher_mix" in str(caught.value)
    assert "seed" in str(caught.value)


def test_validity_needs_the_world(recipe: Path) -> None:
    overrides = ["stages.0.keep.metric=validity", "stages.0.keep.mode=max", "data.validation=v.jsonl"]
    with pytest.raises(UnsupportedCombination, match="only the embedded world can judge"):
        load_config(recipe, overrides)


def test_coverage_needs_its_checker(recipe: Path) -> None:
    overrides = ["stages.0.keep.metric=coverage", "stages.0.keep.mode=max"]
    with pytest.raises(UnsupportedCombination, match=r"set data\.checker: slots"):
        load_config(recipe, overrides)
    assert load_config(recipe, [*overrides, "data.checker=slots"]).data.checker == "slots"


@pytest.mark.parametrize("size", [1, 3])
def test_a_cost_of_what_is_never_said_is_refused(recipe: Path, size: int) -> None:
    overrides = ["stages.0.repetition_weight=0.1", f"decoding.no_repeat_ngram_size={size}"]
    with pytest.raises(UnsupportedCombination, match="none of them is ever repeated"):
        load_config(recipe, overrides)


def test_a_distilling_stage_needs_a_teacher(recipe: Path) -> None:
    with pytest.raises(UnsupportedCombination, match="add 'teacher: NAME'"):
        load_config(recipe, ["teacher=null"])


def test_stage_names_differ(recipe: Path) -> None:
    one = "{kind: sft, steps: 1, batch: 1, optimiser: {lr: 1}}"
    assert "name of an earlier stage" in problem(recipe, f"stages=[{one}, {one}]")


def test_skipping_broken_rows_needs_a_limit(recipe: Path) -> None:
    with pytest.raises(UnsupportedCombination, match="max_broken"):
        load_config(recipe, ["data.broken=skip"])
    assert load_config(recipe, ["data.broken=skip", "data.max_broken=3"]).data.max_broken == 3


def test_overrides_apply_in_order_and_make_sections(recipe: Path) -> None:
    got = load_config(
        recipe, ["seed=1", "seed=2", "evaluation.seeds=[1, 2]", "stages.0.optimiser.lr=5e-4", "out=a=b", "teacher='7'"]
    )
    assert (got.seed, got.evaluation.seeds, got.stages[0].optimiser.lr) == (2, (1, 2), 5e-4)
    assert (got.out, got.teacher) == ("a=b", "7")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "wanted PATH=VALUE"),
        ("=5", "wanted PATH=VALUE"),
        ("a..b=5", "wanted PATH=VALUE"),
        ("stages.1.steps=5", "stages is a list of 1; wanted an index from 0, got '1'"),
        ("stages.x=5", "wanted an index from 0, got 'x'"),
        ("stages.-1.steps=5", "wanted an index from 0, got '-1'"),
        ("name.x=5", "name is 'a/b', which has nothing inside it"),
        ("seed=&a 1", "anchor '&a' is not allowed"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_a_broken_override_is_named(recipe: Path, override: str, words: str) -> None:
    message = problem(recipe, override)
    assert message.startswith("override ")
    assert words in message


@pytest.mark.parametrize("text", ["", "- a", "word"])
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    assert "wanted 'name: value' lines" in problem(tmp_path / "x.yaml")


def test_built_in_python_the_errors_are_the_same() -> None:
    with pytest.raises(UnsupportedCombination, match="teacher_mix 1 with importance 'coin'"):
        stage(teacher_mix=1.0)
    with pytest.raises(ConfigError, match=r"^optimiser\.lr: got -1, wanted"):
        SftStage(steps=1, batch=1, optimiser={"lr": -1})  # type: ignore[arg-type]


def test_nested_paths_rest_on_the_constructor_mark() -> None:
    """Negative control: a nested class whose constructor pydantic calls loses the paths of its problems."""

    class Inner(settings.Settings):
        x: settings.Count

        def __init__(self, /, **values: Any) -> None:
            super().__init__(**values)

    class Outer(settings.Settings):
        inner: Inner

    with pytest.raises(ConfigError) as caught:
        Outer(inner={"x": 0})  # type: ignore[arg-type]
    assert not str(caught.value).startswith("inner.x: ")


def test_a_configuration_cannot_be_changed(recipe: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(recipe).seed = 5


def test_the_glob_saw_the_recipes() -> None:
    assert {path.relative_to(ROOT / "recipes").as_posix() for path in RECIPES} >= {
        "jsonl.yaml", "quickstart/teacher.yaml", "quickstart/sft.yaml",
        "quickstart/minillm.yaml", "quickstart/control.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dumped_recipe_loads_back_equal(path: Path, tmp_path: Path) -> None:
    run = load_config(path)
    (tmp_path / "dump.yaml").write_text(dump_config(run), encoding="utf-8")
    assert load_config(tmp_path / "dump.yaml") == run
    assert load_config(tmp_path / "dump.yaml", [f"seed={run.seed + 1}"]) != run  # negative control


def test_odd_text_survives_a_dump(recipe: Path, tmp_path: Path) -> None:
    run = load_config(recipe, ["out='no: #\\ 1e5'", "student='1e-3'", "teacher='null'"])
    (tmp_path / "dump.yaml").write_text(dump_config(run), encoding="utf-8")
    assert load_config(tmp_path / "dump.yaml") == run


def reasons(stage: MinillmStage, **changes: Any) -> list[str] | None:
    decoding = DecodingConfig(max_new_tokens=8, **changes)
    return stage.bias_reasons(truncated=decoding.truncated, tempered=decoding.tempered)


def test_exact_on_policy_settings_are_unbiased() -> None:
    for future in ("sampled", "expected"):
        for baseline in ("none", "position_mean", "leave_one_out", "ridge"):
            assert reasons(stage(future=future, baseline=baseline, samples_per_prompt=2)) == []
    mixed = {"teacher_mix": 0.2, "importance": "per_decision", "coin_groups": 2}
    alone = {"single_weight": 0.0}
    for changes in (
        {"importance": "per_step"},
        {"clip": None},
        {"expected_length": 9.0},
        {"coin_groups": 4},
        mixed,
        alone,
    ):
        assert reasons(stage(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher_mix": 0.2}, ["teacher mixing weighs the token only, not the prefix"]),
        (
            {"teacher_mix": 0.2, "importance": "per_step", "coin_groups": 2},
            ["per_step weights", "teacher mixing weighs the token only, not the prefix"],
        ),
        (
            {"teacher_mix": 0.2, "importance": "truncated", "weight_cap": 1.1, "coin_groups": 2},
            ["truncated weights"],
        ),
        ({"gamma": 0.9}, ["discount 0.9"]),
        ({"horizon": 5}, ["horizon of 5 tokens"]),
        ({"whiten": "masked"}, ["whitening"]),
        (
            {"baseline": "group_mean", "samples_per_prompt": 2},
            ["baseline group_mean, which holds the row itself"],
        ),
        ({"length_norm": True}, ["length normalisation"]),
        ({"repetition_weight": 0.1}, ["repetition reward: another objective"]),
        ({"inner_epochs": 2}, ["several updates on a rollout"]),
        ({"long_weight": 3.0}, ["single-step and long-horizon terms weighted differently"]),
        ({"lm_coefficient": 1.0, "lm_batch": 2}, ["language-model anchor"]),
        ({"length_norm": True, "inner_epochs": 4}, ["length normalisation", "several updates on a rollout"]),
    ],
)
def test_each_bias_of_a_stage_is_named(changes: dict[str, Any], named: list[str]) -> None:
    assert reasons(stage(**changes)) == named


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"top_k": 5}, "truncated sampling"),
        ({"top_p": 0.9}, "truncated sampling"),
        ({"no_repeat_ngram_size": 3}, "truncated sampling"),
        ({"temperature": 0.5}, "temperature other than 1: tempered student against tempered teacher"),
    ],
)
def test_each_bias_of_decoding_is_named(changes: dict[str, Any], reason: str) -> None:
    assert reasons(stage(), **changes) == [reason]


def undescribed(models: Sequence[type[BaseModel]]) -> list[str]:
    return [f"{m.__name__}.{name}" for m in models for name, field in m.model_fields.items() if not field.description]


def test_every_setting_is_described() -> None:
    found = [
        value
        for module in (config, stage_config, cards)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, settings.Settings)
    ]
    assert len(set(found)) >= 11
    assert undescribed(found) == []


def test_an_error_names_the_last_of_many_overrides(recipe: Path) -> None:
    many = [f"seed={n}" for n in range(9)]
    first = problem(recipe, *many, "stages.0.steps=0").split("\n")[0]
    assert first.endswith(
        "with 7 more overrides, seed=7, seed=8, stages.0.steps=0: stages.0.steps: got 0, wanted a number of at least 1"
    )


def test_an_undescribed_setting_is_noticed() -> None:
    class Bare(settings.Settings):
        x: int

    assert undescribed([Bare]) == ["Bare.x"]


def test_reading_a_configuration_needs_no_torch() -> None:
    code = "import sys, minillm.config, minillm.cards; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_measures_are_the_ones_that_validation_reports() -> None:
    assert set(config.BETTER) == {
        "loss", "reverse_kl", "reverse_kl_per_token", "rouge_l",
        "validity", "coverage", "distinct_4", "repetition_3", "mean_length",
        "preference_loss", "preference_accuracy", "preference_margin",
    }  # fmt: skip


def test_run_fields_are_the_documented_ones() -> None:
    """A new top-level setting is a decision: change this list with it."""
    assert list(RunConfig.model_fields) == [
        "name", "out", "seed", "threads", "student", "teacher", "data", "decoding", "stages", "engine", "lora",
        "bottleneck", "evaluation", "checkpoints",
        "trackers",
    ]  # fmt: skip
