"""Random edits of every model of the zoo: ``python -m tests.fuzz --edits 10000``.

Widths grow, split, shrink and change places, several groups at once; blocks come and go; in between the model trains
under some optimizer, with some parameters frozen and modes mixed. After each edit everything is looked at: the forward
and the backward pass, sizes kept in Python, ties, frozen flags, modes and the optimizer's state; and where nothing
stands against it, the function must be the same as before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.axes import AxisGroup, Stack, Structure, layout_length, tensor_of
from lightning_grow.structure.holders import read
from lightning_grow.structure.modules import bookkeeping
from tests.zoo_entry import Entry

Optimizers = Callable[[Iterable[Any]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "SGD": functools.partial(torch.optim.SGD, lr=1e-4, momentum=0.9, nesterov=True),
    "Adam": functools.partial(torch.optim.Adam, lr=1e-4, amsgrad=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-4, foreach=True),
    "NAdam": functools.partial(torch.optim.NAdam, lr=1e-4),
    "RAdam": functools.partial(torch.optim.RAdam, lr=1e-4),
    "Adamax": functools.partial(torch.optim.Adamax, lr=1e-4),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=1e-4, initial_accumulator_value=0.1),
    "Adadelta": functools.partial(torch.optim.Adadelta, lr=1e-2),
    "Adafactor": functools.partial(torch.optim.Adafactor, lr=1e-4),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=1e-4, momentum=0.9, centered=True),
    "Rprop": functools.partial(torch.optim.Rprop, lr=1e-4, step_sizes=(1e-6, 1e-3)),
    "ASGD": functools.partial(torch.optim.ASGD, lr=1e-4, t0=1),
}
KINDS = ("widen", "grow", "split", "prune", "order")
MOST_RUNS = 12
PER_EPISODE = 10


@dataclass
class Tally:
    """What was done, and how far outputs moved where they should not."""

    edits: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    deviation: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.edits + other.edits,
            self.kept + other.kept,
            self.steps + other.steps,
            max(self.deviation, other.deviation),
        )


def fuzz(entry: Entry, structure: Structure, seed: int, edits: int = PER_EPISODE) -> Tally:
    """Make random edits of a fresh model; an error tells what was done before it."""
    tally = Tally()
    part = 0
    while sum(tally.edits.values()) < edits:
        episode = _Episode(entry, structure, f"{entry.name} {seed} {part}")
        part += 1
        try:
            tally += episode.run(edits - sum(tally.edits.values()))
        except Exception as error:
            command = f"python -m tests.fuzz --models {entry.name} --seed {seed} --edits {edits}"
            error.add_note("\n".join([f"Again by: {command}", "What was done:", *episode.log]))
            raise
    return tally


class _Episode:
    """One model, one optimizer, edits until the depth has changed for good."""

    def __init__(self, entry: Entry, structure: Structure, seed: str) -> None:
        self.entry, self.structure = entry, structure
        self.random = random.Random(seed)
        self.torch_seed = self.random.randrange(2**31)
        self.model = entry.build()
        self.tally = Tally()
        self.log: list[str] = []
        self._freeze()
        self._set_modes()
        self.kind = self.random.choice(list(OPTIMIZERS))
        learning = [p for p in self.model.parameters() if p.requires_grad]
        some = [p for p in learning if self.random.random() < 0.3]
        others = [p for p in learning if not any(p is s for s in some)]
        self.optimizer = OPTIMIZERS[self.kind]([{"params": part} for part in (some, others) if part])
        self.log.append(f"{self.kind}, {len(some)} + {len(others)} parameters of {len(list(self.model.parameters()))}")
        self.shared = self._identities()
        self.frozen = self._flags()

    def run(self, edits: int) -> Tally:
        """Edit until there are so many, or the structure is no longer that of the model."""
        self._train()
        stacks = [s for s in self.structure.stacks.values() if s.obstacle is None]
        while sum(self.tally.edits.values()) < edits:
            number = self.random.random()
            if stacks and (number < 0.15 or not self.structure.groups):
                if self._change_depth(self.random.choice(stacks)):
                    break
            elif self.structure.groups:
                self._change_widths()
            else:
                self.tally.edits["none"] += edits
            if self.random.random() < 0.3:
                self._train()
            if self.random.random() < 0.1:
                self._set_modes()
        return self.tally

    # -- what is done ----------------------------------------------------------------------------------------------

    def _change_widths(self) -> None:
        sizes = self.structure.sizes_in(self.model)
        groups = list(self.structure.resized(sizes).groups.values())
        many = min(len(groups), self.random.choice((1, 1, 2, 3, len(groups))))
        edits = {self._edit(group) for group in self.random.sample(groups, many)}
        self.log += [", ".join(f"{kind} {edit}" for kind, edit in sorted(edits, key=str))]
        keeps = all(kind == "grow" or (kind != "prune" and edit.group.obstacle is None) for kind, edit in edits)
        before = self._answers()
        try:
            lg.apply_(self.model, [edit for _, edit in edits], optimizers=[self.optimizer])
        except lg.StructureError as refusal:  # an LSTM needs fewer projected than hidden units
            if "do not go together" not in str(refusal):
                raise
            self.log.append("refused")
            self._check()
            self._same(before, self._answers())
            return
        self._check()
        after = self._answers()
        self.tally.edits.update(kind for kind, _ in edits)
        if keeps:
            self._same(before, after)
            self.tally.kept.update(kind for kind, _ in edits)

    def _edit(self, group: AxisGroup) -> tuple[str, lg.Edit]:
        """Return an edit that leaves some units, and does not let the model grow without bound.

        To grow is to widen while the function is kept, under norms too where a recipe for that is known.
        """
        runs = group.size // group.step
        kinds = ("prune", "order") if runs > MOST_RUNS else KINDS if runs > 1 else ("widen", "grow", "split")
        kind = self.random.choice(kinds)
        chosen = self.random.sample(range(runs), self.random.randint(1, max(1, min(runs // 2, runs - 1))))
        units = [run * group.step + i for run in chosen for i in range(group.step)]
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        number = group.step * self.random.randint(1, 3)
        if kind == "grow" and (group.obstacle is None or group.padding is not None):
            return kind, lg.widen(group, number, generator, preserve=True)
        if kind == "grow" and group.copies:
            return kind, lg.widen(group, group.size, generator, preserve=True)
        if kind in ("widen", "grow"):
            return "widen", lg.widen(group, number, generator)
        if kind == "split":
            return kind, lg.split(group, units, generator)
        if kind == "prune":
            return kind, lg.prune(group, units)
        order = [run * group.step + i for run in self.random.sample(range(runs), runs) for i in range(group.step)]
        return kind, lg.Edit(group, tuple(order))

    def _change_depth(self, stack: Stack) -> bool:
        """Insert a block, and mostly take it out again; or remove one. Return whether the model has another depth."""
        path = stack.blocks[0].rpartition(".")[0]
        names = [name for name, _ in self.model.get_submodule(path).named_children()]
        start = names.index(stack.blocks[0].rpartition(".")[2])
        if len(stack.blocks) > 1 and self.random.random() < 0.2:
            at = self.random.randrange(len(stack.blocks))
            self.log.append(f"remove block {at} of '{stack.name}'")
            lg.remove_(self.model, stack, at, optimizers=[self.optimizer])
            self.tally.edits["remove"] += 1
            self._train()
            return True
        at = self.random.randint(stack.first, len(stack.blocks))
        before = self._answers()
        self.log.append(f"insert a block at {at} of '{stack.name}'")
        try:
            lg.insert_(self.model, stack, at, optimizers=[self.optimizer])
        except lg.StructureError as refusal:  # widths that were equal in the trace have been edited apart
            if "no longer as wide" not in str(refusal):
                raise
            self.log.append("refused")
            return False
        self.tally.edits["insert"] += 1
        self._same(before, self._answers())
        self.tally.kept["insert"] += 1
        self._train()
        if self.random.random() < 0.3:
            return True
        children = [name for name, _ in self.model.get_submodule(path).named_children()]
        blocks = children[start : start + len(stack.blocks) + 1]
        grown = dataclasses.replace(stack, blocks=tuple(f"{path}.{name}".removeprefix(".") for name in blocks))
        self.log.append(f"remove block {at} of '{stack.name}', the new one")
        lg.remove_(self.model, grown, at, optimizers=[self.optimizer])
        self.tally.edits["remove"] += 1
        self._check()
        return False

    def _train(self) -> None:
        """Make one step in the modes that the modules are in."""
        self.log.append("step")
        self.optimizer.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.torch_seed)
            outputs = [t for t in self.entry.outputs(self.model) if t.requires_grad]
        if outputs:
            torch.stack([(t - 0.3).abs().pow(2).mean() for t in outputs]).sum().backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        del outputs
        self._check_state()
        self.tally.steps[self.kind] += 1

    def _freeze(self) -> None:
        if self.random.random() < 0.5:
            parameters = list(self.model.parameters())
            for parameter in self.random.sample(parameters, len(parameters) // 3):
                parameter.requires_grad_(False)
            if not any(p.requires_grad for p in parameters):
                parameters[0].requires_grad_(True)

    def _set_modes(self) -> None:
        self.model.train(self.random.random() < 0.5)
        for module in self.model.modules() if self.random.random() < 0.3 else ():
            module.training = self.random.random() < 0.5
        self.modes = [module.training for module in self.model.modules()]

    # -- what must hold --------------------------------------------------------------------------------------------

    def _check(self) -> None:
        sizes = self.structure.sizes_in(self.model)
        for group in self.structure.groups.values():
            for axis in group.axes:
                assert tensor_of(self.model, axis.tensor).shape[axis.dim] == layout_length(axis.layout, sizes), axis
            for kept in group.attributes:
                value = read(self.model.get_submodule(kept.module), kept.name, kept.index)
                assert value == layout_length(kept.layout, sizes), kept
        for name, module in self.model.named_modules():
            for size in bookkeeping(module):
                tensor = functools.reduce(getattr, size.parameter.split("."), module)
                value: Any = getattr(module, size.name)
                value = value if size.index is None else value[size.index]
                assert value == tensor.shape[size.dim] // size.divisor * size.times, f"{name}.{size.name}"
        assert self._identities() == self.shared, "parameters were exchanged or untied"
        assert self._flags() == self.frozen, "frozen flags changed"
        assert [module.training for module in self.model.modules()] == self.modes, "modes changed"
        self._check_state()

    def _check_state(self) -> None:
        known = {id(p) for p in self.model.parameters()}
        for group in self.optimizer.param_groups:
            assert all(id(p) in known for p in group["params"]), "the optimizer holds parameters that are gone"
        for parameter, state in self.optimizer.state.items():
            shapes = {key: value.shape for key, value in state.items() if isinstance(value, Tensor)}
            assert id(parameter) in known
            assert shapes in ({}, state_shapes(self.kind, parameter.shape)), f"{self.kind}: {tuple(parameter.shape)}"

    def _identities(self) -> dict[str, int]:
        return {name: id(p) for name, p in self.model.named_parameters(remove_duplicate=False)}

    def _flags(self) -> dict[str, bool]:
        return {name: p.requires_grad for name, p in self.model.named_parameters()}

    def _answers(self) -> list[Tensor]:
        """Return the outputs in eval mode, and leave modes, buffers and what modules keep as they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with self._kept(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.torch_seed)
            answers = [t.clone() for t in self.entry.outputs(self.model.eval())]
        for buffer, value in buffers:
            buffer.copy_(value)
        assert all(bool(t.isfinite().all()) for t in answers), "outputs are not finite"
        return answers

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Leave the attributes of modules as they were: modes, and states that are kept between batches."""
        kept = [(vars(module), dict(vars(module))) for module in self.model.modules()]
        try:
            yield
        finally:
            for attributes, before in kept:
                if self.entry.third_party:  # those note which hooks they have put on
                    attributes["training"] = before["training"]
                    continue
                attributes.clear()
                attributes.update(before)

    def _same(self, before: list[Tensor], after: list[Tensor]) -> None:
        for old, new in zip(before, after, strict=True):
            assert old.shape == new.shape
            if old.numel():
                deviation = float((new - old).abs().max()) / max(1.0, float(old.abs().max()))
                self.tally.deviation = max(self.tally.deviation, deviation)
                assert deviation < 1e-10, f"outputs moved by {deviation:.2e}"


@functools.cache
def state_shapes(optimizer: str, shape: torch.Size) -> dict[str, torch.Size]:
    """Return the shapes of what an optimizer remembers of a parameter of this shape."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    parameter.grad = torch.ones_like(parameter)
    fresh = OPTIMIZERS[optimizer]([parameter])
    fresh.step()
    return {key: value.shape for key, value in fresh.state[parameter].items() if isinstance(value, Tensor)}


