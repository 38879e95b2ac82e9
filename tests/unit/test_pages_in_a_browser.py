"""Promises, in a real browser: report.html, compare.html and a study's page ask no host for anything, say nothing in
the console, are no wider than a phone, and their filters show what they name.

The browser is chromium, spoken to through a pipe; where there is none the tests are skipped.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from minillm import plots
from minillm.compare.command import compare
from minillm.compare.summary import Options
from minillm.report import combine, write_report
from minillm.report_parts import frame, head_row, scrolling
from minillm.report_samples import text_block
from tests.unit.test_report import evaluation, metrics
from tests.unit.test_study_page import study_text

pytestmark = pytest.mark.pictures

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESK = 390, 1280
PATIENCE = 60.0
"""Seconds until a browser that does not answer fails the test, on a busy machine too."""
LONG = "a_name_without_any_place_to_break_it_" * 3
HOSTILE = "<img src='http://example.org/x.png'><script>console.error(1)</script>"
WORD = "unbroken" * 40
VISIBLE = "[...document.querySelectorAll('{}')].filter(e => e.offsetParent !== null).length"


class Browser:
    """A chromium without a window, its DevTools on two pipes; it can find no host by name or number."""

    def __init__(self, folder: Path) -> None:
        (its_in, commands), (answers, its_out) = os.pipe(), os.pipe()
        # The browser reads from 3 and writes to 4; high copies first, as the pipes may have these numbers now.
        high_in, high_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (its_in, its_out))
        for end in (its_in, its_out):
            os.close(end)
        switches = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
        ]
        switches += ["--remote-debugging-pipe", "--disable-background-networking", "--disable-extensions"]
        switches += [f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND", "about:blank"]
        line = f'exec "$@" 3<&{high_in} 4>&{high_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", line, "browser", str(BROWSER), *switches],
            pass_fds=(high_in, high_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (high_in, high_out):
            os.close(end)
        self.commands, self.answers = commands, answers
        self.read, self.number, self.session, self.width = b"", 0, "", 0
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; what happens meanwhile is added to ``events``."""
        self.number += 1
        asked = {"id": self.number, "method": method, "params": parameters}
        asked |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(asked).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self.events.append(message)

    def message(self) -> dict[str, Any]:
        """The next message, an answer or an event."""
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.read:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self.answers, 1 << 16) if ready else b""
            assert part, "the browser does not answer"
            self.read += part
        first, self.read = self.read.split(b"\0", 1)
        return dict(json.loads(first))

    def show(self, page: Path, *, width: int) -> None:
        """Open a page in a window of this width and wait until it is loaded."""
        narrow = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.width = width
        self.send("Emulation.setDeviceMetricsOverride", **narrow)
        self.events.clear()
        self.send("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def value(self, script: str) -> Any:
        """What a line of script has for a value; the page's policy does not bind the DevTools."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def close(self) -> None:
        os.close(self.commands)
        self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self.answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages, of two models of which one has a long name and answers that cannot be broken."""
    root = tmp_path_factory.mktemp("pages")
    texts = {"prompt": f"{HOSTILE} {WORD}", "response": f"{HOSTILE} {WORD * 9}"}
    folders = {LONG: evaluation(root / "a", skill=0.2, prompts=6, texts=texts)}
    folders["sft"] = evaluation(root / "b", skill=0.9, prompts=6, texts={"prompt": texts["prompt"]})
    report, out = root / "report.html", root / "compared"
    combined = combine(folders, differences=[(LONG, "sft")], resamples=50, seed=0, seconds={LONG: 1.0})
    training = {LONG: metrics(root / "run" / "metrics.jsonl", stage="sft", steps=9)}
    write_report(
        combined, evaluations=folders, training=training, out=report, title=f"Report {LONG}", settings={"a": WORD}
    )
    compare(folders, options=Options(resamples=100), out=out, quiet=True)
    study = root / "study.html"
    study.write_text(study_text(LONG, HOSTILE), encoding="utf-8")
    return {"report": report, "compare": out / "compare.html", "study": study}


def wrong(browser: Browser) -> list[str]:
    """What a page that is shown has against it."""
    found = []
    for event in browser.events:
        told = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("file:", "data:")):
            found.append(f"asks for {told['request']['url']}")
        if event["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            found.append(f"says {told.get('entry', told)}")
    # Not the window as the page sees it: a phone zooms out where a page is too wide, and then it fits.
    wide, window = browser.value("document.documentElement.scrollWidth"), browser.width
    return found + ([f"{wide} wide in {window}"] if wide > window else [])


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["report", "compare", "study"])
def test_a_page_asks_for_nothing_says_nothing_and_fits(
    browser: Browser, pages: Mapping[str, Path], name: str, width: int
) -> None:
    browser.show(pages[name], width=width)
    assert browser.value("document.querySelectorAll('article, tbody tr, figure').length") > 5
    assert wrong(browser) == []
    # Opened, what was folded up fits too.
    browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert wrong(browser) == []


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ("<img src='http://example.org/x.png'>", "asks for http://example.org/x.png"),
        ("<div style='width:2000px'>wide</div>", "2000 wide"),
        ("<div style='width:400px'>a little too wide</div>", "400 wide"),
        ("<script>console.error('loud')</script>", "loud"),
    ],
)
def test_control_a_spoilt_page_is_found_out(browser: Browser, tmp_path: Path, spoil: str, told: str) -> None:
    page = tmp_path / "spoilt.html"
    head = (
        "<!DOCTYPE html><meta name=viewport content='width=device-width, initial-scale=1'><style>body{margin:0}</style>"
    )
    page.write_text(f"{head}<p>x</p>{spoil}", encoding="utf-8")
    browser.show(page, width=PHONE)
    assert any(told in one for one in wrong(browser))


