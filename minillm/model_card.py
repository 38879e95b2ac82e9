"""The README.md of a published student: what it is, what it was made from, and what it scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What the card of a student says. ``unbiased`` is the sentence of design D1, or "" for a stage without one."""

    name: str
    stage: str
    start: str
    teacher: str | None
    teacher_parameters: int | None
    parameters: int
    data_source: str
    data_rows: int
    data_sha256: str
    unbiased: str
    config_text: str
    versions: Mapping[str, str]
    licence_notes: str
    corpus: str = ""
    """Source, size and hash of what the language-model loss learnt from, if it has a corpus of its own."""


def render(facts: CardFacts, scores: Mapping[str, float], *, step: int) -> str:
    """Markdown; ``scores`` are the validation measures of the published weights, at ``step``."""
    lines = ["---", "library_name: transformers", "tags: [distillation, minillm]", "---", "", f"# {facts.name}", ""]
    if facts.teacher is None:
        lines.append(
            f"A language model of {facts.parameters:,} parameters, trained with minillm (stage `{facts.stage}`)."
        )
    else:
        size = f" ({facts.teacher_parameters:,} parameters)" if facts.teacher_parameters else ""
        lines.append(
            f"A language model of {facts.parameters:,} parameters, trained with minillm (stage `{facts.stage}`); "
            f"its teacher in this run is `{facts.teacher}`{size}."
        )
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("student"), AutoTokenizer.from_pretrained("student")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| started from | `{facts.start}` |",
        f"| training data | `{facts.data_source}`, {facts.data_rows:,} rows used, sha256 `{facts.data_sha256}` |",
    ]
    if facts.corpus:
        lines.append(f"| language-model loss on | {facts.corpus} |")
    lines.append(f"| weights of step | {step:,} |")
    if facts.unbiased:
        lines.append(f"| gradient unbiased | {facts.unbiased} |")
    if facts.licence_notes:
        lines.append(f"| licence notes | {facts.licence_notes} |")
    lines.append(f"| versions | {', '.join(f'{name} {version}' for name, version in facts.versions.items())} |")
    if scores:
        lines += ["", "## Scores on the validation prompts", "", "| measure | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in scores.items()]
    lines += ["", "## Settings of the run", "", "```yaml", facts.config_text.rstrip(), "```", ""]
    return "\n".join(lines)
