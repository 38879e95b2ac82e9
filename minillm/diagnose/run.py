"""From a run's configuration to a diagnosis: models, prompts, draws, figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minillm.bare_student import BareStudent
from minillm.config import RunConfig
from minillm.diagnose.gradients import HALVES, Drawn, draw, stage_of_draws
from minillm.diagnose.measure import Budget, Whole, figures_of
from minillm.diagnose.names import REFERENCE, Estimator, chosen, name_of
from minillm.diagnose.scores import Memory
from minillm.errors import ConfigError, DataError, UnsupportedCombination
from minillm.loading import fingerprint, load
from minillm.models import CausalLM
from minillm.order import GlobalOrder
from minillm.pairs import Pair, check_pair
from minillm.preflight import Split, decoding_record, read_split
from minillm.probes import probe_head
from minillm.ranks import Ranks
from minillm.stage_config import MinillmStage
from minillm.stages import load_teacher
from minillm.types import Decoding

LEAST_PROMPTS = 8
"""With fewer, variances between prompts say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is drawn: all choices are measured on the same text."""

    prompts: int = 64
    samples: int = 4
    """Of each prompt, in two halves; even."""
    directions: int = 32
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was asked and what was found."""

    stage: MinillmStage
    sizes: Sizes
    budget: Budget
    """Of one update of the run."""
    left_out: tuple[str, ...]
    drawn: Drawn
    whole: Whole
    decoding: Decoding
    made_from: dict[str, str]
    """Names the weights and prompts: with settings and sizes, what two diagnoses of equal figures have in common."""


def diagnose(
    config: RunConfig,
    *,
    names: Sequence[str],
    sizes: Sizes,
    say: Callable[[str], None] = lambda line: None,
    split: Split | None = None,
    memory: Memory | None = None,
) -> Diagnosis:
    """Measures the choices of credit of these names on a run's teacher, student and training prompts.

    The student is the one the run would start from, whole on every rank. All ranks of a launcher must call it; ``say``
    hears progress, on the first of them. Of several teachers of one student, ``split`` are the training prompts where
    they are read already, and one ``memory`` spares all but the first most of the work. Raises what ``distill`` raises
    before any model is loaded, and ``ConfigError`` for a configuration without a minillm stage, an unknown name or
    sizes that cannot be.
    """
    stage = _first_minillm(config)
    _check_sizes(sizes)
    _require_whole(config)
    if config.decoding.max_new_tokens < 2:
        raise ConfigError("decoding.max_new_tokens 1: a response of one token has nothing ahead of it to measure")
    drawing = stage_of_draws(stage, prompts=sizes.prompts, samples=sizes.samples // HALVES)
    estimators, left_out = chosen([*names, name_of(stage)], drawing)
    pair = check_pair(config)
    assert config.data.train is not None
    if split is None:
        split = read_split(config, config.data.train, pair=pair, name="train", need_response=False)
    if len(split.prompts) < sizes.prompts:
        raise DataError(
            f"{split.source}: {len(split.prompts)} prompts, and --prompts wants {sizes.prompts}; give it fewer"
        )
    budget = Budget(prompts=stage.prompts / stage.inner_batches, samples=stage.samples_per_prompt)
    ranks = Ranks(threads=config.threads)
    tell = say if ranks.first else lambda line: None
    if stage.published.named() or stage.repetition_weight > 0 or stage.lm_coefficient > 0 or stage.anchor is not None:
        left_out.append("left out of this: published.*, the cost of repetition, the language-model loss, the anchor")
    if config.engine.activation_checkpointing:
        tell("no effect here: engine.activation_checkpointing (nothing is kept for a backward pass: there is none)")
    for line in (*split.words, *left_out):
        tell(line)
    decoding = decoding_record(config.decoding)
    order = GlobalOrder(len(split.prompts), sizes.seed, "diagnose")
    student = _student(config, pair, ranks)
    teacher = load_teacher(pair, ranks=ranks, say=tell)
    try:
        drawn = draw(
            drawing, estimators, prompts=[split.prompts[row] for row in order.take(0, sizes.prompts)],
            decoding=decoding, student=student, teacher=teacher, ids=pair.ids, ranks=ranks,
            directions=sizes.directions, seed=sizes.seed, memory=memory,
            told=lambda half: tell(f"half {half + 1} of {HALVES} drawn and differentiated"),
        )  # fmt: skip
    finally:
        teacher.close()
    return Diagnosis(
        stage=stage, sizes=sizes, budget=budget, left_out=tuple(left_out), drawn=drawn,
        whole=_whole(drawn, estimators, budget=budget, seed=sizes.seed), decoding=decoding,
        made_from=made_from(pair, split, seed=config.seed),
    )  # fmt: skip


def made_from(pair: Pair, split: Split, *, seed: int) -> dict[str, str]:
    """Fingerprints of both models and of the prompts, as a diagnosis of them has them; ``seed`` is the student's."""
    cards = {"student": (pair.student_card, seed), "teacher": (pair.teacher_card, 0)}
    weights = {name: fingerprint(card, seed=own) for name, (card, own) in cards.items() if card is not None}
    return {**weights, "train prompts": split.sha256}


def _whole(drawn: Drawn, estimators: Sequence[Estimator], *, budget: Budget, seed: int) -> Whole:
    reference = next(each.stage for each in estimators if each.name == REFERENCE)
    return figures_of(
        drawn.lots,
        drawn.single,
        reference=REFERENCE,
        twins={each.name: each.twin for each in estimators},
        keeps={each.name: each.keeps_expectation(reference) for each in estimators},
        budget=budget,
        tokens_per_sample=drawn.tokens / drawn.samples,
        seed=seed,
    )


def _first_minillm(config: RunConfig) -> MinillmStage:
    for stage in config.trained:
        if isinstance(stage, MinillmStage):
            return stage
    raise ConfigError("the configuration has no stage of kind minillm, whose gradient would be measured")


def _check_sizes(sizes: Sizes) -> None:
    if sizes.prompts < LEAST_PROMPTS:
        raise ConfigError(f"--prompts {sizes.prompts}: wanted at least {LEAST_PROMPTS}")
    if sizes.samples < HALVES or sizes.samples % HALVES:
        raise ConfigError(f"--samples {sizes.samples}: wanted an even number, since each prompt has two halves")


def _require_whole(config: RunConfig) -> None:
    if config.adapter is not None:
        setting = config.adapter.SECTION
        raise UnsupportedCombination(
            f"{setting}: diagnose measures the gradient by all weights, and a run with {setting} has only that of its "
            f"adapter; give {setting}=null, and a student's folder (student=RUN/student)"
        )


def _student(config: RunConfig, pair: Pair, ranks: Ranks) -> BareStudent:
    model = load(pair.student_card, pair.student, seed=config.seed, dtype=torch.float32)
    root = CausalLM(model.to(ranks.device).eval())  # type: ignore[arg-type]
    root.head.real_ids = pair.real_ids
    probe_head(model, root)
    student = BareStudent(root, ranks=ranks)
    root.packs = "no"  # rows are differentiated one below the other, not end to end
    return student
