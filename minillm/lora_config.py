"""Settings of a student that learns by a low-rank adapter, its own weights frozen."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from minillm.errors import ConfigError
from minillm.settings import Count, Positive, Settings, ShareBelowOne, Text


class LoraConfig(Settings):
    """LoRA (Hu et al. 2021): beside each adapted matrix W a product B A of rank ``rank``, W frozen. Defaults are the
    official ones."""

    SECTION: ClassVar[str] = "lora"
    """Its name in a run's settings."""

    rank: Count = 8
    """Rank of an adapter's two matrices; official 8."""
    alpha: Positive = 32.0
    """What an adapter adds is B A times alpha / rank; official 32."""
    dropout: ShareBelowOne = 0.1
    """Share of an adapter's inputs that is dropped in training, in stages that have dropout; official 0.1."""
    targets: tuple[Text, ...] | None = None
    """Names of the linear layers that get an adapter, such as [q_proj, v_proj]; all of the blocks where not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.targets is not None and (not self.targets or len(set(self.targets)) < len(self.targets)):
            raise ConfigError(f"targets: got {list(self.targets)}, wanted one name or more, each once")
        return self
