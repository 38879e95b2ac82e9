"""The command on models before there is a run: the cards that are there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from minillm.figures import PAPER_ROWS

if TYPE_CHECKING:
    from minillm.cards import Card, Kind


def cards(
    name: Annotated[str | None, typer.Argument(help="A card, as teachers/gpt2-xl; all in a table without one.")] = None,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Training rows, by which epochs become steps.")
    ] = PAPER_ROWS,
) -> None:
    """List the cards of teachers and students, or show one.

    Of a student with published settings also the stages of a run that follow them, to be copied. Batches in them are of
    all ranks together, so they do not change with the number of GPUs.

    \b
    Example:
      minillm cards students/gpt2 --rows 12000
    """
    from minillm.cards import load_card

    if name is None:
        _table("teachers")
        _table("students")
        return
    _show(load_card(name, kind="students"), rows=rows)


def _table(kind: Kind) -> None:
    from minillm.cards import known_names, load_card
    from minillm.terminal import print_table

    found = [load_card(name, kind=kind) for name in known_names(kind, suffix=".yaml")]
    columns = [
        "",
        "parameters",
        "layers",
        "hidden",
        "template",
        *(["placement"] if kind == "teachers" else []),
        "terms",
    ]
    lines = []
    for card in found:
        sizes = card.figures
        many = f"{sizes.parameters / 1e9:.2f} B" if sizes.parameters else ""
        line = [card.name, many, *(str(size or "") for size in (sizes.layers, sizes.hidden)), card.template or ""]
        line += [*([card.placement] if kind == "teachers" else []), re.split("[;,(]", card.licence)[0].strip()]
        lines.append(line)
    print_table(
        f"{kind.capitalize()} (minillm cards {kind}/NAME shows one)",
        columns,
        lines,
        spare=["terms", "template", "hidden"],
    )


def _show(card: Card, *, rows: int) -> None:
    from minillm.figures import stages_yaml

    print(f"name: {card.name}")
    told = card.model_dump(mode="json", exclude={"name", "training", "figures"}, exclude_none=True)
    for field, value in told.items():
        print(f"{field}: {value}")
    print("figures:")
    for field, value in card.figures.model_dump(exclude_none=True).items():
        print(f"  {field}: {value:,}" if type(value) is int else f"  {field}: {str(value).lower()}")
    if card.training is not None:
        print("\n# for the YAML file of a run; micro_batch is for the published GPUs and changes memory only")
        print(stages_yaml(card.training, rows=rows))
