"""Sums gathered over some ordinary batches: anyone may reduce them, what is computed from them is pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Reduce = Callable[[Tensor], Tensor]


class Statistic(ABC):
    """Sums over observed batches, filled by hooks while somebody else runs the model.

    A subclass says in `hooks` where it looks; each hook calls `add`. No pass is made for it, nothing is kept of a
    batch but its sums, and sums of several processes can be added.

    Attributes:
        sums: The sums by name; on the device they were gathered on.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def hooks(self, model: nn.Module) -> Iterable[RemovableHandle]:
        """Register the hooks on a model, and return their handles."""

    def attach(self, model: nn.Module) -> None:
        """Begin to observe a model."""
        self.detach()
        self._handles = list(self.hooks(model))

    def detach(self) -> None:
        """Stop observing; the sums stay. Parameters with hooks cannot be edited, so this comes first."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum, in at least single precision."""
        value = value.detach()
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def reduce_(self, reduce: Reduce) -> None:
        """Replace each sum by the sum over all processes; names are sorted, so that all go through the same order.

        Args:
            reduce: Adds a tensor up over processes, and returns the total to each.
        """
        for name in sorted(self.sums):
            self.sums[name] = reduce(self.sums[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums, to be saved in the middle of a window."""
        return dict(self.sums)

    def load_state_dict(self, sums: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Go on from saved sums."""
        self.sums = {name: value.to(device) for name, value in sums.items()}


class GradientSums(Statistic):
    """Sums of the gradient of each parameter, and of its square, over backward passes.

    With a loss that is a mean over the batch, ``gradient / count`` is the mean gradient over the observed batches.
    Under mixed precision with loss scaling the gradients are scaled, as torch has them in the backward pass.

    Args:
        parameters: Qualified names of the parameters to observe, as in ``model.named_parameters()``.

    Raises:
        ValueError: On `attach`, if the model has no parameter of a name.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> sums = GradientSums(["weight"])
        >>> sums.attach(model)
        >>> for _ in range(3):
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> sums.detach()
        >>> sums.mean("weight")
        tensor([[1., 1.]])
    """

    def __init__(self, parameters: Iterable[str]) -> None:
        super().__init__()
        self.parameters = tuple(parameters)

    def hooks(self, model: nn.Module) -> Iterable[RemovableHandle]:
        """Register a hook on each parameter that is trained."""
        named = dict(model.named_parameters())
        unknown = [name for name in self.parameters if name not in named]
        if unknown:
            raise ValueError(f"Cannot observe {', '.join(unknown)}: the model has no such parameter.")
        for name in self.parameters:
            if named[name].requires_grad:
                yield named[name].register_hook(self._hook(name))  # type: ignore[no-untyped-call]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def observe(gradient: Tensor) -> None:
            self.add(f"gradient/{name}", gradient)
            self.add(f"square/{name}", gradient.detach().square())
            self.add(f"count/{name}", torch.ones((), dtype=torch.float32, device=gradient.device))

        return observe

    def mean(self, name: str) -> Tensor:
        """Return the mean gradient of a parameter over the observed backward passes, in its own shape."""
        return self.sums[f"gradient/{name}"] / self.sums[f"count/{name}"]

    def mean_square(self, name: str) -> Tensor:
        """Return the mean squared gradient of a parameter over the observed backward passes, in its own shape."""
        return self.sums[f"square/{name}"] / self.sums[f"count/{name}"]
