"""What a run reads beside its models, and everything that can be found wrong with it before any weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from minillm.config import DecodingConfig, EvaluationConfig, RunConfig
from minillm.data_cache import DataCache
from minillm.errors import CacheError, DataError, ManifestError, UnsupportedCombination
from minillm.generated import read_generated
from minillm.loading import fingerprint
from minillm.micro_batches import Limits
from minillm.pairs import Pair
from minillm.prepared import Prepared, PreparedBlocks, Wanted, holds_text, prepared_blocks, prepared_prompts
from minillm.prompt_table import answered
from minillm.row_sources import CORPUS, PROMPTS, Source, files_of, locate
from minillm.rows import counted, read_rows
from minillm.slots import require_values
from minillm.teacher_cache import TeacherCache, read_cache
from minillm.templates import raw_text
from minillm.text_stages import KdStage
from minillm.types import Decoding, Examples, Prompt
from minillm.vocabulary import identity

BLOCK_TOKENS = 512
"""Of a corpus's text, where the run says nothing else."""


class AnySplit(Protocol):
    """What there is to say of a split, be it of prompts (``Split``) or of pairs (``preference_reading.PairSplit``)."""

    @property
    def source(self) -> str:
        """Where its rows come from."""

    @property
    def prompts(self) -> Sequence[Prompt]:
        """Its prompts, in the rows' order."""

    @property
    def sha256(self) -> str:
        """Over all that is read of its rows."""

    @property
    def words(self) -> tuple[str, ...]:
        """Counted sentences for the terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The prompts of one split, and what was said when they were read."""

    source: str
    prompts: Sequence[Prompt]
    sha256: str
    words: tuple[str, ...]
    """Counted sentences for the terminal: what was read, dropped, cut or left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """What the language-model loss learns from, where it is not the run's own rows."""

    source: str
    rows: Examples
    size: str
    """How many rows or blocks it has, in words."""
    sha256: str
    words: tuple[str, ...]
    """Counted sentences for the terminal."""


def read_split(
    config: RunConfig, source: str, *, pair: Pair, name: str, need_response: bool, limit: int | None = None
) -> Split:
    """The prompts of one source, ready for the models; ``DataError`` where a row breaks the run's policy or none is
    left."""
    data = config.data
    kept = data.train_responses if name == "train" else None
    wanted = _wanted(
        config, locate(source, PROMPTS), pair=pair, name=name, need_response=need_response, limit=limit, responses=kept
    )
    found = prepared_prompts(wanted, pair.tokenizer, cache=DataCache(data.cache))
    words = (*found.words, found.report, *([found.place] if found.place else []))
    return Split(source=source, prompts=found.prompts, sha256=found.sha256, words=words)


def with_checker(config: RunConfig, split: Split) -> Split:
    """A split whose responses are going to be judged, with what the run's checker says of its prompts.

    Raises ``DataError`` where it has nothing to check.
    """
    if config.data.checker is None:
        return split
    told = require_values([prompt.text for prompt in split.prompts], source=split.source)
    return dataclasses.replace(split, words=(*split.words, told))


def require_checked_rows(config: RunConfig) -> None:
    """Raise ``DataError`` where validation or test rows have nothing that the run's checker checks; needs no model."""
    data = config.data
    for source in (data.validation, *data.test_sets.values()) if data.checker is not None else ():
        if source is not None:
            rows, _ = read_rows(source, broken=data.broken, max_broken=data.max_broken)
            require_values([raw_text(row) for row in rows], source=source)


def _wanted(
    config: RunConfig, origin: Source, *, pair: Pair, name: str, need_response: bool, corpus: bool = False,
    limit: int | None = None, responses: int | None = None,
) -> Wanted:  # fmt: skip
    """Rows as the run reads them everywhere."""
    data = config.data
    return Wanted(
        origin=origin,
        corpus=corpus,
        name=name,
        broken=data.broken,
        max_broken=data.max_broken,
        limit=limit,
        responses=responses,
        template=data.template,
        max_prompt_tokens=data.max_prompt_tokens,
        over_long=data.over_long,
        max_response_tokens=config.decoding.max_new_tokens,
        eos_id=pair.ids.eos[0],
        need_response=need_response,
    )


