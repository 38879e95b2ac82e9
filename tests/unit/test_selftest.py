"""``minillm selftest`` passes here, in less than a minute, and no check of it is idle.

1. Every check has a negative control: with something broken in the library that it guards, that very check fails.
2. A figure above its limit, one that is no number, and an error each count as a failure; the others still run.
3. Exit code 1 when a check fails; a file that cannot be written is refused before any check runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from minillm import cli, credit, divergences, exits
from minillm.scoring import HeadWeights
from minillm.selftest import run
from minillm.selftest.check import Check, Found, differing, gap, relative, rough, worst
from minillm.selftest.record import FIELDS

BY_NAME = {check.name: check for check in run.CHECKS}


class Finished(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float


Command = Callable[..., Finished]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def selftest(*words: str) -> Finished:
        capsys.readouterr()
        start = time.monotonic()
        code = cli._guarded(lambda **options: cli.app(["selftest", *words], **options))
        return Finished(code, *capsys.readouterr(), time.monotonic() - start)

    return selftest


def test_all_checks_pass_in_less_than_a_minute_and_are_written_down(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "selftest.json"
    found = command("--json", str(file))
    assert found.code == 0, found.out
    assert found.seconds < 60
    lines = found.out.splitlines()
    assert lines[0].startswith("minillm ") and f"torch {torch.__version__}" in lines[0]
    assert lines[1] == f"device cpu, default dtype float32, threads {torch.get_num_threads()}"
    assert [line.split("  ")[0] for line in lines[2:-1]] == list(BY_NAME)
    assert all("  ok      " in line and "at most" in line for line in lines[2:-1])
    assert lines[-1].startswith(f"{len(BY_NAME)} of {len(BY_NAME)} checks passed in ")
    written = json.loads(file.read_text(encoding="utf-8"))
    assert tuple(written) == FIELDS == ("passed", "failed", "versions", "checks")
    assert (written["passed"], written["failed"]) == (len(BY_NAME), 0)
    assert set(written["versions"]) == {"minillm", "python", "torch", "transformers", "deepspeed"}
    for check in written["checks"]:
        assert list(check) == ["name", "ok", "figure", "limit", "seconds"]
        assert check["ok"] is True and check["figure"] <= check["limit"]


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(run.CHECKS) > 50


Wrap = Callable[[Any], Any]


def times(factor: float) -> Wrap:
    return lambda plain: lambda *a, **k: factor * plain(*a, **k)


def plus(term: float) -> Wrap:
    return lambda plain: lambda *a, **k: plain(*a, **k) + term


def told(**instead: Any) -> Wrap:
    """The same function, told something else."""
    return lambda plain: lambda *a, **k: plain(*a, **{**k, **instead})


def untold(*names: str) -> Wrap:
    """The same function, not told something."""
    return lambda plain: lambda *a, **k: plain(*a, **{name: k[name] for name in k.keys() - set(names)})


def becomes(function: Any) -> Wrap:
    return lambda plain: function


def clip_on_weight(plain: Any) -> Any:
    """The paper's Algorithm 1: the clip acts on q_new / m."""
    return lambda new, old, *, importance, **k: plain(
        new + importance.log(), old, importance=torch.ones_like(importance), **k
    )


def scaled_to_unit_spread(plain: Any) -> Any:
    return lambda *a, **k: plain(*a, **k) / plain(*a, **k).std()


def without_the_mean(plain: Any) -> Any:
    return lambda *a, **k: plain(*a, **k) - plain(*a, **k).mean()


def cut_one_row_late(head: Any) -> HeadWeights:
    """A head that leaves out its first row, and takes the first one past the real ids."""
    rows = slice(1, head.real_ids + 1)
    return HeadWeights(weight_VH=head.weight[rows], bias_V=head.bias[rows], scale=head.scale, softcap=head.softcap)


def with_the_teacher_in_the_loss(plain: Any) -> Any:
    def token_loss(hidden_NH: Tensor, *, task: Any, **k: Any) -> Any:
        loss, numbers = plain(hidden_NH, task=task, **k)
        return loss + task.teacher.hidden_NH.sum(), numbers

    return token_loss


def kept_by_id(plain: Any) -> Any:
    """A mask from ids: the closing end-of-text id, which is also the pad, is lost."""
    return lambda page: plain(page) & (page.ids_BL[:, page.prompt : page.prompt + plain(page).shape[1]] != 0)


def own_sequences(plain: Any) -> Any:
    return lambda self, rows, *a, shared, **k: plain(self, rows, *a, shared=shared * (1 + len(rows)), **k)


