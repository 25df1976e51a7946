"""Kronecker factors are the means over examples of x x^T and of second derivatives by outputs."""

import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import layer_models
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from networks import true_tanh

import hessdensity as hd
from hessdensity import losses
from hessdensity.layers import kronecker, kronecker_products, output_hessians
from hessdensity.layers.kronecker_products import top_products
from hessdensity.losses.total import as_total
from hessdensity.vectors import trees


@pytest.fixture(autouse=True)
def double():
    """All of this is compared in float64, but for one test."""
    with jax.enable_x64(True):
        yield


@dataclass(frozen=True)
class Case:
    """A model twice: as a user writes it, and with its inputs and taps in plain sight.

    ``run(params, x, taps)`` returns the outputs, and the input of each layer as
    (*stack, groups, examples, positions, n). It adds taps (*stack, groups, examples, positions, m).
    """

    outputs: Any
    run: Any
    params: Any
    batch: Any
    criterion: Any = losses.cross_entropy
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """(*stack, groups, positions, m) of each layer."""

    @property
    def loss(self):
        return hd.compose(self.outputs, self.criterion)

    def factors(self, **settings):
        data = settings.pop("data", [self.batch])
        return hd.kronecker_factors(self.loss, self.params, data, **settings)


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.standard_normal(shape), jnp.zeros(0).dtype)


def integers(*shape, below):
    return jnp.asarray(np.random.default_rng(shape).integers(0, below, shape), jnp.int32)


# The models ---------------------------------------------------------------------------------------


def affine(params, name, x, taps):
    """x (examples, positions, n) times the kernel, plus the bias and the tap of a layer."""
    return x @ params[name] + params[f"{name}_bias"][None, None] + taps[name][0]


def mlp_run(activation, params, x, taps):
    first = x[:, None]
    second = activation(affine(params, "first", first, taps))
    outputs = affine(params, "second", second, taps)[:, 0]
    return outputs, {"first": first[None], "second": second[None]}


def mlp_outputs(activation, params, x):
    hidden = activation(x @ params["first"] + params["first_bias"][None])
    return hidden @ params["second"] + params["second_bias"][None]


def mlp(activation=jax.nn.relu, classes=3, examples=7):
    params = {
        "first": normal(4, 5),
        "first_bias": normal(5),
        "second": normal(5, classes),
        "second_bias": normal(classes),
    }
    batch = normal(examples, 4, seed=1), integers(examples, below=classes)
    return Case(
        partial(mlp_outputs, activation),
        partial(mlp_run, activation),
        params,
        batch,
        shapes={"first": (1, 1, 5), "second": (1, 1, classes)},
    )


def conv_outputs(groups, params, x):
    dims = ("NHWC", "HWIO", "NHWC")
    z = lax.conv_general_dilated(
        x, params["conv"], (2, 2), "VALID", dimension_numbers=dims, feature_group_count=groups
    )
    return jax.nn.relu(z).reshape(len(x), -1) @ params["head"]


