"""A Flax model behaves as the plain function that it is, with the statistics of the caller."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

import hessdensity as hd
from hessdensity import adapters, losses
from hessdensity.losses.risk import add_batch

RNG = np.random.default_rng(0)
X = RNG.standard_normal((10, 3)).astype(np.float32)
Y = RNG.standard_normal((10, 4)).astype(np.float32)
WHOLE = [(X, Y)]
BATCHES = hd.batches((X, Y), 6)  # of 6 and of 4
EPSILON = 1e-5  # of the normalization, in both Flax interfaces


class Linen(linen.Module):
    """3-4-4, with what a test wants in the middle."""

    normalize: bool = False
    rate: float = 0.0

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(4)(x)
        if self.normalize:
            x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(self.rate, deterministic=not train)(jnp.tanh(x))
        return linen.Dense(4)(x)


class Nnx(nnx.Module):
    """The same."""

    def __init__(self, seed=0, normalize=False, rate=0.0, **switch):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs) if normalize else None
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.last = nnx.Linear(4, 4, rngs=rngs)
        self.switch = switch

    def __call__(self, x):
        x = self.first(x)
        x = x if self.norm is None else self.norm(x, **self.switch)
        return self.last(self.dropout(jnp.tanh(x)))


def shifted(tree):
    """Other numbers in the same tree: no zero biases, unit scales, or statistics as they were
    initialized."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        structure, [leaf + rng.uniform(0.2, 1, leaf.shape).astype("float32") for leaf in leaves]
    )


def make_linen(normalize=False, statistics=None, seed=0, **options):
    """(loss, params, the layers by name, the statistics) of a linen model."""
    model = Linen(normalize)
    variables = shifted(model.init(jax.random.key(seed), X))
    loss, params = adapters.from_linen(
        model,
        variables,
        losses.mean_squared_error,
        batch_statistics=statistics,
        train=statistics == "batch",
    )
    names = {"first": "Dense_0", "norm": "BatchNorm_0", "last": "Dense_1"}
    return loss, params, names, variables.get("batch_stats", {}).get("BatchNorm_0")


def make_nnx(normalize=False, statistics=None, seed=0, rate=0.0):
    model = Nnx(seed, normalize, rate)
    nnx.update(model, shifted(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))))
    loss, params = adapters.from_nnx(model, losses.mean_squared_error, batch_statistics=statistics)
    stored = {"mean": model.norm.mean[...], "var": model.norm.var[...]} if normalize else None
    return loss, params, {"first": "first", "norm": "norm", "last": "last"}, stored


def by_hand(params, names, batch, stored, normalize):
    """The model written out: normalized by the batch's own statistics where none are stored."""
    x, y = batch
    p = {name: nnx.to_pure_dict(params)[path] if isinstance(params, nnx.State) else params[path]
         for name, path in names.items() if normalize or name != "norm"}  # fmt: skip
    x = x @ p["first"]["kernel"] + p["first"]["bias"][None]
    if normalize:
        mean, var = (stored["mean"], stored["var"]) if stored else (x.mean(0), x.var(0))
        x = (x - mean[None]) / jnp.sqrt(var + EPSILON)[None] * p["norm"]["scale"][None] + p["norm"][
            "bias"
        ][None]
    return jnp.mean((jnp.tanh(x) @ p["last"]["kernel"] + p["last"]["bias"][None] - y) ** 2)


def exact(params, names, stored, normalize):
    """jax.hessian of the mean over all examples, leaves in tree order."""
    flat, unravel = ravel_pytree(params)

    def mean(flat):
        parts = [
            len(x) * by_hand(unravel(flat), names, (x, y), stored, normalize) for x, y in BATCHES
        ]
        return sum(parts) / 10

    return np.asarray(jax.jit(jax.hessian(mean))(flat))


def product(loss, params, data=WHOLE):
    """One vector's product, flat."""
    return ravel_pytree(
        hd.Hessian(loss, params, data) @ shifted(jax.tree.map(jnp.zeros_like, params))
    )[0]


def assert_close(estimate, reference):
    """Equal but for float32 rounding, relative to the norm."""
    np.testing.assert_allclose(estimate, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


FLAX = pytest.mark.parametrize("make", [make_linen, make_nnx])


@FLAX
def test_the_hessian_through_an_adapter_is_that_of_the_plain_function(make):
    loss, params, names, _ = make()
    estimate = hd.dense(hd.Hessian(loss, params, BATCHES))
    assert_close(estimate, exact(params, names, None, False))


@FLAX
def test_stored_and_batch_statistics_give_two_hessians_and_both_are_right(make):
    found = {}
    for statistics in ("stored", "batch"):
        loss, params, names, stored = make(True, statistics)
        found[statistics] = hd.dense(hd.Hessian(loss, params, BATCHES))
        reference = exact(params, names, stored if statistics == "stored" else None, True)
        assert_close(found[statistics], reference)
    assert np.abs(found["stored"] - found["batch"]).max() > 0.01 * np.abs(found["stored"]).max()


@FLAX
def test_a_hessian_of_batch_statistics_is_that_of_the_mean_over_these_batches(make):
    loss, params, *_ = make(True, "batch")
    whole = product(loss, params)
    assert np.abs(product(loss, params, BATCHES) - whole).max() > 1e-3 * np.abs(whole).max()


def test_statistics_are_never_written():
    model = Nnx(normalize=True)
    before = jax.tree.map(np.array, nnx.state(model, nnx.BatchStat))
    loss, params = adapters.from_nnx(model, losses.mean_squared_error, batch_statistics="batch")
    first = product(loss, params)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.BatchStat), before)
    assert not model.norm.use_running_average
    np.testing.assert_array_equal(product(loss, params), first)


