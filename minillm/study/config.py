"""A study as one frozen record, read from strict YAML: arms × training seeds of one recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from minillm.config import RunConfig, load_config
from minillm.errors import ConfigError, DataError, UnsupportedCombination, did_you_mean
from minillm.manifests import parsed
from minillm.measures import MEASURES
from minillm.settings import Count, Flag, Positive, Seed, Settings, Text, headed
from minillm.stage_base import BETTER, READ, is_component
from minillm.study.overrides import require_heard, with_overrides
from minillm.yaml_reader import read_yaml_file

STUDENT, TEACHER = "student", "teacher"
"""Names below the study's that no arm may have: the models that the study makes for itself stand there."""
BY_PATH = ("settings", "teacher_settings", "student_settings")
"""Entries that replace settings of run files; those of 'quick' come on top of the file's."""
OF_THE_CELL = ("name", "seed")
"""Settings that a study gives to each cell itself."""


PilotSteps = Annotated[int, Field(strict=True, ge=2)]


class BudgetConfig(Settings):
    """What training may cost in every cell; the steps of the last stage follow from it."""

    unit: Literal["updates", "tokens", "seconds"]
    """'updates' of the student; 'tokens' of the responses that it learns from, each counted once however often it is
    learnt from; 'seconds' of the clock, validations aside."""
    amount: Positive
    """Of these."""
    pilot: PilotSteps = 8
    """Steps, from 2, of a short run of each arm from which tokens and seconds a step are told."""
    refined: Flag = False
    """Whether a whole run corrects what the pilot told, once: the try of 'search' that was taken, or else one made for
    this. Methods that learn from the student's own text change how long it is."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.refined and self.unit == "updates":
            raise ConfigError("refined: updates a step are known, there is nothing to correct; leave it out")
        return self


class SearchConfig(Settings):
    """The same number of tries for every arm, judged on validation prompts."""

    setting: Text = "stages.0.optimiser.lr"
    """What is tried, by path."""
    values: tuple[Positive, ...]
    """Its values."""
    metric: Text = "reverse_kl"
    """The measure that decides, of the validation prompts, at the first of the evaluation's temperatures."""
    seed: Seed = 0
    """Training seed of the tries; none of the study's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.values) < 2 or len(set(self.values)) < len(self.values):
            raise ConfigError(f"values: got {list(self.values)}, wanted at least two, each once")
        if BETTER.get(self.metric) is None or self.metric in READ:
            known = ", ".join(name for name, better in BETTER.items() if better and name not in READ)
            raise ConfigError(f"metric {self.metric!r}: wanted a measure of text with a better side: {known}")
        return self


class TaughtConfig(Settings):
    """Text that the teacher writes once, for arms that learn from it."""

    rows: Count
    """It answers the first so many rows of the recipe's training data."""
    samples: Count = 1
    """Answers to each."""


class PairedConfig(Settings):
    """Pairs of answers that teacher and student write once for each student, for arms that learn from preferences."""

    rows: Count
    """Both answer the first so many rows of the recipe's training data."""