def conv_run(groups, params, x, taps):
    kernel = params["conv"]  # (2, 2, c, groups * m)
    _, _, c, out = kernel.shape
    corners = [(i, j) for i in (0, 2) for j in (0, 2)]
    # A patch has its features first, then its rows and columns.
    patches = jnp.stack([x[:, i : i + 2, j : j + 2] for i, j in corners], axis=1)
    patches = jnp.transpose(patches, (0, 1, 4, 2, 3)).reshape(len(x), 4, groups, c * 4)
    patches = jnp.moveaxis(patches, 2, 0)
    matrix = jnp.transpose(kernel, (2, 0, 1, 3)).reshape(c * 4, groups, out // groups)
    z = jnp.einsum("gbpn,ngm->gbpm", patches, matrix) + taps["conv"]
    hidden = jax.nn.relu(jnp.moveaxis(z, 0, 2)).reshape(len(x), -1)
    outputs = hidden @ params["head"] + taps["head"][0, :, 0]
    return outputs, {"conv": patches, "head": hidden[None, :, None]}


def conv(groups):
    features = 4
    params = {"conv": normal(2, 2, features // groups, 2 * groups), "head": normal(8 * groups, 3)}
    batch = normal(5, 4, 4, features, seed=1), integers(5, below=3)
    shapes = {"conv": (groups, 4, 2), "head": (1, 1, 3)}
    return Case(
        partial(conv_outputs, groups), partial(conv_run, groups), params, batch, shapes=shapes
    )


def stack_outputs(params, x):
    def layer(x, kernel):
        return x + jax.nn.relu(x @ kernel), None

    return lax.scan(layer, x, params["stack"])[0] @ params["head"]


def stack_run(params, x, taps):
    inputs = []
    for kernel, tap in zip(params["stack"], taps["stack"], strict=True):
        inputs.append(x)
        x = x + jax.nn.relu(x @ kernel + tap[0, :, 0])
    outputs = x @ params["head"] + taps["head"][0, :, 0]
    stacked = jnp.stack(inputs)[:, None, :, None]
    return outputs, {"stack": stacked, "head": x[None, :, None]}


def stack():
    params = {"stack": normal(3, 4, 4), "head": normal(4, 3)}
    batch = normal(6, 4, seed=1), integers(6, below=3)
    shapes = {"stack": (3, 1, 1, 4), "head": (1, 1, 3)}
    return Case(stack_outputs, stack_run, params, batch, shapes=shapes)


def shared_outputs(params, x):
    return sum(jax.nn.relu(view @ params["w"]) for view in (x, x[:, ::-1])) @ params["head"]


def shared_run(params, x, taps):
    views = jnp.stack([x, x[:, ::-1]], axis=1)
    hidden = jax.nn.relu(views @ params["w"] + taps["w"][0]).sum(1)
    outputs = hidden @ params["head"] + taps["head"][0, :, 0]
    return outputs, {"w": views[None], "head": hidden[None, :, None]}


def shared():
    params = {"w": normal(4, 5), "head": normal(5, 3)}
    batch = normal(6, 4, seed=1), integers(6, below=3)
    return Case(
        shared_outputs, shared_run, params, batch, shapes={"w": (1, 2, 5), "head": (1, 1, 3)}
    )


def token_outputs(fold, params, x):
    lead = (-1,) if fold else x.shape[:2]
    hidden = jax.nn.relu(x.reshape(*lead, x.shape[-1]) @ params["w"])
    return (hidden @ params["head"]).reshape(*x.shape[:2], -1)


def token_run(params, x, taps):
    hidden = jax.nn.relu(x @ params["w"] + taps["w"][0])
    return hidden @ params["head"] + taps["head"][0], {"w": x[None], "head": hidden[None]}


def tokens(fold):
    params = {"w": normal(4, 5), "head": normal(5, 3)}
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    batch = normal(5, 4, 4, seed=1), integers(5, 4, below=3), jnp.asarray(mask)
    return Case(
        partial(token_outputs, fold),
        token_run,
        params,
        batch,
        losses.next_token_cross_entropy,
        {"w": (1, 4, 5), "head": (1, 4, 3)},
    )


LINEAR_IN_PIECES = {
    "dense": mlp,
    "convolution": partial(conv, 1),
    "grouped convolution": partial(conv, 2),
    "scanned stack": stack,
    "shared layer": shared,
    "tokens with padding": partial(tokens, False),
    "folded tokens": partial(tokens, True),
}


def expected(case, kind="hessian"):
    """For each layer, (E[x x^T], E[M], E[x]) by one example at a time."""
    inputs, *targets = case.batch
    zeros = {name: jnp.zeros((*shape[:-2], 1, *shape[-2:])) for name, shape in case.shapes.items()}

    def one(x, targets):
        """(weight, inputs, M at each position) of one example."""
        x, targets = x[None], [target[None] for target in targets]

        def value(outputs):
            return as_total(case.criterion(outputs, *targets), (x, *targets))

        outputs = partial(lambda taps: case.run(case.params, x, taps)[0])
        if kind == "hessian":
            whole = jax.hessian(lambda taps: value(outputs(taps)).sum)(zeros)
            whole = {name: whole[name][name] for name in zeros}
        else:
            curvature = jax.hessian(lambda z: value(z).sum)(outputs(zeros))
            jacobian = jax.jacobian(outputs)(zeros)
            c = outputs(zeros).size
            flat = {name: leaf.reshape(c, -1) for name, leaf in jacobian.items()}
            whole = {n: g.T @ curvature.reshape(c, c) @ g for n, g in flat.items()}
        found = {}
        for name, zero in zeros.items():
            places, m = zero.size // zero.shape[-1], zero.shape[-1]
            square = whole[name].reshape(places, m, places, m)
            found[name] = jnp.einsum("imin->imn", square).reshape(*zero.shape, m)
        return value(outputs(zeros)).count, case.run(case.params, x, zeros)[1], found

    weights, x, m = jax.tree.map(
        np.asarray, jax.jit(lambda: lax.map(lambda pair: one(*pair), (inputs, list(targets))))()
    )
    examples, counted = weights.sum(), weights > 0
    result = {}
    for name in case.shapes:
        rows = x[name][counted]  # (example, *stack, groups, 1, positions, n)
        result[name] = (
            np.einsum("e...pi,e...pj->...ij", rows, rows)[..., 0, :, :] / examples,
            m[name][counted].mean(axis=(0, -3))[..., 0, :, :],
            rows.mean(axis=(0, -2))[..., 0, :],
        )
    return result


def assert_factors(found, wanted, allowed=1e-12):
    assert set(found.layers) == set(wanted)
    for name, (square, output, mean) in wanted.items():
        for ours, theirs in zip(
            (found.input[name], found.output[name], found.mean_input[name]),
            (square, output, mean),
            strict=True,
        ):
            assert ours.shape == theirs.shape
            assert np.abs(theirs).max() > 1e-3  # the comparison says something
            np.testing.assert_allclose(ours, theirs, atol=allowed * np.abs(theirs).max())


@pytest.mark.parametrize("name", LINEAR_IN_PIECES)
def test_factors_of_piecewise_linear_models_are_those_of_the_hessian(name):
    case = LINEAR_IN_PIECES[name]()
    found = case.factors()
    assert_factors(found, expected(case))
    # For a layer that is used twice, other pairs of positions belong to its Hessian too.
    assert found.exact == dict.fromkeys(case.shapes, True)


def test_in_float32_they_are_those_of_float64():
    wanted = expected(mlp())
    with jax.enable_x64(False):
        found = mlp().factors()
    assert_factors(found, wanted, 1e-5)


@pytest.mark.parametrize("kind", ["gauss-newton", "hessian"])
def test_behind_a_smooth_activation_the_two_kinds_differ(kind):
    case = mlp(jax.nn.gelu)
    found = case.factors(kind=kind)
    wanted = expected(case, kind)
    assert_factors(found, wanted)
    if kind == "gauss-newton":
        assert found.exact == {"first": False, "second": True}
        other = expected(case)["first"][1]
        assert np.linalg.norm(wanted["first"][1] - other) > 0.1 * np.linalg.norm(other)
    else:
        assert found.exact == {"first": None, "second": None}


@pytest.mark.parametrize("name", ["grouped convolution", "scanned stack", "tokens with padding"])
def test_hessian_products_on_taps_give_the_same_in_piecewise_linear_models(name):
    case = LINEAR_IN_PIECES[name]()
    assert_factors(case.factors(kind="hessian"), expected(case))


@pytest.mark.parametrize("kind", ["gauss-newton", "hessian"])
def test_a_custom_rule_without_forward_mode_gives_the_same(kind):
    # The same positions as those of tanh, of which the rule is the derivative.
    found, plain = (mlp(each).factors(kind=kind) for each in (true_tanh, jnp.tanh))
    for name in plain.layers:
        np.testing.assert_allclose(found.output[name], plain.output[name], atol=1e-14)
        if kind == "gauss-newton":
            assert found[name].deviation == pytest.approx(plain[name].deviation, abs=1e-12)


def test_a_layer_is_inexact_exactly_if_something_behind_it_bends():
    with jax.enable_x64(False):
        for name in ("stacked projections by index",):
            model = layer_models.MODELS[name]()
            loss = hd.compose(model.outputs, losses.cross_entropy)
            data = [(model.inputs, jnp.asarray(model.labels))]
            found = hd.kronecker_factors(loss, model.params, data)
            inexact = {path for path, exact in found.exact.items() if not exact}
            assert inexact == model.inexact, name
            assert str(found).count("Gauss-Newton is not the Hessian") == len(inexact)


def test_a_layer_used_twice_in_sequence_is_inexact():
    def outputs(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["w"]) @ p["w"]) @ p["head"]

    params = {"w": normal(4, 4), "head": normal(4, 3)}
    loss = hd.compose(outputs, losses.cross_entropy)
    found = hd.kronecker_factors(loss, params, [(normal(6, 4, seed=1), integers(6, below=3))])
    assert found.exact == {"w": False, "head": True}
    assert "used 2 times, each as further positions; Gauss-Newton is not" in str(found)


# Linear models with a squared error: the factors are everything -----------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_hessian_of_a_linear_model_is_the_kronecker_product(bias):
    params = {"w": normal(4, 3), "w_bias": normal(3)}

    def outputs(p, x):
        return x @ p["w"] + p["w_bias"][None]

    loss = hd.compose(outputs, losses.mean_squared_error)
    x = normal(9, 4, seed=1)
    data = [(x[:6], normal(6, 3)), (x[6:], normal(3, 3))]
    found = hd.kronecker_factors(loss, params, data, bias=bias)
    hessian = hd.Hessian(loss, params, data, where=None if bias else "w")
    exact = hd.dense(hessian)
    np.testing.assert_allclose(hd.dense(found), exact, atol=1e-13)
    np.testing.assert_allclose(found.eigenvalues(), np.linalg.eigvalsh(exact)[::-1], atol=1e-12)
    # With the bias as the last row of W, it is kron(E[x x^T], E[M]), where M = 2/3 I.
    left = np.concatenate([x, np.ones((9, bias * 1))], axis=1)
    product = np.kron(left.T @ left / 9, np.eye(3) * 2 / 3)
    np.testing.assert_allclose(hd.dense(found), product, atol=1e-13)


# The same data in other batches, pieces, calls and places -----------------------------------------


@pytest.fixture(scope="module")
def whole():
    """The factors of an MLP with 40 outputs, in one batch."""
    with jax.enable_x64(True):
        case = mlp(classes=40, examples=21)
        return case, case.factors(across=True)


def cut(case, *ends):
    pieces = zip(*(jnp.split(leaf, ends) for leaf in case.batch), strict=True)
    return [tuple(piece) for piece in pieces]


def assert_same(found, other, allowed=1e-13):
    for name in other.layers:
        ours, theirs = found[name], other[name]
        for field_name in ("input", "output", "mean_input"):
            a, b = getattr(ours, field_name), getattr(theirs, field_name)
            np.testing.assert_allclose(a, b, atol=allowed * np.abs(b).max(), err_msg=field_name)
        assert ours.positions == pytest.approx(theirs.positions)
    scale = np.abs(other.across).max()
    np.testing.assert_allclose(found.across, other.across, atol=allowed * scale)


def test_forty_outputs_in_several_calls_are_exact(whole):
    # Three calls of fourteen rows, the last two of which are none.
    case, found = whole
    assert_factors(found, expected(case))


def test_ragged_batches_and_pieces_of_batches_give_what_one_batch_gives(whole):
    case, found = whole
    assert_same(case.factors(across=True, data=cut(case, 13, 15), microbatch=4), found)


def test_eight_devices_give_what_one_gives(whole):
    case, found = whole
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(case.params, everywhere)
    columns = NamedSharding(mesh, PartitionSpec(None, "data"))
    params["second"] = jax.device_put(case.params["second"], columns)
    placed = Case(case.outputs, case.run, params, case.batch)
    spread = placed.factors(across=True)  # of 21 examples, five go to every device
    assert_same(spread, found)
    assert spread.exact == found.exact
    products = spread @ params, found @ case.params
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-13), *products)


