"""ALI-G+'s own properties: estimates of optimal values, and the examples that they belong to."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_grow.data import Digits, Indexed
from lightning_grow.optim.alig import ALIG
from lightning_grow.optim.alig_plus import ALIGPlus, updated_estimates
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_, prune, split, widen


def toy(noise=0.3, samples=64, seed=0, dim=8, classes=4):
    """Return inputs and labels, some of them random: a convex task whose loss cannot reach zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(dim, classes, generator=generator, dtype=torch.float64)).argmax(dim=1)
    random = torch.randint(classes, (samples,), generator=generator)
    return x, torch.where(torch.rand(samples, generator=generator) < noise, random, y)


def linear(dim=8, classes=4):
    model = nn.Linear(dim, classes).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def run(model, optimizer, x, y, epochs, batch_size=16, seed=0, order=None):
    """Train; return the optimal values after each epoch."""
    seen = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        at = torch.randperm(len(x), generator=generator)
        for indices in at.split(batch_size):
            step(model, optimizer, x, y, indices, order)
        if isinstance(optimizer, ALIGPlus):
            optimizer.end_epoch()
            seen.append(optimizer.optimal_values.clone())
    return seen


def step(model, optimizer, x, y, indices, order=None):
    optimizer.zero_grad()
    losses = nn.functional.cross_entropy(model(x[indices]), y[indices], reduction="none")
    loss = losses.mean()
    loss.backward()
    if isinstance(optimizer, ALIGPlus):
        optimizer.feed(indices if order is None else order[indices], losses)
    optimizer.step(lambda: loss)


