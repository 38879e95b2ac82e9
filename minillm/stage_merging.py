"""A stage that trains nothing: the students of several stages become one, where a stage hands its own on."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from minillm import phases
from minillm.config import AnyStage, MergeStage, RunConfig, dump_config
from minillm.loading import load
from minillm.merge_models import merge_folders
from minillm.models import CausalLM
from minillm.moments import Progressed
from minillm.pairs import Pair
from minillm.preflight import decoding_record
from minillm.publish import publish_student, weights_sha256
from minillm.ranks import Ranks
from minillm.stage_base import OWN_START
from minillm.store import Clock, RunFolder


def run_merge(
    config: RunConfig, stage: MergeStage, *, pair: Pair, place: Callable[[AnyStage], Path], folder: RunFolder,
    ranks: Ranks, say: Callable[[str], None],
) -> Progressed:  # fmt: skip
    """Merges students that started from one, and logs how far apart they went (degrees by layer group and pair, and
    their median); ``place`` says where a stage hands its student on.

    Rank 0 reads and writes, piece by piece; the others wait. Nothing of it stands in a checkpoint: it follows from the
    folders alone, so a run that goes on makes the same bits again.
    """
    begun, of = config.source(stage), {each.name: place(each) for each in config.stages}
    words = f"Merged by stage `{stage.name}` of this run:\n\n```yaml\n{dump_config(config).rstrip()}\n```"

    def merge() -> Progressed:
        clock, into = Clock(), place(stage)
        start = _own_start(config, pair, folder.student_of(OWN_START)) if begun is None else place(begun)
        report = merge_folders(
            start, [of[name] for name in stage.of], into=into, method=stage.method, weights=stage.weights,
            eta=stage.eta, known_start=True, say=say, card_words=words, fresh=True,
        )  # fmt: skip
        done = Progressed(published=weights_sha256(into), seconds=clock(), over=True)
        folder.log(
            {
                "kind": "merge", "stage": stage.name, "step": 0, "update": 0, "seconds": round(done.seconds, 3),
                "method": stage.method, "eta": stage.eta,
                **({"angle": statistics.median(report.angles)} if report.angles else {}),
                "angles": {group.name: list(group.angles) for group in report.groups},
            }
        )  # fmt: skip
        return done

    phases.enter("merging")
    return ranks.of_first(merge)


def _own_start(config: RunConfig, pair: Pair, folder: Path) -> Path:
    """The run's own student as stages hand theirs on: what it is made from may be built, fetched, of another type, or
    have rows that no student has. Stands beside those of the stages, none of which has its name (``check_starts``)."""
    model = load(pair.student_card, pair.student, seed=config.seed, dtype=torch.float32)
    if config.engine.precision == "bf16":
        model = model.to(torch.bfloat16)  # type: ignore[arg-type]
    root = CausalLM(model)
    publish_student(
        folder,
        state={name: weight.detach() for name, weight in root.named_parameters(remove_duplicate=False)},
        config=model.config,
        tokenizer=pair.tokenizer,
        real_ids=pair.real_ids,
        decoding=decoding_record(config.decoding),
        eos_ids=pair.ids.eos,
        pad_id=pair.ids.pad,
        card=f"`{pair.student_card.name}`, from which the run `{config.name}` starts; nothing was trained.\n",
    )
    return folder
