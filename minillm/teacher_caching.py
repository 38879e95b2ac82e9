"""Has a teacher read the reference responses of a run once, and keeps what it says (``teacher_cache``).

Ranks share the reading and rank 0 writes, so the teacher may be whole or sharded. Arrays are filled in place as batches
come in, in a folder that takes its name when it is whole: memory holds a batch, and a reader never sees half a cache.

Legend: B rows, L positions, n tokens of a tile, N tokens of all ranks, V real ids, H hidden width, K kept ids,
J = K + 1 with the bucket.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.batches import example_batch
from minillm.config import RunConfig
from minillm.divergences import kept_and_rest
from minillm.errors import ConfigError, DataError, NonFinite, visible
from minillm.kept import Kept
from minillm.loading import fingerprint
from minillm.manifests import sha256_of
from minillm.micro_batches import Limits, alike
from minillm.pairs import Pair, check_alone
from minillm.preflight import limits_record, read_split
from minillm.progress import Progress
from minillm.prompt_table import answered
from minillm.prompts import data_hash
from minillm.ranks import Ranks
from minillm.results import versions
from minillm.scoring import WORKING_BYTES, HeadWeights
from minillm.stages import load_teacher
from minillm.store import make_folder, replaced_folder, write_text
from minillm.teacher_cache import (
    FILES,
    IDS,
    LOGP,
    MANIFEST,
    ROWS,
    Asked,
    Manifest,
    Precision,
    TeacherCache,
    differences,
    digest,
    id_kind,
    read_cache,
    read_manifest,
)
from minillm.teacher_engine import Teacher
from minillm.types import Prompt
from minillm.updates import nobody
from minillm.vocabulary import identity

_LINE_BYTES = 100
"""Of the line that names a row: about."""


def cache_teacher(
    teacher: str | Path,
    config: RunConfig,
    *,
    out: str | Path,
    top_k: int,
    precision: Precision = "float16",
    fresh: bool = False,
) -> TeacherCache:
    """Stores the ``top_k`` likeliest ids for each response token of ``data.train``, and the mass of all others.

    ``config`` says which rows and which template; its models are not read. A cache that answers the same question is
    left as it is. Raises ``DataError`` where ``out`` holds anything else, unless ``fresh``, which replaces a cache and
    nothing but a cache.
    """
    out, pair, rows = Path(out), *_read(str(teacher), config, top_k=top_k)
    asked = Asked(
        weights=fingerprint(pair.student_card),
        tokenizer=identity(pair.tokenizer),
        real_ids=pair.real_ids,
        dtype=pair.student_card.dtype,
        source=str(config.data.train),
        data=data_hash(rows),
        template=config.data.template,
        top_k=top_k,
        precision=precision,
    )
    ranks = Ranks(threads=config.threads)
    if _done(out, asked, fresh=fresh):
        _say(ranks, f"{out}: made already; --fresh starts over")
        return read_cache(out)
    ranks.of_first(lambda: make_folder(out.parent, setting="--out"))  # every rank has read what is there
    _require_room(out, rows, asked, ranks=ranks)
    limits = limits_record(config.evaluation)
    model = load_teacher(pair, ranks=ranks, say=lambda line: _say(ranks, line))
    try:
        _write(out, rows, asked, model=model, name=str(teacher), limits=limits, pair=pair, ranks=ranks)
    finally:
        model.close()
    ranks.barrier()
    cache = read_cache(out)
    size = cache.manifest.bytes_per_token
    _say(ranks, f"{out}: {len(rows):,} rows, {cache.manifest.tokens:,} tokens, {size:,.1f} bytes a token")
    return cache


def _read(teacher: str, config: RunConfig, *, top_k: int) -> tuple[Pair, Sequence[Prompt]]:
    """The teacher's facts, and the rows with a response."""
    if config.data.train is None:
        raise DataError("data.train is missing; wanted the rows whose responses the teacher is to read")
    pair = check_alone(config, teacher)
    if not 1 <= top_k <= pair.real_ids:
        raise ConfigError(f"--top-k {top_k}: wanted 1 to {pair.real_ids:,}, the ids of {teacher}")
    limit = config.data.train_limit
    split = read_split(config, config.data.train, pair=pair, name="train", need_response=True, limit=limit)
    return pair, answered(split.prompts)