@pytest.mark.parametrize(("num_updates", "epochs"), [(0, 6), (2, 3)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_an_update_it_is_alig(num_updates, epochs, momentum):
    """AP-1 and AP-2."""
    x, y = toy()
    models = linear(), linear()
    run(models[0], ALIG(models[0].parameters(), 0.5, momentum, eps=1e-9), x, y, epochs)
    plus = ALIGPlus(models[1].parameters(), 0.5, 64, 6 if num_updates else None, num_updates, momentum)
    run(models[1], plus, x, y, epochs)
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-10, atol=1e-12)
    assert bool(plus.optimal_values.any()) == bool(num_updates)


def test_there_is_no_ascent():
    """AP-3."""
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = ALIGPlus([w], 1.0, 1, 1, 1, momentum=0.0)
    optimizer.state["examples"]["optimal"].fill_(5.0)
    optimizer.feed(torch.tensor([0]), w.square())
    w.square().sum().backward()
    optimizer.step()
    assert w.item() == 2
    assert optimizer.param_groups[0]["step_size"] == 0


def test_estimates_stay_between_zero_and_the_losses():
    """AP-4, AP-5 and AP-6 in a run."""
    x, y = toy()
    model = linear()
    optimizer = ALIGPlus(model.parameters(), 1.0, 64, 12, 12, momentum=0.0)
    highest = torch.zeros(64, dtype=torch.float64)
    for epoch in range(12):
        before = {k: v.clone() for k, v in optimizer.state["examples"].items() if isinstance(v, torch.Tensor)}
        run(model, optimizer, x, y, 1, seed=epoch)
        after = optimizer.state["examples"]
        highest = highest.maximum(after["best"])
        assert (after["optimal"] >= 0).all()
        assert (after["optimal"] <= highest).all()
        raised = after["best"] > before["optimal"]
        torch.testing.assert_close((after["optimal"] - before["optimal"])[raised], after["increase"][raised])
        assert (after["optimal"][raised] <= after["best"][raised]).all()
        lowered = (before["optimal"] - after["optimal"])[~raised]
        assert (lowered >= 0).all()
        assert (lowered <= before["increase"][~raised] / 2 + 1e-15).all()
    assert not raised.all()


def test_the_published_example_of_estimates():
    optimal = increase = torch.zeros(1, dtype=torch.float64)
    found = []
    for best in (1.3, 1.05, 0.967, 0.925, 0.9):
        optimal, increase = updated_estimates(optimal, increase, torch.tensor([best], dtype=torch.float64))
        found.append(optimal.item())
    assert found == pytest.approx([0.65, 0.85, 0.908, 0.917, 0.9125], abs=1e-3)


def epoch_of(optimizer, value, indices=(0, 1)):
    """Feed an epoch of which every loss is the same."""
    w = optimizer.param_groups[0]["params"][0]
    w.grad = torch.ones_like(w)
    at = torch.tensor(indices)
    optimizer.feed(at, torch.full((len(at),), value))
    optimizer.step()
    optimizer.end_epoch()


@pytest.mark.parametrize(("track", "expected"), [("best", 0.5), ("last", 1.5)])
def test_a_worse_epoch_leaves_the_best_as_it_is(track, expected):
    """AP-7: what is kept is a copy. The losses of 1 and 3 are those by which the authors' code was found out."""
    optimizer = ALIGPlus([nn.Parameter(torch.ones(1))], 0.1, 2, 2, 1, track=track)
    epoch_of(optimizer, 1.0)
    memory = optimizer.state["examples"]
    assert memory["best"].data_ptr() != memory["current"].data_ptr()
    epoch_of(optimizer, 3.0)
    assert memory["current"].tolist() == [3, 3]
    assert optimizer.optimal_values.tolist() == [expected, expected]


def test_updates_come_at_the_end_of_each_period():
    optimizer = ALIGPlus([nn.Parameter(torch.ones(1))], 0.1, 2, 10, 3)
    changed = []
    for epoch in range(10):
        before = optimizer.optimal_values.clone()
        epoch_of(optimizer, 1.0)
        if not torch.equal(optimizer.optimal_values, before):
            changed.append(epoch)
    assert changed == [2, 5, 8]
    assert optimizer.epoch == 10


def test_the_gap_that_is_left_is_far_smaller_than_that_of_alig():
    """AP-8: a linear softmax on labels of which some are random."""
    x, y = toy(samples=512, dim=20, classes=5)
    gaps = {}
    best = linear(20, 5)
    lbfgs = torch.optim.LBFGS(best.parameters(), max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = nn.functional.cross_entropy(best(x), y)
        loss.backward()
        return loss

    lbfgs.step(closure)
    lowest = closure().item()
    for name in ("alig", "plus"):
        model = linear(20, 5)
        params = model.parameters()
        optimizer = ALIG(params, 1.0) if name == "alig" else ALIGPlus(params, 1.0, 512, 100, 5, momentum=0.0)
        run(model, optimizer, x, y, 100, batch_size=32)
        gaps[name] = nn.functional.cross_entropy(model(x), y).item() - lowest
    assert 0 < gaps["plus"] < gaps["alig"] / 5


def test_numbering_examples_otherwise_numbers_estimates_otherwise():
    """AP-9."""
    x, y = toy()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(9))
    models = linear(), linear()
    plain, other = (ALIGPlus(model.parameters(), 1.0, 64, 6, 3) for model in models)
    run(models[0], plain, x, y, 6)
    run(models[1], other, x, y, 6, order=order)
    assert torch.equal(models[0].weight, models[1].weight)
    assert torch.equal(plain.optimal_values, other.optimal_values[order])
    assert plain.optimal_values.any()


def test_examples_that_were_not_seen_are_left_out():
    optimizer = ALIGPlus([nn.Parameter(torch.ones(1))], 0.1, 4, 3, 3)
    epoch_of(optimizer, 1.0, (0, 1))
    assert optimizer.optimal_values.tolist() == [0.5, 0.5, 0, 0]
    epoch_of(optimizer, 3.0, (1, 2))  # worse for 1, new for 2
    memory = optimizer.state["examples"]
    assert memory["best"].tolist() == [1, 1, 3, math.inf]
    assert optimizer.optimal_values.tolist() == [0.75, 0.75, 1.5, 0]


def test_without_a_number_of_examples_there_is_room_for_all():
    optimizer = ALIGPlus([nn.Parameter(torch.ones(1))], 0.1, max_epochs=2, num_updates=2)
    assert optimizer.optimal_values.shape == (0,)
    epoch_of(optimizer, 1.0, (3, 0))
    assert optimizer.optimal_values.tolist() == [0.5, 0, 0, 0.5]
    epoch_of(optimizer, 1.0, (5, 1))
    assert len(optimizer.optimal_values) == 6


def test_under_accumulation_all_examples_since_the_last_step_count():
    x, y = toy()
    models = linear(), linear()
    optimizers = [ALIGPlus(model.parameters(), 0.5, 64, 4, 2) for model in models]
    for first in range(0, 64, 16):
        at = torch.arange(first, first + 16)
        step(models[0], optimizers[0], x, y, at)
        optimizers[1].zero_grad()
        for part in at.split(8):
            losses = nn.functional.cross_entropy(models[1](x[part]), y[part], reduction="none")
            (losses.mean() / 2).backward()
            optimizers[1].feed(part, losses)
        optimizers[1].step()
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-12, atol=1e-14)
    assert torch.equal(*(o.state["examples"]["current"].isfinite() for o in optimizers))


def test_examples_go_with_their_gradients():
    """Fed before `zero_grad`, as in a closure of Lightning, they count; after a backward pass without a step, not."""
    w = nn.Parameter(torch.ones(1))
    optimizer = ALIGPlus([w], 0.1, 4, 2)
    for number in (0, 1):
        losses = w.square()
        optimizer.feed(torch.tensor([number]), losses)
        optimizer.zero_grad()
        losses.mean().backward()  # and for number 0, an overflow: no step
    optimizer.step()
    assert optimizer.state["examples"]["current"].isfinite().tolist() == [False, True, False, False]


@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_a_run_goes_on_bit_by_bit(way):
    x, y = toy()
    model = linear()
    optimizer = ALIGPlus(model.parameters(), 1.0, 64, 8, 4)
    run(model, optimizer, x, y, 3)
    step(model, optimizer, x, y, torch.arange(8))
    if way == "deepcopy":
        other, again = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        other, again = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other = copy.deepcopy(model)
        again = ALIGPlus(other.parameters(), 1.0, 64, 8, 4)
        state = copy.deepcopy(optimizer.state_dict())
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        again.load_state_dict(state)
    first = run(model, optimizer, x, y, 5, seed=1)
    second = run(other, again, x, y, 5, seed=1)
    assert torch.equal(model.weight, other.weight)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert again.epoch == optimizer.epoch == 8


