"""Models on no device: every weight has its shape, and none has numbers."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on no device; the configuration stays as it is."""
    with torch.device("meta"):  # transformers writes into the configuration that it is given
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return model


def count_parameters(model: PreTrainedModel) -> int:
    """Weights, a tied head counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
