"""A model folder looked at before anything in it is loaded: whole files, no pickles, and errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minillm.errors import ModelError, visible
from minillm.manifests import parsed

SHOWN = 3
LONGEST_REASON = 300
"""Characters of another library's message that ours quotes."""
LORA_RECORD, BOTTLENECK_RECORD = "adapter_config.json", "bottleneck.json"
"""Files by which a folder is an adapter's: peft's, and our own."""
_TEMPLATES = "additional_chat_templates"
"""The only folder in a model's from which transformers reads."""
_AGAIN = "\n  it is damaged, or its copying was broken off; fetch or write it again"


def adapter_record(folder: Path) -> str:
    """The file by which a folder is an adapter's; "" where it has none."""
    return next((name for name in (LORA_RECORD, BOTTLENECK_RECORD) if (folder / name).exists()), "")


def require_safe_folder(folder: Path) -> None:
    """Raise ``ModelError`` unless the folder has a config and whole safetensors files, by their headers."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no config.json in it.\n"
            "  give a folder that transformers' save_pretrained wrote, a card name, or a hub name"
        )
    require_own_files(folder)
    if record := adapter_record(folder):
        raise ModelError(
            f"{folder}: holds an adapter ({record}), which names a model elsewhere to be put on.\n"
            "  name both in a card (model: BASE, adapter: FOLDER), or merge it: minillm merge-adapter BASE FOLDER "
            "--out NEW"
        )
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        if (folder / name).exists():
            _json_object(folder / name)
    weights = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if not weights:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        found = f"only pickled weights ({few(pickles)})" if pickles else "no weights"
        raise ModelError(
            f"{folder}: {found}; wanted *.safetensors, because a pickle runs code when it is read.\n"
            "  convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = _json_object(index).get("weight_map")
        named = {str(part) for part in parts.values()} if isinstance(parts, dict) else set()
        if absent := sorted(named - {file.name for file in weights}):
            raise ModelError(f"{folder}: {index.name} names {few(absent)}, not there.\n  fetch or write it again")
    for file in weights:
        try:  # the header alone, which also says how long the file must be
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a whole safetensors file: {in_short(error)}{_AGAIN}") from error


def require_own_files(folder: Path) -> None:
    """Raise ``ModelError`` for a link that leads out of the folder: a copied folder could otherwise show a reader's own
    files in what is published from it. The hub's cache keeps files of all revisions beside its snapshots."""
    root = folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in sorted((*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*"))):
        if path.is_symlink() and not any(_leads_into(path, home) for home in homes):
            raise ModelError(
                f"{path}: a link that leads out of the model's folder.\n"
                "  put what it leads to in its place, or name the folder that it leads to"
            )


def _leads_into(link: Path, home: Path) -> bool:
    try:
        return link.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # links in a ring
        return False


def few(names: list[str]) -> str:
    """The first few names, and how many more there are; they are out of files."""
    return visible(", ".join(names[:SHOWN])) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def in_short(error: Exception) -> str:
    """What another library says went wrong, on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "…"


def _json_object(file: Path) -> dict[str, Any]:
    try:
        found = parsed(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{file}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}{_AGAIN}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {in_short(error)}{_AGAIN}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: holds a {type(found).__name__}, wanted a JSON object{_AGAIN}")
    return found
