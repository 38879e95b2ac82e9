"""``minillm generate``: a model's answers as rows to train on.

1. The file reads back as training rows: the same prompt ids, the text that was drawn, and no reference response.
2. What is in it depends on the question alone: not on batches, nor on an interruption (two ranks: tests/dist).
3. Responses that did not end by themselves are counted, told and left out, or kept where asked for.
4. The manifest names who wrote it, and does not vouch for a file that was changed.
5. A file that answers another question, or is none of ours, is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from minillm import cli, drawing, generate, generation
from minillm.config import RunConfig, dump_config
from minillm.errors import (
    ConfigError,
    DataError,
    ManifestError,
    MinillmError,
    ModelError,
    PositionsExceeded,
    UnsupportedCombination,
)
from minillm.generated import Manifest, manifest_of, read_generated
from minillm.generation_parts import Parts
from minillm.loading import fingerprint
from minillm.pairs import check_alone
from minillm.preflight import read_split
from minillm.types import Prompt, Purpose
from minillm.vocabulary import identity
from tests import tiny

GOLD = "z z z z z"
"""A reference that no test below draws by chance: it is looked for in what is written."""
ROWS: list[dict[str, Any]] = [
    {"id": "plain", "prompt": "a b c", "response": GOLD, "topic": "letters", "stop": "theirs", "hard": True},
    {"uid": "task", "id": 7, "instruction": "c d", "input": "e f", "output": [GOLD, GOLD + " z"]},
    {"id": "both", "instruction": "q", "prompt": "r", "responses": [GOLD]},
    *({"id": f"more-{n}", "prompt": " ".join(tiny.LETTERS[n : n + 1 + n % 4]), "response": GOLD} for n in range(20)),
]
CHAT = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}s"
LONGEST = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a card for it that computes in 64 bits."""
    top = tmp_path_factory.mktemp("generate")
    tiny.save_model(top / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(top / "other", "llama", seed=2)
    (top / "exact.yaml").write_text(f"model: {top}/teacher\ndtype: float64\n", encoding="utf-8")
    (top / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return top


def run_of(place: Path, *, data: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """A run whose own models are not there: only prompts and decoding count."""
    return tiny.minillm_config(
        place / "nowhere", teacher=place / "nowhere", student=place / "nowhere", prompts=place / "rows.jsonl",
        run_data={"train": str(place / "rows.jsonl"), "max_prompt_tokens": 8, **(data or {})},
        run_decoding={"max_new_tokens": LONGEST}, **{f"run_{name}": value for name, value in changes.items()},
    )  # fmt: skip


def made(place: Path, out: Path, *, model: str = "exact.yaml", batch: int = 256, **options: Any) -> Manifest:
    config = options.pop("config", None) or run_of(place, evaluation={"batch": batch})
    return generate(place / model, config, out=out, **options)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prompts_of(place: Path, source: Path, **data: Any) -> list[Prompt]:
    """The prompts of a file as a run reads them."""
    config = run_of(place, data=data)
    pair = check_alone(config, str(place / "exact.yaml"))
    return read_split(config, str(source), pair=pair, name="train", need_response=False).prompts


def test_the_file_reads_back_as_rows_with_the_same_prompts_and_what_was_drawn(place: Path, tmp_path: Path) -> None:
    manifest = made(place, tmp_path / "out.jsonl", keep_cut=True)
    before = {prompt.uid: prompt for prompt in prompts_of(place, place / "rows.jsonl")}
    after = prompts_of(place, tmp_path / "out.jsonl")
    lines = lines_of(tmp_path / "out.jsonl")
    assert [prompt.uid for prompt in after] == list(before) == [line["uid"] for line in lines]
    assert manifest.counts.asked == manifest.counts.written == len(ROWS)
    words = [len(line["response"].split()) for line in lines]
    # Special tokens that the model drew are no text: here the pad.
    lost = sum(count != line["tokens"] for count, line in zip(words, lines, strict=True))
    assert 0 < lost == manifest.counts.respelt < len(ROWS)
    for prompt, line, count in zip(after, lines, words, strict=True):
        assert prompt.ids == before[prompt.uid].ids
        assert prompt.responses == (line["response"],)
        assert prompt.extra["stop"] == line["stop"] in {"eos", "length", "empty"}
        # A whole cut response with an end token is longer than any that is drawn, and not learnt from.
        assert len(prompt.response_ids) == (count + 1 if count < LONGEST else 0)
    assert after[0].extra == {**before["plain"].extra, **{name: str(lines[0][name]) for name in generation.OWN_FIELDS}}
    assert (lines[0]["topic"], lines[0]["hard"], lines[1]["id"]) == ("letters", "true", "7")


def holds_gold(file: Path) -> bool:
    return GOLD in file.read_text(encoding="utf-8")


def test_no_reference_response_is_in_the_file(place: Path, tmp_path: Path) -> None:
    made(place, tmp_path / "out.jsonl", keep_cut=True, samples=2)
    assert not holds_gold(tmp_path / "out.jsonl") and holds_gold(place / "rows.jsonl")
    for prompt in prompts_of(place, tmp_path / "out.jsonl"):
        assert len(prompt.responses) == 1


def test_a_conversation_keeps_its_turns_and_loses_its_last_answer(place: Path, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "chat", "llama", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", GOLD)]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "talk", "messages": messages}) + "\n", encoding="utf-8")
    config = run_of(place, data={"train": str(tmp_path / "rows.jsonl"), "template": "chat"})
    assert generate(model, config, out=tmp_path / "out.jsonl", keep_cut=True).template == "chat"
    (line,) = lines_of(tmp_path / "out.jsonl")
    assert line["messages"] == messages[:-1] and not holds_gold(tmp_path / "out.jsonl")
    pair = check_alone(config, str(model))
    ids = [
        read_split(config, str(tmp_path / name), pair=pair, name="train", need_response=False).prompts[0].ids
        for name in ("rows.jsonl", "out.jsonl")
    ]
    assert ids[0] == ids[1]


def test_samples_have_names_of_their_own_and_the_first_is_that_of_a_single_one(place: Path, tmp_path: Path) -> None:
    made(place, tmp_path / "one.jsonl", keep_cut=True)
    made(place, tmp_path / "three.jsonl", keep_cut=True, samples=3)
    one, three = lines_of(tmp_path / "one.jsonl"), lines_of(tmp_path / "three.jsonl")
    assert [line["uid"] for line in three[:4]] == ["plain#0", "plain#1", "plain#2", "task#0"]
    assert [line["response"] for line in three if line["sample"] == 0] == [line["response"] for line in one]
    texts = {line["response"] for line in three if line["row"] == "plain"}
    assert len(texts) > 1


def test_batches_change_nothing(place: Path, tmp_path: Path) -> None:
    made(place, tmp_path / "whole.jsonl")
    made(place, tmp_path / "pieces.jsonl", batch=3)
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "pieces.jsonl").read_bytes()


def test_another_seed_or_purpose_changes_the_text(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above: equal bytes are no matter of course."""
    made(place, tmp_path / "a.jsonl")
    made(place, tmp_path / "b.jsonl", config=run_of(place, seed=11))
    monkeypatch.setattr(drawing, "Purpose", SimpleNamespace(GENERATION=Purpose.EVALUATION))
    made(place, tmp_path / "c.jsonl")
    assert len({(tmp_path / f"{name}.jsonl").read_bytes() for name in "abc"}) == 3


def test_cut_and_empty_responses_are_counted_told_and_left_out(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = made(place, tmp_path / "all.jsonl", keep_cut=True, samples=4)
    capsys.readouterr()
    manifest = made(place, tmp_path / "fit.jsonl", samples=4)
    said = capsys.readouterr().out
    everything, fit = lines_of(tmp_path / "all.jsonl"), lines_of(tmp_path / "fit.jsonl")
    stops = [line["stop"] for line in everything]
    assert stops.count("length") == manifest.counts.cut == kept.counts.cut > 0
    assert stops.count("empty") == manifest.counts.empty == kept.counts.empty > 0
    assert fit == [line for line in everything if line["stop"] == "eos"] and len(fit) == manifest.counts.written > 0
    assert f"{manifest.counts.cut} cut at {LONGEST} tokens: left out, since an end token there would be a lie" in said
    assert f"{manifest.counts.empty} empty: left out" in said
    assert manifest.mean_length == pytest.approx(sum(line["tokens"] for line in fit) / len(fit), abs=1e-3)
    assert "field 'stop' of 1 row is replaced" in said


def interrupt_after(batches: int, patch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C in the batch after that many."""
    plain, seen = Parts.append, [0]

    def append(parts: Parts, answers: Any) -> None:
        if seen[0] == batches:
            raise KeyboardInterrupt
        seen[0] += 1
        plain(parts, answers)

    patch.setattr(Parts, "append", append)


@pytest.mark.parametrize("torn", [b"", b'{"cell": [3, 0], "te'])
def test_an_interrupted_call_goes_on_where_it_stopped(
    torn: bytes, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(place, tmp_path / "whole.jsonl", batch=5)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(2, patch)
        made(place, out, batch=5)
    assert partial.exists() and not out.exists() and not manifest_of(out).exists()
    partial.write_bytes(partial.read_bytes() + torn)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # what was torn is not in the way later
        interrupt_after(1, patch)
        made(place, out, batch=5)
    drawn: list[int] = []
    plain = drawing.Drawing.draw

    def draw(self: drawing.Drawing, cells: Any, *more: Any, **options: Any) -> Any:
        drawn.append(len(cells))
        return plain(self, cells, *more, **options)

    monkeypatch.setattr(drawing.Drawing, "draw", draw)
    made(place, out, batch=5)
    done = len(ROWS) - sum(drawn)
    assert 10 < done < len(ROWS) and f"left {done} answers; going on from there" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not partial.exists()


def test_answers_to_another_question_are_not_gone_on_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(1, patch)
        made(place, out, batch=5)
    before = partial.read_bytes()
    with pytest.raises(DataError, match=r"answers to another question .*differs in: samples"):
        made(place, out, samples=2)
    for broken in (b"", b"[1]\n", b'{"format": "x"}\n', before + b"not JSON\n", before + b'{"cell": 3}\n'):
        partial.write_bytes(broken)
        with pytest.raises(DataError, match="not the answers of an interrupted"):
            made(place, out, batch=5)
        assert partial.read_bytes() == broken
    made(place, out, samples=2, fresh=True)
    assert not partial.exists() and read_generated(out).asked.samples == 2


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_no_generated_text_of_ours_is_never_replaced(fresh: bool, place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("mine\n")
    with pytest.raises(DataError, match="has no manifest, so it is not generated text; nothing was touched") as caught:
        made(place, tmp_path / "mine.jsonl", fresh=fresh)
    assert "--fresh" not in str(caught.value), "it would not help"
    assert contents(tmp_path) == {str(tmp_path / "mine.jsonl"): b"mine\n"}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("reads", ["train", "validation", "test", "corpus", "set"])
def test_what_a_run_reads_is_never_written_over(  # noqa: PLR0917 (pytest fills them by name)
    reads: str, fresh: bool, place: Path, written: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it has a manifest, and whatever link leads to it: it may have been generated for another run."""
    monkeypatch.setattr(generation, "load_teacher", None)
    out = tmp_path / "out.jsonl"
    out.write_bytes(written[0])
    manifest_of(out).write_bytes(written[1])
    (tmp_path / "link.jsonl").symlink_to(out)
    source = str(tmp_path / "link.jsonl")
    data = {"test": {"one": str(place / "rows.jsonl"), "two": source}} if reads == "set" else {reads: source}
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"data\.[\w.]+ reads it; nothing was touched"):
        made(place, out, config=run_of(place, data=data), fresh=fresh)
    assert contents(tmp_path) == before


def test_a_fresh_call_that_fails_leaves_what_was_there(
    place: Path, written: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(written[0])
    manifest_of(out).write_bytes(written[1])
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(generation, "load_teacher", None)
        made(place, out, config=run_of(place, seed=3), fresh=True)
    assert (out.read_bytes(), manifest_of(out).read_bytes()) == written
    assert made(place, out, config=run_of(place, seed=3), fresh=True).asked.seed == 3  # and is then replaced


def test_an_interrupted_fresh_call_goes_on_too(
    place: Path, written: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A job that is stopped and started again has the same command each time."""
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(2, patch)
        made(place, out, batch=5, fresh=True)
    made(place, out, batch=5, fresh=True)
    assert "left 10 answers; going on from there" in capsys.readouterr().out
    assert (out.read_bytes(), manifest_of(out).read_bytes()) == written
    # The control: answers to another question are let go, and that is said.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(2, patch)
        made(place, out, config=run_of(place, seed=3, evaluation={"batch": 5}), fresh=True)
    made(place, out, batch=5, fresh=True)
    said = capsys.readouterr().out
    assert "out.jsonl.partial holds answers to another question (it differs in: seed)" in said
    assert "going on from there" not in said and "--fresh lets it go" in said
    assert (out.read_bytes(), manifest_of(out).read_bytes()) == written


def test_what_is_said_of_cut_answers_is_what_training_does_with_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its end token a cut answer is longer than any that this configuration trains on."""
    out = tmp_path / "out.jsonl"
    manifest = made(place, out, keep_cut=True)
    assert f"{manifest.counts.cut} cut at {LONGEST} tokens: kept (--keep-cut), and over-long for training" in (
        capsys.readouterr().out
    )
    config = run_of(place)
    pair = check_alone(config, str(place / "exact.yaml"))
    with pytest.raises(DataError, match="over-long responses"):
        read_split(config, str(out), pair=pair, name="train", need_response=True)
    made(place, tmp_path / "fit.jsonl")
    assert "--keep-cut" not in capsys.readouterr().out, "no advice: it would not help"


def test_nothing_fit_is_told_and_can_still_be_kept_without_drawing_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(place).model_copy(
        update={"decoding": run_of(place).decoding.model_copy(update={"max_new_tokens": 1})}
    )
    with pytest.raises(DataError, match="none is fit to be learnt from") as caught:
        made(place, tmp_path / "out.jsonl", config=config)
    assert "raise decoding.max_new_tokens" in str(caught.value) and "--keep-cut" not in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.setattr(generation, "load_teacher", None)  # would be called to draw
    assert made(place, tmp_path / "out.jsonl", config=config, keep_cut=True).counts.written == len(ROWS)


def test_the_manifest_names_who_wrote_it(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert made(place, out) == read_generated(out)
    pair = check_alone(run_of(place), str(place / "exact.yaml"))
    found = read_generated(str(out))
    assert found.weights == fingerprint(pair.student_card) and found.tokenizer == identity(pair.tokenizer)
    assert (found.template, found.asked.dtype, found.asked.seed) == ("plain", "float64", 10)
    assert found.asked.decoding.max_new_tokens == LONGEST and found.asked.source == str(place / "rows.jsonl")
    other = check_alone(run_of(place), str(place / "other"))
    assert fingerprint(other.student_card) != found.weights and identity(other.tokenizer) == found.tokenizer


def _edit(out: Path) -> None:
    out.write_bytes(out.read_bytes().replace(b'"stop": "eos"', b'"stop": "EOS"', 1))


def _rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda out: manifest_of(out).write_text(json.dumps(change(json.loads(manifest_of(out).read_text()))))


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[MinillmError], str]] = {
    "edited": (_edit, ManifestError, "not the file that its manifest was written with"),
    "cut": (lambda out: out.write_bytes(out.read_bytes()[:-9]), ManifestError, "edited, cut or mixed up"),
    "bare": (lambda out: manifest_of(out).unlink(), ManifestError, "has no manifest beside it"),
    "half": (lambda out: manifest_of(out).write_text('{"format"'), ManifestError, "not JSON"),
    "binary": (lambda out: manifest_of(out).write_bytes(b"\xff\xfe\x00"), ManifestError, "not JSON"),
    "list": (lambda out: manifest_of(out).write_text("[]"), ManifestError, "holds no JSON object"),
    "less": (_rewrite(lambda m: {k: v for k, v in m.items() if k != "sha256"}), ManifestError, "sha256: is missing"),
    "more": (_rewrite(lambda m: {**m, "wieghts": 1}), ManifestError, "wieghts: no setting of this name"),
    "type": (_rewrite(lambda m: {**m, "counts": 3}), ManifestError, "counts: got 3"),
    "gone": (lambda out: out.unlink(), DataError, "no such file"),
}


@pytest.fixture(scope="module")
def written(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    out = tmp_path_factory.mktemp("written") / "out.jsonl"
    made(place, out)
    return out.read_bytes(), manifest_of(out).read_bytes()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_manifest_does_not_vouch_for_another_file(name: str, written: tuple[bytes, bytes], tmp_path: Path) -> None:
    out, (damage, kind, words) = tmp_path / "out.jsonl", DAMAGE[name]
    out.write_bytes(written[0])
    manifest_of(out).write_bytes(written[1])
    read_generated(out)  # the control
    damage(out)
    with pytest.raises(DataError) as caught:
        read_generated(out)
    assert type(caught.value) is kind and words in str(caught.value)


def test_a_file_that_is_there_is_kept(
    place: Path, written: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(DataError, match="has no manifest, so it is not generated text; nothing was touched"):
        made(place, out)
    assert out.read_text() == "mine\n"
    out.write_bytes(written[0])
    manifest_of(out).write_bytes(written[1])
    with monkeypatch.context() as patch:
        patch.setattr(generation, "load_teacher", None)
        assert made(place, out) == read_generated(out)  # the same question: nothing is drawn
        assert "generated already" in capsys.readouterr().out
        for differs, options in {
            "weights": {"model": "other"},
            "seed": {"config": run_of(place, seed=3)},
            "data": {"config": run_of(place, data={"max_prompt_tokens": 3, "over_long": "drop"})},
            "--keep-cut": {"keep_cut": True},
        }.items():
            with pytest.raises(DataError, match=f"differs in: .*{differs}"):
                made(place, out, **options)
        _edit(out)
        with pytest.raises(ManifestError):
            made(place, out)
    made(place, out, fresh=True)
    assert (out.read_bytes(), manifest_of(out).read_bytes()) == written


BAD: list[tuple[dict[str, Any], type[MinillmError], str]] = [
    ({"split": "tran"}, ConfigError, "did you mean 'train'"),
    ({"split": "test"}, DataError, "data.test is missing"),
    ({"samples": 0}, ConfigError, "wanted at least 1"),
    ({"out": "out.txt"}, ConfigError, "ending in .jsonl"),
    ({"out": "out.jsonl.gz"}, ConfigError, "ending in .jsonl"),
    ({"out": "folder.jsonl"}, DataError, "has no manifest"),
    ({"out": "a-file/out.jsonl"}, ConfigError, "change --out"),
    ({"model": "nomodel"}, ConfigError, "no card of that name in teachers/"),
    ({"model": "{here}/built.yaml"}, ModelError, "model built: its card builds a model with random weights"),
    ({"model": "{here}/host.yaml"}, UnsupportedCombination, "model host: placement tp (tensor parallel) is refused"),
    ({"model": "{here}/wide.yaml"}, UnsupportedCombination, "zero3 with dtype float64"),
    ({"model": "{here}/wide-host.yaml"}, UnsupportedCombination, "offload with dtype float64"),
    ({"config": {"max_prompt_tokens": 25}}, PositionsExceeded, "model exact has 48 positions"),
    ({"config": {"max_prompt_tokens": 1}}, DataError, "over-long prompts"),
    ({"config": {"train": "nowhere.jsonl"}}, DataError, "does not exist"),
]


@pytest.mark.parametrize(("options", "kind", "words"), BAD, ids=[str(bad[0]) for bad in BAD])
def test_bad_input_is_told_before_a_model_is_loaded(  # noqa: PLR0917 (pytest fills them by name)
    options: dict[str, Any], kind: type[MinillmError], words: str, place: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(generation, "load_teacher", None)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "a-file").touch()
    for name, text in {
        "built": "build: {architecture: llama, tokenizer: world}",
        "host": f"{{model: {place}/teacher, placement: tp}}",
        "wide": f"{{model: {place}/teacher, placement: zero3, dtype: float64}}",
        "wide-host": f"{{model: {place}/teacher, placement: offload, dtype: float64}}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text + "\n", encoding="utf-8")
    there = set(tmp_path.rglob("*"))
    with pytest.raises(MinillmError) as caught:
        generate(
            str(options.get("model", place / "exact.yaml")).replace("{here}", str(tmp_path)),
            run_of(place, data=options.get("config")),
            out=tmp_path / options.get("out", "out.jsonl"),
            split=options.get("split", "train"),
            samples=options.get("samples", 1),
        )
    assert type(caught.value) is kind and words in str(caught.value)
    assert set(tmp_path.rglob("*")) == there


def test_the_command_writes_what_the_function_does(
    place: Path, written: tuple[bytes, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(run_of(place)), encoding="utf-8")
    out = tmp_path / "new" / "out.jsonl"
    words = [
        "generate", str(place / "exact.yaml"), "--config", str(tmp_path / "run.yaml"), "--out", str(out),
        "--split", "train", "evaluation.batch=4",
    ]  # fmt: skip
    assert cli._guarded(lambda **options: cli.app(words, **options)) == 0
    assert out.read_bytes() == written[0]
    said = capsys.readouterr().out
    assert "batches/s" in said and "length" in said and " left" in said
    assert cli._guarded(lambda **options: cli.app([*words, "seed=4"], **options)) == 2
    assert "differs in: seed" in capsys.readouterr().err
