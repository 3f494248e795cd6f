"""Finding what may be resized: beside the zoo, what `trace` refuses, and what must not matter to it."""

from __future__ import annotations

import contextlib
import logging
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.trace import trace_call
from tests.zoo import ZOO
from tests.zoo_entry import Model


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def labels(structure: lg.Structure) -> dict[str, set[str]]:
    """Axes of each group."""
    return {name: {axis.label for axis in group.axes} for name, group in structure.groups.items()}


HIDDEN = {"0": {"0.weight[0]", "0.bias[0]", "2.weight[1]"}}


# What is refused


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(lg.StructureError, match="ReLU has no parameters"):
        lg.trace(nn.ReLU(), torch.ones(1))


def test_missing_example_inputs_are_refused() -> None:
    with pytest.raises(lg.StructureError, match=r"needs example inputs.*example_input_array"):
        lg.trace(perceptron())


def test_a_lazy_module_is_refused_by_name() -> None:
    with pytest.raises(lg.StructureError, match=r"'0\.weight'.*Run the model once"):
        lg.trace(nn.Sequential(nn.LazyLinear(3)), torch.ones(1, 5))


def test_an_error_of_the_models_own_names_the_model_and_the_error() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        raise KeyError("no such table")

    with pytest.raises(lg.StructureError, match=r"Model cannot be traced: KeyError.*no such table"):
        lg.trace(Model(forward, layer=nn.Linear(2, 2)), torch.ones(1, 2))


def test_inputs_of_a_wrong_shape_are_an_error_that_says_so() -> None:
    with pytest.raises(lg.StructureError, match="Sequential cannot be traced"):
        lg.trace(perceptron(), torch.ones(1, 4))


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_scripted_model_is_refused() -> None:
    model = torch.jit.trace(perceptron(), torch.ones(1, 5), check_trace=False)
    with pytest.raises(lg.StructureError, match="TorchScript"):
        lg.trace(model, torch.ones(1, 5))


def test_a_failed_trace_leaves_the_model_as_it_was() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.seen = self.first(x)
        raise RuntimeError("in the middle")

    model = Model(forward, first=nn.Linear(5, 8))
    weights, state = model.first.weight, torch.get_rng_state()
    with pytest.raises(lg.StructureError):
        lg.trace(model, torch.ones(1, 5))
    assert model.first.weight is weights
    assert model.training
    assert not hasattr(model, "seen")
    assert torch.equal(torch.get_rng_state(), state)
    model.first(torch.ones(1, 5)).sum().backward()


