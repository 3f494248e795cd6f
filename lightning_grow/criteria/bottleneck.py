r"""What the weights between two layers cannot do for the loss, and what new units between them would do best.

Verbockhaven, Rudkiewicz, Chevallier, Charpiat, "Growing Tiny Networks: Spotting Expressivity Bottlenecks and Fixing
Them Optimally", TMLR 2024, arXiv:2405.19816. For each sample, the loss wants the output ``y`` of a layer to move along
:math:`V = -\partial \ell / \partial y`. With the layer's inputs :math:`B_1` (one row for each sample), moving its
weights serves the part of ``V`` in their span; what is left, :math:`V_\perp`, is the *bottleneck*. New units read the
inputs :math:`B_2` of the layer before; what they serve best follows from

.. math:: S = B_2^T B_2 / n, \quad N = B_2^T V_\perp / n, \quad S^{-1/2} N = U \Lambda W^T:

unit ``k`` has the fan-in :math:`\sqrt{\lambda_k} S^{-1/2} u_k` and the fan-out :math:`\sqrt{\lambda_k} w_k`, its
activation taken as the identity. The bottleneck falls by :math:`\sum_k \lambda_k^2`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grow.criteria.objective import Objective
from lightning_grow.criteria.overgrown import Overgrown
from lightning_grow.criteria.transparent import refusal, transparent_values
from lightning_grow.structure.axes import AxisGroup, Role, tensor_of
from lightning_grow.structure.errors import StructureError
from lightning_grow.surgery.edit import Edit, widen


class Neighbours(NamedTuple):
    """The two layers between which a group lies, by qualified name: what makes its units, and what uses them."""

    producer: str
    consumer: str


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """What was found between two layers, in float64 on the CPU.

    Per sample means: of ``n`` samples, ``1/n`` of the sum. ``p`` inputs of the layer that makes the units, ``r``
    outputs of the one that uses them.

    Attributes:
        group: The group.
        neighbours: The layers.
        goal: Squared length of ``V``, per sample.
        before: The bottleneck: squared length of what is left of it, per sample.
        values: Singular values, falling: by how much units reduce it. Empty if there is nothing to express.
        fan_in: Weights of new units ``(k, p)``, and their biases last if the layer has any.
        fan_out: ``(k, r)``, with the shape of the kernel behind where it is a convolution.
        update: The best step of the present weights, in the shape of the consumer's weight; it is added.
        mean: Mean input of the producer, with a 1 for the bias: ``(p,)``.
        moments: Second moments of that: ``(p, p)``. At borders, each place counts as often as taps see it.
    """

    group: AxisGroup
    neighbours: Neighbours
    goal: float
    before: float
    values: Tensor
    fan_in: Tensor
    fan_out: Tensor
    update: Tensor
    mean: Tensor
    moments: Tensor

    @property
    def gains(self) -> Tensor:
        """By how much each unit reduces the bottleneck, and the loss for a first small step: ``(k,)``."""
        return self.values.square()

    def after(self, num_units: int) -> float:
        """Return the bottleneck with so many units, if their activation were the identity."""
        return self.before - float(self.gains[:num_units].sum())

    def edit(self, model: nn.Module, num_units: int, amplitude: float = 1.0, *, update: bool = False) -> Edit:
        r"""Return the edit that appends the first units.

        Behind a batch norm, new units get the statistics that they have on the observed batches, and a gain and bias
        that undo them: the norm lets them through as they are, in eval mode and, nearly, in train mode.

        Args:
            model: The model; only read.
            num_units: Units to append, at most as many as there are values.
            amplitude: Factor of what the units contribute, :math:`\gamma`: fan-in and fan-out are multiplied by its
                root.
            update: Whether the present weights move, too, by ``amplitude`` times the best step.
        """
        group, k = self.group, num_units
        weight = f"{self.neighbours.consumer}.weight"
        present = tensor_of(model, weight)
        shifts = {}
        if update:
            new = self.update.new_zeros([present.shape[0], k, *present.shape[2:]])
            shifts[f"{weight}[1]"] = torch.cat([amplitude * self.update, new], dim=1)
        if not k:
            return Edit(group, tuple(range(group.size)), shifts=shifts)
        fan_in = amplitude**0.5 * self.fan_in[:k]
        made = tensor_of(model, f"{self.neighbours.producer}.weight")
        length = made[0].numel()
        values = transparent_values(model, group, k) | self._norm_values(model, fan_in)
        values[f"{self.neighbours.producer}.weight[0]"] = fan_in[:, :length].reshape(k, *made.shape[1:])
        if fan_in.shape[1] > length:
            values[f"{self.neighbours.producer}.bias[0]"] = fan_in[:, length]
        values[f"{weight}[1]"] = amplitude**0.5 * self.fan_out[:k].transpose(0, 1)
        edit = widen(group, k, values=values)
        return Edit(group, edit.index, values=values, shifts=shifts, seed=edit.seed)

    def _norm_values(self, model: nn.Module, fan_in: Tensor) -> dict[str, Tensor]:
        values = {}
        mean = fan_in @ self.mean
        variance = ((fan_in @ self.moments) * fan_in).sum(dim=1) - mean.square()
        variance = variance.clamp(min=0)
        for axis in self.group.with_role("carried"):
            path, _, leaf = axis.tensor.rpartition(".")
            eps: Any = model.get_submodule(path).eps
            found = {"weight": (variance + eps).sqrt(), "bias": mean, "running_mean": mean, "running_var": variance}
            if leaf in found:
                values[axis.label] = found[leaf]
        return values


def bottlenecks(
    model: nn.Module,
    groups: Sequence[AxisGroup],
    objective: Objective,
    *,
    with_bias: bool = True,
    project: bool = True,
    whiten: bool = True,
    eigenvalue_threshold: float = 1e-6,
    singular_threshold: float = 1e-3,
    on_refusal: Refusal | None = None,
) -> tuple[float, dict[str, Bottleneck]]:
    """Return the loss, and by group name what its neighbours cannot do and new units would.

    Two passes over the objective, for all groups together: the first finds what present weights can do, the second what
    is left. All sums are added up over processes.

    Between convolutions, a new unit acts through all taps of the next kernel. ``S`` is then the sum over taps, which
    bounds what their overlap can do: the bottleneck falls by about the sum of the gains, or more. With one tap, and
    between linear layers, it is exact.

    Args:
        model: The model; it is not changed.
        groups: The groups.
        objective: The loss, a mean over the samples of a batch: the first dimension of what a layer returns.
        with_bias: Whether the bias of the consumer counts among what present weights can do.
        project: Whether what present weights can do is taken off; otherwise units are found for all of ``V``.
        whiten: Whether ``S`` is used; otherwise it is the identity. With neither, directions are those of GradMax.
        eigenvalue_threshold: Eigenvalues of Gram matrices below this share of the largest are dropped.
        singular_threshold: Singular values below this share of the length of ``V`` are dropped.
        on_refusal: Is told the name of each group that cannot be measured so, and why; it is left out then. By default,
            an error is raised.

    Raises:
        StructureError: If a group does not lie between two layers of the known kinds, with the reason.
        MeasurementError: If the loss cannot be measured.

    Example:
        >>> from lightning_grow.structure import trace
        >>> model, x = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)).double(), torch.randn(32, 4).double()
        >>> objective = Objective(lambda m, x: (m(x) - x[:, :3]).square().sum(dim=1).mean(), [x])
        >>> loss, found = bottlenecks(model, [trace(model, x)["0"]], objective)
        >>> found["0"].goal >= found["0"].before > found["0"].after(2)
        True
    """
    copy = Overgrown(model, []).model
    known: dict[str, Neighbours] = {}
    reasons: dict[str, str] = {}
    for group in groups:
        found = neighbours_of(model, group)
        if isinstance(found, str):
            reasons[group.name] = found
        else:
            known[group.name] = found
    if known:
        reasons |= _run_reasons(copy, known, objective.on(objective.batches[:1]))
    for name, why in reasons.items():
        if on_refusal is None:
            raise StructureError(f"No bottleneck can be measured at '{name}': {why}.")
        on_refusal(name, why)
        known.pop(name, None)
    if not known:
        return float("nan"), {}
    by_name = {group.name: group for group in groups}
    present = _Sums(copy, known, objective, with_bias=with_bias)
    loss = present.gather(None)
    steps = {name: _solve(present.mean(name, "S1"), present.mean(name, "M1"), eigenvalue_threshold) for name in known}
    left = _Sums(copy, known, objective, with_bias=with_bias)
    left.gather({name: step if project else torch.zeros_like(step) for name, step in steps.items()})
    cut = _Cut(eigenvalue_threshold, singular_threshold, whiten)
    results = {}
    for name, pair in known.items():
        goal = float(present.mean(name, "goal"))
        results[name] = _found(copy, by_name[name], pair, goal, left, steps[name], cut)
    return loss, results


def with_best_signs(
    model: nn.Module, found: Mapping[str, Bottleneck], num_units: Mapping[str, int], objective: Objective
) -> dict[str, Bottleneck]:
    r"""Return the first units of each bottleneck, each with the sign with which it lowers the loss.

    The sign of a singular pair is free, and means nothing as long as the activation is the identity. Behind a ReLU, a
    unit with :math:`-a, -b` is another unit than one with :math:`a, b`. One pass measures what each does to the loss
    to first order, with its activation; the better one is kept, and neither if both raise the loss.

    Args:
        model: The model; it is not changed.
        found: By group name.
        num_units: Units of each group, ``>= 1``; other groups are left out.
        objective: The loss.

    Raises:
        MeasurementError: If the loss cannot be measured.
    """
    edits, weights = [], {}
    for name, k in num_units.items():
        fan_in = found[name].fan_in[:k]
        both = replace(
            found[name],
            fan_in=torch.cat([fan_in, -fan_in]),
            fan_out=torch.zeros_like(found[name].fan_out[:1]).repeat_interleave(2 * k, dim=0),
        )
        edits.append(both.edit(model, 2 * k))
        weights[name] = f"{found[name].neighbours.consumer}.weight"
    _, gradients = objective.gradients(Overgrown(model, edits).model, weights.values())
    chosen = {}
    for name, k in num_units.items():
        bottleneck, size = found[name], found[name].group.size
        outputs = bottleneck.fan_out.shape[1]
        by_unit = gradients[weights[name]][:outputs, size:].transpose(0, 1).to("cpu", torch.float64)
        with_one, with_other = ((part * bottleneck.fan_out[:k]).flatten(1).sum(dim=1) for part in by_unit.chunk(2))
        change = torch.minimum(with_one, -with_other)
        sign = torch.where(with_one <= -with_other, 1.0, -1.0).double()
        kept = change < 0
        chosen[name] = replace(
            bottleneck,
            values=bottleneck.values[:k][kept],
            fan_in=(bottleneck.fan_in[:k].T * sign).T[kept],
            fan_out=(bottleneck.fan_out[:k].transpose(0, -1) * sign).transpose(0, -1)[kept],
        )
    return chosen


class _Cut(NamedTuple):
    eigenvalues: float
    singular: float
    whiten: bool


def _found(
    model: nn.Module, group: AxisGroup, neighbours: Neighbours, goal: float, left: _Sums, step: Tensor, cut: _Cut
) -> Bottleneck:
    gram, cross = left.mean(group.name, "S2"), left.mean(group.name, "N")
    root = _inverse_root(gram, cut.eigenvalues) if cut.whiten else torch.eye(len(gram), dtype=torch.float64)
    u, values, vh = torch.linalg.svd(root @ cross, full_matrices=False)
    kept = int((values > cut.singular * max(goal, 0.0) ** 0.5).sum()) if goal > 0 else 0
    u, values, vh = u[:, :kept], values[:kept], vh[:kept]
    largest = vh.abs().argmax(dim=1, keepdim=True)
    sign = vh.gather(1, largest).sign()
    scale = values.sqrt()[:, None] * sign
    weight = tensor_of(model, f"{neighbours.consumer}.weight")
    update = -step[: weight[0].numel()].T.reshape(weight.shape)
    return Bottleneck(
        group,
        neighbours,
        goal,
        float(left.mean(group.name, "left")),
        values,
        scale * (root @ u).T,
        (scale * vh).reshape(kept, weight.shape[0], *weight.shape[2:]),
        update,
        left.mean(group.name, "mean").flatten(),
        gram / left.mean(group.name, "places"),
    )


def neighbours_of(model: nn.Module, group: AxisGroup) -> Neighbours | str:
    """Return the layers between which a group lies, or why it does not lie between one and one of known kinds."""
    why = refusal(model, group)
    if why is not None:
        return why
    made, used = ({axis.tensor for axis in group.with_role(role)} for role in _ROLES)
    makers, users = ({name.rpartition(".")[0] for name in names} for names in (made, used))
    if len(makers) != 1 or len(users) != 1:
        return f"its units are made by {len(makers)} layers and used by {len(users)}, not by one each"
    (producer,), (consumer,) = makers, users
    for path, names in ((producer, made), (consumer, used)):
        module = model.get_submodule(path)
        if type(module) not in (nn.Linear, nn.Conv2d) or not names <= {f"{path}.weight", f"{path}.bias"}:
            return f"'{path}' is neither a Linear nor a Conv2d"
        if isinstance(module, nn.Conv2d) and (
            module.groups != 1 or isinstance(module.padding, str) or module.padding_mode != "zeros"
        ):
            return f"'{path}' is a convolution with groups, or with a padding other than zeros"
    if type(model.get_submodule(producer)) is not type(model.get_submodule(consumer)) or producer == consumer:
        return f"'{producer}' and '{consumer}' are not two layers of the same kind"
    if any(len(a.layout) != 1 or a.layout[0].factors != (group.units,) for a in group.axes if a.role != "carried"):
        return "its units share an axis with others, or have several entries on it"
    for axis in group.with_role("carried"):
        module = model.get_submodule(axis.tensor.rpartition(".")[0])
        if not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)) or module.weight is None:
            return f"'{axis.tensor}' lies on their way, and only batch norms with weights are understood there"
    return Neighbours(producer, consumer)


_PIECE = 2**21
"""Entries of patches that are looked at together."""
_ROLES: tuple[Role, Role] = ("produced", "consumed")
Refusal = Callable[[str, str], None]


def _run_reasons(model: nn.Module, known: Mapping[str, Neighbours], objective: Objective) -> dict[str, str]:
    """Return what only a run shows of groups that cannot be measured."""
    calls: dict[str, list[tuple[torch.Size, torch.Size]]] = {path: [] for pair in known.values() for path in pair}

    def note(path: str) -> Any:
        return lambda _module, args, output: calls[path].append((args[0].shape, output.shape))

    handles = [model.get_submodule(path).register_forward_hook(note(path)) for path in calls]
    try:
        objective.value(model)
    finally:
        for handle in handles:
            handle.remove()
    reasons = {}
    for name, (producer, consumer) in known.items():
        for path in (producer, consumer):
            if len(calls[path]) != 1:
                reasons[name] = f"'{path}' runs {len(calls[path])} times in one pass"
        if name not in reasons and calls[producer][0][1] != calls[consumer][0][0]:
            reasons[name] = f"'{consumer}' does not read what '{producer}' returns, place by place"
    return reasons


class _Sums:
    """Sums over the batches of an objective, taken by hooks on the two layers of each group."""

    def __init__(
        self, model: nn.Module, known: Mapping[str, Neighbours], objective: Objective, *, with_bias: bool
    ) -> None:
        self._model = model
        self._known = known
        self._objective = objective
        self._with_bias = with_bias
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._steps: Mapping[str, Tensor] | None = None

    def gather(self, steps: Mapping[str, Tensor] | None) -> float:
        """Run the objective; with steps, observe what they leave."""
        self._steps = steps
        names = [f"{pair.consumer}.weight" for pair in self._known.values()]
        with self._watching():
            loss, _ = self._objective.gradients(self._model, names)
        device = next(iter(self._sums.values())).device
        reduce = self._objective.reduce
        count = float(reduce(torch.tensor(float(len(self._objective.batches)), dtype=torch.float64, device=device)))
        self._sums = {key: (reduce(self._sums[key]) / count).cpu() for key in sorted(self._sums)}
        return loss

    def mean(self, name: str, what: str) -> Tensor:
        """Return a sum, as a mean over samples and batches."""
        return self._sums[name, what]

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        seen: dict[str, Tensor] = {}
        handles = []
        for name, pair in self._known.items():
            producer, consumer = (self._model.get_submodule(path) for path in pair)

            def note(_module: nn.Module, args: Any, _output: Any, name: str = name) -> None:
                seen[name] = args[0].detach()

            def watch(_module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                read = args[0].detach()
                hook = lambda gradient: self._add_all(name, seen[name], read, gradient.detach())  # noqa: E731
                output.register_hook(hook)  # type: ignore[no-untyped-call]

            handles += [producer.register_forward_hook(note), consumer.register_forward_hook(watch)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_all(self, name: str, into: Tensor, read: Tensor, gradient: Tensor) -> None:
        producer, consumer = (self._model.get_submodule(path) for path in self._known[name])
        samples = gradient.shape[0]
        ends = producer.bias is not None, self._with_bias and consumer.bias is not None
        for x, h, wanted in _pieces(consumer, into, read, -samples * gradient):  # V
            b1, goal = _rows(consumer, h, ones=ends[1]), _columns(consumer, wanted)
            if self._steps is None:
                self._add(name, "goal", goal.double().square().sum() / samples)
                self._add(name, "S1", _gram(b1, b1) / samples)
                self._add(name, "M1", -_gram(b1, goal) / samples)
                continue
            left = goal + torch.einsum(
                "ij,bip->bjp", self._steps[name].to(goal), b1
            )  # V without what the step would do
            b2 = _rows(producer, x, ones=ends[0])
            back, taps = _at_units(consumer, left, h.shape)
            weights = taps / (taps.sum() * len(b2))
            self._add(name, "left", left.double().square().sum() / samples)
            self._add(name, "N", _gram(b2, back) / samples)
            self._add(name, "S2", _gram(b2 * taps, b2) / samples)
            self._add(name, "mean", torch.einsum("bip,p->i", b2, weights).double() * len(x) / samples)
            self._add(name, "places", taps.sum().double() * len(b2) / samples)

    def _add(self, name: str, what: str, value: Tensor) -> None:
        self._sums[name, what] = self._sums[name, what] + value if (name, what) in self._sums else value


def _pieces(module: nn.Module, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return some samples of each tensor after the other: patches of convolutions take room."""
    tensors = tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)
    if not isinstance(module, nn.Conv2d):
        return iter([tensors])
    each = max(t[0].numel() for t in tensors) * module.kernel_size[0] * module.kernel_size[1]
    return zip(*(torch.split(t, max(1, _PIECE // each)) for t in tensors), strict=True)


def _gram(one: Tensor, other: Tensor) -> Tensor:
    """Return sums over samples and places of products: ``(i, j)``."""
    return torch.einsum("bip,bjp->ij", one, other).double()


def _rows(module: nn.Module, x: Tensor, *, ones: bool) -> Tensor:
    """Return the inputs of a layer: ``(batch, inputs, places)``, with a 1 at the end for its bias."""
    if isinstance(module, nn.Conv2d):
        padding: Any = module.padding
        x = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    else:
        x = x.reshape(-1, x.shape[-1]).T[None]
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if ones else x


def _columns(module: nn.Module, y: Tensor) -> Tensor:
    """Return what a layer returns, or its gradient: ``(batch, outputs, places)``."""
    return y.flatten(2) if isinstance(module, nn.Conv2d) else y.reshape(-1, y.shape[-1]).T[None]


def _at_units(module: nn.Module, left: Tensor, read: torch.Size) -> tuple[Tensor, Tensor]:
    """Return what is wanted of a unit at each of its places, by output and tap, and how many taps see each place.

    Returns:
        ``(batch, outputs * taps, places)`` and ``(places,)``.
    """
    if not isinstance(module, nn.Conv2d):
        return left, left.new_ones(left.shape[2])
    batch, outputs = left.shape[:2]
    kernel, stride, padding, dilation = module.kernel_size, module.stride, module.padding, module.dilation
    number = kernel[0] * kernel[1]
    taps = torch.eye(number, dtype=left.dtype, device=left.device).reshape(1, number, *kernel)
    sides = [(read[2 + i] + 2 * int(padding[i]) - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    short = [
        read[2 + i] - ((sides[i] - 1) * stride[i] - 2 * int(padding[i]) + dilation[i] * (kernel[i] - 1) + 1)
        for i in (0, 1)
    ]

    def gathered(maps: Tensor) -> Tensor:
        maps = maps.reshape(-1, 1, *sides)
        return F.conv_transpose2d(maps, taps, None, stride, padding, short, 1, dilation).flatten(2)  # type: ignore[arg-type]

    back = gathered(left).reshape(batch, outputs * number, -1)
    return back, gathered(left.new_ones(1, 1, left.shape[2])).sum(dim=(0, 1))


def _solve(gram: Tensor, cross: Tensor, threshold: float) -> Tensor:
    """Return the least-squares solution, without directions that the data do not have."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > threshold * values[-1:].clamp(min=0)
    basis = vectors[:, kept]
    solution: Tensor = basis @ ((basis.T @ cross) / values[kept, None])
    return solution


def _inverse_root(gram: Tensor, threshold: float) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    kept = values > threshold * values[-1:].clamp(min=0)
    basis = vectors[:, kept]
    root: Tensor = basis * values[kept].rsqrt() @ basis.T
    return root
