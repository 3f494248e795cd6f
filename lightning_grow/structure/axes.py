"""What may vary in a model, as plain data: axes, groups of coupled axes, stacks of blocks.

Every axis of every tensor is an ordered *sum of products* of unit counts. ``channels*36`` is a flatten (36 entries for
each channel), ``4*hidden`` four blocks of hidden units, ``left + right`` a concatenation, ``3*heads*16`` a fused
query-key-value projection. Nothing here holds a tensor: a `Structure` can be printed, compared, pickled and saved, and
it stays meaningful after the model has changed size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_grow.structure.errors import StructureError

Role = Literal["produced", "carried", "consumed"]


@dataclass(frozen=True)
class Units:
    """A factor of an axis that varies: the number of units of one group.

    The live number can always be read off a model: axis ``dim`` of ``tensor`` has ``per_unit`` entries for each unit
    of this group and none of any other group.
    """

    group: str
    tensor: str
    dim: int
    per_unit: int

    def size_in(self, model: nn.Module) -> int:
        """Return the number of units that ``model`` has now."""
        return int(tensor_of(model, self.tensor).shape[self.dim]) // self.per_unit


@dataclass(frozen=True)
class Block:
    """A run of entries along an axis: the product of its factors, the last factor varying fastest."""

    factors: tuple[int | Units, ...]

    def length(self, sizes: Mapping[str, int]) -> int:
        """Return the number of entries, given the number of units of each group."""
        return math.prod(f if isinstance(f, int) else sizes[f.group] for f in self.factors)

    def __str__(self) -> str:
        return "*".join(str(f) if isinstance(f, int) else f.group for f in self.factors) or "1"


Layout = tuple[Block, ...]
"""The ordered sum of blocks that makes up one axis (or one size that a module keeps as a Python integer)."""


def layout_length(layout: Layout, sizes: Mapping[str, int]) -> int:
    """Return the length of an axis, given the number of units of each group."""
    return sum(block.length(sizes) for block in layout)


def layout_units(layout: Layout) -> dict[str, Units]:
    """Return the groups that an axis depends on, by name."""
    return {f.group: f for block in layout for f in block.factors if isinstance(f, Units)}


@dataclass(frozen=True)
class Axis:
    """One dimension of one named parameter or buffer.

    Attributes:
        tensor: Qualified name, as in ``model.named_parameters()`` (tied parameters: the first of their names).
        dim: Dimension of that tensor, ``>= 0``.
        role: ``"produced"`` (rows: fan-in weights and bias of the units), ``"carried"`` (norms, depthwise kernels,
            layer scale: one entry for each unit on its way), or ``"consumed"`` (columns: fan-out weights; zero there
            silences a unit).
        layout: The ordered blocks that make up the axis.
    """

    tensor: str
    dim: int
    role: Role
    layout: Layout

    @property
    def label(self) -> str:
        """``"tensor[dim]"``, the key of `Structure.pinned` and `Edit.values`."""
        return f"{self.tensor}[{self.dim}]"

    def __str__(self) -> str:
        return f"{self.label} = {' + '.join(str(b) for b in self.layout)}"


@dataclass(frozen=True)
class Attribute:
    """A size kept as a Python integer, such as ``out_features``.

    Attributes:
        module: The module that keeps it, or that holds the object or container that does.
        name: The attribute, or the path to it: ``config.hidden_size``, ``sizes['hidden']``, ``config.stages``.
        index: Position, if it is an entry of a tuple or list.
        layout: What the size is a sum of.
    """

    module: str
    name: str
    index: int | None
    layout: Layout


@dataclass(frozen=True)
class Padding:
    """How a group grows under norms that average over its units, so that they do not show it.

    From ``n`` to ``m`` units, whatever writes the new units lets them be zero, or the mean of the others; then the
    norms see the same up to a factor that their gains and their eps make up for.

    Attributes:
        fill: What the new units are: ``"zeros"`` (under a root mean square) or ``"mean"`` (under mean and variance).
        written: Labels of the axes whose new entries are such.
        gains: Labels of the axes whose present entries are multiplied by ``sqrt(n/m)``.
        shifts: Labels of the axes whose new entries are zero: biases of the norms.
        eps: Numbers that are multiplied by ``n/m``: module and attribute. None stands for the smallest number of the
            module's type.
        silent: Whether the new fan-out must be zero; otherwise it is random, and the norms let nothing through.
    """

    fill: Literal["zeros", "mean"]
    written: tuple[str, ...]
    gains: tuple[str, ...]
    shifts: tuple[str, ...] = ()
    eps: tuple[tuple[str, str], ...] = ()
    silent: bool = False


@dataclass(frozen=True)
class Setting:
    """An entry of a configuration from which the model could be built: it stands for the unit counts of groups.

    Attributes:
        module: The module that keeps the configuration.
        name: The path to the entry: ``config.intermediate_size``.
        counts: For each group that it stands for, its units and how much of the entry is made of each unit. Empty if
            no entry of this configuration stands for the group at hand.
    """

    module: str
    name: str
    counts: tuple[tuple[Units, int], ...] = ()


@dataclass(frozen=True)
class AxisGroup:
    """All axes that share one unit count, and so must be resized together.

    Attributes:
        name: Stable name, taken from the first module that produces the units.
        size: Number of units: neurons, channels, heads, features.
        step: Units come in multiples of it.
        axes: Every axis that depends on the unit count.
        attributes: Sizes kept as Python integers that follow.
        obstacle: None when `widen` and `split` keep the function exactly, otherwise why they cannot.
        copies: Where there is an obstacle: whether adding whole multiples of the units keeps the function all the same,
            as copies. `widen` does so.
        padding: Where there is an obstacle: how any number of units can be added all the same, if ``widen`` is to
            ``preserve`` the function; None if that is not known.
        settings: Entries of configurations that stand for the unit count, of which a model can be built.
    """

    name: str
    size: int
    step: int
    axes: tuple[Axis, ...]
    attributes: tuple[Attribute, ...] = ()
    obstacle: str | None = None
    copies: bool = False
    padding: Padding | None = None
    settings: tuple[Setting, ...] = ()

    @property
    def units(self) -> Units:
        """The factor that stands for this group in layouts."""
        return next(layout_units(axis.layout)[self.name] for axis in self.axes)

    def with_role(self, role: Role) -> tuple[Axis, ...]:
        """Return the axes of one role."""
        return tuple(axis for axis in self.axes if axis.role == role)


@dataclass(frozen=True)
class Stack:
    """A run of interchangeable blocks, of which there can be more or fewer: depth.

    Attributes:
        name: Qualified name of the container (``ModuleList``, ``Sequential`` or a module with named children).
        blocks: Qualified names of the blocks, in order of execution.
        zeroed: Parameters, relative to a block, that are zero in a new block so that it starts as the identity.
        identity: Parameters, relative to a block, that start as the identity matrix or kernel.
        first: Lowest position at which a new block is the identity: 0, or 1 where that holds only behind a block.
        obstacle: None when a new block can start as the identity, otherwise why it cannot.
        counts: Numbers that count the blocks, as module and path: ``("", "config.num_layers")``.
        per_block: Lists with an entry for each block, likewise.
        uncounted: Modules that could be built anew from their configuration, in which no entry counts the blocks.
    """

    name: str
    blocks: tuple[str, ...]
    zeroed: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()
    first: int = 0
    obstacle: str | None = None
    counts: tuple[tuple[str, str], ...] = ()
    per_block: tuple[tuple[str, str], ...] = ()
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structure:
    """What may vary in a model, and what may not and why. Names and numbers only.

    Attributes:
        groups: The axis groups by name, in the order of the parameters.
        stacks: Runs of blocks that can be repeated or removed, by name.
        pinned: Axes that are in no group, ``"parameter.name[dim]"`` to the reason.

    Example:
        >>> import lightning_grow as lg, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> structure = lg.trace(model, torch.zeros(1, 4))
        >>> structure.groups["0"].size
        8
        >>> structure.pinned["2.weight[0]"]
        'model output'
    """

    groups: Mapping[str, AxisGroup]
    stacks: Mapping[str, Stack] = dataclasses.field(default_factory=dict)
    pinned: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> AxisGroup:
        if name not in self.groups:
            known = ", ".join(self.groups) or "none"
            raise StructureError(f"No group is named '{name}'. Groups of this model: {known}.")
        return self.groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def resized(self, sizes: Mapping[str, int]) -> Structure:
        """Return this structure with other unit counts, as after `apply_`.

        Raises:
            StructureError: If there is no group of such a name.
        """
        for name in sizes:
            _ = self[name]  # raises where there is no such group
        groups = {n: dataclasses.replace(self[n], size=sizes.get(n, self[n].size)) for n in self.groups}
        return dataclasses.replace(self, groups=groups)

    def sizes_in(self, model: nn.Module) -> dict[str, int]:
        """Return the unit counts that ``model`` has now."""
        return {name: group.units.size_in(model) for name, group in self.groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers, as a checkpoint wants them."""
        return {
            "groups": {name: plain(group) for name, group in self.groups.items()},
            "stacks": {name: plain(stack) for name, stack in self.stacks.items()},
            "pinned": dict(self.pinned),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Structure:
        """Return the structure that `to_dict` described."""
        return cls(
            groups={name: _group_from(d) for name, d in data["groups"].items()},
            stacks={name: stack_from_dict(d) for name, d in data["stacks"].items()},
            pinned=dict(data["pinned"]),
        )

    def __str__(self) -> str:
        rows = [("group", "units", "step", "produced by", "consumed by", "obstacle")]
        for g in self.groups.values():
            made, used = (", ".join(a.label for a in g.with_role(r)) for r in ("produced", "consumed"))
            rows.append((g.name, str(g.size), str(g.step), _short(made), _short(used), g.obstacle or ""))
        lines = [_table(rows)]
        if self.stacks:
            stacks = [("stack", "blocks", "obstacle")]
            stacks += [(s.name or "(model)", str(len(s.blocks)), s.obstacle or "") for s in self.stacks.values()]
            lines.append(_table(stacks))
        if self.pinned:
            lines.append(_table([("pinned", "reason"), *self.pinned.items()]))
        return "\n\n".join(lines)


def _short(text: str, width: int = 48) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """Return plain dicts, lists, strings and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _layout_from(data: Sequence[Mapping[str, Any]]) -> Layout:
    return tuple(Block(tuple(f if isinstance(f, int) else Units(**f) for f in block["factors"])) for block in data)


def _group_from(data: Mapping[str, Any]) -> AxisGroup:
    axes = tuple(Axis(**{**a, "layout": _layout_from(a["layout"])}) for a in data["axes"])
    attributes = tuple(Attribute(**{**a, "layout": _layout_from(a["layout"])}) for a in data["attributes"])
    padding = data.get("padding")
    if padding is not None:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in padding.items()}
        padding = Padding(**{**fields, "eps": tuple((module, name) for module, name in padding["eps"])})
    settings = tuple(
        Setting(s["module"], s["name"], tuple((Units(**units), times) for units, times in s["counts"]))
        for s in data.get("settings", ())
    )
    return AxisGroup(**{**data, "axes": axes, "attributes": attributes, "padding": padding, "settings": settings})


def stack_from_dict(data: Mapping[str, Any]) -> Stack:
    """Return the stack that `Structure.to_dict` described."""
    return Stack(**{key: _tuples(value) for key, value in data.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (tuple, list)) else value


def tensor_of(model: nn.Module, name: str) -> Any:
    """Return the parameter or buffer of this qualified name."""
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)
