"""The student as an ordinary transformers folder, which any program opens without minillm."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from minillm.adapter_files import FOLDER, KeptAdapter
from minillm.loading import quiet_transformers
from minillm.meta_models import meta_model
from minillm.models import CausalLM
from minillm.store import replaced_folder, told_as_disk_error, write_text
from minillm.types import Decoding


def publish_student(
    folder: Path,
    *,
    state: Mapping[str, Tensor],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    real_ids: int,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
    card: str,
    adapter: KeptAdapter | None = None,
) -> str:
    """Writes an ordinary transformers folder: safetensors, tokenizer, generation config, README.md (the model card).
    Comes back with its ``weights_sha256``.

    Head and embedding rows beyond ``real_ids`` are cut off, so that plain transformers samples from the distribution
    that was trained (design D9). The folder appears under its name only when it is whole; ``DiskError`` where it cannot
    be written, with the one before as it was. ``adapter`` is what was trained on weights that are merged with it in
    ``state``: it stands in a folder of its own within.
    """
    # Made without storage, then given the real tensors: an initialisation would draw from the global random stream.
    model: Any = meta_model(config)
    with torch.device("meta"):
        root = CausalLM(model)
    wanted = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    assert wanted == set(state), sorted(wanted ^ set(state))[:5]
    root.load_state_dict(dict(state), assign=True, strict=False)
    projection = model.get_output_embeddings()
    projection.weight, projection.bias = root.head.weight, root.head.bias
    model.tie_weights()
    if model.get_input_embeddings().weight.shape[0] != real_ids:
        with torch.random.fork_rng(devices=[]):  # it initialises the smaller matrix before it copies into it
            model.resize_token_embeddings(real_ids, mean_resizing=False)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=decoding.temperature,
        top_k=decoding.top_k,
        top_p=decoding.top_p,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size or None,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=list(eos_ids) if len(eos_ids) > 1 else eos_ids[0],
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    size = sum(parameter.nbytes for parameter in model.parameters())
    with told_as_disk_error(f"{folder}: a student of {size:,} bytes"), replaced_folder(folder) as staging:
        with quiet_transformers():
            model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_text(staging / "README.md", card)
        if adapter is not None:
            adapter.write(staging / FOLDER)
    return weights_sha256(folder)


def weights_sha256(folder: Path) -> str:
    """Of model.safetensors in a student's folder (of its parts one after the other, where it was too long for one
    file) and then of its adapter's, where it has one; "" where there is none."""
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob(f"{FOLDER}/*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest() if files else ""
