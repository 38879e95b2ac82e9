"""Text that a model writes: its answers to the prompts of a run's split, as rows that training reads.

For distillation on whole sequences: the teacher answers, and the student is trained on the answers. What is drawn
depends on the question (``generated.Question``) and on nothing else: not on batches, ranks or interruptions.

A *cell* is (place of a prompt in its split, which of its samples).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.config import RunConfig
from minillm.drawing import Drawing, Drawn
from minillm.errors import ConfigError, DataError, did_you_mean, visible
from minillm.generated import (
    SUFFIX,
    Counts,
    Manifest,
    Question,
    differences,
    manifest_of,
    may_stand,
    read_generated,
    read_manifest,
)
from minillm.generation_parts import Answer, Cell, Parts
from minillm.loading import fingerprint
from minillm.pairs import Pair, check_alone
from minillm.preflight import Split, decoding_record, limits_record, read_split
from minillm.progress import Progress
from minillm.prompts import encode
from minillm.ranks import Ranks
from minillm.records import Row, shown
from minillm.results import versions
from minillm.row_sources import files_of
from minillm.rows import counted, read_rows
from minillm.stages import load_teacher
from minillm.store import make_folder, require_writable, write_text
from minillm.types import Prompt, Stop
from minillm.vocabulary import identity

SPLITS = ("train", "validation", "test")
OWN_FIELDS = ("row", "sample", "stop", "tokens")
"""What each written row says of its answer, beside prompt and response."""


def generate(
    model: str | Path,
    config: RunConfig,
    *,
    out: str | Path,
    split: str = "train",
    samples: int = 1,
    keep_cut: bool = False,
    fresh: bool = False,
) -> Manifest:
    """Has a model answer the prompts of a split, and writes rows to train on, with their manifest beside them.

    ``config`` says which prompts, which template and how text is drawn; its models are not read. Goes on where an
    earlier call with the same question stopped; a file that is done is left as it is. Raises ``DataError`` where
    ``out`` holds anything else and where no response is fit to be learnt from. ``fresh`` replaces text that was
    generated, once the new text is whole; never another file, nor one that the run reads.
    """
    out = Path(out)
    source = split_source(config, split)
    if samples < 1:
        raise ConfigError(f"--samples {samples}: wanted at least 1")
    require_own_file(out, sources_read(config))
    pair = check_alone(config, str(model))
    prompts = asked_prompts(config, pair, split)
    rows = {row.uid: row for row in _rows(config, source)}
    asked = question(config, pair, prompts, samples=samples)
    ranks = Ranks(threads=config.threads)
    parts = Parts(out, writes=ranks.first)
    if _done(out, asked, keep_cut=keep_cut, fresh=fresh):
        stored = read_generated(out)  # first: it may be another file than its manifest was written with
        _say(ranks, f"{out}: generated already; --fresh starts over")
        return stored
    answers, let_go = _left(parts, asked, fresh=fresh)

    def ready() -> None:
        make_folder(out.parent, setting="--out")
        require_writable(out)

    ranks.of_first(ready)  # every rank has read what is there
    for line in let_go:
        _say(ranks, line)
    _introduce(config, pair, prompts, rows, answers, ranks=ranks)
    ranks.of_first(lambda: parts.open(asked, keep=bool(answers)))
    cells = [(place, sample) for place in range(len(prompts.prompts)) for sample in range(samples)]
    if missing := [cell for cell in cells if cell not in answers]:
        answers |= _answer(missing, config, pair, prompts.prompts, ranks=ranks, parts=parts)

    def write() -> None:
        fields = [_fields(rows[prompt.uid]) for prompt in prompts.prompts]
        _write(out, [answers[cell] for cell in cells], fields, model=str(model), asked=asked, keep_cut=keep_cut)
        parts.remove()

    ranks.of_first(write)
    return read_generated(out)


def asked_prompts(config: RunConfig, pair: Pair, split: str) -> Split:
    """The prompts of a split as a model reads them that is to answer."""
    source, limit = split_source(config, split), getattr(config.data, f"{split}_limit")
    return read_split(config, source, pair=pair, name=split, need_response=False, limit=limit)


def question(config: RunConfig, pair: Pair, split: Split, *, samples: int) -> Question:
    """What a model is asked, as the manifest says it."""
    return Question(
        weights=fingerprint(pair.student_card),
        tokenizer=identity(pair.tokenizer),
        dtype=pair.student_card.dtype,
        source=split.source,
        data=split.sha256,
        template=config.data.template,
        decoding=config.decoding,
        samples=samples,
        seed=config.seed,
    )


def split_source(config: RunConfig, split: str) -> str:
    """Where the prompts of a split come from; ``ConfigError`` or ``DataError`` where that is no one source."""
    if split not in SPLITS:
        raise ConfigError(f"--split {split!r}: wanted one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")
    source: str | dict[str, str] | None = getattr(config.data, split)
    if isinstance(source, dict):
        raise ConfigError(
            f"data.{split} names several sets; choose one, such as data.{split}={next(iter(source.values()))}"
        )
    if source is None:
        raise DataError(f"data.{split} is missing; wanted the prompts to answer")
    return source


def require_own_file(out: Path, read: Mapping[str, str]) -> None:
    """Raise where rows cannot be written to a file: it has another ending, or the run reads it (``read``: sources by
    their settings)."""
    if out.suffix != SUFFIX:
        raise ConfigError(f"--out {str(out)!r}: wanted a file ending in {SUFFIX}, which training reads")
    for setting, source in read.items():
        if out.exists() and any(map(out.samefile, files_of(source))):
            raise DataError(f"{out}: {setting} reads it; nothing was touched.\n  give another --out")


def sources_read(config: RunConfig) -> dict[str, str]:
    """What the run reads, by setting, but for text that a teacher wrote: that is what is made here."""
    data = config.data
    single = {
        "train": data.train, "validation": data.validation, "corpus": data.corpus,
        "preferences_validation": data.preferences_validation,
    }  # fmt: skip
    sets = {f"test.{name}".rstrip("."): source for name, source in data.test_sets.items()}
    pairs = {f"preferences.{name}".rstrip("."): source for name, source in data.preference_sources.items()}
    return {f"data.{name}": source for name, source in {**single, **sets, **pairs}.items() if source is not None}


def _rows(config: RunConfig, source: str) -> list[Row]:
    """The rows as their source has them: prompts as they are trained on hold the template's text only."""
    rows, _ = read_rows(source, broken=config.data.broken, max_broken=config.data.max_broken)
    return rows


