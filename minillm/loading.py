"""Transformers models read safely from a folder, a hub name or a card: what is known before, weights, fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
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
from transformers.utils.import_utils import is_flash_attn_2_available
from transformers.utils.peft_utils import find_adapter_config_file

from minillm.adaptation import kept_adapter
from minillm.adapter_files import require_base
from minillm.cards import UNKNOWN_REVISION, BuildSpec, Card
from minillm.errors import ModelError, PositionsExceeded, did_you_mean
from minillm.hub import asked_once
from minillm.model_files import few, in_short, require_safe_folder
from minillm.picked_layers import keep_layers, picked_config


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
        tokenizer, config, generation = _read_pretrained(card.model, revision=card.revision, card=card.name)
        if card.adapter is not None:
            bare = card.model_copy(update={"adapter": None, "layers": None})
            adapter = kept_adapter(Path(card.adapter))
            require_base(adapter, card.model, weights=lambda: fingerprint(bare))
            config = adapter.merged_config(config, name=card.model)
        if card.layers is not None:
            config = picked_config(config, card.layers, name=card.name)
    _require_special_tokens(card, tokenizer)
    _require_known_code(card.name, config)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{card.name}: its weights are quantised already (quantization_config in config.json), and minillm can "
            "neither train nor shard, merge or publish such.\n"
            "  name the model that it was made from; to keep a teacher's layers in 8 bits write 'quantise: int8' in "
            "its card"
        )
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
            **_quantised(card),
        )
    _require_all_weights(str(card.model), type(model).__name__, found)
    if card.adapter is not None:
        kept_adapter(Path(card.adapter)).merge_into(model, name=str(card.model))
    if card.layers is not None:
        keep_layers(model, facts.config, card.layers, name=card.name)
    return model


def _quantised(card: Card) -> dict[str, Any]:
    """What ``from_pretrained`` is told of a card that keeps its layers in 8 bits: made on the device that computes."""
    if card.quantise is None:
        return {}
    from transformers import BitsAndBytesConfig

    # bitsandbytes says at every product of 32-bit inputs that it makes it in 16 bits; docs/placement.md says it once.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    where = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": where}}


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


def fingerprint(card: Card, *, seed: int = 0) -> str:
    """Names the weights that a card loads.

    Of a folder: SHA-256 of its safetensors and JSON files, read once. Of a model that is built: SHA-256 of how, and of
    ``seed`` (a teacher's is 0). Of a hub model: its name and the commit that stands in the cache, known without the
    network once the model was looked at; before that ``UNKNOWN_REVISION``, which is equal to nothing
    (``cards.may_differ``). Weights that are kept in 8 bits are others: ``int8:`` stands before.
    """
    if card.quantise is not None:
        return f"{card.quantise}:{fingerprint(card.model_copy(update={'quantise': None}), seed=seed)}"
    if card.build is not None:
        built = {"build": card.build.model_dump(mode="json"), "dtype": card.dtype, "seed": seed}
        return hashlib.sha256(json.dumps(built, sort_keys=True).encode()).hexdigest()
    name = str(card.model)
    if Path(name).is_dir():
        return by_name(card)
    return _changed(card, f"{name}@{_commit_in_cache(name, card.revision) or card.revision or UNKNOWN_REVISION}")


def by_name(card: Card) -> str:
    """The same, of a hub model and of one that is built only the name and revision that the card has: for records that
    hold the rest of the card beside it, and may not depend on what was downloaded (the cells of a study)."""
    folder = Path(card.model or "")
    if card.model is None or not folder.is_dir():
        return _changed(card, f"{card.model or card.name}@{card.revision}")
    return _changed(card, _folder_sha256(folder))


def _changed(card: Card, weights: str) -> str:
    """The weights with what the card changes of them as they are loaded."""
    if card.adapter is not None:
        weights = f"adapter {_folder_sha256(Path(card.adapter))} on {weights}"
    return weights if card.layers is None else f"layers {','.join(map(str, card.layers))} of {weights}"


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.json"))):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _commit_in_cache(name: str, revision: str | None) -> str | None:
    """The commit that ``from_pretrained`` reads offline; None where the cache has none."""
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def names_a_folder(name: str) -> bool:
    """Whether no model of the hub could be called so."""
    return name.count("/") > 1 or name.startswith(("/", ".", "~"))


def no_folder(name: str, *, card: str) -> ModelError:
    """The error of a card whose folder is not there."""
    return ModelError(
        f"{name}: there is no such folder; 'model' of the card {card} names it.\n"
        f"  if an earlier run makes it, finish that run first; otherwise mend the path in the card"
        f"{'' if Path(name).is_absolute() else f' (it is looked up from {Path.cwd()})'}"
    )


def _read_pretrained(
    name: str, *, revision: str | None, card: str
) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig, GenerationConfig | None]:
    """Everything of a model but its weights; those of a folder are looked at without being read."""
    local = Path(name).exists()
    if local:
        require_safe_folder(Path(name))
    elif names_a_folder(name):
        raise no_folder(name, card=card)
    generation = None
    with contextlib.nullcontext() if local else asked_once(), quiet_transformers():
        tokenizer = _load_tokenizer(name, revision=revision)
        config = _hub_call(AutoConfig.from_pretrained, name, revision=revision)
        if not local and find_adapter_config_file(name, revision=revision) is not None:
            # With peft installed transformers puts it on by itself, from pickled weights too.
            raise ModelError(
                f"{name}: holds an adapter beside a model, and which of the two is meant is not said.\n"
                "  fetch the one that you want into a folder, and name that"
            )
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


def _require_special_tokens(card: Card, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ``ModelError`` where the tokenizer's end or padding is not what the card says."""
    for what, wanted, got in (("eos", card.eos, tokenizer.eos_token), ("pad", card.pad, tokenizer.pad_token)):
        if wanted is not None and got != wanted:
            raise ModelError(
                f"{card.name}: the card says {what} {wanted!r}, and the tokenizer has {got!r}.\n"
                "  the model is not the one that the card was written for; look at its revision, or mend the card"
            )


def _require_known_code(name: str, config: PreTrainedConfig) -> None:
    """Raise ``ModelError`` where a configuration asks for code that transformers would fetch.

    It takes some names of attention, and of mixtures of experts, for repositories of compiled code, and runs them where
    the package ``kernels`` is installed; FlashAttention too where its own package is not.
    """
    flash = {"flash_attention_2"} if is_flash_attn_2_available() else set()
    known = {"attn": {"eager", "sdpa", "flex_attention"} | flash, "experts": {"eager", "grouped_mm", "batched_mm"}}
    for part in (config, *(getattr(config, field, None) for field in config.sub_configs)):
        for what, names in known.items():
            wanted = getattr(part, f"_{what}_implementation", None)
            if wanted is not None and wanted not in names:
                raise ModelError(
                    f"{name}: {what}_implementation {wanted!r} in its configuration may be code from elsewhere, and "
                    f"minillm runs none of it.\n  take it out; wanted nothing, or one of {', '.join(sorted(names))}"
                )


def _load_tokenizer(name: str, *, revision: str | None) -> PreTrainedTokenizerBase:
    if name == "world":
        from minillm.world import build_tokenizer

        return build_tokenizer()
    tokenizer = _hub_call(AutoTokenizer.from_pretrained, name, revision=revision)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # some classes hold two, for models that are two
        raise ModelError(
            f"{name}: tokenizer_config.json names a {type(tokenizer).__name__}, which is no tokenizer of one text\n"
            "  use the tokenizer that the model was trained with"
        )
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
