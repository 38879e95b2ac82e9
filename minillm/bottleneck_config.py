"""Settings of a student that learns by bottleneck adapters beside its MLPs, its own weights frozen."""

from __future__ import annotations

from typing import ClassVar

from minillm.settings import Count, Settings


class BottleneckConfig(Settings):
    """A small MLP in parallel to that of each block (Houlsby et al. 2019; in parallel: He et al. 2022), of the same
    form and activation, the block's own frozen."""

    SECTION: ClassVar[str] = "bottleneck"
    """Its name in a run's settings."""

    size: Count = 64
    """Hidden units of the small MLP: by so many the merged student's MLPs are wider than those of its start."""
