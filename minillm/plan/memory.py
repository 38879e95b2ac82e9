"""Bytes on each GPU and on the host, by item and by phase of a step.

What is counted follows the code: engines (``student_engine``, DeepSpeed's optimisers), the decode loop and its caches
(``decode``, ``cache``), what a rollout keeps (``objectives``), tiles of the losses (``scoring``). Rows are taken at
their longest, so that this is the most that a step can need.

Legend: M tokens of a training forward on a GPU, N tokens of it that are learnt from.
"""

from __future__ import annotations

from dataclasses import dataclass

from minillm.cache import LEAST_SPARE, SPARE_SHARE
from minillm.plan.sizes import ModelSizes, Work
from minillm.scoring import PIECE_BYTES, WORKING_BYTES

LIVE = 10**9
"""Weights of a sharded model that DeepSpeed keeps gathered (``stage3_max_live_parameters`` of our engine files)."""
BUCKET = 10**7
"""Numbers in a bucket of gradients (``reduce_bucket_size`` of our engine files)."""
FLAT = 5 * 10**8
"""Numbers that DeepSpeed lays end to end for one all-reduce where gradients are whole on each GPU."""
SUB_GROUP = 10**9
"""Weights that a ZeRO-3 optimiser steps at once."""
SINGLE = 4
"""Bytes of a number in 32 bits."""
PHASES = ("rollout", "scoring", "forward", "backward", "step")

