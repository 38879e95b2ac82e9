"""How often the weights of a sharded model are brought to a rank's device, and how many bytes that moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class Gathers:
    """Counts the gathers of one model's sharded parameters: a few additions for each, on the host alone.

    Each parameter of ZeRO-3 carries the functions that gather it. Those of this model are wrapped, so what a student
    gathers beside it is not counted, and nothing of DeepSpeed itself is changed.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, ranks: int, from_host: bool) -> None:
        """``from_host``: shards lie in host memory, so that a rank's own share is moved too."""
        self.calls = 0
        """Collectives so far; on one rank, copies from the host."""
        self.received_bytes = 0
        """Bytes that came to this rank's device: from other ranks and, with ``from_host``, its own from the host."""
        self._shares = ranks if from_host else ranks - 1
        for parameter in parameters:
            one: Any = parameter
            one.all_gather_coalesced = self._counted(one.all_gather_coalesced, self._together)
            one.all_gather = self._counted(one.all_gather, self._one_by_one, alone=one)

    def take(self) -> tuple[int, int]:
        """Calls and bytes since the last time."""
        taken = self.calls, self.received_bytes
        self.calls = self.received_bytes = 0
        return taken

    def _counted(self, gather: Callable[..., Any], count: Callable[[list[Any]], None], *, alone: Any = None) -> Any:
        """The same function of a list of parameters, counted; without a list, of the one that it belongs to."""

        def counted(*arguments: Any, **options: Any) -> Any:
            given = arguments[0] if arguments else options.get("params", options.get("param_list"))
            listed = [alone] if given is None else list(given)
            if self._shares:
                count(listed)
            # A list that can be read once has been read.
            return gather(*([listed, *arguments[1:]] if arguments else ()), **options)

        return counted

    def _together(self, listed: list[Any]) -> None:
        """One collective for all that have one type; these are waiting to be gathered."""
        self._add(listed, calls=len({one.ds_tensor.dtype for one in listed}))

    def _one_by_one(self, listed: list[Any]) -> None:
        """One for each that is not whole already."""
        missing = [one for one in listed if one.ds_status.name == "NOT_AVAILABLE"]
        self._add(missing, calls=len(missing))

    def _add(self, listed: list[Any], *, calls: int) -> None:
        self.calls += calls
        shard_bytes = sum(one.ds_tensor.ds_numel * one.ds_tensor.element_size() for one in listed)
        self.received_bytes += self._shares * shard_bytes
