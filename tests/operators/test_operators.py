"""Operators that are no Hessian, and what is asked of any."""

import jax
import jax.numpy as jnp
import named_spectra as spectra
import numpy as np
import pytest
import scipy.sparse.linalg

import hessdensity as hd


def random_symmetric(n, dtype, seed=0):
    a = np.random.default_rng(seed).standard_normal((n, n))
    return jnp.asarray(a + a.T, dtype)


def test_a_matrix_is_itself(dtype):
    array = random_symmetric(70, dtype)
    np.testing.assert_allclose(hd.dense(hd.Matrix(array)), array, atol=40 * np.finfo(dtype).eps)


@pytest.mark.parametrize("name", spectra.ALL)
def test_a_matrix_from_eigenvalues_has_them(name, key, dtype):
    values = spectra.ALL[name]
    matrix = hd.dense(hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key))
    tolerance = 60 * np.finfo(dtype).eps * np.abs(values).max()
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), np.sort(values), atol=tolerance)
    np.testing.assert_allclose(matrix, matrix.T, atol=tolerance)
    if values.size > 1 and np.ptp(values):
        assert np.abs(matrix - np.diag(np.diag(matrix))).max() > 1e-3 * np.abs(values).max()


def test_a_function_is_an_operator_on_its_own_trees_even_in_numpy(dtype):
    like = {"a": jnp.zeros((2, 2), dtype), "b": jnp.zeros(3, dtype)}

    def matvec(v):
        return {"a": np.asarray(v["a"]).T * 2, "b": np.asarray(v["b"])[::-1].copy()}

    operator = hd.FunctionOperator(matvec, like)
    expected = np.zeros((7, 7))
    expected[[0, 1, 2, 3], [0, 2, 1, 3]] = 2
    expected[[4, 5, 6], [6, 5, 4]] = 1
    np.testing.assert_array_equal(hd.dense(operator), expected)
    np.testing.assert_array_equal(hd.dense(hd.Restricted(operator, "b")), expected[4:, 4:])


def test_scipy_finds_the_same_extreme_eigenvalues_through_the_same_operator(key, dtype):
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(spectra.ORDINARY["outliers"], dtype), key)
    linear = hd.to_scipy(operator)
    assert linear.dtype == dtype
    np.testing.assert_allclose(
        linear @ np.eye(300, 2, dtype=dtype), hd.dense(operator)[:, :2], atol=1e-5
    )
    found = scipy.sparse.linalg.eigsh(
        linear, 4, which="LM", return_eigenvectors=False, v0=np.ones(300, dtype)
    )
    np.testing.assert_allclose(np.sort(found), [-3, 4, 7, 10], rtol=100 * np.finfo(dtype).eps)


def test_a_users_own_class_with_two_members_is_an_operator(key):
    class Twice:
        like = jax.ShapeDtypeStruct((20,), jnp.float32)

        def __matmul__(self, block):
            return 2 * block

    density = hd.spectral_density(Twice(), key, progress=False)
    assert density.nodes == pytest.approx(2)
    assert density.description["operator"] == {"kind": "Twice"}
    assert density.num_matvecs == 20  # the whole space
    np.testing.assert_array_equal(hd.dense(Twice()), 2 * np.eye(20))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (
            lambda: hd.Matrix(jnp.ones((2, 3))),
            ValueError,
            r"array is float32\[2, 3\]; expected a real .* \(n, n\)",
        ),
        (lambda: hd.Matrix(jnp.eye(2, dtype=int)), ValueError, "array is int32"),
        (lambda: hd.Matrix(jnp.array([[0.0, 1.0], [0.0, 0.0]])), ValueError, r"\(a \+ a.T\) / 2"),
        (
            lambda: hd.Matrix.from_eigenvalues(jnp.eye(2), jax.random.key(0)),
            ValueError,
            "values is float32",
        ),
        (lambda: hd.FunctionOperator(abs, {"w": jnp.arange(2)}), TypeError, "leaf 'w' is int32"),
        (
            lambda: hd.FunctionOperator(lambda v: v[:1], jnp.zeros(2)) @ jnp.ones(2),
            ValueError,
            "matvec's product",
        ),
        (lambda: hd.Restricted(hd.Matrix(jnp.eye(2)), "w"), ValueError, "matches no leaf"),
        (
            lambda: hd.dense(hd.Matrix(jnp.eye(30)), max_size=20),
            ValueError,
            "n = 30.*hd.spectral_density",
        ),
    ],
)
def test_an_operator_that_cannot_be_is_refused(make, error, said):
    with pytest.raises(error, match=said):
        make()
