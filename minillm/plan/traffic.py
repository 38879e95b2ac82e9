"""What a step moves between GPUs, and about how long it takes.

Bytes are those that one GPU sends: a gather or a scatter of S bytes over n GPUs moves S (n - 1) / n of them, an
all-reduce twice that.
"""

from __future__ import annotations

from dataclasses import dataclass

from minillm.plan.memory import SINGLE
from minillm.plan.sizes import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What hardware is taken to do; ``source`` says on whose word."""

    flops: float = 125e12
    """Multiplications and additions a second on each GPU, as models reach them."""
    bandwidth: float = 50e9
    """Bytes a second that each GPU sends to others."""
    memory: float = 1.5e12
    """Bytes a second that each GPU reads from its own memory."""
    latency: float = 50e-6
    """Seconds of a collective of nothing."""
    source: str = "assumed: 40 % of 312 TFLOP/s (bf16), 50 GB/s between GPUs, 1.5 TB/s of memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Of one step: a rollout, and the updates from it."""

    sent: dict[str, int]
    """Bytes that each GPU sends, by what for."""
    calls: dict[str, int]
    """How often."""
    seconds: dict[str, float]
    """Of decoding, of the teacher, of the updates, and of communication that nothing hides."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


def traffic_of(work: Work, rates: Rates) -> Traffic:
    """Of full-length rows. Communication is not taken to overlap with anything, so that this is a bound."""
    sent, calls = _collectives(work)
    wire = sum(sent.values()) / rates.bandwidth + sum(calls.values()) * rates.latency
    return Traffic(sent=sent, calls=calls, seconds={**_compute(work, rates), "communication": wire})


def _collectives(work: Work) -> tuple[dict[str, int], dict[str, int]]:
    if work.gpus == 1:
        return {}, {}
    share = (work.gpus - 1) / work.gpus
    weights, trained = work.student.parameters * work.item, work.trained
    passes = work.updates * work.micro_batches
    sent: dict[str, float] = {}
    calls: dict[str, int] = {}
    if work.stage == 0 or (work.stage == 1 and work.precision == "bf16"):
        sent["all-reduce of gradients"] = 2 * share * SINGLE * trained * work.updates
        calls["all-reduce of gradients"] = work.updates
    else:
        times = passes if work.stage >= 2 else work.updates
        sent["reduce-scatter of gradients"] = share * trained * work.item * times
        calls["reduce-scatter of gradients"] = times * (work.student.layers if work.stage == 3 else 1)
    if work.stage in {1, 2}:
        sent["all-gather of new weights"] = share * trained * work.item * work.updates
        calls["all-gather of new weights"] = work.updates
    if work.stage == 3:
        reads = passes * (3 if work.recompute else 2)
        sent["all-gather of the student in updates"] = share * weights * reads
        calls["all-gather of the student in updates"] = reads * work.student.layers
        # By forward: for the prompts, for each token, and for the scores.
        each, layers = (1, 1) if work.gather == "rollout" else (work.new_tokens + 1, work.student.layers)
        sent["all-gather of the student to sample"] = share * weights * each
        calls["all-gather of the student to sample"] = each * layers
    if work.placement != "replicated":
        reads = round(work.teacher_forwards)
        sent["all-gather of the teacher"] = share * work.teacher.parameters * work.teacher_item * reads
        calls["all-gather of the teacher"] = reads * work.teacher.layers
    return {name: int(size) for name, size in sent.items()}, calls


def _compute(work: Work, rates: Rates) -> dict[str, float]:
    student, teacher, rows = work.student, work.teacher, work.own_rows
    tokens = rows * work.length

    def decode(parameters: int, item: int, caches: int, steps: float) -> float:
        """Each token reads all weights and half of the finished cache, or multiplies, whichever is longer."""
        reads = (parameters * item + rows * caches * item * work.length / 2) / rates.memory
        return steps * max(reads, 2 * parameters * rows / rates.flops)

    prefill = 2 * student.parameters * rows * work.prompt_tokens / rates.flops
    own = prefill + decode(student.parameters, work.item, student.cache_width, work.new_tokens)
    heads = work.teacher_mix * work.new_tokens
    theirs = decode(teacher.parameters, work.teacher_item, teacher.cache_width, heads)
    theirs += 2 * teacher.parameters * tokens / rates.flops
    # Forward 2, backward 4 by weight and token; less 2 for frozen weights, 2 more where forwards are made again.
    each = (4 if work.frozen else 6) + 2 * work.recompute
    learn = each * student.parameters * tokens * work.inner_epochs / rates.flops
    heads_flops = 2 * (student.head + teacher.head) * rows * work.new_tokens
    return {"decoding": own, "teacher": theirs, "scoring": heads_flops / rates.flops, "updates": learn}
