"""A9: text of strangers, in prompts, names and answers, is shown so that it cannot steer a terminal or a page, and is
never a format or a file name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm import errors, model_files, report_parts
from minillm.cards import Card
from minillm.errors import MinillmError, visible
from minillm.loading import inspect, load
from minillm.progress import Progress
from minillm.terminal import print_table
from tests.attacks.hostile import STEERING, Place, Run, change, quiet, refused
from tests.chat_server import Server

ESCAPES = (
    *("\x1b[2J\x1b[31m", "\x1b]0;owned\x07", "\x1b]8;;file:///etc/passwd\x1b\\x", "\x9b31m", "\r", "\x08\x08\x08"),
    *("\u202egnp.exe", "\u2066x", "\x00"[:0] + "\x7f", "\x85", "\x0b"),
)
"""What terminals obey: colours, a title, a link, C1, back to the start of the line, marks of direction."""
FORMATS = ("{0.__class__.__init__.__globals__}", "%s%n%1000000d", "${jndi:ldap://x}", "{}", "[/bold]", "[link=x]y[/]")
TAGS = ("<script>alert(1)</script>", "<img src=x onerror=y>", "</pre><iframe>", "'\"><svg onload=x>", "&lt;b&gt;")
TEXT = "a b " + " ".join((*ESCAPES, *FORMATS, *TAGS))
NAME = "m\x1b[2J\x1b]0;owned\x07[/bold]\u202e{0}%s"
"""A folder's name: any byte but a slash may stand in one."""


def rows_of(text: str) -> str:
    """Rows with the text in every field that a file may have."""
    uids = [f"{number} {each}" for number, each in enumerate((*ESCAPES, *FORMATS, *TAGS))]
    return "".join(
        json.dumps({"id": uid, "prompt": text, "response": text, text: text, "choices": [text]}) + "\n" for uid in uids
    )


@pytest.fixture
def evaluated(place: Place, run: Run) -> Path:
    """An evaluation of a model with a hostile name on hostile prompts, whose answers are hostile too."""
    model, out = place.top / NAME, place.top / ("e" + NAME)
    shutil.copytree(place.student, model)
    (place.top / "prompts.jsonl").write_text(rows_of(TEXT), encoding="utf-8")
    settings = ("data.max_prompt_tokens=40", "data.over_long=drop", "data.broken=skip", "data.max_broken=9")
    outcome = run("evaluate", model, "--config", place.config, "--out", out, *settings)
    assert outcome.code == 0, outcome
    quiet(outcome)
    file = out / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) == len({*ESCAPES, *FORMATS, *TAGS}) and all(row["prompt"] == TEXT for row in rows)
    for number, row in enumerate(rows):
        row["response"] = TEXT + " " * number + str(number)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out