def test_across_layers_the_blocks_on_the_diagonal_are_those_of_each_layer(whole):
    _, found = whole
    assert found.across.shape == (45, 45)
    np.testing.assert_allclose(found.across, found.across.T, atol=1e-15)
    for name, own in {"first": slice(0, 5), "second": slice(5, 45)}.items():
        np.testing.assert_allclose(found.across[own, own], found.output[name][0], atol=1e-15)
    assert np.linalg.eigvalsh(found.across).min() > -1e-12


def test_across_layers_positions_are_summed_before_the_square():
    case = conv(2)
    found = case.factors(across=True, where="*")
    x, *targets = case.batch
    zeros = {n: jnp.zeros((*s[:-2], 1, *s[-2:])) for n, s in case.shapes.items()}

    @jax.jit
    @jax.vmap
    def one(x, target):
        def value(shifts):  # one for each output of a layer, at all positions
            taps = {
                name: jnp.broadcast_to(shifts[name][:, None, None], zeros[name].shape)
                for name in zeros
            }
            outputs, _ = case.run(case.params, x[None], taps)
            return case.criterion(outputs, target[None])

        second = jax.hessian(value)({"conv": jnp.zeros((2, 2)), "head": jnp.zeros((1, 3))})
        return jnp.block(
            [[second[a][b].reshape(4 - (a == "head"), -1) for b in zeros] for a in zeros]
        )

    np.testing.assert_allclose(found.across, one(x, targets[0]).mean(0), atol=1e-14)


