"""The picture of an architecture over time: everything that was there is in it, and nothing touches pyplot."""

import sys

import numpy as np
import pytest

from lightning_grow.plot import Curve, Snapshot, plot_architecture
from lightning_grow.report import picture


def labels_of(figure):
    figure.canvas.draw()
    return [text.get_text() for panel in figure.axes for text in panel.texts]


def test_each_group_and_stack_is_labelled_with_its_last_size():
    snapshots = [
        Snapshot(0, {"net.a": 2, "net.b.0.c": 3}, {"net.b": 1}, 40),
        Snapshot(10, {"net.a": 4, "net.b.0.c": 3, "net.b.1.c": 5}, {"net.b": 2}, 90),
    ]
    figure = plot_architecture(snapshots, {"loss": Curve([1, 2, 20], [3.0, 2.0, 1.0])})
    assert [panel.get_ylabel() for panel in figure.axes] == ["units", "blocks", "loss"]
    assert set(labels_of(figure)) >= {"a  4", "b.0.c  3", "b.1.c  5", "b  2"}
    assert "40 → 90 parameters" in figure.axes[0].get_title(loc="left")
    assert all(panel.get_xlim() == (0, 20) for panel in figure.axes)


def test_bands_stack_up_to_the_number_of_units():
    figure = plot_architecture([Snapshot(0, {"a": 2, "b": 3}), Snapshot(5, {"a": 4, "b": 3})], last_step=8)
    tops = [band.get_paths()[0].vertices[:, 1].max() for band in figure.axes[0].collections]
    assert max(tops) == 7


def test_what_goes_away_stays_in_the_picture_of_its_time():
    figure = plot_architecture([Snapshot(0, {"a": 2, "b": 3}), Snapshot(5, {"a": 2})], last_step=10)
    assert len(figure.axes[0].collections) == 2
    assert labels_of(figure) == ["a  2"]


@pytest.mark.parametrize("number", [1, 7, 40])
def test_many_groups_are_counted_where_their_names_would_not_fit(number):
    figure = plot_architecture([Snapshot(0, {f"part{i}.fc": i + 1 for i in range(number)})], last_step=3)
    texts = labels_of(figure)
    assert len(texts) == number if number < 15 else texts == [f"{number} groups"]


def test_labels_do_not_overlap():
    units = {f"layers.{i}": 1 if i < 6 else 50 for i in range(9)}
    figure = plot_architecture([Snapshot(0, units)], last_step=3)
    assert labels_of(figure) == [f"{name}  {size}" for name, size in units.items()]
    panel = figure.axes[0]
    heights = [panel.transData.transform(text.xyann)[1] * 72 / figure.dpi for text in panel.texts]  # in points
    assert all(
        above - below > text.get_fontsize()
        for text, below, above in zip(panel.texts, heights, heights[1:], strict=False)
    )


@pytest.mark.parametrize("values", [[], [float("nan")] * 3, [0.0, 0.0, 0.0], [1.0, float("inf"), 2.0]])
def test_losses_that_are_empty_zero_or_infinite_are_drawn_as_far_as_they_go(values):
    figure = plot_architecture([Snapshot(0, {"a": 1})], {"loss": Curve(range(len(values)), values)}, last_step=4)
    figure.canvas.draw()


def test_a_smoothed_curve_keeps_the_mean_of_a_constant():
    figure = plot_architecture([Snapshot(0, {"a": 1})], {"loss": Curve(range(500), [2.0] * 500)})
    (smooth,) = [line for line in figure.axes[1].lines if line.get_label() == "loss"]
    np.testing.assert_allclose(smooth.get_ydata(), 2.0)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="expected at least one snapshot"):
        plot_architecture([])


def test_drawing_leaves_pyplot_alone():
    before = "matplotlib.pyplot" in sys.modules
    picture({"snapshots": [{"step": 0, "units": {"a": 2}}]})
    assert ("matplotlib.pyplot" in sys.modules) == before
