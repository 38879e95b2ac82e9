"""A model's configuration from its card alone: sizes without weights or a network."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from minillm.cards import Card
from minillm.errors import ModelError
from minillm.loading import inspect, names_a_folder, no_folder
from minillm.model_files import in_short


def config_of(card: Card) -> PreTrainedConfig:
    """The configuration of a card's model, offline: from its figures, from how it is built, or from its folder.

    Raises ``ModelError`` where the card says too little, or its folder cannot be read.
    """
    if card.figures.complete:
        figures = card.figures
        return AutoConfig.for_model(str(figures.architecture), **figures.config_fields())
    if card.build is not None:
        return inspect(card).config
    folder = Path(str(card.model))
    if (folder / "config.json").is_file():
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder}/config.json: {in_short(error)}") from error
        return config
    if names_a_folder(str(card.model)) and not folder.exists():
        raise no_folder(str(card.model), card=card.name)
    raise ModelError(
        f"{card.name}: its sizes are not known without a download: the card has no figures with an architecture, and "
        f"{card.model} is no folder here.\n"
        "  write the model's sizes under 'figures:' as teachers/qwen2.5-7b.yaml does, or name a model folder"
    )