def test_control_the_policy_stops_an_image_and_says_so(
    browser: Browser, pages: Mapping[str, Path], tmp_path: Path
) -> None:
    """A tag that slipped through the escaping: the browser refuses it and complains, and that is found."""
    page = tmp_path / "slipped.html"
    text = pages["report"].read_text(encoding="utf-8")
    page.write_text(text.replace("<main>", "<main><img src='http://example.org/x.png'>", 1), encoding="utf-8")
    browser.show(page, width=PHONE)
    assert any("Content Security Policy" in one for one in wrong(browser))


def test_the_filters_of_the_report_show_what_they_name(browser: Browser, pages: Mapping[str, Path]) -> None:
    browser.show(pages["report"], width=DESK)

    def press(kind: str) -> None:
        browser.value(f"document.querySelector('.show-{kind}').click()")

    def seen(what: str) -> int:
        return int(browser.value(VISIBLE.format(what)))

    assert seen("article.t0") == 6 and seen("article.t1") == 0
    press("t1")
    assert seen("article.t0") == 0 and seen("article.t1") == 6
    press("m1")
    assert seen("article .m0") == 0 and seen("article .m1") == 6
    press("t0")
    good, bad = (browser.value(f"document.querySelectorAll('article.t0.{kind}1').length") for kind in "gb")
    assert good + bad == 6
    for kind, wanted in (("g", good), ("b", bad)):
        press(kind)
        assert seen("article") == seen(f"article.t0.{kind}1") == wanted
        assert seen(".none") == (wanted == 0)
    press("ma")
    assert seen("article") == browser.value("document.querySelectorAll('article.t0.ba').length")


OVERLAPS = """
[...document.querySelectorAll('svg text')].filter(e => /^label/.test(e.textContent))
  .map(e => e.getBoundingClientRect())
  .flatMap((a, n, all) => all.slice(n + 1).filter(
    b => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)).length
"""


@pytest.mark.parametrize("looks", [True, False])
def test_labels_of_close_points_do_not_lie_on_each_other(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: bool
) -> None:
    """The control: a placing that does not look where the others are."""
    if not looks:
        monkeypatch.setattr(plots, "_meet", lambda one, other: False)
    x, y = (0.2, 0.5, 0.8), (0.3, 0.6, 0.4)
    close = [
        plots.Series(colour=n, x=tuple(v + 0.01 * n for v in x), y=y, labels=("label 1", "label 2", "label 3"))
        for n in range(2)
    ]
    drawn = plots.lines(close, key="k", title="close", x="", y="")
    page = tmp_path / "labels.html"
    page.write_text(frame("labels", f"<div style='width: 22rem'>{drawn}</div>"), encoding="utf-8")
    browser.show(page, width=PHONE)
    assert (browser.value(OVERLAPS) == 0) is looks


def test_what_rounds_to_zero_has_no_sign_beside_its_bar() -> None:
    drawn = plots.bars([("m", 0, -0.0001, None), ("n", 1, -0.5, None)], key="k", title="t", digits=3)
    assert ">0.000<" in drawn and "-0.000" not in drawn and "\N{MINUS SIGN}0.500" in drawn


def test_large_numbers_at_an_axis_are_short() -> None:
    series = [plots.Series(colour=0, x=(20_000.0, 160_000.0), y=(1.0, 2.0))]
    assert ">100k<" in plots.lines(series, key="k", title="t", x="tokens", y="")