def _done(out: Path, asked: Asked, *, fresh: bool) -> bool:
    """Whether this very cache is there already; ``DataError`` where something else is that may not be replaced."""
    if not out.exists():
        return False
    manifest = read_manifest(out) if out.is_dir() and not fresh else None
    ours = out.is_dir() and (out / MANIFEST).is_file() and {file.name for file in out.iterdir()} <= {*FILES}
    if not ours and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is there and is no teacher cache; nothing was touched.\n  give another --out")
    if fresh or manifest is None:
        return False
    if differs := differences(manifest.asked, asked):
        raise DataError(
            f"{out} holds another cache (it differs in: {', '.join(differs)}); nothing was touched.\n"
            "  give another --out, or --fresh to replace it"
        )
    read_cache(out)
    return True


def _require_room(out: Path, rows: Sequence[Prompt], asked: Asked, *, ranks: Ranks) -> None:
    """Says how large the cache will be; ``DataError`` on every rank where the first one's disk has less room.

    The files are mapped into memory and grow as they are filled: a full disk would end the process without a word.
    """
    tokens = sum(len(row.response_ids) for row in rows)
    each = sum(kind.itemsize * width for kind, width in _shapes(asked).values())
    need = tokens * each + len(rows) * _LINE_BYTES
    (free,) = ranks.gather_objects([_free(out)] if ranks.first else [])
    if need > free:
        raise DataError(
            f"{out}: needs about {need:,} bytes, and {free:,} are free there; nothing was written\n"
            "  give a smaller --top-k or another --out, or make room"
        )
    _say(ranks, f"{out}: {tokens:,} tokens of {len(rows):,} rows will take about {need:,} bytes")


def _free(out: Path) -> int:
    """Bytes free for a folder, with what a killed call left, which is removed first."""
    left = out.with_name(f".staging-{out.name}")
    return shutil.disk_usage(out.parent).free + sum(512 * file.stat().st_blocks for file in left.glob("*"))


def _shapes(asked: Asked) -> dict[str, tuple[np.dtype[Any], int]]:
    """Number type and width of each file of arrays."""
    return {IDS: (id_kind(asked.real_ids), asked.top_k), LOGP: (np.dtype(asked.precision), asked.top_k + 1)}


