"""What a loaded model is tried for before it is used: that its head is known, and how its rows may be packed.

Legend: B rows, S positions, L positions of padded rows, N tokens, H hidden width.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from minillm.errors import ModelError
from minillm.loading import quiet_transformers
from minillm.models import CausalLM

PROBE_TOLERANCE = 1e-3
PROBE_WIDTH = 64
"""Tokens of the longest row that ``probe_packing`` reads."""
PACKED_BY_MASK = ("opt",)
"""Architectures that do not tell rows of a line apart by positions, and do what a mask of four axes says. One that is
missing here is padded."""


def probe_head(model: PreTrainedModel, root: CausalLM) -> None:
    """Raise ``ModelError`` unless head(backbone(x)) gives the logits that the model itself gives for a few tokens.

    Some architectures do something between the two that a configuration does not show; distilling those would train
    another model than the one that is published. Needs whole (unsharded) weights; compares real ids only.
    """
    ids_BS = torch.arange(1, 9, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        hidden, _ = root("extend", ids_BS=ids_BS, mask_BL=torch.ones_like(ids_BS), cache=None)
        ours = root.head(hidden[0])
        output = model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS))
        theirs = output.logits[0, :, : ours.shape[1]].to(ours.dtype)
    if not bool(theirs.isfinite().all()):
        raise ModelError(
            f"{type(model).__name__}: its weights give logits that are not finite numbers.\n"
            "  the files are damaged or of a diverged run; fetch or write them again"
        )
    gap = float((ours - theirs).abs().max())
    limit = PROBE_TOLERANCE if model.dtype in {torch.float32, torch.float64} else 0.1
    if not gap <= limit * max(1.0, float(theirs.abs().max())):
        raise ModelError(
            f"{type(model).__name__}: logits differ by {gap:.3g} from output embedding x final hidden state.\n"
            "  this architecture transforms its logits in a way that minillm does not know; it cannot be distilled yet"
        )


@torch.no_grad()
def probe_packing(root: CausalLM, *, name: str, call: Callable[..., Any] | None = None) -> None:
    """Sets ``root.packs``: by what this architecture reads rows end to end in a line as it reads them side by side.

    Of three rows the two shorter ones share a line. The second of these must come out the same to the bit whatever
    stands before it, and every token of all three as it does in a padded batch. Where one does not (recurrent layers,
    positions from elsewhere, experts whose rounding depends on the batch) rows stay padded, and a note says so.
    ``call`` is the engine of sharded weights: then every rank must call.
    """
    read, config = call or root, getattr(root.backbone, "config", None)
    device, real_ids = next(root.parameters()).device, root.head.real_ids
    width = min(PROBE_WIDTH, getattr(config, "max_position_embeddings", None) or PROBE_WIDTH)
    ids_BL = 1 + torch.arange(3 * width, device=device).view(3, width) % (real_ids - 1)
    # transformers warns of padding without a mask where a row begins with the pad id: once, so here, unheard.
    pad_id = getattr(config, "pad_token_id", None)
    if pad_id is not None and 0 <= pad_id < real_ids:
        ids_BL[0, 0] = pad_id
    other_BL = ids_BL.clone()
    other_BL[1] = other_BL[1] % (real_ids - 1) + 1
    length_B1 = torch.tensor([[width], [width // 2], [width // 3]], device=device)
    mask_BL = torch.arange(width, device=device) < length_B1
    root.packs = "no"
    with quiet_transformers():
        apart_BLH = read("read", ids_BL=ids_BL, mask_BL=mask_BL)
        root.packs = "mask" if getattr(config, "model_type", None) in PACKED_BY_MASK else "positions"
        packed_BLH, beside_BLH = (read("read", ids_BL=ids, mask_BL=mask_BL) for ids in (ids_BL, other_BL))
    size_N, gap_N = (value[mask_BL].float().norm(dim=-1) for value in (apart_BLH, packed_BLH - apart_BLH))
    limit = PROBE_TOLERANCE if apart_BLH.dtype in {torch.float32, torch.float64} else 0.05
    if not (torch.equal(packed_BLH[2], beside_BLH[2]) and bool((gap_N <= limit * size_N).all())):
        root.packs = "no"
        if os.environ.get("RANK", "0") == "0":
            print(
                f"note: {name}: rows are padded to one length; laid end to end it reads them otherwise", file=sys.stderr
            )
