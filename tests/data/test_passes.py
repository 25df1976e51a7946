"""One pass over the data: whatever can be iterated twice gives one Hessian, and whatever cannot is
refused."""

import itertools
import re
from collections import UserDict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hessdensity as hd
from hessdensity.data.passes import Passes

RNG = np.random.default_rng(0)
X = RNG.standard_normal((8, 3)).astype(np.float32)
Y = (RNG.random(8) < 0.5).astype(np.float32)
W = np.array([0.5, -1.0, 0.25], np.float32)
SLOPE = 1 / (1 + np.exp(-X.astype(float) @ W))
EXACT = X.T.astype(float) @ np.diag(SLOPE * (1 - SLOPE)) @ X / 8


def logistic(w, batch):
    """Logistic regression, whose Hessian X^T diag(s (1 - s)) X / N is known: EXACT."""
    x, y = batch
    return jnp.mean(jnp.logaddexp(x @ w, 0) - y * (x @ w))


def logistic_of_dict(w, batch):
    return logistic(w, (batch["x"], batch["y"]))


def cut(size=3, x=X, y=Y):
    """Batches of 3, 3 and 2 examples."""
    return [(x[i : i + size], y[i : i + size]) for i in range(0, 8, size)]


def dense(data, loss=logistic):
    return hd.dense(hd.Hessian(loss, W, data))


# hd.batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "lengths"), [(3, [3, 3, 2]), (4, [4, 4]), (100, [8]), (1, [1] * 8)]
)
def test_batches_are_the_arrays_in_order_and_the_last_one_is_what_remains(size, lengths):
    parts = hd.batches({"x": X, "more": (Y, jnp.arange(8))}, size)
    assert [len(part["x"]) for part in parts] == lengths
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    np.testing.assert_array_equal(whole["x"], X)
    np.testing.assert_array_equal(whole["more"][0], Y)
    np.testing.assert_array_equal(whole["more"][1], np.arange(8))


@pytest.mark.parametrize(
    ("arrays", "size", "error", "sentence"),
    [
        ((X, Y), 0, ValueError, "batch_size=0, expected a whole number of at least 1"),
        ((X, Y[:5]), 3, ValueError, "share their leading axis.*'0': 8, '1': 5"),
        ((X, 1.0), 3, TypeError, "leaf '1' is a float; expected arrays"),
        ((), 3, ValueError, "share their leading axis"),
    ],
)
def test_arrays_that_make_no_batches_are_refused(arrays, size, error, sentence):
    with pytest.raises(error, match=sentence):
        hd.batches(arrays, size)


# What can be iterated twice -----------------------------------------------------------------------


class Loader:
    """Iterates afresh every time; neither a length nor an index."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Indexed:
    """As a PyTorch dataset: a length and an index, which ends in an IndexError."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Sliced:
    """As a Keras sequence: its length alone says where it ends, for a slice beyond the end is
    empty, not an error."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        assert index < 10, "the length is not respected: this would go on for ever"
        return X[3 * index : 3 * index + 3], Y[3 * index : 3 * index + 3]


class Tensor:
    """An array of another library: `__array__` is all that JAX knows of it."""

    def __init__(self, array):
        self._array = array
        self.shape, self.dtype = array.shape, f"other.{array.dtype}"

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._array, dtype=dtype)


SOURCES = {
    "a list": cut,
    "a tuple of batches": lambda: tuple(cut()),
    "hd.batches": lambda: hd.batches((X, Y), 3),
    "an object with __iter__": lambda: Loader(cut()),
    "an object with __len__ and __getitem__": lambda: Indexed(cut()),
    "an object whose __len__ alone ends it": Sliced,
    "a loader of lists of tensors": lambda: Loader([[Tensor(x), Tensor(y)] for x, y in cut()]),
    "a dataset of tuples of tensors": lambda: Loader([(Tensor(x), Tensor(y)) for x, y in cut()]),
    "a function that returns a generator": lambda: lambda: (batch for batch in cut()),
    "a function that returns a list": lambda: cut,
    "batches on the device": lambda: jax.device_put(cut()),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_whatever_can_be_iterated_twice_gives_the_same_hessian(source):
    hessian = hd.Hessian(logistic, W, source())
    np.testing.assert_allclose(hd.dense(hessian), EXACT, atol=1e-6)
    np.testing.assert_allclose(hd.dense(hessian), EXACT, atol=1e-6)
    assert hessian.describe()["num_examples"] == 8


def test_batches_may_be_dicts():
    np.testing.assert_allclose(
        dense(hd.batches({"x": X, "y": Y}, 3), logistic_of_dict), EXACT, atol=1e-6
    )


def test_a_batch_without_examples_weighs_nothing():
    hessian = hd.Hessian(logistic, W, [*cut(), (X[:0], Y[:0])])
    np.testing.assert_allclose(hd.dense(hessian), EXACT, atol=1e-6)
    np.testing.assert_allclose(hd.dense(hessian), EXACT, atol=1e-6)
    assert np.isfinite(hessian.describe()["loss"])


def test_pytorch_loaders_work_as_they_are():
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    np.testing.assert_allclose(
        dense(torch.utils.data.DataLoader(dataset, batch_size=3)), EXACT, atol=1e-6
    )


class Examples:
    """A random-access source of single examples, for Grain."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return X[index], Y[index]


