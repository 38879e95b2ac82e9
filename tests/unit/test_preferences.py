"""Files of preferences become pairs: every form that is published, in the files' order; what is broken is told with its
line, what cannot be learnt from is dropped and counted, and nothing is cut in silence.

1. Each form gives prompt and two responses; dialogues and whole chats are cut before their last turn.
2. A broken row is an error with its line, or is left out and counted.
3. Prompt and responses are tokenised apart and closed with the end token.
4. Several sources, folders and patterns keep their names; single turns are kept on request.
5. A run reads its pairs with its other rows, and refuses to begin without them.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from minillm.config import RunConfig
from minillm.doctor.data import held_out_of
from minillm.errors import ConfigError, DataError, MinillmError, UnsupportedCombination
from minillm.pair_records import PairRow, parse_pair
from minillm.pairs import Pair, check_alone
from minillm.preference_reading import PairSplit, read_preferences
from minillm.records import RowFault
from minillm.run_splits import evaluated_sets, read_splits
from minillm.text_stages import SftStage
from tests import tiny

EOS = tiny.WORDS.index(tiny.EOS)
HELLO = "\n\nHuman: Hello.\n\nAssistant: Hi!\n\nHuman: How are you?\n\nAssistant:"
CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def parsed(**record: Any) -> PairRow:
    return parse_pair(record, default_uid="file-1")[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("preferences")
    tiny.save_model(made / "model", "gpt2", seed=1)
    tiny.save_prompts(made / "prompts.jsonl")
    return made


@pytest.fixture(scope="module")
def pair(place: Path) -> Pair:
    return check_alone(config(place), str(place / "model"))


def config(place: Path, stages: tuple[Any, ...] | None = None, **data: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "run", "out": str(place / "runs"), "student": str(place / "model"), "teacher": str(place / "model"),
        "data": {"train": str(place / "prompts.jsonl"), "max_prompt_tokens": 8, **data},
        "decoding": {"max_new_tokens": 6}, "engine": {"student": "zero0"},
        "stages": stages or ({"kind": "sft", "steps": 1, "batch": 2, "optimiser": {"lr": 1e-3}},),
    }  # fmt: skip
    return RunConfig(**values)


def save(file: Path, *rows: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return str(file)


def read(place: Path, pair: Pair, source: Any, *, limit: int | None = None, **data: Any) -> PairSplit:
    return read_preferences(config(place, **data), source, pair=pair, name="preferences", limit=limit)


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    letters = [tiny.LETTERS[(number + step) % 26] for step in range(4)]
    return {"prompt": " ".join(letters[:2]), "chosen": letters[2], "rejected": letters[3], **changes}


# ---------------------------------------------------------------- 1. forms


def test_texts_with_a_prompt_or_an_instruction_are_as_they_stand() -> None:
    plain = parsed(prompt="a b", chosen="c ", rejected=" d", id="x", topic="letters")
    assert (plain.row.prompt, plain.chosen, plain.rejected, plain.uid) == ("a b", "c ", " d", "x")
    assert plain.row.extra == {"topic": "letters"} and plain.row.responses == () and plain.single_turn
    told, left_out = parse_pair(
        {"instruction": "Add.", "input": "2+2", "output": "4", "chosen": "four", "rejected": "five"}, default_uid="n"
    )
    assert (told.row.instruction, told.row.input, told.row.responses) == ("Add.", "2+2", ()) and left_out == ["output"]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT, "chosen": "x", "rejected": "y"},
        {"prompt": CHAT, "chosen": [said("x")], "rejected": [said("y")]},
        {"prompt": CHAT, "chosen": said("x"), "rejected": said("y")},
        {"chosen": [*CHAT, said("x")], "rejected": [*CHAT, said("y")]},
        {"prompt": "d", "messages": [*CHAT, said("x")], "chosen": [*CHAT, said("x")], "rejected": [*CHAT, said("y")]},
    ],
    ids=["messages", "turns", "a-turn", "whole-chats", "with-all-of-it-again"],
)
def test_a_chat_in_any_form_is_its_turns_and_two_answers(record: dict[str, Any]) -> None:
    found = parsed(**record)
    assert found.row.messages == (("user", "a b"), ("assistant", "c"), ("user", "d"))
    assert (found.chosen, found.rejected, found.row.prompt) == ("x", "y", None) and not found.single_turn


def test_a_dialogue_is_cut_at_its_last_turn_and_stays_text_but_in_a_chat() -> None:
    found = parsed(chosen=f"{HELLO} Well.", rejected=f"{HELLO} Bad.\n\nReally.")
    assert (found.row.prompt, found.chosen, found.rejected) == (HELLO, " Well.", " Bad.\n\nReally.")
    chat = found.as_chat()
    assert chat.row.messages == (("user", "Hello."), ("assistant", "Hi!"), ("user", "How are you?"))
    assert (chat.row.prompt, chat.chosen, chat.rejected) == (None, "Well.", "Bad.\n\nReally.")
    # One whose prompt is apart, as some publish it, has the same turns; any other text has none.
    apart = parsed(prompt=HELLO.lstrip(), chosen="Well.", rejected="Bad.")
    assert apart.turns == found.turns and apart.row.prompt == HELLO.lstrip()
    assert parsed(prompt="What is 'Human:'?", chosen="x", rejected="y").turns == ()


def test_single_turns_are_those_with_nothing_before_them() -> None:
    system = {"role": "system", "content": "Be kind."}
    assert parsed(messages=[system, CHAT[0]], chosen="x", rejected="y").single_turn
    first = "\n\nHuman: Hello.\n\nAssistant:"
    assert parsed(chosen=f"{first} a", rejected=f"{first} b").single_turn
    assert not parsed(chosen=f"{HELLO} a", rejected=f"{HELLO} b").single_turn


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "with a prompt or as whole dialogues$"),
        ({"prompt": "a", "chosn": "b", "rejected": "c"}, "no 'chosen': .* did you mean 'chosen'"),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "no 'chosen'"),
        ({"prompt": "a", "chosen": 1, "rejected": 2}, "field 'chosen' is a number, wanted text, a message or a list"),
        ({"prompt": "a", "chosen": "b", "rejected": [said("c")]}, "'chosen' is text and 'rejected' a list; wanted two"),
        ({"prompt": "a", "chosen": [], "rejected": []}, "field 'chosen' is an empty list"),
        ({"prompt": "a", "chosen": "b\x00", "rejected": "c"}, "holds a NUL character"),
        ({"chosen": "b", "rejected": "c"}, "there is no prompt, and field 'chosen' is no dialogue"),
        ({"chosen": f"{HELLO} a", "rejected": "b"}, "there is no prompt, and field 'rejected' is no dialogue"),
        ({"chosen": f"Well.{HELLO} a", "rejected": f"Well.{HELLO} b"}, "field 'chosen' is no dialogue"),
        ({"chosen": f"{HELLO} a", "rejected": HELLO.replace("Hi", "Ho") + " b"}, "differ before their last turn"),
        ({"chosen": f"{HELLO} a\n\nHuman: b", "rejected": f"{HELLO} c"}, "'chosen' ends with a turn of the human"),
        ({"chosen": [*CHAT, said("x")], "rejected": [CHAT[0], said("y")]}, "differ before their last turn"),
        ({"chosen": CHAT, "rejected": CHAT}, "field 'chosen' ends with a turn of 'user'"),
        ({"messages": [*CHAT, said("x")], "chosen": "y", "rejected": "z"}, "the prompt ends with a turn of the assis"),
        ({"messages": CHAT, "prompt": CHAT, "chosen": "y", "rejected": "z"}, "both hold messages; keep one"),
        ({"prompt": "z", "chosen": [*CHAT, said("x")], "rejected": [*CHAT, said("y")]}, "beside them is another one"),
        ({"instruction": "z", "chosen": [*CHAT, said("x")], "rejected": [*CHAT, said("y")]}, "is another one; keep"),
        ({"messages": [said("x")], "chosen": "y", "rejected": "z"}, "holds no turn of the user"),
        ({"prompt": CHAT, "chosen": [{"role": "assistant"}], "rejected": [said("x")]}, r"chosen\[0\] has the fields"),
        (row(teacher_logps=[-1.0]), "'teacher_logps' is not two finite numbers"),
        (row(teacher_logps=[-1.0, None]), "'teacher_logps' is not two finite numbers"),
        (row(teacher_logps=[-1.0, True]), "'teacher_logps' is not two finite numbers"),
        (row(teacher_logps=[-1.0, 10**400]), "'teacher_logps' is not two finite numbers"),
        (row(teacher_logps=-1.0), "'teacher_logps' is not two finite numbers"),
        (row(teacher_logps=[5.0, 3]), "'teacher_logps' has 5 for 'chosen'; wanted log-probabilities, 0 or less"),
        (row(teacher_logps=[-1.0, 1e-9]), "'teacher_logps' has 1e-09 for 'rejected'; wanted log-prob"),
    ],
)  # fmt: skip
def test_a_broken_row_says_why(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowFault, match=reason):
        parsed(**record)


# ---------------------------------------------------------------- 2. files


def test_a_broken_row_is_told_with_its_line_or_left_out_and_counted(place: Path, pair: Pair, tmp_path: Path) -> None:
    file = save(tmp_path / "p.jsonl", row(1), {"prompt": "a", "chosen": "b"}, "{", row(2))
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: no 'rejected'"):
        read(place, pair, file)
    with pytest.raises(DataError, match=r"line 3, column 1: not JSON.*\n.*broken row 2 and data.max_broken allows 1"):
        read(place, pair, file, broken="skip", max_broken=1)
    found = read(place, pair, file, broken="skip", max_broken=2)
    assert [each.prompt.uid for each in found.pairs] == ["p-1", "p-4"]
    assert "skipped 2 broken rows: line 2 (no 'rejected'" in found.words[0]
    again = save(tmp_path / "twice.jsonl", row(1, id="x"), row(2, id="x"))
    with pytest.raises(DataError, match="line 2: id 'x' already names line 1"):
        read(place, pair, again)
    with pytest.raises(DataError, match=r"wanted one JSON object a line .* for each pair"):
        read(place, pair, save(tmp_path / "empty.jsonl"))


def test_what_cannot_be_learnt_from_is_dropped_and_counted(place: Path, pair: Pair, tmp_path: Path) -> None:
    file = save(
        tmp_path / "p.jsonl", row(1), row(chosen="c", rejected="c"), row(chosen="c  d", rejected="c d"),
        row(chosen=" "), row(rejected=""), row(prompt=" "), row(rejected=f"a {tiny.EOS} b"), row(2),
    )  # fmt: skip
    found = read(place, pair, file)
    assert [each.prompt.uid for each in found.pairs] == ["p-1", "p-8"]
    assert found.words == (
        "preferences: 8 pairs read, 2 used; dropped 1 blank prompt: p-6; dropped 2 blank responses: p-4, p-5; "
        "dropped 1 response with the end-of-text token inside: p-7; dropped 2 pairs with equal responses: p-2, p-3",
    )
    with pytest.raises(DataError, match="no pair is left; give two responses that differ"):
        read(place, pair, save(tmp_path / "q.jsonl", row(chosen="c", rejected="c")))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_what_is_over_long_goes_by_the_runs_policy_and_no_response_is_cut(
    place: Path, pair: Pair, tmp_path: Path, side: str
) -> None:
    most = " ".join("abcde")  # 5 and the end token: as many as there may be
    file = save(tmp_path / "p.jsonl", row(1, **{side: most}), row(2, **{side: f"{most} f"}))
    with pytest.raises(DataError, match=r"1 over-long response \(> 6 tokens\): p-2\n.*the longest has 7"):
        read(place, pair, file)
    for policy in ("drop", "keep_right"):
        found = read(place, pair, file, over_long=policy)
        assert [each.prompt.uid for each in found.pairs] == ["p-1"]
        assert "dropped 1 over-long response (> 6 tokens): p-2" in found.words[0]
    ids = found.pairs[0].chosen_ids if side == "chosen" else found.pairs[0].rejected_ids
    assert len(ids) == 6 and ids[-1] == EOS


def test_a_long_prompt_keeps_its_end_where_the_run_says_so(place: Path, pair: Pair, tmp_path: Path) -> None:
    file = save(tmp_path / "p.jsonl", row(prompt=" ".join("abcdefghij")), row(2))
    with pytest.raises(DataError, match=r"over-long prompt \(> 8 tokens\)"):
        read(place, pair, file)
    (cut, _), (kept,) = (read(place, pair, file, over_long=policy).pairs for policy in ("keep_right", "drop"))
    assert cut.prompt.text == "c d e f g h i j" and kept.prompt.uid == "p-2"


# ---------------------------------------------------------------- 3. ids


def test_prompt_and_responses_are_tokenised_apart_and_closed(place: Path, pair: Pair, tmp_path: Path) -> None:
    (found,) = read(place, pair, save(tmp_path / "p.jsonl", row(prompt="a b", chosen="c", rejected="d e"))).pairs
    of = {letter: tiny.WORDS.index(letter) for letter in "abcde"}
    assert found.prompt.ids == (of["a"], of["b"]) and found.chosen_ids == (of["c"], EOS)
    assert found.rejected_ids == (of["d"], of["e"], EOS) and found.prompt.responses == found.prompt.response_ids == ()
    assert (found.source, found.teacher_logps) == ("", None)


def test_a_chat_template_reads_dialogues_as_turns(place: Path, pair: Pair, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] + ' ' + m.content + ' ' }}{% endfor %}z"
    tokenizer.save_pretrained(tiny.save_model(tmp_path / "chatty", "gpt2", seed=1))
    start = "\n\nHuman: a b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    file = save(tmp_path / "p.jsonl", {"chosen": f"{start} x", "rejected": f"{start} y"})
    settings = config(place, template="chat")
    chatty = check_alone(settings, str(tmp_path / "chatty"))
    (found,) = read_preferences(settings, file, pair=chatty, name="preferences", limit=None).pairs
    assert (found.prompt.text, found.chosen, found.rejected) == ("u a b a c u d z", "x", "y")
    with pytest.raises(DataError, match="holds messages, and template 'plain' reads none"):
        read(place, pair, save(tmp_path / "q.jsonl", {"messages": CHAT, "chosen": "x", "rejected": "y"}))


# ---------------------------------------------------------------- 4. sources


def test_every_source_keeps_its_name_and_its_order(place: Path, pair: Pair, tmp_path: Path) -> None:
    one = save(tmp_path / "both" / "b.jsonl", row(1), row(2), row(3))
    save(tmp_path / "both" / "a.jsonl", row(4), row(5))
    folder = read(place, pair, str(tmp_path / "both"))
    assert folder.sources == ("a", "b") and [each.source for each in folder.pairs] == ["a", "a", "b", "b", "b"]
    pattern = read(place, pair, str(tmp_path / "both" / "*.jsonl"))
    assert pattern.sources == ("a", "b") and pattern.sha256 == folder.sha256
    mapping = read(place, pair, {"late": one, "early": str(tmp_path / "both" / "a.jsonl")}, limit=2)
    assert (
        mapping.sources == ("late", "early") and [each.source for each in mapping.pairs] == ["late"] * 2 + ["early"] * 2
    )
    assert [each.prompt.uid for each in mapping.pairs] == ["late/b-1", "late/b-2", "early/a-1", "early/a-2"]
    assert "preferences late: the first 2 of 3 rows (limit set by data.preferences_limit)" in mapping.words
    both = read(place, pair, {"x": str(tmp_path / "both")})
    assert both.sources == ("x",) and {each.source for each in both.pairs} == {"x"}
    alone = read(place, pair, one)
    assert alone.sources == ("",) and [prompt.uid for prompt in alone.prompts] == ["b-1", "b-2", "b-3"]
    zipped = read(place, pair, save(tmp_path / "z" / "b.jsonl.gz", row(1), row(2), row(3)))
    assert zipped.sha256 == alone.sha256  # and what follows are the controls
    assert len({alone.sha256, folder.sha256, mapping.sha256, both.sha256}) == 4


@pytest.mark.parametrize("change", [{"chosen": "z"}, {"rejected": "z"}, {"prompt": "z"}, {"teacher_logps": [-1, -2.5]}])
def test_the_hash_is_over_all_that_is_read(place: Path, pair: Pair, tmp_path: Path, change: dict[str, Any]) -> None:
    before, after = (read(place, pair, save(tmp_path / "p.jsonl", row(**each))) for each in ({}, change))
    assert before.sha256 != after.sha256


def test_several_turns_are_dropped_on_request(place: Path, pair: Pair, tmp_path: Path) -> None:
    first = "\n\nHuman: a\n\nAssistant:"
    rows = [{"chosen": f"{start} c", "rejected": f"{start} d"} for start in (first, HELLO, first)]
    file = save(tmp_path / "p.jsonl", *rows)
    long = {"max_prompt_tokens": 16}
    assert len(read(place, pair, file, **long).pairs) == 3
    found = read(place, pair, file, single_turn=True, preferences=file, **long)
    assert [each.prompt.uid for each in found.pairs] == ["p-1", "p-3"]
    assert "dropped 1 pair with several turns before its responses: p-2" in found.words[0]


def test_log_probabilities_without_a_manifest_are_taken_and_told(place: Path, pair: Pair, tmp_path: Path) -> None:
    file = save(tmp_path / "p.jsonl", row(1, teacher_logps=[-1, -2.5]), row(2))
    found = read(place, pair, file)
    assert [each.teacher_logps for each in found.pairs] == [(-1.0, -2.5), None] and found.teachers == {}
    assert found.words[-1].endswith("1 pair with log-probabilities of a teacher and no manifest: nothing says which "
                                    "teacher they are of")  # fmt: skip


# ---------------------------------------------------------------- 5. a run


class PairStage(SftStage):
    """A stage that reads pairs, whatever it makes of them."""

    reads: ClassVar[Literal["train", "teacher_text", "preferences"]] = "preferences"


def test_a_run_reads_its_pairs_beside_its_other_rows(place: Path, pair: Pair, tmp_path: Path) -> None:
    some, held_out = save(tmp_path / "p.jsonl", row(1), row(2)), save(tmp_path / "v.jsonl", row(2), row(3))
    settings = config(place, preferences={"all": some}, preferences_validation=held_out, preferences_limit=1)
    stage = PairStage(steps=1, batch=2, optimiser={"lr": 1e-3}, validate_every=1)  # type: ignore[arg-type]
    with_stage = settings.model_copy(update={"stages": (stage,)})
    found = read_splits(with_stage, pair)
    assert list(found) == ["preferences", "preferences_validation"] and evaluated_sets(found) == {}
    pairs, validation = found.values()
    assert isinstance(pairs, PairSplit) and [each.prompt.uid for each in pairs.pairs] == ["all/p-1"]
    assert isinstance(validation, PairSplit) and len(validation.pairs) == 2
    assert "preferences" not in read_splits(settings, pair)  # no stage of it reads them
    both = read_splits(with_stage.model_copy(update={"data": config(
        place, preferences=some, preferences_validation=held_out).data}), pair)  # fmt: skip
    assert any("1 of 2 prompts (50.0%) stand in preferences too" in str(each) for each in held_out_of(both, most=9))


@pytest.mark.parametrize(
    ("data", "message", "error"),
    [
        ({"preferences": "pairs.csv"}, "data.preferences: .*got 'pairs.csv'", ConfigError),
        ({"preferences": {}}, "got no source, wanted a source, or a mapping", ConfigError),
        ({"preferences": {"a b": "p.jsonl"}}, "source 'a b': wanted a name of letters", ConfigError),
        ({"preferences": {"a": "p.csv"}}, "source 'a': got 'p.csv'", ConfigError),
        ({"preferences": 3}, "got 3, wanted a source, or a mapping of names to sources", ConfigError),
        ({"preferences_validation": "world:tset"}, "wanted world: and one of", ConfigError),
        ({"single_turn": True}, "single_turn without preferences: no pair is read", UnsupportedCombination),
    ],
)
def test_settings_that_say_nothing_are_refused(
    place: Path, data: dict[str, Any], message: str, error: type[MinillmError]
) -> None:
    with pytest.raises(error, match=message):
        config(place, **data)


def test_a_stage_of_pairs_without_pairs_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SftStage, "reads", "preferences")
    with pytest.raises(
        ConfigError, match=r"data\.preferences is missing; a stage of kind sft trains on its pairs; make"
    ):
        config(place)
    assert config(place, preferences="p.jsonl").data.preference_sources == {"": "p.jsonl"}  # the control
