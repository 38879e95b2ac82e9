"""minillm: small language models that behave like big ones, by MiniLLM-style distillation under DeepSpeed.

from minillm import distill, evaluate, load_config

config = load_config("recipes/quickstart/minillm.yaml", ["seed=3"])
folder = distill(config)                                          # runs/NAME: student/, results.json, report.html
results = evaluate(folder / "student", config, out="evaluation")  # on the configuration's test prompts
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from minillm.api import build_report, cache_teacher, distill, evaluate, generate, make_pairs
    from minillm.config import RunConfig, dump_config, load_config
    from minillm.liti_front import merge_front
    from minillm.merge_models import merge_folders

__all__ = [
    "RunConfig", "__version__", "build_report", "cache_teacher", "distill", "dump_config", "evaluate", "generate",
    "load_config", "make_pairs", "merge_folders", "merge_front",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Late, so that `import minillm` and `minillm --help` do not wait for torch and transformers.
    if name in {"RunConfig", "dump_config", "load_config"}:
        from minillm import config

        return getattr(config, name)
    if name == "build_report":
        from minillm import report

        return report.build_report
    if name == "merge_folders":
        from minillm import merge_models

        return merge_models.merge_folders
    if name == "merge_front":
        from minillm import liti_front

        return liti_front.merge_front
    if name in {"cache_teacher", "distill", "evaluate", "generate", "make_pairs"}:
        from minillm import api

        return getattr(api, name)
    raise AttributeError(f"module 'minillm' has no attribute {name!r}")
