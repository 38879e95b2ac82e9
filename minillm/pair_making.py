"""Distilled pairs: to the prompts of a run's split, the teacher's answer is preferred to the student's.

Both answer by ``generation``; what is written are the pairs that training would read, each with the log-probability of
both answers under both models, of the very ids that training reads: text is tokenised again, which may spell it
otherwise than it was drawn.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.config import RunConfig
from minillm.errors import ConfigError, DataError, visible
from minillm.generated import Question, differences, manifest_of, may_stand, read_generated
from minillm.generation import (
    OWN_FIELDS,
    asked_prompts,
    generate,
    question,
    require_own_file,
    sources_read,
    split_source,
)
from minillm.manifests import parsed
from minillm.pair_manifest import PairCounts, PairManifest, pair_differences, pair_manifest_beside, read_pair_manifest
from minillm.pairs import Pair, check_alone
from minillm.preference_reading import TOKEN_FIELDS, read_preferences
from minillm.preflight import limits_record
from minillm.ranks import Ranks
from minillm.results import versions
from minillm.rows import counted
from minillm.sequence_logps import ids_of, pair_logps
from minillm.stages import load_teacher
from minillm.store import make_folder, require_writable, write_text
from minillm.types import PreferencePair
from minillm.vocabulary import identity

ROLES = {"teacher": "chosen", "student": "rejected"}
"""Whose answers are which."""
DIGITS = 6
"""Of a log-probability behind the point: beyond them is what ranks and batches round otherwise."""
_WHAT = "distilled pairs"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writer:
    """One of the two models, and what it is asked."""

    name: str
    config: RunConfig
    pair: Pair
    asked: Question
    uids: frozenset[str]
    """Of the prompts that it is asked."""
    answers: Path
    """Its generated text, until the pairs are written."""

    def answer(self, split: str, *, fresh: bool) -> dict[str, dict[str, Any]]:
        """Its rows, by the id of the prompt; those that an earlier call left are taken as they are."""
        there = False
        if self.answers.is_file():
            try:
                there = not differences(read_generated(self.answers).asked, self.asked)
            except DataError:
                if not fresh:
                    raise
        generate(self.name, self.config, out=self.answers, split=split, fresh=fresh and not there)
        rows = [parsed(line) for line in self.answers.read_text(encoding="utf-8").splitlines()]
        return {row["row"]: row for row in rows}


def make_pairs(
    config: RunConfig,
    *,
    out: str | Path,
    student: str | Path | None = None,
    teacher: str | Path | None = None,
    split: str = "train",
    limit: int | None = None,
    fresh: bool = False,
) -> PairManifest:
    """Has a teacher and a student answer the first ``limit`` prompts of a split, and writes pairs to learn from, with
    their manifest beside them.

    The models are the run's unless named here. The student draws with random numbers of its own (the run's seed and
    1): with the teacher's the two answers would go together. Left out and counted: answers that are cut, empty or
    equal, and what training would not read. An interrupted call goes on with the answers that it has; pairs that are
    done are left as they are. Raises ``ConfigError`` where a model is missing, ``DataError`` where ``out`` holds
    anything else or no pair is fit to be learnt from. ``fresh`` replaces a file that has a manifest, once the new pairs
    are whole, and no other.
    """
    out = Path(out)
    _check(config, split, out=out, limit=limit)
    if limit is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={f"{split}_limit": limit})})
    named = {"teacher": teacher or config.teacher, "student": student or _as_student(config.student)}
    writers = {role: _writer(role, name, config, split, out=out) for role, name in named.items()}
    ranks = Ranks(threads=config.threads)

    def differs() -> list[str]:
        found = pair_manifest_beside(out)
        assert found is not None, "the file was there a moment ago"
        return pair_differences(found, chosen=writers["teacher"].asked, rejected=writers["student"].asked)

    if may_stand(out, what=_WHAT, fresh=fresh, differs=differs):
        made = _made(out)  # first: it may be another file than its manifest was written with
        _say(ranks, f"{out}: made already; --fresh starts over")
        return made

    def ready() -> None:
        make_folder(out.parent, setting="--out")
        require_writable(out)

    ranks.of_first(ready)
    answers = {role: writer.answer(split, fresh=fresh) for role, writer in writers.items()}
    joined = _joined(answers["teacher"], answers["student"])
    rows = {uid: row for uid, row in joined.items() if row["chosen"] != row["rejected"]}
    if not rows:
        raise DataError(
            f"of {counted(len(joined), 'prompt')} that both models answered ({len(answers['teacher']):,} by the "
            f"teacher, {len(answers['student']):,} by the student) none has two different answers; "
            f"{out} was not written\n"
            "  give other models or prompts, or raise decoding.max_new_tokens (with --fresh)"
        )
    scored = _scored(rows, writers, out=out, ranks=ranks)
    prompts = len(frozenset.union(*(writer.uids for writer in writers.values())))
    counts = PairCounts(
        asked=prompts, written=len(scored), unanswered=prompts - len(joined), equal=len(joined) - len(rows),
        unread=len(rows) - len(scored),
    )  # fmt: skip

    def write() -> None:
        _write(out, scored, counts, writers=writers)
        for writer in writers.values():
            for file in (writer.answers, manifest_of(writer.answers)):
                file.unlink(missing_ok=True)

    ranks.of_first(write)
    return _made(out)


def _check(config: RunConfig, split: str, *, out: Path, limit: int | None) -> None:
    """Raise for what was asked for wrongly, before any model is looked at."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: wanted at least 1")
    # What training is to read may be just what is made here.
    read = {name: source for name, source in sources_read(config).items() if not name.startswith("data.preferences")}
    require_own_file(out, read)
    split_source(config, split)


