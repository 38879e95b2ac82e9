"""Prompt text from a row: ``plain``, ``alpaca`` or the tokenizer's own ``chat`` template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from minillm.errors import DataError
from minillm.model_files import in_short
from minillm.records import Row, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["plain", "alpaca", "chat"]
RESPONSE_HEADER = "### Response:\n"
# The two templates of Stanford Alpaca, with the one newline after the response header that MiniLLM's data has.
_ALPACA_HEAD = "Below is an instruction that describes a task"
_ALPACA_TASK = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
ALPACA_PLAIN = f"{_ALPACA_HEAD}. {_ALPACA_TASK}{RESPONSE_HEADER}"
ALPACA_INPUT = (
    f"{_ALPACA_HEAD}, paired with an input that provides further context. {_ALPACA_TASK}"
    f"### Input:\n{{input}}\n\n{RESPONSE_HEADER}"
)


def is_blank(row: Row) -> bool:
    """Whether the user wrote nothing but white space; a template around nothing is still nothing to answer."""
    if row.messages:
        return not row.messages[-1][1].strip()
    return not (
        f"{row.instruction or ''}{row.input}".strip() if row.instruction is not None else row.prompt or ""
    ).strip()


def raw_text(row: Row) -> str:
    """All that a row has before its response, before any template: a part a line."""
    parts = (row.prompt or "", row.instruction or "", row.input, *(content for _, content in row.messages))
    return "\n".join(part for part in parts if part)


def render(row: Row, *, template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the model reads before it answers.

    ``plain`` is the prompt as it stands, or instruction and input with a blank line between. Raises
    ``DataError`` where the row and the template do not fit together. A row with both ``instruction``
    and ``prompt`` is rendered from the instruction.
    """
    if template == "chat":
        return _chat(row, tokenizer)
    if row.messages:
        raise DataError(
            f"row {shown(row.uid)} holds messages, and template {template!r} reads none\n  set template: chat"
        )
    return _plain(row) if template == "plain" else _alpaca(row)


def _plain(row: Row) -> str:
    if row.instruction is None:
        return row.prompt or ""
    return "\n\n".join(part for part in (row.instruction, row.input) if part.strip())


def _alpaca(row: Row) -> str:
    instruction = row.prompt or "" if row.instruction is None else row.instruction
    if row.instruction is None and RESPONSE_HEADER.strip() in instruction:
        raise DataError(
            f"row {shown(row.uid)} has a prompt in the Alpaca form already; template 'alpaca' would wrap it twice\n"
            "  set template: plain, or give the rows an 'instruction' field"
        )
    # replace, not format: the user's own braces are text, and a '{input}' in the instruction stays as it is.
    if not row.input.strip():
        return ALPACA_PLAIN.replace("{instruction}", instruction)
    before, after = ALPACA_INPUT.split("{input}")
    return before.replace("{instruction}", instruction) + row.input + after


def _chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"template 'chat' needs a chat template, and tokenizer {shown(tokenizer.name_or_path)} has none\n"
            "  set template: plain or template: alpaca, or use an instruction-tuned model's tokenizer"
        )
    turns = row.messages or (("user", _plain(row)),)
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template is a program of the model folder's, in jinja's sandbox: it may divide by zero or want all memory.
    except Exception as error:
        raise DataError(
            f"row {shown(row.uid)}: the tokenizer's chat template refuses the messages "
            f"({', '.join(shown(role) for role, _ in turns)}): {in_short(error)}\n  mend the roles of the row"
        ) from error
    assert isinstance(text, str)
    return text
