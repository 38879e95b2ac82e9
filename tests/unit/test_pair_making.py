"""``minillm pairs``: the teacher's answers preferred to the student's, with what both models make of them.

1. Each pair is two answers that ``minillm generate`` draws, and the sums of plain forwards over the ids that are read.
2. What cannot be learnt from is left out and counted; an interrupted call goes on to the same file.
3. The manifest says who wrote it; a run takes the teacher's numbers from just that file, tokenizer and template.
4. A file that is none of ours, or answers another question, is left alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm import cli, generate, make_pairs, pair_making
from minillm.config import RunConfig, dump_config
from minillm.errors import ConfigError, DataError, ManifestError, MinillmError
from minillm.generated import manifest_of
from minillm.loading import fingerprint
from minillm.pair_manifest import PairManifest, read_pair_manifest
from minillm.pairs import check_alone, check_pair
from minillm.preference_reading import PairSplit, read_preferences
from minillm.preference_stage import PreferenceStage
from minillm.run_splits import read_splits
from minillm.stages import check_pairs
from minillm.vocabulary import identity
from tests import tiny

REAL, LONGEST, PROMPTS = len(tiny.WORDS), 40, 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose head has more rows than ids, a student, prompts, and the pairs of both."""
    top = tmp_path_factory.mktemp("pairs")
    tiny.save_model(top / "teacher", "llama", seed=1, rows=REAL + 4, spread=0.1)
    tiny.save_model(top / "student", "gpt2", seed=2, spread=0.1)
    tiny.save_prompts(top / "prompts.jsonl", rows=PROMPTS)
    make_pairs(run_of(top), out=top / "pairs.jsonl")
    return top


