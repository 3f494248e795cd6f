"""BORAT: ALI-G with several tangents of the loss, from several mini-batches, in one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grow.optim.ball import check_ball, follow_growth, project_, shapes_of
from lightning_grow.optim.base import within
from lightning_grow.optim.bundle import bundle_weights
from lightning_grow.optim.loss import LossOptimizer, is_finite
from lightning_grow.optim.pieces import CHUNK, pieces, unit_products
from lightning_grow.optim.polyak import momentum_buffers
from lightning_grow.optim.tensors import dot, squared_norm, subtract_, total

START, GRADIENTS = "bundle_start", "bundle_gradients"


class BORAT(LossOptimizer):
    r"""Minimise a bundle of tangents of the loss and a proximal term: robust to a maximal rate that is too large.

    From the parameters :math:`w_0`, a bundle of N pieces takes N - 1 mini-batches: the bound :math:`b_0 = b` and the
    tangents :math:`b_i + \langle g_i, w - w_0 \rangle` at auxiliary points. After each mini-batch, the parameters go to

    .. math:: \operatorname*{argmin}_w \frac{\|w - w_0\|^2}{2 \eta} + \max_i\ (b_i + \langle g_i, w - w_0 \rangle)
       = w_0 - \eta \sum_i a_i g_i,

    with the exact solution :math:`a` of the dual problem (`bundle_weights`). That is the next auxiliary point, or, with
    N pieces, the step :math:`\Delta` of the bundle: :math:`v \leftarrow \mu v + \Delta`,
    :math:`w \leftarrow w_0 + \Delta + \mu v`. Two pieces are ALI-G.

    Between bundles (``at_bundle_boundary``), the parameters are the model; in mid-bundle they are an auxiliary point,
    and ``flush()`` goes back to :math:`w_0`. Under a Lightning Trainer, the callback `LossFeed` does that before
    validation and at the end of training. A checkpoint in mid-bundle resumes bit by bit.

    When the network grows or shrinks in mid-bundle, what is kept follows. The next step closes the bundle where it is:
    the point at which the network was changed, and its function preserved, becomes the start of the next bundle.

    Args:
        params: Parameters, named parameters, or param groups.
        lr: The rate of the proximal term, at least 0. The authors try 0.01, 0.1, 1 and 10.
        num_pieces: N, from 2 to 10: the bound and N - 1 mini-batches for each step.
        momentum: In [0, 1).
        max_norm: Largest norm of the parameters of a group, above 0; None: no limit. One ball for each param group:
            they are projected into it at construction and at the end of each bundle.
        lower_bound: What the loss cannot fall below.
        max_skips: How many mini-batches in a row may be skipped, for want of a finite loss and gradient, before an
            error. A bundle waits for the next.
        maximize: Refused.
        foreach: False: a plain loop over tensors, the reference.
        differentiable: Refused.
        capturable: Refused.

    Raises:
        ValueError: If an option is out of range, or param groups differ in ``num_pieces`` or ``lower_bound``.

    Note:
        The authors' code counts N as here, but its ``n=2`` never updates. It keeps the auxiliary points; only dot
        products of gradients are needed: :math:`b_i = \ell_i + \eta \sum_j a_j \langle g_i, g_j \rangle`, with the
        weights :math:`a` that led to the point.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = BORAT([w], lr=100.0, num_pieces=3, momentum=0.0)
        >>> for batch in range(2):
        ...     optimizer.zero_grad()
        ...     loss = w[batch].abs()
        ...     loss.backward()
        ...     optimizer.set_loss(loss)
        ...     optimizer.step()
        ...     print(optimizer.at_bundle_boundary, w.tolist())
        False [0.0, 4.0]
        True [0.0, 0.0]

    Reference:
        Paren, Berrada, Poudel, Kumar, "A Stochastic Bundle Method for Interpolation", JMLR 23(15), 2022,
        arXiv:2201.12678. The closed form for three pieces is ours.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        num_pieces: int = 3,
        momentum: float = 0.9,
        max_norm: float | None = None,
        lower_bound: float = 0.0,
        max_skips: int = 10,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "num_pieces": num_pieces,
            "momentum": momentum,
            "max_norm": max_norm,
            "lower_bound": lower_bound,
            "max_skips": max_skips,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        with torch.no_grad():
            project_(self.param_groups[-1])

    @property
    def at_bundle_boundary(self) -> bool:
        """Whether the parameters are the model, and not an auxiliary point."""
        return "bundle" not in self._notes

    @torch.no_grad()
    def flush(self) -> None:
        """Give up a bundle in the making: the parameters go back to where it began."""
        for group in self.param_groups:
            for p in group["params"]:
                if START in self.state.get(p, {}):
                    p.copy_(self.state[p][START])
        self._drop()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one mini-batch into the bundle and go to the next point, or skip it and count it.

        Args:
            closure: Computes the loss and its gradients again, and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            RuntimeError: If the loss is not known, or too many steps in a row were skipped.
        """
        returned, loss = self._evaluate(closure)
        if loss is None:
            return returned
        bundle = self._bundle()
        size = len(bundle.heights)
        parts = [self._part(group, size) for group in self.param_groups]
        slow = any(self._is_slow(group) for group in self.param_groups)
        value, rows = _rows(loss, parts, size, slow=slow)
        if not is_finite(value, *(number for row in rows for number in row)):
            self._skip(value, sum(row[-1] for row in rows))
            return returned
        self._step_taken()
        for gram, row in zip(bundle.grams, rows, strict=True):
            gram.append(row)
        a = self._weights(bundle, value)
        is_last = size + 2 == self.param_groups[0]["num_pieces"]
        for group, part in zip(self.param_groups, parts, strict=True):
            (self._finish if is_last else self._go)(group, part, size, a)
        if is_last:
            self._drop()
        else:
            self._notes["bundle"] = {**bundle._asdict(), "weights": a}
        return returned

    def _bundle(self) -> _Bundle:
        """Return the bundle in the making, or a new one. It is closed where the shapes of parameters have changed."""
        shapes = shapes_of([p for group in self.param_groups for p in group["params"]])
        found = self._notes.get("bundle")
        if found is not None and (found["shapes"] != shapes or len(found["grams"]) != len(self.param_groups)):
            self._drop()
            found = None
        if found is None:
            for group in self.param_groups:
                follow_growth(group)
            return _Bundle([], [[] for _ in self.param_groups], [], shapes)
        grams = [[list(row) for row in gram] for gram in found["grams"]]
        return _Bundle(list(found["heights"]), grams, found["weights"], found["shapes"])

    def _part(self, group: dict[str, Any], size: int) -> _Part:
        """Return what a group brings to the bundle: its parameters with a gradient, now or before."""
        params, grads = self._with_gradients(group)
        earlier = [p for p in group["params"] if GRADIENTS in self.state.get(p, {})]
        kept = []
        for i in range(size):
            having = [p for p in earlier if self.state[p][GRADIENTS][i] is not None]
            kept.append((having, [self.state[p][GRADIENTS][i] for p in having]))
        return _Part([*kept, (params, grads)])

    def _weights(self, bundle: _Bundle, loss: float) -> list[float]:
        """Take the newest piece in, and return the weights of all pieces but the bound."""
        rates = [float(group["lr"]) for group in self.param_groups]
        size = len(bundle.heights)
        gram = torch.zeros(size + 2, size + 2, dtype=torch.float64)
        for rate, rows in zip(rates, bundle.grams, strict=True):
            for i, row in enumerate(rows):
                gram[i + 1, 1 : i + 2] += rate * torch.tensor(row, dtype=torch.float64)
        gram = gram + gram.tril(-1).T
        weights = torch.tensor(bundle.weights, dtype=torch.float64)
        displaced = float(gram[size + 1, 1 : size + 1] @ weights)  # b = l - <g, p - w_0>, p = w_0 - eta sum a_j g_j
        bundle.heights.append(loss - self.param_groups[0]["lower_bound"] + displaced)
        heights = torch.tensor([0.0, *bundle.heights], dtype=torch.float64)
        found: list[float] = bundle_weights(gram, heights)[1:].tolist()
        return found

    def _go(self, group: dict[str, Any], part: _Part, size: int, a: list[float]) -> None:
        """Go to the next auxiliary point, and keep what the bundle needs."""
        params, grads = part.pieces[-1]
        if size == 0 and self._in_blocks(group, params):
            for p, g in zip(params, grads, strict=True):
                start, kept = torch.empty_like(p, requires_grad=False), torch.empty_like(g)
                self.state[p].update({START: start, GRADIENTS: [kept]})
                for piece in pieces((p, g, start, kept), 1, CHUNK):
                    w, d, w_0, copy = piece.tensors
                    w_0.copy_(w)
                    copy.copy_(d)
                    w.add_(d, alpha=-float(group["lr"]) * a[0])
            return
        for p, g in zip(params, grads, strict=True):
            state = self.state[p]
            if START not in state:
                state[START] = p.detach().clone(memory_format=torch.preserve_format)
            state.setdefault(GRADIENTS, [None] * size).append(g.detach().clone(memory_format=torch.preserve_format))
        for p in group["params"]:
            gradients = self.state[p][GRADIENTS] if GRADIENTS in self.state.get(p, {}) else None
            if gradients is not None and len(gradients) == size:
                gradients.append(None)
        self._move(group, part, a, size)

    def _finish(self, group: dict[str, Any], part: _Part, size: int, a: list[float]) -> None:
        """Take the step of the bundle."""
        momentum, params = group["momentum"], part.params
        if momentum and params:
            buffers = momentum_buffers(self.state, params)
            if self._in_blocks(group, params):
                self._move(group, part, a, size, momentum)
            else:
                torch._foreach_mul_(buffers, momentum)
                for (having, grads), weight in zip(part.pieces, a, strict=True):
                    moved = [self.state[p]["momentum_buffer"] for p in having]
                    _subtract(group, moved, grads, float(group["lr"]) * weight)
                self._move(group, part, a, size)
                _subtract(group, params, buffers, -momentum)
        else:
            self._move(group, part, a, size)
        project_(group)

    def _move(self, group: dict[str, Any], part: _Part, a: list[float], size: int, momentum: float = 0.0) -> None:
        """Go to the start of the bundle minus the weighted gradients."""
        rates = [float(group["lr"]) * weight for weight in a]
        starts = {id(p): self.state[p][START] for p in part.params if size and START in self.state[p]}
        if self._in_blocks(group, part.params):
            for p in part.params:
                steps = [(g, rates[i]) for i, g in part.of[id(p)] if rates[i]]
                buffer = self.state[p]["momentum_buffer"] if momentum else None
                _move_in_blocks(p, starts.get(id(p)), buffer, steps, momentum)
            return
        for p in part.params:
            if id(p) in starts:
                p.copy_(starts[id(p)])
        for (having, grads), rate in zip(part.pieces, rates, strict=True):
            _subtract(group, having, grads, rate)

    def _in_blocks(self, group: dict[str, Any], params: Sequence[Tensor]) -> bool:
        """Whether parameters are moved block by block, which pays on the CPU."""
        return not self._is_slow(group) and all(p.device.type == "cpu" for p in params)

    def _drop(self) -> None:
        """Forget the bundle."""
        self._notes.pop("bundle", None)
        for key in list(self.state):
            if isinstance(key, Tensor):
                state = self.state[key]
                state.pop(START, None)
                state.pop(GRADIENTS, None)
                if not state:
                    del self.state[key]

    @override
    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        within(group, 0, 1, "momentum")
        check_ball(group)
        if not math.isfinite(float(group["lr"])):
            raise ValueError(f"Expected a finite `lr`, found {group['lr']!r}.")
        pieces = group["num_pieces"]
        if not isinstance(pieces, int) or not 2 <= pieces <= 10:
            raise ValueError(f"Expected `num_pieces` to be a whole number from 2 to 10, found {pieces!r}.")
        for name in ("num_pieces", "lower_bound"):
            if group[name] != self.param_groups[0][name]:
                raise ValueError(
                    f"Param groups share one bundle, but `{name}` is {self.param_groups[0][name]!r} in the first and "
                    f"{group[name]!r} in another."
                )


class _Bundle(NamedTuple):
    """The pieces so far.

    Attributes:
        heights: Each tangent at the start of the bundle, above the bound.
        grams: For each param group, the lower triangle of dot products of gradients.
        weights: The weights that led to the present point.
        shapes: Tells whether the network has changed.
    """

    heights: list[float]
    grams: list[list[list[float]]]
    weights: list[float]
    shapes: int


class _Part:
    """What a param group brings to a bundle.

    Attributes:
        pieces: For each piece, the parameters that had a gradient, and their gradients.
        params: All of them.
        of: For each parameter, its gradients, with the number of the piece.
    """

    def __init__(self, kept: list[tuple[list[Tensor], list[Tensor]]]) -> None:
        self.pieces = kept
        self.params = list({id(p): p for params, _ in kept for p in params}.values())
        self.of: dict[int, list[tuple[int, Tensor]]] = {id(p): [] for p in self.params}
        for number, (params, grads) in enumerate(kept):
            for p, g in zip(params, grads, strict=True):
                self.of[id(p)].append((number, g))


def _rows(loss: Tensor, parts: list[_Part], size: int, *, slow: bool) -> tuple[float, list[list[float]]]:
    """Return the loss, and for each group the dot products of the newest gradient with all: one wait for the device."""
    sums = []
    for part in parts:
        params, grads = part.pieces[-1]
        if not slow and all(g.device.type == "cpu" and g.dtype in (torch.float32, torch.float64) for g in grads):
            sums += _row_in_blocks(part, size)
            continue
        newest = {id(p): g for p, g in zip(params, grads, strict=True)}
        for i, (having, kept) in enumerate(part.pieces):
            pairs = [(newest[id(p)], g) for p, g in zip(having, kept, strict=True) if id(p) in newest]
            if slow:
                sums.append(
                    sum(((x.to(loss.dtype) * y.to(loss.dtype)).sum() for x, y in pairs), torch.zeros_like(loss))
                )
            elif i == size:
                sums.append(squared_norm([x for x, _ in pairs]))
            else:
                sums.append(dot([x for x, _ in pairs], [y for _, y in pairs]))
    value, *numbers = torch.stack([loss, *(s.to(loss) for s in sums)]).tolist()
    return value, [numbers[k * (size + 1) : (k + 1) * (size + 1)] for k in range(len(parts))]


def _row_in_blocks(part: _Part, size: int) -> list[Tensor]:
    """Return the dot products of the newest gradient with all, block by block: each number is read once from memory."""
    sums: list[list[Tensor]] = [[] for _ in range(size + 1)]
    for p in part.pieces[-1][0]:
        numbers, grads = zip(*part.of[id(p)], strict=True)
        for piece in pieces(grads, 1, CHUNK):
            for number, g in zip(numbers, piece.tensors, strict=True):
                sums[number].append(unit_products(piece.tensors[-1], g, 1))
    return [total(s) for s in sums]


def _move_in_blocks(
    p: Tensor, start: Tensor | None, buffer: Tensor | None, steps: Sequence[tuple[Tensor, float]], momentum: float
) -> None:
    """Do what `_move` and `_finish` do for one parameter, block by block: each number is read once from memory."""
    kept = [x for x in (start, buffer) if x is not None]
    for piece in pieces((p, *kept, *(g for g, _ in steps)), 1, CHUNK):
        w, *rest = piece.tensors
        w_0 = rest.pop(0) if start is not None else None
        v = rest.pop(0) if buffer is not None else None
        if v is not None:
            v.mul_(momentum)
        if w_0 is not None and not steps:
            w.copy_(w_0)
        for number, (g, (_, rate)) in enumerate(zip(rest, steps, strict=True)):
            if v is not None:
                v.add_(g, alpha=-rate)
            if w_0 is not None and number == 0:
                torch.add(w_0, g, alpha=-rate, out=w)
            else:
                w.add_(g, alpha=-rate)
        if v is not None:
            w.add_(v, alpha=momentum)


def _subtract(group: dict[str, Any], params: list[Tensor], directions: list[Tensor], rate: float) -> None:
    if rate == 0:
        return
    if group["foreach"] is False:
        for p, d in zip(params, directions, strict=True):
            p.sub_(rate * d)
    else:
        subtract_(params, directions, rate)
