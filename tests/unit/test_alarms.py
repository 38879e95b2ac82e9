"""Alarms: when each rings, what it says, what the loop does then, and that a collapsing run is caught in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm import cli, distill
from minillm.alarm_config import AlarmConfig, AlarmsConfig
from minillm.alarms import WATCHES, WINDOW, Alarms
from minillm.config import dump_config
from minillm.errors import Alarmed, ConfigError, UnsupportedCombination
from minillm.rollout_figures import _leaks
from minillm.store import RunFolder
from minillm.types import Targets
from tests import tiny

WELL = {
    "reverse_kl": 2.0, "entropy": 1.0, "mean_length": 20.0, "cut_share": 0.1, "teacher_mass": 0.5,
    "repeated_tokens": 0.2, "importance_ess": 0.9, "clipped_share": 0.1, "clamped_share": 0.0, "padding_leak": 0.0,
}  # fmt: skip
ILL = {
    "reverse_kl": 5.1, "entropy": 0.19, "short": 5.9, "long": 60.1, "cut_share": 0.96, "repetition": 0.41,
    "teacher_mass": 0.009, "importance_ess": 0.09, "clipped_share": 0.61, "clamped_share": 0.011, "padding_leak": 1.0,
}  # fmt: skip
"""A value of its figure just past each alarm's default limit, beside the figures above."""


def hear(alarms: Alarms, *, times: int = WINDOW, **figures: float) -> list[str]:
    return [one.name for _ in range(times) for one in alarms.hear({**WELL, **figures})]


def test_every_setting_has_a_watch_and_none_rings_while_all_is_well() -> None:
    assert set(WATCHES) == set(AlarmsConfig.model_fields) == set(ILL)
    assert hear(Alarms(AlarmsConfig()), times=20) == []


@pytest.mark.parametrize("name", list(WATCHES))
def test_each_alarm_rings_past_its_limit_and_alone(name: str) -> None:
    """And not a little before it: the negative control."""
    watch, value = WATCHES[name], ILL[name]
    inside = value * (0.9 if watch.kind.startswith("above") else 1.2) if name != "padding_leak" else 0.0
    for figure, want in ((value, [name]), (inside, [])):
        alarms = Alarms(AlarmsConfig())
        hear(alarms)
        assert hear(alarms, **{watch.figure: figure}) == want


def test_what_a_setting_leaves_out_is_the_alarms_own() -> None:
    alarms = AlarmsConfig(padding_leak={"limit": 0}, short={"action": "stop"})  # type: ignore[arg-type]
    assert alarms.padding_leak is not None and alarms.padding_leak.action == "stop"
    assert alarms.short is not None and alarms.short.limit == 0.3
    assert AlarmsConfig(**alarms.model_dump()) == alarms


def test_alarms_that_would_ring_at_every_length_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"short\.limit 3 with long\.limit 3: every length would ring"):
        AlarmsConfig(short={"limit": 3.0})  # type: ignore[arg-type]
    AlarmsConfig(short={"limit": 3.0}, long=None)  # type: ignore[arg-type]


def test_a_limit_that_no_share_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cut_share\.limit: got 2, wanted a share"):
        AlarmsConfig(cut_share={"limit": 2})  # type: ignore[arg-type]


def test_repetition_is_held_against_the_teachers_own() -> None:
    """A teacher that repeats itself more, or less, than the student at its start moves the limit; later lines, which
    do not tell of the teacher, do not."""
    for level, rings in ((0.3, []), (0.05, ["repetition"])):
        alarms = Alarms(AlarmsConfig())
        hear(alarms, times=1, teacher_repeated_tokens=level)
        assert hear(alarms, times=2 * WINDOW, repeated_tokens=0.41 if level == 0.3 else 0.3) == rings


def test_one_bad_rollout_is_no_trend() -> None:
    alarms = Alarms(AlarmsConfig())
    hear(alarms)
    assert hear(alarms, times=1, entropy=0.0) == [] == hear(alarms)


def test_an_alarm_is_told_once_until_it_has_been_silent() -> None:
    alarms = Alarms(AlarmsConfig())
    hear(alarms)
    assert hear(alarms, times=4 * WINDOW, cut_share=1.0) == ["cut_share"]
    assert hear(alarms, times=2 * WINDOW) == []
    assert hear(alarms, times=2 * WINDOW, cut_share=1.0) == ["cut_share"]


def test_a_figure_that_is_no_number_rings() -> None:
    alarms = Alarms(AlarmsConfig())
    hear(alarms)
    assert "reverse_kl" in hear(alarms, times=1, reverse_kl=float("nan"))


