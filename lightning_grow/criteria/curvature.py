"""Extreme eigenpairs of splitting matrices: of all units of all layers at once.

Three ways to find them, from products with vectors alone (`Splits.products`) or from whole matrices. Signs of vectors
are made definite: the entry of largest magnitude is positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_grow.criteria.splits import Splits
from lightning_grow.criteria.units import UnitVectors
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.structure.errors import StructureError

Form = Literal["exact", "lanczos", "rayleigh"]
"""How extreme eigenpairs are found: from whole matrices, by Lanczos' method, or by descent of the Rayleigh quotient."""

MOST_BYTES = 2**30
"""What the splitting matrices of one group may take."""

_EXHAUSTED = 100
"""A Krylov space has nothing new to offer below so many times the machine precision."""


class Extremes(NamedTuple):
    """The extreme eigenpairs of the splitting matrices of one group.

    Attributes:
        lowest: Smallest eigenvalue of each unit: float64 ``(size,)``, on the CPU.
        lowest_vectors: Its eigenvectors, of length 1: ``(size, length)``.
        highest: Largest eigenvalue of each unit.
        highest_vectors: Its eigenvectors.
    """

    lowest: Tensor
    lowest_vectors: Tensor
    highest: Tensor
    highest_vectors: Tensor


def extremes(
    splits: Splits, form: Form, generator: torch.Generator, steps: int = 8, *, both: bool = True
) -> dict[str, Extremes]:
    """Return the extreme eigenpairs of all units, in one of three ways.

    Args:
        splits: The groups and the loss.
        form: ``"exact"``: `exact`; ``"lanczos"``: `lanczos`; ``"rayleigh"``: `rayleigh`.
        generator: Draws where to begin.
        steps: Passes over the batches of the objective, ``>= 1``; the exact form takes as many as it needs.
        both: Whether the upper ends are needed. ``"rayleigh"`` pays for each end; without, it returns 0 for them.

    Raises:
        StructureError: If matrices would not fit.
        MeasurementError: If the loss or its gradient is not finite, or there is no batch.
    """
    if form == "exact":
        return exact(splits)
    if form == "lanczos":
        return lanczos(splits, generator, steps)
    low = rayleigh(splits, generator, steps)
    high = rayleigh(splits, generator, steps, highest=True) if both else {}
    return {name: Extremes(*end, *high.get(name, (torch.zeros_like(end[0]), end[1]))) for name, end in low.items()}


def check_form(form: str) -> None:
    """Refuse what is no form.

    Raises:
        ValueError: If it is not a known name.
    """
    if form not in get_args(Form):
        raise ValueError(f"Expected `form` to be one of {', '.join(get_args(Form))}, found {form!r}.")


def check_search(form: str, radius: float, steps: int) -> None:
    """Refuse arguments of a search for splits that are out of range.

    Raises:
        ValueError: If one is.
    """
    check_form(form)
    if not radius > 0:
        raise ValueError(f"`radius` should be above 0, found {radius!r}.")
    if steps < 1:
        raise ValueError(f"`steps` should be at least 1, found {steps!r}.")


def fits_in_memory(model: nn.Module, group: AxisGroup, max_bytes: int = MOST_BYTES) -> bool:
    """Return whether the splitting matrices of a group, in float64, take no more than so much."""
    return _bytes(group.size, UnitVectors(model, group, "produced").length) <= max_bytes


def _bytes(size: int, length: int) -> int:
    return 8 * size * length**2


def splitting_matrices(splits: Splits, max_bytes: int = MOST_BYTES) -> dict[str, Tensor]:
    """Return whole splitting matrices, column by column: as many passes as the longest fan-in vector has entries.

    Args:
        splits: The groups and the loss.
        max_bytes: What the matrices of one group may take.

    Returns:
        Symmetric float64 ``(size, length, length)`` by group name, on the CPU.

    Raises:
        StructureError: If the matrices of a group would not fit.
    """
    for group in splits.groups.values():
        _refuse_large(splits, group, max_bytes)
    return _matrices(splits, list(splits.groups.values()))