def read_teacher_text(config: RunConfig, *, pair: Pair) -> Split:
    """The responses that a seqkd stage learns from, proved to be generated text, and the run's teacher's if it names
    one.

    Raises ``DataError``, or its child ``ManifestError``, where the file is missing, was edited, has no manifest, or was
    written by another model or under another template.
    """
    source = config.data.teacher_text
    assert source is not None, "the configuration refuses a seqkd stage without it"
    manifest = read_generated(source)
    if manifest.template != config.data.template:
        raise ManifestError(
            f"{source}: its prompts were read with template '{manifest.template}', and data.template is "
            f"'{config.data.template}'; set the same, or generate it again"
        )
    if pair.teacher_card is not None and manifest.weights != fingerprint(pair.teacher_card):
        raise ManifestError(
            f"{source}: written by {manifest.model} with weights {manifest.weights}, and the run's teacher "
            f"{pair.teacher_card.name} has {fingerprint(pair.teacher_card)}; name that teacher, or let this one write"
        )
    for setting, held_out in held_out_sources(config).items():
        if same_source(manifest.asked.source, held_out):
            raise DataError(
                f"{source}: answers the prompts of data.{setting} ({held_out}), which are held out; "
                "let the teacher answer others (minillm generate --split train)"
            )
    split = read_split(config, source, pair=pair, name="teacher text", need_response=True)
    told = f"teacher text: {manifest.counts.written:,} responses of {manifest.model} to {manifest.asked.source}"
    return dataclasses.replace(split, words=(told, *split.words))


def held_out_sources(config: RunConfig) -> dict[str, str]:
    """Sources that no stage may learn from, by the setting in ``data`` that names them: those that are not data.train
    too."""
    sets = {f"test.{name}".rstrip("."): source for name, source in config.data.test_sets.items()}
    found = sets if config.data.validation is None else {"validation": config.data.validation, **sets}
    train = config.data.train
    return {name: source for name, source in found.items() if train is None or not same_source(source, train)}


def same_source(one: str, other: str) -> bool:
    """Whether two names are of one source, or have a file in common, by whatever paths."""
    files = [{(at.st_dev, at.st_ino) for at in map(Path.stat, files_of(source))} for source in (one, other)]
    return one == other or not files[0].isdisjoint(files[1])


def read_teacher_caches(config: RunConfig, *, pair: Pair, splits: Mapping[str, AnySplit]) -> dict[str, TeacherCache]:
    """The caches that kd stages learn from, by stage, proved to be of this run's rows, and of its teacher if it names
    one.

    Raises ``DataError``, or its child ``CacheError``, where one is missing, was edited, or was made with another
    teacher, tokenizer, template or data.
    """
    caches = {}
    for stage in config.trained:
        if isinstance(stage, KdStage) and stage.teacher_cache is not None:
            cache = read_cache(stage.teacher_cache)
            _check_cache(cache, config, pair=pair)
            split = splits[stage.reads]
            cache.require(answered(split.prompts), source=split.source)
            caches[stage.name] = cache
    return caches


