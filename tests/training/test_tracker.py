"""The spectrum over training: every row against the dense Hessian, and what a row costs."""

import dataclasses
import functools
import inspect
import logging

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import mlp

import hessdensity as hd
from hessdensity.losses import risk
from hessdensity.plots import plot_concentration, plot_measure, plot_track
from hessdensity.vectors import trees

RANK = 4
SMALL = {"rank": RANK, "num_steps": 8, "num_probes": 1, "deflation_steps": 8, "progress": False}


def optimiser_step(loss, batch):
    optimiser = optax.sgd(0.3, momentum=0.9)

    @jax.jit
    def step(params, state):
        updates, state = optimiser.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return optimiser.init, step


@functools.lru_cache
def training(dtype):
    """Ten checkpoints (step, params) of the small network under momentum."""
    loss, params, batch = mlp(dtype)
    init, step = optimiser_step(loss, batch)
    checkpoints, state = [], init(params)
    for number in range(46):
        if number % 5 == 0:
            checkpoints.append((number, params))
        params, state = step(params, state)
    return checkpoints


def hessian_of(dtype, batch_size=30):
    loss, _, batch = mlp(dtype)
    data = hd.batches(batch, batch_size)
    return lambda params: hd.Hessian(loss, params, data)


@functools.lru_cache
def tracked(dtype):
    """The track of those checkpoints, and its key's."""
    # As tight as rounding allows: only then eigenvectors are comparable.
    tolerance = 1e-9 if dtype == np.float64 else 1e-5
    return hd.track(
        hessian_of(dtype), training(dtype), jax.random.key(0), tolerance=tolerance, **SMALL
    )


@functools.lru_cache
def dense(dtype):
    """(loss, gradient, descending eigenvalues, eigenvectors in rows) of checkpoints, by LAPACK."""
    loss, params, batch = mlp(dtype)
    _, unravel = ravel_pytree(params)

    def flat_loss(x):
        return loss(unravel(x), batch)

    compiled, rows = jax.jit(jax.value_and_grad(flat_loss)), []
    second = jax.jit(jax.hessian(flat_loss))
    for _, params in training(dtype):
        x, _ = ravel_pytree(params)
        value, gradient = compiled(x)
        values, vectors = np.linalg.eigh(np.asarray(second(x), float))
        rows.append((float(value), np.asarray(gradient, float), values[::-1], vectors.T[::-1]))
    return rows


# Against dense Hessians ---------------------------------------------------------------------------


def test_every_row_is_that_of_the_dense_hessian(dtype):
    track, rows = tracked(dtype), dense(dtype)
    rtol = 1e-6 if dtype == np.float64 else 2e-3
    np.testing.assert_array_equal(track.steps, np.arange(0, 50, 5))
    assert track.converged.all()
    for i, (loss, gradient, values, vectors) in enumerate(rows):
        near = {"rtol": rtol, "atol": rtol}
        np.testing.assert_allclose(track.losses[i], loss, **near)
        np.testing.assert_allclose(track.gradient_norms[i], np.linalg.norm(gradient), **near)
        np.testing.assert_allclose(track.values[i], values[:RANK], **near)
        shares = np.cumsum((vectors[:RANK] @ gradient) ** 2) / (gradient @ gradient)
        np.testing.assert_allclose(track.concentrations[i], shares, atol=10 * rtol)
        np.testing.assert_allclose(track.zetas()[i], values[0] / values[RANK - 1], **near)
        np.testing.assert_allclose(track.zetas(2)[i], values[0] / values[1], **near)
        if i:
            cosines = vectors[:RANK] @ rows[i - 1][3][:RANK].T
            np.testing.assert_allclose(track.overlaps[i], np.sum(cosines**2) / RANK, atol=10 * rtol)
    assert np.isnan(track.overlaps[0])
    last = trees.ravel(track.eigenspace.vectors).astype(float)
    np.testing.assert_allclose(np.abs(np.sum(last * rows[-1][3][:RANK], axis=1)), 1, atol=10 * rtol)


def test_the_densities_are_those_of_the_same_probes_at_every_checkpoint(dtype):
    track, (_, params) = tracked(dtype), training(dtype)[3]
    assert len(track.densities) == 10
    keys = {tuple(density.description["key"]) for density in track.densities}
    assert len(keys) == 1
    alone = hd.spectral_density(
        hessian_of(dtype)(params),
        jax.random.split(jax.random.key(0))[1],
        num_steps=8,
        num_probes=1,
        deflation_steps=8,
        progress=False,
    )
    np.testing.assert_allclose(track.densities[3].nodes, alone.nodes, rtol=1e-4, atol=1e-5)
    for density, (_, _, values, _) in zip(track.densities, dense(dtype), strict=True):
        assert hd.distance(density, values) < 0.05 * np.ptp(values)