def _as_student(name: str) -> str:
    """A card's bare name as that of a student: by itself it is looked for among teachers."""
    bare = "/" not in name and not name.endswith((".yaml", ".yml")) and not Path(name).exists()
    return f"students/{name}" if bare else name


def _writer(role: str, name: str | Path | None, config: RunConfig, split: str, *, out: Path) -> _Writer:
    if name is None:
        raise ConfigError(f"the run names no {role}; add '{role}: NAME', or give --{role}")
    if role == "student":
        config = config.model_copy(update={"seed": (config.seed + 1) % 2**63})
    pair = check_alone(config, str(name))
    prompts = asked_prompts(config, pair, split)
    return _Writer(
        name=str(name), config=config, pair=pair, asked=question(config, pair, prompts, samples=1),
        uids=frozenset(prompt.uid for prompt in prompts.prompts), answers=out.with_name(f"{out.name}.{role}.jsonl"),
    )  # fmt: skip


def _joined(
    chosen: Mapping[str, Mapping[str, Any]], rejected: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Prompts that both models answered, with both answers, in the student's order."""
    found = {}
    for uid, row in rejected.items():
        if uid in chosen:
            fields = {name: value for name, value in row.items() if name not in (*OWN_FIELDS, "response")}
            found[uid] = {**fields, "chosen": chosen[uid]["response"], "rejected": row["response"]}
    return found


def _scored(
    rows: Mapping[str, Mapping[str, Any]], writers: Mapping[str, _Writer], *, out: Path, ranks: Ranks
) -> list[dict[str, Any]]:
    """The rows that training would read, with what both models say of their answers."""
    # A new folder: a name beside ``out`` may be that of somebody's file.
    folder = Path(ranks.of_first(lambda: tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent)))
    file = folder / "joined.jsonl"
    student, teacher = writers["student"], writers["teacher"]
    try:
        ranks.of_first(lambda: write_text(file, _lines(rows.values())))
        read = {"student": _read(file, student)}
        # The same ids for both, unless their tokenizers differ: then each measures the same text in its own.
        alike = identity(student.pair.tokenizer) == identity(teacher.pair.tokenizer)
        read["teacher"] = read["student"] if alike else _read(file, teacher)
    finally:
        ranks.barrier()
        ranks.of_first(lambda: shutil.rmtree(folder, ignore_errors=True))
    uids = [uid for uid in read["student"] if uid in read["teacher"]]
    logps = {role: _logps([read[role][uid] for uid in uids], writers[role], ranks=ranks) for role in ROLES}
    found = []
    for place, uid in enumerate(uids):
        pair = read["student"][uid]
        sizes = (len(pair.prompt.ids), len(pair.chosen_ids), len(pair.rejected_ids))
        found.append(
            {
                **rows[uid],
                **{f"{role}_logps": of[place] for role, of in logps.items()},
                **dict(zip(TOKEN_FIELDS, sizes, strict=True)),
            }
        )
    return found


def _read(file: Path, writer: _Writer) -> dict[str, PreferencePair]:
    """The pairs as training reads them, by id; what it would not read is left out."""
    over_long = writer.config.data.over_long
    data = writer.config.data.model_copy(
        update={"over_long": "drop" if over_long == "error" else over_long, "single_turn": False}
    )
    config = writer.config.model_copy(update={"data": data})
    found = read_preferences(config, str(file), pair=writer.pair, name="pairs", limit=None)
    return {pair.prompt.uid: pair for pair in found.pairs}


def _logps(pairs: Sequence[PreferencePair], writer: _Writer, *, ranks: Ranks) -> list[list[float]]:
    """Log-probabilities of both answers of each pair, the preferred one's first."""
    _say(ranks, f"{writer.pair.student_card.name}: reads {counted(2 * len(pairs), 'answer')}")
    with closing(load_teacher(writer.pair, ranks=ranks, say=lambda line: _say(ranks, line))) as model:
        found = pair_logps(
            map(ids_of, pairs), model=model, ids=writer.pair.ids, ranks=ranks,
            limits=limits_record(writer.config.evaluation),
        )  # fmt: skip
    return [[round(value, DIGITS) for value in both] for both in found]


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(
    out: Path, rows: Sequence[Mapping[str, Any]], counts: PairCounts, *, writers: Mapping[str, _Writer]
) -> None:  # fmt: skip
    text = _lines(rows)
    manifest = PairManifest(
        teacher=writers["teacher"].name,
        student=writers["student"].name,
        chosen=writers["teacher"].asked,
        rejected=writers["student"].asked,
        counts=counts,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        versions=versions(),
        date=time.strftime("%Y-%m-%d"),
    )
    # First, so that text without a manifest is never ours.
    write_text(manifest_of(out), json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n")
    write_text(out, text)
    print(f"{out}: {counted(counts.written, 'pair')} from {counted(counts.asked, 'prompt')}", flush=True)
    left = {"without two whole answers": counts.unanswered, "equal": counts.equal, "not read back": counts.unread}
    for what, number in left.items():
        if number:
            print(f"  {number:,} {what}: left out", flush=True)


def _made(out: Path) -> PairManifest:
    found = read_pair_manifest(out)
    assert found is not None, "a file that was made has its manifest"
    return found


def _say(ranks: Ranks, line: str) -> None:
    if ranks.first:
        print(visible(line), flush=True)
