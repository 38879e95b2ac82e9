"""The records that travel from one stage of the data flow to the next.

Data flows one way: ``Prompts -> Rollout -> Scored -> Targets -> loss``. Each record is frozen, made once, and
never written to afterwards. Every response-side tensor is ``[B, T]`` and column ``t`` belongs to the token
*predicted* there: column 0 is the first token of the response.

Legend: B sequences, P prompt positions (left-padded), T response positions (right-padded), H hidden width,
V real vocabulary ids, C bytes of packed vocabulary (V / 8, rounded up). ``logq`` is the student, ``logp`` the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from minillm.errors import ShapeMismatch


class Stop(StrEnum):
    """Why a response ended. ``LENGTH`` is our decision, the others the model's."""

    EOS = "eos"
    LENGTH = "length"
    EMPTY = "empty"
    """The first sampled token was EOS: one kept token, no text."""


class Purpose(StrEnum):
    """What a uniform number is drawn for; part of its key, so that no two purposes share one."""

    TOKEN = "token"
    COIN = "coin"
    VALIDATION = "validation"
    EVALUATION = "evaluation"
    GENERATION = "generation"
    EXPOSURE = "exposure"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as a user wrote it, after the template and the tokenizer.

    Example: ``Prompt(uid="gsm8k-7", text="2+2=", ids=(17, 10, 17, 28), responses=("4",))``.
    """

    uid: str
    """Names the row in its file; the key of its random numbers and of its log line."""
    text: str
    """The prompt after templating, as the model reads it."""
    ids: tuple[int, ...]
    """Token ids of ``text``; never empty."""
    responses: tuple[str, ...] = ()
    """Reference answers. Training takes the first; ROUGE-L the best of all."""
    response_ids: tuple[int, ...] = ()
    """Token ids of the first reference with the closing EOS, or () where there is none."""
    choices: tuple[str, ...] = ()
    """Answers to choose from, the first reference among them; () for a prompt that is answered freely."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Other string fields of the row (family, topic, answer), passed through to samples.jsonl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """A prompt and two responses to it, one of which is preferred."""

    prompt: Prompt
    """Without responses of its own; its uid is the pair's."""
    chosen: str
    rejected: str
    chosen_ids: tuple[int, ...]
    """Token ids of the preferred response with the closing EOS."""
    rejected_ids: tuple[int, ...]
    source: str = ""
    """Name of the source that it stands in, where ``data.preferences`` names several."""
    teacher_logps: tuple[float, float] | None = None
    """What the teacher that made the pair gives to each response, chosen first: its log-probability in nats, summed
    over the tokens, EOS included; None for pairs from elsewhere."""


class Example(Protocol):
    """What a language-model loss needs of a row: a ``Prompt`` with a response, or a ``corpus.Block``."""

    @property
    def uid(self) -> str:
        """Names the row."""

    @property
    def ids(self) -> tuple[int, ...]:
        """What is read only; never empty."""

    @property
    def response_ids(self) -> tuple[int, ...]:
        """What is learnt."""


