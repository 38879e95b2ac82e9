"""Any transformers causal LM as one root module {backbone, head}.

Legend: B rows, L positions in the attention mask, S new positions, N tokens, H hidden width, V real ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from minillm import work
from minillm.cache import growing_cache
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
        self.weights: tuple[work.Weights, work.Weights] | None = None
        """Of the backbone and of the head, those that a token is multiplied by; None where nobody counts."""
        output: Any = model.get_output_embeddings()
        self.head = Head(
            output,
            real_ids=getattr(output.weight, "ds_shape", output.weight.shape)[0],  # that of a shard says nothing
            scale=float(getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def forward(self, mode: str, **inputs: Any) -> Any:
        """``extend``: (hidden, cache). ``read``: hidden states of whole rows. ``logits``: [N, V]. ``statistics``: dict
        of [N] from hidden states. ``train``: (loss, dict of [N]) from ids."""
        if mode == "extend":
            self._count(inputs["mask_BL"][:, -inputs["ids_BS"].shape[1] :].sum())
            return self._extend(**inputs)
        if mode == "read":
            self._count(inputs["mask_BL"].sum())
            return self._read(**inputs)
        if mode == "train":
            self._count(inputs["mask_BL"].sum(), inputs["predict_BL"].sum(), backward=True)
            if inputs.get("coupled"):
                self._count(0, inputs["predict_BL"].sum())
            return self._train(**inputs)
        assert mode in {"logits", "statistics"}, mode
        self._count(0, inputs["hidden_NH"].shape[0])
        return self.head(**inputs)

    def _count(self, read: Tensor | int, predicted: Tensor | int = 0, *, backward: bool = False) -> None:
        """What a forward does, for whoever asks how fast the models run: tokens in the backbone, and in the head."""
        for tokens, weights in zip((read, predicted), self.weights or (), strict=False):
            work.add(tokens, weights.operations(backward=backward))

    def count_work(self) -> None:
        """From now on forwards tell ``work`` what they do. To be called once it is settled what trains, and outside of
        a forward: there a look at a sharded weight would gather it."""
        self.weights = work.weights_in(self.backbone, beside=self.head.weight), work.weights_of(self.head.weight)

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
        coupled: bool = False,
        **task: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``token_loss`` for the tokens at the columns where ``predict_BL`` is true (column 0 never is), row by row."""
        # The state before a token predicts it.
        before_BL = predict_BL.roll(-1, dims=1)
        hidden_NH = self._states(ids_BL, mask_BL, before_BL)
        result: tuple[Tensor, dict[str, Tensor]] = self.head(
            hidden_NH, task=Task(taken_N=ids_BL[predict_BL], **task), loss=loss, coupled=coupled
        )
        return result


class ModelReader:
    """A ``reading.Reader`` over a root module, or over anything that is called as one (an engine)."""

    def __init__(self, root: Any, *, device: torch.device, lockstep: bool) -> None:
        self._root = root
        self.device = device
        self.lockstep = lockstep
        self._head: HeadWeights | None = None

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

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """A block in which ``statistics`` is a rank's own affair and nothing else is called: in lockstep the head is
        gathered for it, so that all ranks must enter."""
        if not self.lockstep:
            yield
            return
        import deepspeed

        head = getattr(self._root, "module", self._root).head
        with deepspeed.zero.GatheredParameters(list(head.parameters())):
            self._head = head.weights()
            try:
                yield
            finally:
                self._head = None

    @torch.no_grad()
    def statistics(self, hidden_NH: Tensor, **arguments: Any) -> dict[str, Tensor]:
        """``scoring.token_statistics`` with this model's head; within ``scoring`` without another rank."""
        if self._head is not None:
            return token_statistics(hidden_NH, head=self._head, **arguments)
        values: dict[str, Tensor] = self._root("statistics", hidden_NH=hidden_NH, **arguments)
        return values

    def select_rows(self, cache: Cache, index: Tensor) -> Cache:
        """The cache with only these rows, in this order."""
        cache.batch_select_indices(index)
        return cache
