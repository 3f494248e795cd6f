"""The compiled loops by themselves; what optimizers do with them is in `test_table.py`."""

import multiprocessing

import pytest
import torch

from lightning_grow.optim import fused
from lightning_grow.optim.fused import Shift, products, shift_


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(fused, "SLICE", 1000)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_products_are_those_of_torch(dtype, rtol):
    """Large and small tensors, one that is not contiguous, and one of a type that has no kernel."""
    generator = torch.Generator().manual_seed(0)

    def drawn():
        shapes = ((70, 80), (5000,), (3,), (80, 70))
        found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        return [*found[:3], found[3].T, found[1].sign().bfloat16()]  # exact in float32

    xs, ys = drawn(), drawn()
    expected = [sum((x.double() * z.double()).sum() for x, z in zip(xs, zs, strict=True)) for zs in (ys, xs)]
    torch.testing.assert_close(products(xs, [ys, xs]), torch.stack(expected), rtol=rtol, atol=rtol)


def test_what_is_not_finite_stays_so():
    x = torch.ones(5000)
    x[4321] = torch.nan
    assert products([x], [[x]]).isnan().all()
    x[4321] = torch.inf
    assert products([x], [[x]]).isinf().all()


def test_what_the_kernels_do_not_take_is_left_alone():
    p, q = torch.ones(5000), torch.ones(100, 100).T
    left = shift_([Shift(p, [torch.ones(5000)], [2.0]), Shift(q, [torch.ones(100, 100)], [2.0])])
    assert left == [1]
    assert (p == 3).all()
    assert (q == 1).all()


def test_autograd_sees_that_something_was_written():
    w = torch.ones(5000, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        shift_([Shift(w, [torch.ones(5000)], [1.0])])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _in_a_child(queue):
    queue.put(products([torch.ones(5000)], [[torch.ones(5000)]]).item())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_they_work_in_a_process_that_was_forked_after_they_were_used():
    """Threads do not live on in a child, which must not wait for them."""
    assert products([torch.ones(5000)], [[torch.ones(5000)]]).item() == 5000
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(queue,), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == 5000


def test_channels_last_is_taken_and_what_is_transposed_is_not():
    x = torch.randn(20, 10, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert fused.fits(x, x.clone())
    assert not fused.fits(x, x.contiguous())
    assert not fused.fits(torch.randn(100, 100).T)
    (row,), _ = fused.agree([(x, [x], None)], [20], [fused.Rule(fused.GRADIENT)], (0.0, 0.0, 0.0))
    torch.testing.assert_close(row, x.square().flatten(1).sum(1))
