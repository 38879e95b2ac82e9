"""All checks of a run, in order; none of them hides the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.config import RunConfig, load_config
from minillm.doctor import data, folders, machine, memory, rollout, smoke, tokens
from minillm.doctor.findings import Finding, of_error, ok, warning
from minillm.doctor.patient import UNREADABLE, Check, Patient, left_out, made, read_models, student_alone, with_splits
from minillm.errors import MinillmError
from minillm.model_files import in_short
from minillm.pairs import Pair, check_pair

# Another check is a line here: its function gives findings from a ``Patient``.
CHECKS: tuple[Check, ...] = (
    Check(id="tokenizer-ids", run=tokens.tokenizer_ids, needs=("student", "teacher")),
    Check(id="vocabulary-rows", run=tokens.vocabulary_rows, needs=("a model",)),
    Check(id="chat-template", run=tokens.chat_template, needs=("student", "teacher")),
    Check(id="end-tokens", run=tokens.end_tokens, needs=("a model",)),
    Check(id="turn-end", run=tokens.turn_end, needs=("student",)),
    Check(id="begin-token", run=tokens.begin_token, needs=("student", "rows")),
    Check(id="generation-settings", run=folders.generation_settings, needs=("a model",)),
    Check(id="positions", run=folders.positions, needs=("a model",)),
    Check(id="stored-precision", run=folders.stored_precision, needs=("teacher",)),
    Check(id="precision", run=folders.precision),
    Check(id="lengths", run=data.lengths, needs=("rows",)),
    Check(id="responses", run=data.responses, needs=("rows",)),
    Check(id="preferences", run=data.preferences, needs=("student", "teacher")),
    Check(id="held-out", run=data.held_out),
    Check(id="rows-per-step", run=data.rows_per_step),
    Check(id="threads", run=machine.threads),
    Check(id="shared-memory", run=machine.shared_memory),
    Check(id="memory", run=memory.memory, needs=("student", "teacher")),
    Check(id="disk", run=machine.disk, needs=("student",)),
    Check(id="out-folder", run=machine.out_folder),
)
WITHOUT_A_RUN = (machine.packages, machine.open_files)
"""Checks that need no configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found, and what the models said where they were asked."""

    findings: tuple[Finding, ...]
    answers: tuple[rollout.Answer, ...] = ()


def examine(file: Path, overrides: Sequence[str] = (), *, ranks: int = 0, ask_models: bool = False) -> Report:
    """Makes all checks of the run that a file describes. ``ranks`` above 0 are started for a smoke test; ``ask_models``
    loads both models for five prompts. Raises nothing that a user's files could cause."""
    found = [finding for check in WITHOUT_A_RUN for finding in check()]
    given: tuple[rollout.Answer, ...] = ()
    try:
        config = load_config(file, overrides)
    except (MinillmError, OSError) as raised:
        found.append(of_error("configuration", raised, why=UNREADABLE))
        names = ", ".join(check.id for check in CHECKS)
        found.append(left_out("checks", f"the configuration could not be read, for {len(CHECKS)} checks: {names}"))
    else:
        found.append(ok("configuration", f"{file}: {len(config.stages)} stages"))
        own, given = _examined(config, ranks=max(1, ranks), ask_models=ask_models)
        found += own
    if ranks:
        found += smoke.collectives(ranks)
    return Report(findings=tuple(found), answers=given)


def _examined(config: RunConfig, *, ranks: int, ask_models: bool) -> tuple[list[Finding], tuple[rollout.Answer, ...]]:
    patient, found = read_models(config)
    for model in patient.models:
        found.append(ok(model.role, f"{config.model_dump()[model.role]}: a {model.facts.config.model_type}"))
    patient = Patient(config=config, student=patient.student, teacher=patient.teacher, ranks=ranks)
    patient, unread = _with_rows(patient)
    found += unread
    for check in CHECKS:
        found += made(check, patient)
    pair, refused = _paired(config, known=found)
    found += refused
    if not ask_models:
        return found, ()
    if pair is None or not patient.splits:
        return [*found, left_out("rollout", "models or rows could not be read")], ()
    said = _asked(patient, pair)
    return ([*found, said], ()) if isinstance(said, Finding) else ([*found, *rollout.looked_over(patient, said)], said)


def _with_rows(patient: Patient) -> tuple[Patient, list[Finding]]:
    if patient.student is None:
        return patient, [left_out("data", "no student could be read, whose tokenizer reads the rows")]
    try:
        splits, unread = data.read_samples(patient.config, student_alone(patient))
    except MinillmError as raised:  # the student's end tokens: its own check tells
        return patient, [left_out("data", str(raised).partition("\n")[0])]
    told = [
        ok("data", f"{name}: {len(split.prompts):,} rows of {split.source} can be read")
        for name, split in splits.items()
    ]
    return with_splits(patient, splits), [*told, *unread]


def _paired(config: RunConfig, *, known: Iterable[Finding]) -> tuple[Pair | None, list[Finding]]:
    """What the run itself asks of its settings and models; told where no check has told it already."""
    try:
        return check_pair(config), [ok("settings", "the run's own checks of settings and models pass")]
    except (MinillmError, OSError) as raised:
        mine = of_error("settings", raised, why=UNREADABLE)
        told = {(finding.found, finding.mend) for finding in known}
        return None, [] if (mine.found, mine.mend) in told else [mine]
    except Exception as raised:
        return None, [
            warning(
                "settings",
                f"this check broke off: {type(raised).__name__}: {in_short(raised)}",
                why="the run makes the same check",
                mend="look at the models' folders",
            )
        ]


def _asked(patient: Patient, pair: Pair) -> tuple[rollout.Answer, ...] | Finding:
    """Answers of both models, or why there are none. Prompts that are too long for the run are not asked."""
    split = patient.splits.get("train") or next(iter(patient.splits.values()))
    fitting = [row for row in split.prompts if len(row.ids) <= patient.config.data.max_prompt_tokens]
    if not fitting:
        return left_out("rollout", "no prompt is short enough")
    try:
        return tuple(rollout.answers(patient, pair, fitting))
    except MinillmError as raised:
        return of_error("rollout", raised, why="the models cannot be asked, so they cannot be trained")
    except Exception as raised:  # of torch: memory, drivers, an architecture that does something else
        return warning(
            "rollout",
            f"the models could not be asked: {type(raised).__name__}: {in_short(raised)}",
            why="each is loaded whole on one device for this",
            mend="where they do not fit so, leave out --rollout; otherwise look at what is named",
        )