# Samples ------------------------------------------------------------------------------------------


def assert_unbiased(samples, exact):
    samples = np.array(samples)
    error = np.linalg.norm(samples.std(axis=0, ddof=1)) / np.sqrt(len(samples))
    assert np.linalg.norm(samples.mean(axis=0) - exact) < 2 * error
    assert error < 0.3 * np.linalg.norm(exact)  # the comparison says something


def test_sampled_rows_are_unbiased():
    case = mlp()
    exact = case.factors()
    found = [
        case.factors(num_samples=20, key=jax.random.key(seed), data=cut(case, 3))
        for seed in range(12)
    ]
    for name in exact.layers:
        assert_unbiased([each.output[name] for each in found], exact.output[name])
        np.testing.assert_allclose(found[0].input[name], exact.input[name], atol=1e-13)
    assert found[0].description["num_samples"] == 20


def test_random_signs_over_positions_are_unbiased():
    case = shared()  # whose two positions are coupled
    exact = expected(case)
    found = [
        case.factors(kind="hessian", num_samples=3, key=jax.random.key(seed)) for seed in range(12)
    ]
    assert_unbiased([each.output["w"] for each in found], exact["w"][1])
    # Where an example has one position, the signs leave nothing out.
    np.testing.assert_allclose(found[0].output["head"], exact["head"][1], atol=1e-14)


