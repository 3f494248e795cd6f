"""The rates of a param group on several levels: where they begin, how they descend, what a tensor moves by."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_grow.optim.layers import Layers
from lightning_grow.optim.pieces import Piece, of_units
from lightning_grow.optim.tensors import Rate, as_rate, clipped, wide_dtype

Level = Literal["global", "layer", "unit", "parameter"]

LEVELS: tuple[Level, ...] = ("global", "layer", "unit", "parameter")
"""From coarse to fine."""

LAYER, UNIT, PARAMETER = "lr_layer", "lr_unit", "lr_parameter"
"""Names of rates in the state of a parameter.

Those of units lie beside the first tensor that has them, ``(units, 1, ..., 1)``, so that they are gathered as its rows
when it grows; a number where all its tensors are one unit.
"""


class Ladder:
    """The rates of all levels of a param group, for one step.

    Rates of units are worked on as one vector for all units of a param group; in the state lie pieces of it.

    Args:
        group: The param group.
        layers: The layers of its parameters.
        params: The parameters that are trained.
        state: The state of the optimizer.
        device: Where rates are computed.
        written: What the last step wrote: pieces of the rates of units, and the whole.

    Attributes:
        lr: The global rate; without that level, the mean of the coarsest one after the last step.
        weights: The weight of each level.
        couples: Whether rates are drawn to coarser ones, and the finest makes the step.
        learns_weights: Whether the weights change.
        has_units: Whether units have rates of their own.
        has_parameters: Whether parameters have rates of their own.
        in_pieces: Whether tensors are worked on in pieces, and small ones together, which pays on a CPU.
    """

    def __init__(
        self,
        group: dict[str, Any],
        layers: Layers,
        params: list[Tensor],
        state: MutableMapping[Tensor, dict[str, Any]],
        device: torch.device,
        written: WeakKeyDictionary[Layers, tuple[list[Any], Tensor]],
    ) -> None:
        self._written = written
        self.group, self.layers, self.params, self.device = group, layers, params, device
        self.levels: tuple[Level, ...] = group["levels"]
        self.couples = group["coupling"] != "combination" and len(self.levels) > 1
        self.learns_weights = len(self.levels) > 1 and not self.couples and group["weights_lr"] > 0
        self.has_units, self.has_parameters = "unit" in self.levels, "parameter" in self.levels
        self.in_pieces = group["foreach"] is not False and device.type == "cpu"
        self.weights: dict[Level, Any] = dict(zip(self.levels, group["weights"], strict=True))
        self._states = [state[p] for p in params]
        self._kept: Tensor | None = None
        self._sums_of_rates: dict[int, list[Tensor]] = {}
        self.lr, by_hand = self._begin()
        self._layer = self._begin_layers(by_hand) if "layer" in self.levels else None
        self._unit = self._begin_units(by_hand) if self.has_units else None
        if self.has_parameters:
            self._begin_parameters(by_hand)

    # Where rates begin.

    def _begin(self) -> tuple[Rate, Rate | None]:
        """Return the rate of the group, and by how much it was multiplied by hand."""
        lr, last = as_rate(self.group["lr"], self.device), self.group.get("last_lr")
        if last is None or self.group["lr"] is last or bool(lr == last):
            return lr, None
        return lr, lr / last if bool(last != 0) else None

    def _begin_layers(self, by_hand: Rate | None) -> Tensor:
        found = []
        for members in self.layers.members:
            known = [self._states[place][LAYER] for place in members if LAYER in self._states[place]]
            found.append(known[0] if known else self.lr)
        if self.device.type == "cpu":
            rates = torch.tensor([float(rate) for rate in found], dtype=torch.float64)
        else:
            rates = torch.stack([torch.as_tensor(r).to(self.device, wide_dtype(self.device)) for r in found])
        return rates if by_hand is None else rates * by_hand

    def _begin_units(self, by_hand: Rate | None) -> Tensor:
        entries = [self._states[units.members[0]].get(UNIT) for units in self.layers.unit_groups]
        written = self._written.get(self.layers)
        if written is not None and all(a is b for a, b in zip(entries, written[0], strict=True)):
            self._kept = written[1]
            return written[1] if by_hand is None else written[1] * by_hand
        parts, dtype = [], wide_dtype(self.device)
        for units, entry in zip(self.layers.unit_groups, entries, strict=True):
            rates = entry
            if rates is not None and rates.ndim > 1 and rates[0].numel() > 1:
                rates = rates.flatten(1)[:, 0]  # another dimension has grown from one entry to several, all equal
            if rates is None or rates.numel() != units.num_units:
                start = torch.as_tensor(self.lr if self._layer is None else self._layer[units.layer], dtype=dtype)
                rates = start.expand(units.num_units)
            parts.append(rates.reshape(-1).to(self.device, dtype))
        together = torch.cat(parts) if parts else torch.zeros(0, dtype=dtype, device=self.device)
        return together if by_hand is None else together * by_hand

    def _begin_parameters(self, by_hand: Rate | None) -> None:
        for place, (p, state) in enumerate(zip(self.params, self._states, strict=True)):
            if PARAMETER in state and state[PARAMETER].shape == p.shape:
                if by_hand is not None:
                    state[PARAMETER] = state[PARAMETER] * by_hand
                continue
            dtype = p.dtype if p.dtype in (torch.float32, torch.float64) else torch.float32
            rates = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
            everything = Piece(slice(0, self.num_units(place)), (p,))
            start = of_units(self._coarser(place), everything)
            state[PARAMETER] = rates.copy_(torch.as_tensor(start, dtype=wide_dtype(self.device)))

    def _coarser(self, place: int) -> Any:
        """Return the rate of a tensor on the finest level above parameters: a number, or ``(units,)``."""
        if self._unit is not None and place in self.layers.unit_group_of:
            return self._unit[self._units_of(place)]
        return self.lr if self._layer is None else self._layer[self.layers.layer_of[place]]

    def _units_of(self, place: int) -> slice:
        return self.layers.unit_groups[self.layers.unit_group_of[place]].units

    def num_units(self, place: int) -> int:
        """Return how many units with rates of their own a tensor is made of: 1 where its units share one."""
        number = self.layers.unit_group_of.get(place) if self.has_units else None
        return 1 if number is None else self.layers.unit_counts[number]

    @property
    def num_sums(self) -> int:
        """How many sums of products H rates descend by: one for each unit if units have rates, else for each layer."""
        return self.layers.num_units if self.has_units else len(self.layers.names)

    def places_of_sums(self, places: tuple[int, ...], lengths: tuple[int, ...]) -> Tensor:
        """Return which of these sums numbers belong to, of which each tensor has so many.

        Args:
            places: The places of the tensors.
            lengths: How many numbers each has: entries, or sums of some of them, unit after unit.
        """
        return self.layers.places_of_sums(places, lengths, by_units=self.has_units)

    def sums_of_tensors(self, found: Mapping[int, Tensor]) -> Tensor:
        """Return these sums from those of tensors, always added up in the same order.

        Args:
            found: For places of tensors a number, or one for each unit if units have rates; others count as zero.
        """
        zeros = torch.zeros(max(map(self.num_units, range(len(self.params)))), device=self.device)
        whole = [found.get(place, zeros[: self.num_units(place)]) for place in range(len(self.params))]
        return self.layers.sums_of_units(whole) if self.has_units else self.layers.sums_of_tensors(whole)

    # How they descend.

    def _factor(self, level: Level) -> Any:
        r"""Return what the hypergradient of a level is multiplied by, but for N/|G|: :math:`\beta \gamma_k`."""
        chained = self.group["chain_weights"] and not self.couples
        return self.group["hypergrad_lr"] * (self.weights[level] if chained else 1.0)

    def _moved(self, rate: Any, change: Any) -> Any:
        """Return rates after their step, within bounds."""
        limit = self.group["max_change"]
        if limit is not None and isinstance(rate, Tensor):
            most = torch.where(rate == 0, torch.full_like(rate, math.inf), limit * rate.abs())
            change = torch.minimum(torch.maximum(torch.as_tensor(change).to(most), -most), most)
        elif limit is not None and rate:
            change = min(max(change, -limit * abs(rate)), limit * abs(rate))
        return clipped(rate + change, self.group["lr_min"], self.group["lr_max"])

    def descend_parameters_(self, place: int, rates: Tensor, products: Tensor) -> None:
        """Let rates of parameters descend.

        Args:
            place: The place of the tensor.
            rates: The rates of a tensor, or a piece of them.
            products: Gradient times direction.
        """
        factor = self.factor_of_parameters
        if self.group["max_change"] is not None:
            rates.copy_(self._moved(rates, factor * products))
        elif isinstance(factor, Tensor):
            rates.addcmul_(products, factor.to(rates.dtype))
        else:
            rates.add_(products, alpha=factor)
        rates.clamp_(self.group["lr_min"], self.group["lr_max"])
        if self.levels[0] == "parameter":
            self.note_rates(place, rates.sum())

    @property
    def factor_of_parameters(self) -> Any:
        """What rates of parameters change by, over the product H."""
        return self._factor("parameter") * self.layers.size if self.has_parameters else 0.0

    def note_rates(self, place: int, total: Tensor) -> None:
        """Take note of the sum of rates of a tensor's parameters, or of a piece, after they have descended."""
        self._sums_of_rates.setdefault(place, []).append(total)

    @property
    def draws(self) -> bool:
        """Whether rates of parameters are drawn to coarser ones."""
        return bool(self._pull)

    def descend(self, sums: Tensor, weighted: Sequence[Tensor]) -> None:
        """Let the other rates and the weights descend, all from the values that made the last step.

        Args:
            sums: Of the products H, ``(num_sums,)``.
            weighted: Of rates of parameters times H, in parts.
        """
        unit_sums = layer_sums = sums
        if self._unit is not None and self._layer is not None:
            layer_sums = self.layers.layer_sums_of_units(unit_sums)
        everything = layer_sums.sum()
        gains = {"global": self.lr * everything, "parameter": sum(weighted, torch.zeros_like(everything))}
        if self._layer is not None:
            gains["layer"] = self._layer @ layer_sums
        if self._unit is not None:
            gains["unit"] = self._unit @ unit_sums
        is_virtual = self.group["coupling"] == "virtual"
        coarser: Any = None
        if "global" in self.levels:
            change = everything if isinstance(self.lr, Tensor) else everything.item()
            coarser = self.lr = self._moved(self.lr, self._factor("global") * change)
        self._drawn_to: list[Any] = []
        if self._layer is not None:
            plain = self._moved(self._layer, self._factor("layer") * self.layers.layer_scales * layer_sums)
            self._layer = self._drawn(plain, coarser)
            coarser = plain if is_virtual else self._layer
        if self._unit is not None:
            plain = self._moved(self._unit, self._factor("unit") * self.layers.unit_scales * unit_sums)
            if isinstance(coarser, Tensor) and coarser.ndim:
                coarser = coarser[self.layers.layer_of_unit]
            self._unit = self._drawn(plain, coarser)
            coarser = plain if is_virtual else self._unit
        self._above = coarser
        if self.learns_weights:
            self._descend_weights(torch.stack([gains[level] for level in self.levels]))
        self._mix()

    @property
    def _pull(self) -> float:
        """How far a rate is drawn towards the next coarser one."""
        strength = float(self.group["coupling_strength"]) if self.couples else 0.0
        if self.group["coupling"] == "virtual" or not strength:
            return strength
        return 1.0 if strength == math.inf else strength / (1 + strength)

    def _drawn(self, rates: Tensor, coarser: Any) -> Tensor:
        return rates if coarser is None or not self._pull else (1 - self._pull) * rates + self._pull * coarser

    def draw_(self, rates: Tensor, place: int, piece: Piece) -> Tensor:
        """Draw rates of parameters, a piece of them, to those of the next coarser level; return them."""
        if self._pull:
            above = self._above
            if self._unit is not None and place in self.layers.unit_group_of:
                above = above[self._units_of(place)]
            elif self._layer is not None:
                above = above[self.layers.layer_of[place]]
            target = torch.as_tensor(of_units(above, piece), dtype=rates.dtype, device=rates.device)
            rates.mul_(1 - self._pull).add_(target, alpha=self._pull)
        return rates

    def _descend_weights(self, gains: Tensor) -> None:
        r"""Let the weights descend, with gains :math:`-\partial f / \partial \gamma_k = \sum_i \alpha^k_i H_i`."""
        weights = [self.weights[level] for level in self.levels]
        now = torch.stack([torch.as_tensor(w, dtype=gains.dtype, device=gains.device) for w in weights])
        step = self.group["weights_lr"]
        if self.group["norm"] == "softmax":  # of logits, which are the logarithms of the weights, up to a constant
            after = torch.softmax(now.log() + step * now * (gains - now @ gains), dim=0)
        else:
            after = (now + step * gains).clamp(min=0)
            after = torch.where(after.sum() > 0, after / after.sum(), now)
        values = after.tolist() if self.device.type == "cpu" else after.unbind()
        self.weights = dict(zip(self.levels, values, strict=True))

    # What a tensor moves by.

    def _mix(self) -> None:
        """Prepare the combined rate of all layers and units, without the parameter level."""
        self._share: dict[Level, Any] = {self.levels[-1]: 1.0} if self.couples else self.weights
        part: Any = self._share.get("global", 0.0) * self.lr
        if self._layer is not None:
            part = self._share.get("layer", 0.0) * self._layer + part
        self._of_units = None
        if self._unit is not None:
            per_unit = part[self.layers.layer_of_unit] if self._layer is not None else part
            self._of_units = self._share.get("unit", 0.0) * self._unit + per_unit
        self._per_layer = part
        self._of_layers: Sequence[Any] | None = None
        self._of_dtype: dict[tuple[torch.device, torch.dtype], Sequence[Tensor]] = {}

    def common(self, place: int) -> Rate:
        """Return the combined rate of a tensor without the parameter level: one number, or ``(units,)``."""
        if self._of_units is None or place not in self.layers.unit_group_of:
            if self._layer is None:
                return cast("Rate", self._per_layer)
            if self._of_layers is None:
                self._of_layers = self._per_layer.tolist() if self.device.type == "cpu" else self._per_layer.unbind()
            return cast("Rate", self._of_layers[self.layers.layer_of[place]])
        return self._rates_for(place)[self.layers.unit_group_of[place]]

    def factors(self, places: Sequence[int]) -> list[Tensor]:
        """Return the same for several tensors, each in the type of its tensor and ready to be multiplied with it."""
        if self._of_units is None:
            return [self._rates_for(place)[self.layers.layer_of[place]] for place in places]
        of_units = self._of_units
        types = {(self.params[place].device, self.params[place].dtype) for place in places}
        found = {key: self.layers.as_factors(of_units, *key) for key in types}
        if len(found) == 1:
            (factors,) = found.values()
            return [factors[place] for place in places]
        return [found[self.params[place].device, self.params[place].dtype][place] for place in places]

    def _rates_for(self, place: int) -> Sequence[Tensor]:
        """Return the rates of all groups of units, or else of all layers, in the type of a tensor."""
        key = self.params[place].device, self.params[place].dtype
        found = self._of_dtype.get(key)
        if found is None:
            if self._of_units is not None:
                found = torch.split(self._of_units.to(*key), self.layers.unit_counts)
            else:
                rates = torch.as_tensor(self._per_layer, dtype=wide_dtype(self.device), device=self.device)
                found = rates.expand(len(self.layers.names)).to(*key).unbind()
            self._of_dtype[key] = found
        return found

    @property
    def share_of_parameters(self) -> Any:
        """The weight of the parameter level in the combined rate."""
        return self._share.get("parameter", 0.0)

    def write(self) -> None:
        """Write rates and weights into the state and the param group."""
        if self._layer is not None:
            numbers = self._layer.tolist() if self.device.type == "cpu" else self._layer.unbind()
            for place, state in enumerate(self._states):
                state[LAYER] = numbers[self.layers.layer_of[place]]
        if self._unit is not None:
            if self._kept is not None:
                self._kept.copy_(self._unit)  # of which the state has views
            else:
                entries = []
                for units, rates in zip(
                    self.layers.unit_groups, torch.split(self._unit, self.layers.unit_counts), strict=True
                ):
                    dims = self.params[units.members[0]].ndim
                    entries.append(rates.view((-1, *(1,) * (dims - 1)) if dims > 1 else ()))
                    self._states[units.members[0]][UNIT] = entries[-1]
                self._written[self.layers] = entries, self._unit
        if "global" not in self.levels:
            self.lr = as_rate(self._mean(), self.device)
        self.group["lr"] = self.group["last_lr"] = self.lr
        self.group["weights"] = tuple(self.weights[level] for level in self.levels)

    def _mean(self) -> Tensor:
        """Return the mean rate of the coarsest level over all parameters."""
        if self._layer is not None:
            return (self._layer / self.layers.layer_scales).sum()
        if self._unit is not None:
            return (self._unit / self.layers.unit_scales).sum()
        sums = []
        for place, state in enumerate(self._states):
            sums += self._sums_of_rates.get(place) or [state[PARAMETER].sum()]
        return torch.stack([x.to(self.device, wide_dtype(self.device)) for x in sums]).sum() / self.layers.size
