"""What every optimizer keeps of the grammar of ``torch.optim``, over one table."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_grow.optim import AdamHD, agreement, borat, fused, hypergradient, polyak, tensors
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_, prune, split, widen
from tests.optim.table import ROWS, batch, network, tell, train


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(row, steps=4, dtype=torch.float64, layout=torch.contiguous_format, **options):
    model = network(dtype).to(memory_format=layout)
    optimizer = row.make(model.parameters(), **options)
    train(model, optimizer, steps)
    return model, optimizer


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_with_nothing_that_adapts_it_is_the_base(row, dtype, rtol):
    if row.base is None:
        pytest.fail("every row has a base, or says in its own tests what it is")
    model, _ = trained(row, 20, dtype, **row.as_base)
    other = network(dtype)
    cls, options = row.base
    train(other, cls(other.parameters(), **options), 20)
    torch.testing.assert_close(weights(model), weights(other), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", ["small tensors", "large tensors"])
def test_the_fast_form_is_the_plain_loop(row, layout, size, monkeypatch):
    """Small tensors are worked on together, large ones in pieces."""
    if size == "large tensors":
        for module in (agreement, borat, hypergradient, polyak, tensors):
            monkeypatch.setattr(module, "SMALL", 10)
            monkeypatch.setattr(module, "CHUNK", 50, raising=False)
    fast, _ = trained(row, 6, layout=layout)
    also, _ = trained(row, 6, layout=layout, foreach=True)
    plain, _ = trained(row, 6, layout=layout, foreach=False)
    torch.testing.assert_close(weights(fast), weights(plain), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weights(also), weights(plain), rtol=1e-11, atol=1e-13)
    assert not torch.equal(weights(plain), weights(network()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_kernels_are_the_plain_loop_on_any_number_of_cores(row, layout, monkeypatch):
    for module in (agreement, borat, fused, hypergradient, polyak, tensors):
        monkeypatch.setattr(module, "SMALL", 10)
    monkeypatch.setattr(fused, "SLICE", 50)
    used = []
    monkeypatch.setattr(fused, "_run", lambda tasks, run=fused._run: (used.extend(tasks), run(tasks)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone, _ = trained(row, 6, layout=layout, fused=True)
    assert used
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    shared, _ = trained(row, 6, layout=layout, fused=True)
    assert torch.equal(weights(alone), weights(shared))
    plain, _ = trained(row, 6, layout=layout, foreach=False)
    torch.testing.assert_close(weights(alone), weights(plain), rtol=1e-11, atol=1e-13)


def test_kernels_are_refused_where_they_do_not_work(row, monkeypatch):
    with pytest.raises(ValueError, match="only one of `foreach` and `fused`"):
        row.make(network().parameters(), foreach=True, fused=True)
    optimizer = row.make(network().parameters(), fused=True)
    with pytest.raises(ValueError, match="float32 or float64 on the CPU"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]})
    assert len(optimizer.param_groups) == 1

    def missing():
        raise ModuleNotFoundError

    monkeypatch.setattr(fused, "_kernels", missing)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-grow\[fused\]"):
        row.make(network().parameters(), fused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_moves_and_stays_finite(row, dtype):
    if dtype == torch.float16:  # too narrow for a convolution's backward pass on every CPU: gradients by hand
        p = nn.Parameter(torch.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4))
        optimizer = row.make([p])
        for _ in range(3):
            p.grad = p.detach() / 2
            tell(optimizer, p.detach().float().square().mean())
            optimizer.step(lambda: p.detach().float().square().mean())
        moved = p.detach()
        before = torch.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4)
    else:
        model, optimizer = trained(row, 3, dtype)
        moved, before = weights(model), weights(network(dtype))
    assert moved.dtype == dtype
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, before)


def test_a_tensor_as_rate_is_a_number_as_rate(row):
    with_number, _ = trained(row)
    with_tensor, _ = trained(row, lr=torch.tensor(row.options["lr"], dtype=torch.float64))
    torch.testing.assert_close(weights(with_tensor), weights(with_number), rtol=1e-12, atol=1e-14)


def test_the_closure_runs_once_with_gradients_and_its_loss_comes_back(row):
    model = network()
    optimizer = row.make(model.parameters())
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch()[0]), batch()[1])
        loss.backward()
        tell(optimizer, loss)
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() > 0


def test_param_groups_have_options_of_their_own(row):
    model = network()
    parameters = list(model.parameters())
    optimizer = row.make([{"params": parameters[:4], "lr": row.options["lr"] * 2}, {"params": parameters[4:]}])
    assert [float(group["lr"]) for group in optimizer.param_groups] == [row.options["lr"] * 2, row.options["lr"]]
    before = weights(model)
    train(model, optimizer, 3)
    assert not torch.equal(weights(model), before)
    with pytest.raises(ValueError, match="Expected `lr`"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1.0})
    assert len(optimizer.param_groups) == 2


def test_a_group_that_is_added_later_trains(row):
    model, extra = network(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = row.make(model.parameters())
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": [extra]})
    for _ in range(2):
        optimizer.zero_grad()
        x, y = batch()
        loss = nn.functional.cross_entropy(model(x), y) + extra.square().sum()
        loss.backward()
        tell(optimizer, loss)
        optimizer.step(lambda loss=loss: loss)
    assert (extra != 1).all()


@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_a_run_goes_on_bit_by_bit(row, way):
    model, optimizer = trained(row, 5)
    whole = copy.deepcopy(model)
    if way == "deepcopy":
        other, again = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        other, again = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other = copy.deepcopy(model)
        again = row.make(other.parameters())
        state = copy.deepcopy(optimizer.state_dict())
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        again.load_state_dict(state)
    train(model, optimizer, 5, first=5)
    train(other, again, 5, first=5)
    assert torch.equal(weights(model), weights(other))
    assert not torch.equal(weights(model), weights(whole))
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in again.param_groups]


def test_parameters_without_a_gradient_stay_where_they_are(row):
    model, still = network(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = row.make([*model.parameters(), still])
    train(model, optimizer, 3)
    assert (still == 1).all()


def test_nothing_has_a_gradient(row):
    model = network()
    optimizer = row.make(model.parameters())
    before = weights(model)
    tell(optimizer, torch.tensor(1.0))
    optimizer.step(lambda: torch.tensor(1.0))
    assert torch.equal(weights(model), before)


def test_to_maximize_is_to_minimize_the_negative(row):
    if not row.maximizes:
        with pytest.raises(ValueError, match="does not support `maximize=True`"):
            row.make(network().parameters(), maximize=True)
        return
    up, down = network(), network()
    optimizers = row.make(up.parameters(), maximize=True), row.make(down.parameters())
    for number in range(4):
        for model, optimizer, sign in zip((up, down), optimizers, (-1, 1), strict=True):
            x, y = batch(seed=number)
            optimizer.zero_grad()
            (sign * nn.functional.cross_entropy(model(x), y)).backward()
            optimizer.step()
    torch.testing.assert_close(weights(up), weights(down), rtol=1e-12, atol=1e-14)


def test_its_rates_have_names(row):
    _, optimizer = trained(row, 3)
    rates = optimizer.rates()
    assert rates
    assert all(torch.isfinite(torch.as_tensor(rate)).all() for rate in rates.values())


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_what_is_not_supported_is_refused(row, option):
    with pytest.raises(ValueError, match=f"does not support `{option}=True`"):
        row.make(network().parameters(), **{option: True})


def test_complex_and_sparse_are_refused(row):
    with pytest.raises(ValueError, match="complex"):
        row.make([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = row.make(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step(lambda: torch.tensor(1.0))


@pytest.mark.parametrize("option", ["lr", "weight_decay", "eps", "momentum"])
def test_options_below_zero_are_refused(row, option):
    if option not in inspect.signature(row.cls).parameters:
        option = "lr"
    with pytest.raises(ValueError, match=f"Expected `{option}`"):
        row.make(network().parameters(), **{option: -0.1})


def test_gradients_are_left_as_they_are(row):
    model, optimizer = trained(row, 2)
    x, y = batch(seed=2)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    tell(optimizer, loss)
    optimizer.step(lambda: loss)
    for p, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("edit", ["widen", "split", "prune"])
def test_it_follows_a_network_that_changes_its_size(row, edit):
    model, optimizer = trained(row, 3)
    group = trace(model, batch()[0])["4"]
    edits = {"widen": lambda: widen(group, 3), "split": lambda: split(group, [1]), "prune": lambda: prune(group, [0])}
    before = model(batch()[0]).detach()
    rates = [float(g["lr"]) for g in optimizer.param_groups]
    apply_(model, [edits[edit]()], optimizers=[optimizer])
    if edit != "prune":
        torch.testing.assert_close(model(batch()[0]), before)
    assert [float(g["lr"]) for g in optimizer.param_groups] == rates
    for p in model.parameters():
        for value in optimizer.state[p].values():
            assert not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] in (1, p.shape[0])
    at = model[4].weight.detach().clone()
    losses = train(model, optimizer, 3, first=3)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert (model[4].weight != at).any(dim=1).all()


def test_moments_of_new_units_are_those_of_a_running_adam():
    """Zero first moments; second moments are the mean of the others, so that their first step is no larger."""
    model, optimizer = trained(ROWS["adamhd"], 3)
    apply_(model, [widen(trace(model, batch()[0])["4"], 2)], optimizers=[optimizer])
    state = optimizer.state[model[4].weight]
    assert isinstance(optimizer, AdamHD)
    assert (state["exp_avg"][6:] == 0).all()
    torch.testing.assert_close(state["exp_avg_sq"][6:], state["exp_avg_sq"][:6].mean(dim=0).expand(2, -1))