def test_many_outputs_do_not_matter_for_random_signs(monkeypatch):
    monkeypatch.setattr(kronecker, "_MOST_ROWS", 2)
    case = mlp()
    with pytest.raises(ValueError, match=r"an example has 3 outputs.*Give num_samples="):
        case.factors()
    found = case.factors(kind="hessian")
    np.testing.assert_allclose(found.output["second"], expected(case)["second"][1], atol=1e-14)


# What is refused ----------------------------------------------------------------------------------


def whole_batch(outputs, labels):
    """A criterion in which the examples depend on each other."""
    return losses.cross_entropy(outputs - outputs.mean(0, keepdims=True), labels)


def hinge(outputs, labels):
    return jnp.mean(jax.nn.relu(1 - outputs[:, 0]) ** 2)


@pytest.mark.parametrize(
    ("error", "settings", "said"),
    [
        (ValueError, {"kind": "fisher"}, "kind='fisher', expected 'gauss-newton' or 'hessian'"),
        (ValueError, {"num_samples": 0}, "num_samples=0, expected a whole number of at least 1"),
        (
            ValueError,
            {"kind": "hessian", "num_samples": -1},
            "num_samples=-1, expected a whole number of at least 1",
        ),
        (TypeError, {"key": 3}, "key is a int; expected a JAX random key"),
        (ValueError, {"where": "third"}, "where='third' matches no leaf. The paths are:\n  first"),
        (ValueError, {"where": "*_bias"}, "first_bias: bias of first"),
    ],
)
def test_settings_out_of_range_are_refused(error, settings, said):
    with pytest.raises(error, match=said):
        mlp().factors(**settings)


def test_a_loss_in_one_piece_is_refused():
    case = mlp()
    with pytest.raises(TypeError, match=r"loss is a function, whose outputs and criterion are not"):
        hd.kronecker_factors(lambda p, b: case.loss(p, b), case.params, [case.batch])


def test_a_criterion_without_a_law_is_not_sampled():
    case = Case(mlp().outputs, None, mlp().params, mlp().batch, hinge)
    with pytest.raises(TypeError, match=r"'hinge' cannot be sampled.*one of losses.cross_entropy"):
        case.factors(num_samples=3)


def test_examples_that_depend_on_each_other_are_refused():
    case = Case(mlp().outputs, None, mlp().params, mlp().batch, whole_batch)
    with pytest.raises(
        ValueError, match=r"the mean loss is .*if the criterion gets one example at"
    ):
        case.factors()


def test_outputs_that_are_not_one_array_are_refused():
    def outputs(p, x):
        return {"logits": x @ p["w"]}

    def criterion(outputs, labels):
        return losses.cross_entropy(outputs["logits"], labels)

    case = Case(outputs, None, {"w": normal(4, 3)}, mlp().batch, criterion)
    with pytest.raises(TypeError, match=r"outputs returns a dict; expected one array, \(examples"):
        case.factors()


