"""Vector algebra on trees: exact where it can be, bounded where it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hessdensity.vectors import basis as bases
from hessdensity.vectors import fingerprint as _identity
from hessdensity.vectors import trees
from hessdensity.vectors.random import random_block

# Lengths that no factor divides, more than one long axis, scalars, empty leaves.
SHAPES = [(1_000_003,), (1_000_000,), (50_021, 3), (7, 1031), (3, 3, 64, 32), (), (0, 4), (1,)]


def block(shape, count, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, *shape)), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inner_products_and_norms_are_those_of_float64(shape, dtype):
    a, b = block(shape, 2, dtype, 0), block(shape, 2, dtype, 1)
    rows, columns = (np.asarray(x, float).reshape(2, -1) for x in (a, b))
    tolerance = 8 * np.finfo(dtype).eps * (1 + np.linalg.norm(rows) * np.linalg.norm(columns))
    np.testing.assert_allclose(
        trees.inner({"w": a}, {"w": b}), (rows * columns).sum(1), atol=tolerance
    )
    np.testing.assert_allclose(
        trees.norm([a, b]), np.linalg.norm(np.hstack([rows, columns]), axis=1), rtol=1e-6
    )


def test_a_long_float32_sum_of_one_sign_keeps_its_digits():
    ones = jnp.full((1, 1_000_003), 0.1, jnp.float32)
    exact = 1_000_003 * np.float64(np.float32(0.1)) ** 2
    assert abs(float(jax.jit(trees.inner)(ones, ones)[0]) / exact - 1) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_neither_underflow_nor_overflow(size):
    assert float(trees.norm(jnp.full((1, 4), size, jnp.float32))[0]) == pytest.approx(
        2 * size, rel=1e-6
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chunks_products_and_combinations_are_those_of_its_rows(shape, dtype):
    rows = [block(shape, 2, dtype, seed) for seed in range(3)]
    vector = {"w": block(shape, 2, dtype, 9)}
    chunk = bases.first_row({"w": rows[0]})
    for index in (1, 2):
        chunk = bases.write_row(chunk, {"w": rows[index]}, index)
    basis = np.stack([np.asarray(row, float).reshape(2, -1) for row in rows], axis=1)
    flat = np.asarray(vector["w"], float).reshape(2, -1)
    coefficients, expected = (
        bases.inner_products(chunk, vector),
        np.einsum("kcn,kn->kc", basis, flat),
    )
    scale = 1 + np.linalg.norm(basis) * np.linalg.norm(flat)
    np.testing.assert_allclose(coefficients[:, :3], expected, atol=8 * np.finfo(dtype).eps * scale)
    assert not np.asarray(coefficients[:, 3:]).any()
    factors = jnp.asarray([[1.0, -2.0, 0.5, 7.0], [0.0, 1.0, 3.0, 7.0]], dtype)
    left = bases.subtract_combination(vector, factors, chunk)["w"].reshape(2, -1)
    combination = np.einsum("kc,kcn->kn", np.asarray(factors, float)[:, :3], basis)
    np.testing.assert_allclose(left, flat - combination, atol=100 * np.finfo(dtype).eps)


def test_random_vectors_are_on_the_sphere_and_each_depends_on_its_own_index(key, dtype):
    like = {"a": jax.ShapeDtypeStruct((30, 20), dtype), "b": jax.ShapeDtypeStruct((7,), dtype)}
    three = random_block(key, 0, 3, like)
    np.testing.assert_allclose(trees.norm(three), 1, rtol=1e-6)
    alone = random_block(key, 2, 1, like)
    for a, b in zip(jax.tree.leaves(three), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a[2:], b)
    gram = trees.ravel(three) @ trees.ravel(three).T
    assert np.abs(gram - np.eye(3)).max() < 0.2


def test_ravel_and_unravel_are_inverses(key, dtype):
    like = {"a": jax.ShapeDtypeStruct((3, 2), dtype), "b": [jax.ShapeDtypeStruct((), dtype), None]}
    rows = np.arange(14, dtype=dtype).reshape(2, 7)
    np.testing.assert_array_equal(trees.ravel(trees.unravel(rows, like)), rows)


def test_a_fingerprint_sees_values_names_and_places_but_not_shardings():
    x = jnp.arange(64, dtype=jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    same = _identity.fingerprint({"w": x})
    assert _identity.fingerprint({"w": sharded}) == same
    others = [
        {"v": x},
        {"w": x[::-1]},
        {"w": x.at[3].add(1e-5)},
        {"w": x.reshape(8, 8)},
        {"w": x.astype(jnp.bfloat16)},
    ]
    assert len({same, *map(_identity.fingerprint, others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"a": jnp.ones((2, 3))}, "structure"),
        (
            {"a": jnp.ones((2, 3)), "b": jnp.ones(2)},
            r"'b' is float32\[2\], expected float32\[2, 4\]",
        ),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones((1, 4))}, r"'b' is float32\[1, 4\]"),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones((2, 4), jnp.complex64)}, "complex64"),
    ],
)
def test_a_block_of_the_wrong_structure_is_refused_by_leaf(wrong, said):
    like = {
        "a": jax.ShapeDtypeStruct((3,), jnp.float32),
        "b": jax.ShapeDtypeStruct((4,), jnp.float32),
    }
    with pytest.raises(ValueError, match=said):
        trees.as_block(wrong, like)
