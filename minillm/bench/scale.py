"""How a MiniLLM step grows: with a second rank, with the length of responses, with the vocabulary.

Legend: B rows, P prompt tokens, T new tokens, L = P + T, N = B T, V vocabulary, H hidden width.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minillm.bench.bare import check_pair
from minillm.bench.memory import extra_peak
from minillm.bench.pairs import Spread, in_turns, ratio, spread_of, threads
from minillm.bench.scale_worker import team
from minillm.bench.step import Ours, StepCase
from minillm.cards import Kind, load_card
from minillm.errors import ConfigError
from minillm.loading import ModelFacts, inspect
from minillm.models import CausalLM
from minillm.probes import probe_packing
from minillm.ranks import Ranks
from minillm.scoring import HeadWeights, Task, TeacherView, cut_for

STAGES = ("zero2", "zero3")
ALONE = "zero0"
"""The engine settings of a run of one rank: on a CPU the fastest of them, and there is nothing to cut up."""
RANKS = 2
WANTED = ("logq", "reverse_kl")
"""Numbers per token that MiniLLM's loss is made of."""
_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of malloc.h."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeakFigures:
    """Two ranks of one run (``joined``) beside two runs of one rank (``apart``): seconds of a step of the pair."""

    seconds: dict[str, Spread]
    efficiency: Spread
    """Apart over joined, turn by turn: 1 where a rank more costs nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthFigures:
    """Seconds of a step by the number of new tokens in each response, and the power of tokens that they follow."""

    seconds: dict[int, Spread]
    exponent: Spread
    """Against new tokens, B T: fitted in each turn."""
    exponent_with_prompts: Spread
    """Against all tokens, B (P + T)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFigures:
    """Forward and backward of a student over N response tokens, by the vocabulary: bytes."""

    tokens: int
    peak: dict[int, int]
    """The highest point beyond both models' weights and the inputs."""
    gradients: dict[int, int]
    """What of it the parameters' gradients are, which must grow with V."""
    growth: float
    """What is left, at the largest vocabulary over the smallest: 1 where it is flat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleFigures:
    """All three; no ``weak`` where there are GPUs but fewer than the ranks."""

    case: StepCase
    weak: dict[str, WeakFigures]
    length: LengthFigures
    memory: MemoryFigures


def measure_scale(case: StepCase, *, lengths: Sequence[int], vocabularies: Sequence[int], repeats: int) -> ScaleFigures:
    """One thread for each process, whatever ``case.threads`` says: ranks share a machine's cores."""
    case = dataclasses.replace(case, threads=1)
    check(case, lengths=lengths, vocabularies=vocabularies)
    weak = {}
    if enough_devices():
        print("two ranks of one run, and two runs of one rank …", flush=True)
        weak = measure_weak(case, repeats=repeats)
    print("longer responses …", flush=True)
    length = measure_length(case, lengths=lengths, repeats=repeats)
    print("a larger vocabulary …", flush=True)
    return ScaleFigures(case=case, weak=weak, length=length, memory=measure_memory(case, vocabularies=vocabularies))


def check(case: StepCase, *, lengths: Sequence[int], vocabularies: Sequence[int]) -> None:
    """Raises what is wrong with the request before anything is started."""
    for what, values in (("--lengths", lengths), ("--vocabularies", vocabularies)):
        if len(set(values)) < 2:
            given = ", ".join(map(str, values)) or "none"
            raise ConfigError(f"{what}: got {given}; wanted at least two different ones, or there is no growth to see")
    check_pair(case.of(new_tokens=max(*lengths, case.sizes.new_tokens)).sizes)


def enough_devices() -> bool:
    """Whether each rank can have a device to itself: NCCL puts no two on one. A CPU is shared."""
    return not torch.cuda.is_available() or torch.cuda.device_count() >= RANKS


def measure_weak(case: StepCase, *, repeats: int) -> dict[str, WeakFigures]:
    """By ZeRO stage: the same work for each process, as ranks of one run and as runs of their own, in turns.

    Both pairs run two processes at a time, so that what these share of a machine costs both the same.
    """
    with contextlib.ExitStack() as open_teams:
        teams = {"apart": open_teams.enter_context(team(case, settings=ALONE, joined=False, size=RANKS))}
        for stage in STAGES:
            teams[stage] = open_teams.enter_context(team(case, settings=stage, joined=True, size=RANKS))
        seconds = in_turns({name: one.step for name, one in teams.items()}, repeats=repeats, device=torch.device("cpu"))
    return {
        stage: WeakFigures(
            seconds={"joined": spread_of(seconds[stage]), "apart": spread_of(seconds["apart"])},
            efficiency=ratio(seconds["apart"], seconds[stage]),
        )
        for stage in STAGES
    }