def test_a_model_without_layers_is_refused_with_its_leaves():
    def outputs(p, x):
        return x * p["scale"][None]

    batch = normal(7, 3), integers(7, below=3)
    case = Case(outputs, None, {"scale": normal(3)}, batch)
    with pytest.raises(
        ValueError, match=r"no linear layer whose kernel is a leaf(.|\n)*scale  mul"
    ):
        case.factors()


def test_more_hessian_products_than_anyone_wants_are_refused_by_layer(monkeypatch):
    monkeypatch.setattr(output_hessians, "_MOST_COLUMNS", 10)
    with pytest.raises(
        ValueError, match=r"layer 'conv' has 2 outputs at 8 positions.*takes 16 Hes"
    ):
        conv(2).factors(kind="hessian", where="conv")


@pytest.mark.parametrize(
    ("name", "place", "said"),
    [
        ("first", "batch", "The inputs of layer 'first' have 1 such entries."),
        ("first_bias", "params", "The inputs of layer 'second' have 7 such entries."),
        ("second_bias", "params", "The inputs of all layers are finite, so it is behind the last"),
    ],
)
def test_what_is_not_finite_is_found_in_the_first_layer_that_has_it(name, place, said):
    case = mlp()
    inputs, labels = case.batch
    params = dict(case.params)
    if place == "params":
        params[name] = params[name].at[0].set(jnp.nan)
    else:
        inputs = inputs.at[2, 1].set(jnp.inf)
    case = Case(case.outputs, case.run, params, (inputs, labels))
    with pytest.raises(FloatingPointError, match=rf"Kronecker factor.*batch 0.*\. {said}"):
        case.factors()


def test_a_batch_without_targets_is_refused():
    case = mlp()
    with pytest.raises(TypeError, match=r"a batch is a \w+; this loss expects \(inputs, targets\)"):
        case.factors(data=[case.batch[0]])


# The operator, with factors of any numbers --------------------------------------------------------


def any_factors(shapes, *, bias=True, positions=2.0):
    """Factors of dense layers {path: (n, m)} that no data have; E[M] is indefinite."""
    params = {name: jax.ShapeDtypeStruct(shape, float) for name, shape in shapes.items()}
    params |= {
        f"{name}_bias": jax.ShapeDtypeStruct(shape[1:], float) for name, shape in shapes.items()
    }
    params["unused"] = jax.ShapeDtypeStruct((2,), float)

    def outputs(p, x):
        return [x[name] @ p[name] + p[f"{name}_bias"][None] for name in shapes]

    inputs = {n: jax.ShapeDtypeStruct((3, shape[0]), float) for n, shape in shapes.items()}
    found = hd.find_layers(outputs, params, inputs)
    rng = np.random.default_rng(0)
    layers = {}
    for name, (n, m) in shapes.items():
        x = rng.standard_normal((40, n)) * np.geomspace(1, 0.03, n) + 0.5
        square = rng.standard_normal((m, m))
        layers[name] = hd.LayerFactors(
            layer=found[name],
            input=positions * (x.T @ x / 40)[None],
            output=(square + square.T)[None],
            mean_input=x.mean(0)[None],
            positions=positions,
            deviation=None,
            active_inputs=np.ones((1, n)),
        )
    return hd.KroneckerFactors(layers, params, bias)


SMALL = {"a": (4, 3), "b": (3, 2), "c": (1, 1)}


def exact_blocks(factors):
    """The dense matrix, whose blocks are np.kron of the factors, in the order of the tree."""
    paths, leaves = trees.paths(factors.like), jax.tree.leaves(factors.like)
    ends = dict(zip(paths, np.cumsum([leaf.size for leaf in leaves]), strict=True))
    size = dict(zip(paths, [leaf.size for leaf in leaves], strict=True))
    places = {path: np.arange(ends[path] - size[path], ends[path]) for path in paths}
    n = trees.size(factors.like)
    matrix = np.zeros((n, n))
    for name, own in factors.layers.items():
        biased = f"{name}_bias" in places
        order = np.concatenate([places[name], *([places[f"{name}_bias"]] if biased else [])])
        left = own.augmented() if biased else own.input
        matrix[np.ix_(order, order)] += np.kron(left[0], own.output[0])
    return matrix


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_dense_kronecker_products(bias, key):
    factors = any_factors(SMALL, bias=bias)
    exact = exact_blocks(factors)
    np.testing.assert_allclose(hd.dense(factors), exact, atol=1e-13)
    single = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), factors.like)
    assert jax.tree.map(jnp.shape, factors @ single) == jax.tree.map(jnp.shape, single)
    assert trees.paths(factors.like) == sorted([*SMALL, *(f"{n}_bias" for n in SMALL if bias)])
    hd.verify_operator(factors, key)


