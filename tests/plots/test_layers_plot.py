"""What the drawings of layers show, read off their artists."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

import hessdensity as hd
from hessdensity import plots


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def labels(legend):
    return [text.get_text() for text in legend.get_texts()]


def density(values):
    values = np.sort(np.asarray(values, float))
    n = values.size
    rule = hd.Rule(values, np.full(n, 1 / n), n, np.full(n, 1e-9))
    return hd.SpectralDensity((rule,), n, 0)


def test_an_overlap_curve_has_its_peak_its_chance_level_and_the_layers_outputs():
    curve = hd.OverlapCurve(np.arange(1, 4), np.array([0.1, 0.7, 0.3]), np.arange(1, 4) / 10)
    ax = plots.plot_overlap(curve, outputs=2)
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_array_equal(lines["overlap"].get_ydata(), curve.overlap)
    np.testing.assert_array_equal(lines["peak 0.70 at k = 2"].get_xdata(), [2])
    np.testing.assert_array_equal(lines["two random spaces, k/n"].get_ydata(), curve.chance)
    np.testing.assert_array_equal(lines["outputs of the layer, 2"].get_xdata(), [2, 2])


def test_singular_values_are_drawn_up_to_a_number_and_of_single_matrices_only():
    shares = np.random.default_rng(0).uniform(size=(5, 12))
    ax = plots.plot_singular_values(shares, num_values=4)
    (image,) = ax.get_images()
    np.testing.assert_array_equal(image.get_array(), shares[:, :4].T)
    with pytest.raises(ValueError, match=r"shape \(2, 5, 12\), expected \(k, r\)"):
        plots.plot_singular_values(np.stack([shares, shares]))


def test_a_correspondence_has_a_map_for_each_factor():
    maps = hd.Correspondence(np.eye(6, 3), np.eye(4, 3))
    first, second = plots.plot_correspondence(maps, num_rows=5)
    assert first.get_images()[0].get_array().shape == (5, 3)
    assert second.get_images()[0].get_array().shape == (4, 3)


def test_eigenvalues_are_drawn_by_rank_and_on_a_linear_axis_if_some_are_negative():
    ax = plots.plot_eigenvalues({"exact": np.array([3.0, 1.0]), "Kronecker": np.array([2.5, 1.2])})
    assert ax.get_yscale() == "log"
    assert labels(ax.get_legend()) == ["exact", "Kronecker"]
    assert plots.plot_eigenvalues({"all": np.array([1.0, -1.0])}).get_yscale() == "linear"


def test_small_multiples_share_their_axes_and_bandwidth_and_have_one_legend():
    densities = {"a": density([0, 1e-3, 5]), "b": density([-1, 0, 0.1, 2]), "c": density([0, 1])}
    figure = plots.plot_layer_densities(densities, columns=2)
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["a, n = 3", "b, n = 4", "c, n = 2"]
    assert len({ax.get_xlim() for ax in panels}) == len({ax.get_ylim() for ax in panels}) == 1
    assert all(ax.get_legend() is None for ax in panels)
    (legend,) = figure.legends
    assert labels(legend)[0].startswith("bandwidth 0.05")
    assert "eigenvalues found" in labels(legend)
    with pytest.raises(ValueError, match="densities is empty"):
        plots.plot_layer_densities({})