def test_inside_of_a_training_loop_it_is_the_same_as_over_its_checkpoints():
    loss, params, batch = mlp(np.float32)
    init, step = optimiser_step(loss, batch)
    tracker, state = (
        hd.Tracker(hessian_of(np.float32), jax.random.key(0), tolerance=1e-5, **SMALL),
        init(params),
    )
    for number in range(11):
        if number % 5 == 0:
            measurement = tracker.measure(number, params)
            assert measurement is tracker.track.points[-1]
        params, state = step(params, state)
    expected = tracked(np.float32)
    assert len(tracker.track) == 3
    np.testing.assert_allclose(tracker.track.values, expected.values[:3], rtol=1e-5)
    np.testing.assert_allclose(tracker.track.concentrations, expected.concentrations[:3], rtol=1e-4)
    np.testing.assert_array_equal(tracker.track.num_matvecs, expected.num_matvecs[:3])


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_track_scales_with_the_loss(factor):
    def measure(factor):
        loss = jax.tree_util.Partial(scaled_loss, jnp.float32(factor))
        _, _, batch = mlp(np.float32)
        make = functools.partial(hd.Hessian, loss, data=[batch])
        return hd.track(
            lambda params: make(params), training(np.float32)[-2:], jax.random.key(0), **SMALL
        )

    plain, scaled = measure(1.0), measure(factor)
    np.testing.assert_allclose(scaled.values, factor * plain.values, rtol=1e-3)
    np.testing.assert_allclose(scaled.gradient_norms, factor * plain.gradient_norms, rtol=1e-4)
    np.testing.assert_allclose(scaled.zetas(), plain.zetas(), rtol=2e-3)
    np.testing.assert_allclose(scaled.overlaps, plain.overlaps, atol=1e-3)
    np.testing.assert_allclose(scaled.concentrations, plain.concentrations, atol=1e-3)
    np.testing.assert_array_equal(scaled.num_matvecs, plain.num_matvecs)


def scaled_loss(factor, params, batch):
    return factor * mlp(np.float32)[0](params, batch)


# What it costs ------------------------------------------------------------------------------------


def test_a_warm_start_costs_fewer_products_than_a_cold_one():
    rng = np.random.default_rng(0)
    matrix = np.diag(np.concatenate([np.geomspace(1, 10, 6), 0.1 * rng.standard_normal(294)]))
    drift = 0.005 * rng.standard_normal((300, 300))
    checkpoints = [
        (t, jnp.asarray(matrix + t * (drift + drift.T) / 2, jnp.float32)) for t in range(6)
    ]
    track = hd.track(
        hd.Matrix, checkpoints, jax.random.key(0), rank=6, density=False, progress=False
    )
    cold = [
        hd.top_eigenspace(
            hd.Matrix(array), jax.random.key(1), 6, which="LA", progress=False
        ).num_matvecs
        for _, array in checkpoints[1:]
    ]
    for row, (_, array) in zip(track.values, checkpoints, strict=True):
        exact = np.linalg.eigvalsh(np.asarray(array, float))[:-7:-1]
        np.testing.assert_allclose(row, exact, atol=1e-4 * exact[0])
    assert track.num_matvecs[1:].sum() < 0.8 * sum(cold)


def test_later_checkpoints_compile_nothing():
    make, checkpoints = hessian_of(np.float32), training(np.float32)
    tracker = hd.Tracker(make, jax.random.key(0), **SMALL)
    traces = []
    for step, params in checkpoints[:4]:
        tracker.measure(step, params)
        traces.append(risk.add_batch._cache_size())
    assert traces[1:] == traces[:1] * 3  # products and gradients


def test_the_products_are_counted_and_only_the_last_eigenvectors_kept():
    track = tracked(np.float32)
    assert track.eigenspace.values.tolist() == track.values[-1].tolist()
    for measurement in track.points:
        held = [getattr(measurement, field.name) for field in dataclasses.fields(measurement)]
        assert not any(isinstance(value, jax.Array | hd.Eigenspace) for value in held)
        assert measurement.density.eigenspace is None
    expected = [m.num_matvecs + m.density.num_matvecs for m in track.points]
    np.testing.assert_array_equal(track.num_matvecs, expected)
    assert min(expected) >= 16 + RANK


