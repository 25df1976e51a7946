"""Eigenspaces as objects, and the angles between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hessdensity as hd
from hessdensity.vectors import basis as bases
from hessdensity.vectors import trees
from hessdensity.vectors.random import random_block


def orthonormal(n, k, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, k)))[0]


def tree_of(columns, dtype):
    """A block of several leaves, a scalar among them, from columns (3000, k)."""
    rows = jnp.asarray(columns.T, dtype)
    return {"a": rows[:, :1000].reshape(-1, 10, 100), "b": rows[:, 1000:2999], "c": rows[:, 2999]}


def rotated(columns, angles, others):
    """Vectors at given angles to the first columns, in the planes that others span with them."""
    angles = np.asarray(angles)
    return np.cos(angles) * columns[:, : angles.size] + np.sin(angles) * others[:, : angles.size]


def space(values=(3.0, 2.0, 1.0), n=5):
    vectors = {"w": jnp.eye(n)[: len(values)]}
    return hd.Eigenspace(
        values, vectors, np.full(len(values), 1e-5), [True, False, True][: len(values)], 12, 3
    )


@pytest.mark.parametrize("ranks", [(6, 6), (9, 6), (6, 9), (1, 1)])
def test_the_angles_are_scipys_and_the_overlap_is_their_mean_squared_cosine(ranks, dtype):
    u, v = orthonormal(3000, ranks[0]), orthonormal(3000, ranks[1], seed=1)
    v = np.linalg.qr(v + 20 * u[:, :1])[0]  # one direction in common, nearly
    angles = np.sort(scipy.linalg.subspace_angles(u, v))
    ours = hd.principal_angles(tree_of(u, dtype), tree_of(v, dtype))
    np.testing.assert_allclose(ours, angles, atol=20 * np.finfo(dtype).eps)
    overlap = hd.overlap(tree_of(u, dtype), tree_of(v, dtype))
    assert overlap == pytest.approx(np.mean(np.cos(angles) ** 2), abs=5e-6)


def test_tiny_angles_are_exact_beside_large_ones(dtype):
    angles = np.array([0, 1e-6, 1e-6, 3e-5, 1e-3, 0.1, 0.7, 1.5])
    basis = orthonormal(3000, 30)
    v = rotated(basis, angles, basis[:, 10:]) @ orthonormal(8, 8)
    u = np.concatenate([basis[:, :8], basis[:, 25:27]], axis=1) @ orthonormal(10, 10)
    ours = hd.principal_angles(tree_of(v, dtype), tree_of(u, dtype))
    np.testing.assert_allclose(
        ours, angles, atol=2 * np.finfo(dtype).eps, rtol=30 * np.finfo(dtype).eps
    )


def test_the_overlap_depends_on_the_spaces_alone(key):
    u, v = orthonormal(200, 4), orthonormal(200, 7, seed=1)
    blocks = [jnp.asarray(x.T, jnp.float32) for x in (u, v, u @ orthonormal(4, 4))]
    assert hd.overlap(blocks[0], blocks[2]) == pytest.approx(1, abs=1e-6)
    assert hd.overlap(blocks[0], blocks[2]) <= 1
    assert hd.overlap(blocks[0], blocks[1]) == pytest.approx(
        hd.overlap(blocks[1], blocks[2]), abs=1e-6
    )
    assert hd.overlap(blocks[0], blocks[1]) == pytest.approx(
        np.linalg.norm(u.T @ v) ** 2 / 4, abs=1e-6
    )
    within = jnp.asarray(v[:, :3].T, jnp.float32)
    assert hd.overlap(within, blocks[1]) == pytest.approx(1, abs=1e-6)


def test_spaces_of_two_precisions_are_compared_in_the_finer():
    with jax.enable_x64(True):
        u, v = orthonormal(3000, 3), orthonormal(3000, 3, seed=1)
        mixed = hd.principal_angles(tree_of(u, np.float32), tree_of(v, np.float64))
        np.testing.assert_allclose(mixed, np.sort(scipy.linalg.subspace_angles(u, v)), atol=1e-6)


def test_spaces_of_different_operators_are_refused():
    u = space()
    with pytest.raises(ValueError, match="different operators: their vectors have structures"):
        hd.overlap(u, jnp.eye(5)[:2])
    with pytest.raises(ValueError, match=r"leaf 'w' is \(3, 5\) and \(3, 6\)"):
        hd.principal_angles(u, space(n=6))
    with pytest.raises(ValueError, match="expected at least one"):
        hd.overlap(u, u[np.zeros(3, bool)])


@pytest.mark.parametrize(
    ("index", "left"),
    [
        (slice(2), [3.0, 2.0]),
        (slice(None, None, -1), [3.0, 2.0, 1.0]),
        ([2, 0], [3.0, 1.0]),
        (np.array([-1]), [1.0]),
        (np.array([True, False, True]), [3.0, 1.0]),
    ],
)
def test_a_choice_of_pairs_is_an_eigenspace_and_descends(index, left):
    chosen = space()[index]
    assert chosen.values.tolist() == left
    assert chosen.rank == len(left) == chosen.vectors["w"].shape[0]
    assert (chosen.num_matvecs, chosen.num_passes, chosen.dimension) == (12, 3, 5)
    assert [int(row.argmax()) for row in chosen.vectors["w"]] == [3 - int(value) for value in left]


def test_what_is_no_choice_of_pairs_is_refused():
    with pytest.raises(TypeError, match=r"index 0 of an Eigenspace; expected a slice"):
        space()[0]
    with pytest.raises(IndexError):
        space()[[3]]
    with pytest.raises(IndexError):
        space()[np.array([True, False])]
    with pytest.raises(ValueError, match="chooses a pair twice"):
        space()[[1, 1]]


def test_an_eigenspace_cannot_be_changed_and_must_fit_together():
    u = space()
    with pytest.raises(AttributeError):
        u.values = np.zeros(3)
    with pytest.raises(ValueError, match="read-only"):
        u.values[0] = 7
    with pytest.raises(ValueError, match="in descending order"):
        space((1.0, 2.0))
    with pytest.raises(
        ValueError, match=r"residuals has shape \(2,\), expected \(rank,\), here \(1,\)"
    ):
        hd.Eigenspace([1.0], jnp.eye(3)[:1], [0.0, 0.0], [True], 1)
    with pytest.raises(
        ValueError, match=r"leaf 'w' has shape \(2, 5\), expected \(rank, ...\) with rank = 1"
    ):
        hd.Eigenspace([1.0], {"w": jnp.eye(5)[:2]}, [0.0], [True], 1)


def test_it_prints_its_pairs_and_what_they_cost():
    text = str(space())
    assert "n = 5: 2 of 3 pairs converged" in text
    assert "not converged" in text.splitlines()[3]
    assert text.endswith("spent 12 products in 3 passes")
    assert repr(space()) == "<Eigenspace of rank 3, 2 converged, n = 5>"


def test_sharded_vectors_stay_where_they_are():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    u, v = (orthonormal(4096, 3, seed).T.astype(np.float32) for seed in (0, 1))
    v[0] = np.cos(1e-4) * u[0] + np.sin(1e-4) * v[0]
    v = np.linalg.qr(v.T)[0].T
    columns = NamedSharding(mesh, PartitionSpec(None, "data"))
    placed = [jax.device_put(jnp.asarray(x), columns) for x in (u, v)]
    np.testing.assert_allclose(hd.principal_angles(*placed), hd.principal_angles(u, v), atol=1e-6)
    total = bases.combine(bases.chunks_of(placed[0]), np.ones((2, 3)), trees.one_of(placed[0]))
    assert {shard.data.shape for shard in total.addressable_shards} == {(2, 512)}
    np.testing.assert_allclose(total[1], u.sum(0), atol=1e-6)


def test_a_stacked_block_is_the_chunk_that_its_rows_make(key):
    like = {
        "a": jax.ShapeDtypeStruct((3, 2048), jnp.float32),
        "b": jax.ShapeDtypeStruct((), jnp.float32),
    }
    block = random_block(key, 0, 3, like)
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], block) for i in range(3)]
    chunk = bases.first_row(rows[0])
    for index in (1, 2):
        chunk = bases.write_row(chunk, rows[index], index)
    jax.tree.map(np.testing.assert_array_equal, bases.as_chunk(block), chunk)