def test_an_alarm_that_is_off_or_has_another_limit() -> None:
    off = Alarms(AlarmsConfig(cut_share=None, entropy=AlarmConfig(limit=0.9, action="stop")))
    hear(off)
    (raised,) = [one for _ in range(WINDOW) for one in off.hear({**WELL, "cut_share": 1.0, "entropy": 0.8})]
    assert (raised.name, raised.action) == ("entropy", "stop")
    assert "0.9 times the 1 it began with" in raised.words and "optimiser.lr" in raised.words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("alarms")
    tiny.save_model(made / "teacher", "gpt2", seed=1)
    near = AutoModelForCausalLM.from_pretrained(tiny.save_model(made / "student", "gpt2", seed=1))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a student that has learnt: near its teacher
        for parameter in near.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=noise))
    near.save_pretrained(made / "student")
    tiny.save_prompts(made / "prompts.jsonl")
    return made


def config(folder: Path, name: str, **changes: Any) -> Any:
    prompts = str(folder / "prompts.jsonl")
    return tiny.minillm_config(
        folder, teacher=folder / "teacher", student=folder / "student", prompts=folder / "prompts.jsonl", name=name,
        run_data={"train": prompts, "validation": prompts, "max_prompt_tokens": 8, "validation_limit": 4}, **changes,
    )  # fmt: skip


COLLAPSE: dict[str, Any] = {
    "steps": 100, "teacher_mix": 0.0, "long_weight": 0.0,
    "optimiser": {"lr": 0.3, "schedule": "constant", "clip_grad": 0},
}  # fmt: skip
"""A rate at which a tiny student is wrecked at once."""


def acting(action: str) -> dict[str, Any]:
    """The alarms of a collapse with their default limits and this action."""
    usual = AlarmsConfig().model_dump()
    return {name: {**usual[name], "action": action} for name in ("entropy", "reverse_kl", "teacher_mass", "short")}


def test_a_wrecked_run_is_stopped_within_a_tenth_of_its_budget(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(folder, "wrecked", **COLLAPSE, alarms=acting("stop"))
    (folder / "wrecked.yaml").write_text(dump_config(run), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["minillm", "distill", "--config", str(folder / "wrecked.yaml")])
        assert cli._guarded(cli.app) == Alarmed.exit_code == 4
    assert "an alarm rang whose action is stop" in capsys.readouterr().err
    rung = tiny.logged(folder / "wrecked", "alarm")
    (stop, *_) = [line for line in rung if line["action"] == "stop"]
    assert stop["step"] <= 10 and stop["words"] and rung[-1]["step"] == stop["step"]


def test_a_healthy_run_rings_nothing(folder: Path) -> None:
    """Negative control: the same at a rate that suits it."""
    distill(config(folder, "healthy", **{**COLLAPSE, "steps": 12, "optimiser": {"lr": 1e-3, "schedule": "constant"}}))
    assert tiny.logged(folder / "healthy", "alarm") == []
    assert all(line["padding_leak"] == 0 and 0 < line["teacher_mass"] < 1 for line in tiny.logged(folder / "healthy"))


def test_a_rollback_hands_on_the_best_student(folder: Path) -> None:
    run = distill(config(folder, "back", **{**COLLAPSE, "steps": 40}, validate_every=1, alarms=acting("rollback")))
    status = RunFolder(run, writes=False).status()["stages"]["minillm"]
    assert status["stopped_early"] and status["step"] < 40 and status["best_step"] < status["step"]
    assert (run / "student" / "model.safetensors").is_file()


def test_a_rollback_without_validation_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedCombination, match="validate_every"):
        config(folder, "no", alarms={"entropy": {"limit": 0.2, "action": "rollback"}})


def test_credit_on_padding_is_counted(folder: Path) -> None:
    mask_BT = torch.tensor([[True, False]])
    ones_BT = torch.tensor([[1.0, 0.0]])

    class Of:
        def __init__(self, **values: Any) -> None:
            self.__dict__.update(values)

    scored = Of(rollout=Of(mask_BT=mask_BT), logq_BT=ones_BT, logp_BT=ones_BT, reverse_kl_BT=ones_BT)
    clean: Targets = Of(scored=scored, advantage_BT=ones_BT, importance_BT=ones_BT)  # type: ignore[assignment]
    leaky: Targets = Of(scored=scored, advantage_BT=ones_BT + 1, importance_BT=ones_BT)  # type: ignore[assignment]
    assert (int(_leaks(clean)), int(_leaks(leaky))) == (0, 1)
