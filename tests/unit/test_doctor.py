"""What the doctor finds in models' folders: each illness, and the healthy run in which the check is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minillm.doctor import examine as examined
from minillm.doctor import folders
from minillm.doctor.patient import Check
from minillm.doctor.tokens import added_prefix, closing_id
from tests.patients import CHAT_WORDS, END, TEMPLATE, begins, chat, copied, edited, healthy, levels, looked_at, of
from tests.tiny import EOS, WORDS, save_model, tokenizer


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("well")
    healthy(folder)
    return folder


@pytest.fixture
def ill(well: Path, tmp_path: Path) -> Path:
    """The folders of the healthy run, free to be changed."""
    for name in ("teacher", "student"):
        copied(well / name, tmp_path / name)
    return tmp_path


def chats(folder: Path, **of_both: Any) -> Path:
    """A pair that was tuned for chat, and its run."""
    for seed, role in enumerate(("teacher", "student")):
        save_model(folder / role, "llama", seed=seed, words=CHAT_WORDS)
        chat(folder / role, **of_both)
    file = healthy(folder)
    file.write_text(file.read_text("utf-8").replace("template: plain", "template: chat"), encoding="utf-8")
    return file


def test_a_healthy_run_has_no_warning_and_every_check_was_made(well: Path) -> None:
    report = looked_at(healthy(well))
    assert not [finding for finding in report.findings if finding.level in {"warning", "error"}]
    silent = {
        "chat-template",
        "turn-end",
        "begin-token",
        "responses",
        "preferences",
        "held-out",
    }  # nothing to say of such a run
    assert {check.id for check in examined.CHECKS} - {finding.id for finding in report.findings} == silent
    assert not [finding for finding in report.findings if "not looked at" in finding.found]
    assert all(finding.why and finding.mend for finding in report.findings if finding.level == "warning")


def test_other_ids_are_named(ill: Path) -> None:
    swapped = [*WORDS[:2], "b", "a", *WORDS[4:]]
    save_model(ill / "teacher", "llama", seed=0, words=swapped)
    found = of(looked_at(healthy(ill)), "tokenizer-ids")
    assert [finding.level for finding in found] == ["error"]
    assert "2 of 28 token ids" in found[0].found and "id 2 is 'b' for the teacher and 'a'" in found[0].found
    assert "student with the teacher's tokenizer" in found[0].mend


def test_an_error_is_told_once_though_the_run_would_raise_it_too(ill: Path) -> None:
    save_model(ill / "teacher", "llama", seed=0, words=[*WORDS[:2], "b", "a", *WORDS[4:]])
    report = looked_at(healthy(ill))
    assert sum("token ids" in finding.found and finding.level == "error" for finding in report.findings) == 1
    assert not of(report, "settings")


def test_what_only_the_run_itself_refuses_is_told(ill: Path) -> None:
    found = of(looked_at(healthy(ill), ["decoding.repetition_penalty=1.2"]), "settings")
    assert [finding.level for finding in found] == ["error"] and "repetition_penalty" in found[0].found


@pytest.mark.parametrize(("rows", "level"), [(40, "note"), (28, "ok")])
def test_rows_without_a_token_are_told(rows: int, level: str, ill: Path) -> None:
    save_model(ill / "student", "llama", seed=1, rows=rows)
    found = of(looked_at(healthy(ill)), "vocabulary-rows")
    mine = [finding for finding in found if "student" in finding.found]
    assert [finding.level for finding in mine] == [level]
    assert level == "ok" or "12 rows are padding" in mine[0].found


def test_tokens_without_a_row_are_an_error(ill: Path) -> None:
    tokenizer([*WORDS, "extra"]).save_pretrained(ill / "student")
    found = of(looked_at(healthy(ill)), "vocabulary-rows")
    assert [finding.level for finding in found if "student" in finding.found] == ["error"]
    assert [finding.level for finding in found if "teacher" in finding.found] == ["ok"]


def test_the_same_chat_template_is_well(tmp_path: Path) -> None:
    report = looked_at(chats(tmp_path))
    assert levels(report, "chat-template") == {"ok"} and levels(report, "turn-end") == {"ok"}


@pytest.mark.parametrize(
    ("role", "template", "level", "words"),
    [
        ("teacher", TEMPLATE.replace("{{ m['role'] }}", "a {{ m['role'] }}"), "error", "other chat templates"),
        ("teacher", TEMPLATE + "{# another #}", "note", "wrap the same conversations in the same text"),
        ("teacher", None, "warning", "the teacher's tokenizer has no chat template"),
        ("student", None, "error", "the student's tokenizer has no chat template"),
    ],
)
def test_another_chat_template_is_told(role: str, template: str | None, level: str, words: str, tmp_path: Path) -> None:
    file = chats(tmp_path)
    (tmp_path / role / "chat_template.jinja").unlink(missing_ok=True)
    chat(tmp_path / role, template=template)
    found = of(looked_at(file), "chat-template")
    assert [finding.level for finding in found] == [level] and words in found[0].found


def test_chat_templates_that_are_not_used_are_a_note(tmp_path: Path) -> None:
    found = of(looked_at(chats(tmp_path), ["data.template=plain"]), "chat-template")
    assert [finding.level for finding in found] == ["note"] and found[0].mend


@pytest.mark.parametrize(("also", "level"), [((), "warning"), ((len(CHAT_WORDS) - 1,), "ok")])
def test_a_turn_that_ends_with_another_token_is_a_warning(also: tuple[int, ...], level: str, tmp_path: Path) -> None:
    file = chats(tmp_path, end=EOS)
    for role in ("teacher", "student"):
        edited(tmp_path / role / "generation_config.json", eos_token_id=[1, *also])
    found = of(looked_at(file), "turn-end")
    assert [finding.level for finding in found] == [level] and END in found[0].found


def test_references_that_are_closed_otherwise_than_chats_are_a_warning(tmp_path: Path) -> None:
    file = chats(tmp_path, end=EOS)
    for role in ("teacher", "student"):
        edited(tmp_path / role / "generation_config.json", eos_token_id=[1, len(CHAT_WORDS) - 1])
    sft = "stages=[{kind: sft, steps: 1, batch: 4, optimiser: {lr: 1e-3}}]"
    found = of(looked_at(file, [sft]), "turn-end")
    assert [finding.level for finding in found] == ["warning"] and "references are closed" in found[0].found


def test_the_closing_token_is_read_from_the_template(tmp_path: Path) -> None:
    own = chat(tmp_path)
    assert closing_id(own) == len(CHAT_WORDS) - 1
    own.chat_template = None
    assert closing_id(own) is None
    own.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert closing_id(own) is None
    own.chat_template = "{{ 1 / 0 }}"
    assert closing_id(own) is None


def test_end_tokens_that_disagree_are_a_warning(ill: Path) -> None:
    edited(ill / "student" / "generation_config.json", eos_token_id=5)
    report = looked_at(healthy(ill))
    mine = [finding for finding in of(report, "end-tokens") if "student" in finding.found]
    assert [finding.level for finding in mine] == ["warning"] and "'d' (id 5)" in mine[0].found
    assert [finding.level for finding in of(report, "end-tokens") if "teacher" in finding.found] == ["ok"]


def test_a_student_that_never_ends_is_an_error_and_its_rows_are_not_read(ill: Path) -> None:
    for role in ("teacher", "student"):
        edited(ill / role / "tokenizer_config.json", eos_token=None)
        edited(ill / role / "generation_config.json", eos_token_id=None)
    report = looked_at(healthy(ill))
    assert levels(report, "end-tokens") == {"error"}
    assert "not looked at" in of(report, "data")[0].found and "not looked at" in of(report, "lengths")[0].found


def test_ends_of_the_teacher_alone_are_a_warning(ill: Path) -> None:
    assert not of(looked_at(healthy(ill)), "end-of-teacher")
    edited(ill / "teacher" / "generation_config.json", eos_token_id=[1, 4])
    found = of(looked_at(healthy(ill)), "end-of-teacher")
    assert [finding.level for finding in found] == ["warning"] and "'c' (id 4)" in found[0].found


@pytest.mark.parametrize(("pad", "words"), [(EOS, "its pad is the end-of-text token"), (None, "no pad token")])
def test_a_pad_that_is_missing_or_the_end_is_a_note(pad: str | None, words: str, ill: Path) -> None:
    assert not of(looked_at(healthy(ill)), "pad")
    for role in ("teacher", "student"):
        edited(ill / role / "tokenizer_config.json", pad_token=pad)
    found = of(looked_at(healthy(ill)), "pad")
    assert [finding.level for finding in found] == ["note"] and words in found[0].found


def test_prompts_that_do_not_begin_as_the_tokenizer_begins_them(ill: Path) -> None:
    for role in ("teacher", "student"):
        begins(ill / role)
    file = healthy(ill)
    found = of(looked_at(file), "begin-token")
    # A note, since the published recipes train such models so.
    assert [finding.level for finding in found] == ["note", "note"] and "24 of 24 prompts" in found[0].found
    assert found[0].mend.endswith(f"begin the rows' prompts with {EOS}")
    rows = (ill / "train.jsonl").read_text(encoding="utf-8")
    (ill / "train.jsonl").write_text(rows.replace('"prompt": "', f'"prompt": "{EOS} '), encoding="utf-8")
    assert levels(looked_at(file), "begin-token") == {"ok"}
    (ill / "train.jsonl").write_text(rows.replace('"prompt": "', f'"prompt": "{EOS} {EOS} '), encoding="utf-8")
    found = of(looked_at(file), "begin-token")
    assert {finding.level for finding in found} == {"note"} and "twice" in found[0].found


@pytest.mark.parametrize(("written", "level"), [("", "warning"), (EOS, "ok"), (f"{EOS} {EOS}", "warning")])
def test_a_chat_template_writes_the_begin_token_once(written: str, level: str, tmp_path: Path) -> None:
    file = chats(tmp_path)
    template = f"{written} {TEMPLATE}".lstrip().replace("{{ m['role'] }}", "a")
    for role in ("teacher", "student"):
        begins(tmp_path / role, chat(tmp_path / role, template=template, end=EOS))
    assert levels(looked_at(file), "begin-token") == {level}


def test_what_a_tokenizer_adds_is_found(tmp_path: Path) -> None:
    assert added_prefix(tokenizer()) == ()
    begins(tmp_path)
    from transformers import AutoTokenizer

    assert added_prefix(AutoTokenizer.from_pretrained(tmp_path)) == (1,)


def test_left_over_generation_settings_are_a_note(ill: Path) -> None:
    edited(ill / "student" / "generation_config.json", temperature=0.7, repetition_penalty=1.3, do_sample=True)
    file = healthy(ill)
    mine = [finding for finding in of(looked_at(file), "generation-settings") if "student" in finding.found]
    assert [finding.level for finding in mine] == ["note"]
    assert "temperature 0.7" in mine[0].found and "repetition_penalty 1.3" in mine[0].found
    mine = [f for f in of(looked_at(file, ["decoding.temperature=0.7"]), "generation-settings") if "student" in f.found]
    assert "temperature" not in mine[0].found and "repetition_penalty 1.3" in mine[0].found


def test_positions_of_both_models_are_looked_at(ill: Path) -> None:
    file = healthy(ill)
    assert levels(looked_at(file, ["decoding.max_new_tokens=40"]), "positions") == {"ok"}
    found = of(looked_at(file, ["decoding.max_new_tokens=41"]), "positions")
    assert [finding.level for finding in found] == ["error", "error"] and "48 positions" in found[0].found


@pytest.mark.parametrize(
    ("stored", "dtype", "level"),
    [("float16", "bfloat16", "warning"), ("float32", "bfloat16", "note"), ("float16", "float32", "ok")],
)
def test_weights_that_the_card_rounds(stored: str, dtype: str, level: str, ill: Path) -> None:
    edited(ill / "teacher" / "config.json", dtype=stored)
    card = ill / "half.yaml"
    card.write_text(f"model: {ill / 'teacher'}\ndtype: {dtype}\n", encoding="utf-8")
    assert levels(looked_at(healthy(ill, teacher=card)), "stored-precision") == {level}


@pytest.mark.parametrize(
    ("where", "able", "override", "level"),
    [
        ("a CPU without bf16 instructions", False, "bf16", "warning"),
        ("a CPU without bf16 instructions", False, "fp32", "ok"),
        ("GPU X", True, "fp32", "note"),
        ("a CPU with bf16 instructions", True, "fp32", "ok"),
    ],
)
def test_precision_is_held_against_the_hardware(
    where: str, able: bool, override: str, level: str, *, well: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "bf16_hardware", lambda: (where, able))
    words = [f"engine.precision={override}", "engine.student=zero2"]
    assert levels(looked_at(healthy(well), words), "precision") == {level}


def test_everything_that_is_broken_at_once_is_told(ill: Path) -> None:
    save_model(ill / "teacher", "llama", seed=0, words=[*WORDS[:2], "b", "a", *WORDS[4:]], positions=12)
    edited(ill / "student" / "generation_config.json", eos_token_id=5, temperature=0.5)
    tokenizer([*WORDS, "extra"]).save_pretrained(ill / "student")
    (ill / "runs").write_text("not a folder", encoding="utf-8")
    file = healthy(ill)
    (ill / "train.jsonl").write_text('{"prompt": ', encoding="utf-8")
    report = looked_at(file, ["stages.0.prompts=1"], ranks=0)
    for name in ("tokenizer-ids", "vocabulary-rows", "positions", "data", "out-folder"):
        assert "error" in levels(report, name), name
    assert "warning" in levels(report, "end-tokens") and "note" in levels(report, "generation-settings")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_cannot_be_read_leaves_the_other_checks(role: str, ill: Path) -> None:
    (ill / role / "config.json").write_bytes(b"\x00\xff\x1b[31m")
    report = looked_at(healthy(ill))
    assert levels(report, role) == {"error"}
    assert "not looked at" in of(report, "tokenizer-ids")[0].found
    assert levels(report, "out-folder") == {"ok"} and "ok" in levels(report, "positions")
    assert all("\x1b" not in finding.found for finding in report.findings)


def test_a_check_that_breaks_off_hides_none(well: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(patient: object) -> Any:
        raise RuntimeError("of ours")

    first = Check(id="broken", run=breaks)
    monkeypatch.setattr(examined, "CHECKS", (first, *examined.CHECKS))
    report = looked_at(healthy(well))
    assert levels(report, "broken") == {"warning"} and "RuntimeError: of ours" in of(report, "broken")[0].found
    assert levels(report, "out-folder") == {"ok"}
