"""Exact growth under norms: what `widen` can do in spite of an obstacle, found by trying.

A LayerNorm or RMSNorm averages over the very units that are added, so silent new units change what it returns. Two ways
are exact all the same: adding *copies* of all units (the averages stay), and *padding*, where what writes the new
units lets them be zero or the mean of the others, and gains and eps of the norms are corrected.

Gesmundo, Maile, "Composable Function-preserving Expansions for Transformer Architectures", 2023, arXiv:2308.06103
(zeros under RMSNorm); Wang et al., "LEMON: Lossless Model Expansion", ICLR 2024, arXiv:2310.07999 (the mean under
LayerNorm).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_grow.structure.axes import AxisGroup, Padding
from lightning_grow.structure.trials import Trials

_LARGEST_EPS = 1e-2
_ADDED = (1, 3)


def with_exact_recipes(
    trials: Trials, groups: Sequence[AxisGroup], norms: Mapping[str, Sequence[str]], written: Collection[str]
) -> list[AxisGroup]:
    """Return groups with `AxisGroup.copies` and `AxisGroup.padding`, where they have an obstacle and that is exact.

    Args:
        trials: The model.
        groups: Groups that have been judged, with the sizes of the trials.
        norms: Modules that average over the units of a group, by its name.
        written: Labels of axes that make units.
    """
    found = []
    for group in groups:
        if group.obstacle is not None and group.step == 1:
            found.append(replace(group, copies=_copies(trials, group), padding=_padding(trials, group, norms, written)))
        else:
            found.append(group)
    return found


def _copies(trials: Trials, group: AxisGroup) -> bool:
    index = torch.arange(group.size).repeat(2)
    share = (torch.arange(2 * group.size) < group.size).double()
    try:
        return trials.same(trials.resized([group], {group.name: index}, {group.name: share}))
    except Exception:  # the model's own code: anything can happen
        return False


def _padding(
    trials: Trials, group: AxisGroup, norms: Mapping[str, Sequence[str]], written: Collection[str]
) -> Padding | None:
    candidates = _candidates(trials, group, norms.get(group.name, ()), written)
    return next((padding for padding in candidates if _is_exact(trials, group, padding)), None)


def _is_exact(trials: Trials, group: AxisGroup, padding: Padding) -> bool:
    try:
        return all(trials.same(trials.padded(group, padding, many)) for many in _ADDED)
    except Exception:  # the model's own code: anything can happen
        return False


def _candidates(trials: Trials, group: AxisGroup, norms: Sequence[str], written: Collection[str]) -> Iterator[Padding]:
    """Yield the ways that might be exact: the first vector of a norm is its gain, and those behind it are shifts."""
    gains, shifts, eps = [], [], []
    for path in norms:
        module = trials.model.get_submodule(path)
        own = [axis.label for axis in group.axes if axis.tensor.rpartition(".")[0] == path]
        gains += own[:1]
        shifts += own[1:]
        eps += [(path, name) for name in _small_numbers(module)]
    if not gains:
        return
    made = tuple(a.label for a in group.axes if a.label in written and a.label not in {*gains, *shifts})
    for fill, silent in (("zeros", False), ("mean", False), ("mean", True)):
        yield Padding(fill, made, tuple(gains), tuple(shifts), tuple(eps), silent)  # type: ignore[arg-type]


def _small_numbers(module: nn.Module) -> list[str]:
    """Return the attributes that may be what keeps a norm from dividing by zero."""
    small = [n for n, v in vars(module).items() if type(v) is float and 0 < v <= _LARGEST_EPS]
    return [*small, "eps"] if isinstance(module, nn.RMSNorm) and module.eps is None else small
