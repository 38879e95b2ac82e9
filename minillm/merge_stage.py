"""The settings of a stage that trains nothing: several students of one start become one."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from minillm.errors import ConfigError, UnsupportedCombination
from minillm.settings import NonNegative, Share, Text
from minillm.stage_base import NamedStage


class MergeStage(NamedStage):
    """Merges what several stages learnt since their common start (WARP, arXiv 2406.16768; docs/methods/warp.md)."""

    kind: Literal["merge"] = "merge"
    """Says which kind of stage this is."""
    name: Text = "merge"
    """Names the stage in folders and logs; different from the other stages' names."""
    start: Text
    """What all of them started from: the name of an earlier stage, or 'student' for the run's own."""
    of: tuple[Text, ...]
    """Names of the stages whose students are merged, two or more, in the order in which 'slerp' takes them."""
    method: Literal["slerp", "nlerp", "lerp"] = "slerp"
    """How: along the sphere, layer by layer and one after the other, as in the paper; the same without an order; or
    the mean."""
    weights: tuple[NonNegative, ...] | None = None
    """How much each of them counts, from 0, beside the others; all alike where null."""
    eta: Share = 0.3
    """How far from the start towards the merged student, 0 to 1: the paper's 0.3; 1 is the merged student itself."""

    @model_validator(mode="after")
    def _check_merge(self) -> Self:
        if len(self.of) < 2:
            raise ConfigError(f"of: got {list(self.of)}, wanted the names of two stages or more")
        if len(set(self.of)) < len(self.of):
            raise ConfigError(f"of: got {list(self.of)}, wanted each stage once; use weights to count one more")
        if self.eta == 0:
            raise UnsupportedCombination("eta 0: the merged student would be the start again; set eta above 0")
        if self.weights is None:
            return self
        if len(self.weights) != len(self.of):
            raise ConfigError(f"weights: got {len(self.weights)}, wanted one for each of the {len(self.of)} in 'of'")
        if not any(self.weights):
            raise ConfigError("weights: all 0, wanted one above 0 at least")
        return self