def measure_length(case: StepCase, *, lengths: Sequence[int], repeats: int) -> LengthFigures:
    """Steps of one process with responses of each length, in turns."""
    ranks, lengths = Ranks(threads=case.threads), sorted(set(lengths))
    with contextlib.ExitStack() as opened:
        steps = {}
        for length in lengths:
            ours = Ours(case.of(new_tokens=length), ranks=ranks)
            opened.callback(ours.close)
            steps[str(length)] = ours.step
        seconds = in_turns(steps, repeats=repeats, device=ranks.device)
    turns = list(zip(*(seconds[str(length)] for length in lengths), strict=True))
    new = [case.sizes.rows * length for length in lengths]
    whole = [case.sizes.rows * (case.sizes.prompt_tokens + length) for length in lengths]
    return LengthFigures(
        seconds={length: spread_of(seconds[str(length)]) for length in lengths},
        exponent=spread_of([exponent(new, turn) for turn in turns]),
        exponent_with_prompts=spread_of([exponent(whole, turn) for turn in turns]),
    )


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """e of the power law seconds = c sizes^e that is nearest in least squares of logarithms."""
    slope, _ = statistics.linear_regression([math.log(size) for size in sizes], [math.log(s) for s in seconds])
    return slope


def measure_memory(case: StepCase, *, vocabularies: Sequence[int]) -> MemoryFigures:
    """``memory_here`` with two tiles, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(memory_here, (case, vocabularies, 2.0))


def memory_here(case: StepCase, vocabularies: Sequence[int], tiles: float) -> MemoryFigures:
    """One pass for each vocabulary, over as many rows of new tokens as fill ``tiles`` tiles of the smallest.

    With fewer tokens than that a tile is smaller than it may be, and grows with V. For a process of its own: how the
    system's allocator works is settled here.
    """
    _return_what_is_freed()
    rows = math.ceil(tiles * _tokens_of_a_tile(min(vocabularies)) / case.sizes.new_tokens)
    case = case.of(rows=rows)
    found = {size: _peak_of_a_pass(case, size) for size in sorted(set(vocabularies))}
    rest = [peak - gradients for peak, gradients in found.values()]
    return MemoryFigures(
        tokens=rows * case.sizes.new_tokens,
        peak={size: peak for size, (peak, _) in found.items()},
        gradients={size: gradients for size, (_, gradients) in found.items()},
        growth=rest[-1] / rest[0],
    )


def _tokens_of_a_tile(vocabulary: int) -> int:
    """As many as the loss core takes at once with two heads of this size."""
    head = HeadWeights(weight_VH=torch.empty(vocabulary, 1, device=_device()), bias_V=None)
    nothing_0 = torch.empty(0, dtype=torch.int64)
    teacher = TeacherView(head=head, hidden_NH=torch.empty(0, 1))
    return cut_for(head, Task(taken_N=nothing_0, wanted=WANTED, teacher=teacher)).tile


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _peak_of_a_pass(case: StepCase, vocabulary: int) -> tuple[int, int]:
    """(Highest point beyond weights and inputs, bytes of the gradients) of the student's forward and backward.

    Without an engine, whose buckets and states are copies of gradients and weights and grow as those do.
    """
    device = _device()
    with threads(case.threads):
        root = _student_of(case.sizes.student, vocabulary=vocabulary).to(device)
        probe_packing(root, name="student")
        one_pass = _pass_over(root, case=case, vocabulary=vocabulary, device=device)
        peak = extra_peak(one_pass, device=device)
    gradients = [p.grad for p in root.parameters() if p.grad is not None]
    return peak, sum(grad.numel() * grad.element_size() for grad in gradients)


def _pass_over(root: CausalLM, *, case: StepCase, vocabulary: int, device: torch.device) -> Callable[[], None]:
    noise = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise).to(device)

    count, width = case.sizes.rows * case.sizes.new_tokens, _facts(case.sizes.teacher, "teachers").config.hidden_size
    view = TeacherView(
        head=HeadWeights(weight_VH=random(vocabulary, width), bias_V=None), hidden_NH=random(count, width)
    )
    advantage_N = random(count)
    ids_BL = torch.randint(
        1, vocabulary, (case.sizes.rows, case.sizes.prompt_tokens + case.sizes.new_tokens), generator=noise
    )
    ids_BL = ids_BL.to(device)
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    predict_BL = mask_BL.clone()
    predict_BL[:, : case.sizes.prompt_tokens] = False

    def of_a_tile(numbers: Mapping[str, Tensor], here: slice) -> Tensor:
        return numbers["reverse_kl"].sum() - (advantage_N[here] * numbers["logq"]).sum()

    def one_pass() -> None:
        loss, _ = root(
            "train", ids_BL=ids_BL, mask_BL=mask_BL, predict_BL=predict_BL, teacher=view,
            wanted=WANTED, loss=of_a_tile,
        )  # fmt: skip
        loss.backward()

    return one_pass


def _return_what_is_freed() -> None:
    """Makes glibc give each large block back to the system when it is freed. By itself it keeps blocks of sizes that it
    has seen freed, and the resident set is then of what stood before as well."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)


def _facts(name: str, kind: Kind) -> ModelFacts:
    return inspect(load_card(name, kind=kind))


def _student_of(name: str, *, vocabulary: int) -> CausalLM:
    """A model of the student's shape with random weights and another vocabulary."""
    config = copy.deepcopy(_facts(name, "students").config)
    config.vocab_size = vocabulary
    # Ids of the tokenizer may lie beyond, and nothing here reads them.
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return CausalLM(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).train()