# What does not matter


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another default dtype": lambda: default_dtype(torch.float64),
    "deterministic algorithms": deterministic,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=list(SURROUNDINGS))
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_the_surroundings_do_not_matter(surroundings: Callable[[], Any]) -> None:
    model = perceptron()
    expected = lg.trace(model, torch.ones(4, 5))
    with surroundings():
        assert lg.trace(model, torch.ones(4, 5)) == expected


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_the_dtype_does_not_matter(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    structure = lg.trace(model, torch.ones(4, 5, dtype=dtype))
    assert labels(structure) == HIDDEN
    assert structure["0"].obstacle is None


@pytest.mark.parametrize("batch", [1, 5, 8])
def test_the_batch_size_does_not_matter_even_where_it_equals_a_width(batch: int) -> None:
    assert labels(lg.trace(perceptron(), torch.ones(batch, 5))) == HIDDEN


def test_the_values_of_weights_do_not_matter() -> None:
    """Zero-initialised and constant layers hide nothing: also a fresh residual branch must be verified."""
    model = perceptron()
    expected = lg.trace(model, torch.ones(4, 5))
    for value in (0.0, 1.0):
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
        assert lg.trace(model, torch.ones(4, 5)) == expected


@pytest.mark.parametrize("name", ["tied_language_model", "group_norm", "channel_shuffle", "rounded_weights"])
def test_two_traces_are_equal(name: str) -> None:
    entry = ZOO[name]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        args, kwargs = entry.inputs()
        found.append(lg.trace(entry.build(), *args, **kwargs))
    assert found[0] == found[1]


def test_a_model_on_the_meta_device_is_verified_with_values_of_its_own() -> None:
    structure = lg.trace(perceptron().to("meta"), torch.ones(4, 5, device="meta"))
    assert labels(structure) == HIDDEN
    assert structure["0"].obstacle is None


def test_a_model_whose_indices_have_no_values_is_traced_without_verification(caplog: pytest.LogCaptureFixture) -> None:
    model = perceptron()
    model.register_buffer("order", torch.arange(3))
    with caplog.at_level(logging.WARNING, logger="lightning_grow"):
        structure = lg.trace(model.to("meta"), torch.ones(4, 5, device="meta"))
    assert labels(structure) == HIDDEN
    assert "not verified" in (structure["0"].obstacle or "")
    assert "'order'" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_are_traced_as_their_python_code() -> None:
    model = torch.compile(perceptron(), backend="eager")
    structure = lg.trace(model, torch.ones(4, 5))
    assert labels(structure) == {"_orig_mod.0": {f"_orig_mod.{label}" for label in HIDDEN["0"]}}
    inner = nn.Sequential(torch.compile(perceptron(), backend="eager"), nn.Linear(3, 2))
    assert "0._orig_mod.0" in lg.trace(inner, torch.ones(4, 5)).groups


def test_forward_hooks_run_and_stay() -> None:
    model, calls = perceptron(), []
    handle = model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[2].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    assert labels(lg.trace(model, torch.ones(4, 5))) == HIDDEN
    assert handle.id in model[0]._forward_hooks
    assert calls


def test_frozen_and_trained_parameters_are_found_alike() -> None:
    model = perceptron()
    expected = lg.trace(model, torch.ones(4, 5))
    model.requires_grad_(False)
    assert lg.trace(model, torch.ones(4, 5)) == expected
    assert not any(p.requires_grad for p in model.parameters())


# Names, modes and other calls


def test_groups_are_named_after_the_first_module_that_produces_the_units() -> None:
    parts = {"stem": nn.Linear(5, 8), "branch": nn.Linear(5, 8), "head": nn.Linear(8, 3)}
    model = Model(lambda self, x: self.head(torch.relu(self.branch(x) + self.stem(x))), **parts)
    assert list(lg.trace(model, torch.ones(4, 5)).groups) == ["stem"]


def test_groups_come_in_the_order_of_the_parameters() -> None:
    layers = {"late": nn.Linear(7, 6), "early": nn.Linear(5, 7), "head": nn.Linear(6, 3)}
    model = Model(lambda self, x: self.head(torch.relu(self.late(torch.relu(self.early(x))))), **layers)
    assert list(lg.trace(model, torch.ones(4, 5)).groups) == ["late", "early"]


def two_modes() -> nn.Module:
    """In train mode, an auxiliary head reads the hidden units as well."""

    def forward(self: Any, x: Tensor) -> Any:
        hidden = torch.relu(self.hidden(x))
        return (self.head(hidden), self.auxiliary(hidden)) if self.training else self.head(hidden)

    return Model(forward, hidden=nn.Linear(5, 8), head=nn.Linear(8, 3), auxiliary=nn.Linear(8, 2))


@pytest.mark.parametrize("training", [True, False])
def test_what_only_one_mode_uses_is_not_cut_off(training: bool) -> None:
    """Traced in eval mode, a group once lacked the columns of an auxiliary head, which then broke training."""
    model = two_modes().train(training)
    structure = lg.trace(model, torch.ones(4, 5))
    lg.apply_(model, [lg.widen(group, 1) for group in structure.groups.values()])
    for mode in (True, False):
        model.train(mode)(torch.ones(4, 5))
    assert structure["hidden"].axes


class Autoencoder(nn.Module):
    """Its forward only encodes; its loss decodes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.encoder(x))

    def loss(self, x: Tensor, scale: float) -> Tensor:
        return (self.decoder(torch.relu(self.encoder(x))) - x).square().mean() * scale

    def loss_by_forward(self, x: Tensor) -> Tensor:
        return (self.decoder(self(x)) - x).square().mean()


def test_another_call_than_forward_can_be_traced() -> None:
    model = Autoencoder()
    structure = trace_call(model, model.loss, torch.ones(4, 5), scale=2.0)
    assert labels(structure) == {"encoder": {"encoder.weight[0]", "encoder.bias[0]", "decoder.weight[1]"}}
    assert structure["encoder"].obstacle is None


def test_what_forward_returns_keeps_its_size_in_any_call() -> None:
    model = Autoencoder()
    assert lg.trace(model, torch.ones(4, 5)).groups == {}
    assert trace_call(model, model.loss_by_forward, torch.ones(4, 5)).pinned["encoder.weight[0]"] == "model output"


def test_depth_does_not_change_what_is_found() -> None:
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(20)]
    structure = lg.trace(nn.Sequential(*blocks, nn.Linear(6, 2)), torch.ones(4, 6))
    assert [group.size for group in structure.groups.values()] == [6] * 20
    assert labels(structure)["7.0"] == {"7.0.weight[0]", "7.0.bias[0]", "8.0.weight[1]"}
    assert all(group.obstacle is None for group in structure.groups.values())


def test_blocks_of_equal_build_and_different_widths_are_told_apart() -> None:
    widths = [3, 5, 5, 4]
    blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip([6, *widths], widths, strict=False)]
    structure = lg.trace(nn.Sequential(*blocks, nn.Linear(4, 2)), torch.ones(4, 6))
    assert [group.size for group in structure.groups.values()] == widths


# Inputs and outputs of any kind


class Batch:
    """An object of somebody else's library."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "object": Batch,
    "mapping that is no dict": lambda x: UserDict(x=x),
    "numpy array": lambda x: x.numpy(),
    "nested lists": lambda x: x.tolist(),
    "tensor that needs a gradient": lambda x: x.requires_grad_(),
    "bytes": lambda x: (x * 10).to(torch.uint8),
    "double precision": lambda x: x.double(),
}