class StudyConfig(Settings):
    """What is compared with what, and where its cells are kept."""

    name: Text
    """Names the study, and its runs below ``runs/studies/``: letters, digits, '.', '_' and '-'."""
    recipe: Text
    """The run file that every cell starts from."""
    teacher: Text | None = None
    """A run file that makes the teacher first, once; null takes the one that the recipe names."""
    student: Text | None = None
    """A run file that makes each training seed a student of its own first; null starts all from the recipe's."""
    teacher_settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that 'teacher' replaces in its file, by path: {stages.0.steps: 800}."""
    student_settings: dict[str, Any] = Field(default_factory=dict)
    """The same of 'student'."""
    student_seed: Seed | None = None
    """Makes one student, with this seed, for all training seeds; null makes each its own."""
    taught: TaughtConfig | None = None
    """What the teacher answers, once, into runs/studies/NAME/taught.jsonl, for arms whose data.teacher_text names
    that file."""
    paired: PairedConfig | None = None
    """What teacher and student answer, once for each student, for arms whose data.preferences is
    runs/studies/NAME/pairs.jsonl: each cell reads the pairs of the student that it starts from."""
    seeds: tuple[Seed, ...]
    """Training seeds: of rollouts, order and, with 'student', of the student's own start."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the recipe that all cells replace, by path: {stages.0.steps: 100}."""
    arms: dict[str, dict[str, Any]]
    """What is compared: a name, and the settings that this arm replaces, by path."""
    compare_with: Text
    """The arm that the others are compared with, seed by seed."""
    budget: BudgetConfig | None = None
    """Sets the steps of every cell; null leaves the recipe's and the arms'."""
    search: SearchConfig | None = None
    """Sets one setting of each arm before its cells are made; null leaves all as they are."""
    yardsticks: Flag = False
    """Whether the teacher and the nearest training answer are measured too, and stand below the arms."""
    results: Text
    """Folder of the cells: one small JSON an arm and seed, made to be committed."""
    within: dict[str, Positive] = Field(default_factory=dict)
    """How near each measure of a cell that '--reproduce' makes again has to be to the committed one."""
    quick: dict[str, Any] | None = None
    """Entries of this file that '--quick' replaces, for a short form of the study with a name and cells of its own."""

    @field_validator("name")
    @classmethod
    def _safe(cls, name: str) -> str:
        if not is_component(name):
            raise ConfigError(f"got {name!r}, wanted letters, digits, '.', '_' and '-' only")
        return name

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(f"got {list(seeds)}, wanted at least one seed, each once")
        return seeds

    @model_validator(mode="after")
    def _check(self) -> Self:
        for arm, replaced in self.arms.items():
            if not is_component(arm) or arm in {STUDENT, TEACHER}:
                raise ConfigError(
                    f"arms: got the name {arm!r}, wanted letters, digits, '.', '_' and '-', "
                    f"and neither '{STUDENT}' nor '{TEACHER}'"
                )
            own = [path for path in (*self.settings, *replaced) if path in OF_THE_CELL]
            if own:
                raise ConfigError(f"arms.{arm}: '{own[0]}' is set by the study itself; leave it out")
            lost = [path for path in self.settings if path.startswith("stages.")]
            if "stages" in replaced and lost:
                raise ConfigError(
                    f"arms.{arm}: its 'stages' stand in the place of the recipe's, and of settings.{lost[0]}; "
                    "give that to each arm's stages instead"
                )
        for role in (TEACHER, STUDENT):
            settings = getattr(self, f"{role}_settings")
            own = [path for path in settings if path in OF_THE_CELL]
            if settings and getattr(self, role) is None:
                raise ConfigError(f"{role}_settings: there is no '{role}' whose file they could replace something in")
            if own:
                raise ConfigError(f"{role}_settings: '{own[0]}' is set by the study itself; leave it out")
        if self.student_seed is not None and self.student is None:
            raise ConfigError("student_seed: there is no 'student' that could be made with it")
        if unknown := [name for name in self.within if name not in MEASURES]:
            near = did_you_mean(unknown[0], MEASURES)
            raise ConfigError(f"within: {unknown[0]!r} is no measure{near}")
        if self.search is not None and self.search.seed in self.seeds:
            raise ConfigError(
                f"search.seed {self.search.seed} is one of the study's; wanted another, or luck would decide"
            )
        if self.compare_with not in self.arms:
            raise ConfigError(
                f"compare_with: no arm {self.compare_with!r} among {', '.join(self.arms) or 'none'}"
                f"{did_you_mean(self.compare_with, self.arms)}"
            )
        return self

    def run_name(self, *parts: str | int) -> str:
        """Name of one of the study's runs."""
        return "/".join(("studies", self.name, *map(str, parts)))

    def cell_file(self, arm: str, seed: int) -> Path:
        """Where a cell is kept."""
        return Path(self.results) / f"{arm}.{seed}.json"

    def teacher_config(self) -> RunConfig | None:
        """The run that makes the teacher; None where the study makes none."""
        if self.teacher is None:
            return None
        return load_config(self.teacher, _overrides({**self.teacher_settings, "name": self.run_name(TEACHER)}))

    @property
    def taught_file(self) -> str:
        """Where the teacher's text is, if the study makes some."""
        return f"runs/{self.run_name('taught.jsonl')}"

    @property
    def tuning_seed(self) -> int:
        """Training seed of what is made before the cells."""
        return self.seeds[0] if self.search is None else self.search.seed

    def taught_config(self) -> RunConfig:
        """The run whose training prompts the teacher answers."""
        assert self.taught is not None
        teacher = self.teacher_config()
        made = {} if teacher is None else {"teacher": f"{teacher.out}/{teacher.name}/student"}
        return load_config(self.recipe, _overrides({**made, **self.settings, "data.train_limit": self.taught.rows}))

    def learns_from_taught(self, arm: str) -> bool:
        """Whether an arm's cells need the text that the study makes."""
        reads = {**self.settings, **self.arms[arm]}.get("data.teacher_text")
        return self.taught is not None and reads == self.taught_file

    @property
    def paired_name(self) -> str:
        """What arms call the pairs of whichever student they start from."""
        return f"runs/{self.run_name('pairs.jsonl')}"

    def paired_file(self, seed: int) -> str:
        """Where the pairs of the student are from which a training seed starts."""
        if self.student is None:
            return self.paired_name
        made_with = seed if self.student_seed is None else self.student_seed
        return f"runs/{self.run_name('pairs', f'{made_with}.jsonl')}"

    def paired_config(self, seed: int) -> RunConfig:
        """The run whose models answer its training prompts, for the student from which a training seed starts."""
        assert self.paired is not None
        made_with = seed if self.student_seed is None else self.student_seed
        run = self._config({"data.train_limit": self.paired.rows}, made_with, name=self.run_name("pairs", made_with))
        return run.model_copy(update={"seed": made_with})

    def learns_from_paired(self, arm: str) -> bool:
        """Whether an arm's cells need the pairs that the study makes."""
        reads = {**self.settings, **self.arms[arm]}.get("data.preferences")
        return self.paired is not None and reads == self.paired_name

    def student_config(self, seed: int) -> RunConfig | None:
        """The run that makes the student from which a training seed starts; None where the study makes none."""
        if self.student is None:
            return None
        made_with = seed if self.student_seed is None else self.student_seed
        own = {"name": self.run_name(STUDENT, made_with), "seed": made_with}
        return load_config(self.student, _overrides({**self.student_settings, **own}))

    def makes(self, arm: str | None, role: Literal["student", "teacher"]) -> bool:
        """Whether the model of this role in an arm's cells, or None in a yardstick, is one that the study makes."""
        own = {} if arm is None else self.arms[arm]
        return getattr(self, role) is not None and role not in {**self.settings, **own}

    def cell_config(self, arm: str, seed: int) -> RunConfig:
        """The run of one cell, with what tuning found for its arm."""
        return self.arm_config(arm, seed, name=self.run_name(arm, seed), changes=self.tuned(arm))

    def arm_config(self, arm: str, seed: int, *, name: str, changes: Mapping[str, Any]) -> RunConfig:
        """A run of an arm with a few more changes."""
        return self._config({**self.arms[arm], **changes}, seed, name=name)

    def yardstick_config(self, yardstick: str) -> RunConfig:
        """The run that a yardstick is measured by: the recipe and the settings of all arms, at the first seed."""
        return self._config({}, self.seeds[0], name=self.run_name("yardsticks", yardstick))

    def _config(self, changes: Mapping[str, Any], seed: int, *, name: str) -> RunConfig:
        made = {"student": self.student_config(seed), "teacher": self.teacher_config()}
        replaced: dict[str, Any] = {
            role: f"{run.out}/{run.name}/student" for role, run in made.items() if run is not None
        }
        replaced |= {**self.settings, **changes, "name": name, "seed": seed}
        if replaced.get("data.preferences") == self.paired_name:
            replaced["data.preferences"] = self.paired_file(seed)
        return load_config(self.recipe, _overrides(replaced))

    @property
    def tunes(self) -> bool:
        """Whether arms are tuned before their cells are made."""
        return self.budget is not None or self.search is not None

    def tuning_file(self, arm: str) -> Path:
        """Where is kept what tuning found for an arm."""
        return Path(self.results) / "tuning" / f"{arm}.json"

    def tuned(self, arm: str) -> dict[str, Any]:
        """The settings that tuning found for an arm, by path; none where it has not been tuned yet. ``DataError`` where
        the file is something else."""
        file = self.tuning_file(arm)
        if not self.tunes or not file.is_file():
            return {}
        try:
            found = parsed(file.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: not what tuning of a study found; move it away") from error
        return dict(found)


def load_study(path: Path, overrides: Sequence[str] = (), *, quick: bool = False) -> StudyConfig:
    """The study that a YAML file describes, or its short form, every cell's configuration checked; ``overrides`` are
    KEY=VALUE (``overrides.with_overrides``).

    Raises ``ConfigError``, or its child ``UnsupportedCombination``, naming the file, the arm and the problem.
    """
    values = read_yaml_file(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {'nothing' if values is None else 'no mapping'}; wanted 'name: value' lines")
    values = with_overrides(values, overrides, entries=StudyConfig.model_fields)
    try:
        study = StudyConfig(**values)
        if quick:
            study = _short_form(study)
    except ConfigError as error:
        raise type(error)(headed(str(error).split("\n"), source=str(path))) from None
    study.teacher_config()
    study.student_config(study.seeds[0])
    require_heard(overrides, decided=_searched(study), quick=(values.get("quick") or {}) if quick else None)
    for arm in study.arms:
        try:
            config = study.arm_config(arm, study.seeds[0], name="checked", changes=_tried(study))
        except ConfigError as error:
            raise type(error)(f"{path}: arm {arm}: {error}") from None
        if study.budget is not None:
            require_heard(
                overrides, decided={f"stages.{config.stages.index(config.trained[-1])}.steps": "budget"}, quick=None
            )
        if config.data.test is None:
            raise ConfigError(f"{path}: {study.recipe} has no data.test; a study needs prompts to evaluate on")
        if isinstance(config.data.test, dict):
            raise ConfigError(f"{path}: {study.recipe} has several sets in data.test; a study evaluates on one")
        if study.search is not None and config.data.validation is None:
            raise ConfigError(f"{path}: {study.recipe} has no data.validation; a search needs prompts to judge by")
        if study.search is not None and (reason := config.data.unjudged(study.search.metric)):
            raise UnsupportedCombination(f"{path}: arm {arm}: search.metric is {reason}, or another search.metric")
    return study


def _short_form(study: StudyConfig) -> StudyConfig:
    """What '--quick' makes: never in the folders of the study itself, so that its cells stay as they are."""
    if study.quick is None:
        raise ConfigError(
            "--quick: this file has no entry 'quick' that says what is shorter; leave the option out, or add one"
        )
    for entry in BY_PATH:
        if not isinstance(study.quick.get(entry, {}), dict):
            raise ConfigError(f"quick: {entry} is {study.quick[entry]!r}, wanted settings by path, or no such entry")
    name = f"{study.name}-quick"
    own = {"name": name, "results": f"runs/studies/{name}/cells"}
    if same := [entry for entry in ("name", "results", "quick") if entry in study.quick]:
        raise ConfigError(f"quick: '{same[0]}' is set by the short form itself; leave it out")
    whole = study.model_dump(exclude={"quick"}, exclude_unset=True)
    added = {entry: {**whole.get(entry, {}), **study.quick[entry]} for entry in BY_PATH if entry in study.quick}
    short = StudyConfig(**{**whole, **study.quick, **added, **own})

    def moved(replaced: Mapping[str, Any]) -> dict[str, Any]:
        own = {study.taught_file: short.taught_file, study.paired_name: short.paired_name}
        return {path: own.get(value, value) if isinstance(value, str) else value for path, value in replaced.items()}

    arms = {arm: moved(replaced) for arm, replaced in short.arms.items()}
    return short.model_copy(update={"arms": arms, "settings": moved(short.settings)})


def _overrides(replaced: Mapping[str, Any]) -> list[str]:
    """Settings by path, as a command line has them."""
    return [f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in replaced.items()]


def _tried(study: StudyConfig) -> dict[str, Any]:
    """One of the values that a search tries, so that its path is checked."""
    return {} if study.search is None else {study.search.setting: study.search.values[0]}


def _searched(study: StudyConfig) -> dict[str, str]:
    """The setting that a search decides, by path."""
    return {} if study.search is None else {study.search.setting: "search"}