def main() -> None:
    """Make so many random edits over the whole zoo, and print what was done; the first error ends it."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from tests.test_zoo import structure_of
    from tests.zoo import EVERYTHING

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", default="*", help="names of models, as a glob pattern")
    arguments = parser.parse_args()
    models = [entry for name, entry in EVERYTHING.items() if fnmatch.fnmatch(name, arguments.models)]
    torch.set_num_threads(1)
    console = Console()
    traced = [(entry, structure_of(entry)) for entry in track(models, "tracing", console=console)]
    models = [e for e, s in traced if s.groups or any(stack.obstacle is None for stack in s.stacks.values())]
    tally = Tally()
    rounds = -(-arguments.edits // (PER_EPISODE * len(models)))
    tasks = [(entry, arguments.seed + i) for i in range(rounds) for entry in models]
    for entry, seed in track(tasks, f"{arguments.edits} edits", console=console):
        left = arguments.edits - sum(tally.edits.values())
        if left > 0:
            tally += fuzz(entry, structure_of(entry), seed, min(PER_EPISODE, left))
    table = Table("edit", "count", "function compared", title=f"{len(models)} models, seed {arguments.seed}")
    for kind, count in tally.edits.most_common():
        table.add_row(kind, str(count), str(tally.kept[kind]))
    console.print(table)
    steps = ", ".join(f"{name} {count}" for name, count in tally.steps.most_common())
    console.print(f"Training steps: {steps}. Largest relative deviation where none should be: {tally.deviation:.1e}.")


if __name__ == "__main__":
    main()