def other_credit(plain: Any) -> Any:
    def targets_of(*a: Any, **k: Any) -> Any:
        found = plain(*a, **k)
        return dataclasses.replace(found, advantage_BT=-found.advantage_BT)

    return targets_of


def of_coins(plain: Any) -> Any:
    return lambda kind, **k: plain(kind, **k) * (1.01 if kind == "coin" else 1.0)


def present_reward_too(plain: Any) -> Any:
    return lambda reward, mask, **k: plain(reward, mask, **k) + reward


CONTROLS: dict[str, tuple[str, Wrap]] = {
    "gradient: nothing moves at the teacher": ("minillm.divergences:reverse_kl", plus(0.01)),
    "gradient: vanishes linearly at the teacher": ("minillm.advantages:returns_of", scaled_to_unit_spread),
    "gradient: chain rule": ("minillm.divergences:reverse_kl", times(1.01)),
    "gradient: three returns, finite differences": ("minillm.credit:return_to_go", told(gamma=0.9)),
    "gradient: single step + next-step return": ("minillm.credit:future_return", present_reward_too),
    "gradient: present reward counted twice": ("minillm.credit:return_to_go", told(gamma=0.9)),
    "gradient: no weight on the single step": ("minillm.policy_loss:importance_weights", times(1.01)),
    "gradient: per-decision weights are exact": (
        "minillm.advantages:running_products",
        lambda plain: lambda *a, **k: (plain(*a, **k)[0],) * 2,
    ),
    "gradient: recorded bias of per-step weights": ("minillm.advantages:importance_weights", plus(0.01)),
    "gradient: coin weights on average": ("minillm.advantages:importance_weights", of_coins),
    "gradient: recorded variance of one response": ("minillm.advantages:returns_of", plus(0.1)),
    "gradient: baselines from other rows": (
        "minillm.credit:peers",
        lambda plain: lambda *a, **k: torch.ones_like(plain(*a, **k)),
    ),
    "weights: golden numbers": ("minillm.policy_loss:importance_weights", times(1.01)),
    "weights: mean 1, and their bounds": ("minillm.policy_loss:importance_weights", times(1.01)),
    "weights: exactly 1 without mixing": ("minillm.policy_loss:importance_weights", plus(1e-6)),
    "clip: none at the weights that sampled": ("minillm.policy_loss:clipped_surrogate", clip_on_weight),
    "clip: golden numbers": ("minillm.policy_loss:clipped_surrogate", told(clip=0.3)),
    "clip: dual clip bounds the loss": ("minillm.policy_loss:clipped_surrogate", told(dual_clip=None)),
    "clip: drift is the KL to the old student": ("minillm.policy_loss:clipped_surrogate", told(max_log_ratio=0.1)),
    "returns: golden numbers": ("minillm.credit:future_return", untold("horizon")),
    "returns: golden numbers, discounted": ("minillm.credit:return_to_go", told(gamma=0.9)),
    "returns: a constant reward per token": ("minillm.credit:future_return", untold("per_token")),
    "returns: whitening over kept tokens": (
        "minillm.credit:whitened",
        lambda plain: lambda value, mask, **k: plain(value, torch.ones_like(mask), **k),
    ),
    "batch: padding changes nothing": (
        "minillm.credit:whitened",
        lambda plain: lambda value, mask, **k: plain(value, torch.ones_like(mask), **k),
    ),
    "batch: mates change nothing": ("minillm.advantages:returns_of", without_the_mean),
    "divergence: single-step slope, golden numbers": ("minillm.divergences:reverse_kl", times(1.001)),
    "divergence: golden numbers of the family": (
        "minillm.divergences:_mixture",
        lambda plain: lambda q, p, *, teachers: plain(q, p, teachers=0.99 * teachers),
    ),
    "divergence: 0 where models agree": ("minillm.divergences:forward_kl", plus(0.01)),
    "divergence: forbidden ids count for nothing": (
        "minillm.divergences:_expected",
        becomes(lambda log_weight, value: (log_weight.exp() * value).sum(-1)),
    ),
    "divergence: estimators k1, k2, k3 as losses": ("minillm.divergences:forward_kl", becomes(divergences.reverse_kl)),
    "loss: tiles against whole logits": ("minillm.scoring:Piece.expected", times(1.01)),
    "loss: the same tempered and truncated": ("minillm.scoring:Piece._forget", becomes(lambda *_: None)),
    "loss: ids forbidden by -inf": ("minillm.scoring:Piece.is_finite", becomes(property(lambda piece: True))),
    "loss: padded rows of a vocabulary": ("minillm.models:Head.weights", becomes(cut_one_row_late)),
    "loss: temperature and scale cancel": ("minillm.scoring:token_statistics", told(temperature=1.0)),
    "loss: cross-entropy's slope": ("torch:Tensor.scatter_add_", becomes(lambda tensor, *_: tensor)),
    "loss: the teacher gets no gradient": ("minillm.token_loss:token_loss", with_the_teacher_in_the_loss),
    "sampling: keyed numbers, whatever the batch": (
        "minillm.sampling:uniforms",
        lambda plain: lambda keys, position: plain(keys, position + 1),
    ),
    "sampling: keyed draws, chi-square": (
        "minillm.sampling:draw",
        lambda plain: lambda logits, uniform: plain(logits, 0.9 * uniform),
    ),
    "sampling: coins, chi-square": ("minillm.decode:toss", told(teacher_mix=0.35)),
    "sampling: forbidden ids are never drawn": (
        "minillm.sampling:draw",
        lambda plain: lambda logits, uniform: plain(logits, uniform) + 1,
    ),
    "sampling: top-k and top-p": (
        "minillm.sampling:support_mask",
        lambda plain: lambda logits, *, top_k, top_p: plain(logits, top_k=top_k, top_p=min(1.0, 1.2 * top_p)),
    ),
    "sampling: rows over ranks": ("minillm.order:share", lambda plain: lambda *a, **k: plain(*a, **k)[1:]),
    "decoding: a teacher at share 0 changes no id": (
        "minillm.decode:toss",
        becomes(lambda key, *, positions, **k: [[True] * positions]),
    ),
    "decoding: share 1 is the teacher alone": (
        "minillm.decode:_mix",
        lambda plain: lambda asked, taught, **how: plain(asked, [], **how),
    ),
    "decoding: responses, chi-square": (
        "minillm.decode:uniforms",
        lambda plain: lambda keys, position: plain(keys, torch.zeros_like(position)),
    ),
    "decoding: masks from lengths, end of text": ("minillm.reading:Page.mask_BT", kept_by_id),
    "decoding: batch and cache against a plain loop": (
        "minillm.decode:row_keys",
        becomes(lambda key, uids, samples, device: torch.arange(1, len(uids) + 1, device=device)),
    ),
    "decoding: scores against plain forwards": ("minillm.scoring:score", told(temperature=1.0)),
    **{
        f"models: {family}, batch against rows": (
            "minillm.models:CausalLM._extend",
            lambda plain: lambda self, ids_BS, mask_BL, cache: plain(self, ids_BS, torch.ones_like(mask_BL), cache),
        )
        for family in ("gpt2", "opt", "llama", "qwen2")
    },
    "step: cross-entropy, ZeRO 0, against AdamW": (
        "minillm.student_engine:learning_rate_factor",
        becomes(lambda *a, **k: 1.0),
    ),
    "step: cross-entropy, ZeRO 2, against AdamW": (
        "minillm.student_engine:build_optimiser",
        lambda plain: lambda root, config: plain(root, config.model_copy(update={"weight_decay": 0.0})),
    ),
    "step: cross-entropy in micro-batches": (
        "minillm.student_engine:Student.update",
        lambda plain: lambda student, losses: plain(student, losses[-1:]),
    ),
    "step: MiniLLM, ZeRO 0, against AdamW": ("minillm.objectives:targets_of", other_credit),
    "step: MiniLLM, ZeRO 3, sharded teacher": ("minillm.objectives:clipped_surrogate", told(clip=0.01)),
    "step: MiniLLM in micro-batches, ZeRO 2": ("minillm.objectives:Minillm._loss", own_sequences),
    "text: ROUGE-L, golden numbers": (
        "minillm.text_measures:rouge_l",
        lambda plain: lambda response, references: plain(response, references[:1]),
    ),
    "text: distinct-4 and repetition-3": (
        "minillm.text_measures:numbered",
        lambda plain: lambda texts, n: ((np.arange(len(runs)), counts) for runs, counts in plain(texts, n)),
    ),
    "text: other vocabularies are refused": (
        "minillm.vocabulary:agree",
        becomes(lambda teacher, student: len(teacher)),
    ),
}
"""For each check: something of the library that it guards, and how it is broken."""


