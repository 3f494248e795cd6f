"""Which param group a parameter belongs to, as blocks come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_grow.surgery.optimizer_state import OptimizerMemory, initial_state
from lightning_grow.surgery.state_slots import Slot, nested_optimizers, state_slots
from lightning_grow.surgery.swap import Commit


class Membership:
    """The param groups of one optimizer, and of those that it wraps.

    Args:
        optimizer: Any object with ``param_groups`` and ``state``.
        model_parameters: The optimizer must hold at least one of these. In the order of the model.

    Raises:
        TypeError: If the object is no optimizer.
        ValueError: If the optimizer holds none of the model's parameters.
    """

    def __init__(self, optimizer: Any, model_parameters: Sequence[Tensor]) -> None:
        self._memory = OptimizerMemory(optimizer, model_parameters)
        self._optimizer = optimizer
        self._order = {id(p): i for i, p in enumerate(model_parameters)}
        self._names = [
            (group, dict(zip(map(id, group["params"]), group["param_names"], strict=True)))
            for group in self._groups()
            if len(group.get("param_names", ())) == len(group["params"]) > 0
        ]

    def add_(self, commit: Commit, twins: Sequence[tuple[Tensor, Tensor]], model_parameters: Sequence[Tensor]) -> None:
        """Let new parameters join the groups of their twins.

        A group whose parameters are in the order of the model stays so, as if the optimizer were built anew: saved
        optimizer states count parameters by their place.

        Args:
            commit: Where changes are written down.
            twins: Parameters that the optimizer may hold, and new parameters beside each.
            model_parameters: All parameters of the model, the new ones included, in its order.
        """
        new_order = {id(p): i for i, p in enumerate(model_parameters)}
        partner = {id(old): new for old, new in twins}
        beside = self._beside()
        before = [list(group["params"]) for group in self._groups()]
        for group in self._groups():
            members: list[Tensor] = group["params"]
            joining = [partner[id(p)] for p in members if id(p) in partner]
            if not joining:
                continue
            places = [self._order.get(id(p), -1) for p in members]
            if places == sorted(places) and -1 not in places:
                ordered = sorted([*members, *joining], key=lambda p: new_order[id(p)])
            else:
                last = max(i for i, p in enumerate(members) if id(p) in partner)
                ordered = [*members[: last + 1], *joining, *members[last + 1 :]]
            commit.contents(members, ordered)
            self._begin_state_(commit, group, joining)
        self._fill_beside_(commit, beside, before)
        self._forget_shared_(commit, [old for old, _ in twins])

    def remove_(self, commit: Commit, gone: Sequence[Tensor]) -> None:
        """Let parameters leave their groups, with all that is remembered about them; groups may become empty."""
        ids = {id(p) for p in gone}
        self._forget_shared_(commit, gone)
        beside = self._beside()
        before = [list(group["params"]) for group in self._groups()]
        for group in self._groups():
            members: list[Tensor] = group["params"]
            staying = [p for p in members if id(p) not in ids]
            if len(staying) < len(members):
                commit.contents(members, staying)
        self._fill_beside_(commit, beside, before)
        containers = {id(s.container): s.container for s in state_slots(self._optimizer) if isinstance(s.key, Tensor)}
        for container in containers.values():
            kept = {key: value for key, value in container.items() if id(key) not in ids}
            if len(kept) < len(container):
                commit.contents(container, kept)

    def rename_(self, commit: Commit, before: Mapping[int, str], after: Mapping[int, str]) -> None:
        """Let the names that param groups keep of their parameters follow, after `add_` or `remove_`.

        Args:
            commit: Where changes are written down.
            before: Names in the model, by the id of the parameter, before the change.
            after: The same, after it.
        """
        for group, names in self._names:
            known = [(name, before[key]) for key, name in names.items() if name.endswith(before.get(key, "?"))]
            prefix = known[0][0].removesuffix(known[0][1]) if known else ""
            own = {key for key, name in names.items() if name != prefix + before.get(key, "?")}
            renamed = [
                names[id(p)] if id(p) in own else prefix + after[id(p)] if id(p) in after else names.get(id(p), "")
                for p in group["params"]
            ]
            commit.contents(group["param_names"], renamed)

    def _groups(self) -> list[dict[str, Any]]:
        """Return all param groups, each list of parameters once."""
        groups = [group for nested in nested_optimizers(self._optimizer) for group in nested.param_groups]
        return list({id(group["params"]): group for group in groups}.values())

    def _beside(self) -> list[tuple[Any, dict[int, Slot]]]:
        """Return lists and mappings, other than the state, that have a tensor for each parameter."""
        found: dict[int, tuple[Any, dict[int, Slot]]] = {}
        for slot in state_slots(self._optimizer):
            if slot.name != "state" and isinstance(slot.container[slot.key], Tensor):
                _, slots = found.setdefault(id(slot.container), (slot.container, {}))
                slots[id(slot.parameter)] = slot
        return list(found.values())

    def _fill_beside_(
        self, commit: Commit, beside: Sequence[tuple[Any, dict[int, Slot]]], before: Sequence[Sequence[Tensor]]
    ) -> None:
        """Let lists and mappings beside the parameters, of a group or of all groups, keep an entry for each of them."""
        now = [group["params"] for group in self._groups()]
        runs = [*zip(before, now, strict=True), ([p for b in before for p in b], [p for n in now for p in n])]
        for container, slots in beside:
            ordered = next((after for old, after in runs if {id(p) for p in old} == set(slots)), None)
            if ordered is None:
                continue
            kind = self._memory.kind_of(next(iter(slots.values())).name)
            entries = [
                (p, container[slots[id(p)].key] if id(p) in slots else kind.initial(p.detach())) for p in ordered
            ]
            commit.contents(container, [e for _, e in entries] if isinstance(container, list) else dict(entries))

    def _begin_state_(self, commit: Commit, group: dict[str, Any], joining: Sequence[Tensor]) -> None:
        """Give new parameters the state that the constructor of the optimizer gives; most give none."""
        for nested in nested_optimizers(self._optimizer):
            if not any(g["params"] is group["params"] for g in nested.param_groups):
                continue
            begun = {p: initial_state(nested, p, group) for p in joining}
            begun = {p: state for p, state in begun.items() if state}
            if begun and nested.state is not None:
                commit.contents(nested.state, {**nested.state, **begun})

    def _forget_shared_(self, commit: Commit, changed: Sequence[Tensor]) -> None:
        for change in self._memory.shared_by(changed):
            commit.item(*change)
        self._memory.report_resets()
