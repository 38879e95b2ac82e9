"""What pages are built of: the frame with its policy and its links, sections, tables, drawings and their legend.

Whatever is handed over as text is cleaned and escaped here; what is handed over as content is on the page as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from minillm import plots
from minillm.own_files import generator
from minillm.report_style import STYLE
from minillm.report_text import DASH, figure, interval, safe


def frame(title: str, content: str, *, style: str = "", made_by: str = "") -> str:
    """A whole page around content that is safe already: heading, links to its sections, the content; ``style`` is added
    to the report's, and ``made_by`` says which command wrote it, which is how that knows it again."""
    # No default-src exception for scripts or images: a tag that slipped through would still do nothing.
    told = f"{generator(made_by)}\n" if made_by else ""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n{told}<title>{safe(title)}</title>\n'
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{safe(title)}</h1>{_contents(content)}</header>\n"
        f"{_numbered(content)}\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, content: str) -> str:
    """A part of the page; "" where there is nothing in it."""
    return f"<section><h2>{safe(heading)}</h2>{content}</section>" if content else ""


SECTION = re.compile(r"<section><h2>(.*?)</h2>", flags=re.DOTALL)
"""How each section starts. Strangers' text is escaped, so nothing else does."""


def _numbered(body: str) -> str:
    """The body with an id for each of its sections."""
    numbers = count(1)
    return SECTION.sub(lambda found: f'<section id="part-{next(numbers)}"><h2>{found[1]}</h2>', body)


def _contents(body: str) -> str:
    """Links to the sections; "" where there are not two of them."""
    links = [f'<a href="#part-{n}">{heading}</a>' for n, heading in enumerate(SECTION.findall(body), start=1)]
    return f'<nav aria-label="sections">{"".join(links)}</nav>' if len(links) > 1 else ""


def legend(names: Sequence[str], colour: Mapping[str, int]) -> str:
    """The names with the marks that they have in the plots."""
    marks = {name: f"k{colour[name] % plots.COLOURS}{' again' * (colour[name] >= plots.COLOURS)}" for name in names}
    items = (f'<li><i class="{mark}"></i>{safe(name)}</li>' for name, mark in marks.items())
    return f'<ul class="legend">{"".join(items)}</ul>'


def grid(drawings: Sequence[str]) -> str:
    """Drawings side by side, as many as there is room for."""
    return f'<div class="plots">{"".join(f"<figure>{drawing}</figure>" for drawing in drawings)}</div>'


def scrolling(rows: str) -> str:
    """A table that scrolls by itself where the page is too narrow for it."""
    # Focusable, so that a keyboard can scroll it too.
    return f'<div class="wide" tabindex="0"><table>{rows}</table></div>'


MANY = 9
"""A table of more columns is set smaller on paper, which does not scroll."""


def head_row(cells: Sequence[str], *, words: int | None = None) -> str:
    """The head of a table; ``words`` is the number of a column that holds words, none by default."""
    heads = (
        f'<th scope="col"{" class=text" if number == words else ""}><span>{safe(cell)}</span></th>'
        for number, cell in enumerate(cells)
    )
    kind = ' class="many"' if len(cells) > MANY else ""
    return f"<thead{kind}><tr>{''.join(heads)}</tr></thead>"


def estimate_cell(estimate: Mapping[str, Any] | None, name: str) -> str:
    """A figure with its interval below it; a dash where there is none."""
    if estimate is None or estimate.get("mean") is None:
        return f"<td>{DASH}</td>"
    ends = "" if estimate.get("ci95") is None else f"<small>{interval(estimate, name)}</small>"
    return f"<td>{figure(estimate['mean'], name)}{ends}</td>"
