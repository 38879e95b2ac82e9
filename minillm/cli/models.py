"""The command on models before there is a run: the cards that are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillm.figures import PAPER_ROWS, Figures

if TYPE_CHECKING:
    from minillm.cards import Card, Kind

KINDS: tuple[Kind, ...] = ("students", "teachers")
LONGEST_SHOWN = 100


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

    if name is None:
        _table("teachers")
        _table("students")
        return
    _show(_named(name), rows=rows)


def _named(name: str) -> Card:
    """A card of either kind: as a student's where both have the name."""
    from minillm.cards import find_file, known_names, load_card
    from minillm.errors import ConfigError, did_you_mean

    prefix, slash, rest = name.partition("/")
    chosen: list[Kind] = [kind for kind in KINDS if slash and prefix == kind]
    stem = (rest if chosen else name).removesuffix(".yaml").removesuffix(".yml")
    kinds = chosen or KINDS
    for kind in kinds:
        if find_file(stem, folder=kind, suffix=".yaml") is not None:
            return load_card(name, kind=kind)
    if _is_there(name) or (slash and not chosen):  # a folder, or a name of the hub
        return load_card(name, kind="students")
    near = did_you_mean(stem, [one for kind in kinds for one in known_names(kind, suffix=".yaml")])
    raise ConfigError(
        f"{name[:LONGEST_SHOWN]!r}: no card of that name in {' or '.join(f'{kind}/' for kind in kinds)}{near}\n"
        "  minillm cards lists them"
    )


def _is_there(name: str) -> bool:
    """Whether a name is that of a file or folder that is there."""
    try:
        return Path(name).exists()
    except OSError:
        return False


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
        sizes = _sizes(card)
        many = _many(sizes.parameters) if sizes.parameters else ""
        line = [card.name, many, *(str(size or "") for size in (sizes.layers, sizes.hidden)), card.template or ""]
        line += [*([card.placement] if kind == "teachers" else []), re.split("[;,(]", card.licence)[0].strip()]
        lines.append(line)
    print_table(
        f"{kind.capitalize()} (minillm cards {kind}/NAME shows one)",
        columns,
        lines,
        spare=["terms", "template", "hidden"],
    )


def _many(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.3g} M"


def _sizes(card: Card) -> Figures:
    """The figures of a card; where it has none, those of its folder's config.json, as far as it is there."""
    if card.figures.model_dump(exclude_none=True) or card.model is None:
        return card.figures
    if not _is_there(str(Path(card.model) / "config.json")):
        return card.figures
    from minillm.errors import ModelError
    from minillm.meta_models import count_parameters, meta_model
    from minillm.shapes import config_of

    try:
        config = config_of(card)
        text: Any = config.get_text_config()
        return Figures(
            layers=text.num_hidden_layers, hidden=text.hidden_size, heads=text.num_attention_heads,
            vocabulary=text.vocab_size, positions=getattr(text, "max_position_embeddings", None),
            parameters=count_parameters(meta_model(config)),
        )  # fmt: skip
    except (ModelError, ValueError, AttributeError):  # a folder that is broken is told where it is used
        return card.figures


def _show(card: Card, *, rows: int) -> None:
    from minillm.figures import stages_yaml

    print(f"name: {card.name}")
    told = card.model_dump(mode="json", exclude={"name", "training", "figures"}, exclude_none=True)
    for field, value in told.items():
        if value != "":
            print(f"{field}: {value}")
    sizes = _sizes(card)
    if figures := sizes.model_dump(exclude_none=True):
        print("figures:" if sizes is card.figures else f"figures:  # of {card.model}/config.json")
    for field, value in figures.items():
        print(f"  {field}: {value:,}" if type(value) is int else f"  {field}: {str(value).lower()}")
    if card.training is not None:
        print("\n# for the YAML file of a run; micro_batch is for the published GPUs and changes memory only")
        print(stages_yaml(card.training, rows=rows))
