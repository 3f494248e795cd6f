"""Plain twins of the few fused kernels that say nothing about sizes, or take long over them.

PyTorch's recurrent kernels and ``bilinear`` accept symbolic sizes without checking them, and its attention is made of
dozens of operators. While a model is traced, these functions stand in for them: the same axes meet in the same way,
through a few ordinary operators. They are never run on data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def _gates(x: Tensor, h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    return F.linear(x, weights[0], biases[0]) + F.linear(h, weights[1], biases[1])


def _lstm_step(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, -1)
    c = f * c + i * g
    return o * c, c


def _gru_step(gates: Tensor, h: Tensor) -> Tensor:
    r, z, n = gates.chunk(3, -1)
    return z * n + r * h


def _layer(kind: str, x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor], biased: bool) -> Tensor:
    """Run one direction of one layer: ``x (..., in)``, ``h`` and ``c`` ``(batch, hidden)``."""
    biases = weights[2:4] if biased else (None, None)
    gates = _gates(x, h, weights[:2], biases)
    if kind == "lstm":
        out, _ = _lstm_step(gates, c if c is not None else h)
    else:
        out = _gru_step(gates, h) if kind == "gru" else gates + h
    projection = weights[4 if biased else 2 :]
    return F.linear(out, projection[0]) + h if projection else out  # what is projected is the next state


def _recurrent(
    kind: str,
    x: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    biased: bool,
    num_layers: int,
    _dropout: float,
    _training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """Stand in for ``torch.lstm``, ``torch.gru`` and ``torch.rnn_*`` on padded sequences."""
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    if batch_first:
        x = x.transpose(0, 1)
    last = []
    for layer in range(num_layers):
        outputs = []
        for i in range(layer * directions, (layer + 1) * directions):
            mine = weights[i * each : (i + 1) * each]
            c = states[1][i] if len(states) > 1 else None
            outputs.append(_layer(kind, x, states[0][i], c, mine, biased))
        last += [out[-1] for out in outputs]
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    if batch_first:
        x = x.transpose(0, 1)
    h = torch.stack(last)
    return (x, h, states[1]) if kind == "lstm" else (x, h)


def _cell(kind: str, x: Tensor, hx: Any, *weights: Tensor | None) -> Any:
    """Stand in for ``torch.lstm_cell``, ``torch.gru_cell`` and ``torch.rnn_*_cell``."""
    w_ih, w_hh, *biases = weights
    if w_ih is None or w_hh is None:
        raise TypeError("a recurrent cell needs both of its weights")
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    gates = _gates(x, states[0], (w_ih, w_hh), [*biases, None, None])
    if kind == "lstm":
        return _lstm_step(gates, states[1])
    return _gru_step(gates, states[0]) if kind == "gru" else gates


def _pack(x: Tensor, _lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Stand in for packing: every sequence as long as the longest: ``(steps * batch, ...)`` and ``(steps,)``."""
    if batch_first:
        x = x.transpose(0, 1)
    return x.flatten(0, 1), torch.ones(x.shape[0], dtype=torch.int64)


def _unpack(data: Tensor, batch_sizes: Tensor, batch_first: bool, _value: Any, _total: Any) -> tuple[Tensor, Tensor]:
    steps = batch_sizes.shape[0]
    x = data.reshape(steps, data.shape[0] // steps, *data.shape[1:])
    return x.transpose(0, 1) if batch_first else x, torch.ones(x.shape[1], dtype=torch.int64)


def _recurrent_packed(
    kind: str,
    data: Tensor,
    _batch_sizes: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    biased: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> Any:
    """Stand in for a recurrent kernel on packed sequences: all entries as one step of one long batch."""
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    wide = tuple(h[:, :1].expand(-1, data.shape[0], -1) for h in states)
    first = wide if kind == "lstm" else wide[0]
    arguments = (weights, biased, num_layers, dropout, training, bidirectional, False)
    out, *last = _recurrent(kind, data.unsqueeze(0), first, *arguments)
    return out.squeeze(0), *(h[:, : s.shape[1]] for h, s in zip(last, states, strict=True))


def _bilinear(left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.einsum("...i,oij,...j->...o", left, weight, right)
    return out if bias is None else out + bias


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 (says nothing about sizes, as the next)
    is_causal: bool = False,  # noqa: ARG001
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for attention, without the care that its own operators take of rows in which all is masked."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = ((query * factor).unsqueeze(-2) * key.unsqueeze(-3)).sum(-1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return (scores.softmax(-1).unsqueeze(-1) * value.unsqueeze(-3)).sum(-2)


def _grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Stand in for a product in which runs of rows have weights of their own: ``(s, k), (g, k, n), (g) -> (s, n)``."""
    return (rows @ weights * ends.reshape(-1, 1, 1).to(rows.dtype)).sum(0)


class PlainTwins(TorchFunctionMode):
    """Replaces fused kernels by their twins while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._batch = 0  # sequences in the last packed batch: its size is read from a tensor otherwise
        self._own_attention = F.scaled_dot_product_attention

    def __enter__(self) -> PlainTwins:
        F.scaled_dot_product_attention = _attention  # for PyTorch's functions, whose inside a mode does not see
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        F.scaled_dot_product_attention = self._own_attention
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        kind = name.split("_")[0]
        if name == "bilinear":
            return _bilinear(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            packed = isinstance(args[1], Tensor) and args[1].ndim == 1
            return (_recurrent_packed if packed else _recurrent)(kind, *args, **kwargs)
        if name in ("grouped_mm", "_grouped_mm") and [getattr(t, "ndim", 0) for t in args] == [2, 3]:
            ends = kwargs.get("offs")
            if ends is not None and kwargs.get("bias") is None:
                return _grouped_mm(args[0], args[1], ends)
        if name == "_pack_padded_sequence":
            self._batch = int(args[1].shape[0])
            return _pack(*args, **kwargs)
        if name == "_pad_packed_sequence":
            return _unpack(*args, **kwargs)
        if name == "zeros" and any(isinstance(size, Tensor) for size in args):
            args = tuple(self._batch if isinstance(size, Tensor) else size for size in args)
        if name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
            return _cell(kind, *args, **kwargs)
        return func(*args, **kwargs)
