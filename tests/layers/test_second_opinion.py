"""Kronecker factors are those of another library, written for another framework."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hessdensity as hd
from hessdensity import losses

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in shapes]


def theirs(module, loss, parameters, batch):
    """The dense matrix, in PyTorch's order of the parameters."""
    with torch.no_grad():
        for own, value in zip(module.parameters(), parameters, strict=True):
            own.copy_(torch.as_tensor(value))
    data = [tuple(torch.as_tensor(leaf) for leaf in batch)]
    operator = curvlinops.KFACLinearOperator(
        module,
        loss,
        list(module.parameters()),
        data,
        fisher_type="type-2",
        kfac_approx="expand",
        separate_weight_and_bias=False,
    )
    size = sum(own.numel() for own in module.parameters())
    return (operator @ torch.eye(size, dtype=torch.float64)).detach().numpy()


def ours(outputs, criterion, params, batch, order):
    """The dense matrix in an order of its entries."""
    factors = hd.kronecker_factors(hd.compose(outputs, criterion), params, [batch])
    matrix = hd.dense(factors)
    return matrix[np.ix_(order, order)]


def convolutional(params, x):
    dims = ("NCHW", "HWIO", "NCHW")
    z = lax.conv_general_dilated(x, params["conv"], (2, 2), "VALID", dimension_numbers=dims)
    hidden = jax.nn.relu(z + params["conv_bias"][None, :, None, None]).reshape(len(x), -1)
    return hidden @ params["head"] + params["head_bias"][None]


@pytest.mark.parametrize("name", ["cross-entropy", "squared error"])
def test_a_convolution_and_a_dense_layer_have_the_factors_of_kfac(name):
    conv, conv_bias, head, head_bias, x, y = arrays(
        (3, 2, 2, 2), (3,), (4, 12), (4,), (6, 2, 5, 5), (6, 4)
    )
    module = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 2, stride=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 4),
    ).double()
    labels = np.arange(6) % 4
    loss, criterion, targets = {
        "cross-entropy": (torch.nn.CrossEntropyLoss(), losses.cross_entropy, labels),
        "squared error": (torch.nn.MSELoss(), losses.mean_squared_error, y),
    }[name]
    expected = theirs(module, loss, [conv, conv_bias, head, head_bias], (x, targets))
    # Where each entry of PyTorch's parameters lies in ours, in the order of the tree.
    ends = np.cumsum([conv.size, conv_bias.size, head.size, head_bias.size])
    places = [
        np.arange(end - part.size, end).reshape(part.shape)
        for end, part in zip(
            ends, [np.transpose(conv, (2, 3, 1, 0)), conv_bias, head.T, head_bias], strict=True
        )
    ]
    order = np.concatenate(
        [
            np.transpose(places[0], (3, 2, 0, 1)).ravel(),
            places[1],
            places[2].T.ravel(),
            places[3],
        ]
    )
    with jax.enable_x64(True):
        params = {
            "conv": jnp.asarray(np.transpose(conv, (2, 3, 1, 0))),
            "conv_bias": jnp.asarray(conv_bias),
            "head": jnp.asarray(head.T),
            "head_bias": jnp.asarray(head_bias),
        }
        targets = jnp.asarray(targets, jnp.int32) if name == "cross-entropy" else targets
        found = ours(convolutional, criterion, params, (jnp.asarray(x), targets), order)
    np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(expected).max())
