"""Values of new entries: zero fan-out, so that the function stays; random fan-in, so that the units differ.

| axis | default values of new entries |
|---|---|
| consumed (columns, fan-out) | zeros: new units are silent |
| produced (rows, fan-in), 2 or more dimensions | normal, mean 0, the standard deviation of the existing entries |
| produced, 1 dimension (bias) | zeros |
| produced, one positive number for each unit (magnitudes of weight norm) | the mean of the existing units |
| carried, one entry for each place of a unit (norm weight, running statistics) | the mean of the existing units |
| carried, whole kernels (depthwise) | normal, with mean and standard deviation of the existing entries |

Under a norm that averages over the units, an edit may ask for other values (`Padding`). Where new entries lie on two
axes, consumed zeros win, then the later axis.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from lightning_grow.surgery.plan import AxisMap, Given, gather

_SAMPLE = 2**17
_DRAWS = 1_048_573


def edited(tensor: Tensor, name: str, maps: tuple[AxisMap, ...], is_mask: bool = False) -> Tensor:
    """Return a weight or buffer as it is after the edit.

    Random values are drawn on the CPU in float32 from the seed of the edit and the name of the tensor: they are equal
    on all ranks and devices, and do not depend on the order of edits or on torch's global random state.

    Args:
        tensor: The parameter or buffer, any dtype and device.
        name: Its qualified name.
        maps: Its edited axes.
        is_mask: Whether the tensor only says which entries of another one take part; new ones do.

    Returns:
        A new tensor of the same dtype and device, detached, with the new length on each mapped axis.
    """
    tensor = tensor.detach()
    out = gather(tensor, maps, zero_new=False)
    for m in maps:
        if m.role == "consumed" and m.share is not None:
            scale_(out, m, m.share)
        if m.gain != 1:
            scale_(out, m, m.gains)
    if out.is_meta:
        return out
    for m in sorted(maps, key=lambda m: (m.role == "consumed", m.dim)):
        if m.has_new and is_mask:
            write_new_(out, m, out.new_ones(()))
        elif m.has_new:
            _fill_(out, tensor, f"{name}[{m.dim}]", m)
            for values in m.values:
                _put_values_(out, m, values, tuple(o for o in maps if o is not m))
    for m in maps:
        for shift in m.shifts:
            _shift_(out, m, shift, tuple(o for o in maps if o is not m))
    return out


def scale_(out: Tensor, m: AxisMap, factor: Tensor) -> None:
    """Multiply the entries along one axis by ``factor``: float64 ``(new_length,)``; entries times 1 are untouched."""
    if not (out.is_floating_point() or out.is_complex()):
        return
    entries = (factor != 1).nonzero().flatten()
    if not entries.numel():
        return
    real = torch.float64 if out.dtype in (torch.float64, torch.complex128) else torch.float32
    selected = entries.to(out.device)
    factors = m.shaped(factor[entries].to(device=out.device, dtype=real), out.ndim)
    out.index_copy_(m.dim, selected, (out.index_select(m.dim, selected) * factors).to(out.dtype))


def fill_mean_(out: Tensor, m: AxisMap, fallback: Tensor) -> None:
    """Set the new entries along one axis to the mean of the existing units, place by place.

    Args:
        out: The gathered tensor of floating-point numbers or of bools (which take the more common value); changed in
            place.
        m: The axis.
        fallback: The tensor before the edit; its mean is taken where no unit of it has survived.
    """
    if out.is_meta:
        return
    if out.dtype == torch.bool:
        most = out.float()
        fill_mean_(most, m, fallback.float())
        write_new_(out, m, most.index_select(m.dim, m.new_entries.to(out.device)) >= 0.5)
        return
    old = [(start, length) for start, source, length in m.segments if source >= 0]
    if not old:
        write_new_(out, m, _wide(fallback).mean().to(out.dtype))
    elif m.place is None:
        start, length = old[0]
        kept = out.narrow(m.dim, start, length) if len(old) == 1 else _existing(out, m)
        write_new_(out, m, _mean(kept, m.dim))
    else:
        kept, place = _wide(_existing(out, m)), m.place[m.index >= 0].to(out.device)
        shape = [int(m.place.max()) + 1 if d == m.dim else n for d, n in enumerate(kept.shape)]
        sums = kept.new_zeros(shape).index_add_(m.dim, place, kept)
        counts = m.shaped(torch.bincount(place, minlength=shape[m.dim]), out.ndim)
        means = torch.where(counts > 0, sums / counts.clamp(min=1), kept.mean(m.dim, keepdim=True)).to(out.dtype)
        write_new_(out, m, means.index_select(m.dim, m.place[m.new_entries].to(out.device)))


def write_new_(out: Tensor, m: AxisMap, values: Tensor) -> None:
    """Set the new entries along one axis to ``values``, which broadcasts over them."""
    new = [(start, length) for start, source, length in m.segments if source < 0]
    if len(new) == 1:
        out.narrow(m.dim, *new[0]).copy_(values)
        return
    shape = [m.new_entries.numel() if d == m.dim else n for d, n in enumerate(out.shape)]
    values = values.to(device=out.device, dtype=out.dtype).expand(shape)
    out.index_copy_(m.dim, m.new_entries.to(out.device), values)


def _fill_(out: Tensor, tensor: Tensor, label: str, m: AxisMap) -> None:
    """Set the new entries along one axis to their default values."""
    is_number = out.is_floating_point() or out.is_complex()
    if m.fill == "mean" and out.is_floating_point():
        fill_mean_(out, m, tensor)
    elif m.fill == "random" and is_number:
        _fill_normal_(out, tensor, label, m)
    elif m.fill == "zeros" or m.role == "consumed" or not (is_number or out.dtype == torch.bool):
        write_new_(out, m, out.new_zeros(()))
    elif out.dtype == torch.bool or (m.role == "carried" and _is_vector(tensor, m.dim)):
        fill_mean_(out, m, tensor)
    elif m.role == "produced" and tensor.ndim < 2:
        write_new_(out, m, out.new_zeros(()))
    elif m.role == "produced" and out.is_floating_point() and _is_vector(tensor, m.dim) and bool((tensor > 0).all()):
        fill_mean_(out, m, tensor)
    else:
        _fill_normal_(out, tensor, label, m)
        if m.role == "produced" and m.dim > 0 and out.ndim == 2:
            _keep_padding_(out, m)


def _keep_padding_(out: Tensor, m: AxisMap) -> None:
    """Let rows of a table that are zero throughout, such as that of a padding token, be zero in new columns too."""
    zero = (_existing(out, m) == 0).all(m.dim, keepdim=True)
    if bool(zero.any()):
        new = out.index_select(m.dim, m.new_entries.to(out.device))
        write_new_(out, m, new.masked_fill(zero, 0))


def _fill_normal_(out: Tensor, tensor: Tensor, label: str, m: AxisMap) -> None:
    mean, std = _moments(tensor)
    if m.role == "carried":
        std = std if math.isfinite(std) else 0.0
    elif not (math.isfinite(std) and std > 0):
        std = (tensor.numel() / tensor.shape[m.dim]) ** -0.5
    mean = mean if m.role == "carried" else 0.0
    generator = torch.Generator().manual_seed(m.seed ^ zlib.crc32(label.encode()))
    shape = [m.new_entries.numel() if d == m.dim else n for d, n in enumerate(out.shape)]
    new = [(start, length) for start, source, length in m.segments if source < 0]
    region = out.narrow(m.dim, *new[0]) if len(new) == 1 else None
    if region is not None and region.is_contiguous() and region.dtype == torch.float32 and region.device.type == "cpu":
        _draw_(region.view(-1), mean, std, generator)
        return
    noise = torch.empty([*shape, 2] if out.is_complex() else shape, dtype=torch.float32)
    _draw_(noise.view(-1), mean, std, generator)
    write_new_(out, m, (torch.view_as_complex(noise) if out.is_complex() else noise).to(out.device))


def _draw_(flat: Tensor, mean: float, std: float, generator: torch.Generator) -> None:
    """Fill a vector with normal numbers; beyond a million they repeat, a prime number apart: no two rows are equal."""
    head = flat[:_DRAWS]
    head.normal_(mean, std, generator=generator)
    for part in torch.split(flat[_DRAWS:], _DRAWS):
        part.copy_(head[: part.numel()])


def _moments(tensor: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation; from two sums, several times faster than torch.std, where digits allow."""
    observed = torch.view_as_real(tensor) if tensor.is_complex() else _wide(tensor)
    if observed.numel() > _SAMPLE:  # evenly spaced slices tell enough of a large tensor
        dim = max(range(observed.ndim), key=lambda d: (observed.shape[d], -d))
        slices = max(2, _SAMPLE * observed.shape[dim] // observed.numel())
        chosen = torch.linspace(0, observed.shape[dim] - 1, slices, device=observed.device).long()
        observed = observed.index_select(dim, chosen)
    count = observed.numel()
    if count < 2:
        return float(observed.sum()), 0.0
    mean = float(observed.mean())
    square = float(torch.linalg.vector_norm(observed)) ** 2 / count
    variance = square - mean**2
    if variance < 0.01 * square:
        return mean, float(observed.std())
    return mean, math.sqrt(variance * count / (count - 1))


def _shift_(out: Tensor, m: AxisMap, shift: Given, others: tuple[AxisMap, ...]) -> None:
    """Add given values to entries: gathered along the other axes like the weight, zero where those have new entries."""
    selected, added = _taken(out, m, shift, others)
    out.index_copy_(m.dim, selected, out.index_select(m.dim, selected) + added)


def _put_values_(out: Tensor, m: AxisMap, values: Given, others: tuple[AxisMap, ...]) -> None:
    """Write given values: gathered along the other axes like the weight, zero where those have new entries."""
    out.index_copy_(m.dim, *_taken(out, m, values, others))


def _taken(out: Tensor, m: AxisMap, given: Given, others: tuple[AxisMap, ...]) -> tuple[Tensor, Tensor]:
    """Return the entries along one axis for which something is given, and that, after the edits of the other axes."""
    values = gather(given.tensor.detach().to(device=out.device, dtype=out.dtype), others)
    for other in others:
        if other.role == "consumed" and other.share is not None:
            scale_(values, other, other.share)
    taken = (given.source >= 0).nonzero().flatten()
    return taken.to(out.device), values.index_select(m.dim, given.source[taken].to(out.device))


def _is_vector(tensor: Tensor, dim: int) -> bool:
    """Return whether all other dimensions have length 1: then each entry belongs to one unit as a whole."""
    return tensor.numel() == tensor.shape[dim]


def _existing(out: Tensor, m: AxisMap) -> Tensor:
    return out.index_select(m.dim, (m.index >= 0).nonzero().flatten().to(out.device))


def _mean(tensor: Tensor, dim: int) -> Tensor:
    return _wide(tensor).mean(dim, keepdim=True).to(tensor.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """Return half precision as float32, so that sums do not lose digits."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
