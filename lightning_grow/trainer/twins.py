"""Copies of a module, or of a part of it, that callbacks keep (weight averages): they change as the module does."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn

log = logging.getLogger(__name__)

Shapes = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, eq=False)
class Twin:
    """A copy of a module, or of the part of it at ``path``."""

    copy: nn.Module
    path: str

    def within(self, module: nn.Module) -> nn.Module:
        """Return something with the names of ``module`` in which the copy stands: what is done to it happens to both.

        Args:
            module: The whole module, as it is while the copy has its shapes.
        """
        if not self.path:
            return self.copy
        whole = copy.deepcopy(module)
        parent, _, name = self.path.rpartition(".")
        setattr(whole.get_submodule(parent), name, self.copy)
        return whole


def twins_of(module: pl.LightningModule, trainer: pl.Trainer) -> list[Twin]:
    """Return the copies that callbacks keep, known by their type and the names and shapes of their tensors.

    A part that several parts of the module resemble is left alone, with a line in the log.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    held = [value for callback in callbacks for value in vars(callback).values() if isinstance(value, nn.Module)]
    if not held:
        return []
    own = {id(inner) for inner in module.modules()}
    parts = [
        (path, part, _shapes(part)) for path, part in module.named_modules() if any(True for _ in part.parameters())
    ]
    found: dict[int, Twin] = {}
    for value in held:
        taken: set[int] = set()
        for inner in value.modules():
            if id(inner) in own or id(inner) in taken:
                continue
            paths = _matching(inner, parts)
            if paths:
                taken |= {id(m) for m in inner.modules()}
                if len(paths) == 1 or paths[0] == "":
                    found.setdefault(id(inner), Twin(inner, paths[0]))
                else:
                    rank_zero_only(log.warning)(
                        "A callback keeps a %s that could be a copy of any of %s: it is not changed with them.",
                        type(inner).__name__,
                        ", ".join(paths),
                    )
    return list(found.values())


def _matching(inner: nn.Module, parts: Sequence[tuple[str, nn.Module, Shapes]]) -> list[str]:
    shapes = _shapes(inner)
    return [path for path, part, of_part in parts if type(part) is type(inner) and of_part == shapes]


def _shapes(module: nn.Module) -> Shapes:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [(name, tuple(tensor.shape)) for name, tensor in tensors]
