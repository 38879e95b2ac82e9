"""The README.md of a published student: what it is, what it was made from, and what it scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minillm.rows import counted


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
    adapter: str = ""
    """The adapter that is merged into the weights, if they learnt by one."""


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
    if facts.adapter:
        lines.append(f"| learnt by an adapter | {facts.adapter} |")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeFacts:
    """What the card of a merged model says. Of a folder its name and its ``weights_sha256``."""

    name: str
    parameters: int
    start: tuple[str, str]
    models: tuple[tuple[str, str], ...]
    method: str
    weights: tuple[float, ...]
    eta: float
    angles: str
    groups: int
    edges: int
    """In how many groups there were no directions to go by."""
    words: str = ""
    """A paragraph of who merged it."""


def render_merge(facts: MergeFacts) -> str:
    """Markdown."""
    lines = ["---", "library_name: transformers", "tags: [merge, minillm]", "---", "", f"# {facts.name}", ""]
    lines.append(
        f"A language model of {facts.parameters:,} parameters: {len(facts.models)} that were trained from one start, "
        "merged with minillm. `merge.json` has norms and angles of each layer group, `angles.png` their histogram."
    )
    lines += ["", facts.words] if facts.words else []
    lines += ["", "| | |", "|---|---|", f"| start | `{facts.start[0]}`, weights_sha256 `{facts.start[1]}` |"]
    for (folder, weights), weight in zip(facts.models, facts.weights, strict=True):
        lines.append(f"| merged, weight {weight:.4g} | `{folder}`, weights_sha256 `{weights}` |")
    lines.append(f"| method | {facts.method} of task vectors, layer group by layer group |")
    lines.append(f"| eta | {facts.eta:g} of the way from the start (0) to what was merged (1) |")
    lines.append(f"| {counted(facts.groups, 'layer group')} | {facts.angles} |")
    if facts.edges:
        lines.append(
            f"| merged on a line | {counted(facts.edges, 'group')}: a task vector is zero, or two have one direction |"
        )
    return "\n".join([*lines, ""])