Items = dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What stands all the time, and what each phase takes beside it, by item; in bytes of one GPU."""

    standing: Items
    phases: dict[str, Items]
    host: Items
    """Of one node."""

    @property
    def peaks(self) -> dict[str, int]:
        """Of each phase, with what stands."""
        base = sum(self.standing.values())
        return {name: base + sum(items.values()) for name, items in self.phases.items()}

    @property
    def peak(self) -> int:
        """The most that a GPU needs."""
        return max(self.peaks.values())

    @property
    def worst(self) -> str:
        """The phase that needs it."""
        peaks = self.peaks
        return max(peaks, key=lambda name: peaks[name])


def memory_of(work: Work) -> Memory:
    """The plan of a step; 'update' is its three phases forward, backward and step."""
    return Memory(
        standing={name: size for name, size in {**_standing(work), **_teacher(work)}.items() if size},
        phases={name: {item: size for item, size in items.items() if size} for name, items in _phases(work).items()},
        host={name: size for name, size in _host(work).items() if size},
    )


def _share(number: int, work: Work) -> int:
    return -(-number // work.gpus)


def _standing(work: Work) -> Items:
    """The student between steps."""
    trained, frozen = work.trained, (work.student.parameters if work.frozen else 0)
    own = _share(trained, work)
    on_device = 0 if work.offloads else 1
    average = {"moving average": SINGLE * work.student.parameters} if work.anchor else {}  # on each rank, whole
    items = {"student weights": (trained + frozen) * work.item, **average}
    if work.stage == 0:
        return {**items, "optimiser": 2 * SINGLE * trained}
    if work.stage == 3:
        items = {"student weights": on_device * _share(trained + frozen, work) * work.item, **average}
        items["gradients"] = on_device * SINGLE * own
        items["bucket of gradients"] = min(BUCKET, trained) * work.item
    if work.stage == 1 and work.precision == "bf16":  # its optimiser adds up whole gradients in 32 bits
        items["gradients"] = SINGLE * trained
    return {**items, "32-bit weights": on_device * SINGLE * own, "optimiser": on_device * 2 * SINGLE * own}


def _teacher(work: Work) -> Items:
    size = work.teacher.parameters * work.teacher_item
    if work.placement == "replicated":
        return {"teacher resident": size}
    shard = 0 if work.placement == "offload" else _share(work.teacher.parameters, work) * work.teacher_item
    return {"teacher resident": shard}


def _teacher_gathered(work: Work, *, reads: bool) -> int:
    """Of a sharded teacher: its layers while it ``reads`` and until the rollout is scored, and else its head, which a
    step keeps gathered."""
    if work.placement == "replicated" or (work.gpus == 1 and work.placement == "zero3"):
        return 0
    most = work.teacher.parameters if reads else work.teacher.head
    return min(most, LIVE + BUCKET) * work.teacher_item


def _gathered(work: Work) -> int:
    """Of a sharded student while it trains; one GPU has the whole of it anyway."""
    return min(work.student.parameters, LIVE + BUCKET) * work.item if work.stage == 3 and work.gpus > 1 else 0


def _phases(work: Work) -> dict[str, Items]:
    rows, item, peer = work.own_rows, work.item, work.teacher_item
    student, teacher = work.student, work.teacher
    states = rows * work.new_tokens * (student.hidden * item + teacher.hidden * peer)
    whole = student.parameters * item if work.stage == 3 and (work.gpus > 1 or work.offloads) else 0
    if work.gather == "forward":
        whole = min(whole, (LIVE + BUCKET) * item)
    forward_states = work.forward_rows * work.new_tokens
    kept = _activations(work)
    head = SINGLE * student.head if not work.frozen else 0
    so_far = _gradients_so_far(work)
    head_only = _teacher_gathered(work, reads=False)
    return {
        "rollout": {
            "teacher gathered": _teacher_gathered(work, reads=True),
            **_rollout(work, whole=whole, states=states),
        },
        "scoring": {
            "teacher gathered": _teacher_gathered(work, reads=True),
            "student gathered": whole,
            "moving average reads": _average_reads(work),
            "hidden states kept": 2 * states,  # those of sampled tokens are picked out
            "loss tiles": loss_tiles(work, rows * work.new_tokens),
        },
        "forward": {
            "teacher gathered": head_only,
            "hidden states kept": states,
            "activations": kept + forward_states * (2 * student.hidden * item + teacher.hidden * peer),
            "gradients": so_far,
            "gradient of the head": head,
            "loss tiles": loss_tiles(work, forward_states),
            "student gathered": _gathered(work),
        },
        "backward": {
            "teacher gathered": head_only,
            "hidden states kept": states,
            "activations": kept + _backward_extra(work) + forward_states * 2 * student.hidden * item,
            "gradients": so_far,
            "gradient of the head": head + (student.head * item if item < SINGLE and not work.frozen else 0),
            "engine buffers": _buckets(work),
            "student gathered": _gathered(work),
        },
        "step": {"teacher gathered": head_only, "hidden states kept": states, **_step(work)},
    }


def cache_bytes(model: ModelSizes, *, rows: int, prompt: int, new: int, item: int) -> int:
    """Keys and values at the end of a rollout, with the room that ``minillm.cache`` keeps spare, and a layer that is
    being copied to more room."""
    room, before = 0, 0
    for held in (prompt, *range(prompt + 1, prompt + new)):
        if held > room:
            before, room = room, held + max(LEAST_SPARE, held // SPARE_SHARE)
    token = rows * model.cache_width * item
    return token * room + token // model.layers // 2 * before


def _rollout(work: Work, *, whole: int, states: int) -> Items:
    student, teacher, item, peer = work.student, work.teacher, work.item, work.teacher_item
    rows, new = work.own_rows, work.new_tokens
    own_cache = cache_bytes(student, rows=rows, prompt=work.prompt_tokens, new=new, item=item)
    their_cache = 0
    if work.teacher_mix:
        their_cache = cache_bytes(teacher, rows=rows, prompt=work.prompt_tokens, new=new, item=peer)
    reading = rows * work.prompt_tokens * _passing(student, item)
    # Without mixing the teacher reads whole rows when they are written.
    last = rows * (work.prompt_tokens if work.teacher_mix else work.length)
    reading = max(reading, last * (_passing(teacher, peer) + teacher.hidden * peer))
    sampling = rows * student.vocabulary * (item + SINGLE + 3 * 8)
    return {
        "student gathered": whole,
        "student's cache": own_cache,
        "teacher's cache": their_cache,
        "hidden states kept": states,
        "forward and sampling": max(reading, sampling, 2 * states),
    }


def _average_reads(work: Work) -> int:
    """The average in the student's precision, and its forward over the rows of a rollout."""
    if not work.anchor:
        return 0
    student, item = work.student, work.item
    copy = 0 if item == SINGLE else student.parameters * item
    return copy + work.own_rows * work.length * (_passing(student, item) + student.hidden * item)