class Examples(Protocol):
    """Rows in an order, each made when it is asked for if need be."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def __iter__(self) -> Iterator[Example]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ids:
    """The special ids that batches and rollouts need."""

    eos: tuple[int, ...]
    """Each of them ends a response; the first is the one that training puts there."""
    pad: int
    """Fills batches; may be a real token, so nothing is ever concluded from it (D8)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How text is drawn: the same record for rollouts, validation and evaluation (design D12)."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k likeliest ids of the student; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of ids that holds this share of the student's mass; 1 keeps all."""
    no_repeat_ngram_size: int = 0
    """Never complete an n-gram of so many ids that stands in prompt or response already; 0 allows all."""
    repetition_penalty: float = 1.0
    """Makes ids that stand in prompt or response less likely, of both models; 1 leaves them."""

    @property
    def looks_back(self) -> bool:
        """Whether a row's past has a say in its next id other than through the models."""
        return self.no_repeat_ngram_size > 0 or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawKey:
    """The run-wide part of every random key; with a row's uid, sample index and position it is whole (D3)."""

    seed: int
    stage: str
    purpose: Purpose
    rollout: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Prompts side by side, left-padded. ``mask_BP`` comes from lengths, never from ids (D8)."""

    uid_B: tuple[str, ...]
    sample_B: tuple[int, ...]
    """Which sample of its prompt a row is: 0 .. G-1."""
    ids_BP: Tensor
    mask_BP: Tensor

    def __post_init__(self) -> None:
        require_shape("prompt mask", self.mask_BP, tuple(self.ids_BP.shape))
        require_shape("sample indices", self.sample_B, (len(self.uid_B),))
        require_shape("prompt rows", self.ids_BP[:, 0], (len(self.uid_B),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Responses as sampled, before anyone has judged them.

    Example: prompt "2+2=" with response " 4<eos>" gives T = 2, mask [True, True], ``Stop.EOS``.
    """

    prompts: PromptBatch
    response_BT: Tensor
    """int64; off the mask the value is the pad id and means nothing."""
    mask_BT: Tensor
    """True on every sampled token, the closing EOS included. Made once, by the sampler, from lengths."""
    stop_B: tuple[Stop, ...]
    teacher_drew_BT: Tensor
    """True where the coin fell on the teacher: the token is the teacher's choice, not the student's."""
    logq_BT: Tensor
    """Student's log-prob of each token at sampling time, after penalty, temperature and truncation; 0 off the mask."""
    student_hidden_BTH: Tensor | None
    """Final hidden state from which each token was predicted, as sampled; None if not asked for."""
    teacher_hidden_BTH: Tensor | None
    """The same of the teacher; None until a teacher has read the row."""
    support_BTC: Tensor | None
    """Bit-packed kept ids under top-k, top-p or an n-gram ban (``sampling.pack_support``); None where all are kept."""
    policy_step: int
    """Optimiser step of the weights that sampled it."""
    teacher_forwards: int = 0
    """How many times the teacher ran while sampling, the final read included."""
    repetition_penalty: float = 1.0
    """What it was drawn under; scoring knows nothing of a row's past, so it refuses any other than 1."""

    def __post_init__(self) -> None:
        shape = tuple(self.response_BT.shape)
        require_shape("response mask", self.mask_BT, shape)
        require_shape("teacher's draws", self.teacher_drew_BT, shape)
        require_shape("sampled log-probs", self.logq_BT, shape)
        require_shape("stop reasons", self.stop_B, shape[:1])
        require_shape("prompts of the responses", self.prompts.uid_B, shape[:1])

    @property
    def length_B(self) -> Tensor:
        """Kept tokens per row, the closing EOS included."""
        return self.mask_BT.sum(dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorScores:
    """What a third model, to which the student is held, says about each sampled token. 0 off the mask."""

    logp_BT: Tensor
    kl_BT: Tensor
    """KL(student || anchor) over the vocabulary at the state before each token, nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What teacher and student say about each sampled token. Nothing here carries a gradient; 0 off the mask."""

    rollout: Rollout
    logq_BT: Tensor
    logp_BT: Tensor
    reverse_kl_BT: Tensor
    """KL(student || teacher) over the vocabulary at the state before each token, nats."""
    entropy_BT: Tensor
    """Student's entropy at the same state, nats."""
    forward_kl_BT: Tensor | None = None
    """KL(teacher || student) over the vocabulary at the same state, nats; None where nobody asked."""
    anchor: AnchorScores | None = None
    """What the anchor says of the same tokens; None in a stage without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the objective needs beside the model: detached credit per token. 0 off the mask."""

    scored: Scored
    advantage_BT: Tensor
    importance_BT: Tensor
    """Weight of each token's policy-gradient term; 1 when the student sampled alone."""
    single_weight_BT: Tensor | None = None
    """Weight of the single-step term at each token; None where it is 1 throughout."""


def require_shape(what: str, value: Tensor | tuple[object, ...], wanted: tuple[int, ...]) -> None:
    """Raise ``ShapeMismatch`` unless ``value`` (a tensor, or a tuple taken as one axis) has the wanted shape."""
    got = tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
    if got != tuple(wanted):
        raise ShapeMismatch(what, got, tuple(wanted))
