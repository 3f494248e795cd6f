import pytest
import torch
from torch import nn

from lightning_grow.criteria import GradientSums, magnitude, sizes_of, sum_over_units
from lightning_grow.structure import trace
from lightning_grow.structure.axes import tensor_of
from tests.zoo import ZOO

NAMES = ["mlp", "cnn_batch_norm", "flatten_head", "concat_raw", "depthwise_separable"]


@pytest.mark.parametrize("name", NAMES)
def test_a_score_for_each_unit_with_mean_one(name):
    """T9.2."""
    entry = ZOO[name]
    model = entry.build()
    args, kwargs = entry.inputs()
    for group in trace(model, *args, **kwargs).groups.values():
        scores = magnitude(group, model)
        assert scores.shape == (group.size,)
        torch.testing.assert_close(scores.mean(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_sums_over_units_add_up_to_the_sum_over_their_entries(name):
    """Each entry of a unit is counted once, and entries of other groups on the axis not at all."""
    entry = ZOO[name]
    model = entry.build()
    args, kwargs = entry.inputs()
    structure = trace(model, *args, **kwargs)
    for group in structure.groups.values():
        sizes = sizes_of(model, group)
        for axis in group.axes:
            tensor = tensor_of(model, axis.tensor)
            only = sum_over_units(torch.ones_like(tensor), group, axis, sizes)
            own = sum(
                b.length(sizes) for b in axis.layout if any(getattr(f, "group", "") == group.name for f in b.factors)
            )
            torch.testing.assert_close(only.sum(), torch.tensor(own / tensor.shape[axis.dim] * tensor.numel()).double())
            assert len(set(only.tolist())) == 1


def test_a_flattened_channel_owns_its_run_of_columns():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    group = trace(model, torch.zeros(1, 1, 2, 2))["0"]
    axis = next(a for a in group.axes if a.tensor == "2.weight")
    values = torch.arange(12.0).expand(2, 12)
    expected = 2 * torch.arange(12.0, dtype=torch.float64).reshape(3, 4).sum(dim=1)
    assert torch.equal(sum_over_units(values, group, axis, {"0": 3}), expected)


@torch.no_grad()
def test_scores_follow_a_permutation_and_ignore_scale():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    group = trace(model, torch.zeros(1, 4).double())["0"]
    before = magnitude(group, model)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    for tensor in (model[0].weight, model[0].bias):
        tensor.copy_(7.0 * tensor[order])
    model[2].weight.copy_(7.0 * model[2].weight[:, order])
    torch.testing.assert_close(magnitude(group, model), before[order])


def test_the_norm_is_the_one_asked_for():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
    group = trace(model, torch.zeros(1, 2))["0"]
    assert magnitude(group, model, roles=["produced"]).tolist() == [1.0, 1.0]
    assert magnitude(group, model, roles=["produced"], p=1.0).tolist() == pytest.approx([7 / 6, 5 / 6])


def test_all_zero_weights_score_zero():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert magnitude(trace(model, torch.zeros(1, 2))["0"], model).tolist() == [0, 0, 0]


def test_wrong_arguments_are_named():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    group = trace(model, torch.zeros(1, 2))["0"]
    with pytest.raises(ValueError, match="`p` above 0"):
        magnitude(group, model, p=0)
    with pytest.raises(ValueError, match="No parameter of '0' has a role among carried"):
        magnitude(group, model, roles=["carried"])


# -- statistics -----------------------------------------------------------------------------------------------------


def batches(number):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(number)]


def observed(model, data):
    sums = GradientSums(["weight", "bias"])
    sums.attach(model)
    gradients = []
    for x in data:
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append(model.weight.grad.clone())
    sums.detach()
    return sums, torch.stack(gradients)


def test_sums_are_those_of_the_gradients():
    model = nn.Linear(3, 2).double()
    sums, gradients = observed(model, batches(4))
    torch.testing.assert_close(sums.mean("weight"), gradients.mean(dim=0))
    torch.testing.assert_close(sums.mean_square("weight"), gradients.square().mean(dim=0))
    assert sums.sums["count/bias"] == 4


def test_accumulated_gradients_count_once_each():
    """A hook sees what each backward pass adds, not what has piled up."""
    model = nn.Linear(3, 2).double()
    expected, _ = observed(model, batches(3))
    model.zero_grad()
    sums = GradientSums(["weight", "bias"])
    sums.attach(model)
    for x in batches(3):
        model(x).square().mean().backward()
    torch.testing.assert_close(sums.mean("weight"), expected.mean("weight"))


def test_sums_of_parts_add_up_to_the_sum_of_the_whole():
    """What makes them right on any number of processes."""
    model = nn.Linear(3, 2).double()
    whole, _ = observed(model, batches(4))
    first, _ = observed(model, batches(4)[:2])
    second, _ = observed(model, batches(4)[2:])
    others = iter([second.sums[name] for name in sorted(second.sums)])
    first.reduce_(lambda mine: mine + next(others))
    assert first.sums.keys() == whole.sums.keys()
    for name in whole.sums:
        torch.testing.assert_close(first.sums[name], whole.sums[name])


def test_detached_statistics_leave_no_hook_and_can_be_attached_again():
    model = nn.Linear(3, 2).double()
    sums, _ = observed(model, batches(2))
    assert not model.weight._backward_hooks
    model(batches(1)[0]).sum().backward()
    assert sums.sums["count/weight"] == 2
    sums.attach(model)
    model(batches(1)[0]).sum().backward()
    assert sums.sums["count/weight"] == 3
    sums.detach()


def test_sums_survive_a_checkpoint():
    model = nn.Linear(3, 2).double()
    sums, _ = observed(model, batches(2))
    again = GradientSums(sums.parameters)
    again.load_state_dict(sums.state_dict())
    assert torch.equal(again.mean("weight"), sums.mean("weight"))


def test_half_precision_is_summed_in_single():
    sums = GradientSums(["weight"])
    sums.add("x", torch.ones(2, dtype=torch.bfloat16))
    assert sums.sums["x"].dtype == torch.float32


def test_an_unknown_parameter_is_named():
    with pytest.raises(ValueError, match="Cannot observe wait"):
        GradientSums(["wait"]).attach(nn.Linear(2, 2))


def test_frozen_parameters_are_not_observed():
    model = nn.Linear(3, 2).double()
    model.weight.requires_grad_(False)
    sums, _ = observed_bias_only(model)
    assert set(sums.sums) == {"gradient/bias", "square/bias", "count/bias"}


def observed_bias_only(model):
    sums = GradientSums(["weight", "bias"])
    sums.attach(model)
    model(batches(1)[0]).sum().backward()
    sums.detach()
    return sums, None
