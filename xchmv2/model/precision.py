"""Weights in the arithmetic that uses them, so that no forward has to convert them."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from xchmv2.model.backbone import Attention

Model = TypeVar("Model", bound=nn.Module)

# What autocast would convert the parameters of, each time: 337 million for the published model.
_CONVERTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Attention)


def convert_weights(model: Model, dtype: torch.dtype) -> Model:
    """Copy a model, with the weights of its matrix products in another data type.

    Parameters
    ----------
    model : nn.Module
        The model; it stays as it is.
    dtype : torch.dtype
        The arithmetic of the autocast that the copy will run under.

    Returns
    -------
    nn.Module
        For inference. Norms, scales and tokens keep their data type, so that under autocast it
        gives the same bits as the model itself.
    """
    # What is in the memo is not copied: the converted weights are the only new ones.
    memo: dict[int, object] = {}
    for part in model.modules():
        if isinstance(part, _CONVERTED):
            for parameter in part.parameters(recurse=False):
                converted = parameter.detach().to(dtype)
                memo[id(parameter)] = nn.Parameter(converted, requires_grad=False)
    return copy.deepcopy(model, memo)