def test_the_settings_of_the_density_are_those_of_spectral_density():
    ours, theirs = (
        inspect.signature(f).parameters for f in (hd.Tracker.__init__, hd.spectral_density)
    )
    for name in ("num_steps", "num_probes", "deflation_steps"):
        assert ours[name].default == theirs[name].default
    theirs = inspect.signature(hd.top_eigenspace).parameters
    for name in ("tolerance", "block_size", "max_matvecs"):
        assert ours[name].default == theirs[name].default


def test_a_generator_is_asked_for_one_checkpoint_at_a_time():
    events = []

    def checkpoints():
        for step in range(3):
            events.append(f"load {step}")
            yield step, jnp.float32(step + 1)

    def make(scale):
        events.append("measure")
        return hd.Matrix(scale * jnp.diag(jnp.arange(1.0, 9.0)))

    hd.track(make, checkpoints(), jax.random.key(0), rank=2, density=False, progress=False)
    assert events == ["load 0", "measure", "load 1", "measure", "load 2", "measure"]


def test_the_bar_names_the_step_and_leaves_nothing_behind(capsys):
    checkpoints = [(100, 1.0)]
    make, key = (lambda scale: hd.Matrix(scale * jnp.diag(jnp.arange(1.0, 9.0)))), jax.random.key(0)
    hd.track(make, checkpoints, key, rank=2, density=False, progress=False)
    assert capsys.readouterr() == ("", "")
    hd.track(make, checkpoints, key, rank=2, density=False)
    assert "step 100" in capsys.readouterr().err


# What is left out ---------------------------------------------------------------------------------


def diagonals(*scales, rank=2, **settings):
    """A track of scaled diagonal matrices, which have no loss and no gradient."""
    values = jnp.array([5.0, 4.0, -1.0, -9.0, 0.5, 0.25])
    return hd.track(
        lambda scale: hd.Matrix(scale * jnp.diag(values)),
        list(enumerate(map(jnp.float32, scales))),
        jax.random.key(0),
        **{"rank": rank, "density": False, "progress": False} | settings,
    )


def test_an_operator_without_loss_or_gradient_has_none():
    track = diagonals(1, 2, 3)
    assert np.isnan(track.losses).all()
    assert np.isnan(track.gradient_norms).all()
    assert np.isnan(track.concentrations).all()
    np.testing.assert_allclose(track.values[:, 0], [5, 10, 15], rtol=1e-5)
    np.testing.assert_allclose(track.overlaps[1:], 1, rtol=1e-5)
    assert track.densities == (None, None, None)
    assert " - " in str(track)


def test_a_gradient_of_zero_has_no_share():
    def loss(params, batch):
        return jnp.mean((batch @ params) ** 2)

    rows = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    track = hd.track(
        lambda params: hd.Hessian(loss, params, [rows]),
        [(0, jnp.zeros(4))],
        jax.random.key(0),
        **SMALL | {"rank": 2},
    )
    assert track.gradient_norms[0] == 0
    assert np.isnan(track.concentrations).all()


def test_the_largest_in_magnitude_can_be_followed_and_zeta_is_told_to_be_none():
    track = diagonals(1, which="LM", rank=3)
    np.testing.assert_allclose(track.values[0], [5, 4, -9], rtol=1e-5)
    assert np.isnan(track.zetas()[0])
    assert track.zetas(2)[0] == pytest.approx(1.25)
    assert diagonals(1, num_classes=1).zetas()[0] == 1


def test_zeta_is_the_ratio_of_the_largest_to_the_kth():
    space = hd.Eigenspace([6.0, 3.0, 2.0, -1.0], np.eye(5)[:4], np.zeros(4), np.ones(4, bool), 0)
    assert hd.zeta(space, 3) == 3
    assert hd.zeta(space[:2]) == 2
    assert hd.zeta(space, 1) == 1
    with pytest.raises(ValueError, match="lambda_4 = -1 is not positive"):
        hd.zeta(space)
    for k in (0, 5, 2.0):
        with pytest.raises(ValueError, match=f"k={k}, expected a whole number from 1 to 4"):
            hd.zeta(space, k)


# Interruptions and mistakes -----------------------------------------------------------------------


def breaking(at, exception):
    """Makes operators of which product number ``at`` fails."""
    calls = []

    def make(scale):
        matrix = hd.Matrix(scale * jnp.diag(jnp.arange(1.0, 31.0)))

        def product(vector):
            calls.append(1)
            if len(calls) == at and exception:
                raise exception
            return matrix @ vector * jnp.float32(jnp.nan if len(calls) == at else 1)

        return hd.FunctionOperator(product, matrix.like)

    return make


