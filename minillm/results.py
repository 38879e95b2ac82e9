"""One evaluation as files: the model's answers, its measures, and what exactly was asked."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from minillm.config import MEMORY_ONLY, RunConfig
from minillm.errors import DataError, visible
from minillm.evaluation import Judge, sample_and_judge, world_check
from minillm.extras import asked_extras, idle_extras, measure_extras
from minillm.length_buckets import by_length
from minillm.loading import fingerprint, load
from minillm.manifests import parsed
from minillm.measures import infinite_rows, infinite_words, summarise
from minillm.models import CausalLM, ModelReader
from minillm.pairs import Pair
from minillm.preflight import AnySplit, Split, decoding_record, limits_record
from minillm.probes import probe_head
from minillm.ranks import Ranks
from minillm.report_files import SCHEMA
from minillm.slots import coverage
from minillm.stages import Start
from minillm.store import write_jsonl, write_text
from minillm.teacher_engine import Teacher
from minillm.types import Purpose
from minillm.unfinished import Keeper, asked_before, differences

SHOWN_PACKAGES = ("minillm", "torch", "transformers", "deepspeed")
ADAPTERS, IN_BITS = "peft", "bitsandbytes"
"""Packages that compute only in some runs: of adapters, and of weights in 8 bits."""

CHECKS: dict[str, Callable[[str, str], dict[str, Any]]] = {"slots": coverage, "world": world_check}
"""By name, the exact checkers of responses."""


def judge_of(config: RunConfig, pair: Pair, split: AnySplit, *, teacher: Teacher | None, purpose: Purpose) -> Judge:
    """How the run judges text: the same for validation and for the final test (design D12).

    Under a repetition penalty no teacher, so no reverse KL: that is computed from states, and the penalty from a row's
    past.
    """
    return Judge(
        prompts=split.prompts,
        decoding=decoding_record(config.decoding),
        tokenizer=pair.tokenizer,
        ids=pair.ids,
        teacher=teacher if config.decoding.repetition_penalty == 1.0 else None,
        check=CHECKS.get(_checker(config, split)),
        limits=limits_record(config.evaluation),
        seed=config.seed,
        purpose=purpose,
        thorough=purpose is Purpose.EVALUATION,
    )


def opened(config: RunConfig, pair: Pair, *, start: Start, ranks: Ranks) -> tuple[CausalLM, ModelReader]:
    """The weights of ``start`` as an evaluation reads them."""
    # In the precision that the student was trained and validated in.
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else None
    if config.engine.gather == "forward":  # sharded, as it was trained
        precision = "bf16" if dtype is not None or start.card.dtype == "bfloat16" else "fp32"
        sharded = Teacher(
            lambda: load(start.card, start.facts, seed=config.seed, dtype=dtype), ranks=ranks, placement="zero3",
            precision=precision, real_ids=pair.real_ids,
        )  # fmt: skip
        return sharded.root, sharded.reader
    model = load(start.card, start.facts, seed=config.seed, dtype=dtype)
    root = CausalLM(model)
    root.head.real_ids = pair.real_ids
    probe_head(model, root)
    return root, ModelReader(root.eval().to(ranks.device), device=ranks.device, lockstep=False)


def evaluate_into(
    config: RunConfig,
    pair: Pair,
    split: Split,
    *,
    start: Start,
    teacher: Teacher | None,
    ranks: Ranks,
    out: Path,
    shown: str,
    model: tuple[CausalLM, ModelReader] | None = None,
) -> dict[str, Any]:
    """Evaluates the weights of ``start`` on ``split`` and writes ``results.json`` and ``samples.jsonl`` (rank 0).

    Goes on with an unfinished evaluation in ``out`` that was asked the same. ``model`` is what ``opened`` gave for
    ``start``, where several sets share it.
    """
    settings, asked = config.evaluation, asked_of(config, pair, split, start=start)
    root, reader = model or opened(config, pair, start=start, ranks=ranks)
    judge = judge_of(config, pair, split, teacher=teacher, purpose=Purpose.EVALUATION)
    if ranks.first and judge.teacher is not teacher:
        print("note: under decoding.repetition_penalty there is no reverse KL; set it to 1 to measure that", flush=True)
    keeper = Keeper(out, asked=with_versions(asked), ranks=ranks, say=lambda line: print(visible(line), flush=True))
    samples = sample_and_judge(
        reader,
        judge,
        seeds=settings.seeds,
        temperatures=settings.temperatures,
        ranks=ranks,
        title=f"evaluate {shown}",
        keeper=keeper,
    )
    infinite = infinite_rows(samples)
    if ranks.first and infinite:
        print(f"note: {infinite_words(infinite)}", flush=True)
    measures, by_temperature = summarise(
        samples, temperatures=settings.temperatures, resamples=settings.bootstrap, seed=config.seed
    )
    extras = measure_extras(config, reader, judge, teacher=teacher, ranks=ranks, shown=shown, keeper=keeper)
    results = {
        **_about(
            config,
            split,
            start=start,
            parameters=sum(getattr(p, "ds_numel", p.numel()) for p in root.parameters()),
            teacher=teacher,
        ),
        "asked": asked,
        "measures": measures,
        "temperatures": by_temperature,
        **({"infinite": infinite} if infinite else {}),
        **by_length(samples, resamples=settings.bootstrap, seed=config.seed),
        **extras,
        "seconds": {"evaluation": round(keeper.seconds, 2)},
        "versions": with_versions(asked)["versions"],
        "date": time.strftime("%Y-%m-%d"),
    }

    def write() -> None:
        write_jsonl(out / "samples.jsonl", samples)
        write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
        keeper.drop()

    ranks.of_first(write)
    return results


def _about(
    config: RunConfig, split: Split, *, start: Start, parameters: int, teacher: Teacher | None
) -> dict[str, Any]:
    """Which model was evaluated on what, and how it was sampled."""
    return {
        "schema": SCHEMA,
        "model": {"name": start.card.name, "path": str(start.card.model), "parameters": parameters},
        "teacher": None if teacher is None else {"name": config.teacher, "parameters": teacher.parameters},
        "data": {"source": split.source, "rows": len(split.prompts), "sha256": split.sha256},
        "decoding": config.decoding.model_dump(),
        "seeds": list(config.evaluation.seeds),
        "bootstrap": config.evaluation.bootstrap,
    }


def _checker(config: RunConfig, split: AnySplit) -> str:
    """Who knows a right answer to these prompts; "" where nobody does."""
    return config.data.checker or ("world" if split.source.startswith("world:") else "")


def judged_by(split: AnySplit, *, checker: str) -> str:
    """SHA-256 in hex over what responses are judged by and shown with: source, checker, references, further fields.

    ``data_hash`` covers what models read, and of the references no more than a loss does.
    """
    digest = hashlib.sha256(json.dumps([split.source, checker]).encode() + b"\n")
    for row in split.prompts:
        digest.update(json.dumps([row.uid, row.responses, row.extra], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def asked_of(config: RunConfig, pair: Pair, split: Split, *, start: Start) -> dict[str, Any]:
    """What an evaluation was asked: two with equal answers here need not be made twice."""
    return {
        "model": str(start.card.model),
        "weights": fingerprint(start.card, seed=config.seed),
        "teacher": config.teacher,
        "teacher_weights": None if pair.teacher_card is None else fingerprint(pair.teacher_card),
        "data": split.sha256,
        "decoding": config.decoding.model_dump(),
        "evaluation": config.evaluation.model_dump(mode="json", exclude={*MEMORY_ONLY} | idle_extras(config)),
        "seed": config.seed,
        **({} if config.data.checker is None else {"checker": config.data.checker}),
        **asked_extras(config, split),
        "references": judged_by(split, checker=_checker(config, split)),
        "precision": config.engine.precision,
        "dtypes": {
            "model": start.card.dtype,
            "teacher": None if pair.teacher_card is None else pair.teacher_card.dtype,
        },
    }


def already(out: Path, asked: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The results in a folder that answer this very question, or None where it is to be answered or gone on with.

    Raises ``DataError`` where the folder holds results, or an unfinished evaluation, of another question.
    """
    unfinished, stored = asked_before(out), stored_results(out)
    if unfinished is None and stored is None:
        if (out / "samples.jsonl").exists():
            raise DataError(
                f"{out} holds a samples.jsonl without results.json, so nobody knows whose it is; nothing was touched.\n"
                "  give another --out, or --fresh to replace it"
            )
        return None
    wanted = asked()
    if unfinished is not None and not differences(with_versions(wanted), unfinished):
        return None
    if stored is not None and not differences(wanted, stored["asked"]):
        return stored
    what, before = ("other results", stored["asked"]) if stored is not None else ("another evaluation", unfinished)
    whole = wanted if stored is not None else with_versions(wanted)
    unsaid = [name for name in whole if name not in (before or {})]
    older = f"\n  an older version made them, which did not say: {', '.join(unsaid)}" if unsaid else ""
    raise DataError(
        f"{out} holds {what} (they differ in: {', '.join(differences(whole, before or {}))}); nothing was touched."
        f"{older}\n  give another --out, or --fresh to replace them"
    )