def exact(splits: Splits, max_bytes: int = MOST_BYTES) -> dict[str, Extremes]:
    """Return the extreme eigenpairs from whole matrices, of as many groups at a time as fit.

    Args:
        splits: The groups and the loss.
        max_bytes: What the matrices may take at a time.

    Raises:
        StructureError: If the matrices of one group would not fit.
    """
    lots: list[list[AxisGroup]] = []
    room = 0
    for group in splits.groups.values():
        _refuse_large(splits, group, max_bytes)
        need = _bytes(group.size, splits.length(group.name))
        if not lots or need > room:
            lots.append([])
            room = max_bytes
        lots[-1].append(group)
        room -= need
    found = {}
    for lot in lots:
        for name, matrices in _matrices(splits, lot).items():
            values, vectors = torch.linalg.eigh(matrices)
            low, high = _signed(vectors[..., 0]), _signed(vectors[..., -1])
            found[name] = Extremes(values[:, 0], low, values[:, -1], high)
    return found


def _refuse_large(splits: Splits, group: AxisGroup, max_bytes: int) -> None:
    need = _bytes(group.size, splits.length(group.name))
    if need > max_bytes:
        raise StructureError(
            f"The splitting matrices of '{group.name}' would take {need / 2**30:.2g} GiB ({group.size} units with "
            f"{splits.length(group.name)} fan-in weights each), more than {max_bytes / 2**30:.2g} GiB. Use "
            "form='lanczos', which needs no matrix, or exclude the group."
        )


def _matrices(splits: Splits, groups: Sequence[AxisGroup]) -> dict[str, Tensor]:
    shapes = {group.name: (group.size, splits.length(group.name)) for group in groups}
    found = {name: torch.zeros(n, d, d, dtype=torch.float64) for name, (n, d) in shapes.items()}
    for column in range(max((d for _, d in shapes.values()), default=0)):
        basis = {name: torch.zeros(n, d, dtype=torch.float64) for name, (n, d) in shapes.items() if column < d}
        for vectors in basis.values():
            vectors[:, column] = 1.0
        for name, image in splits.products(basis).items():
            found[name][:, :, column] = image.to(found[name])
    return {name: (matrices + matrices.mT) / 2 for name, matrices in found.items()}


def lanczos(splits: Splits, generator: torch.Generator, steps: int = 8) -> dict[str, Extremes]:
    """Return the extreme eigenpairs by Lanczos' method with full reorthogonalisation, for each unit its own.

    A unit whose Krylov space is exhausted goes on from a fresh direction. With as many steps as the fan-in vector has
    entries the result is exact; with fewer, values lie within the spectrum and near its ends.

    Args:
        splits: The groups and the loss.
        generator: Draws where to begin.
        steps: Products, ``>= 1``, and vectors kept for each unit; never more than the fan-in vector has entries.

    Raises:
        ValueError: If there is no step.
        MeasurementError: If the loss or its gradient is not finite, or there is no batch.
    """
    if steps < 1:
        raise ValueError(f"Expected `steps` of at least 1, found {steps}.")
    bases = {name: [v.to(_wide(v))] for name, v in splits.directions(generator).items()}
    last = {name: min(steps, splits.length(name)) for name in bases}
    projected = {
        name: torch.zeros(len(basis[0]), last[name], last[name], dtype=torch.float64) for name, basis in bases.items()
    }
    for step in range(max(last.values(), default=0)):
        active = {name: basis[step] for name, basis in bases.items() if step < last[name]}
        fresh = splits.directions(generator)
        for name, image in splits.products(active).items():
            basis = bases[name]
            for row, vector in enumerate(basis):
                entry = (vector * image.to(vector)).sum(dim=1).to(projected[name])
                projected[name][:, row, step] = projected[name][:, step, row] = entry
            if step + 1 < last[name]:
                basis.append(_next_direction(image.to(basis[0]), basis, fresh[name]))
    found = {}
    for name, matrix in projected.items():
        values, mixed = torch.linalg.eigh(matrix)
        stacked = torch.stack(bases[name], dim=1)  # (size, steps, length)
        low, high = (_combined(stacked, mixed[:, :, end]) for end in (0, -1))
        found[name] = Extremes(values[:, 0], low, values[:, -1], high)
    return found


