"""sDPO: the pairs in chunks from easy to hard, one stage after another.

1. Chunks are a partition; their order is that of the accuracy under the run's own start, whatever the order of sources.
2. A run: the order is measured once, kept, told and logged; each stage's reference is the student before it.
3. What is asked for wrongly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minillm import distill, preference_chunks
from minillm import stages as stages_module
from minillm.config import RunConfig, load_config
from minillm.errors import CacheError, ConfigError, DataError, UnsupportedCombination
from minillm.loading import fingerprint
from minillm.pairs import check_pair
from minillm.preference_chunks import chunks_of, in_order
from minillm.preference_reading import pairs_in
from minillm.preference_stage import PreferenceStage
from minillm.preflight import limits_record
from minillm.ranks import Ranks
from minillm.run_splits import read_splits
from minillm.types import PreferencePair, Prompt
from minillm.world.prompts import FAMILY_PERCENT
from tests import tiny
from tests.unit.test_preference_runs import LN_2, OPTIMISER, RECIPES, stage, trained

SOURCES = ("alpha", "beta", "gamma")


def rows(file: Path, *, first: int, topic: str | None = None, count: int = 12, upside_down: bool = False) -> Path:
    """Pairs of a prompt; ``upside_down`` with their sides exchanged."""
    lines = []
    for number in range(first, first + count):
        letters = [tiny.LETTERS[(number * 7 + step * 3) % 26] for step in range(2 + number % 4)]
        sides = [" ".join(letters[::-1]), " ".join(letters)]
        chosen, rejected = sides[::-1] if upside_down else sides
        row = {"id": f"pair-{number}", "prompt": " ".join(letters), "chosen": chosen, "rejected": rejected}
        lines.append(json.dumps(row | ({"topic": topic or f"t{number % 3}"})))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sdpo")
    tiny.save_model(made / "student", "llama", seed=2)
    for number, name in enumerate(SOURCES):
        rows(made / f"{name}.jsonl", first=40 * number, upside_down=name == "beta")
    return made


def config(
    place: Path, *stages: dict[str, Any], name: str, data: dict[str, Any] | None = None, **more: Any
) -> RunConfig:
    values: dict[str, Any] = {
        "name": name, "out": str(place / "runs"), "student": str(place / "student"),
        "data": {
            "preferences": {source: str(place / f"{source}.jsonl") for source in SOURCES}, "chunks": {},
            "max_prompt_tokens": 8, **(data or {}),
        },
        "decoding": {"max_new_tokens": 10}, "engine": {"student": "zero0"}, "stages": stages, **more,
    }  # fmt: skip
    return RunConfig(**values)


def steps(count: int = 3, **changes: Any) -> list[dict[str, Any]]:
    return [stage(name=f"s{number}", chunk=number, beta=0.5, **changes) for number in range(1, count + 1)]


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return distill(config(place, *steps(), name="three"))


# ---------------------------------------------------------------- 1. chunks and their order


def a_pair(uid: str, source: str, lengths: tuple[int, int] = (2, 2), **extra: str) -> PreferencePair:
    prompt = Prompt(uid=uid, text="x", ids=(1,), extra=extra)
    chosen, rejected = ((5,) * length for length in lengths)
    return PreferencePair(
        prompt=prompt, chosen="a", rejected="b", chosen_ids=chosen, rejected_ids=rejected, source=source
    )


PAIRS = [a_pair(f"{source}/{number}", source, topic=f"t{number % 2}") for source in SOURCES for number in range(4)]


@pytest.mark.parametrize("by", ["source", "topic"])
def test_chunks_are_disjoint_and_together_all_pairs(by: str) -> None:
    chunks = chunks_of(PAIRS, by)
    assert list(chunks) == (list(SOURCES) if by == "source" else ["t0", "t1"])
    uids = [pair.prompt.uid for own in chunks.values() for pair in own]
    assert sorted(uids) == sorted(pair.prompt.uid for pair in PAIRS) and len(set(uids)) == len(PAIRS)
    assert all(own == [pair for pair in PAIRS if pair in own] for own in chunks.values())  # each in its own order


def test_the_order_is_of_falling_accuracy_with_ties_by_name_and_half_a_point_for_a_tie() -> None:
    chunks = chunks_of(PAIRS, "source")
    won, lost, even = (-1.0, -2.0), (-2.0, -1.0), (-1.0, -1.0)
    logps = {"alpha": [won, lost, lost, lost], "beta": [won, won, lost, lost], "gamma": [won, even, even, lost]}
    for names in (SOURCES, SOURCES[::-1]):
        found = in_order({name: chunks[name] for name in names}, logps, score="sum")
        assert [(each.name, each.accuracy) for each in found] == [("beta", 0.5), ("gamma", 0.5), ("alpha", 0.25)]
        assert [each.pairs for each in found] == [4, 4, 4]


def test_sum_and_mean_disagree_where_the_chosen_response_is_the_longer_one() -> None:
    """-30 over 20 tokens against -20 over 10 loses by the sum and wins by the mean."""
    chunks = {"a": [a_pair("a", "a", (20, 10))], "b": [a_pair("b", "b", (10, 10))]}
    logps = {"a": [(-30.0, -20.0)], "b": [(-1.0, -1.0)]}
    scores: tuple[Any, ...] = ("sum", "mean")
    found = {score: [each.name for each in in_order(chunks, logps, score=score)] for score in scores}
    assert found == {"sum": ["b", "a"], "mean": ["a", "b"]}


# ---------------------------------------------------------------- 2. a run


def agreed(place: Path, source: str) -> float:
    """Accuracy of a source under the run's start, from plain forwards."""
    model = AutoModelForCausalLM.from_pretrained(place / "student", dtype=torch.float64)
    points = 0
    lines = (place / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        scores = []
        for side in ("chosen", "rejected"):
            prompt, answer = ([tiny.WORDS.index(word) for word in row[name].split()] for name in ("prompt", side))
            answer.append(tiny.WORDS.index(tiny.EOS))
            with torch.no_grad():
                logq_TV = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(float(logq_TV.gather(1, torch.tensor(answer)[:, None]).sum()))
        points += scores[0] > scores[1]
    return points / len(lines)


def test_the_order_is_measured_under_the_runs_start_kept_told_and_logged(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {source: agreed(place, source) for source in SOURCES}
    assert len(set(wanted.values())) > 1, "the test is to have an order"
    order = sorted(SOURCES, key=lambda source: (-wanted[source], source))
    kept = json.loads((run / "chunks.json").read_text(encoding="utf-8"))
    assert [(each["name"], each["accuracy"]) for each in kept["chunks"]] == [(name, wanted[name]) for name in order]
    assert kept["version"]["weights"] == fingerprint(check_pair(config(place, *steps(), name="x")).student_card)
    (line,) = tiny.logged(run, "chunks")
    assert line["chunks"] == kept["chunks"] and (line["by"], line["score"]) == ("source", "sum")
    # The same sources in another order are the same chunks in the same order, and told so.
    turned = {source: str(place / f"{source}.jsonl") for source in SOURCES[::-1]}
    again = distill(config(place, *steps(1), name="turned", data={"preferences": turned}))
    assert json.loads((again / "chunks.json").read_text(encoding="utf-8"))["chunks"] == kept["chunks"]
    said = capsys.readouterr().out
    assert f"  1  {order[0]:<5}  {wanted[order[0]]:6.1%} of 12 pairs: stage s1\n" in said
    assert f"  3  {order[2]:<5}  {wanted[order[2]]:6.1%} of 12 pairs: no stage\n" in said
    assert "note: pairs of chunk 3 of 3 are learnt from by no stage" in said
    assert "higher log-probability under the run's own student" in said


def test_each_stage_learns_from_its_chunk_beside_the_student_before_it(place: Path, run: Path) -> None:
    order = [each["name"] for each in json.loads((run / "chunks.json").read_text(encoding="utf-8"))["chunks"]]
    card = check_pair(config(place, *steps(), name="x")).student_card
    before = [card, *(card.of_folder(run / "stages" / name / "student") for name in ("s1", "s2"))]
    for number, reference in enumerate(before, start=1):
        lines = trained(run, f"s{number}")
        assert abs(lines[0]["loss"] - LN_2) < 2e-6 and lines[-1]["loss"] != lines[0]["loss"]
        kept = json.loads((run / "stages" / f"s{number}" / "reference.json").read_text(encoding="utf-8"))
        assert kept["version"]["weights"] == fingerprint(reference)
        alone = distill(
            config(place, stage(sources=(order[number - 1],), beta=0.5, name=f"s{number}"), name=f"alone-{number}",
                   data={"chunks": None}, student=str(reference.model))
        )  # fmt: skip
        assert trained(alone, f"s{number}")[-1]["loss"] == lines[-1]["loss"]


def test_a_stage_from_the_runs_own_student_has_that_for_its_reference_too(place: Path) -> None:
    """The paper's 'init from S' keeps the reference of the stage before; here the two are never apart."""
    second = stage(name="s2", chunk=2, beta=0.5, start="student")
    out = distill(config(place, *steps(1), second, name="from-start"))
    assert abs(trained(out, "s2")[0]["loss"] - LN_2) < 2e-6


def test_one_chunk_is_dpo_bit_for_bit(place: Path) -> None:
    file = str(place / "alpha.jsonl")
    one = distill(config(place, stage(chunk=1), name="one-chunk", data={"preferences": file}))
    whole = distill(config(place, stage(), name="whole", data={"preferences": file, "chunks": None}))
    found = [load_file(out / "student" / "model.safetensors") for out in (one, whole)]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert [line["loss"] for line in trained(one)] == [line["loss"] for line in trained(whole)]


@pytest.mark.parametrize("by", ["sum", "mean"])
def test_a_field_of_the_rows_cuts_too(place: Path, by: str) -> None:
    out = distill(config(place, *steps(), name=f"topic-{by}", data={"chunks": {"by": "topic", "score": by}}))
    kept = json.loads((out / "chunks.json").read_text(encoding="utf-8"))
    assert sorted(each["name"] for each in kept["chunks"]) == ["t0", "t1", "t2"]
    assert kept["version"]["by"] == "topic" and kept["version"]["score"] == by
    accuracies = [each["accuracy"] for each in kept["chunks"]]
    assert accuracies == sorted(accuracies, reverse=True)


def hashed(tensors: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def test_the_reference_is_the_same_before_and_after_its_stage(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TDPO, where it stays loaded beside the student that moves."""
    before: dict[str, str] = {}
    known_of = stages_module.prepared

    class Watched:
        def __init__(self, inner: Any, name: str) -> None:
            self.inner, self.name = inner, name

        def __enter__(self) -> Any:
            self.known = self.inner.__enter__()
            before[self.name] = hashed(list(self.known.live.root.parameters()))
            return self.known

        def __exit__(self, *error: Any) -> Any:
            assert hashed(list(self.known.live.root.parameters())) == before[self.name]
            return self.inner.__exit__(*error)

    def watched(config: RunConfig, stage: PreferenceStage, **more: Any) -> Any:
        return Watched(known_of(config, stage, **more), stage.name)

    monkeypatch.setattr(stages_module, "prepared", watched)
    out = distill(config(place, *steps(2, value="tdpo2"), name="watched"))
    assert before["s1"] != before["s2"]
    for name, folder in (("s1", place / "student"), ("s2", out / "stages" / "s1" / "student")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert hashed(list(model.parameters())) == before[name]


# ---------------------------------------------------------------- 3. asked for wrongly


@pytest.mark.parametrize(
    ("stages", "data", "message", "error"),
    [
        ([stage(chunk=1)], {"chunks": None}, "has chunk 1 without data.chunks", UnsupportedCombination),
        ([stage(chunk=1, sources=("alpha",))], {}, r"chunk 1 with sources \['alpha'\]", UnsupportedCombination),
        ([stage(chunk=0)], {}, "wanted a number of at least 1", ConfigError),
        ([stage(chunk=1)], {"chunks": {"by": ""}}, "data.chunks.by", ConfigError),
        ([stage(chunk=1)], {"chunks": {"score": "max"}}, "wanted 'sum' or 'mean'", ConfigError),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(
    place: Path, stages: list[Any], data: dict[str, Any], message: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=message):
        config(place, *stages, name="refused", data=data)


def test_chunks_of_no_preferences_are_refused(place: Path) -> None:
    sft = {"kind": "sft", "steps": 1, "batch": 2, "optimiser": OPTIMISER}
    with pytest.raises(UnsupportedCombination, match="chunks without preferences: nothing is cut"):
        config(place, sft, name="none", data={"preferences": None, "train": "world:train"})


@pytest.mark.parametrize(
    ("number", "by", "message"),
    [
        (4, "source", r"chunk 4, and there are 3 of them: 'alpha', 'beta', 'gamma'"),
        (1, "topik", r"data.chunks.by 'topik': 36 of 36 pairs without a field of this name .*did you mean 'topic'"),
    ],
)
def test_a_chunk_or_field_that_is_not_there_is_told_before_any_model_is_loaded(
    place: Path, number: int, by: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        distill(config(place, stage(chunk=number), name="beyond", data={"chunks": {"by": by}}))
    assert not (place / "runs" / "beyond").exists()


def test_chunks_that_nobody_learns_from_or_that_several_do_are_told(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = [stage(name=name, chunk=1, steps=1) for name in ("one", "two")]
    distill(config(place, *twice, name="twice"))
    said = capsys.readouterr().out
    assert "note: pairs of chunk 1 of 3 are learnt from by stages one, two" in said
    assert all(f"note: pairs of chunk {number} of 3 are learnt from by no stage" in said for number in (2, 3))
    distill(config(place, stage(steps=1), name="unread"))
    said = capsys.readouterr().out
    assert "data.chunks is not read; no stage has a chunk" in said and "note: pairs" not in said


def test_an_order_of_other_weights_or_pairs_is_refused(place: Path, run: Path, tmp_path: Path) -> None:
    settings = config(place, *steps(), name="three")
    pair = check_pair(settings)
    pairs = pairs_in(read_splits(settings, pair)["preferences"])
    ranks = Ranks()
    asked = {"pair": pair, "ranks": ranks, "limits": limits_record(settings.evaluation), "say": print}
    before = (run / "chunks.json").read_text(encoding="utf-8")
    file = tmp_path / "chunks.json"
    for name, other in (("weights", '"0123"'), ("pairs", '"4567"'), ("score", '"mean"'), ("by", '"topic"')):
        kept = json.loads(before)
        kept["version"][name] = json.loads(other)
        file.write_text(json.dumps(kept), encoding="utf-8")
        with pytest.raises(CacheError, match=f"chunks of another model or of other pairs: {name} "):
            preference_chunks.ordered_chunks(settings, pairs, file=file, **asked)
    file.write_text(before, encoding="utf-8")  # the control
    order, _ = preference_chunks.ordered_chunks(settings, pairs, file=file, **asked)
    assert [each.name for each in order.chunks] == [each["name"] for each in json.loads(before)["chunks"]]


def test_the_recipe_learns_from_each_family_once_and_its_control_is_one_stage_on_the_longer_leash() -> None:
    steps, control = (load_config(RECIPES / f"{name}.yaml") for name in ("sdpo", "sdpo_control"))
    stages = [each for each in steps.trained if isinstance(each, PreferenceStage)]
    (one,) = [each for each in control.trained if isinstance(each, PreferenceStage)]
    assert [each.chunk for each in stages] == list(range(1, len(FAMILY_PERCENT) + 1))
    assert steps.data.chunks is not None and steps.data.chunks.by == "family"
    assert {each.beta for each in stages} == {stages[0].beta}
    assert one.beta == pytest.approx(stages[0].beta / len(stages), rel=1e-5) and one.chunk is None
    assert sum(each.steps * each.batch for each in stages) == one.steps * one.batch
    same = {"name": "", "stages": (), "data": control.data}
    assert steps.model_copy(update=same) == control.model_copy(update=same)
    assert steps.data.model_copy(update={"chunks": None}) == control.data