CHECKPOINTS = [(step, jnp.float32(1 + step)) for step in range(4)]


@pytest.mark.parametrize("settings", [{}, {"density": False}])
def test_an_interrupted_track_is_that_of_the_whole_checkpoints(settings, caplog):
    settings = SMALL | {"rank": 2} | settings
    one = hd.track(breaking(0, None), CHECKPOINTS[:1], jax.random.key(0), **settings).num_matvecs[0]
    with caplog.at_level(logging.WARNING, logger="hessdensity"):
        track = hd.track(
            breaking(one + 9, KeyboardInterrupt()), CHECKPOINTS, jax.random.key(0), **settings
        )
    assert len(track) == 1
    assert track.description["stopped"] == "interrupted after 1 checkpoint"
    assert "stopped: interrupted" in str(track)
    assert "The result holds the checkpoints measured so far" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        hd.track(breaking(6, KeyboardInterrupt()), CHECKPOINTS, jax.random.key(0), **settings)


def test_a_run_that_diverged_hands_over_the_track_before():
    settings = SMALL | {"rank": 2, "density": False}
    one = hd.track(breaking(0, None), CHECKPOINTS[:1], jax.random.key(0), **settings).num_matvecs[0]
    with pytest.raises(hd.NonFiniteProductError) as caught:
        hd.track(breaking(one + 2, None), CHECKPOINTS, jax.random.key(0), **settings)
    assert len(caught.value.partial) == 1
    with pytest.raises(hd.NonFiniteProductError) as caught:
        hd.track(breaking(2, None), CHECKPOINTS, jax.random.key(0), **settings)
    assert caught.value.partial is None


def test_arguments_that_cannot_be_are_refused():
    make, key, settings = (
        (lambda scale: hd.Matrix(scale * jnp.eye(6))),
        jax.random.key(0),
        SMALL | {"density": False},
    )
    one = jnp.float32(1)
    for call, error, said in (
        (
            lambda: hd.track(hd.Matrix(jnp.eye(3)), [], key),
            TypeError,
            "make_operator is a Matrix; expected a function",
        ),
        (lambda: hd.track(make, [], 0), TypeError, "key is a int; expected a JAX random key"),
        (
            lambda: hd.track(make, [], key, num_classes=11),
            ValueError,
            "num_classes=11, expected .* from 1 to 10",
        ),
        (lambda: hd.track(make, [], key), ValueError, "checkpoints is empty"),
        (
            lambda: hd.track(make, [one], key),
            ValueError,
            r"checkpoints: number 0 is a ArrayImpl; expected",
        ),
        (
            lambda: hd.track(lambda p: p, [(0, 1.0)], key),
            TypeError,
            "make_operator returned a float; expected",
        ),
        (
            lambda: hd.track(make, [(0, one), (0, one)], key, **settings),
            ValueError,
            r"step=0, expected more than .* 0\.",
        ),
        (lambda: hd.track(make, [(np.nan, one)], key, **settings), ValueError, "step=nan"),
        (
            lambda: hd.track(make, [(0, one)], key, **settings | {"rank": 7}),
            ValueError,
            "rank=7, expected",
        ),
        (lambda: hd.track(make, [(0, one)], key, **settings, which="XX"), ValueError, "which='XX'"),
    ):
        with pytest.raises(error, match=said):
            call()


# The table, the file, the figures -----------------------------------------------------------------


def test_a_track_prints_a_table():
    text = str(tracked(np.float32)).splitlines()
    assert text[0] == "Track of a Hessian, 10 checkpoints"
    for column in (
        "step",
        "loss",
        "|gradient|",
        "lambda_1",
        "lambda_4",
        "zeta",
        "gradient in top 4",
        "overlap",
    ):
        assert column in text[1]
    assert len(text) == 12
    assert (
        len({line.index(word) + len(word) for line in text[1:] for word in [line.split()[0]]}) == 1
    )
    assert text[-1].split()[0] == "45"
    unsure = diagonals(1, max_matvecs=3, block_size=1)
    assert not unsure.converged.all()
    header, *rows = str(unsure).splitlines()[1:]
    assert header.endswith("not converged")
    assert all(row.split()[-2:] in (["3", "1"], ["3", "2"]) for row in rows)
    assert repr(tracked(np.float32)) == "<Track of 10 checkpoints, rank 4>"
    assert str(hd.Track(())) == "Track, 0 checkpoints"


