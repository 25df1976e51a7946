"""The top of a spectrum: the pairs that LAPACK gives, with all copies, at any scale, and how they
are come by."""

import logging

import jax
import jax.numpy as jnp
import named_spectra as spectra
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import dense_hessian, mlp

import hessdensity as hd
from hessdensity.krylov import block_lanczos, lanczos, restarted
from hessdensity.vectors import basis as bases
from hessdensity.vectors import orthogonalize, trees

MERIT = {"LM": np.abs, "LA": np.positive, "SA": np.negative}

# Multiplicities below, at and above a block of four, a gap far below the tolerance, both signs; 200
# in all.
CLUSTERS = np.concatenate(
    [np.linspace(-1, 1, 180), [7.0] * 6, [5.0] * 4, [-6.0] * 5, [3.0, 3.0], [2.0, 2.0 + 1e-5, 4.0]]
)
OUTLIERS = spectra.ORDINARY["outliers"][
    100:
]  # of 200 as well: a dimension more is a compilation more


def operator_of(values, dtype):
    return hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), jax.random.key(5))


def exact(values, which, rank):
    """The wanted eigenvalues, descending."""
    return np.sort(values[np.argsort(-MERIT[which](values), kind="stable")][:rank])[::-1]


def top(operator, key, rank, **settings):
    return hd.top_eigenspace(operator, key, rank, progress=False, **settings)


def rows(space):
    return trees.ravel(space.vectors).astype(float)


def assert_pairs(space, operator, scale):
    """Residuals are true, vectors orthonormal, values descend: to rounding."""
    epsilon, vectors = trees.epsilon(operator.like), rows(space)
    products = trees.ravel(operator @ space.vectors).astype(float)
    true = np.linalg.norm(products - space.values[:, None] * vectors, axis=1)
    np.testing.assert_allclose(space.residuals, true, atol=20 * epsilon * scale)
    assert np.abs(vectors @ vectors.T - np.eye(space.rank)).max() < 100 * epsilon
    assert np.all(np.diff(space.values) <= 0)


class Counted:
    """An operator that counts its calls and their vectors."""

    def __init__(self, operator):
        self.operator, self.like, self.blocks = operator, operator.like, []

    def __matmul__(self, block):
        self.blocks.append(jax.tree.leaves(block)[0].shape[0])
        return self.operator @ block


@pytest.mark.parametrize(
    ("name", "which"),
    [("outliers", "LM"), ("outliers", "LA"), ("outliers", "SA"), ("linear", "LM"), ("ring", "LA")],
)
def test_the_pairs_are_lapacks(name, which, key, dtype):
    values = spectra.ORDINARY[name]
    operator, scale = operator_of(values, dtype), np.abs(values).max()
    space = top(operator, key, 10, which=which)
    assert space.converged.all()
    assert space.residuals.max() <= 1e-4 * scale
    np.testing.assert_allclose(space.values, exact(values, which, 10), atol=1e-5 * scale)
    assert_pairs(space, operator, scale)


@pytest.mark.parametrize("name", spectra.BREAKDOWN)
def test_an_exhausted_krylov_space_is_left_and_all_copies_are_found(name, key):
    values = spectra.BREAKDOWN[name]
    operator, rank = operator_of(values, np.float32), min(10, values.size)
    space = top(operator, key, rank)
    scale = np.abs(values).max()
    np.testing.assert_allclose(space.values, exact(values, "LM", rank), atol=5e-6 * scale)
    assert space.converged.all()
    assert_pairs(space, operator, scale)


