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
from lightning_grow.optim.fused import Shift, dots, shift_
from lightning_grow.optim.loss import LossOptimizer, is_finite
from lightning_grow.optim.pieces import CHUNK, pieces
from lightning_grow.optim.polyak import momentum_buffers
from lightning_grow.optim.tensors import SMALL, dot, squared_norm, subtract_

GRADIENT = "bundle_grad"


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
    and ``flush()`` goes back to :math:`w_0`, which is worked out from the point and the gradients, to rounding. Under
    a Lightning Trainer, the callback `LossFeed` does that before validation and at the end of training. A checkpoint
    in mid-bundle resumes bit by bit.

    When the network grows or shrinks in mid-bundle, the next step (or ``flush()``) closes the bundle where it is: the
    point at which the network was changed, and its function preserved, becomes the start of the next bundle.

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
        fused: True: loops compiled by Numba (the extra ``fused``; in seconds, once) that read each number once, for
            float32 and float64 on the CPU. Not together with ``foreach``.
        copy_grad: Keep copies of gradients. By default they are kept by reference; where something overwrites them in
            mid-bundle, that is noticed (but for writing through ``.data``), the present point becomes the start of a
            new bundle, and copies are made from then on.
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
        fused: bool | None = None,
        copy_grad: bool = False,
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
            "fused": fused,
            "copy_grad": copy_grad,
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
        """Give up a bundle in the making: the parameters go back to where it began, to rounding.

        If the network was changed in the meantime, the parameters stay where they are.
        """
        found = self._notes.get("bundle")
        if found is not None and self._is_whole(found, is_new=False):
            bundle = _Bundle(**found)
            for group, moved in zip(self.param_groups, bundle.moved, strict=False):
                part = self._part(group, len(bundle.heights), with_newest=False)
                self._shift(group, part, moved)
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
        value, rows = _rows(loss, parts, slow=slow)
        if not is_finite(value, *(number for row in rows for number in row)):
            self._skip(value, sum(row[-1] for row in rows))
            return returned
        self._step_taken()
        for gram, row in zip(bundle.grams, rows, strict=True):
            gram.append(row)
        a = self._weights(bundle, value)
        is_last = size + 2 == self.param_groups[0]["num_pieces"]
        for group, part, moved in zip(self.param_groups, parts, bundle.moved, strict=True):
            ahead = [float(group["lr"]) * weight for weight in a]
            back = [*moved, 0.0]
            self._shift(group, part, [b - c for b, c in zip(back, ahead, strict=True)], ahead if is_last else None)
            moved[:] = ahead
            if is_last:
                project_(group)
            else:
                self._keep(group, part, size)
        if is_last:
            self._drop()
        else:
            self._notes["bundle"] = bundle._asdict()
        return returned

    def _bundle(self) -> _Bundle:
        """Return the bundle in the making, or a new one: where shapes have changed, or a gradient was overwritten."""
        found = self._notes.get("bundle")
        if found is not None and not self._is_whole(found):
            self._drop()
            found = None
        if found is None:
            for group in self.param_groups:
                follow_growth(group)
            return _Bundle([], [[] for _ in self.param_groups], [[] for _ in self.param_groups], self._shapes)
        heights, grams, moved = list(found["heights"]), found["grams"], found["moved"]
        return _Bundle(heights, [list(rows) for rows in grams], [list(each) for each in moved], found["shapes"])

    @property
    def _shapes(self) -> int:
        return shapes_of([p for group in self.param_groups for p in group["params"]])

    def _is_whole(self, found: dict[str, Any], *, is_new: bool = True) -> bool:
        """Return whether a bundle belongs to the network as it is, and its gradients are what they were.

        Args:
            found: The bundle.
            is_new: Whether there are new gradients by now.
        """
        if found["shapes"] != self._shapes or len(found["grams"]) != len(self.param_groups):
            return False
        keys = [f"{GRADIENT}_{i}" for i in range(len(found["heights"]))]
        for group in self.param_groups:
            states = [(p.grad if is_new else None, self.state[p]) for p in group["params"] if p in self.state]
            kept = [(state[key], grad) for key in keys for grad, state in states if key in state]
            if not self._kept.are_intact(group, [g for g, _ in kept], [grad for _, grad in kept]):
                return False
        return True

    def _part(self, group: dict[str, Any], size: int, *, with_newest: bool = True) -> _Part:
        """Return what a group brings to the bundle: its parameters with a gradient, now or before."""
        having = []
        for i in range(size):
            key = f"{GRADIENT}_{i}"
            params = [p for p in group["params"] if key in self.state.get(p, {})]
            having.append((params, [self.state[p][key] for p in params]))
        newest = [self._with_gradients(group)] if with_newest else []
        return _Part([*having, *newest], fused=bool(group["fused"]))

    def _weights(self, bundle: _Bundle, loss: float) -> list[float]:
        """Take the newest piece in, and return the weights of all pieces but the bound."""
        size = len(bundle.heights)
        gram = [[0.0] * (size + 2) for _ in range(size + 2)]
        displaced = 0.0
        for group, rows, moved in zip(self.param_groups, bundle.grams, bundle.moved, strict=True):
            rate = float(group["lr"])
            for i, row in enumerate(rows, start=1):
                for j, number in enumerate(row, start=1):
                    gram[i][j] += rate * number
            displaced += sum(m * number for m, number in zip(moved, rows[size], strict=False))
        for i in range(size + 2):
            for j in range(i):
                gram[j][i] = gram[i][j]
        bundle.heights.append(loss - self.param_groups[0]["lower_bound"] + displaced)  # l - <g, w - w_0>
        heights = torch.tensor([0.0, *bundle.heights], dtype=torch.float64)
        found: list[float] = bundle_weights(torch.tensor(gram, dtype=torch.float64), heights)[1:].tolist()
        return found

    def _keep(self, group: dict[str, Any], part: _Part, number: int) -> None:
        """Keep the newest gradients."""
        params, grads = part.pieces[-1]
        states = [self.state[p] for p in params]
        self._kept.keep(group, states, grads, owned=False, key=f"{GRADIENT}_{number}")

    def _shift(self, group: dict[str, Any], part: _Part, shares: list[float], step: list[float] | None = None) -> None:
        r"""Add gradients to parameters, each piece times its share; with a step, momentum follows it and is added.

        Args:
            group: The param group.
            part: Its pieces of the bundle.
            shares: One for each piece.
            step: The same for the step of a whole bundle from its start, along negative gradients.
        """
        params, momentum = part.params, group["momentum"] if step is not None else 0.0
        buffers = dict(zip(map(id, params), momentum_buffers(self.state, params), strict=True)) if momentum else {}
        whole = part
        if not self._is_slow(group) and (momentum or len(part.pieces) > 1):
            whole, large = part.parted()
            if group["fused"]:
                shifts = [_shift_of(p, each, shares, buffers.get(id(p)), step or []) for p, each in large]
                large = [large[i] for i in shift_(shifts, momentum, push=momentum)]
            for p, numbered in large:
                _shift_in_blocks(p, numbered, shares, buffers.get(id(p)), step or [], momentum)
        velocities = [buffers[id(p)] for p in whole.params] if momentum else []
        if momentum and whole.params:
            torch._foreach_mul_(velocities, momentum)
        for number, (having, grads) in enumerate(whole.pieces):
            if momentum and step is not None:
                _subtract(group, [buffers[id(p)] for p in having], grads, step[number])
            _subtract(group, having, grads, -shares[number])
        if momentum:
            _subtract(group, whole.params, velocities, -momentum)

    def _drop(self) -> None:
        """Forget the bundle."""
        self._notes.pop("bundle", None)
        for p in [p for group in self.param_groups for p in group["params"] if p in self.state]:
            state = self.state[p]
            for key in [key for key in state if key.startswith(GRADIENT)]:
                del state[key]
            if not state:
                del self.state[p]

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
        moved: For each param group, how far the present point is from the start along each negative gradient.
        shapes: Tells whether the network has changed.
    """

    heights: list[float]
    grams: list[list[list[float]]]
    moved: list[list[float]]
    shapes: int


class _Part:
    """What a param group brings to a bundle.

    Attributes:
        pieces: For each piece, the parameters that had a gradient, and their gradients.
        params: All of them.
        fused: Whether the kernels of `fused` are used.
    """

    def __init__(self, found: list[tuple[list[Tensor], list[Tensor]]], *, fused: bool) -> None:
        self.pieces = found
        self.fused = fused
        self.params = list({id(p): p for params, _ in found for p in params}.values())

    def parted(self) -> tuple[_Part, list[tuple[Tensor, list[tuple[int, Tensor]]]]]:
        """Return what is small or not on the CPU, and each large parameter with its gradients, which have numbers."""
        large: dict[int, tuple[Tensor, list[tuple[int, Tensor]]]] = {
            id(p): (p, []) for p in self.params if p.numel() >= SMALL and p.device.type == "cpu"
        }
        rest: list[tuple[list[Tensor], list[Tensor]]] = []
        for number, (params, grads) in enumerate(self.pieces):
            rest.append(([], []))
            for p, g in zip(params, grads, strict=True):
                if id(p) in large:
                    large[id(p)][1].append((number, g))
                else:
                    rest[-1][0].append(p)
                    rest[-1][1].append(g)
        return _Part(rest, fused=self.fused), list(large.values())


def _rows(loss: Tensor, parts: list[_Part], *, slow: bool) -> tuple[float, list[list[float]]]:
    """Return the loss, and for each group the dot products of the newest gradient with all: one wait for the device."""
    rows = [_row(part, loss, slow=slow) for part in parts]
    value, *numbers = torch.stack([loss, *(s.to(loss) for row in rows for s in row)]).tolist()
    size = len(rows[0])
    return value, [numbers[k * size : (k + 1) * size] for k in range(len(parts))]


def _row(part: _Part, loss: Tensor, *, slow: bool) -> list[Tensor]:
    """Return the products of the newest gradient of a group with those of all pieces."""
    params, newest = part.pieces[-1]
    columns = [(newest, grads) for _, grads in part.pieces]
    places = list(map(id, params))
    if any(list(map(id, having)) != places for having, _ in part.pieces):  # some had no gradient in a piece
        gradient_of = dict(zip(places, newest, strict=True))
        columns = []
        for having, grads in part.pieces:
            both = [(gradient_of[id(p)], g) for p, g in zip(having, grads, strict=True) if id(p) in gradient_of]
            columns.append(([x for x, _ in both], [y for _, y in both]))
    elif part.fused:
        return dots(newest, [grads for _, grads in columns], fused=True)
    if slow:
        zero = torch.zeros_like(loss)
        return [sum(((x.to(zero) * y.to(zero)).sum() for x, y in zip(*c, strict=True)), zero) for c in columns]
    return [*(dot(xs, ys) for xs, ys in columns[:-1]), squared_norm(newest)]


def _shift_of(
    p: Tensor,
    grads: list[tuple[int, Tensor]],
    shares: Sequence[float],
    buffer: Tensor | None,
    step: Sequence[float],
) -> Shift:
    numbers = [number for number, _ in grads]
    return Shift(
        p, [g for _, g in grads], [shares[i] for i in numbers], buffer, [step[i] for i in numbers] if step else []
    )


def _shift_in_blocks(
    p: Tensor,
    grads: list[tuple[int, Tensor]],
    shares: Sequence[float],
    buffer: Tensor | None,
    step: Sequence[float],
    momentum: float,
) -> None:
    """Do for one parameter what `BORAT._shift` does, block by block: each number is read once from memory."""
    kept = [p] if buffer is None else [p, buffer]
    for piece in pieces((*kept, *(g for _, g in grads)), 1, CHUNK):
        w, gradients = piece.tensors[0], piece.tensors[len(kept) :]
        for (number, _), g in zip(grads, gradients, strict=True):
            if shares[number]:
                w.add_(g, alpha=shares[number])
        if buffer is not None:
            v = piece.tensors[1].mul_(momentum)
            for (number, _), g in zip(grads, gradients, strict=True):
                if step[number]:
                    v.add_(g, alpha=-step[number])
            w.add_(v, alpha=momentum)


def _subtract(group: dict[str, Any], params: list[Tensor], directions: list[Tensor], rate: float) -> None:
    if rate == 0:
        return
    if group["foreach"] is False:
        for p, d in zip(params, directions, strict=True):
            p.sub_(rate * d)
    else:
        subtract_(params, directions, rate)
