"""Gram-Schmidt against a stored basis: the decomposition, whatever the block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessdensity.vectors import trees
from hessdensity.vectors.basis import Basis, chunks_of, coefficients
from hessdensity.vectors.orthogonalize import orthogonalize, orthonormalize, project_out
from hessdensity.vectors.random import random_block

N = 60


def orthonormal(rng, count, dtype, n=N):
    return np.linalg.qr(rng.standard_normal((n, count)))[0].T.astype(dtype)


def basis_of(rows):
    return Basis().extend(jnp.asarray(rows)) if len(rows) else Basis()


def decomposed(vectors, rows, key, n=N):
    """(W, remainder, along) of vectors in rows, against orthonormal rows."""
    like = jax.ShapeDtypeStruct((n,), vectors.dtype)
    block, norms = trees.unit(jnp.asarray(vectors))
    lengths = np.asarray(norms, float)
    drawn = iter(range(0, 10**6, 100))
    w, remainder, along = orthonormalize(
        block,
        basis_of(rows),
        np.diag(lengths),
        negligible=8 * np.finfo(vectors.dtype).eps * max(lengths.max(), 1e-30),
        room=n - len(rows),
        draw=lambda count: random_block(key, next(drawn), count, like),
    )
    return np.asarray(w, float), remainder, along


def cases(rng):
    q = orthonormal(rng, 20, float)
    generic = rng.standard_normal((5, N))
    twins = np.concatenate([generic[:2], generic[:2] + 1e-12, generic[2:3]])
    return {
        "generic": (generic, q),
        "no basis": (generic, q[:0]),
        "in the span": (rng.standard_normal((4, 20)) @ q, q),
        "almost in the span": (rng.standard_normal((4, 20)) @ q + 1e-6 * generic[:4], q),
        "equal": (np.repeat(generic[:1], 4, axis=0), q),
        "almost equal": (twins, q),
        "zeros": (np.zeros((3, N)), q),
        "zeros among others": (np.concatenate([generic[:2], np.zeros((2, N))]), q),
        "huge and tiny": (generic * 10.0 ** np.array([[8], [0], [-8], [4], [-4]]), q),
    }


NAMES = list(cases(np.random.default_rng(0)))


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_along_the_basis_and_along_an_orthonormal_rest(name, key, dtype):
    vectors, q = (part.astype(dtype) for part in cases(np.random.default_rng(0))[name])
    w, remainder, along = decomposed(vectors, q, key)
    eps = np.finfo(dtype).eps
    assert np.abs(w @ w.T - np.eye(len(w))).max() < 50 * eps
    assert np.abs(w @ q.T.astype(float)).max(initial=0) < 50 * eps
    found = along.T @ q.astype(float) + remainder.T @ w
    largest = np.linalg.norm(vectors.astype(float), axis=1).max()
    np.testing.assert_allclose(found, vectors, atol=100 * eps * max(largest, 1e-30))


@pytest.mark.parametrize("seed", range(20))
def test_where_the_space_ends_the_rest_is_all_of_it(seed, key):
    """Fewer dimensions are left than there are vectors, some of which are negligible."""
    rng = np.random.default_rng(seed)
    n, k = 6, 4
    room = int(rng.integers(1, k))
    q = orthonormal(rng, n - room, np.float32, n)
    vectors = rng.standard_normal((k, n)).astype(np.float32)
    vectors[1] = 0.5 * vectors[0]
    vectors[2] = rng.standard_normal(n - room).astype(np.float32) @ q
    w, remainder, along = decomposed(vectors, q, key, n)
    assert len(w) <= room
    found = along.T @ q + remainder.T @ w
    np.testing.assert_allclose(found, vectors, atol=1e-5)


def test_a_case_where_a_negligible_vector_meets_the_last_dimension(key):
    e1, e2, e3 = np.eye(3, dtype=np.float32)
    w, remainder, _ = decomposed(np.stack([e3, 0.5 * e3, e1]), np.stack([e1, e2]), key, 3)
    np.testing.assert_allclose(remainder.T @ w, np.stack([e3, 0.5 * e3, 0 * e3]), atol=1e-6)


def test_one_sweep_projects_out_and_returns_what_it_took(key, dtype):
    rng = np.random.default_rng(1)
    q, block = orthonormal(rng, 11, dtype), rng.standard_normal((3, N)).astype(dtype)
    left, parts = project_out(jnp.asarray(block), chunks_of(jnp.asarray(q)))
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(parts[:, :11], block @ q.T, atol=50 * eps)
    assert not parts[:, 11:].any()
    np.testing.assert_allclose(left, block - block @ q.T @ q, atol=100 * eps)
    np.testing.assert_allclose(coefficients(chunks_of(jnp.asarray(q)), left)[:, :11], 0, atol=1e-5)


def test_sweeps_are_repeated_where_they_cancel(key, dtype):
    """A vector that is almost in the span is orthogonal to it at the end, to rounding."""
    rng = np.random.default_rng(2)
    q = orthonormal(rng, 11, dtype)
    small = 1e-4 * rng.standard_normal((1, N)).astype(dtype)
    block = (rng.standard_normal((1, 11)).astype(dtype) @ q + small).astype(dtype)
    left, removed, norms = orthogonalize(jnp.asarray(block), tuple(chunks_of(jnp.asarray(q))))
    assert removed[0] == pytest.approx(np.linalg.norm(block @ q.T), rel=1e-3)
    assert np.abs(np.asarray(left) @ q.T).max() < 20 * np.finfo(dtype).eps * norms[0]
