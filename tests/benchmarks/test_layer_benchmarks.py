"""The benchmarks of layers run at a tiny size, and what they compute is what they say."""

import jax
import numpy as np
import pytest

import hessdensity as hd
from benchmarks import block_spectra, layer_structure, output_eigenspace
from benchmarks.models.decoupling_networks import FullyConnected
from hessdensity import losses


@pytest.fixture(autouse=True)
def lenient(strict):
    """Flax and Optax promote dtypes; the strict world is the package's."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


# The output eigenspace ----------------------------------------------------------------------------


def test_rates_and_centering_improve_the_predicted_output_eigenspace():
    row = output_eigenspace.measure(64, 0, 512)
    paper, rates, centered = row["overlaps"].values()
    assert paper < rates < centered
    assert abs(paper - row["rates"]) < 0.08  # the expected overlap, up to the size
    assert 0 < row["gap"] < 1
    figure = output_eigenspace.draw([row])
    assert len(figure.axes[0].get_legend().get_texts()) == 3


# The structure of layers --------------------------------------------------------------------------


def random_images(network, size):
    rng = np.random.default_rng(0)
    shape = (28, 28) if network == "mlp" else (32, 32, 3)
    inputs = rng.standard_normal((size.train_images, *shape)).astype(np.float32)
    return inputs, rng.integers(0, 10, size.train_images)


def test_a_layer_is_compared_with_its_factors_and_with_another_model(monkeypatch, capsys):
    monkeypatch.setattr(layer_structure, "images_of", random_images)
    monkeypatch.setattr(
        layer_structure, "model_of", lambda *_: FullyConnected((6, 10), normalize=True)
    )
    size = layer_structure.Size(64, 2, 0.1, 0.9, 32, 32, 16, 8, 2, train_batch=32)
    models = [layer_structure.trained("mlp", True, seed, size) for seed in (0, 1)]
    factors = models[0].factors(across=False)
    assert list(factors.layers) == ["fc1/kernel", "fc2/kernel"]
    row = layer_structure.measure_layer(models[0], factors, "fc2/kernel", models[1], size)
    # The last layer's E[M] and its exact Hessian are those of softmax regression.
    assert row["exact_flag"]
    assert 0 < row["spectral"][0] < 1
    assert all(len(row[name]) == 8 for name in ("exact", "kronecker", "overlap", "models"))
    found = {
        "network": "mlp-bn",
        "accuracy": [model.accuracy for model in models],
        "loss": 1.0,
        "seconds": 1.0,
        "layers": [row],
    }
    layer_structure.report(found)
    assert "fc2" in capsys.readouterr().out
    assert len(layer_structure.draw(found).axes) == 4


@pytest.mark.parametrize(("network", "count"), [("lenet", 5), ("vgg11", 9), ("resnet18", 21)])
def test_batch_normalization_has_no_parameters_and_all_layers_are_found(network, count):
    model = layer_structure.model_of(network, True, 4)
    inputs, _ = random_images(
        network, layer_structure.SIZES["cpu"][network]._replace(train_images=8)
    )
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    assert all(path[-1].key in ("kernel", "bias") for path, _ in leaves(variables["params"]))
    found = hd.find_layers(lambda variables, x: model.apply(variables, x), variables, inputs)
    assert len(found) == count


def leaves(tree):
    return jax.tree.leaves_with_path(tree)


# The spectra of blocks ----------------------------------------------------------------------------


def test_the_divergence_is_0_for_equal_measures_and_1_for_disjoint_ones():
    one = np.array([0.0, 1.0]), np.array([0.5, 0.5])
    other = np.array([5.0]), np.array([1.0])
    half = np.array([0.0, 5.0]), np.array([0.5, 0.5])
    assert block_spectra.shannon_distance(one, one, 0.1) == pytest.approx(0, abs=1e-6)
    assert block_spectra.shannon_distance(one, other, 0.1) == pytest.approx(1, abs=1e-3)
    assert block_spectra.shannon_distance(one, half, 0.1) == pytest.approx(0.5, abs=1e-3)


def test_the_blocks_of_a_transformer_are_its_matrices(monkeypatch):
    text = np.random.default_rng(0).integers(0, 65, (4096, 9))
    monkeypatch.setattr(block_spectra, "shakespeare", lambda *_: (text[:, :-1], text[:, 1:]))
    args = block_spectra.parse(["--gpt-width=8", "--gpt-depth=1", "--gpt-steps=1", "--length=8"])
    problem = block_spectra.gpt(args)
    blocks = hd.BlockDiagonal(problem.hessians["trained"], problem.groups)
    attention = ("q 0", "k 0", "v 0", "out 0", "expand 0", "contract 0")
    assert list(blocks.groups) == ["tokens", "positions", *attention, "head"]
    count = sum(leaf.size for leaf in jax.tree.leaves(blocks.like))
    assert count == 8 * (65 + 8) + 4 * 64 + 2 * 8 * 32 + 8 * 65


def test_the_densities_of_blocks_are_compared(capsys):
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (4, 2)}
    params = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    data = [(np.eye(3, dtype=np.float32), np.array([0, 1, 1]))]
    loss = hd.compose(lambda p, x: jax.nn.tanh(x @ p["a"]) @ p["b"], losses.cross_entropy)
    hessian = hd.Hessian(loss, jax.tree.map(jax.numpy.asarray, params), data)
    found = block_spectra.measure(hessian, None, block_spectra.parse(["--num-steps=2"]))
    assert found["sizes"] == {"a": 12, "b": 8}
    assert 0 < found["cosine"][0] <= 1
    assert 0 < found["relative"][0][1] <= 1
    block_spectra.report("two layers", found)
    assert "two layers" in capsys.readouterr().out
    assert len(block_spectra.draw({"two layers": found}).axes) == 2
