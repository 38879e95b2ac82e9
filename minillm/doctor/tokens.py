"""Checks of what models read and write: token ids, rows of heads, chat templates, tokens that begin and end text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from minillm.doctor.findings import Finding, error, note, of_error, ok, warning
from minillm.doctor.patient import Model, Patient
from minillm.errors import ModelError, VocabularyMismatch
from minillm.vocabulary import PROBES, agree, agree_on_chat, check_heads, eos_ids, real_ids

ANSWER = "minillmanswer"
"""Stands for an answer where a chat template is looked at: no template has such a word of its own."""
LOOKED_AT = 200
"""Training rows whose beginning is looked at."""


def tokenizer_ids(patient: Patient) -> Iterator[Finding]:
    """Whether student and teacher mean the same by every id."""
    if patient.student is None or patient.teacher is None:
        return
    count = agree(patient.teacher.facts.tokenizer, patient.student.facts.tokenizer)
    yield ok(
        "tokenizer-ids", f"{count:,} token ids, the special tokens and {len(PROBES)} probe texts are the same in both"
    )


def vocabulary_rows(patient: Patient) -> Iterator[Finding]:
    """Rows of a head without a token, and tokens without a row."""
    for model in patient.models:
        rows, real = model.facts.config.vocab_size, real_ids(model.facts.tokenizer)
        try:
            check_heads(real_ids=real, teacher_rows=rows, student_rows=rows)
        except VocabularyMismatch:
            yield error(
                "vocabulary-rows",
                f"{model.words}: {rows:,} rows in its head, and {real:,} token ids: {rows} to {real - 1} have no row",
                why="its tokenizer got tokens that the model was never given; a row with one of them cannot be read",
                mend="use the tokenizer that it was trained with, or resize the model and train it again",
            )
            continue
        if rows > real:
            yield note(
                "vocabulary-rows",
                f"{model.words}: {rows:,} rows in its head for {real:,} token ids; {rows - real:,} rows are padding",
                why="they are masked and both distributions renormalised; a published student has them cut off",
            )
        else:
            yield ok("vocabulary-rows", f"{model.words}: {rows:,} rows in its head, one for each token id")


def chat_template(patient: Patient) -> Iterator[Finding]:
    """Whether both wrap a conversation in the same text, where the run asks for it."""
    has = {model.role: bool(model.facts.tokenizer.chat_template) for model in patient.models}
    if patient.config.data.template != "chat":
        if all(has.values()):
            yield note(
                "chat-template",
                f"the models bring a chat template, and data.template is '{patient.config.data.template}'",
                why="a model that was tuned for chat answers best in its own form",
                mend="set data.template: chat, unless another form is meant",
            )
        return
    if not has["student"]:
        yield error(
            "chat-template",
            "data.template is 'chat', and the student's tokenizer has no chat template",
            why="prompts are wrapped by the student's template",
            mend="give it the teacher's tokenizer, or set data.template: plain or alpaca",
        )
        return
    if patient.teacher is None or patient.student is None:
        yield ok("chat-template", "the student has one")
        return
    if not has["teacher"]:
        yield warning(
            "chat-template",
            "the teacher's tokenizer has no chat template",
            why="the teacher is asked in the student's form, for which it may not have been made",
            mend="take a teacher that was tuned for chat, or set data.template: plain or alpaca",
        )
        return
    teacher, student = patient.teacher.facts.tokenizer, patient.student.facts.tokenizer
    agree_on_chat(teacher, student)
    if teacher.chat_template != student.chat_template:
        yield note(
            "chat-template",
            "the two chat templates differ, and wrap the same conversations in the same text",
            why="conversations with parts that were not tried (tools, reasoning) may come out different",
        )
    else:
        yield ok("chat-template", "the same in both, byte by byte")


def end_tokens(patient: Patient) -> Iterator[Finding]:
    """Which tokens end a response, by the tokenizer and by generation_config.json; the pad."""
    for model in patient.models:
        tokenizer = model.facts.tokenizer
        try:
            ends = eos_ids(tokenizer, model.facts.generation)
        except ModelError as raised:
            yield of_error("end-tokens", raised, why="without it no response would end")
            continue
        own = tokenizer.eos_token_id
        told = _listed(None if model.facts.generation is None else model.facts.generation.eos_token_id)
        if told and own is not None and own not in told:
            yield warning(
                "end-tokens",
                f"{model.words}: its tokenizer ends text with {_named(tokenizer, [own])}, and generation_config.json "
                f"with {_named(tokenizer, told)}",
                why="a response ends at any of them, and references are closed with the tokenizer's",
                mend="keep the one that the model was trained to write: eos_token_id in generation_config.json, or "
                "eos_token in tokenizer_config.json",
            )
        else:
            yield ok("end-tokens", f"{model.words}: a response ends at {_named(tokenizer, ends)}")
        if model.role == "student":
            yield from _pad(model)
    yield from _ends_of_teacher(patient)


def _pad(model: Model) -> Iterator[Finding]:
    tokenizer = model.facts.tokenizer
    if tokenizer.pad_token_id is None:
        found = f"{model.words}: no pad token; rows are filled up with the end-of-text token"
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        found = f"{model.words}: its pad is the end-of-text token"
    else:
        return
    yield note("pad", found, why="nothing is lost here: masks come from lengths, never from ids. Other programs may "
               "pass over the end-of-text token where they train on such a folder")  # fmt: skip


def _ends_of_teacher(patient: Patient) -> Iterator[Finding]:
    """What ends the teacher's text and not the student's: the run uses the student's."""
    if patient.student is None or patient.teacher is None:
        return
    student, teacher = patient.student.facts, patient.teacher.facts
    try:
        missing = sorted(
            set(eos_ids(teacher.tokenizer, teacher.generation)) - set(eos_ids(student.tokenizer, student.generation))
        )
    except ModelError:
        return  # told above
    if missing:
        yield warning(
            "end-of-teacher",
            f"the teacher also ends its text with {_named(teacher.tokenizer, missing)}, which ends no response of this "
            "run: the student's tokens count",
            why="where the teacher wants to stop, the student goes on, and is judged on what follows",
            mend="put these ids into eos_token_id of the student's generation_config.json",
        )