class Tags(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def whole(page: Path) -> None:
    """A page in which no text became a tag."""
    text = page.read_text(encoding="utf-8")
    found = Tags(text)
    assert not {"script", "iframe", "img"} & found.tags and not {"onerror", "onload"} & found.attributes
    assert STEERING.search(text) is None and "&lt;script&gt;alert(1)" in text


def test_no_command_passes_on_what_steers_a_terminal_or_a_page(evaluated: Path, place: Place, run: Run) -> None:
    other = Path(shutil.copytree(evaluated, place.top / "other"))
    rows = [json.loads(line) for line in (other / "samples.jsonl").read_text().split("\n") if line]
    for number, row in enumerate(rows):  # pages show the prompts on which two models are furthest apart
        row["measures"]["rouge_l"] = number / len(rows)
    (other / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arguments in (
        ("report", f"{NAME}={evaluated}", f"b={other}", "--difference", f"{NAME},b", "--out", place.top / "r"),
        ("compare", f"{NAME}={evaluated}", f"b={other}", "--out", place.top / "c"),
        ("report", evaluated, "--out", place.top / "q"),
        ("compare", evaluated, other),
    ):
        outcome = run(*arguments)
        assert outcome.code == 0, outcome
        quiet(outcome)
    whole(place.top / "r" / "report.html")
    whole(place.top / "c" / "compare.html")


def test_a_judge_that_answers_with_escapes_steers_nothing(evaluated: Path, place: Place, run: Run) -> None:
    pytest.importorskip("httpx2")
    server = Server()
    try:
        server.answer = lambda body: f"{TEXT}\nVerdict: 1"
        other = shutil.copytree(evaluated, place.top / "other")
        outcome = run("judge", evaluated, other, "--url", server.url, "--model", NAME, "--out", place.top / "j")
    finally:
        server.close()
    assert outcome.code == 0, outcome
    quiet(outcome)


def test_a_run_logs_no_escapes(place: Place, run: Run) -> None:
    (place.top / "prompts.jsonl").write_text(rows_of("a b"), encoding="utf-8")
    outcome = run("distill", "--config", place.config, "data.test=null")
    assert outcome.code == 0, outcome
    quiet(outcome)
    for name in ("metrics.jsonl", "run.json", "config.yaml", "report.html"):
        text = (place.top / "out" / "run" / name).read_text(encoding="utf-8")
        assert STEERING.search(text) is None, name


def long_name(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})


ERRORS: dict[str, Callable[[Place, str], tuple[object, ...]]] = {
    "a model's name": lambda place, text: (f"student=x{text}",),
    "a path of rows": lambda place, text: (f"data.train={place.top}/x{text}.jsonl",),
    "a folder of rows": lambda place, text: (f"data.train={place.top}/{text}/x.jsonl",),
    "an unknown setting": lambda place, text: (f"data.x{text}=1",),
    "a value": lambda place, text: (f"data.template=x{text}",),
    "an engine's name": lambda place, text: (f"engine.student=x{text}",),
    "a run's name": lambda place, text: (f"name=x{text}y",),
}


@pytest.mark.parametrize(
    ("where", "text"),
    [*((where, "".join(ESCAPES)) for where in ERRORS), *(("a model's name", text) for text in ESCAPES)],
)
def test_what_the_command_line_or_a_file_names_is_told_without_effect(
    where: str, text: str, place: Place, run: Run
) -> None:
    outcome = run("distill", "--config", place.config, *ERRORS[where](place, text))
    assert outcome.code == 2 and "Traceback" not in outcome.err
    quiet(outcome)


def in_config(folder: Path, text: str) -> None:
    change(folder / "config.json", hidden_size=text)


def in_type(folder: Path, text: str) -> None:
    change(folder / "config.json", model_type=text)


def in_index(folder: Path, text: str) -> None:
    change(folder / "model.safetensors.index.json", weight_map={"w": text}, metadata={})


def in_tokenizer(folder: Path, text: str) -> None:
    change(folder / "tokenizer_config.json", eos_token=[text])


def in_attention(folder: Path, text: str) -> None:
    change(folder / "config.json", attn_implementation=text)


def in_names(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / f"{text.replace('/', '')}.bin").write_bytes(b"")


@pytest.mark.parametrize("plant", [in_config, in_type, in_index, in_tokenizer, in_attention, in_names])
def test_what_stands_in_a_model_folder_is_told_without_effect(
    plant: Callable[[Path, str], None], place: Place, run: Run
) -> None:
    plant(place.student, "".join(ESCAPES))
    refused(run("distill", "--config", place.config), "ModelError")


def test_names_of_weights_are_told_without_effect(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """A weight that a model has not is left out and told, by a name that anybody may have chosen."""
    long_name(place.student, "".join(ESCAPES))
    card = Card(name="it", model=str(place.student))
    load(card, inspect(card), seed=0)
    told = capfd.readouterr().err
    assert "left out 1 weights" in told and STEERING.search(told.replace("\r", "", 0)) is None


@pytest.mark.parametrize("kind", [MinillmError, *MinillmError.__subclasses__()])
def test_no_error_of_ours_shows_an_escape(kind: type[MinillmError]) -> None:
    assert STEERING.search(str(kind(TEXT))) is None
    assert "\\x1b[2J" in str(kind(TEXT)) and "\n" in str(kind("a\nb"))


def test_ordinary_text_of_any_script_is_shown_as_it_is() -> None:
    text = "Größe\n\t鱼 שלום 🙂 ﬁ 𝛂 a < b {} %s"
    assert visible(text) == text == str(MinillmError(text))


def test_control_without_the_guards_a_name_does_steer(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (errors, model_files):
        monkeypatch.setattr(module, "visible", lambda text: text)
    monkeypatch.setattr("minillm.cli.visible", lambda text: text)
    in_names(place.student, "\x1b[2J")
    assert "\x1b[2J" in run("distill", "--config", place.config).err


def test_control_without_escaping_a_page_holds_the_script(
    place: Place, evaluated: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_parts, "safe", str)
    monkeypatch.setattr("minillm.report_samples.safe", str, raising=False)
    assert run("report", evaluated, "--out", place.top / "r").code == 0
    assert "script" in Tags((place.top / "r" / "report.html").read_text(encoding="utf-8")).tags


@pytest.mark.parametrize("text", FORMATS)
def test_a_format_is_text_in_a_table_and_beside_a_bar(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terminal libraries have a language of their own in brackets."""
    print_table(text, ("", text), [(text, text)], below=[(text, text)])
    assert capsys.readouterr().out.count(text) == 6
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    bar = Progress(text, total=1)
    assert bar._bar is not None
    bar.advance(1, {})
    bar.say(text)
    bar.close()
    assert text in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