def take(batch: Any) -> Tensor:
    """Make a float32 tensor of any of these."""
    if isinstance(batch, Batch):
        return batch.x
    if isinstance(batch, UserDict):
        return batch["x"]
    return torch.as_tensor(batch).float()


@pytest.mark.parametrize("make", INPUTS.values(), ids=list(INPUTS))
def test_inputs_may_be_of_any_kind(make: Callable[[Tensor], Any]) -> None:
    model = Model(lambda self, batch: self.layers(take(batch)), layers=perceptron())
    structure = lg.trace(model, make(torch.rand(4, 5)))
    assert labels(structure) == {"layers.0": {f"layers.{label}" for label in HIDDEN["0"]}}
    assert structure["layers.0"].obstacle is None


class Answer:
    """An output that no container library knows."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "distribution": lambda y: torch.distributions.Normal(y, 1.0),
    "object": Answer,
    "nested": lambda y: {"a": [(y, None)], "b": "text"},
    "several": lambda y: (y, y.sum(-1), y.argmax(-1)),
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=list(OUTPUTS))
def test_outputs_keep_their_size_whatever_they_are_wrapped_in(wrap: Callable[[Tensor], Any]) -> None:
    """The logits inside a distribution were once taken for hidden units: growth would have added classes."""
    model = Model(lambda self, x: wrap(self.layers(x)), layers=perceptron())
    structure = lg.trace(model, torch.ones(4, 5))
    assert labels(structure) == {"layers.0": {f"layers.{label}" for label in HIDDEN["0"]}}
    assert structure.pinned["layers.2.weight[0]"].startswith("model output")


def test_what_could_not_be_tried_promises_nothing() -> None:
    """A forward that answers nothing that can be compared."""
    model = Model(lambda self, x: self.layers(x).sum().item(), layers=perceptron())
    structure = lg.trace(model, torch.ones(4, 5))
    assert all(group.obstacle is not None for group in structure.groups.values())


def test_a_model_that_only_runs_in_eval_mode_is_traced_in_it() -> None:
    """A batch norm on a single example fails in train mode, in which the model may well be."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    structure = lg.trace(model, torch.randn(1, 5))
    assert structure["0"].obstacle is None
    assert model.training
