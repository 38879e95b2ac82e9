"""A student and its teacher, proved to fit: what can be found wrong with models and engines before any weight is
read."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedTokenizerBase

from minillm.adaptation import adaptation_of
from minillm.cards import Card, load_card
from minillm.config import RunConfig
from minillm.engine_settings import read_engine_settings, read_teacher_settings, zero_stage
from minillm.errors import ConfigError, ModelError, UnsupportedCombination
from minillm.loading import ModelFacts, inspect, names_a_folder
from minillm.recompute import require_layers
from minillm.types import Ids
from minillm.vocabulary import agree, agree_on_chat, check_heads, eos_ids, real_ids


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


def check_pair(config: RunConfig, *, student: str | None = None) -> Pair:
    """Cards, configurations and tokenizers of the run's models (``student`` stands in for the run's own, for an
    evaluation; where its card would shard it to teach, it is read whole).

    Raises ``ConfigError`` for an unknown card, ``ModelError`` for a folder that cannot be read safely,
    ``PositionsExceeded`` where prompt and response do not fit, ``VocabularyMismatch`` where the tokenizers differ.
    """
    student_card, teacher_card = _checked_cards(config, student=student)
    student_facts = inspect(student_card)
    if config.adapter is not None and student is None:
        _check_base(student_card, setting=config.adapter.SECTION)
        adaptation_of(config.adapter).require(student_facts.config)
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


def check_at_hand(config: RunConfig, *, student: str | None = None, made: Collection[str] = ()) -> set[str]:
    """``check_pair`` as far as it goes without fetching anything; the models that are not on this machine.

    Those of the roles in ``made`` (``student``, ``teacher``) are going to be made, and are not looked at either.
    """
    cards = dict(zip(("student", "teacher"), _checked_cards(config, student=student), strict=True))
    wanted = {role: card for role, card in cards.items() if card is not None and role not in made}
    away = {f"{role} {card.model or card.name}" for role, card in wanted.items() if not _at_hand(card)}
    if not away and not made:
        check_pair(config, student=student)
    else:
        for card in filter(_at_hand, wanted.values()):
            inspect(card)
    return away


def _at_hand(card: Card) -> bool:
    """Whether what is read of a model before its weights is here, or ought to be: a path is never of the hub."""
    name = card.build.tokenizer if card.build is not None else str(card.model)
    here = Path(name).exists() or names_a_folder(name) or (card.build is not None and name == "world")
    try:
        return here or isinstance(try_to_load_from_cache(name, "config.json", revision=card.revision), str)
    except HFValidationError:  # no name of a model at all, as reading it tells
        return True


def _checked_cards(config: RunConfig, *, student: str | None) -> tuple[Card, Card | None]:
    """The cards of both models, once they and the settings pass all that needs no file of a model."""
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
            "a student's weights live is engine.student's to say (zero0 to zero3-offload); take it out of the card"
        )
    if student_card.quantise is not None:
        raise UnsupportedCombination(
            f"student {student_card.name}: quantise is a teacher's setting: what is trained and measured is not in "
            "8 bits; take it out of the card"
        )
    if teacher_card is not None:
        _check_teacher(teacher_card)
    return student_card, teacher_card


def check_alone(config: RunConfig, model: str) -> Pair:
    """One model that answers for itself, as both halves of a pair: its own tokenizer decides, not the run's.

    Text has no ids, so it may teach a student with another vocabulary. Raises as ``check_pair`` does.
    """
    pair = check_frozen(model)
    pair.student.require_positions(config.data.max_prompt_tokens + config.decoding.max_new_tokens, what="model")
    return pair


def check_frozen(model: str) -> Pair:
    """``check_alone`` of a model that reads what is there already, however long that turns out to be."""
    card = load_card(model, kind="teachers")
    _check_teacher(card, role="model")
    facts = inspect(card)
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
    read_teacher_settings(card.placement)
    if card.sharded and card.dtype == "float64":
        raise UnsupportedCombination(
            f"{role} {card.name}: placement {card.placement} with dtype float64: DeepSpeed shards "
            "float32 and bfloat16 only; set dtype: float32, or placement: replicated"
        )


def _check_base(card: Card, *, setting: str) -> None:
    """Raise where a student with this card cannot be the frozen base of an adapter."""
    changed = {"build": card.build, "adapter": card.adapter, "layers": card.layers}
    for name in (name for name, value in changed.items() if value is not None):
        raise UnsupportedCombination(
            f"student {card.name}: {setting} with a card that has {name!r}: the adapter would be on weights that stand "
            "in no folder, where nobody else could put it on again; train such a student in whole first, or write it "
            "as a folder (minillm merge-adapter), and name that"
        )


def _check_sampling(config: RunConfig) -> None:
    """Raise where a stage that learns from its own samples would draw from other logits than it learns with."""
    penalty = config.decoding.repetition_penalty
    own = [stage.name for stage in config.trained if stage.on_policy]
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
    if stage > 0 and any(each.optimiser.name == "muon" for each in config.trained):
        raise UnsupportedCombination(
            f"engine.student {name!r} is ZeRO stage {stage}, which cuts matrices into shards, and muon needs them "
            "whole; set engine.student: zero0, or optimiser.name: adamw"
        )