def _write(
    out: Path, rows: Sequence[Prompt], asked: Asked, *, model: Teacher, name: str, limits: Limits, pair: Pair,
    ranks: Ranks,
) -> None:  # fmt: skip
    """All files, on rank 0; the other ranks only read."""
    starts = [0, *accumulate(len(row.response_ids) for row in rows)]
    if not ranks.first:
        _fill(None, rows, starts, asked, model=model, limits=limits, pair=pair, ranks=ranks)
        return
    with replaced_folder(out) as staging:
        arrays = [
            np.lib.format.open_memmap(staging / file, mode="w+", dtype=kind, shape=(starts[-1], width))
            for file, (kind, width) in _shapes(asked).items()
        ]
        _fill(arrays, rows, starts, asked, model=model, limits=limits, pair=pair, ranks=ranks)
        for array in arrays:
            array.flush()
        lines = (
            json.dumps({"uid": row.uid, "start": at, "tokens": end - at, "ids": digest(row)}) + "\n"
            for row, (at, end) in zip(rows, pairwise(starts), strict=True)
        )
        write_text(staging / ROWS, "".join(lines))
        size = sum((staging / file).stat().st_size for file in (IDS, LOGP, ROWS))
        manifest = Manifest(
            teacher=name,
            asked=asked,
            rows=len(rows),
            tokens=starts[-1],
            bytes_per_token=round(size / starts[-1], 2),
            sha256={file: sha256_of(staging / file) for file in (IDS, LOGP, ROWS)},
            versions=versions(),
            date=time.strftime("%Y-%m-%d"),
        )
        write_text(staging / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n")


def _fill(
    arrays: Sequence[np.memmap] | None, rows: Sequence[Prompt], starts: Sequence[int], asked: Asked, *, model: Teacher,
    limits: Limits, pair: Pair, ranks: Ranks,
) -> None:  # fmt: skip
    """Reads all rows, those of similar length together, as many at a time as ``limits`` let each rank hold."""
    lengths = [len(row.ids) + len(row.response_ids) for row in rows]
    pieces = list(zip(*alike(lengths, limits=limits, ranks=ranks.size), strict=True))
    bar = Progress(f"cache {pair.student_card.name}", total=len(pieces), unit="batches", shown=ranks.first)
    try:
        for number, shares in enumerate(pieces):
            mine = [rows[row] for row in shares[ranks.rank]]
            kept = ranks.together(
                lambda mine=mine: _said(mine, model=model, k=asked.top_k, pad=pair.ids.pad, ranks=ranks)  # type: ignore[misc]
            )
            ids_NK, logp_NJ = ranks.gather_rows(kept.ids_NK), ranks.gather_rows(kept.logp_NJ)
            for array, value in zip(arrays or (), (ids_NK, logp_NJ), strict=bool(arrays)):
                at, numbers = 0, value.cpu().numpy()
                for row in (row for each in shares for row in each):
                    tokens = len(rows[row].response_ids)
                    array[starts[row] : starts[row + 1]] = numbers[at : at + tokens]
                    at += tokens
            bar.advance(number + 1, {})
    finally:
        bar.close()


@torch.no_grad()
def _said(rows: Sequence[Prompt], *, model: Teacher, k: int, pad: int, ranks: Ranks) -> Kept:
    """What the teacher says about the response tokens of these rows; with none it still keeps step with the others."""
    inputs = nobody(ranks.device)
    if rows:
        batch = example_batch(rows, pad_id=pad, device=ranks.device)
        inputs = {"ids_BL": batch.ids_BL, "mask_BL": batch.mask_BL, "predict_BL": batch.target_BL}
    hidden_BLH = model.reader.read(inputs["ids_BL"], inputs["mask_BL"])
    hidden_NH = hidden_BLH[inputs["predict_BL"].roll(-1, dims=1)]
    with model.head() as head:
        found = [likeliest(hidden_nH, head=head, k=k) for hidden_nH in torch.split(hidden_NH, _tile(head))]
    kept = Kept(ids_NK=torch.cat([one.ids_NK for one in found]), logp_NJ=torch.cat([one.logp_NJ for one in found]))
    if bool(kept.logp_NJ.isnan().any()):
        uids = ", ".join(repr(row.uid) for row in rows[:3])
        raise NonFinite(f"the teacher says no numbers in a batch of rows {uids}, …; nothing was kept")
    return kept


def likeliest(hidden_nH: Tensor, *, head: HeadWeights, k: int) -> Kept:
    """The ``k`` likeliest ids of each state, likeliest first, and what is left for all others."""
    logp_nV = head.logits(hidden_nH).log_softmax(dim=-1)
    ids_nK = logp_nV.topk(k, dim=-1).indices
    return Kept(ids_NK=ids_nK, logp_NJ=kept_and_rest(logp_nV, ids_nK))


def _tile(head: HeadWeights) -> int:
    """Tokens whose logits, and the five tensors that are made of them, stay within the memory of a pass."""
    vocabulary, kind = head.weight_VH.shape[0], "cpu" if head.weight_VH.device.type == "cpu" else "cuda"
    return max(16, WORKING_BYTES[kind] // (6 * 4 * vocabulary))


def _say(ranks: Ranks, line: str) -> None:
    if ranks.first:
        print(visible(line), flush=True)