def grain_map_dataset(grain):
    return grain.MapDataset.source(Examples()).batch(3)


def grain_iter_dataset(grain):
    return grain_map_dataset(grain).to_iter_dataset()


def grain_loader(grain):
    sampler = grain.samplers.IndexSampler(num_records=8, num_epochs=1, seed=0)
    return grain.DataLoader(
        data_source=Examples(), sampler=sampler, operations=[grain.transforms.Batch(3)]
    )


@pytest.mark.parametrize("make", [grain_map_dataset, grain_iter_dataset, grain_loader])
def test_grain_works_as_it_is(make):
    np.testing.assert_allclose(dense(make(pytest.importorskip("grain"))), EXACT, atol=1e-6)


# What cannot --------------------------------------------------------------------------------------

WRAP = r"wrap one batch in a list, \[batch\], or cut arrays into batches with hd.batches"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            iter(cut()),
            r"one-shot iterator \(list_iterator\).*or a function that returns a fresh iterator",
        ),
        (
            (batch for batch in cut()),
            r"one-shot iterator \(generator\).*or a function that returns a fresh iterator",
        ),
        (zip([X], [Y], strict=True), r"one-shot iterator \(zip\)"),
        ((X, Y), f"bare tuple of arrays.*{WRAP}"),
        ((Tensor(X), Tensor(Y)), f"bare tuple of arrays.*{WRAP}"),
        ({"x": X, "y": Y}, f"bare dict of arrays.*{WRAP}"),
        (UserDict(x=X, y=Y), f"bare UserDict of arrays.*{WRAP}"),
        (X, f"bare ndarray.*{WRAP}"),
        (jax.device_put(X), f"bare Array.*{WRAP}"),
        (3, "data is a int; expected batches that can be iterated twice, or a function"),
        (None, "data is a NoneType; expected batches that can be iterated twice, or a function"),
        (SimpleNamespace(x=X, y=Y), "data is a SimpleNamespace; expected batches"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_cannot_be_iterated_twice_is_refused_with_the_repair(data, sentence):
    with pytest.raises(TypeError, match=sentence):
        hd.Hessian(logistic, W, data)


@pytest.mark.parametrize(
    "data", [[], (), Loader([]), lambda: iter([])], ids=["list", "tuple", "loader", "function"]
)
def test_empty_data_are_refused(data):
    with pytest.raises(ValueError, match="gave no batch; expected at least one"):
        dense(data)


def test_a_function_that_returns_no_batches_is_refused_by_name():
    with pytest.raises(TypeError, match="data"):
        dense(lambda: None)


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [(["a"] * 8, "str"), (np.array(["a"] * 8), "ndarray"), (np.array([None] * 8), "ndarray")],
)
def test_leaves_that_are_no_numbers_are_refused_by_batch_and_path(leaf, kind):
    with pytest.raises(
        TypeError, match=rf"batch 1, leaf .*'name'.* is a {kind} of dtype .*Drop it in the loader"
    ):
        dense([{"x": X, "y": Y}, {"x": X, "y": Y, "name": leaf}], logistic_of_dict)


def test_an_exhausted_iterator_is_noticed_in_the_second_pass():
    once = iter(cut())
    hessian = hd.Hessian(logistic, W, lambda: once)
    hessian @ W
    with pytest.raises(ValueError, match=r"gave no batch in a later pass.*exhausted iterator"):
        hessian @ W


@pytest.mark.parametrize(
    "loss", [logistic, lambda w, batch: jnp.mean((batch[0] @ w) ** 2)], ids=["fails", "runs"]
)
def test_a_batch_whose_leaves_disagree_in_length_is_refused_whether_or_not_the_loss_fails_on_it(
    loss,
):
    with pytest.raises(ValueError, match=r"no common leading axis.*'0': 8, '1': 5.*hd\.Total"):
        dense([(X, Y[:5])], loss)


# Data that differ between passes ------------------------------------------------------------------


class Changing:
    """The n-th pass goes over the n-th of several lists of batches; the last one from then on."""

    def __init__(self, *lists):
        self.passes = itertools.chain(lists, itertools.repeat(lists[-1]))

    def __iter__(self):
        return iter(next(self.passes))


def other_subset():
    return [*cut()[:1], (X[3:6] + 1, 1 - Y[3:6]), *cut()[2:]]


def noisy(scale):
    """As augmentation, or dropout: other numbers in every pass."""
    rng = np.random.default_rng(1)
    return lambda: [
        (x + scale * rng.standard_normal(x.shape).astype(np.float32), y) for x, y in cut()
    ]


