"""Inputs and derivatives of every layer, in the matrix view, make up its Hessian."""

import jax
import jax.numpy as jnp
import layer_models
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hessdensity as hd
from hessdensity.layers import tracing
from hessdensity.vectors import trees


def recorded(model):
    """(layers, x, g): inputs of all uses, and derivatives by their taps for each class.

    The derivatives are of the logits times the root of the criterion's second derivative.
    """
    layers = hd.find_layers(model.outputs, model.params, model.inputs)
    uses = {use.name: use for layer in layers.values() for use in layer.uses}

    examples = len(model.inputs)

    @jax.jit
    def record(params, x):
        def run(taps):
            return tracing.run_tapped(model.outputs, params, (x,), taps)

        logits, pullback, inputs = jax.vjp(run, tracing.zero_taps(uses), has_aux=True)
        p = jax.nn.softmax(logits)
        # Q = diag(sqrt p) (I - 1 p^T), whose Q^T Q is the Hessian of the cross-entropy.
        roots = jnp.sqrt(p)[:, :, None] * (jnp.eye(p.shape[1], dtype=p.dtype)[None] - p[:, None])
        (derivatives,) = jax.vmap(pullback)(jnp.moveaxis(roots, 1, 0))
        x = {name: use.input_rows(inputs[name], examples) for name, use in uses.items()}
        g = {
            name: jax.vmap(lambda rows, use=use: use.output_rows(rows, examples))(derivatives[name])
            for name, use in uses.items()
        }
        return x, g

    x, g = jax.tree.map(np.asarray, record(model.params, model.inputs))
    return layers, x, g


def sum_of_squares(layer, x, g):
    """(stack, N, N): the layer's matrices of second derivatives, one for each slice of a stack.

    Positions are summed before the square is taken, over all uses of the layer.
    """
    num_examples = x[layer.uses[0].name].shape[-3]
    jacobian = sum(
        np.einsum("...gbpn,c...gbpm->cb...gnm", x[use.name], g[use.name]) for use in layer.uses
    )
    copies, columns = int(np.prod(layer.stack)), int(np.prod(layer.shape[-3:]))
    jacobian = jacobian.reshape(-1, copies, columns)
    return np.einsum("ksi,ksj->sij", jacobian, jacobian) / num_examples


def dense_hessians(model):
    """The Hessian of the mean cross-entropy, by pairs of entries of each leaf, by path."""
    flat, unravel = ravel_pytree(model.params)

    @jax.jit
    def hessian(flat):
        def loss(flat):
            logits = model.outputs(unravel(flat), model.inputs)
            chosen = jnp.take_along_axis(logits, jnp.asarray(model.labels)[:, None], axis=1)
            return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen[:, 0])

        return jax.hessian(loss)(flat)

    whole = np.asarray(hessian(flat))
    leaves = jax.tree.leaves(model.params)
    ends = np.cumsum([leaf.size for leaf in leaves])
    places = [slice(end - leaf.size, end) for end, leaf in zip(ends, leaves, strict=True)]
    paths = trees.paths(model.params)
    return {path: whole[own, own] for path, own in zip(paths, places, strict=True)}


def in_matrix_view(layer, hessian, leaf):
    """(stack, N, N): the part of a leaf's Hessian that belongs to each slice of the layer."""
    numbers = jnp.arange(leaf.size).reshape(leaf.shape)
    entries = np.asarray(jax.jit(layer.matrix)(numbers)).reshape(int(np.prod(layer.stack)), -1)
    return np.stack([hessian[np.ix_(own, own)] for own in entries])


def errors(model):
    """The relative error of each layer's sum of squares, by path."""
    layers, x, g = recorded(model)
    hessians = dense_hessians(model)
    leaves = dict(zip(hessians, jax.tree.leaves(model.params), strict=True))
    found = {}
    for path, layer in layers.items():
        exact = in_matrix_view(layer, hessians[layer.leaf], leaves[layer.leaf])
        difference = sum_of_squares(layer, x, g) - exact
        assert np.linalg.norm(exact) > 1e-3  # the comparison says something
        found[path] = np.linalg.norm(difference) / np.linalg.norm(exact)
    return found


def loose(name):
    return pytest.param(name, "float32", 1e-5, id=f"{name}, float32")


def tight(name):
    return pytest.param(name, "float64", 1e-12, id=f"{name}, float64")


IN_FLOAT64 = [
    "strided convolution and max-pool",
    "linen scan of remat",
    "attention",
    "nested scans",
]


@pytest.mark.parametrize(
    ("name", "precision", "allowed"),
    [*map(loose, layer_models.MODELS), *map(tight, IN_FLOAT64)],
)
def test_the_hessian_of_a_layer_is_a_sum_of_squares_of_inputs_times_derivatives(
    name, precision, allowed
):
    with jax.enable_x64(precision == "float64"):
        model = layer_models.MODELS[name]()
        assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {precision}
        found = errors(model)
    assert model.inexact < set(found)
    for path, error in found.items():
        if path in model.inexact:
            assert error > 0.1, path  # the Gauss-Newton matrix is not the Hessian there
        else:
            assert error <= allowed, path