@FLAX
@pytest.mark.parametrize("statistics", [None, "running"])
def test_a_model_that_normalizes_must_be_told_how(make, statistics):
    with pytest.raises(
        ValueError, match=f"batch_statistics={statistics!r}.*choose 'stored'.*or 'batch'"
    ):
        make(True, statistics)


@FLAX
def test_statistics_that_a_model_does_not_carry_are_refused(make):
    with pytest.raises(
        ValueError, match="batch_statistics='stored', but the model has none; leave it out"
    ):
        make(False, "stored")


def test_a_linen_model_that_would_write_its_stored_statistics_is_refused():
    model = Linen(normalize=True)
    loss, params = adapters.from_linen(
        model,
        model.init(jax.random.key(0), X),
        losses.mean_squared_error,
        batch_statistics="stored",
        train=True,
    )
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        hd.Hessian(loss, params, BATCHES) @ params


def test_a_linen_model_that_keeps_its_stored_statistics_is_refused_where_the_batchs_were_chosen():
    model = Linen(normalize=True)
    loss, params = adapters.from_linen(
        model,
        model.init(jax.random.key(0), X),
        losses.mean_squared_error,
        batch_statistics="batch",
        train=False,
    )
    with pytest.raises(ValueError, match="batch_statistics='batch'"):
        hd.Hessian(loss, params, WHOLE) @ params


@pytest.mark.parametrize(("statistics", "used"), [("stored", False), ("batch", True)])
def test_an_nnx_model_that_has_its_own_mind_about_its_statistics_is_refused(statistics, used):
    model = Nnx(normalize=True, use_running_average=used)
    loss, params = adapters.from_nnx(model, losses.mean_squared_error, batch_statistics=statistics)
    with pytest.raises(ValueError, match=f"batch_statistics='{statistics}'"):
        hd.Hessian(loss, params, WHOLE) @ params


def test_linen_variables_without_params_are_refused():
    variables = Linen().init(jax.random.key(0), X)
    with pytest.raises(
        ValueError,
        match=r"collections \['Dense_0', 'Dense_1'\]; expected 'params'.*{'params': params}",
    ):
        adapters.from_linen(Linen(), variables["params"], losses.mean_squared_error)


def test_an_nnx_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match=r"a Dropout, has no nnx\.Param variables"):
        adapters.from_nnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), losses.mean_squared_error)


def test_dropout_is_off_in_an_nnx_model():
    without, params, *_ = make_nnx()
    dropping, same, *_ = make_nnx(rate=0.9)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    np.testing.assert_array_equal(product(dropping, params), product(without, params))


def test_dropout_is_what_the_call_options_say_in_a_linen_model():
    model = Linen(rate=0.5)
    variables = model.init(jax.random.key(0), X)
    off, params = adapters.from_linen(model, variables, losses.mean_squared_error, train=False)
    plain, _ = adapters.from_linen(Linen(), variables, losses.mean_squared_error)
    np.testing.assert_array_equal(product(off, params), product(plain, params))


@FLAX
@pytest.mark.parametrize(
    ("normalize", "statistics"), [(False, None), (True, "stored"), (True, "batch")]
)
def test_a_second_checkpoint_compiles_nothing(make, normalize, statistics):
    loss, params, *_ = make(normalize, statistics, seed=0)
    first = product(loss, params)
    compiled = add_batch._cache_size()
    loss, params, *_ = make(normalize, statistics, seed=1)
    second = product(loss, params)
    assert add_batch._cache_size() == compiled
    assert np.abs(first - second).max() > 1e-3


@FLAX
@pytest.mark.parametrize("layer", ["first", "last"])
def test_a_glob_selects_a_layer_and_gives_its_diagonal_block(make, layer):
    loss, params, names, _ = make()
    block = {"first": slice(0, 16), "last": slice(16, 36)}[layer]
    part = hd.Hessian(loss, params, WHOLE, where=f"{names[layer]}/*")
    assert_close(hd.dense(part), hd.dense(hd.Hessian(loss, params, WHOLE))[block, block])


@FLAX
def test_a_glob_reaches_across_layers(make):
    loss, params, *_ = make()
    selected = hd.Hessian(loss, params, WHOLE, where="*/kernel").like
    assert [leaf.shape for leaf in jax.tree.leaves(selected)] == [(3, 4), (4, 4)]


@FLAX
def test_a_glob_that_matches_nothing_lists_the_paths(make):
    loss, params, names, _ = make()
    with pytest.raises(
        ValueError, match=f"where='layer9/\\*' matches no leaf.*\n  {names['first']}/bias\n"
    ):
        hd.Hessian(loss, params, BATCHES, where="layer9/*")


def test_a_mask_reaches_the_criterion_as_one_more_target():
    model = Linen()
    mask = (np.arange(10) % 3 > 0).astype(np.float32)

    def criterion(outputs, targets, mask):
        return hd.Total(jnp.sum(mask * jnp.mean((outputs - targets) ** 2, axis=1)), jnp.sum(mask))

    loss, params = adapters.from_linen(model, shifted(model.init(jax.random.key(0), X)), criterion)
    kept = mask > 0
    plain, _ = adapters.from_linen(model, {"params": params}, losses.mean_squared_error)
    assert_close(
        product(loss, params, hd.batches((X, Y, mask), 6)),
        product(plain, params, [(X[kept], Y[kept])]),
    )
