"""Everything that can be found wrong before any weight is read: cards, tokenizers, positions, vocabularies, prompt
files."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from minillm.cards import Card, load_card
from minillm.config import DecodingConfig, EvaluationConfig, RunConfig
from minillm.data_cache import DataCache
from minillm.engine_settings import read_engine_settings, zero_stage
from minillm.errors import CacheError, ConfigError, DataError, ManifestError, ModelError, UnsupportedCombination
from minillm.generated import read_generated
from minillm.loading import ModelFacts, fingerprint, inspect
from minillm.lora import require_targets
from minillm.lora_config import LoraConfig
from minillm.micro_batches import Limits
from minillm.prepared import Prepared, PreparedBlocks, Wanted, holds_text, prepared_blocks, prepared_prompts
from minillm.prompt_table import answered
from minillm.recompute import require_layers
from minillm.row_sources import CORPUS, PROMPTS, Source, files_of, locate
from minillm.rows import counted, read_rows
from minillm.slots import require_values
from minillm.teacher_cache import TeacherCache, read_cache
from minillm.templates import raw_text
from minillm.text_stages import KdStage
from minillm.types import Decoding, Examples, Ids, Prompt
from minillm.vocabulary import agree, agree_on_chat, check_heads, eos_ids, identity, real_ids

BLOCK_TOKENS = 512
"""Of a corpus's text, where the run says nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A student and, where the run has one, its teacher, proved to read the same ids."""

    student_card: Card
    student: ModelFacts
    teacher_card: Card | None
    teacher: ModelFacts | None
    real_ids: int
    """Ids 0 .. real_ids - 1 mean something; rows of either head beyond them are masked (design D9)."""
    ids: Ids

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer; the teacher's agrees with it id by id."""
        return self.student.tokenizer


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


def check_pair(config: RunConfig, *, student: str | None = None) -> Pair:
    """Cards, configurations and tokenizers of the run's models (``student`` stands in for the run's own, for an
    evaluation; where its card would shard it to teach, it is read whole).

    Raises ``ConfigError`` for an unknown card, ``ModelError`` for a folder that cannot be read safely,
    ``PositionsExceeded`` where prompt and response do not fit, ``VocabularyMismatch`` where the tokenizers differ.
    """
    if student is None:
        _check_sampling(config)
    _check_engine(config)
    student_card = load_card(student or config.student, kind="students")
    teacher_card = None if config.teacher is None else load_card(config.teacher, kind="teachers")
    if student is not None:
        student_card = student_card.model_copy(update={"placement": "replicated"})
    if student_card.placement != "replicated":
        raise UnsupportedCombination(
            f"student {student_card.name}: placement {student_card.placement!r} is a teacher's setting; where "
            "a student's weights live is engine.student's to say (zero0 to zero3); take it out of the card"
        )
    if student_card.quantise is not None:
        raise UnsupportedCombination(
            f"student {student_card.name}: quantise is a teacher's setting: what is trained and measured is not in "
            "8 bits; take it out of the card"
        )
    if teacher_card is not None:
        _check_teacher(teacher_card)
    student_facts = inspect(student_card)
    if config.lora is not None and student is None:
        _check_lora(config.lora, student_card, student_facts)
    if student is None and config.engine.activation_checkpointing:
        require_layers(student_facts.config, name=student_card.name)
    teacher_facts = None if teacher_card is None else inspect(teacher_card)
    longest = config.data.max_prompt_tokens + config.decoding.max_new_tokens
    student_facts.require_positions(longest, what="student")
    real = real_ids(student_facts.tokenizer)
    if teacher_facts is not None:
        teacher_facts.require_positions(longest, what="teacher")
        real = agree(teacher_facts.tokenizer, student_facts.tokenizer)
        if config.data.template == "chat":
            agree_on_chat(teacher_facts.tokenizer, student_facts.tokenizer)
    student_rows = student_facts.config.vocab_size
    check_heads(
        real_ids=real,
        teacher_rows=student_rows if teacher_facts is None else teacher_facts.config.vocab_size,
        student_rows=student_rows,
    )
    return Pair(
        student_card=student_card,
        student=student_facts,
        teacher_card=teacher_card,
        teacher=teacher_facts,
        real_ids=real,
        ids=_special_ids(student_facts),
    )


def check_alone(config: RunConfig, model: str) -> Pair:
    """One model that answers for itself, as both halves of a pair: its own tokenizer decides, not the run's.

    Text has no ids, so it may teach a student with another vocabulary. Raises as ``check_pair`` does.
    """
    card = load_card(model, kind="teachers")
    _check_teacher(card, role="model")
    facts = inspect(card)
    facts.require_positions(config.data.max_prompt_tokens + config.decoding.max_new_tokens, what="model")
    real, rows = real_ids(facts.tokenizer), facts.config.vocab_size
    check_heads(real_ids=real, teacher_rows=rows, student_rows=rows)
    return Pair(
        student_card=card, student=facts, teacher_card=card, teacher=facts, real_ids=real, ids=_special_ids(facts)
    )


def _special_ids(facts: ModelFacts) -> Ids:
    eos = eos_ids(facts.tokenizer, facts.generation)
    pad = facts.tokenizer.pad_token_id
    return Ids(eos=eos, pad=eos[0] if pad is None else pad)