@pytest.mark.parametrize("bias", [True, False])
def test_eigenvalues_top_and_density_are_those_of_the_dense_matrix(bias):
    factors = any_factors(SMALL, bias=bias)
    exact = exact_blocks(factors)
    values = np.linalg.eigvalsh(exact)[::-1]
    assert values[-1] < -1  # it is indefinite
    scale = np.abs(values).max()
    np.testing.assert_allclose(factors.eigenvalues(), values, atol=1e-13 * scale)
    density = factors.density()
    assert density.trace().value == pytest.approx(values.sum())
    assert density.frobenius_norm().value == pytest.approx(np.linalg.norm(exact))
    for k in (1, 5, values.size):
        space = factors.top(k)
        np.testing.assert_allclose(space.values, values[:k], atol=1e-13 * scale)
        rows = trees.ravel(space.vectors).astype(float)
        np.testing.assert_allclose(rows @ rows.T, np.eye(k), atol=1e-12)
        np.testing.assert_allclose(rows @ exact, space.values[:, None] * rows, atol=1e-12 * scale)


def linear_factors(outputs, **shapes):
    """The factors of a function of parameters with these shapes, with random numbers in them."""
    params = {name: normal(*shape) for name, shape in shapes.items()}
    loss = hd.compose(outputs, losses.mean_squared_error)
    return hd.kronecker_factors(loss, params, [(normal(6, 4, seed=1), normal(6, 3))])


def test_parameters_may_be_one_bare_array():
    loss = hd.compose(lambda w, x: x @ w, losses.mean_squared_error)
    w, data = normal(4, 3), [(normal(6, 4, seed=1), normal(6, 3))]
    factors = hd.kronecker_factors(loss, w, data)
    exact = hd.dense(hd.Hessian(loss, w, data))
    np.testing.assert_allclose(hd.dense(factors), exact, atol=1e-13)
    np.testing.assert_allclose(factors.top(2).values, np.linalg.eigvalsh(exact)[:-3:-1])


def test_entries_in_no_layer_have_the_eigenvalue_zero():
    factors = linear_factors(lambda p, x: x @ p["w"][:4], w=(6, 3))
    values = np.linalg.eigvalsh(hd.dense(factors))[::-1]
    np.testing.assert_allclose(factors.eigenvalues(), values, atol=1e-13)
    np.testing.assert_allclose(factors.top(12).values, values[:12], atol=1e-13)
    with pytest.raises(ValueError, match="k=13, expected a whole number from 1 to 12"):
        factors.top(13)


def test_layers_that_share_entries_have_products_but_no_eigenvalues():
    def tied(p, x):
        return (x @ p["w"] @ p["w"].T)[:, :3]

    def same_bias(p, x):
        return (x @ p["v"] + p["b"][None]) @ p["w"] + p["b"][None]

    for factors, leaf in (
        (linear_factors(tied, w=(4, 5)), "w"),
        (linear_factors(same_bias, v=(4, 3), w=(3, 3), b=(3,)), "b"),
    ):
        assert np.abs(hd.dense(factors)).max() > 0.1
        for compute in (factors.eigenvalues, factors.density, lambda f=factors: f.top(1)):
            with pytest.raises(ValueError, match=rf"shares entries of '{leaf}' with another layer"):
                compute()


@pytest.mark.parametrize("k", [0, 27, -1])
def test_pairs_that_do_not_exist_are_refused(k):
    with pytest.raises(ValueError, match=f"k={k}, expected a whole number from 1 to 25"):
        any_factors(SMALL).top(k)


def test_a_restriction_has_fewer_layers_and_keeps_their_biases():
    factors = any_factors(SMALL)
    part = factors.restrict(lambda path: path in ("a", "a_bias", "c", "c_bias"))
    assert list(part.layers) == ["a", "c"]
    whole = exact_blocks(factors)
    own = np.array([n for n, path in enumerate(entries(factors.like)) if path[0] in "ac"])
    np.testing.assert_allclose(hd.dense(part), whole[np.ix_(own, own)], atol=1e-13)
    kernels = factors.restrict("b")
    assert trees.paths(kernels.like) == ["b"]
    np.testing.assert_allclose(
        hd.dense(kernels), np.kron(factors.input["b"][0], factors.output["b"][0]), atol=1e-13
    )
    assert hd.dense(hd.Restricted(factors, "b")) == pytest.approx(hd.dense(kernels))


