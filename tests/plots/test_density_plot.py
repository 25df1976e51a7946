"""A figure says what it shows: log density with its bandwidth, error band and units, on the Axes
that it was given."""

import matplotlib.pyplot as plt
import named_spectra as spectra
import numpy as np
import pytest
from matplotlib.figure import Figure

import hessdensity as hd
from hessdensity.plots.density import plot_cumulative, plot_density
from hessdensity.spectra.quadrature import Tridiagonal, gauss_rule


def make(nodes, dimension=100, weights=None, residuals=0.0):
    """A density of two probes, without any computation."""
    nodes = np.asarray(nodes, float)
    weights = np.full(nodes.size, 1 / nodes.size) if weights is None else np.asarray(weights)
    rules = tuple(
        hd.Rule(nodes + shift, weights, 0, np.full(nodes.size, residuals)) for shift in (0.0, 0.01)
    )
    return hd.SpectralDensity(rules, dimension, 2 * nodes.size)


EIGENVALUES = np.concatenate([np.linspace(-0.5, 1, 98), [6, 10]])
DENSITY = make([-0.5, 0, 0.5, 1, 6, 10], weights=[0.2, 0.5, 0.2, 0.08, 0.01, 0.01])
BAND = "95 %: probes, quadrature, deflation"
DRAW = pytest.mark.parametrize("draw", [plot_density, plot_cumulative])


@pytest.fixture(autouse=True)
def nothing_is_shown_or_saved(monkeypatch):
    """Whoever draws decides what becomes of the figure."""

    def refuse(*args, **options):
        raise AssertionError("the figure is the caller's to show or save")

    monkeypatch.setattr(plt, "show", refuse)
    monkeypatch.setattr(plt, "savefig", refuse)
    monkeypatch.setattr(Figure, "savefig", refuse)
    monkeypatch.setattr(Figure, "show", refuse)
    yield
    plt.close("all")


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def curve(ax, label):
    """(x, y) of the line whose label contains ``label``."""
    (line,) = [line for line in ax.get_lines() if label in str(line.get_label())]
    return line.get_data()


@DRAW
def test_the_axes_given_is_the_axes_returned_and_no_figure_is_made(draw):
    _, ax = plt.subplots()
    assert draw(DENSITY, ax) is ax
    assert len(plt.get_fignums()) == 1


@DRAW
def test_without_axes_every_call_makes_its_own_figure(draw):
    first, second = draw(DENSITY), draw(DENSITY)
    assert first.figure is not second.figure


def test_the_method_draws_the_density_and_passes_the_options_on():
    _, ax = plt.subplots()
    assert DENSITY.plot(ax, label="mine", bandwidth=0.25, color="tab:red") is ax
    assert labels(ax) == ["mine, bandwidth 0.25", BAND]
    assert ax.get_lines()[0].get_color() == "tab:red"


def test_the_curve_is_the_density_and_the_band_is_its_interval():
    ax = plot_density(DENSITY, bandwidth=0.25)
    x, y = curve(ax, "bandwidth")
    estimate = DENSITY.pdf(x, 0.25)
    np.testing.assert_array_equal(y, estimate.value)
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(estimate.lower.min())
    assert heights.max() == pytest.approx(estimate.upper.max())
    assert not plot_density(DENSITY, band=False).collections


def test_the_curve_reaches_every_node_and_its_peak():
    x, y = curve(plot_density(DENSITY), "bandwidth")
    for node in DENSITY.nodes.ravel():
        assert np.abs(x - node).min() < DENSITY.bandwidth / 10
    assert y.max() == pytest.approx(DENSITY.pdf(DENSITY.nodes).value.max(), rel=0.05)


def test_the_density_is_on_a_log_axis_whose_labels_carry_units():
    ax = plot_density(DENSITY)
    assert ax.get_yscale() == "log"
    assert ax.get_xscale() == "linear"
    assert ax.get_xlabel() == "eigenvalue"
    assert ax.get_ylabel() == "spectral density (1 / eigenvalue)"


@pytest.mark.parametrize(
    ("options", "legend"),
    [
        ({}, f"bandwidth {DENSITY.bandwidth:.2g}"),
        ({"bandwidth": 0.5}, "bandwidth 0.5"),
        ({"label": "ResNet"}, f"ResNet, bandwidth {DENSITY.bandwidth:.2g}"),
    ],
)
def test_the_legend_holds_the_bandwidth(options, legend):
    assert labels(plot_density(DENSITY, **options)) == [legend, BAND]
    assert labels(plot_density(DENSITY, band=False, **options)) == [legend]


def test_an_outlier_of_one_eigenvalue_is_in_view():
    ax = plot_density(DENSITY)
    low, high = ax.get_ylim()
    assert low < DENSITY.pdf(10.0).value < high
    left, right = ax.get_xlim()
    assert left < -0.5 < 10 < right


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("x_scale", ["linear", "symlog"])
def test_several_densities_on_one_axes_share_their_scale_and_are_all_in_view(order, x_scale):
    densities = {"a": make([-1, 0, 1], dimension=10), "b": make([20, 30, 40], dimension=10**6)}
    ax = plot_density(dict(list(densities.items())[::order]), x_scale=x_scale)
    lines = [line for line in ax.get_lines() if "bandwidth" in str(line.get_label())]
    assert {str(line.get_label()).split(",")[0] for line in lines} == {"a", "b"}
    assert len({str(line.get_label()).split("bandwidth")[1] for line in lines}) == 1
    assert len({line.get_color() for line in lines}) == 2
    for line in lines:
        x, y = line.get_data()
        assert x[0] < -1 < 40 < x[-1]
        assert ax.get_ylim()[1] >= y.max()
    assert ax.get_xlim()[0] < -1 < 40 < ax.get_xlim()[1]


