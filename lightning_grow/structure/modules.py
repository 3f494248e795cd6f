"""Sizes that PyTorch's own modules keep as Python integers beside their parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Kept:
    """An integer attribute (or entry ``index`` of a tuple): ``times`` an axis of a parameter over ``divisor``."""

    name: str
    index: int | None
    parameter: str
    dim: int
    divisor: int = 1
    times: int = 1


_POSITION = re.compile(r"(^|_)(layer|block|depth|stage)?_?(idx|index|id|number)$")
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def is_position(name: str) -> bool:
    """Return whether an attribute is called like a module's own position among others, such as ``layer_idx``.

    Example:
        >>> is_position("layer_idx"), is_position("hidden_size")
        (True, False)
    """
    return _POSITION.search(name) is not None


def bookkeeping(module: nn.Module) -> list[Kept]:
    """Return the sizes that a module keeps and that must follow when its parameters are resized.

    Third-party modules keep theirs too; `trace` finds those by letting them vary.

    Example:
        >>> bookkeeping(nn.Linear(2, 3))[0]
        Kept(name='in_features', index=None, parameter='weight', dim=1, divisor=1, times=1)
    """
    if isinstance(module, nn.Linear):
        return [Kept("in_features", None, "weight", 1), Kept("out_features", None, "weight", 0)]
    if isinstance(module, nn.Bilinear):
        kept = [Kept("out_features", None, "weight", 0), Kept("in1_features", None, "weight", 1)]
        return [*kept, Kept("in2_features", None, "weight", 2)]
    if isinstance(module, nn.modules.conv._ConvNd):
        return _conv(module)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        parameter = "weight" if module.weight is not None else "running_mean"
        tensor = getattr(module, parameter)
        return [Kept("num_features", None, parameter, 0)] if tensor is not None else []
    if isinstance(module, _NORMS) and module.weight is not None:
        return [Kept("normalized_shape", i, "weight", i) for i in range(module.weight.ndim)]
    if isinstance(module, nn.GroupNorm) and module.weight is not None:
        # As many groups as channels normalise each channel by itself.
        names = ["num_channels", "num_groups"] if module.num_groups == module.num_channels else ["num_channels"]
        return [Kept(name, None, "weight", 0) for name in names]
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return [Kept("num_embeddings", None, "weight", 0), Kept("embedding_dim", None, "weight", 1)]
    if isinstance(module, nn.PReLU):
        return [Kept("num_parameters", None, "weight", 0)]
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    if isinstance(module, nn.RNNCellBase):
        gates = module.weight_hh.shape[0] // module.hidden_size
        return [Kept("input_size", None, "weight_ih", 1), Kept("hidden_size", None, "weight_ih", 0, gates)]
    if isinstance(module, nn.RNNBase):
        return [Kept("input_size", None, "weight_ih_l0", 1), *_recurrent(module)]
    return []


def of_input(module: nn.Module, ndim: int) -> dict[tuple[str, int | None], int]:
    """Return the sizes that a norm without parameters keeps, each with the dimension of its input that it is.

    Args:
        module: Any module.
        ndim: Dimensions of its input.

    Example:
        >>> of_input(nn.GroupNorm(2, 6, affine=False), 4)
        {('num_channels', None): 1}
    """
    if any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values())):
        return {}
    if isinstance(module, nn.GroupNorm):
        return {("num_channels", None): 1}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {("num_features", None): 1}
    if isinstance(module, _NORMS):
        shape = module.normalized_shape
        return {("normalized_shape", i): ndim - len(shape) + i for i in range(len(shape))}
    return {}


def conflict(module: nn.Module, sizes: Mapping[str, int]) -> str | None:
    """Return why a module cannot have these sizes, given by attribute, or None if it can.

    Example:
        >>> conflict(nn.LSTM(3, 6, proj_size=4), {"proj_size": 6})
        'an LSTM must have fewer projected than hidden units, not 6 of 6'
    """
    if isinstance(module, nn.RNNBase) and module.proj_size:
        hidden, projected = (sizes.get(name, getattr(module, name)) for name in ("hidden_size", "proj_size"))
        if projected >= hidden:
            return f"an LSTM must have fewer projected than hidden units, not {projected} of {hidden}"
    return None


def _conv(module: nn.modules.conv._ConvNd) -> list[Kept]:
    produced, consumed = (1, 0) if module.transposed else (0, 1)
    rows = int(module.weight.shape[0])
    if module.groups > 1 and module.weight.shape[1] == 1:
        # Depthwise: groups follow the channels, with a fixed number of kernels for each.
        sizes = {"in_channels": module.in_channels, "out_channels": module.out_channels, "groups": module.groups}
        return [Kept(name, None, "weight", 0, rows // size) for name, size in sizes.items()]
    if module.groups > 1:
        names = ("out_channels", "in_channels") if module.transposed else ("in_channels", "out_channels")
        return [Kept(names[0], None, "weight", 1, times=module.groups), Kept(names[1], None, "weight", 0)]
    return [Kept("in_channels", None, "weight", consumed), Kept("out_channels", None, "weight", produced)]


def _attention(module: nn.MultiheadAttention) -> list[Kept]:
    kept = [Kept("embed_dim", None, "out_proj.weight", 1)]
    kept.append(Kept("head_dim", None, "out_proj.weight", 1, module.num_heads))
    if module._qkv_same_embed_dim:
        return [*kept, Kept("kdim", None, "in_proj_weight", 1), Kept("vdim", None, "in_proj_weight", 1)]
    return [*kept, Kept("kdim", None, "k_proj_weight", 1), Kept("vdim", None, "v_proj_weight", 1)]


def _recurrent(module: nn.RNNBase) -> list[Kept]:
    gates = int(module.all_weights[0][1].shape[0]) // module.hidden_size
    kept = [Kept("hidden_size", None, "weight_hh_l0", 0, gates)]
    if module.proj_size:
        kept.append(Kept("proj_size", None, "weight_hh_l0", 1))
    return kept
