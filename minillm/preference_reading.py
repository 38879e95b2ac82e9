"""Preferences ready for a run: the pairs of one or several sources, and what is known of the teacher that made them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minillm.config import RunConfig
from minillm.errors import DataError, ManifestError
from minillm.pair_manifest import AGAIN, PairManifest, read_pair_manifest
from minillm.pair_prompts import PreparingPairs
from minillm.pair_records import PairRow
from minillm.pairs import Pair
from minillm.preflight import AnySplit, held_out_sources, same_source
from minillm.prompts import ENCODE_ROWS, RowLimits
from minillm.records import shown
from minillm.row_sources import PAIRS, files_of, locate
from minillm.rows import Reading, counted, pair_rows
from minillm.types import PreferencePair, Prompt
from minillm.vocabulary import identity

TOKEN_FIELDS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
"""What a row of distilled pairs says of the ids that its log-probabilities are of, end tokens included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSplit:
    """The pairs of one split, and what was said when they were read."""

    source: str
    pairs: Sequence[PreferencePair]
    """In the files' order."""
    sha256: str
    """Over all that is read of them."""
    words: tuple[str, ...]
    """Counted sentences for the terminal: what was read, dropped, cut or left out."""
    sources: tuple[str, ...]
    """Names of its sources that have pairs, in their order; a single one has the name ''."""
    teachers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By source: the teachers whose log-probabilities its pairs carry, as far as a manifest says so; each by the
    fingerprint of its weights, and how it was called."""

    @property
    def prompts(self) -> Sequence[Prompt]:
        """A prompt for each pair."""
        return tuple(pair.prompt for pair in self.pairs)

    def part(self, pairs: Sequence[PreferencePair], *, what: str) -> PairSplit:
        """The same with these of its pairs alone, as a stage learns from them, under a name that says ``what`` they
        are; itself where they are all."""
        sha256 = _hash(pairs)
        if sha256 == self.sha256:
            return self
        return dataclasses.replace(self, source=f"{self.source}, {what}", pairs=pairs, sha256=sha256)


def pairs_in(split: AnySplit) -> Sequence[PreferencePair]:
    """Those of a split that was read as pairs."""
    assert isinstance(split, PairSplit), f"{split.source} was read as prompts"
    return split.pairs


def read_preferences(
    config: RunConfig, source: str | Mapping[str, str], *, pair: Pair, name: str, limit: int | None
) -> PairSplit:
    """The pairs of a source, or of several by their names; the first ``limit`` of each of them. A single one has the
    name ''.

    With several, and in a folder or pattern, a pair's id begins with the name of its source. Raises ``DataError`` where
    a row breaks the run's policy or no pair is left, and its child ``ManifestError`` where the manifest of distilled
    pairs is one of another file, tokenizer or template.
    """
    named = {"": source} if isinstance(source, str) else dict(source)
    reads = [_Read(config, each, pair=pair, of=key, name=f"{name} {key}".strip()) for key, each in named.items()]
    pairs = [found for read in reads for found in read.pairs(limit)]
    return PairSplit(
        source=", ".join(f"{key}={each}" if key else each for key, each in named.items()),
        pairs=pairs,
        sha256=_hash(pairs),
        words=tuple(word for read in reads for word in read.words),
        sources=tuple(dict.fromkeys(found.source for found in pairs)),
        teachers={source: of for read in reads for source, of in read.teachers.items()},
    )


class _Read:
    """One source on its way to pairs."""

    def __init__(self, config: RunConfig, source: str, *, pair: Pair, of: str, name: str) -> None:
        data = config.data
        self._config, self._pair, self._of, self._name = config, pair, of, name
        self._origin = locate(source, PAIRS)
        self.words: list[str] = []
        self.teachers: dict[str, dict[str, str]] = {}
        """See ``PairSplit``."""
        self.manifests = {
            file: found for file in files_of(source) if (found := read_pair_manifest(file)) is not None
        }  # fmt: skip
        for file, manifest in self.manifests.items():
            _check_manifest(file, manifest, config, pair=pair, held_out=name.startswith("preferences_validation"))
            said = f"{manifest.counts.written:,} pairs of {manifest.teacher} (chosen) and {manifest.student}"
            self.words.append(f"{name}: {said} to {manifest.chosen.source}")
        self._preparing = PreparingPairs(
            tokenizer=pair.tokenizer,
            template=data.template,
            limits=RowLimits(
                prompt=data.max_prompt_tokens, response=config.decoding.max_new_tokens, over_long=data.over_long,
                need_response=True,
            ),
            ends=pair.ids.eos,
            single_turn=data.single_turn,
            name=name,
        )  # fmt: skip

    def pairs(self, limit: int | None) -> Iterator[PreferencePair]:
        """All of its pairs, or the first of each of its files."""
        data = self._config.data
        reading = pair_rows(self._origin, broken=data.broken, max_broken=data.max_broken)
        met: dict[str, int] = {}
        unvouched = 0
        for source, file, rows in _some(reading, self._of, limit=limit, met=met):
            manifest = None if file is None else self.manifests.get(file)
            for pair in self._preparing.take(rows, source=source):
                unvouched += manifest is None and pair.teacher_logps is not None
                if manifest is not None:
                    _require_same_ids(pair, str(file))
                if manifest is not None and pair.teacher_logps is not None:
                    self.teachers.setdefault(source, {})[manifest.teacher_weights] = manifest.teacher
                yield pair
        self._say(reading, limit, met, unvouched)

    def _say(self, reading: Reading[PairRow], limit: int | None, met: Mapping[str, int], unvouched: int) -> None:
        report = reading.report()
        self.words += [str(report)] if report.skipped else []
        for source, rows in met.items():
            if limit is not None and rows > limit:
                where = f" of {source}" if source != self._of else ""
                told = f"the first {limit:,} of {rows:,} rows{where} (limit set by data.preferences_limit)"
                self.words.append(f"{self._name}: {told}")
        self.words.append(str(self._preparing.report()))
        if unvouched:
            self.words.append(
                f"{self._name}: {counted(unvouched, 'pair')} with log-probabilities of a teacher and no manifest: "
                "nothing says which teacher they are of"
            )


def _some(
    reading: Reading[PairRow], of: str, *, limit: int | None, met: dict[str, int]
) -> Iterator[tuple[str, Path | None, list[PairRow]]]:
    """Rows of one file at a time, as many as are tokenised together, with the name of their source; ``met`` counts
    rows of each source. The rest beyond a limit is read, too: a broken row there counts as everywhere."""
    rows: list[PairRow] = []
    before: tuple[str, Path | None] | None = None
    for row in reading:
        part = reading.part
        file = next(iter(part.files()), None)
        source = of or (part.stem if part.name != reading.name else "")
        if before is not None and ((source, file) != before or len(rows) == ENCODE_ROWS):
            yield *before, rows
            rows = []
        before = source, file
        met[source] = met.get(source, 0) + 1
        if limit is None or met[source] <= limit:
            rows.append(_under(row, of))
    if before is not None:
        yield *before, rows


def _under(row: PairRow, of: str) -> PairRow:
    """The row with its source's name before its own, since two sources may have rows of one name."""
    return dataclasses.replace(row, row=dataclasses.replace(row.row, uid=f"{of}/{row.uid}")) if of else row