def turn_end(patient: Patient) -> Iterator[Finding]:
    """Whether what closes a turn in the chat template ends a response."""
    if patient.config.data.template != "chat" or patient.student is None:
        return
    facts = patient.student.facts
    closing = closing_id(facts.tokenizer)
    if closing is None:
        return
    ends = eos_ids(facts.tokenizer, facts.generation)
    shown = _named(facts.tokenizer, [closing])
    if closing not in ends:
        yield warning(
            "turn-end",
            f"the chat template closes an answer with {shown}, and a response ends at {_named(facts.tokenizer, ends)}",
            why="both models learnt to stop at the first: responses run past it, up to decoding.max_new_tokens",
            mend=f"put {closing} into eos_token_id of the student's generation_config.json, or make it the tokenizer's "
            "eos_token",
        )
    elif closing != ends[0] and any(
        patient.config.responses_needed(stage) != "none" for stage in patient.config.trained
    ):
        yield warning(
            "turn-end",
            f"the chat template closes an answer with {shown}, and references are closed with "
            f"{_named(facts.tokenizer, ends[:1])}",
            why="the student learns from references to end as no chat of these models ends",
            mend=f"make {shown} the eos_token of both tokenizers",
        )
    else:
        yield ok("turn-end", f"an answer is closed with {shown}, which ends a response")


def closing_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that a chat template puts behind an answer; None where there is none, or no template."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        ids = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    except Exception:  # a program of the model's folder, see templates.render
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((int(one) for one in ids if one in special), None)


def begin_token(patient: Patient) -> Iterator[Finding]:
    """Whether prompts begin as the model's own tokenizer would begin them."""
    split = patient.splits.get("train") or next(iter(patient.splits.values()))
    rows = [prompt.ids for prompt in islice(split.prompts, LOOKED_AT)]
    for model in patient.models:
        tokenizer = model.facts.tokenizer
        prefix = added_prefix(tokenizer)
        if not prefix:
            continue
        shown, first = _named(tokenizer, prefix), "".join(tokenizer.convert_ids_to_tokens(list(prefix)))
        without = sum(row[: len(prefix)] != prefix for row in rows)
        twice = sum(row[: 2 * len(prefix)] == prefix * 2 for row in rows)
        chat = patient.config.data.template == "chat"
        told = warning if chat else note  # without chat this is how the published recipes train
        if without:
            yield told(
                "begin-token",
                f"{model.words}: its tokenizer puts {shown} before a text, and {without:,} of {len(rows):,} prompts do "
                "not begin with it",
                why="nothing is added to a prompt that the template does not write"
                + ("; a model tuned for chat always read it there" if chat else ", as in MiniLLM's own recipes"),
                mend="take a chat template that writes it"
                if chat
                else f"to train with it, set data.template: plain, and begin the rows' prompts with {first}",
            )
        elif twice:
            yield told(
                "begin-token",
                f"{model.words}: {twice:,} of {len(rows):,} prompts begin with {shown} twice",
                why="the template writes it, and the rows have it too" if chat else "the rows have it so",
                mend="take it out of the rows",
            )
        else:
            yield ok("begin-token", f"{model.words}: prompts begin with {shown}, as its tokenizer would have it")


def added_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that a tokenizer puts before a text by itself."""
    word = next(iter(sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))), "a")
    try:
        bare = list(tokenizer(word, add_special_tokens=False)["input_ids"])
        dressed = list(tokenizer(word)["input_ids"])
    except Exception:  # a closed vocabulary without a token for unknown words
        return ()
    places = range(len(dressed) - len(bare) + 1)
    at = next((place for place in places if dressed[place : place + len(bare)] == bare), 0)
    return tuple(dressed[:at])


def _listed(value: object) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) else [value]  # type: ignore[list-item]


def _named(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(one)!r} (id {one})" for one in ids)