def _next_direction(image: Tensor, basis: Sequence[Tensor], fresh: Tensor) -> Tensor:
    """Return what is new in an image, of length 1; a fresh direction for units in whose image nothing is new."""
    rest = _orthogonal(image, basis)
    least = _EXHAUSTED * torch.finfo(image.dtype).eps * image.norm(dim=1)
    is_new = (rest.norm(dim=1) > least)[:, None]
    other = _orthogonal(fresh.to(image), basis)
    return _unit(_orthogonal(_unit(torch.where(is_new, rest, other)), basis))


def _orthogonal(vectors: Tensor, basis: Sequence[Tensor]) -> Tensor:
    for _ in range(2):  # twice is enough
        for other in basis:
            vectors = vectors - (vectors * other).sum(dim=1, keepdim=True) * other
    return vectors


def _combined(basis: Tensor, coefficients: Tensor) -> Tensor:
    return _signed(_unit(torch.einsum("us,usl->ul", coefficients.to(basis), basis)))


def rayleigh(
    splits: Splits,
    generator: torch.Generator,
    passes: int = 8,
    *,
    lr: float = 1e-3,
    highest: bool = False,
    whole: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    r"""Return one end of each spectrum by stochastic descent of the Rayleigh quotient.

    :math:`R(v) = v^T S v / v^T v` falls along :math:`2 (S v \cdot v^T v - v \cdot v^T S v) / (v^T v)^2`, for all units
    apart, one batch after the other, by RMSprop (0.9, with momentum 0.9); :math:`v` is scaled back to length 1 after
    each step. The eigenvalue is the mean of :math:`R` over the last pass, the eigenvector that of :math:`v`.

    Args:
        splits: The groups and the loss.
        generator: Draws where to begin.
        passes: Passes over the batches, ``>= 1``.
        lr: Learning rate.
        highest: Look for the upper end: descend with :math:`-S`.
        whole: Use all batches at each step, so that a pass is one step.

    Returns:
        Values, float64 ``(size,)`` on the CPU, and vectors, ``(size, length)``, by group name.

    Raises:
        ValueError: If there is no pass.
        MeasurementError: If the loss or its gradient is not finite, or there is no batch.

    Reference:
        Wang et al., "Energy-Aware Neural Architecture Optimization with Fast Splitting Steepest Descent",
        arXiv:1910.03103.
    """
    if passes < 1:
        raise ValueError(f"Expected `passes` of at least 1, found {passes}.")
    sign = -1.0 if highest else 1.0
    vectors = {name: v.to(_wide(v)) for name, v in splits.directions(generator).items()}
    squares = {name: torch.zeros_like(v) for name, v in vectors.items()}
    momenta = {name: torch.zeros_like(v) for name, v in vectors.items()}
    batches: list[int | None] = [None] if whole or not splits.objective.batches else [*range(_count(splits))]
    for _ in range(passes):
        quotients = {name: torch.zeros(len(v), dtype=torch.float64) for name, v in vectors.items()}
        means = {name: torch.zeros_like(v) for name, v in vectors.items()}
        for batch in batches:
            for name, image in splits.products(vectors, batch).items():
                vector = vectors[name]
                signed = sign * image.to(vector)
                quotient = (vector * signed).sum(dim=1, keepdim=True)
                gradient = 2 * (signed - quotient * vector)  # v has length 1
                quotients[name] += quotient[:, 0].to(quotients[name]) / len(batches)
                means[name] += vector / len(batches)
                squares[name] = 0.9 * squares[name] + 0.1 * gradient**2
                momenta[name] = 0.9 * momenta[name] + gradient / (squares[name].sqrt() + 1e-8)
                vectors[name] = _unit(vector - lr * momenta[name])
    return {name: (sign * quotients[name], _signed(_unit(means[name]))) for name in vectors}


def _count(splits: Splits) -> int:
    return len(splits.objective.batches)


def _unit(vectors: Tensor) -> Tensor:
    lengths: Tensor = vectors.norm(dim=1, keepdim=True)
    return vectors / lengths.clamp(min=torch.finfo(vectors.dtype).tiny)


def _signed(vectors: Tensor) -> Tensor:
    """Return vectors whose entry of largest magnitude is positive."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