def _check_manifest(file: Path, manifest: PairManifest, config: RunConfig, *, pair: Pair, held_out: bool) -> None:
    """Raise where distilled pairs are of another tokenizer or template, or answer prompts that are held out."""
    if manifest.template != config.data.template:
        raise ManifestError(
            f"{file}: its prompts were read with template '{manifest.template}', and data.template is "
            f"'{config.data.template}'; set the same, or {AGAIN}"
        )
    if manifest.tokenizer != identity(pair.tokenizer):
        raise ManifestError(
            f"{file}: its log-probabilities are of the ids of another tokenizer than that of student "
            f"{pair.student_card.name}; give a student that reads the same ids, or {AGAIN}"
        )
    for setting, source in held_out_sources(config).items() if not held_out else ():
        if same_source(manifest.chosen.source, source):
            raise DataError(
                f"{file}: answers the prompts of data.{setting} ({source}), which are held out; "
                "let the models answer others (minillm pairs --split train)"
            )


def _require_same_ids(pair: PreferencePair, file: str) -> None:
    """Raise ``ManifestError`` where the ids are not those that the log-probabilities are of: a prompt that is cut now
    and was not then."""
    now = (len(pair.prompt.ids), len(pair.chosen_ids), len(pair.rejected_ids))
    then = tuple(pair.prompt.extra.get(name, "") for name in TOKEN_FIELDS)
    if then != tuple(map(str, now)):
        raise ManifestError(
            f"{file}: row {shown(pair.prompt.uid)} has {', '.join(map(str, now))} tokens (prompt, chosen, rejected), "
            f"and "
            f"{', '.join(then)} when its log-probabilities were measured\n"
            f"  set data.max_prompt_tokens and data.over_long as they were, or {AGAIN}"
        )


def _hash(pairs: Iterable[PreferencePair]) -> str:
    """SHA-256 in hex over all that a stage may read of each pair, in order: what a resumed run compares."""
    digest = hashlib.sha256()
    for pair in pairs:
        row = [pair.prompt.uid, pair.source, pair.prompt.ids, pair.chosen_ids, pair.rejected_ids, pair.teacher_logps]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