def _passing(model: ModelSizes, item: int) -> int:
    """Bytes a token of what a layer makes and lets go of, without gradient."""
    kept = model.kept[item]
    return 2 * kept.entry + 3 * kept.widest


def _tokens(work: Work) -> int:
    return work.forward_rows * work.length


def _activations(work: Work) -> int:
    """What a training forward keeps."""
    kept, layers = work.student.kept[work.item], work.student.layers
    layer = kept.layer + kept.matrices * work.length
    each = kept.entry * layers + layer if work.recompute else layer * layers
    return _tokens(work) * (each + kept.outside)


def _backward_extra(work: Work) -> int:
    """Gradients by activations inside the layer that is gone back through."""
    kept = work.student.kept[work.item]
    return _tokens(work) * (2 * kept.entry + 3 * kept.widest)


def _gradients_so_far(work: Work) -> int:
    """What earlier micro-batches of an update left, where it does not stand anyway."""
    if work.micro_batches == 1 or work.stage == 3 or (work.stage == 1 and work.precision == "bf16"):
        return 0
    own = _share(work.trained, work)
    if work.offloads:
        return 0
    return SINGLE * (own if work.stage == 2 else work.trained)


def _buckets(work: Work) -> int:
    """Those that come and go; one of a ZeRO-3 student stands."""
    if work.stage == 0 or work.gpus == 1 or (work.stage == 1 and work.precision == "bf16"):
        return 0
    return (1 if work.stage == 3 else 2) * min(BUCKET, work.trained) * work.item


def _step(work: Work) -> Items:
    """The end of an update: gradients are whole, activations gone."""
    trained, own, item = work.trained, _share(work.trained, work), work.item
    roots = 1 if work.device == "cuda" else 2  # of the second moments; without foreach they are divided into a copy
    if work.offloads:
        return {"engine buffers": _buckets(work), "student gathered": _gathered(work)}
    if work.stage == 0:
        flat = SINGLE * min(trained, FLAT)
        return {"gradients": SINGLE * trained, "engine buffers": max(flat, SINGLE * trained * (roots == 1))}
    if work.stage == 1 and work.precision == "bf16":
        flat = (SINGLE + item) * min(trained, FLAT) if work.gpus > 1 else 0
        return {"gradients": item * trained, "engine buffers": max(flat, roots * SINGLE * own)}
    if work.stage == 3:
        at_once = min(own, SUB_GROUP)
        buffers = (1 + roots) * SINGLE * at_once + _buckets(work)
        return {"engine buffers": buffers, "student gathered": _gathered(work)}
    copies = 1 if work.precision == "bf16" else 2
    return {"gradients": copies * SINGLE * own, "engine buffers": roots * SINGLE * own}


def loss_tiles(work: Work, tokens: int) -> int:
    """Both heads' logits of a tile and the pieces made of them, within the memory that ``scoring`` sets aside."""
    vocabulary, kind = work.student.vocabulary, work.device
    tensors = 5 + (work.item < SINGLE) + (work.teacher_item < SINGLE)
    wide = vocabulary * SINGLE
    piece = max(1, min(PIECE_BYTES[kind] // wide, WORKING_BYTES[kind] // (2 * wide * tensors)))
    pieces = min(piece, tokens) * wide * tensors
    left = WORKING_BYTES[kind] - piece * wide * tensors
    each = vocabulary * (work.item + work.teacher_item)
    return pieces + min(tokens, max(16, left // each)) * each


def _host(work: Work) -> Items:
    """Of a node: what is kept there, and what passes through while models are read."""
    ranks = min(work.gpus, work.gpus_per_node)
    own = _share(work.trained, work)
    items: Items = {}
    if work.offloads:
        items["optimiser, 32-bit weights and gradients"] = ranks * own * (4 * SINGLE)
    if work.engine == "zero3-offload":
        items["student weights"] = ranks * _share(work.student.parameters, work) * work.item
    if work.placement == "offload":
        items["teacher"] = ranks * _share(work.teacher.parameters, work) * work.teacher_item
    reading = 0 if work.stage == 3 else SINGLE * work.student.parameters
    if work.placement == "replicated":
        reading = max(reading, work.teacher.parameters * work.teacher_item)
    items["while models are read"] = ranks * reading
    return items