@pytest.mark.parametrize(
    "make", [lambda: tracked(np.float32), lambda: diagonals(1, 2), lambda: hd.Track(())]
)
def test_saved_is_loaded_bit_for_bit(make, tmp_path):
    track = make()
    track.save(tmp_path / "track.anything")
    loaded = hd.Track.load(tmp_path / "track.anything")
    assert loaded.eigenspace is None
    assert loaded.description == track.description
    assert str(loaded) == str(track)
    for ours, theirs in zip(track.points, loaded.points, strict=True):
        for field in dataclasses.fields(ours):
            if field.name != "density":
                np.testing.assert_array_equal(
                    getattr(ours, field.name), getattr(theirs, field.name)
                )
                assert type(getattr(ours, field.name)) is type(getattr(theirs, field.name))
        assert (ours.density is None) == (theirs.density is None)
        if ours.density is not None:
            np.testing.assert_array_equal(ours.density.nodes, theirs.density.nodes)
            np.testing.assert_array_equal(ours.density.weights, theirs.density.weights)
            assert ours.density.num_matvecs == theirs.density.num_matvecs
            assert ours.density.rules[0].coupling == theirs.density.rules[0].coupling


def test_a_file_that_is_no_saved_track_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    (tmp_path / "text.npz").write_text("not a zip")
    tracked(np.float32).densities[0].save(tmp_path / "density.npz")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match="is not a saved track; expected a file written by"):
            hd.Track.load(path)
    diagonals(1).save(tmp_path / "new.npz")
    saved = dict(np.load(tmp_path / "new.npz"))
    np.savez(tmp_path / "newer.npz", **saved | {"version": 99})
    with pytest.raises(ValueError, match="version 99"):
        hd.Track.load(tmp_path / "newer.npz")
    del saved["column_loss"]
    np.savez(tmp_path / "damaged.npz", **saved)
    with pytest.raises(ValueError, match="is a damaged track"):
        hd.Track.load(tmp_path / "damaged.npz")
    with pytest.raises(FileNotFoundError):
        hd.Track.load(tmp_path / "missing.npz")


def test_the_heat_map_holds_all_mass_on_the_axes_given():
    track, (_, ax) = tracked(np.float32), plt.subplots()
    assert track.plot(ax, num_rows=1000) is ax
    (mesh,) = ax.collections
    cells = np.asarray(mesh.get_array()).reshape(1000, 10)
    # Per decade of the axis as drawn, on which every checkpoint's mass is 1.
    edges = ax.yaxis.get_transform().transform(mesh.get_coordinates()[:, 0, 1])
    size = ax.yaxis.get_transform().linthresh
    least = cells.min()
    mass = (np.where(cells > least, cells, 0).T * np.diff(edges) / size).sum(1)
    np.testing.assert_allclose(mass, 1, atol=0.02)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == (
        "training step",
        "eigenvalue",
        "symlog",
    )
    lines = [line for line in ax.get_lines() if line.get_xdata().size == 10]
    np.testing.assert_array_equal([line.get_ydata() for line in lines], track.values.T)
    assert not plot_track(track, plt.subplots()[1], eigenvalues=False).get_lines()
    assert hd.Track(track.points[:1]).plot().get_ylim()[0] < 0


def test_a_track_without_densities_has_no_heat_map():
    with pytest.raises(
        ValueError, match="densities for 0 of 2 checkpoints; measure them with density=True"
    ):
        diagonals(1, 2).plot()
    with pytest.raises(ValueError, match="bandwidth=0, expected a positive number"):
        tracked(np.float32).plot(bandwidth=0)


def test_a_concentration_and_a_measure_are_drawn_as_they_are():
    track = tracked(np.float32)
    _, ax = plt.subplots()
    assert plot_concentration(track.concentrations[-1], ax, dimension=55) is ax
    plot_concentration(track.concentrations[0], ax, label="at first")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "gradient",
        "a random direction",
        "at first",
    ]
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), track.concentrations[-1])
    with pytest.raises(ValueError, match=r"concentration has shape \(10, 4\)"):
        plot_concentration(track.concentrations)
    operator = hessian_of(np.float32)(training(np.float32)[-1][1])
    measure = hd.spectral_measure(operator, operator.gradient(), 8, progress=False)
    ax = plot_measure(measure, track.densities[-1])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "eigenvalues",
        "95 %: every error",
        "95 %: probes alone",
        "gradient",
        "error of quadrature",
    ]
    with pytest.raises(ValueError, match="expected the measure of a vector"):
        plot_measure(track.densities[-1], measure)