@pytest.mark.parametrize(("which", "block_size"), [("LM", 4), ("LA", 4), ("SA", 4), ("LA", 1)])
def test_clusters_are_found_whole(which, block_size, key):
    operator, rank = operator_of(CLUSTERS, np.float32), {"LM": 20, "LA": 15, "SA": 5}[which]
    space = top(operator, key, rank, which=which, block_size=block_size)
    np.testing.assert_allclose(space.values, exact(CLUSTERS, which, rank), atol=1e-5)
    _, vectors = np.linalg.eigh(hd.dense(operator))
    ascending, ours = np.sort(CLUSTERS), rows(space)
    for value in np.unique(np.round(space.values)):
        # The eigenvectors of a cluster are arbitrary, their projector is not.
        true = vectors[:, np.abs(ascending - value) < 0.1]
        found = ours[np.abs(space.values - value) < 0.1]
        assert np.linalg.norm(found.T @ found - true @ true.T, 2) < 7e-4 / 0.9


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_restarted_run_finds_what_an_unrestarted_one_finds(block_size, key):
    operator = operator_of(OUTLIERS, np.float32)
    free = top(operator, key, 5, block_size=block_size)
    bound = top(operator, key, 5, block_size=block_size, basis_size=5 + 3 * block_size)
    assert bound.num_matvecs >= free.num_matvecs
    assert free.converged.all()
    assert bound.converged.all()
    np.testing.assert_allclose(bound.values, free.values, atol=1e-4)
    assert_pairs(bound, operator, 10)


def test_a_basis_never_holds_more_than_it_may(key, monkeypatch):
    sizes, append = [], block_lanczos.BlockLanczos._append

    def watched(self, block):
        append(self, block)
        sizes.append(self.size)

    monkeypatch.setattr(block_lanczos.BlockLanczos, "_append", watched)
    top(operator_of(spectra.ORDINARY["linear"], np.float32), key, 6, basis_size=22, max_matvecs=100)
    assert max(sizes) == 22


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_pairs_of_a_scaled_operator_are_scaled(factor, key, dtype):
    values = OUTLIERS
    plain = top(operator_of(values, dtype), key, 6)
    scaled = top(operator_of(factor * values, dtype), key, 6)
    assert scaled.num_matvecs == plain.num_matvecs
    np.testing.assert_allclose(scaled.values / factor, plain.values, atol=400 * np.finfo(dtype).eps)
    assert hd.overlap(scaled, plain) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_no_threshold_is_absolute(factor, key):
    space = top(operator_of(factor * spectra.BREAKDOWN["eight of 300"], np.float32), key, 9)
    np.testing.assert_allclose(space.values / factor, [*np.arange(8, 0, -1) * 10 / 8, 0], atol=1e-5)


def test_the_pairs_of_a_networks_hessian_are_scipys(key):
    loss, params, batch = mlp(np.float32)
    hessian = hd.Hessian(loss, params, [batch])
    space = top(hessian, key, 5, which="LA")
    matrix = dense_hessian(loss, params, batch)
    values, vectors = scipy.sparse.linalg.eigsh(matrix, 5, which="LA")
    np.testing.assert_allclose(space.values, values[::-1], atol=1e-5 * values.max())
    theirs = trees.unravel(vectors.T, hessian.like)
    assert hd.principal_angles(space, theirs).max() < 5e-3
    assert_pairs(space, hessian, values.max())
    assert jax.tree.structure(space.vectors) == jax.tree.structure(params)
    assert space.description["operator"]["kind"] == "Hessian"


@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_the_rank_may_be_the_dimension(block_size, key):
    values = spectra.BREAKDOWN["fewer than steps"]
    space = top(operator_of(values, np.float32), key, 7, which="SA", block_size=block_size)
    np.testing.assert_allclose(space.values, values[::-1], atol=3e-6)
    assert space.num_matvecs == 7
    assert space.converged.all()


def test_products_and_passes_are_counted(key):
    operator = Counted(operator_of(OUTLIERS, np.float32))
    space = top(operator, key, 6)
    assert space.num_matvecs == sum(operator.blocks)
    assert space.num_passes == len(operator.blocks)
    assert set(operator.blocks) == {4}


def test_the_same_key_gives_the_same_pairs(key):
    operator = operator_of(OUTLIERS, np.float32)
    first, second = (top(operator, key, 6) for _ in range(2))
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(rows(first), rows(second))