def with_versions(asked: dict[str, Any]) -> dict[str, Any]:
    """Rows of two versions do not belong into one file, though one may read what the other wrote."""
    in_bits = str(asked.get("teacher_weights")).startswith("int8:")
    return {**asked, "versions": versions(*([IN_BITS] if in_bits else []))}


def stored_results(out: Path) -> dict[str, Any] | None:
    file = out / "results.json"
    if not file.is_file():
        return None
    try:
        stored = parsed(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}; move it away or give --fresh") from error
    if isinstance(stored, dict) and isinstance(stored.get("sets"), dict):
        raise DataError(f"{file}: results of several sets; give another --out, or --fresh to replace the list")
    if not isinstance(stored, dict) or not isinstance(stored.get("asked"), dict):
        raise DataError(f"{file}: not the results of an evaluation; move it away or give --fresh")
    return stored


def used_by(config: RunConfig, pair: Pair) -> tuple[str, ...]:
    """Packages beside the usual ones that compute in a run."""
    used = {
        ADAPTERS: config.lora is not None,
        IN_BITS: pair.teacher_card is not None and pair.teacher_card.quantise is not None,
    }
    return tuple(package for package, uses in used.items() if uses)


def versions(*also: str) -> dict[str, str]:
    """Of the packages that every run computes with, and of others."""
    found: dict[str, str] = {}
    for package in (*SHOWN_PACKAGES, *also):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
