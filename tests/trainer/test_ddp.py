"""Two ranks over gloo: the wrapper comes off and on again, and ranks agree or nothing happens."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn

from lightning_grow.trainer.editing import editing, refuse_module, refuse_strategy
from tests.trainer.models import Perceptron, build, loader, trainer
from tests.trainer.processes import run_ranks
from tests.trainer.test_structural_callback import Taylor


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.trainer.ddp_checks_worker", 2, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_ranks_that_disagree_are_told_and_nothing_has_changed(ranks):
    for result in ranks:
        message, size = result["quarrel"]
        assert "The ranks propose different changes at step 2" in message
        assert "Nothing was changed" in message
        assert size == 6


def test_statistics_are_summed_over_ranks(ranks, tmp_path):
    """Eight batches on each of two ranks."""
    seen, state = ranks[0]["statistics"]
    for name, total in ranks[1]["statistics"][0].items():
        assert torch.equal(total, seen[name])
    assert seen["count/fc1.weight"] == 16
    assert all(
        torch.equal(value, ranks[1]["statistics"][1][name]) for name, value in state.items() if "norm" not in name
    )


def test_ranks_end_bit_identical_with_accumulation_averaging_depth_and_verify(ranks):
    first, second = (result["everything"] for result in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ranks[0]["wrapped"] == [True] * 18
    assert ranks[0]["tested"] == 7


def test_ranks_keep_to_a_plan_alike(ranks):
    first, second = (result["planned"] for result in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [result["largest"] for result in ranks] == [(7, 3)] * 2


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_sharded_strategies_are_refused_with_a_way_out(strategy):
    with pytest.raises(MisconfigurationException, match=rf"{strategy.__name__} .* Use strategy='ddp'"):
        refuse_strategy(strategy())


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_spawned_and_forked_processes_are_refused(tmp_path, strategy):
    run = trainer(tmp_path, devices=2, strategy=strategy)
    with pytest.raises(MisconfigurationException, match="main process whose model has not grown"):
        refuse_strategy(run.strategy)


def test_a_single_device_is_fine():
    refuse_strategy(SingleDeviceStrategy())


def test_a_sharded_optimizer_is_refused():
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    module = build(Perceptron)
    with pytest.raises(MisconfigurationException, match="keeps each state on one rank"):
        refuse_module(module, [ZeroRedundancyOptimizer(module.parameters(), lr=0.1)])


def test_an_unknown_wrapper_is_refused(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(build(Perceptron), loader())
    run.strategy.model = nn.Sequential(run.lightning_module)
    with pytest.raises(MisconfigurationException, match="found Sequential"), editing(run):
        pass


def test_the_module_is_wrapped_again_even_if_editing_fails(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module := build(Perceptron), loader())

    def fails():
        with editing(run) as inner:
            assert inner is module
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fails()
    assert run.strategy.model is module


def test_statistics_of_one_process_count_every_batch(tmp_path):
    callback = Taylor(at_steps=[2], num_units=2)
    trainer(tmp_path, callback, max_epochs=2).fit(build(Perceptron), loader())
    assert callback.seen["count/fc1.weight"] == 8
