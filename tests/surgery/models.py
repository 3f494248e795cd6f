"""Small models with structures written by hand, so that surgery is tested apart from tracing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Attribute, Axis, AxisGroup, Block, Layout, Role, Units


@dataclass
class Case:
    """A model, its groups, an input, and an optimizer that has already made some steps."""

    model: nn.Module
    groups: dict[str, AxisGroup]
    inputs: Tensor
    optimizer: Any = None

    def group(self, name: str) -> AxisGroup:
        """The group with its live size."""
        group = self.groups[name]
        return AxisGroup(group.name, group.units.size_in(self.model), group.step, group.axes, group.attributes)

    def output(self) -> Tensor:
        """The output in eval mode."""
        was_training = self.model.training
        with torch.no_grad():
            out = self.model.eval()(self.inputs)
        self.model.train(was_training)
        return out

    def train(self, steps: int = 3) -> None:
        """Make some optimizer steps on the only batch."""
        for _ in range(steps):
            self.optimizer.zero_grad()

            def closure() -> Tensor:
                loss = self.model(self.inputs).sin().square().mean()
                loss.backward()
                return loss

            if isinstance(self.optimizer, torch.optim.LBFGS):
                self.optimizer.step(closure)
            else:
                closure()
                self.optimizer.step()


def axis(label: str, role: Role, layout: Layout) -> Axis:
    """An axis from its label, such as ``"fc1.weight[0]"``."""
    name, dim = label[:-1].rsplit("[", 1)
    return Axis(name, int(dim), role, layout)


def group_of(
    name: str,
    units: Units,
    size: int,
    produced: str = "",
    carried: str = "",
    consumed: str = "",
    attributes: str = "",
    layouts: dict[str, Layout] | None = None,
    step: int = 1,
) -> AxisGroup:
    """A group from labels separated by blanks; ``layouts`` for those that are not just the units."""
    plain = (Block((units,)),)
    layouts = layouts or {}
    axes = [
        axis(label, role, layouts.get(label, plain))
        for role, labels in (("produced", produced), ("carried", carried), ("consumed", consumed))
        for label in labels.split()
    ]
    kept = [label.rsplit(".", 1) for label in attributes.split()]
    return AxisGroup(
        name,
        size,
        step,
        tuple(axes),
        tuple(Attribute(module, leaf, None, layouts.get(f"{module}.{leaf}", plain)) for module, leaf in kept),
    )


def perceptron(dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """Two hidden widths, the second with a norm that carries it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(5)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), norm, nn.Tanh(), nn.Linear(5, 2))
        model = model.to(dtype)
        inputs = torch.randn(16, 3).to(dtype)
    first = group_of(
        "0", Units("0", "0.weight", 0, 1), 6, "0.weight[0] 0.bias[0]", "", "2.weight[1]", "0.out_features 2.in_features"
    )
    second = group_of(
        "2",
        Units("2", "2.weight", 0, 1),
        5,
        "2.weight[0]",
        "3.weight[0] 3.bias[0] 3.running_mean[0] 3.running_var[0]",
        "5.weight[1]",
        "2.out_features 3.num_features 5.in_features",
    )
    return Case(model, {"0": first, "2": second}, inputs)


class Gated(nn.Module):
    """A fused gate and value projection, a depthwise kernel, and a flatten into the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.head = nn.Linear(4 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.conv(x).chunk(2, 1)
        return self.head(self.depthwise(torch.tanh(gate) * value).flatten(1))


def gated(dtype: torch.dtype = torch.float64) -> Case:
    """Composite layouts: two blocks of channels, and nine entries for each channel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, inputs = Gated().to(dtype), torch.randn(5, 2, 3, 3).to(dtype)
    units = Units("conv", "depthwise.weight", 0, 1)
    layouts = {
        **dict.fromkeys(("conv.weight[0]", "conv.bias[0]", "conv.out_channels"), (Block((2, units)),)),
        **dict.fromkeys(("head.weight[1]", "head.in_features"), (Block((units, 9)),)),
    }
    group = group_of(
        "conv",
        units,
        4,
        "conv.weight[0] conv.bias[0]",
        "depthwise.weight[0] depthwise.bias[0]",
        "head.weight[1]",
        "conv.out_channels depthwise.in_channels depthwise.out_channels depthwise.groups head.in_features",
        layouts,
    )
    return Case(model, {"conv": group}, inputs)


def snapshot(model: nn.Module, *optimizers: Any) -> dict[str, Any]:
    """All that an edit may change, as copies, with the identities that it must keep."""
    state = {f"state {i}": copy.deepcopy(o.state_dict()) for i, o in enumerate(optimizers)}
    plain = {
        f"{path}.{name}": copy.deepcopy(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, tuple, list, str)) and name != "_flat_weights"
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors},
        "ids": {name: id(tensor) for name, tensor in tensors},
        "flags": {name: (tensor.requires_grad, type(tensor), dict(vars(tensor))) for name, tensor in tensors},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "groups": [[[id(p) for p in g["params"]] for g in o.param_groups] for o in optimizers],
        "plain": plain,
        **state,
    }


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Bit for bit."""
    assert type(left) is type(right), path
    if isinstance(left, Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape), path
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key, value in left.items():
            assert_same(value, right[key], f"{path}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}/{i}")
    else:
        assert left == right, path
