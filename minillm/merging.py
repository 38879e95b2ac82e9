"""A model with an adapter merged into its weights, as an ordinary folder."""

from __future__ import annotations

from pathlib import Path

import torch

from minillm.adaptation import kept_adapter
from minillm.cards import known_names, load_card
from minillm.errors import DataError, ModelError
from minillm.loading import inspect, load, quiet_transformers
from minillm.store import make_folder, replaced_folder, told_as_disk_error


def merge_adapter(base: str, adapter: str | Path, out: Path) -> int:
    """Writes the model ``base`` (a card, a folder or a hub name) with an adapter merged into it; how many layers that
    changed.

    In the precision that the model itself is in, as peft writes it. Raises ``ModelError`` for an adapter that is of
    another model, or of a kind that is not merged; ``DataError`` where ``out`` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} holds something already; nothing was touched.\n  give another --out")
    # A card by this name may be a teacher's or a student's; of folders and hub names the kind says nothing.
    teachers, students = (known_names(kind, suffix=".yaml") for kind in ("teachers", "students"))
    card = load_card(base, kind="students" if base in students and base not in teachers else "teachers")
    if card.quantise is not None:
        raise ModelError(
            f"{card.name}: its card says 'quantise: {card.quantise}', and an adapter cannot be added to weights in 8 "
            "bits.\n  name the model itself, or a card without it"
        )
    if not card.as_in_files:
        raise ModelError(
            f"{card.name}: its card says 'build', 'adapter' or 'layers'; wanted a model as it stands in files.\n"
            "  name the model itself"
        )
    card = card.model_copy(update={"adapter": str(adapter)})
    facts = inspect(card)
    own = getattr(facts.config, "dtype", None)
    model = load(card, facts, seed=0, dtype=own if isinstance(own, torch.dtype) else torch.float32)
    make_folder(out, setting="--out")
    size = sum(parameter.nbytes for parameter in model.parameters())
    with told_as_disk_error(f"{out}: a model of {size:,} bytes"), replaced_folder(out) as staging, quiet_transformers():
        model.save_pretrained(staging)
        facts.tokenizer.save_pretrained(staging)
    return kept_adapter(Path(adapter)).changes