def entries(like):
    """The path of the leaf of each entry."""
    return [
        path
        for path, leaf in zip(trees.paths(like), jax.tree.leaves(like), strict=True)
        for _ in range(leaf.size)
    ]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("d", "where='d' matches no leaf"),
        ("*_bias", r"where='\*_bias' matches no kernel. The layers are: a, b, c"),
        (
            lambda path: path in ("a", "b", "b_bias"),
            "kernel and bias of all its layers, or the ker",
        ),
        (lambda path: path in ("a", "b_bias"), "kernel and bias of all its layers, or the kernels"),
    ],
)
def test_a_restriction_that_is_not_made_of_layers_is_refused(where, said):
    with pytest.raises(ValueError, match=said):
        any_factors(SMALL).restrict(where)


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(KeyError, match=r"layer 'd' does not exist. The layers are: a, b, c"):
        any_factors(SMALL)["d"]


def test_the_description_is_json_and_print_shows_the_layers(whole):
    _, found = whole
    described = json.loads(json.dumps(found.describe()))
    assert described["kind"] == "Kronecker approximation"
    assert described["data"]["num_examples"] == 21
    assert "Kronecker factors of 2 layers, n = 265" in str(found)


# Large factors ------------------------------------------------------------------------------------


def spectrum(name, n, rng):
    """A symmetric matrix with named eigenvalues."""
    values = {
        "decaying": np.geomspace(10, 1e-5, n),
        "flat": rng.uniform(-1, 1, n),
        "rank ten": np.append(np.linspace(5, 6, 10), np.zeros(n - 10)),
        "copies": np.append([7.0] * 50 + [-7.0] * 40, rng.uniform(-1, 1, n - 90)),
        "zero": np.zeros(n),
        "one": np.append(3.0, np.zeros(n - 1)),
    }[name]
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (basis * values) @ basis.T, values


@pytest.mark.parametrize("k", [1, 30, 130])
@pytest.mark.parametrize("name", ["decaying", "flat", "rank ten", "copies", "zero", "one"])
def test_the_top_of_a_large_product_is_that_of_all_products(name, k, monkeypatch):
    monkeypatch.setattr(kronecker_products, "_DENSE", 50)
    monkeypatch.setattr(kronecker_products, "_BLOCK", 8)
    rng = np.random.default_rng(0)
    matrix, values = spectrum(name, 300, rng)
    right = rng.standard_normal((4, 4))
    right = right + right.T  # indefinite, so that a small eigenvalue may give a large product
    products = np.sort(np.outer(values, np.linalg.eigvalsh(right)), axis=None)[::-1][:k]
    for swapped in (False, True):
        found = top_products(*((right, matrix) if swapped else (matrix, right)), k)
        np.testing.assert_allclose([each[0] for each in found], products, atol=1e-10)
        for value, u, v in found:
            u, v = (v, u) if swapped else (u, v)
            residual = np.outer(matrix @ u, right @ v) - value * np.outer(u, v)
            allowed = 1e-6 * np.abs(values).max(initial=0.1) * np.linalg.norm(right, 2)
            assert np.linalg.norm(residual) <= allowed
            assert np.linalg.norm(np.outer(u, v)) == pytest.approx(1)


def test_more_pairs_than_there_are_are_all_of_them():
    values = np.arange(1.0, 4)
    found = top_products(np.diag(values), np.diag([1.0, -1.0]), 100)
    assert [round(each[0]) for each in found] == [3, 2, 1, -1, -2, -3]


def test_a_restriction_keeps_its_own_outputs_of_those_across_layers():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"a": jax.random.normal(keys[0], (4, 3)), "b": jax.random.normal(keys[1], (3, 2))}
    loss = hd.compose(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], losses.cross_entropy)
    batch = jax.random.normal(keys[2], (6, 4)), jax.random.randint(keys[3], (6,), 0, 2)
    factors = hd.kronecker_factors(loss, params, [batch], across=True)
    for path, outputs in (("a", slice(0, 3)), ("b", slice(3, 5))):
        part = factors.restrict(path)
        np.testing.assert_array_equal(part.across, factors.across[outputs, outputs])
        assert part.full_eigenspace(2).rank == 2
