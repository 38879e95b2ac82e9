"""The student's own text in a stage: fresh or kept, what a run says of it, and what its best weights are kept by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillm import distill
from minillm.config import MinillmStage, RunConfig
from minillm.errors import DataError
from minillm.stage_base import BETTER, OF_PAIRS, KeepConfig
from minillm.teacher_engine import Teacher
from minillm.text_mix import Replay, Written
from minillm.text_stages import GkdStage, ImitkdStage, RklStage, SkewFklStage
from minillm.types import Prompt
from tests import tiny
from tests.unit.test_distillation import BATCH, stage, uids, working
from tests.unit.test_objectives import OPTIMISER, folder, prompts, teacher

__all__ = ["folder", "prompts", "teacher"]  # fixtures


def test_a_late_rise_learns_fresh_text_until_the_buffer_is_full(
    folder: Path, prompts: list[Prompt], teacher: Teacher
) -> None:
    """At a step where the chance of a fresh row is low: a few first rows are not learnt over and over."""
    chosen = stage(SkewFklStage, steps=100, replay=2 * BATCH, validate_every=1, share_step=1.0)
    with working(chosen, folder, prompts, teacher) as work:
        for loss in (1.0, 2.0):
            assert work.objective.collect(90, work.student)[1]["student_rows"] == 0
            work.objective.hear({"loss": loss})
        filling = [work.objective.collect(step, work.student)[1] for step in (95, 96)]
        text, full = work.objective.collect(97, work.student)
    assert [figures["kept_rows"] for figures in filling] == [0, 0]
    assert full["kept_rows"] > BATCH / 2
    # Rows of one batch are different ones of the buffer.
    assert len(set(uids(text))) == BATCH


def test_a_batch_draws_each_kept_response_once_before_any_comes_again() -> None:
    replay = Replay(5)
    replay.add(Written(str(n), (1,), (2,)) for n in range(4))
    assert not replay.full
    replay.add([Written("4", (1,), (2,))])
    assert replay.full
    assert not Replay(0).full
    found = [[row.uid for row in replay.draw(4, f"k{n}")] for n in range(400)]
    assert all(len(set(each)) == 4 for each in found)
    assert found[0] == [row.uid for row in replay.draw(4, "k0")]
    # Every response is as likely at every place.
    for place in range(4):
        at = [each[place] for each in found]
        assert all(at.count(str(n)) / 400 == pytest.approx(0.2, abs=0.08) for n in range(5))
    more = [row.uid for row in replay.draw(12, "more")]
    assert [len(set(more[:5])), len(set(more[5:10])), len(set(more[10:]))] == [5, 5, 2]


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({"student_share": 0.5, "share_step": 0.5, "loss_rise": 3.0}, ["share_step", "loss_rise"]),
        ({"student_share": 0.0, "replay": 7}, ["replay"]),
        ({"student_share": 0.5, "replay": 595}, ["replay"]),
        ({"student_share": 0.5, "replay": 594}, []),
        ({"student_share": None, "validate_every": 49}, []),
        ({"student_share": None, "validate_every": 49, "share_step": 0.5, "loss_rise": 3.0, "replay": 7}, []),
        ({"student_share": None, "validate_every": 50}, ["student_share", "share_step", "loss_rise", "replay"]),
        ({"student_share": None, "validate_every": 100}, ["student_share", "share_step", "loss_rise", "replay"]),
    ],
)
def test_settings_of_whose_text_that_change_nothing_are_told(changes: dict[str, Any], idle: list[str]) -> None:
    told = stage(SkewFklStage, steps=100, **changes).idle_settings(tempered=False)
    assert [name for names in told.values() for name in names] == idle


def test_what_is_told_of_a_buffer_is_so(folder: Path, prompts: list[Prompt], teacher: Teacher) -> None:
    """A buffer of which it is told that it never gives anything back, and one row smaller."""
    kept = {}
    for replay in (2 * BATCH + 1, 2 * BATCH):
        with working(
            stage(SkewFklStage, student_share=1.0, steps=3, replay=replay), folder, prompts, teacher
        ) as work:  # fmt: skip
            figures = [work.objective.collect(step, work.student)[1]["kept_rows"] for step in range(3)]
        kept[replay] = sum(figures)
    assert kept[2 * BATCH + 1] == 0 < kept[2 * BATCH]


def test_a_stage_says_that_its_share_never_left_0(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.save_prompts(tmp_path / "prompts.jsonl")
    data = {"train": str(rows), "validation": str(rows), "validation_limit": 2, "max_prompt_tokens": 8}
    said = {}
    for name, rise in (("flat", 50.0), ("risen", 1e-9)):
        chosen = {
            "kind": "skew_fkl", "steps": 3, "batch": 4, "validate_every": 1, "loss_rise": rise,
            # So large a rate that the loss rises.
            "optimiser": {"lr": 1.0, "schedule": "constant"},
        }  # fmt: skip
        distill(
            tiny.minillm_config(
                tmp_path,
                teacher=folder / "teacher",
                student=folder / "student",
                prompts=rows,
                name=name,
                run_data=data,
                run_stages=(chosen,),
            )
        )
        said[name] = capsys.readouterr().out
    words = (
        "stage skew_fkl: the share of the student's own text never left 0, since the validation loss never rose by 50"
    )
    assert words in said["flat"]
    assert "never left 0" not in said["risen"]


@pytest.mark.parametrize("kind", [ImitkdStage, GkdStage, RklStage, MinillmStage])
def test_each_measure_of_validation_may_decide_on_the_weights(kind: Any) -> None:
    for metric, better in BETTER.items():
        if metric in OF_PAIRS:
            continue
        keep = KeepConfig(metric=metric, mode=better or "max")
        size = {"prompts": 4} if kind is MinillmStage else {"batch": 4}
        assert kind(steps=1, **size, optimiser=OPTIMISER, validate_every=1, keep=keep).keep == keep
    assert kind.model_fields["keep"].default == KeepConfig(metric="reverse_kl")  # cells of studies were made with it


def test_own_text_may_keep_its_best_student_by_the_loss_on_references(folder: Path, tmp_path: Path) -> None:
    rows = tiny.save_prompts(tmp_path / "prompts.jsonl")
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"id": "a", "prompt": "abc"}\n', encoding="utf-8")

    def run(name: str, validation: Path) -> RunConfig:
        chosen = {
            "kind": "imitkd", "steps": 3, "batch": 4, "validate_every": 1, "keep": {"metric": "loss"},
            "optimiser": {"lr": 1.0, "schedule": "constant"},
        }  # fmt: skip
        data = {"train": str(rows), "validation": str(validation), "validation_limit": 2, "max_prompt_tokens": 8}
        return tiny.minillm_config(
            tmp_path, teacher=folder / "teacher", student=folder / "student", prompts=rows, name=name, run_data=data,
            run_stages=(chosen,),
        )  # fmt: skip

    made = distill(run("kept", rows))
    losses = {line["step"]: line["loss"] for line in tiny.logged(made, "validation")}
    state = json.loads((made / "run.json").read_text(encoding="utf-8"))["stages"]["imitkd"]
    assert state["best_step"] == min(losses, key=lambda step: losses[step])
    assert state["best"] == min(losses.values()) < max(losses.values())
    with pytest.raises(DataError, match="keeps its best student by loss"):
        distill(run("bare", bare))