@pytest.mark.parametrize("change", ["widen", "split", "prune"])
def test_after_a_change_estimates_stay_and_best_losses_are_those_of_the_next_epoch(change):
    x, y = toy()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    optimizer = ALIGPlus(model.parameters(), 0.1, 64, 40, 20)
    run(model, optimizer, x, y, 6)
    before = optimizer.optimal_values.clone()
    group = trace(model, x)["0"]
    edit = {"widen": widen(group, 2), "split": split(group, [0]), "prune": prune(group, [0, 1, 2, 3])}[change]
    apply_(model, [edit], [optimizer])
    assert torch.equal(optimizer.optimal_values, before)
    assert before.any()
    buffer = optimizer.state[model[0].weight]["momentum_buffer"]
    assert buffer.shape == model[0].weight.shape
    assert change != "widen" or (buffer[6:] == 0).all()
    optimizer.state["examples"]["best"].fill_(1e-3)  # of the network before: never reached again
    run(model, optimizer, x, y, 1, seed=3)
    memory = optimizer.state["examples"]
    assert torch.equal(memory["best"], memory["current"])
    memory["best"].fill_(1e-3)
    run(model, optimizer, x, y, 1, seed=4)
    assert (memory["best"] == 1e-3).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_cannot_be_taken_is_skipped_with_its_losses(bad):
    w = nn.Parameter(torch.ones(1))
    optimizer = ALIGPlus([w], 0.1, 2, 2, max_skips=1)
    w.grad = torch.ones(1)
    optimizer.feed(torch.tensor([0, 1]), torch.tensor([1.0, bad]))
    optimizer.step()
    assert (w.item(), optimizer.skipped) == (1, 1)
    assert not optimizer.state["examples"]["current"].isfinite().any()
    optimizer.feed(torch.tensor([0, 1]), torch.tensor([1.0, bad]))
    with pytest.raises(RuntimeError, match="ALIGPlus skipped 2 steps in a row"):
        optimizer.step()


def test_a_training_step_that_returns_nothing_is_skipped():
    optimizer = ALIGPlus([nn.Parameter(torch.ones(1))], 0.1, 2, 2)
    optimizer.step(lambda: None)
    assert optimizer.skipped == 1
    optimizer.step()
    assert optimizer.skipped == 1


def test_missing_indices_are_told():
    w = nn.Parameter(torch.ones(1))
    optimizer = ALIGPlus([w], 0.1, 2, 2)
    w.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"`feed` was not called since the last step.*Indexed\(dataset\)"):
        optimizer.step(lambda: torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(\).*reduction='none'"):
        optimizer.feed(torch.tensor([0, 1]), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"integers, found torch.float32"):
        optimizer.feed(torch.tensor([0.0]), torch.tensor([1.0]))
    with pytest.raises(IndexError, match="Index 2 is not one of 2 examples"):
        optimizer.feed(torch.tensor([0, 2]), torch.ones(2))
    with pytest.raises(IndexError, match="Index -1"):
        optimizer.feed(torch.tensor([0, -1]), torch.ones(2))
    with pytest.raises(ValueError, match="Pass `max_epochs`"):
        ALIGPlus([w], 0.1, 2).end_epoch()


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("num_examples", 0), ("max_epochs", 0), ("num_updates", -1), ("momentum", 1.0), ("track", "worst")],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"Expected `{option}`"):
        ALIGPlus([nn.Parameter(torch.ones(1))], **{option: value})


def test_the_fast_form_is_the_plain_loop():
    x, y = toy()
    models = linear(), linear()
    for model, foreach in zip(models, (None, False), strict=True):
        optimizer = ALIGPlus(model.parameters(), 1.0, 64, 6, 3, weight_decay=0.01, foreach=foreach)
        run(model, optimizer, x, y, 6)
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-11, atol=1e-13)


def test_a_dataset_tells_its_indices():
    x = torch.arange(5.0)
    indices, (values,) = next(iter(DataLoader(Indexed(TensorDataset(x)), batch_size=3)))
    assert torch.equal(values, x[indices])
    digits = Digits(batch_size=4)
    digits.setup("fit")
    images = Indexed(digits.splits["train"])
    loader = DataLoader(images, batch_size=4, collate_fn=lambda batch: batch)
    indices, (image, label) = list(loader)[1]
    assert indices.tolist() == [4, 5, 6, 7]
    assert image.shape[0] == label.shape[0] == 4
    assert torch.equal(images[5][1][0], image[1])
    assert len(images) == len(digits.splits["train"])

    class Lists(TensorDataset):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    indices, (values,) = next(iter(DataLoader(Indexed(Lists(x)), batch_size=2)))
    assert (indices.tolist(), values.tolist()) == ([0, 1], [0, 1])

    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    with pytest.raises(TypeError, match="Stream has no indices"):
        Indexed(Stream())
