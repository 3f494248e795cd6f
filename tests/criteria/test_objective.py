"""The loss over batches: exact means over all processes, and nothing moved in the model or outside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_grow.criteria import MeasurementError, Objective

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def model_of():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)]
        return nn.Sequential(*layers).double()


def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def batches(number):
    size = 12 // number
    return [(X[i * size : (i + 1) * size], Y[i * size : (i + 1) * size]) for i in range(number)]


@pytest.mark.parametrize("number", [1, 2, 4])
def test_value_and_gradient_are_those_of_all_examples_at_once(number):
    model = model_of()
    objective = Objective(loss, batches(number))
    names = [name for name, _ in model.named_parameters()]
    value, gradients = objective.gradients(model, names)
    model.eval()
    expected = loss(model, (X, Y))
    assert value == pytest.approx(float(expected.detach()))
    assert objective.value(model) == pytest.approx(value)
    for name, gradient in zip(names, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradients[name], gradient)


def test_two_processes_measure_what_one_would():
    """Each has half of the batches; sums are added up, and so is the number of batches."""
    model = model_of()
    sums = []
    for half in (batches(4)[:3], batches(4)[3:]):  # uneven: three and one
        kept = []
        Objective(loss, half, lambda tensor, kept=kept: kept.append(tensor.clone()) or tensor).gradients(
            model, ["0.weight"]
        )
        sums.append(kept)
    whole, gradients = Objective(loss, batches(4)).gradients(model, ["0.weight"])
    totals = iter([one + other for one, other in zip(*sums, strict=True)])
    value, found = Objective(loss, batches(4)[:3], lambda _: next(totals)).gradients(model, ["0.weight"])
    assert value == pytest.approx(whole)
    torch.testing.assert_close(found["0.weight"], gradients["0.weight"])


def test_nothing_is_moved():
    model = model_of()
    model[3].eval()  # modes differ
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    Objective(loss, batches(2)).gradients(model, ["0.weight"])
    Objective(loss, batches(2)).value(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, True, True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_are_put_back_after_a_failure():
    model = model_of()

    def broken(model, batch):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Objective(broken, batches(1)).value(model)
    assert model.training


def test_random_draws_are_the_same_each_time():
    """Candidates are compared on the same noise."""
    noisy = Objective(lambda model, batch: loss(model, (batch[0] + torch.randn_like(batch[0]), batch[1])), batches(2))
    model = model_of()
    assert noisy.value(model) == noisy.value(model)
    other = Objective(noisy.loss, noisy.batches, seed=1)
    assert other.value(model) != noisy.value(model)


def test_gradients_of_half_precision_are_summed_in_single():
    model = nn.Linear(4, 2).to(torch.bfloat16)
    half = [(x.bfloat16(), y.bfloat16()) for x, y in batches(3)]
    _, gradients = Objective(loss, half).gradients(model, ["weight"])
    assert gradients["weight"].dtype == torch.float32


def test_where_no_gradient_flows_it_is_zero():
    model = model_of()
    constant = Objective(lambda m, batch: batch[1].mean(), batches(2))
    _, gradients = constant.gradients(model, ["0.weight", "0.weight"])
    assert not gradients["0.weight"].any()
    frozen = Objective(lambda m, batch: m[4](batch[0].new_ones(3, 6)).mean(), batches(1))
    assert not frozen.gradients(model, ["0.weight"])[1]["0.weight"].any()


def test_on_other_batches():
    model, objective = model_of(), Objective(loss, batches(4))
    values = [objective.on([batch]).value(model) for batch in objective.batches]
    assert objective.value(model) == pytest.approx(sum(values) / 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(value):
    broken = Objective(lambda model, batch: loss(model, batch) * value, batches(2))
    for measure in (broken.value, lambda model: broken.gradients(model, ["0.weight"])):
        with pytest.raises(MeasurementError, match="not finite on the batches that were observed"):
            measure(model_of())


def test_no_batch_and_no_such_parameter():
    with pytest.raises(MeasurementError, match="There is no batch to measure the loss on"):
        Objective(loss, []).value(model_of())
    with pytest.raises(ValueError, match=r"Cannot take the gradient of 9\.weight: the model has no such parameter"):
        Objective(loss, batches(1)).gradients(model_of(), ["9.weight"])


def test_what_fails_in_one_process_fails_in_all_of_them():
    """Otherwise the others would wait for its sums. Here the other process is a sum that already has its part."""
    well = Objective(loss, batches(2))
    assert well.value(model_of()) > 0
    elsewhere = Objective(loss, batches(2), reduce=lambda tensor: tensor + 1)
    for measure in (elsewhere.value, lambda model: elsewhere.gradients(model, ["0.weight"])):
        with pytest.raises(MeasurementError, match="Another process could not measure the loss"):
            measure(model_of())

    def fails(model, batch):
        raise MeasurementError("no labels")

    sums = []
    here = Objective(fails, batches(2), reduce=lambda tensor: sums.append(tensor.clone()) or tensor)
    with pytest.raises(MeasurementError, match="no labels"):
        here.value(model_of())
    assert sums == [1]  # the others were told