def test_series_beyond_the_colours_look_different() -> None:
    """A line of its own, and its mark hollow; the first eight are drawn as ever."""
    first, ninth = (plots.Series(colour=n, x=(1.0, 2.0), y=(1.0, 2.0)) for n in (0, plots.COLOURS))
    plain, again = (plots.lines([one], key="k", title="t", x="", y="") for one in (first, ninth))
    assert "stroke-dasharray" not in plain and "stroke-dasharray" in again
    assert "fill: var(--c0)" in plain and "fill: var(--c0)" not in again


def test_a_difference_has_its_sign_its_stars_and_a_line_at_zero() -> None:
    rows = [("sure", 0, 0.25, (0.1, 0.4), "**"), ("pale", 1, -0.5, (-1.2, 0.2), ""), ("bare", 2, 0.0, None, "")]
    drawn = plots.differences(rows, key="k", title="t", digits=2)
    assert ">+0.25**<" in drawn and ">\N{MINUS SIGN}0.50<" in drawn and ">0.00<" in drawn
    assert drawn.count("stroke-opacity: 0.5") == 2 and "stroke-dasharray" in drawn


def test_a_long_answer_has_a_box_of_its_own_and_stays_text() -> None:
    assert 'class="long" tabindex="0"' in text_block("word " * 400)
    assert "long" not in text_block("word " * 20)
    assert "&lt;b&gt;" in text_block("<b>" * 400) and "<b>" not in text_block("<b>" * 400)


PAPER = 718
"""Width of an A4 page between the margins of a browser."""
PALE = """
[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length && !e.closest('svg') &&
  [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).filter(e => {
  const [r, g, b] = getComputedStyle(e).color.match(/[0-9.]+/g).map(Number);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 150; }).map(e => e.outerHTML.slice(0, 80))
"""


@pytest.fixture
def printing(browser: Browser) -> Iterator[Browser]:
    """The browser as a reader's with a dark system prints."""
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.send("Emulation.setEmulatedMedia", media="print", features=dark)
    yield browser
    browser.send("Emulation.setEmulatedMedia", media="", features=[])


@pytest.mark.parametrize("name", ["report", "compare", "study"])
def test_a_page_is_printed_whole_and_dark_on_white(printing: Browser, pages: Mapping[str, Path], name: str) -> None:
    printing.show(pages[name], width=PAPER)
    assert [one for one in wrong(printing) if "wide in" in one] == []
    assert printing.value(PALE) == []
    assert printing.value("getComputedStyle(document.documentElement).colorScheme") == "light"
    breaks = "[...document.querySelectorAll('{}')].every(e => getComputedStyle(e).{} === 'avoid')"
    for what, where in (("figure, article, .legend", "breakInside"), ("h2, h3, tr.part, .legend", "breakAfter")):
        assert printing.value(breaks.format(what, where)), what


def test_control_a_page_that_prints_as_the_screen_has_it_is_found_out(
    printing: Browser, pages: Mapping[str, Path], tmp_path: Path
) -> None:
    page, text = tmp_path / "screen.html", pages["study"].read_text(encoding="utf-8")
    for before, after in (("@media screen and (prefers", "@media (prefers"), ("@media print", "@media speech")):
        assert before in text
        text = text.replace(before, after)
    page.write_text(text, encoding="utf-8")
    printing.show(page, width=PAPER)
    assert printing.value(PALE) != []
    assert printing.value("getComputedStyle(document.querySelector('figure')).breakInside") == "auto"


@pytest.mark.parametrize("breaks", [True, False])
def test_a_table_of_many_models_is_not_cut_by_the_paper(printing: Browser, tmp_path: Path, breaks: bool) -> None:
    """Eight models and seven differences. The control: names that do not break."""
    names = [f"model_{n}_with_a_long_name" for n in range(8)]
    cells = "".join("<td>0.817<small>0.725 to 0.883</small></td>" for _ in (*names, *names[1:]))
    heads = head_row(["", *names, *(f"{name} less {names[0]}, paired" for name in names[1:])])
    row = f'<tr class="told"><th scope="row">{names[0]}</th>{cells}</tr>'
    page = tmp_path / "wide.html"
    text = frame("wide", scrolling(heads + row))
    page.write_text(text if breaks else text.replace("overflow-wrap: anywhere", ""), encoding="utf-8")
    printing.show(page, width=PAPER)
    assert (printing.value("document.documentElement.scrollWidth") <= PAPER) is breaks