def test_a_second_call_on_the_same_axes_keeps_the_bandwidth_of_the_first():
    one, other = make([-1, 0, 1]), make([20, 30, 40], dimension=10**6)
    ax = plot_density(one, label="a")
    plot_density(other, ax, label="b")
    width = f"bandwidth {one.bandwidth:.2g}"
    assert [label for label in labels(ax) if "bandwidth" in label] == [f"a, {width}", f"b, {width}"]
    assert ax.get_xlim()[0] < -1 < 40 < ax.get_xlim()[1]
    # A bandwidth that is given counts.
    plot_density(other, ax, label="c", bandwidth=3.0)
    assert "c, bandwidth 3" in labels(ax)


def estimated(num_steps):
    """A density of the eigenvalues of a ring from few steps."""
    diagonal, off_diagonal = spectra.lanczos(
        spectra.ORDINARY["linear"], np.full(200, 1 / 200), num_steps
    )
    rule = gauss_rule(Tridiagonal(diagonal, off_diagonal))
    return hd.SpectralDensity((rule,), 200, num_steps)


def test_structure_that_the_rules_do_not_resolve_is_dotted():
    density = estimated(12)
    x, y = curve(plot_density(density), "bandwidth")
    assert np.isfinite(y[np.abs(x) < 0.8]).all()
    ax = plot_density(density, bandwidth=density.bandwidth / 20)
    x, y = curve(ax, "not resolved")
    assert np.isfinite(y[np.abs(x) < 0.8]).mean() > 0.8


def test_on_symlog_the_density_is_the_share_per_decade():
    density = estimated(20)
    ax = plot_density(density, x_scale="symlog")
    assert ax.get_ylabel() == "spectral density (per decade)"
    assert "decades" in labels(ax)[0]
    (x, solid), (_, dotted) = curve(ax, "bandwidth"), curve(ax, "not resolved")
    y = np.where(np.isfinite(solid), solid, dotted)
    # Positions on the axis, in decades.
    transform = ax.xaxis.get_transform()
    positions = transform.transform(x) / ax.xaxis.get_transform().linthresh
    assert np.trapezoid(np.nan_to_num(y), positions) == pytest.approx(1, abs=0.03)


def test_the_cumulative_shades_every_error_beneath_that_of_the_probes():
    ax = plot_cumulative(estimated(12))
    wide, narrow = ax.collections
    assert labels(ax)[1:] == ["95 %: every error", "95 %: probes alone"]
    heights = [np.ptp(band.get_paths()[0].vertices[:, 1]) for band in (wide, narrow)]
    assert heights[0] >= heights[1]
    assert wide.get_alpha() < narrow.get_alpha()


def test_a_density_may_be_drawn_over_a_histogram():
    _, ax = plt.subplots()
    ax.hist(EIGENVALUES, bins=50, density=True)
    plot_density(DENSITY, ax)
    low, high = ax.get_ylim()
    assert 0 < low < DENSITY.pdf(10.0).value < high


def test_exact_eigenvalues_are_drawn_smoothed_alike_and_one_tick_each():
    ax = plot_density(DENSITY, bandwidth=0.25, eigenvalues=EIGENVALUES)
    x, y = curve(ax, "exact, same bandwidth")
    kernel = np.exp(-(((x[:, None] - EIGENVALUES) / 0.25) ** 2) / 2) / (0.25 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(y, kernel.mean(1), rtol=1e-12, atol=1e-300)
    np.testing.assert_array_equal(curve(ax, "eigenvalues")[0], EIGENVALUES)
    assert labels(ax) == ["exact, same bandwidth", "eigenvalues", "bandwidth 0.25", BAND]


def test_the_cumulative_is_the_share_of_eigenvalues_from_0_to_1():
    ax = plot_cumulative(DENSITY, eigenvalues=EIGENVALUES, label="two probes")
    x, y = curve(ax, "two probes")
    np.testing.assert_array_equal(y, DENSITY.cdf(x).value)
    assert (y[0], y[-1]) == pytest.approx((0, 1))
    exact_x, exact_y = curve(ax, "exact")
    np.testing.assert_array_equal(exact_x, np.sort(EIGENVALUES))
    np.testing.assert_allclose(exact_y, np.arange(1, 101) / 100)
    assert ax.get_ylabel() == "share of eigenvalues up to x"
    assert ax.get_xlabel() == "eigenvalue"


@DRAW
def test_symlog_shows_outliers_of_both_signs_beside_the_bulk(draw):
    density = make([-1e4, -1, 0, 1, 1e4])
    ax = draw(density, x_scale="symlog")
    assert ax.get_xscale() == "symlog"
    ax.figure.canvas.draw()
    left, right = ax.get_xlim()
    assert left < -1e4 < 1e4 < right
    ticks = [tick for tick in ax.get_xticks() if left < tick < right]
    assert min(ticks) < 0 < max(ticks)
    assert 0 in ticks


@DRAW
def test_an_unknown_scale_is_refused_and_nothing_is_drawn(draw):
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match="x_scale='log', expected 'linear' or 'symlog'"):
        draw(DENSITY, ax, x_scale="log")
    assert not ax.has_data()


@DRAW
@pytest.mark.parametrize("x_scale", ["linear", "symlog"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("nodes", [[0.0], [1.0], [-2.0, -1.0], [-1.0, 0.0, 3.0]], ids=str)
def test_any_spectrum_on_any_scale_can_be_drawn(draw, x_scale, scale, nodes):
    density = make(scale * np.asarray(nodes))
    ax = draw(density, x_scale=x_scale, eigenvalues=scale * np.asarray(nodes))
    ax.figure.canvas.draw()
    left, right = ax.get_xlim()
    assert left < scale * min(nodes) <= scale * max(nodes) < right