def _done(out: Path, asked: Question, *, keep_cut: bool, fresh: bool) -> bool:
    """Whether the answers to this question are there already; ``DataError`` where something else is that may not be
    replaced."""

    def differs() -> list[str]:
        found = read_manifest(out)
        assert found is not None, "the file was there a moment ago"
        return differences(found.asked, asked) + (["--keep-cut"] if found.keep_cut != keep_cut else [])

    if not may_stand(out, what="generated text", fresh=fresh, differs=differs):
        return False
    read_generated(out)
    return True


def _left(parts: Parts, asked: Question, *, fresh: bool) -> tuple[dict[Cell, Answer], list[str]]:
    """The answers that an interrupted call left, and what is to be said of those that are let go: under ``fresh`` all
    that answer another question, where without it that is a ``DataError``."""
    try:
        return parts.read(asked), []
    except DataError as error:
        if not fresh:
            raise
        return {}, [f"note: {str(error).split('; ')[0]}; --fresh lets it go"]


def _introduce(
    config: RunConfig, pair: Pair, split: Split, rows: Mapping[str, Row], answers: Mapping[Cell, Answer], *,
    ranks: Ranks,
) -> None:  # fmt: skip
    for line in split.words:
        _say(ranks, line)
    card = pair.student_card
    if card.template not in {None, config.data.template}:
        _say(ranks, f"note: {card.name} was made for template '{card.template}', data.template is not")
    taken = [name for prompt in split.prompts for name in rows[prompt.uid].extra if name in OWN_FIELDS]
    for name in sorted(set(taken)):
        _say(ranks, f"note: field {shown(name)} of {counted(taken.count(name), 'row')} is replaced by the answer's own")
    if answers:
        _say(ranks, f"an earlier call left {counted(len(answers), 'answer')}; going on from there")


def _answer(
    cells: Sequence[Cell], config: RunConfig, pair: Pair, prompts: Sequence[Prompt], *, ranks: Ranks, parts: Parts
) -> dict[Cell, Answer]:
    """Answers to all of these cells, on every rank; each batch of all ranks is kept on disk as soon as it is there."""
    model = load_teacher(pair, ranks=ranks, say=lambda line: _say(ranks, line))
    drawing = Drawing(
        pair=pair, decoding=decoding_record(config.decoding), limits=limits_record(config.evaluation), ranks=ranks,
        seed=config.seed,
    )  # fmt: skip
    batches = drawing.batches(cells, prompts)
    bar = Progress(f"generate {pair.student_card.name}", total=len(batches), unit="batches", shown=ranks.first)
    answers: dict[Cell, Answer] = {}
    tokens = cut = 0
    try:
        for piece, batch in enumerate(batches):
            drawn = drawing.draw(batch, prompts, reader=model.reader)
            new: list[Answer] = ranks.gather_objects(_read_back(drawn, pair, prompts))
            ranks.of_first(lambda new=new: parts.append(new))  # type: ignore[misc]
            answers |= {answer.cell: answer for answer in new}
            tokens += sum(answer.tokens for answer in new)
            cut += sum(answer.stop == Stop.LENGTH for answer in new)
            bar.advance(piece + 1, {"length": tokens / len(answers), "cut": cut / len(answers)})
    finally:
        bar.close()
        model.close()
    return answers


