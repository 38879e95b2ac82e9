"""Any transformers causal LM as one root module {backbone, head}, read safely from a folder, a hub name or a card.

Legend: B rows, L positions in the attention mask, S new positions, N tokens, H hidden width, V real ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache

from minillm.cache import growing_cache
from minillm.cards import BuildSpec, Card
from minillm.errors import ModelError, PositionsExceeded, did_you_mean
from minillm.hub import asked_once
from minillm.model_files import few, in_short, require_safe_folder
from minillm.packing import Reads, pack
from minillm.scoring import HeadWeights, token_statistics
from minillm.token_loss import Task, TileLoss, token_loss

Packs = Literal["no", "positions", "mask"]
"""What tells the rows of a line apart: nothing (they are padded instead), their positions, or a mask for attention."""


class Head(nn.Module):
    """Owns the output weight (tied to the embedding or not) and turns hidden states into numbers, all tiles in one
    forward.

    Under ZeRO-3 a weight is whole only while the module that owns it runs, so everything that multiplies by it is in
    here.
    """

    def __init__(self, projection: nn.Linear, *, real_ids: int, scale: float, softcap: float | None) -> None:
        super().__init__()
        self.weight = projection.weight
        self.bias = projection.bias
        self.real_ids = real_ids
        """Rows from here on are padding of the matrix: cut off before every softmax (design D9)."""
        self.scale = scale
        self.softcap = softcap

    def weights(self) -> HeadWeights:
        """The rows of real ids, as views; under ZeRO-3 only valid while they are gathered."""
        bias = None if self.bias is None else self.bias[: self.real_ids]
        return HeadWeights(weight_VH=self.weight[: self.real_ids], bias_V=bias, scale=self.scale, softcap=self.softcap)

    def forward(self, hidden_NH: Tensor, **asked: Any) -> Any:
        """Logits [N, V] of real ids; with ``task`` and ``loss`` what ``token_loss`` gives; with ``taken_N`` and
        ``wanted`` the numbers of ``scoring.token_statistics``."""
        if not asked:
            return self.weights().logits(hidden_NH)
        if "loss" in asked:
            return token_loss(hidden_NH, head=self.weights(), **asked)
        return token_statistics(hidden_NH, head=self.weights(), **asked)


class CausalLM(nn.Module):
    """Root module {backbone, head}. Every use is one call with a mode, so that engine hooks see each of them (design
    D2)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.backbone: nn.Module = model.base_model
        self.packs: Packs = "no"
        """How whole rows are read end to end in lines (``packing``), if they are: set by ``probes.probe_packing``."""
        config = model.config
        text = config.get_text_config()
        self.reads = Reads(hidden=int(text.hidden_size), positions=getattr(text, "max_position_embeddings", None))
        """What decides how wide lines of packed rows are."""
        self.head = Head(
            model.get_output_embeddings(),
            real_ids=model.get_output_embeddings().weight.shape[0],
            scale=float(getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def forward(self, mode: str, **inputs: Any) -> Any:
        """``extend``: (hidden, cache). ``read``: hidden states of whole rows. ``logits``: [N, V]. ``statistics``: dict
        of [N] from hidden states. ``train``: (loss, dict of [N]) from ids."""
        if mode == "extend":
            return self._extend(**inputs)
        if mode == "read":
            return self._read(**inputs)
        if mode == "train":
            return self._train(**inputs)
        assert mode in {"logits", "statistics"}, mode
        return self.head(**inputs)

    def _extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        cache = growing_cache() if cache is None else cache
        position_BL = (mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)
        output = self.backbone(
            input_ids=ids_BS,
            attention_mask=mask_BL.long(),
            position_ids=position_BL[:, -ids_BS.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state, output.past_key_values

    def _read(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        hidden_NH = self._states(ids_BL, mask_BL, mask_BL)
        hidden_BLH = hidden_NH.new_zeros(*mask_BL.shape, hidden_NH.shape[1])
        hidden_BLH[mask_BL] = hidden_NH
        return hidden_BLH

    def _states(self, ids_BL: Tensor, mask_BL: Tensor, wanted_BL: Tensor) -> Tensor:
        """Final hidden states [N, H] of the wanted tokens, row by row, without a cache."""
        if self.packs == "no":
            output = self.backbone(
                input_ids=ids_BL,
                attention_mask=mask_BL.long(),
                position_ids=(mask_BL.long().cumsum(dim=1) - 1).clamp(min=0),
                use_cache=False,
            )
            states_NH: Tensor = output.last_hidden_state[wanted_BL]
            return states_NH
        packed = pack(ids_BL, mask_BL, reads=self.reads)
        # Without an attention mask transformers finds the sequences of a line by their positions.
        mask_R1WW = packed.mask_R1WW() if self.packs == "mask" else None
        output = self.backbone(
            input_ids=packed.ids_RW, attention_mask=mask_R1WW, position_ids=packed.position_RW, use_cache=False
        )
        return packed.of_rows(output.last_hidden_state, wanted_BL)

    def _train(
        self,
        *,
        ids_BL: Tensor,
        mask_BL: Tensor,
        predict_BL: Tensor,
        loss: TileLoss,
        **task: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``token_loss`` for the tokens at the columns where ``predict_BL`` is true (column 0 never is)."""
        # The state before a token predicts it.
        before_BL = predict_BL.roll(-1, dims=1)
        hidden_NH = self._states(ids_BL, mask_BL, before_BL)
        result: tuple[Tensor, dict[str, Tensor]] = self.head(
            hidden_NH, task=Task(taken_N=ids_BL[predict_BL], **task), loss=loss
        )
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What can be known of a model before its weights are read."""

    name: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig | None
    positions: int | None
    """Longest sequence it has positions for; None where the architecture sets no limit."""

    def require_positions(
        self,
        wanted: int,
        *,
        what: str,
        of: str = "prompt + response",
        lower: str = "data.max_prompt_tokens or decoding.max_new_tokens",
    ) -> None:
        """Raise ``PositionsExceeded`` if a sequence of ``wanted`` tokens does not fit."""
        if self.positions is not None and wanted > self.positions:
            raise PositionsExceeded(
                f"{what} {self.name} has {self.positions} positions; {of} may be {wanted} tokens.\n"
                f"  lower {lower} by {wanted - self.positions} in all"
            )


def inspect(card: Card) -> ModelFacts:
    """Configuration and tokenizer of a card's model, without its weights; ``ModelError`` where it cannot be read
    safely."""
    if card.build is not None:
        tokenizer = _load_tokenizer(card.build.tokenizer, revision=None)
        config = _build_config(card.build, tokenizer)
        generation = None
    else:
        assert card.model is not None
        tokenizer, config, generation = _read_pretrained(card.model, revision=card.revision)
    positions = getattr(config, "max_position_embeddings", None)
    return ModelFacts(name=card.name, config=config, tokenizer=tokenizer, generation=generation, positions=positions)


def load(card: Card, facts: ModelFacts, *, seed: int, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in ``dtype`` (the card's by default): safetensors only, no remote code; built from its card with
    ``seed`` if it has no weights."""
    dtype = dtype or getattr(torch, card.dtype)
    if card.build is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built: PreTrainedModel = AutoModelForCausalLM.from_config(facts.config, dtype=dtype)
        return built
    with contextlib.nullcontext() if Path(str(card.model)).exists() else asked_once(), quiet_transformers():
        model: PreTrainedModel
        model, found = _hub_call(
            AutoModelForCausalLM.from_pretrained,
            card.model,
            revision=card.revision,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _require_all_weights(str(card.model), type(model).__name__, found)
    return model


def _require_all_weights(name: str, kind: str, found: dict[str, Any]) -> None:
    """Raise ``ModelError`` where files lack a weight or hold it in another shape: transformers would fill it with
    random numbers and go on."""
    if other := sorted(found["mismatched_keys"]):
        key, got, wanted = other[0]
        raise ModelError(
            f"{name}: {len(other):,} weights do not fit config.json: {key} is {list(got)}, wanted {list(wanted)}.\n"
            "  config and weights are of different models; fetch or write the folder again"
        )
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{name}: {len(missing):,} of the weights of a {kind} are not in its files: {few(missing)}.\n"
            "  they are of another architecture, or not all there; fetch or write the folder again"
        )
    if (spare := sorted(found["unexpected_keys"])) and os.environ.get("RANK", "0") == "0":
        print(f"note: {name}: left out {len(spare):,} weights that a {kind} has not: {few(spare)}", file=sys.stderr)


def fingerprint(card: Card) -> str:
    """Names what a card loads: SHA-256 of a folder's safetensors and JSON files (read once), or hub name and
    revision."""
    folder = Path(card.model or "")
    if card.model is None or not folder.is_dir():
        return f"{card.model or card.name}@{card.revision}"
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.json"))):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


class ModelReader:
    """A ``reading.Reader`` over a root module, or over anything that is called as one (an engine)."""

    def __init__(self, root: Any, *, device: torch.device, lockstep: bool) -> None:
        self._root = root
        self.device = device
        self.lockstep = lockstep

    @torch.no_grad()
    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Reads S more tokens after those in the cache; hidden states [B, S, H] and the longer cache."""
        hidden, cache = self._root("extend", ids_BS=ids_BS, mask_BL=mask_BL, cache=cache)
        return hidden, cache

    @torch.no_grad()
    def read(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Hidden states [B, L, H] of whole rows, 0 off the mask; nothing is kept to go on from."""
        hidden_BLH: Tensor = self._root("read", ids_BL=ids_BL, mask_BL=mask_BL)
        return hidden_BLH

    @torch.no_grad()
    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] over real ids, fp32 (float64 if the hidden states are), before temperature."""
        logits: Tensor = self._root("logits", hidden_NH=hidden_NH)
        return logits

    @torch.no_grad()
    def statistics(self, hidden_NH: Tensor, **arguments: Any) -> dict[str, Tensor]:
        """``scoring.token_statistics`` with this model's head."""
        values: dict[str, Tensor] = self._root("statistics", hidden_NH=hidden_NH, **arguments)
        return values

    def select_rows(self, cache: Cache, index: Tensor) -> Cache:
        """The cache with only these rows, in this order."""
        cache.batch_select_indices(index)
        return cache


def names_a_folder(name: str) -> bool:
    """Whether no model of the hub could be called so."""
    return name.count("/") > 1 or name.startswith(("/", ".", "~"))


def _read_pretrained(
    name: str, *, revision: str | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig, GenerationConfig | None]:
    """Everything of a model but its weights; those of a folder are looked at without being read."""
    local = Path(name).exists()
    if local:
        require_safe_folder(Path(name))
    elif names_a_folder(name):
        raise ModelError(f"{name}: there is no such folder.\n  if an earlier run makes it, finish that run first")
    generation = None
    with contextlib.nullcontext() if local else asked_once(), quiet_transformers():
        tokenizer = _load_tokenizer(name, revision=revision)
        config = _hub_call(AutoConfig.from_pretrained, name, revision=revision)
        try:
            generation = GenerationConfig.from_pretrained(name, revision=revision or "main")
        except OSError as error:
            if (Path(name) / "generation_config.json").exists():
                raise ModelError(f"{name}: generation_config.json cannot be read: {in_short(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "vocab_size", None) is None:
        raise ModelError(
            f"{name}: a {config.model_type!r} is not a causal language model of text.\n"
            "  wanted one that AutoModelForCausalLM opens, such as gpt2, opt, llama or qwen2"
        )
    return tokenizer, config, generation


def _load_tokenizer(name: str, *, revision: str | None) -> PreTrainedTokenizerBase:
    if name == "world":
        from minillm.world import build_tokenizer

        return build_tokenizer()
    tokenizer: PreTrainedTokenizerBase = _hub_call(AutoTokenizer.from_pretrained, name, revision=revision)
    return tokenizer


def _hub_call(function: Any, name: Any, **options: Any) -> Any:
    """``from_pretrained`` with its errors told in two lines. Remote code stays off: nothing here can switch it on."""
    try:
        return function(name, trust_remote_code=False, **options)
    # Its readers of JSON, tokenizers, tensors and the network raise what they like, a bare Exception among it.
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name}: transformers cannot load it: it brings Python code of its own, and minillm runs none of it.\n"
                "  wanted an architecture that transformers itself has, such as gpt2, opt, llama or qwen2"
            ) from error
        raise ModelError(
            f"{name}: transformers cannot load it: {in_short(error)}\n"
            "  wanted a model folder or a reachable hub name, with safetensors"
        ) from error


def _build_config(build: BuildSpec, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    rows = build.vocabulary or len(tokenizer)
    if rows < len(tokenizer):
        raise ModelError(
            f"build.vocabulary is {rows:,}, and tokenizer {build.tokenizer!r} has {len(tokenizer):,} ids.\n"
            "  leave it out, or give every id a row"
        )
    ids = {
        "vocab_size": rows,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    default = AutoConfig.for_model(build.architecture)
    known = {*default.to_dict(), *default.attribute_map, "rope_theta"}
    # transformers keeps a misspelt name as one more attribute and builds the default size.
    if unknown := sorted(build.config.keys() - known):
        raise ModelError(
            f"build.config of a {build.architecture}: no field {unknown[0]!r}{did_you_mean(unknown[0], known)}"
        )
    try:
        return AutoConfig.for_model(build.architecture, **{**ids, **build.config})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"build.config of a {build.architecture}: {in_short(error)}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars and tables of weights, one of each for each rank."""
    from transformers.utils import logging as transformers_logging

    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