def drifted(size):
    """A symmetric matrix, and one that differs from it by ``size`` in the norm."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((200, 200)))[0]
    bulk = 0.4 * rng.standard_normal(192)
    matrix = turn * np.concatenate([bulk, [-4.0, 2.0, 3.0, 4.5, 5.0, 6.0, 8.0, 10.0]]) @ turn.T
    change = rng.standard_normal((200, 200))
    change = size * (change + change.T) / np.linalg.norm(change + change.T, 2)
    return [hd.Matrix(jnp.asarray((m + m.T) / 2, jnp.float32)) for m in (matrix, matrix + change)]


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_warm_start_needs_fewer_products(block_size, key):
    before, after = drifted(0.02)
    old = top(before, key, 8, block_size=block_size)
    cold = top(after, key, 8, block_size=block_size)
    warm = top(after, key, 8, block_size=block_size, start=old)
    assert warm.num_matvecs < 0.9 * cold.num_matvecs
    assert warm.converged.all()
    np.testing.assert_allclose(warm.values, cold.values, atol=1e-4)
    block = top(after, key, 8, block_size=block_size, start=old.vectors)
    np.testing.assert_array_equal(block.values, warm.values)


@pytest.mark.parametrize("block_size", [4, 16])
def test_a_warm_start_sees_what_is_new(block_size, key):
    operator = operator_of(CLUSTERS, np.float32)
    known = top(operator, key, 20)
    old = known[known.values < 6.5]  # as if 7, the largest, had not been there before
    space = top(operator, key, 12, which="LA", block_size=block_size, start=old)
    np.testing.assert_allclose(space.values, exact(CLUSTERS, "LA", 12), atol=1e-5)


def test_too_few_products_are_marked(key, caplog):
    operator = Counted(operator_of(spectra.ORDINARY["linear"], np.float32))
    with caplog.at_level(logging.WARNING, "hessdensity"):
        space = top(operator, key, 10, max_matvecs=50)
    assert space.num_matvecs == sum(operator.blocks) == 48
    assert space.rank == 10
    np.testing.assert_array_equal(
        space.converged, space.residuals <= 1e-4 * np.abs(space.values).max()
    )
    assert not space.converged.all()
    assert "max_matvecs=50 reached" in caplog.text
    assert "not converged" in str(space)


def failing(values, after, failure):
    """An operator whose product number ``after`` fails."""
    operator, calls = operator_of(values, np.float32), iter(range(100))

    def matvec(vector):
        if next(calls) == after:
            return failure(vector)
        return operator @ vector

    return hd.FunctionOperator(matvec, operator.like)


def interrupt(vector):
    raise KeyboardInterrupt


def test_an_interrupted_run_returns_what_is_there(key, caplog):
    values = OUTLIERS
    with caplog.at_level(logging.WARNING, "hessdensity"):
        space = top(failing(values, 22, interrupt), key, 6)
    assert (space.num_matvecs, space.num_passes) == (20, 5)
    assert "interrupted after 20 products" in caplog.text
    assert "stopped: interrupted" in str(space)
    assert_pairs(space, operator_of(values, np.float32), 10)
    with pytest.raises(KeyboardInterrupt):
        top(failing(values, 2, interrupt), key, 6)
    assert top(failing(values, 5, interrupt), key, 6).rank == 4  # all that there are


def test_a_product_that_is_not_finite_names_the_pass_and_keeps_the_rest(key):
    values = OUTLIERS
    with pytest.raises(
        hd.NonFiniteProductError, match="Step 5: the operator's product is not finite"
    ) as caught:
        top(failing(values, 22, lambda v: v * np.nan), key, 6)
    assert caught.value.partial.num_matvecs == 20
    with pytest.raises(hd.NonFiniteProductError, match="Step 0") as caught:
        top(failing(values, 0, lambda v: v * np.inf), key, 6)
    assert caught.value.partial is None


def test_an_operator_that_is_not_symmetric_is_refused(key):
    wrong = jnp.asarray(np.random.default_rng(0).standard_normal((200, 200)), jnp.float32)
    drifting = iter(range(1, 1000))
    like = jnp.zeros(200)
    for matvec in (lambda v: wrong @ v, lambda v: v * jnp.roll(jnp.arange(200.0), next(drifting))):
        with pytest.raises(ValueError, match="not symmetric, or not the same in every product"):
            top(hd.FunctionOperator(matvec, like), key, 3)


def test_a_product_of_another_shape_is_refused(key):
    class Wrong:
        like = jax.ShapeDtypeStruct((20,), jnp.float32)

        def __matmul__(self, block):
            return block[:, 1:]

    with pytest.raises(ValueError, match=r"the operator's product: the vector is float32\[4, 19\]"):
        top(Wrong(), key, 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank=0, expected a whole number of at least 1"),
        ({"rank": 201}, "rank=201, expected"),
        ({"rank": 2.0}, "rank=2.0, expected"),
        ({"which": "SM"}, "which='SM', expected 'LM'"),
        (
            {"tolerance": 1e-7},
            r"tolerance=1e-07, expected a share .* at least 3.8e-06, the limit .* of float32",
        ),
        ({"tolerance": 1.0}, "tolerance=1.0, expected"),
        ({"block_size": 0}, "block_size=0, expected"),
        ({"basis_size": 14}, r"basis_size=14, expected at least rank \+ 3 block_size = 15"),
        ({"max_matvecs": 6}, r"max_matvecs=6, expected at least rank \+ block_size = 7"),
        ({"start": jnp.ones(7)}, r"start: the vector is float32\[7\]"),
        ({"start": jnp.full(200, np.nan)}, "start holds entries that are not finite"),
    ],
)
def test_what_cannot_be_computed_is_refused(settings, said, key):
    operator = operator_of(spectra.ORDINARY["linear"], np.float32)
    with pytest.raises(ValueError, match=said):
        top(operator, key, **({"rank": 3} | settings))


def test_what_is_no_operator_or_no_key_is_refused(key):
    with pytest.raises(TypeError, match="operator is a ndarray"):
        top(np.eye(3), key, 1)
    with pytest.raises(TypeError, match="key is a int"):
        top(hd.Matrix(jnp.eye(3)), 0, 1)

    class Whole:
        like = jax.ShapeDtypeStruct((20,), jnp.int32)

        def __matmul__(self, block):
            return block

    with pytest.raises(TypeError, match="is int32; expected float32 or float64"):
        top(Whole(), key, 1)


def test_sharded_vectors_keep_their_shards_and_give_the_same_pairs(key, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((40, 4096)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(1).standard_normal(4096), jnp.float32) / 64

    def loss(w, batch):
        return jnp.mean(jnp.log1p((batch @ w) ** 2))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    sharded = jax.device_put(w, NamedSharding(mesh, PartitionSpec("data")))
    alone = top(hd.Hessian(loss, w, [x]), key, 3, basis_size=15)
    shards, append = set(), block_lanczos.BlockLanczos._append

    def watched(self, block):
        append(self, block)
        shards.update(
            shard.data.size for chunk in self._basis.chunks for shard in chunk.addressable_shards
        )

    monkeypatch.setattr(block_lanczos.BlockLanczos, "_append", watched)
    space = top(hd.Hessian(loss, sharded, [everywhere]), key, 3, basis_size=15)
    assert shards == {lanczos.CHUNK * 512}
    assert {shard.data.shape for shard in space.vectors.addressable_shards} == {(3, 512)}
    np.testing.assert_allclose(space.values, alone.values, atol=1e-5 * np.abs(alone.values).max())
    assert hd.overlap(
        rows(space).astype(np.float32), rows(alone).astype(np.float32)
    ) == pytest.approx(1, abs=1e-5)


def test_compilation_does_not_grow_with_the_steps(key):
    operator = operator_of(spectra.ORDINARY["linear"], np.float32)
    kernels = [bases.as_chunk, bases.first_row, bases.write_row, trees.norm, trees.normalize]
    kernels += [orthogonalize._gram, orthogonalize._rotate]
    top(operator, key, 8, basis_size=30, max_matvecs=40)
    before = [kernel._cache_size() for kernel in kernels]
    top(operator, key, 8, basis_size=60, max_matvecs=120)
    assert [kernel._cache_size() for kernel in kernels] == before


def test_a_search_for_copies_is_short_where_nothing_is_near(key):
    values = np.concatenate(
        [0.01 * np.random.default_rng(0).standard_normal(196), [4.0, 6.0, 8.0, 10.0]]
    )
    operator = operator_of(values, np.float32)
    single = top(operator, key, 4, block_size=1).num_matvecs
    assert (
        single <= 8 + restarted._FEWEST
    )  # four pairs, some steps to tell them from the bulk, and the search
    doubled = np.concatenate([values[:195], [10.0], values[196:]])
    np.testing.assert_allclose(
        top(operator_of(doubled, np.float32), key, 4, block_size=1).values,
        [10, 10, 8, 6],
        atol=1e-4,
    )