def test_every_check_has_a_negative_control() -> None:
    assert CONTROLS.keys() == BY_NAME.keys()


@pytest.mark.parametrize("name", CONTROLS)
def test_a_check_fails_when_what_it_guards_is_broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, wrap = CONTROLS[name]
    module, _, inside = path.partition(":")
    outer, dot, attribute = inside.rpartition(".")
    holder = resolve_name(f"{module}:{outer}" if dot else module)
    monkeypatch.setattr(holder, attribute, wrap(getattr(holder, attribute)))
    found = run.outcome_of(BY_NAME[name])
    assert not found.ok, found
    assert found.limit is not None, f"it raised, so nothing was compared: {found.figure}"


def found(figure: float, limit: float) -> Callable[[], Found]:
    return lambda: Found(figure, limit)


def raises() -> Found:
    raise ValueError("the first line\nand a second one")


def test_a_failure_is_told_and_written_and_the_others_still_run(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [("exact", found(1.0, 1.0)), ("above", found(1.5, 1.0)), ("raises", raises), ("nan", found(math.nan, 1.0))]
    checks += [("infinite", found(math.inf, 1.0)), ("zero", found(0.0, 0.0))]
    monkeypatch.setattr(run, "CHECKS", tuple(Check(name=name, run=function) for name, function in checks))
    file = tmp_path / "selftest.json"
    told_of = command("--json", str(file))
    assert told_of.code == exits.CHECK_FAILED == 1
    assert "Traceback" not in told_of.out + told_of.err
    lines = told_of.out.splitlines()
    assert lines[2:-1] == [
        "exact     ok      1 (at most 1)",
        "above     FAILED  1.5 (at most 1)",
        "raises    FAILED  ValueError: the first line",
        "nan       FAILED  nan (at most 1)",
        "infinite  FAILED  inf (at most 1)",
        "zero      ok      0 (at most 0)",
    ]
    assert lines[-1].startswith("2 of 6 checks passed in ")
    assert lines[-1].endswith("; FAILED: above; raises; nan; infinite")
    written = json.loads(file.read_text(encoding="utf-8"))
    assert (written["passed"], written["failed"]) == (2, 4)
    figures = {check["name"]: (check["ok"], check["figure"], check["limit"]) for check in written["checks"]}
    assert figures["above"] == (False, 1.5, 1.0)
    assert figures["raises"] == (False, "ValueError: the first line", None)
    assert figures["nan"] == (False, "nan", 1.0)


def test_a_broken_library_ends_the_command_with_code_1_and_the_line_of_its_check(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "CHECKS", (BY_NAME["returns: golden numbers"], BY_NAME["weights: golden numbers"]))
    assert command().code == 0
    monkeypatch.setattr(credit, "future_return", present_reward_too(credit.future_return))
    told_of = command()
    assert told_of.code == 1
    assert "returns: golden numbers  FAILED  3 (at most 1e-12)" in told_of.out
    assert "weights: golden numbers  ok" in told_of.out


def test_a_file_that_cannot_be_written_is_refused_before_any_check(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def selftest(file: Path | None) -> bool:
        started.append("a check")
        return file is not None

    monkeypatch.setattr(run, "selftest", selftest)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "bench.json").write_text('{"schema": 1}', encoding="utf-8")
    for name, word in {
        "": "is a folder, wanted a file",
        "nowhere/selftest.json": "there is no folder",
        "notes.txt": "not the outcome of a self-test",
        "bench.json": "not the outcome of a self-test",
        "notes.txt/selftest.json": "there is no folder",
        "x" * 250: "cannot be written",
        "x" * 300: "cannot be written",
    }.items():
        told_of = command("--json", str(tmp_path / name))
        assert told_of.code == 2 and not told_of.out, told_of
        assert told_of.err.startswith("DataError: ") and word in told_of.err
        assert "Traceback" not in told_of.err and len(told_of.err.splitlines()) == 2
    assert started == []
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "notes.txt"], "nothing is left behind"
    for _ in range(2):  # a new file, and then one with an earlier outcome
        assert command("--json", str(tmp_path / "selftest.json")).code == 0
        (tmp_path / "selftest.json").write_text(json.dumps(dict.fromkeys(FIELDS, 0)), encoding="utf-8")
    assert started == ["a check"] * 2


def test_a_comparison_of_other_shapes_or_of_no_numbers_is_no_success() -> None:
    one_2 = torch.ones(2)
    assert gap(one_2, torch.ones(1)) == differing(one_2, torch.ones(1)) == math.inf
    assert math.isnan(worst(0.0, math.nan)) and math.isnan(worst(one_2 * math.nan, 1.0))
    for got_2 in (one_2, 0.0 * one_2):
        assert not math.isfinite(relative(got_2, 0.0 * one_2))
    assert not Found(math.nan, 1.0).ok and not Found(math.inf, 1.0).ok
    assert float(rough(1000).abs().max()) <= 1.5 and float(rough(1000).std()) > 0.5
