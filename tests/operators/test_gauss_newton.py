"""Gauss-Newton products are J^T A J v, with the dense Jacobian of the outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from networks import true_tanh

import hessdensity as hd
from hessdensity import losses
from hessdensity.losses.kernels import FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE
from hessdensity.operators import gauss_newton
from hessdensity.vectors import trees


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.standard_normal(shape), jnp.zeros(0).dtype)


def network(activation):
    def outputs(p, x):
        return activation(x @ p["a"] + p["b"][None]) @ p["c"]

    return outputs


def params():
    return {"a": normal(4, 3), "b": normal(3), "c": normal(3, 3)}


def quartic(outputs, targets):
    """A criterion that is neither quadratic nor convex, with a weight for each example."""
    gaps = jnp.sum((outputs - targets) ** 2, axis=1)
    weights = jnp.arange(len(targets)).astype(gaps.dtype)
    return hd.Total(jnp.sum(weights * (gaps**2 - 5 * gaps)), jnp.sum(weights))


CRITERIA = {
    "cross-entropy": lambda: (
        losses.cross_entropy,
        jnp.asarray(np.arange(6) % 3, jnp.int32),
    ),
    "squared error": lambda: (losses.mean_squared_error, normal(6, 3, seed=1)),
    "quartic": lambda: (quartic, normal(6, 3, seed=1)),
}


def dense(loss, params, batch, mode):
    """The Gauss-Newton matrix of the mean, by products of a kernel."""
    like = trees.abstract(params)
    n = trees.size(like)
    block = trees.unravel(np.eye(n), like)

    @jax.jit
    def products(block):
        return gauss_newton.products(mode, loss, params, batch, block)

    total, found = products(block)
    return trees.ravel(found).astype(float) / float(total.count), total


def exact(loss, params, batch):
    flat, unravel = ravel_pytree(params)
    x, targets = batch

    def outputs(flat):
        return loss.outputs(unravel(flat), x)

    def criterion(z):
        value = loss.criterion(z, targets)
        return value.sum / value.count if isinstance(value, hd.Total) else value

    z = outputs(flat)
    jacobian = np.asarray(jax.jit(jax.jacobian(outputs))(flat)).reshape(z.size, -1)
    curvature = np.asarray(jax.jit(jax.hessian(criterion))(z)).reshape(z.size, z.size)
    return jacobian.T @ curvature @ jacobian


@pytest.mark.parametrize("mode", [FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE])
@pytest.mark.parametrize("name", CRITERIA)
def test_products_are_those_of_the_dense_matrix(name, mode):
    with jax.enable_x64(True):
        criterion, targets = CRITERIA[name]()
        loss, batch = hd.compose(network(jnp.tanh), criterion), (normal(6, 4, seed=2), targets)
        found, total = dense(loss, params(), batch, mode)
        wanted = exact(loss, params(), batch)
        np.testing.assert_allclose(found, wanted, atol=1e-13 * np.abs(wanted).max())
        mean = loss(params(), batch)
        mean = mean.sum / mean.count if isinstance(mean, hd.Total) else mean
        assert float(total.sum / total.count) == pytest.approx(float(mean))


def test_a_custom_rule_has_its_jacobian_by_transposing_twice():
    with jax.enable_x64(True):
        criterion, targets = CRITERIA["cross-entropy"]()
        batch = normal(6, 4, seed=2), targets
        loss = hd.compose(network(true_tanh), criterion)
        found, _ = dense(loss, params(), batch, REVERSE_OVER_REVERSE)
        wanted = exact(hd.compose(network(jnp.tanh), criterion), params(), batch)
        np.testing.assert_allclose(found, wanted, atol=1e-14)


def test_it_is_the_hessian_if_and_only_if_the_outputs_are_linear_in_pieces():
    criterion, targets = CRITERIA["cross-entropy"]()
    batch = normal(6, 4, seed=2), targets
    for activation, equal in ((jax.nn.relu, True), (jnp.tanh, False)):
        loss = hd.compose(network(activation), criterion)
        # Of the first layer alone, because a product of two layers is not linear in both.
        risk = hd.EmpiricalRisk(loss, params(), [batch], where="a")
        found, _ = dense(risk.loss, risk.params, batch, FORWARD_OVER_REVERSE)
        hessian = hd.dense(hd.Hessian(loss, params(), [batch], where="a"))
        gap = np.linalg.norm(found - hessian) / np.linalg.norm(hessian)
        assert (gap < 1e-5) if equal else (gap > 0.1)
