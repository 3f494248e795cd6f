import pytest
import torch
from torch import nn

from lightning_grow.costs import count_flops, count_parameters, in_eval_mode, measure_latency_ms, unit_parameters
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_, prune, widen
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ["mlp", "cnn_batch_norm", "flatten_head", "concat_raw", "tied_autoencoder"])
def test_the_count_is_what_an_edited_model_has(name):
    entry = ZOO[name]
    model = entry.build()
    args, kwargs = entry.inputs()
    structure = trace(model, *args, **kwargs)
    assert count_parameters(model, structure) == sum(p.numel() for p in model.parameters())
    for group in structure.groups.values():
        for edit in (
            widen(group, 2 * group.step),
            prune(group, range(group.step)) if group.size > group.step else None,
        ):
            if edit is None:
                continue
            changed = entry.build()
            expected = count_parameters(model, structure, {group.name: len(edit.index)})
            apply_(changed, [edit])
            assert sum(p.numel() for p in changed.parameters()) == expected
        one_more = count_parameters(model, structure, {group.name: group.size + 1})
        assert unit_parameters(model, structure, group.name) == one_more - count_parameters(model, structure)


def test_one_more_unit_costs_its_fan_in_bias_and_fan_out():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert unit_parameters(model, trace(model, torch.zeros(1, 4)), "0") == 4 + 1 + 3


def test_flops_of_a_convolution():
    model = nn.Conv2d(2, 3, 3, padding=1)
    assert count_flops(lambda: model(torch.zeros(1, 2, 5, 5))) == 2 * 25 * 3 * 2 * 9


def test_latency_is_the_median_of_real_calls():
    calls = []
    assert (
        measure_latency_ms(lambda: calls.append(torch.is_grad_enabled()), torch.device("cpu"), repeats=3, warmup=1) >= 0
    )
    assert calls == [False] * 4
    with pytest.raises(ValueError, match="`repeats` of at least 1, found 0"):
        measure_latency_ms(lambda: None, torch.device("cpu"), repeats=0)


def test_eval_mode_is_undone_module_by_module():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    seen = []
    in_eval_mode(model, lambda: seen.append([m.training for m in model.modules()]))()
    assert seen == [[False, False, False]]
    assert [m.training for m in model.modules()] == [True, True, False]
    with pytest.raises(RuntimeError, match="boom"):
        in_eval_mode(model, _fail)()
    assert [m.training for m in model.modules()] == [True, True, False]


def _fail():
    raise RuntimeError("boom")