def run_of(place: Path, *, data: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    prompts = str(place / "prompts.jsonl")
    return tiny.minillm_config(
        place / "runs", teacher=place / "teacher", student=place / "student", prompts=place / "prompts.jsonl",
        run_data={"train": prompts, "max_prompt_tokens": 8, **(data or {})},
        run_decoding={"max_new_tokens": LONGEST}, **{f"run_{name}": value for name, value in changes.items()},
    )  # fmt: skip


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read(
    place: Path, file: Path | dict[str, str], *, config: RunConfig | None = None, name: str = "preferences"
) -> PairSplit:
    config = config or run_of(place)
    pair = check_alone(config, str(place / "student"))
    source = file if isinstance(file, dict) else str(file)
    return read_preferences(config, source, pair=pair, name=name, limit=None)


# ---------------------------------------------------------------- 1. what is in it


def test_answers_are_those_that_generate_draws(place: Path, tmp_path: Path) -> None:
    config, rows = run_of(place), lines_of(place / "pairs.jsonl")
    generate(place / "teacher", config, out=tmp_path / "t.jsonl")
    generate(place / "student", config.model_copy(update={"seed": config.seed + 1}), out=tmp_path / "s.jsonl")
    drawn = [{row["uid"]: row["response"] for row in lines_of(tmp_path / f"{name}.jsonl")} for name in "ts"]
    both = [uid for uid in drawn[1] if uid in drawn[0] and drawn[0][uid] != drawn[1][uid]]
    assert len(rows) == len(both) > 8
    for row in rows:
        assert (row["chosen"], row["rejected"]) == (drawn[0][row["uid"]], drawn[1][row["uid"]])
    # Negative control: with the teacher's random numbers the student answers otherwise.
    generate(place / "student", config, out=tmp_path / "same.jsonl")
    assert {row["uid"]: row["response"] for row in lines_of(tmp_path / "same.jsonl")} != drawn[1]


@torch.no_grad()
def test_log_probabilities_are_sums_over_the_ids_that_are_read(place: Path) -> None:
    split = read(place, place / "pairs.jsonl")
    rows = {row["uid"]: row for row in lines_of(place / "pairs.jsonl")}
    for role in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(place / role).eval()
        for pair in split.pairs[::3]:
            row = rows[pair.prompt.uid]
            for side, ids in enumerate((pair.chosen_ids, pair.rejected_ids)):
                whole = torch.tensor([[*pair.prompt.ids, *ids]])
                logp_NV = model(whole).logits[0, len(pair.prompt.ids) - 1 : -1, :REAL].double().log_softmax(-1)
                want = float(logp_NV.gather(1, torch.tensor(ids)[:, None]).sum())
                assert row[f"{role}_logps"][side] == pytest.approx(want, abs=1e-3), (role, side)
            sizes = [len(pair.prompt.ids), len(pair.chosen_ids), len(pair.rejected_ids)]
            assert [row[f"{name}_tokens"] for name in ("prompt", "chosen", "rejected")] == sizes
            assert pair.teacher_logps == tuple(row["teacher_logps"])


def test_everything_is_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_pair_manifest(place / "pairs.jsonl")
    assert found is not None
    counts = found.counts
    assert counts.asked == PROMPTS and counts.written == len(lines_of(place / "pairs.jsonl")) and counts.unanswered > 0
    assert counts.asked == counts.written + counts.unanswered + counts.equal + counts.unread
    make_pairs(run_of(place), out=place / "again.jsonl")
    said = capsys.readouterr().out
    assert f"{counts.written:,} pairs from {PROMPTS} prompts" in said
    assert f"  {counts.unanswered:,} without two whole answers: left out" in said
    assert (place / "again.jsonl").read_bytes() == (place / "pairs.jsonl").read_bytes()
    assert not list(place.glob("again.jsonl.*.jsonl*")) and not list(place.glob("*.partial"))


def test_one_model_on_both_sides_answers_alike_under_the_same_numbers_and_not_under_its_own(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "one.jsonl"
    make_pairs(run_of(place), out=out, student=place / "teacher", limit=12)
    assert len(lines_of(out)) > 2 and all(row["chosen"] != row["rejected"] for row in lines_of(out))
    assert all(row["teacher_logps"] == row["student_logps"] for row in lines_of(out))
    writer = pair_making._writer

    def same_seed(role: str, name: Any, config: RunConfig, split: str, *, out: Path) -> Any:
        return writer(role, name, config.model_copy(update={"seed": config.seed - (role == "student")}), split, out=out)

    monkeypatch.setattr(pair_making, "_writer", same_seed)
    with pytest.raises(DataError, match=r"none has two different answers; .* was not written"):
        make_pairs(run_of(place), out=tmp_path / "same.jsonl", student=place / "teacher", limit=12)


# ---------------------------------------------------------------- 2. interrupted


def test_an_interrupted_call_goes_on_to_the_same_file(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pairs.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(pair_making, "pair_logps", lambda *_, **__: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception, match="stopped"):
            make_pairs(run_of(place), out=out)
    assert not out.exists() and len(list(tmp_path.glob("pairs.jsonl.*.jsonl"))) == 2
    asked: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(pair_making, "generate", lambda name, *_, **options: asked.append(options["out"].name))
        make_pairs(run_of(place), out=out)
    assert asked == ["pairs.jsonl.teacher.jsonl", "pairs.jsonl.student.jsonl"]  # both found done by the real one
    assert out.read_bytes() == (place / "pairs.jsonl").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pairs.jsonl", "pairs.jsonl.manifest.json"]


# ---------------------------------------------------------------- 3. provenance


def test_the_manifest_says_who_wrote_it_and_a_run_reads_it(place: Path) -> None:
    found = read_pair_manifest(place / "pairs.jsonl")
    assert isinstance(found, PairManifest)
    config = run_of(place)
    cards = {role: check_alone(config, str(place / role)) for role in ("teacher", "student")}
    assert found.chosen.weights == fingerprint(cards["teacher"].student_card) == found.teacher_weights
    assert found.rejected.weights == fingerprint(cards["student"].student_card)
    assert found.tokenizer == identity(cards["student"].tokenizer) and found.template == "plain"
    assert (found.chosen.seed, found.rejected.seed) == (config.seed, config.seed + 1)
    assert found.chosen.decoding == config.decoding and found.chosen.data == found.rejected.data
    split = read(place, place / "pairs.jsonl")
    assert split.teachers == {"": {found.teacher_weights: str(place / "teacher")}}
    assert all(pair.teacher_logps for pair in split.pairs)
    assert split.words[0].startswith(f"preferences: {found.counts.written:,} pairs of {place}/teacher (chosen) and")


def copied(place: Path, into: Path) -> Path:
    for file in (place / "pairs.jsonl", manifest_of(place / "pairs.jsonl")):
        (into / file.name).write_bytes(file.read_bytes())
    return into / "pairs.jsonl"


def test_a_changed_file_another_template_tokenizer_or_prompt_is_refused(place: Path, tmp_path: Path) -> None:
    file = copied(place, tmp_path)
    with pytest.raises(ManifestError, match=r"read with template 'plain', and data.template is 'alpaca'"):
        read(place, file, config=run_of(place, data={"template": "alpaca"}))
    # Prompts of up to five tokens: cut to four they are not what was measured.
    with pytest.raises(ManifestError, match=r"has 4, \d+, \d+ tokens .prompt, chosen, rejected., and 5, "):
        read(place, file, config=run_of(place, data={"max_prompt_tokens": 4, "over_long": "keep_right"}))
    words = [*tiny.WORDS[:2], *reversed(tiny.LETTERS)]
    tiny.save_model(tmp_path / "other", "gpt2", seed=2, words=words)
    with pytest.raises(ManifestError, match="of the ids of another tokenizer than that of student other"):
        read_preferences(
            run_of(place), str(file), pair=check_alone(run_of(place), str(tmp_path / "other")), name="preferences",
            limit=None,
        )  # fmt: skip
    assert read(place, file).teachers  # the control
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("-1", "-2", 1), encoding="utf-8")
    with pytest.raises(ManifestError, match=r"is not the file that its manifest was written with.*\n.*make the pairs"):
        read(place, file)
    manifest_of(file).unlink()
    found = read(place, file)
    assert found.teachers == {} and "no manifest" in found.words[-1]


def test_pairs_of_two_teachers_say_which_are_whose(place: Path, tmp_path: Path) -> None:
    one, two = copied(place, tmp_path), tmp_path / "b.jsonl"
    make_pairs(run_of(place), out=two, teacher=place / "student", student=place / "teacher", limit=12)
    both = read(place, {"a": str(one), "b": str(two)})
    weights = {name: fingerprint(check_alone(run_of(place), str(place / name)).student_card) for name in
               ("teacher", "student")}  # fmt: skip
    assert both.sources == ("a", "b")
    assert {source: set(of) for source, of in both.teachers.items()} == {
        "a": {weights["teacher"]}, "b": {weights["student"]},
    }  # fmt: skip
    bare = tmp_path / "c.jsonl"
    bare.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n", encoding="utf-8")
    assert set(read(place, {"a": str(one), "c": str(bare)}).teachers) == {"a"}


def test_soft_targets_of_another_teacher_than_the_runs_are_refused(place: Path, tmp_path: Path) -> None:
    taught = tiny.save_model(tmp_path / "taught", "gpt2", seed=4, spread=0.1)
    other = tiny.save_model(tmp_path / "other", "gpt2", seed=3, spread=0.1)
    pairs = tmp_path / "pairs.jsonl"
    make_pairs(run_of(place), out=pairs, teacher=taught, limit=12)

    def check(teacher: Path | None, named: str | dict[str, str] = str(pairs), **changes: Any) -> None:
        settings = {"kind": "preference", "steps": 1, "batch": 2, "optimiser": {"lr": 1e-3}, **changes}
        config = run_of(
            place, teacher=None if teacher is None else str(teacher), stages=(settings,), data={"preferences": named}
        )
        pair = check_pair(config)
        (stage,) = config.trained
        assert isinstance(stage, PreferenceStage)
        check_pairs(config, stage, read_splits(config, pair), pair=pair)

    for target in ("soft", None):  # which is soft by default, as all pairs bring their teacher's numbers
        with pytest.raises(ManifestError, match=r"which are of .*/taught with weights .* the run's teacher other has"):
            check(other, target=target)
        check(taught, target=target)
        check(None, target=target)
    check(other, target="hard")
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n", encoding="utf-8")
    both = {"a": str(pairs), "b": str(bare)}
    check(other, both, target="soft")  # the run's teacher is asked about all of them
    with pytest.raises(ManifestError, match="which are of"):
        check(other, both, target="soft", sources=("a",))


def test_answers_to_held_out_prompts_are_no_training_rows(place: Path, tmp_path: Path) -> None:
    other = tiny.save_prompts(tmp_path / "other.jsonl", rows=5)
    config = run_of(place, data={"train": str(other), "validation": str(place / "prompts.jsonl")})
    with pytest.raises(DataError, match=r"answers the prompts of data.validation"):
        read(place, place / "pairs.jsonl", config=config)
    assert len(read(place, place / "pairs.jsonl", config=config, name="preferences_validation").pairs) > 8


# ---------------------------------------------------------------- 4. what is left alone


@pytest.mark.parametrize(
    ("options", "changes", "message", "error"),
    [
        ({}, {"teacher": None, "stages": ({"kind": "sft", "steps": 1, "batch": 2, "optimiser": {"lr": 1e-3}},)},
         "the run names no teacher; add 'teacher: NAME', or give --teacher", ConfigError),
        ({"split": "tran"}, {}, "--split 'tran': wanted one of train", ConfigError),
        ({"split": "test"}, {}, "data.test is missing", DataError),
        ({"limit": 0}, {}, "--limit 0: wanted at least 1", ConfigError),
        ({"out": "pairs.txt"}, {}, "wanted a file ending in .jsonl", ConfigError),
        ({"out": "prompts.jsonl"}, {}, "data.train reads it; nothing was touched", DataError),
        ({"out": "own.jsonl"}, {}, "has no manifest, so it is not distilled pairs; nothing was touched", DataError),
        ({"out": "pairs.jsonl"}, {"seed": 5}, "differs in: teacher seed, student seed.; nothing", DataError),
        ({"out": "pairs.jsonl", "limit": 3}, {}, "differs in: teacher data, student data.; nothing", DataError),
    ],
)  # fmt: skip
def test_what_is_asked_for_wrongly_or_is_not_ours_is_refused(
    place: Path, options: dict[str, Any], changes: dict[str, Any], message: str, error: type[MinillmError]
) -> None:
    (place / "own.jsonl").write_text("mine\n", encoding="utf-8")
    files = {file: file.read_bytes() for file in place.glob("*.jsonl*")}
    with pytest.raises(error, match=message):
        make_pairs(run_of(place, **changes), out=place / options.pop("out", "new.jsonl"), **options)
    assert files == {file: file.read_bytes() for file in place.glob("*.jsonl*")}


def test_a_file_beside_the_pairs_is_left_as_it_is(place: Path, tmp_path: Path) -> None:
    """Of whatever name: what is made on the way has none that may be somebody's."""
    theirs = {tmp_path / f"p.jsonl.{name}": f"{name}\n" for name in ("joined.jsonl", "joined", "notes.jsonl")}
    for file, text in theirs.items():
        file.write_text(text, encoding="utf-8")
    make_pairs(run_of(place), out=tmp_path / "p.jsonl", limit=8)
    assert {file: file.read_text(encoding="utf-8") for file in theirs} == theirs
    assert len(list(tmp_path.iterdir())) == len(theirs) + 2


def test_the_command_makes_pairs_leaves_them_and_replaces_them_on_request(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(run_of(place)), encoding="utf-8")
    out = tmp_path / "p.jsonl"

    def run(*words: str) -> int:
        command = ["pairs", "--config", str(tmp_path / "run.yaml"), "--out", str(out), *words]
        return cli._guarded(lambda **options: cli.app(command, **options))

    assert run("--limit", "8") == 0
    before = out.read_bytes()
    assert run("--limit", "8") == 0 and "made already; --fresh starts over" in capsys.readouterr().out
    out.write_bytes(before.replace(b"-", b"-1", 1))
    assert run("--limit", "8") == 2 and "made already" not in capsys.readouterr().out, "edited since it was made"
    out.write_bytes(before)
    assert run("--limit", "6") == 2 and out.read_bytes() == before
    assert run("--limit", "6", "--fresh") == 0 and out.read_bytes() != before
    lines = [line["uid"] for line in lines_of(out)]
    assert lines == [json.loads(line)["uid"] for line in before.splitlines()][: len(lines)]
