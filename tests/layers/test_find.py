"""Every linear layer is found with its inputs and its bias, and every other leaf has a reason."""

import jax
import jax.numpy as jnp
import layer_models
import numpy as np
import pytest
from flax import linen
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec
from layer_models import MODELS

import hessdensity as hd
from hessdensity.layers import tracing
from hessdensity.vectors import trees

RNG = np.random.default_rng(0)


def array(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def find(outputs, x=None, /, **shapes):
    """The layers of a function of parameters with these shapes, on 5 examples with 3 features."""
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return hd.find_layers(outputs, params, array(5, 3) if x is None else x)


def of(model):
    return hd.find_layers(model.outputs, model.params, model.inputs)


def uses_of(layers):
    return {use.name: use for layer in layers.values() for use in layer.uses}


def derivatives(outputs, params, x, uses):
    """Inputs of the uses, and derivatives of the summed squares of the outputs by their taps."""

    def run(taps):
        y, inputs = tracing.run_tapped(outputs, params, (x,), taps)
        return jnp.sum(y**2), inputs

    g, inputs = jax.jit(jax.grad(run, has_aux=True))(tracing.zero_taps(uses))
    return inputs, g


# What is found ------------------------------------------------------------------------------------


def test_a_convolution_and_a_dense_layer_are_described():
    layers = of(MODELS["strided convolution and max-pool"]())
    assert list(layers) == ["Conv_0/kernel", "Dense_0/kernel"]
    conv, dense = layers.values()
    assert (conv.kind, conv.inputs, conv.outputs, conv.positions) == ("convolution", 9, 2, 16)
    assert (dense.kind, dense.inputs, dense.outputs, dense.positions) == ("dense", 8, 3, 1)
    assert (conv.shape, dense.shape) == ((1, 9, 2), (1, 8, 3))
    assert [layer.bias for layer in layers.values()] == ["Conv_0/bias", "Dense_0/bias"]
    assert layers.others == {
        "Conv_0/bias": "bias of Conv_0/kernel",
        "Dense_0/bias": "bias of Dense_0/kernel",
    }


def test_groups_and_stacks_are_axes_of_the_matrices():
    assert of(MODELS["grouped convolution"]())["Conv_0/kernel"].shape == (2, 8, 2)
    assert of(MODELS["experts"]())["up"].shape == (2, 3, 4)
    (stack,) = (layer for layer in of(MODELS["linen scan"]()).values() if layer.stack)
    assert (stack.shape, stack.bias) == ((3, 1, 3, 3), "ScanBlock_0/Dense_0/bias")


def test_the_paths_of_an_nnx_model_are_those_of_its_attributes():
    layers = of(MODELS["NNX convolution and stored statistics"]())
    assert list(layers) == ["conv/kernel", "head/kernel"]
    assert layers["conv/kernel"].bias == "conv/bias"
    assert layers.others["norm/scale"] == "mul"


def test_a_shared_layer_is_one_layer_whose_positions_are_added():
    layers = find(lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["w"], w=(3, 3), b=(3,))
    assert list(layers) == ["w"]
    assert (layers["w"].num_uses, layers["w"].positions) == (2, 2)
    assert [use.name for use in layers["w"].uses] == ["w", "w#1"]
    both = of(MODELS["shared layer"]())["w"]
    assert (both.num_uses, both.positions, both.bias) == (2, 2, "b")


def test_the_steps_of_a_scan_that_shares_its_layer_are_positions():
    layer = of(MODELS["scan over tokens"]())["w"]
    assert (layer.num_uses, layer.positions, layer.stack) == (1, 4, ())


@pytest.mark.parametrize("name", ["stacked projections by index", "stacked projections by split"])
def test_parts_of_a_leaf_are_layers(name):
    layers = of(MODELS[name]())
    assert list(layers) == ["head", "qkv[0]", "qkv[1]", "qkv[2]"]
    assert {layer.leaf for layer in layers.values()} == {"head", "qkv"}
    assert layers["qkv[2]"].shape == (1, 3, 4)


WAYS = {
    "a jitted function": lambda w: jax.jit(lambda w: w)(w),
    "a rematerialized function": lambda w: jax.checkpoint(lambda w: w.T.T)(w),
    "a copy": jnp.array,
    "another type": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "a device": lambda w: jax.device_put(w, jax.devices()[0]),
    "a name for rematerialization": lambda w: checkpoint_name(w, "kernel"),
    "an optimization barrier": lambda w: lax.optimization_barrier((jnp.zeros(2), w))[1],
    "a callback": lambda w: (jax.debug.callback(lambda _: None, w), w)[1],
    "a flat array": lambda w: w.reshape(-1).reshape(3, 4),
    "a list of its columns": lambda w: w[:, ::-1][:, ::-1],
    "an outer axis": lambda w: jnp.unstack(w[None])[0],
    "the outputs of a scan": lambda w: lax.scan(lambda c, row: (c, row), 0.0, w)[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_kernel_is_followed_to_its_use_through(way):
    layers = find(lambda p, x: x @ WAYS[way](p["w"]), w=(3, 4))
    assert list(layers) == ["w"]
    kernel = array(3, 4)
    np.testing.assert_array_equal(layers["w"].matrix(jnp.asarray(kernel))[0], kernel)


def test_a_barrier_keeps_leaves_apart():
    def outputs(p, x):
        v, w = lax.optimization_barrier((p["v"], p["w"]))
        return x @ w @ v

    layers = find(outputs, w=(3, 4), v=(4, 2))
    assert {path: layer.shape for path, layer in layers.items()} == {
        "v": (1, 4, 2),
        "w": (1, 3, 4),
    }


# Biases -------------------------------------------------------------------------------------------


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME")


BIASES = {
    "dense": (lambda p, x: x @ p["w"] + p["b"][None], (5, 3), (3, 4), (4,)),
    "convolution": (
        lambda p, x: conv(x, p["w"]) + p["b"][None, :, None, None],
        (5, 2, 4, 4),
        (3, 2, 2, 2),
        (3,),
    ),
    "vmapped dense": (
        lambda p, x: jax.vmap(lambda x: p["w"] @ x + p["b"])(x),
        (5, 3),
        (4, 3),
        (4,),
    ),
    "vmapped convolution": (
        lambda p, x: jax.vmap(lambda x: conv(x[None], p["w"])[0] + p["b"])(x),
        (5, 2, 4, 4),
        (3, 2, 2, 2),
        (3, 1, 1),
    ),
    "behind jit and remat": (
        lambda p, x: jax.checkpoint(jax.jit(jnp.matmul))(x, p["w"]) + p["b"][None],
        (5, 3),
        (3, 4),
        (4,),
    ),
    "in a shared step": (
        lambda p, x: lax.scan(lambda c, _: (c @ p["w"] + p["b"][None], None), x, None, 3)[0],
        (5, 3),
        (3, 3),
        (3,),
    ),
    "of experts": (
        lambda p, x: jnp.einsum("ebd,edh->ebh", jnp.stack([x, x]), p["w"]) + p["b"][:, None],
        (5, 3),
        (2, 3, 4),
        (2, 4),
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_is_found(name):
    outputs, x, w, b = BIASES[name]
    layers = find(outputs, array(*x), w=w, b=b)
    assert layers["w"].bias == "b"
    assert layers.others == {"b": "bias of w"}


NO_BIASES = {
    "a scalar": (lambda z, b: z + b, ()),
    "an embedding of positions": (lambda z, b: z + b[None], (4, 4)),
    "a row of an embedding": (lambda z, b: z + b[None, 0][None], (7, 4)),
    "one number for each position": (lambda z, b: z + b[None, :, None], (4,)),
    "something after a nonlinearity": (lambda z, b: jnp.tanh(z) + b[None, None], (4,)),
}


@pytest.mark.parametrize("name", NO_BIASES)
def test_something_else_that_is_added_is_not_a_bias(name):
    add, shape = NO_BIASES[name]
    layers = find(lambda p, x: add(x @ p["w"], p["b"]), array(5, 4, 3), w=(3, 4), b=shape)
    assert layers["w"].bias is None
    assert layers.others == {"b": "add"}


# Leaves that are no layer -------------------------------------------------------------------------


def in_while(p, x):
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ p["w"]), (0, x))[1]


def in_shard_map(p, x):
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(), PartitionSpec("a"))
    return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=specs, out_specs=specs[1])(x, p["w"])


REASONS = {
    "while": (in_while, "while"),
    "cond": (lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x), "cond"),
    "shard_map": (in_shard_map, "shard_map"),
    "an embedding": (lambda p, x: p["w"][x[:, 0].astype(int)], "gather"),
    "the scale of a normalization": (lambda p, x: (x[:, None] - x.mean()) * p["w"][None], "mul"),
    "a product of leaves": (lambda p, x: x @ (p["w"] @ p["w"].T), "dot_general"),
    "a kernel that is scaled": (lambda p, x: x @ jnp.tanh(p["w"]), "tanh"),
    "two operations": (lambda p, x: x @ jnp.tanh(p["w"]) + p["w"].max(), "tanh, reduce_max"),
    "a leaf that is not used": (lambda p, x: x, "not used"),
    "an output": (lambda p, x: (x, p["w"]), "returned by the model"),
    "a mean over the examples": (
        lambda p, x: x.mean(axis=0) @ p["w"],
        "no axis of its input holds the examples",
    ),
    "a map over the examples": (
        lambda p, x: lax.map(lambda row: row @ p["w"], x),
        "no axis of its input holds the examples",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_leaf_that_is_no_layer_has_a_reason(name):
    outputs, reason = REASONS[name]
    layers = find(outputs, w=(3, 3))
    assert not layers
    assert layers.others == {"w": reason}


def test_the_embedding_and_the_normalization_of_a_flax_model_have_reasons():
    class Tokens(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.LayerNorm()(linen.Embed(7, 3)(tokens))
            return linen.Dense(4)(x.mean(axis=1))

    tokens = np.zeros((5, 2), np.int32)
    params = jax.eval_shape(Tokens().init, jax.random.key(0), tokens)["params"]
    layers = hd.find_layers(lambda p, x: Tokens().apply({"params": p}, x), params, tokens)
    assert list(layers) == ["Dense_0/kernel"]
    assert layers.others == {
        "Dense_0/bias": "bias of Dense_0/kernel",
        "Embed_0/embedding": "gather",
        "LayerNorm_0/bias": "add",
        "LayerNorm_0/scale": "mul",
    }


# The axis of the examples -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "axis", "positions"),
    [
        ("folded tokens", 0, 4),
        ("as many tokens as examples", 0, 5),
        ("examples on the second axis", 1, 5),
        ("tokens behind features", 0, 4),
        ("layer over tokens", 0, 3),
        ("experts", 1, 1),
    ],
)
def test_the_axis_of_the_examples_is_found(name, axis, positions):
    model = MODELS[name]()
    path = "up" if name == "experts" else "w"
    layer = of(model)[path]
    (use,) = layer.uses
    assert (use.example_axis, layer.positions) == (axis, positions)

    def rows(x):
        _, inputs = tracing.run_tapped(model.outputs, model.params, (x,), {})
        return np.asarray(use.input_rows(inputs[path], len(x)))

    differs = rows(model.inputs) != rows(model.inputs.at[2].add(1.0))
    assert differs.shape[2] == positions
    assert list(np.flatnonzero(differs.any(axis=(0, 2, 3)))) == [2]


def test_a_model_that_accepts_one_number_of_examples_is_searched():
    layers = find(lambda p, x: x.reshape(5, 3) @ p["w"], w=(3, 4))
    assert layers["w"].positions == 1


# Taps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_taps_of_zeros_change_no_bit(name):
    model = MODELS[name]()
    taps = tracing.zero_taps(uses_of(of(model)))
    tapped, _ = tracing.run_tapped(model.outputs, model.params, (model.inputs,), taps)
    np.testing.assert_array_equal(tapped, model.outputs(model.params, model.inputs))


def test_a_tap_is_added_to_the_result_of_its_use():
    params, x = {"v": array(4, 2), "w": array(3, 4)}, array(5, 3)
    added = array(5, 4)

    def outputs(params, x, tap=0.0):
        return jnp.tanh(x @ params["w"] + tap) @ params["v"]

    tapped, inputs = tracing.run_tapped(outputs, params, (x,), {"w": jnp.asarray(added)})
    np.testing.assert_array_equal(tapped, outputs(params, x, added))
    np.testing.assert_array_equal(inputs["w"], x)
    np.testing.assert_array_equal(inputs["v"], jnp.tanh(x @ params["w"] + added))


def test_a_tap_in_a_scan_of_remat_is_added_to_its_own_step():
    model = MODELS["linen scan of remat"]()
    layers = of(model)
    (name,) = (path for path, layer in layers.items() if layer.stack)
    added = array(3, 1, 3)  # to the bias of each step
    taps = {name: jnp.asarray(np.broadcast_to(added, (3, 7, 3)))}
    tapped, _ = tracing.run_tapped(model.outputs, model.params, (model.inputs,), taps)
    moved = jax.tree.map(
        lambda path, leaf: leaf + added[:, 0] if path == layers[name].bias else leaf,
        trees.named(model.params),
        model.params,
    )
    np.testing.assert_allclose(tapped, model.outputs(moved, model.inputs), rtol=1e-5, atol=1e-6)
    assert np.abs(tapped - model.outputs(model.params, model.inputs)).max() > 0.1


@pytest.mark.parametrize("reverse", [False, True])
def test_scanned_layers_are_the_unrolled_ones(reverse):
    params, x = {"w": jnp.asarray(array(3, 4, 4))}, array(5, 4)

    def scanned(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"], reverse=reverse)[0]

    def unrolled(p, x):
        for layer in reversed(range(3)) if reverse else range(3):
            x = jnp.tanh(x @ p["w"][layer])
        return x

    one, several = (hd.find_layers(outputs, params, x) for outputs in (scanned, unrolled))
    assert one["w"].shape == (3, *several["w[0]"].shape)
    x_one, g_one = derivatives(scanned, params, x, uses_of(one))
    x_several, g_several = derivatives(unrolled, params, x, uses_of(several))
    (stack,) = one["w"].uses
    kernels = one["w"].matrix(params["w"])
    for layer in several.values():
        (use,) = layer.uses
        (number,) = np.flatnonzero(
            [np.array_equal(kernel, layer.matrix(params["w"])) for kernel in kernels]
        )
        for rows, of_stack, of_one in (
            ("input_rows", x_one["w"], x_several[use.name]),
            ("output_rows", g_one["w"], g_several[use.name]),
        ):
            np.testing.assert_allclose(
                getattr(stack, rows)(of_stack, 5)[number],
                getattr(use, rows)(of_one, 5),
                rtol=1e-5,
                atol=1e-6,
            )


# The call -----------------------------------------------------------------------------------------


def test_shapes_are_enough_and_nothing_is_allocated():
    def outputs(p, x):
        return jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"]

    huge = find(
        outputs,
        jax.ShapeDtypeStruct((64, 10**6), np.float32),
        w=(10**6, 10**8),
        b=(10**8,),
        v=(10**8, 10),
    )
    assert huge["w"].shape == (1, 10**6, 10**8)
    assert (huge["w"].bias, list(huge)) == ("b", ["v", "w"])


@pytest.mark.parametrize("name", ["linen scan", "stacked projections by split", "shared layer"])
def test_shapes_and_arrays_give_the_same_layers(name):
    model = MODELS[name]()
    shapes = jax.eval_shape(lambda tree: tree, model.params)
    inputs = jax.ShapeDtypeStruct(model.inputs.shape, model.inputs.dtype)
    described = hd.find_layers(model.outputs, shapes, inputs)
    found = of(model)
    assert str(found) == str(described)
    for one, other in zip(found.values(), described.values(), strict=True):
        assert (one.path, one.shape, one.positions) == (other.path, other.shape, other.positions)


def test_an_unknown_layer_is_answered_with_those_that_exist():
    layers = find(lambda p, x: x @ p["w"] @ p["v"], w=(3, 4), v=(4, 2))
    with pytest.raises(KeyError, match=r"layer 'head' does not exist.*v, w"):
        layers["head"]
    assert "head" not in layers


def test_inputs_with_different_numbers_of_examples_are_refused():
    params = {"w": array(3, 4)}
    with pytest.raises(ValueError, match=r"lengths \[\(4,\), \(5,\)\].*number of examples"):
        hd.find_layers(lambda p, x, y: x @ p["w"], params, array(5, 3), array(4, 3))
    with pytest.raises(ValueError, match="number of examples"):
        hd.find_layers(lambda p, x, y: x @ p["w"] * y, params, array(5, 3), np.float32(2))
    with pytest.raises(ValueError, match="params has no leaves"):
        hd.find_layers(lambda p, x: x, {}, array(5, 3))


def test_layers_are_printed_as_a_table():
    model = layer_models.low_rank()
    params = {**model.params, "unused": jnp.zeros(2)}
    layers = hd.find_layers(model.outputs, params, model.inputs)
    assert str(layers).splitlines() == [
        "4 linear layers",
        "  layer  kind   inputs  outputs  positions  copies  uses  bias",
        "  a      dense       4        2          1       1     1",
        "  b      dense       2        5          1       1     1",
        "  head   dense       5        3          1       1     1",
        "  w      dense       4        5          1       1     1",
        "1 other leaf",
        "  unused  not used",
    ]
    assert str(find(lambda p, x: x, w=(3, 4), v=(2,))).splitlines() == [
        "0 linear layers",
        "2 other leaves",
        "  v  not used",
        "  w  not used",
    ]