def _check_teacher(card: Card, *, role: str = "teacher") -> None:
    """Raise where a model with this card cannot teach."""
    if card.placement == "tp":
        raise UnsupportedCombination(
            f"{role} {card.name}: placement tp (tensor parallel) is refused: ranks read different rows, so each would "
            "read the rows of all of them, with a cache for all (docs/placement.md).\n"
            "  set placement: zero3, or offload where the shards do not fit beside the student"
        )
    if card.build is not None:
        raise ModelError(
            f"{role} {card.name}: its card builds a model with random weights, which has nothing to teach.\n"
            "  give a card with 'model', a model folder or a hub name"
        )
    if card.placement != "replicated" and not card.as_in_files:
        what = "adapter" if card.adapter is not None else "layers"
        remedy = (
            f"write the merged model: minillm merge-adapter {card.model} {card.adapter} --out FOLDER, and name that"
            if card.adapter is not None
            else "write a folder of those layers and name it"
        )
        raise UnsupportedCombination(
            f"{role} {card.name}: placement {card.placement!r} with {what!r}, which changes weights that are whole; "
            f"{remedy}; or set placement: replicated"
        )
    if card.quantise is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{role} {card.name}: quantise: {card.quantise} wants the package bitsandbytes, which is not installed\n"
            "  pip install 'minillm[quantised]', or leave quantise out"
        )
    if card.sharded and card.dtype == "float64":
        raise UnsupportedCombination(
            f"{role} {card.name}: placement {card.placement} with dtype float64: DeepSpeed shards "
            "float32 and bfloat16 only; set dtype: float32, or placement: replicated"
        )


def _check_lora(settings: LoraConfig, card: Card, facts: ModelFacts) -> None:
    """Raise where a student with this card cannot be the frozen base of an adapter."""
    changed = {"build": card.build, "adapter": card.adapter, "layers": card.layers}
    for name in (name for name, value in changed.items() if value is not None):
        raise UnsupportedCombination(
            f"student {card.name}: lora with a card that has {name!r}: the adapter would be on weights that stand in "
            "no folder, where nobody else could put it on again; train such a student in whole first, or write it as a "
            "folder (minillm merge-adapter), and name that"
        )
    require_targets(facts.config, settings)


def _check_sampling(config: RunConfig) -> None:
    """Raise where a stage that learns from its own samples would draw from other logits than it learns with."""
    penalty = config.decoding.repetition_penalty
    own = [stage.name for stage in config.stages if stage.on_policy]
    if penalty != 1.0 and own:
        raise UnsupportedCombination(
            f"decoding.repetition_penalty {penalty:g} with stage '{own[0]}', which learns from text that it draws: the "
            "penalty changes logits by what stands in a row, so the student that learns would not be the one that "
            "sampled; leave it at 1 for training and give it to 'minillm evaluate' "
            f"(decoding.repetition_penalty={penalty:g}), or use no_repeat_ngram_size, repetition_weight or both"
        )


def _check_engine(config: RunConfig) -> None:
    """Raise where the student's engine settings cannot be read or exclude another setting of the run."""
    name = config.engine.student
    stage = zero_stage(read_engine_settings(name))
    if stage == 0 and config.engine.precision == "bf16":
        raise UnsupportedCombination(
            f"engine.student {name!r} (ZeRO stage 0) with engine.precision bf16: there DeepSpeed's optimiser makes a "
            "step of its own before the first; set engine.student: zero1, zero2 or zero3"
        )
    if stage < 3 and config.engine.gather == "forward":
        raise UnsupportedCombination(
            f"engine.gather: forward with engine.student {name!r} (ZeRO stage {stage}): there every rank has the whole "
            "student, and nothing is gathered; set engine.gather: rollout, or engine.student: zero3"
        )
    if config.engine.gather == "forward" and config.evaluation.calibration:
        raise UnsupportedCombination(
            "engine.gather: forward with evaluation.calibration: that reads a different number of pieces on each rank; "
            "set evaluation.calibration: false, and measure it by 'minillm evaluate' where a rank holds the student"
        )
    if stage > 0 and any(each.optimiser.name == "muon" for each in config.stages):
        raise UnsupportedCombination(
            f"engine.student {name!r} is ZeRO stage {stage}, which cuts matrices into shards, and muon needs them "
            "whole; set engine.student: zero0, or optimiser.name: adamw"
        )


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
    for setting, held_out in _held_out(config).items():
        if _same_source(manifest.asked.source, held_out):
            raise DataError(
                f"{source}: answers the prompts of data.{setting} ({held_out}), which are held out; "
                "let the teacher answer others (minillm generate --split train)"
            )
    split = read_split(config, source, pair=pair, name="teacher text", need_response=True)
    told = f"teacher text: {manifest.counts.written:,} responses of {manifest.model} to {manifest.asked.source}"
    return dataclasses.replace(split, words=(told, *split.words))


def _held_out(config: RunConfig) -> dict[str, str]:
    """Sources that no stage may learn from, by the setting in ``data`` that names them: those that are not data.train
    too."""
    sets = {f"test.{name}".rstrip("."): source for name, source in config.data.test_sets.items()}
    found = sets if config.data.validation is None else {"validation": config.data.validation, **sets}
    train = config.data.train
    return {name: source for name, source in found.items() if train is None or not _same_source(source, train)}


def _same_source(one: str, other: str) -> bool:
    """Whether two names are of one source, or have a file in common, by whatever paths."""
    files = [{(at.st_dev, at.st_ino) for at in map(Path.stat, files_of(source))} for source in (one, other)]
    return one == other or not files[0].isdisjoint(files[1])


def read_teacher_caches(config: RunConfig, *, pair: Pair, splits: Mapping[str, Split]) -> dict[str, TeacherCache]:
    """The caches that kd stages learn from, by stage, proved to be of this run's rows, and of its teacher if it names
    one.

    Raises ``DataError``, or its child ``CacheError``, where one is missing, was edited, or was made with another
    teacher, tokenizer, template or data.
    """
    caches = {}
    for stage in config.stages:
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