def _check_cache(cache: TeacherCache, config: RunConfig, *, pair: Pair) -> None:
    """Raise ``CacheError`` where a cache is of another teacher, tokenizer or template."""
    asked, remedy = cache.manifest.asked, "make it again with minillm cache"
    if pair.teacher_card is not None and asked.weights != fingerprint(pair.teacher_card):
        raise CacheError(
            f"{cache.path}: of {cache.manifest.teacher} with weights {asked.weights}, and the run's teacher "
            f"{pair.teacher_card.name} has {fingerprint(pair.teacher_card)}; name that teacher, or {remedy}"
        )
    if asked.template != config.data.template:
        raise CacheError(
            f"{cache.path}: its rows were read with template '{asked.template}', and data.template is "
            f"'{config.data.template}'; set the same, or {remedy}"
        )
    if asked.tokenizer != identity(pair.tokenizer) or asked.real_ids != pair.real_ids:
        raise CacheError(
            f"{cache.path}: its teacher has another tokenizer than student {pair.student_card.name} "
            f"({asked.real_ids:,} and {pair.real_ids:,} ids, or other tokens of the same ids); give a student that "
            "reads the same ids, or a cache of a teacher that does"
        )


def read_anchor(config: RunConfig, *, pair: Pair) -> Anchor | None:
    """The run's corpus, ready for the models; ``None`` where it has none, or no stage with a language-model loss.

    Raises ``DataError`` where it cannot be read, holds nothing to learn, or fewer rows than an update takes;
    ``PositionsExceeded`` where its blocks do not fit; ``UnsupportedCombination`` for a block length without text.
    """
    data = config.data
    if data.corpus is None or not config.anchored:
        return None
    length, cache = _block_length(config, pair), DataCache(data.cache)
    wanted = _wanted(config, locate(data.corpus, CORPUS), pair=pair, name="corpus", need_response=True, corpus=True)
    found: Prepared | PreparedBlocks
    rows: Examples
    if holds_text(wanted):
        found = prepared_blocks(wanted, pair.tokenizer, ends=pair.ids.eos, length=length, cache=cache)
        rows, size = found.blocks, str(found.blocks)
    else:
        if data.corpus_length is not None:
            raise UnsupportedCombination(
                f"data.corpus_length {data.corpus_length} with {data.corpus}, which holds prompts with responses: "
                "nothing is cut; leave it out, or give a corpus of rows with a 'text'"
            )
        found = prepared_prompts(wanted, pair.tokenizer, cache=cache)
        rows, size = found.prompts, f"{counted(len(found.prompts), 'prompt')} with a response"
    for stage in config.anchored:
        if stage.lm_batch > len(rows):
            raise DataError(
                f"{data.corpus}: {size}, and an update of stage {stage.name} takes {stage.lm_batch:,} (lm_batch)\n"
                "  give more text, or set a smaller lm_batch or data.corpus_length"
            )
    words = (*found.words, f"{found.report}; {size}", *([found.place] if found.place else []))
    return Anchor(source=data.corpus, rows=rows, size=size, sha256=found.sha256, words=words)


def _block_length(config: RunConfig, pair: Pair) -> int:
    """Tokens of a block: as the run says, or as many as are usual and fit."""
    readers = {"student": pair.student}
    if pair.teacher is not None and any(stage.lm_teacher_share > 0 for stage in config.anchored):
        readers["teacher"] = pair.teacher
    given = config.data.corpus_length
    if given is None:
        return min(BLOCK_TOKENS, *(facts.positions or BLOCK_TOKENS for facts in readers.values()))
    for what, facts in readers.items():
        facts.require_positions(given, what=what, of="a block of the corpus", lower="data.corpus_length")
    return given


def require_rows(prompts: Sequence[Prompt], *, ranks: int, per_step: int, what: str) -> None:
    """Raise ``DataError`` where a step would leave a rank without a row."""
    if per_step < ranks or not prompts:
        raise DataError(f"{what}: {per_step} rows a step for {ranks} ranks; wanted at least one row for each rank")


def decoding_record(config: DecodingConfig) -> Decoding:
    """The one record that rollouts, validation and evaluation share (design D12)."""
    return Decoding(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        no_repeat_ngram_size=config.no_repeat_ngram_size, repetition_penalty=config.repetition_penalty,
    )  # fmt: skip


def limits_record(config: EvaluationConfig) -> Limits:
    """How much an evaluation draws or reads at once on a rank."""
    return Limits(rows=config.batch, places=config.batch_tokens)