def _read_back(drawn: Sequence[Drawn], pair: Pair, prompts: Sequence[Prompt]) -> list[Answer]:
    """The answers as they are written: text, and whether it says the ids that were drawn."""
    uids = [prompts[each.cell[0]].uid for each in drawn]
    read = encode([each.text for each in drawn], pair.tokenizer, uids=uids)
    return [
        Answer(
            cell=each.cell, text=each.text, stop=str(each.stop), tokens=len(each.ids), respelt=tuple(again) != each.ids
        )
        for each, again in zip(drawn, read, strict=True)
    ]


def _fields(row: Row) -> dict[str, Any]:
    """What a written row takes over: prompt and other fields as they were, and never a reference response."""
    taken: dict[str, Any] = {name: value for name, value in row.extra.items() if name not in OWN_FIELDS}
    if row.messages:
        taken["messages"] = [{"role": role, "content": content} for role, content in row.messages]
    for name in ("prompt", "instruction"):
        if (value := getattr(row, name)) is not None:
            taken[name] = value
    if row.input:
        taken["input"] = row.input
    return {"uid": row.uid, **taken}


def _write(
    out: Path, answers: Sequence[Answer], fields: Sequence[Mapping[str, Any]], *, model: str, asked: Question,
    keep_cut: bool,
) -> None:  # fmt: skip
    """The file and its manifest; ``DataError`` where nothing is fit to be written."""
    cut = sum(answer.stop == Stop.LENGTH for answer in answers)
    empty = sum(answer.bare for answer in answers)
    kept = [answer for answer in answers if keep_cut or not (answer.bare or answer.stop == Stop.LENGTH)]
    if not kept:
        raise DataError(
            f"{model}: of {counted(len(answers), 'response')} none is fit to be learnt from ({cut:,} cut at "
            f"{asked.decoding.max_new_tokens:,} tokens, {empty:,} empty); {out} was not written\n"
            "  raise decoding.max_new_tokens (with --fresh)"
        )
    text = "".join(_line(answer, fields[answer.cell[0]], many=asked.samples > 1) for answer in kept)
    manifest = Manifest(
        model=model,
        asked=asked,
        keep_cut=keep_cut,
        counts=Counts(
            asked=len(answers), written=len(kept), cut=cut, empty=empty, respelt=sum(answer.respelt for answer in kept)
        ),
        mean_length=round(sum(answer.tokens for answer in kept) / len(kept), 3),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        versions=versions(),
        date=time.strftime("%Y-%m-%d"),
    )
    # First, so that text without a manifest is never ours.
    write_text(manifest_of(out), json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n")
    write_text(out, text)
    _tell(out, manifest)


def _line(answer: Answer, fields: Mapping[str, Any], *, many: bool) -> str:
    """One row of the file. Where a prompt has several samples their number is part of the row's own name."""
    uid, sample = fields["uid"], answer.cell[1]
    record = {
        **fields,
        "uid": f"{uid}#{sample}" if many else uid,
        "response": answer.text,
        "row": uid,
        "sample": sample,
        "stop": answer.stop,
        "tokens": answer.tokens,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _tell(out: Path, manifest: Manifest) -> None:
    """What was written and what was not, in words."""
    counts, longest = manifest.counts, manifest.asked.decoding.max_new_tokens
    print(f"{out}: {counts.written:,} of {counted(counts.asked, 'response')}, {manifest.mean_length:.1f} tokens each")
    if counts.cut:
        what = (
            "kept (--keep-cut), and over-long for training, which closes each with an end token that was never drawn"
            if manifest.keep_cut
            else "left out, since an end token there would be a lie; raise decoding.max_new_tokens"
        )
        print(f"  {counts.cut:,} cut at {longest:,} tokens: {what}")
    if counts.empty:
        print(f"  {counts.empty:,} empty: {'kept (--keep-cut)' if manifest.keep_cut else 'left out'}")
    if counts.respelt:
        print(f"  {counts.respelt:,} of those written are read back as other token ids than were drawn")


def _say(ranks: Ranks, line: str) -> None:
    if ranks.first:
        print(visible(line), flush=True)