@pytest.mark.parametrize(
    ("later", "batch", "now"),
    [
        (other_subset(), 1, "3 examples of mean loss"),
        (cut()[:2], 2, "no such batch, was 2 examples"),
        ([*cut(), (X, Y)], 3, "8 examples .*, was no such batch"),
        ([*cut()[:2], (X[6:7], Y[6:7])], 2, "1 examples .*, was 2 examples"),
    ],
    ids=["another subset", "fewer batches", "more batches", "a shorter batch"],
)
def test_a_pass_over_other_data_is_an_error_that_names_pass_and_batch(later, batch, now):
    hessian = hd.Hessian(logistic, W, Changing(cut(), cut(), later))
    hessian @ W
    hessian @ W
    with pytest.raises(
        RuntimeError, match=rf"pass 3 differs from pass 1, first in batch {batch}: {now}"
    ):
        hessian @ W


def test_augmentation_is_an_error_that_names_pass_and_batch():
    hessian = hd.Hessian(logistic, W, noisy(1e-2))
    hessian @ W
    with pytest.raises(
        RuntimeError,
        match=r"pass 2 differs from pass 1, first in batch 0.*augmentation and dropout",
    ):
        hessian @ W


def test_dropout_in_the_loss_is_an_error_that_names_pass_and_batch():
    seeds = itertools.count()

    def loss(w, batch):
        x, y, seed = batch
        return logistic(
            w, (x * jax.random.bernoulli(jax.random.key(seed[0]), 0.5, x.shape).astype(x.dtype), y)
        )

    hessian = hd.Hessian(
        loss, W, lambda: [(x, y, np.full(len(y), next(seeds), np.int32)) for x, y in cut()]
    )
    hessian @ W
    with pytest.raises(RuntimeError, match="pass 2 differs from pass 1, first in batch 0"):
        hessian @ W


def test_differences_of_the_size_of_rounding_are_accepted():
    hessian = hd.Hessian(logistic, W, noisy(1e-7))
    for _ in range(2):
        np.testing.assert_allclose(hd.dense(hessian), EXACT, atol=1e-6)


def test_shuffled_data_give_one_warning_and_the_same_product():
    order = np.random.default_rng(2).permutation(8)
    hessian = hd.Hessian(logistic, W, Changing(cut(), cut(x=X[order], y=Y[order]), cut()[::-1]))
    first = hessian @ W
    with pytest.warns(
        UserWarning, match="same examples in another order.*pass shuffle=False"
    ) as seen:
        second = hessian @ W
    third = hessian @ W  # warnings are errors here: there is no second one
    assert len(seen) == 1
    np.testing.assert_allclose([first, second, third], [EXACT @ W] * 3, atol=1e-6)
    assert hessian.describe()["shuffled"]


# On to the device ---------------------------------------------------------------------------------


def test_a_batch_is_handed_over_when_the_next_has_been_pulled_and_no_other():
    pulled = []

    def source():
        for batch in cut(2):
            pulled.append(len(pulled))
            yield batch

    ahead = [len(pulled) for _ in Passes(source)]
    assert ahead == [2, 3, 4, 4]


def test_a_pass_that_is_left_early_leaves_no_trace():
    passes = Passes(cut())
    next(iter(passes))
    assert [len(y) for _, (_, y) in passes] == [3, 3, 2]


def test_host_batches_go_to_the_device_of_the_parameters():
    device = jax.devices()[3]
    hessian = hd.Hessian(logistic, jax.device_put(W, device), hd.batches((X, Y), 3))
    assert all(
        leaf.devices() == {device}
        for leaf in jax.tree.leaves([piece for _, piece in hessian.risk.passes])
    )
    assert (hessian @ W).devices() == {device}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_host_batches_go_to_the_mesh_of_the_parameters_whatever_its_axes(kind):
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(jax.sharding.AxisType[kind],), devices=jax.devices()[:4]
    )
    params = jax.device_put(W, NamedSharding(mesh, PartitionSpec()))
    hessian = hd.Hessian(logistic, params, hd.batches((X, Y), 3))
    placed = jax.tree.leaves([piece for _, piece in hessian.risk.passes])
    assert all(leaf.devices() == set(mesh.devices.flat) for leaf in placed)
    np.testing.assert_allclose(hd.dense(hessian), EXACT, atol=1e-6)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_batches_that_are_sharded_already_stay_so(kind):
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(jax.sharding.AxisType[kind],), devices=jax.devices()[:4]
    )
    replicated, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    hessian = hd.Hessian(logistic, jax.device_put(W, replicated), jax.device_put(cut(4), split))
    auto = Mesh(mesh.devices, mesh.axis_names)
    for _, (x, _) in hessian.risk.passes:
        assert x.sharding.is_equivalent_to(NamedSharding(auto, PartitionSpec("data")), x.ndim)
    np.testing.assert_allclose(hd.dense(hessian), EXACT, atol=1e-6)


def test_the_description_holds_the_losses_of_the_first_pass():
    hessian = hd.Hessian(logistic, W, cut())
    assert "loss" not in hessian.describe()
    hessian @ W
    margins = X.astype(float) @ W
    losses = np.logaddexp(margins, 0) - Y * margins
    about = hessian.describe()
    np.testing.assert_allclose(
        about["batch_losses"], [part.mean() for part in np.split(losses, [3, 6])], rtol=1e-6
    )
    np.testing.assert_allclose(about["loss"], losses.mean(), rtol=1e-6)
    assert not re.search("nan", str(about))
