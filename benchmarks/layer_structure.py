"""Does a layer's Hessian decouple into E[x x^T] and E[M], and what do its eigenvectors look like?

    python -m benchmarks.layer_structure [--network mlp lenet] [--size cpu]

Experiments of Wu, Zhu, Wu, Wang and Ge (2020): F-200^2 (784-200-200-10) on MNIST with inputs
(x - 0.5) / 0.5, and LeNet-5 on CIFAR-10, without BatchNorm and with theirs (behind each ReLU,
without scales and shifts, on its stored statistics). They trained with SGD, batches of 128 and a
rate of 0.01 for 1000 epochs, and took all training images in the operators: `--size paper`, for a
GPU, with VGG-11 and ResNet-18 as further networks. `--size cpu` has

- mlp: 9,000 of MNIST's 10,000 test images (for more than 10,000, the training images are read),
  rate 0.1, 100 epochs, and 2,000 images in the operators;
- lenet: 2,000 training images, batches of 32, rate 0.01, momentum 0.9, 20 epochs, and 2,000 images
  in the operators of dense layers, 300 in those of convolutions.

Columns: the size of the layer's matrix; the ratio of the two largest eigenvalues of E[x x^T], and
the squared cosine of its first eigenvector and the mean input; `hd.decoupling_error` in the
spectral and the Frobenius norm; the mean rank-1 ratio of the first nine exact eigenvectors; the
largest overlap of the top k exact eigenspaces of two models (seeds 0 and 1), and its k. In
parentheses and below "the paper" are its figures.

Answer (2026-11-26, 19.5 minutes on two cores beside other work). All layers are exact: the
Gauss-Newton matrix is the Hessian.

    mlp: training accuracy 100.00%, 100.00%; loss 0.0013; 229 s
                size  l1/l2  (v1.x)2 spectral Frobenius         rank-1          peak of two models
    fc1      784x200  29.88   0.9999    0.237     0.291          0.980 0.178 at 190 (0.303 at 151)
    fc2      200x200   5.20   0.9983    0.434     0.581          0.914 0.015 at 200 (0.023 at 200)
    fc3      200x10    4.92   0.9985    0.459     0.629          0.904     0.341 at 1 (0.378 at 8)
    overlap, top k                                 1     5     9    10    20    30    49
      fc1                                      0.964 0.964 0.948 0.937 0.832 0.755 0.643
        the paper                              0.970 0.969 0.938 0.927 0.858 0.812 0.733
      fc2                                      0.803 0.778 0.698 0.724 0.558 0.508 0.514
        the paper                              0.943 0.948 0.930 0.877 0.631 0.591 0.594
      fc3                                      0.765 0.770 0.749 0.704 0.570 0.627 0.668
        the paper                              0.888 0.910 0.892 0.830 0.643 0.673 0.702
      all                                      0.930 0.941 0.912 0.894 0.748 0.673 0.593
        the paper                              0.964 0.963 0.940 0.920 0.828 0.795 0.742
      predicted eigenspace of E[M], fc1: paper 0.836, rates, centered 0.893
      predicted eigenspace of E[M], fc2: paper 0.948, rates, centered 0.954
    top 12 eigenvalues
    fc1   exact      2.02  1.66  1.37   1.1 0.935 0.777 0.658 0.463 0.392 0.255  0.23 0.188
          paper      2.04   1.7  1.27  1.15 0.742  0.63 0.389  0.33 0.247 0.204 0.187 0.157
    fc1   kronecker  1.81  1.54   1.3  1.06 0.874  0.73 0.617 0.407  0.36 0.206  0.17 0.151
          paper      1.86  1.59  1.15  1.05 0.684 0.569 0.357 0.283 0.219 0.163 0.153 0.131

    mlp-bn: training accuracy 99.98%, 100.00%; loss 0.00028; 178 s
    fc1      784x200  29.88   0.9999    0.220     0.264          0.988                 0.199 at 49
    fc2      200x200   1.28   0.0948    0.619     0.802          0.786                 0.001 at 49
    fc3      200x10    1.08   0.0895    0.659     0.788          0.788                 0.025 at 49
    overlap, top k                                 1     5     9    10    20    30    49
      fc1                                      0.947 0.972 0.964 0.959 0.918 0.872 0.823
      fc2                                      0.021 0.224 0.313 0.314 0.408 0.440 0.486
      fc3                                      0.399 0.218 0.240 0.260 0.318 0.377 0.448

    lenet: training accuracy 90.65%, 85.25%; loss 0.29; 463 s
    conv1     75x6     8.84   0.9298    0.754     0.723  0.883 (0.886)     0.706 at 8 (0.711 at 5)
    conv2    150x16    4.96   0.9936    0.809     0.754  0.892 (0.943)   0.346 at 17 (0.338 at 15)
    fc1      400x120   4.31   0.9968    0.613     0.746  0.881 (0.891) 0.109 at 135 (0.592 at 122)
    fc2      120x84    2.94   0.9679    0.627     0.846  0.869 (0.740)  0.031 at 94 (0.178 at 133)
    fc3       84x10    3.02   0.9627    0.586     0.834  0.886 (0.858)     0.205 at 8 (0.509 at 1)
    overlap, top k                                 1     5     9    10    20    30    49
      conv1                                    0.612 0.717 0.786 0.771 0.792
      conv2                                    0.073 0.412 0.527 0.554 0.611
      fc1                                      0.562 0.607 0.671 0.633 0.499 0.480 0.461
      fc2                                      0.180 0.424 0.531 0.548 0.431 0.396 0.392
      fc3                                      0.044 0.433 0.551 0.545 0.521 0.494 0.540
      predicted eigenspace of E[M], fc1: paper 0.667, rates, centered 0.789
      predicted eigenspace of E[M], fc2: paper 0.846, rates, centered 0.889

    lenet-bn: training accuracy 98.90%, 97.65%; loss 0.051; 302 s
    conv1     75x6     8.84   0.9298    0.832     0.809          0.900                  0.766 at 6
    conv2    150x16    1.35   0.0553    0.904     0.880          0.702                 0.169 at 20
    fc1      400x120   2.96   0.9771    0.743     0.856          0.789                 0.015 at 49
    fc2      120x84    1.11   0.3801    0.774     0.842          0.753                 0.005 at 49
    fc3       84x10    1.49   0.2763    0.698     0.739          0.827                 0.064 at 49
    overlap, top k                                 1     5     9    10    20    30    49
      conv1                                    0.680 0.788 0.776 0.790 0.828
      conv2                                    0.041 0.168 0.202 0.225 0.350
      fc1                                      0.000 0.337 0.387 0.386 0.308 0.299 0.291
      fc2                                      0.049 0.204 0.232 0.262 0.370 0.365 0.365
      fc3                                      0.000 0.323 0.293 0.290 0.413 0.446 0.464

F-200^2. The first layer and the approximation across layers ("all") agree with the paper within
0.04 up to k = 10, and the four largest eigenvalues of fc1 within 8 %. fc2 and fc3 decouple less
well, 0.70 and 0.75 instead of 0.93 and 0.89 at k = 9, and their E[x x^T] is further from rank 1.
The learning rate of 0.1 is the cause. With it, 300 epochs, or all 9,000 images in the operators,
give 0.77 and 0.78 for fc2, and 150 epochs on 2,000 training images give 0.82 and 0.67. With the
paper's 0.01 on 2,000 images, both are the paper's (7 minutes; `--network mlp --learning-rate 0.01
--epochs 1000 --train-images 2000 --plain --name slow`):

    mlp: training accuracy 100.00%, 100.00%; loss 0.0052; 413 s
                size  l1/l2  (v1.x)2 spectral Frobenius         rank-1          peak of two models
    fc1      784x200  29.88   0.9999    0.201     0.225          0.975  0.036 at 10 (0.303 at 151)
    fc2      200x200  23.73   0.9999    0.220     0.242          0.984 0.033 at 200 (0.023 at 200)
    fc3      200x10   10.20   0.9999    0.315     0.387          0.964     0.382 at 1 (0.378 at 8)
    overlap, top k                                 1     5     9    10    20    30    49
      fc1                                      0.967 0.974 0.942 0.865 0.596 0.540 0.516
        the paper                              0.970 0.969 0.938 0.927 0.858 0.812 0.733
      fc2                                      0.965 0.971 0.956 0.877 0.686 0.626 0.635
        the paper                              0.943 0.948 0.930 0.877 0.631 0.591 0.594
      fc3                                      0.914 0.926 0.892 0.878 0.739 0.769 0.803
        the paper                              0.888 0.910 0.892 0.830 0.643 0.673 0.702
      all                                      0.886 0.968 0.945 0.867 0.511 0.393 0.294
        the paper                              0.964 0.963 0.940 0.920 0.828 0.795 0.742
      predicted eigenspace of E[M], fc1: paper 0.930, rates, centered 0.985
      predicted eigenspace of E[M], fc2: paper 0.965, rates, centered 0.988

Here 15,000 steps, against 469,000 in the paper, leave larger eigenvalues (12.5 in fc1 instead of
2.04). The overlaps of fc1 at k > 10 and those of two models in fc1 are below the paper's. They
probably need its 60,000 images: the latter are 0.036 with 2,000 images, 0.178 with 9,000 (and the
other rate) and 0.303 in the paper. The peak of fc3 has the paper's height, and fc2 has a low early
peak (0.010 at k = 9) as in the paper (0.011 at 10).

LeNet-5 is far from the paper's minimum after 20 epochs on 2,000 images: its loss is 0.29, and the
eigenvalues of fc1 are six times the paper's 1.42. The ratios of E[x x^T] are 3 to 5 instead of 5.9
to 9.0, and the overlaps with the factors 0.53 to 0.79 at k = 9. The peaks of two models for the
convolutions have the paper's heights, at about the number of outputs. In the dense layers they are
lower by a factor of 2.5 to 6, and fc1 and fc2 are flat up to the last k. Rank-1 ratios differ from
the paper's by up to 0.13. The factors also leave out the pairs of different positions of a
convolution: the largest eigenvalue of conv1 is 7.96, and 2.71 with the factors.

The decoupling error, which the paper does not tabulate, is 0.20 to 0.46 in the spectral norm and
0.23 to 0.63 in the Frobenius norm for F-200^2, and 0.59 to 0.85 for LeNet-5. So the top eigenspace
is approximated better than the matrix. The intervals of the Frobenius norms are wide, because few
steps were taken (JSON).

BatchNorm. Directly behind it, E[x x^T] has no dominant eigenvalue (ratios of 1.08 to 1.49; the
paper has means of 1.16 and 1.54), the mean input has a squared cosine of 0.06 to 0.38 with its
first eigenvector (0.062 and 0.210), the overlap with the factors is 0.17 to 0.49 from k = 5 on (the
paper: 0.08 to 0.48 for LeNet-5), and two models overlap by at most 0.06 in dense layers. fc1 of
LeNet-5 has a ratio of 2.96, because the maximum over 2 x 2 pixels behind BatchNorm has a positive
mean. The first layers see the data themselves.

Activation rates and centered rows predict the eigenspace of E[M] better than the paper's formula in
every layer: 0.985 and 0.988 instead of 0.930 and 0.965 for F-200^2 with rate 0.01.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np

import hessdensity as hd
from benchmarks._harness import save
from benchmarks.models import data
from benchmarks.models.decoupling_networks import VGG11, FullyConnected, LeNet5, ResNet18
from benchmarks.models.training import accuracy, train
from hessdensity import adapters, losses

CHANNELS = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
RANKS = (1, 5, 9, 10, 20, 30, 49)  # at which the paper's overlaps were read
CLASSES = 10


class Size(NamedTuple):
    """How much is computed for a network."""

    train_images: int
    epochs: int
    learning_rate: float
    momentum: float
    images: int  # in the operators of dense layers
    conv_images: int  # in those of convolutions, which take longer
    batch_size: int  # of the operators
    most: int  # eigenvectors of a layer that two models are compared by
    steps: int  # of the densities for the Frobenius norms
    width: int = 0  # of the networks that have one
    train_batch: int = 128


PAPER_SCHEDULE = {"epochs": 1000, "learning_rate": 0.01, "momentum": 0.0}
SIZES = {
    "cpu": {
        "mlp": Size(9000, 100, 0.1, 0.0, 2000, 2000, 1000, 200, 8),
        "lenet": Size(2000, 20, 0.01, 0.9, 2000, 300, 500, 140, 6, train_batch=32),
        "vgg11": Size(2000, 20, 0.01, 0.9, 200, 200, 100, 20, 4, 16, 32),
        "resnet18": Size(2000, 20, 0.01, 0.9, 200, 200, 100, 20, 4, 16, 32),
    },
    "paper": {
        "mlp": Size(
            60_000,
            **PAPER_SCHEDULE,
            images=60_000,
            conv_images=60_000,
            batch_size=2000,
            most=400,
            steps=16,
        ),
        "lenet": Size(
            50_000,
            **PAPER_SCHEDULE,
            images=50_000,
            conv_images=50_000,
            batch_size=1000,
            most=200,
            steps=16,
        ),
        "vgg11": Size(
            50_000,
            **PAPER_SCHEDULE,
            images=50_000,
            conv_images=50_000,
            batch_size=500,
            most=200,
            steps=16,
            width=48,
        ),
        "resnet18": Size(
            50_000,
            **PAPER_SCHEDULE,
            images=50_000,
            conv_images=50_000,
            batch_size=500,
            most=200,
            steps=16,
            width=48,
        ),
    },
}

# Wu et al. (2020), read off their figures and tables: the eigenvalues and overlaps of the exact
# layer Hessians and of their Kronecker factors, and the peaks of the overlap of two models.
PAPER: dict[str, Any] = {
    "mlp": {
        "ratio": "12.29, 9.65 to 16.16 behind the first layer",
        "alignment": "1.000",
        "exact": {
            "fc1": (
                2.040,
                1.703,
                1.271,
                1.150,
                0.742,
                0.630,
                0.389,
                0.330,
                0.247,
                0.204,
                0.187,
                0.157,
            )
        },
        "kronecker": {
            "fc1": (
                1.861,
                1.590,
                1.146,
                1.055,
                0.684,
                0.569,
                0.357,
                0.283,
                0.219,
                0.163,
                0.153,
                0.131,
            )
        },
        "overlap": {
            "fc1": (0.970, 0.969, 0.938, 0.927, 0.858, 0.812, 0.733),
            "fc2": (0.943, 0.948, 0.930, 0.877, 0.631, 0.591, 0.594),
            "fc3": (0.888, 0.910, 0.892, 0.830, 0.643, 0.673, 0.702),
            "all": (0.964, 0.963, 0.940, 0.920, 0.828, 0.795, 0.742),
        },
        "peak": {"fc1": (0.303, 151), "fc2": (0.023, 200), "fc3": (0.378, 8)},
        "rank1": {},
    },
    "lenet": {
        "ratio": "7.21, 5.88 to 9.02 (fc), 15.87 (conv2)",
        "alignment": "0.998 (fc), 0.999 (conv2)",
        "exact": {},
        "kronecker": {},
        "overlap": {},
        "peak": {
            "conv1": (0.711, 5),
            "conv2": (0.338, 15),
            "fc1": (0.592, 122),
            "fc2": (0.178, 133),
            "fc3": (0.509, 1),
        },
        "rank1": {"conv1": 0.886, "conv2": 0.943, "fc1": 0.891, "fc2": 0.740, "fc3": 0.858},
    },
    "mlp-bn": {"ratio": "1.16", "alignment": "0.062"},
    "lenet-bn": {"ratio": "1.54, 1.20 to 1.89", "alignment": "0.210, 0.001 to 0.803"},
}


class Problem(NamedTuple):
    """A trained network."""

    loss: hd.ComposedLoss
    params: Any
    dense: Any  # batches of the operators of dense layers
    convolution: Any  # those of the operators of convolutions
    accuracy: float
    normalize: bool

    def hessian(self, layer: hd.Layer) -> hd.Hessian:
        """The exact Hessian of a layer's kernel."""
        batches = self.dense if layer.kind == "dense" else self.convolution
        return hd.layer_hessian(hd.Hessian(self.loss, self.params, batches), layer)

    def factors(self, across: bool) -> hd.KroneckerFactors:
        """The Kronecker factors of all layers, each over the data of its operator."""
        known = self.loss, self.params
        if self.dense is self.convolution:
            return hd.kronecker_factors(*known, self.dense, across=across)
        dense = hd.kronecker_factors(*known, self.dense, where="fc*", across=across)
        others = hd.kronecker_factors(
            *known, self.convolution, where=lambda path: not path.startswith("fc")
        )
        return dataclasses.replace(dense, layers={**others.layers, **dense.layers})


def images_of(network: str, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """The normalized training images of a network, and their labels."""
    if network == "mlp":
        # MNIST: the training images if they are there, otherwise those of the test set.
        split = "train" if size.train_images > 10_000 else "test"
        images, labels = data.mnist(split)
        inputs = (images[: size.train_images] / 255 - 0.5) / 0.5
        return inputs.astype(np.float32), labels[: size.train_images]
    images, labels = data.cifar10("train", size.train_images)
    mean, deviation = CHANNELS
    return ((images / 255 - mean) / deviation).astype(np.float32), labels


def model_of(network: str, normalize: bool, width: int) -> nn.Module:
    """The network."""
    if network == "mlp":
        return FullyConnected(normalize=normalize)
    if network == "lenet":
        return LeNet5(normalize=normalize)
    kinds: dict[str, Callable[..., nn.Module]] = {"vgg11": VGG11, "resnet18": ResNet18}
    return kinds[network](width, normalize=normalize)


def trained(network: str, normalize: bool, seed: int, size: Size) -> Problem:
    """Train a network. The data of its operators are the first of its training images."""
    model = model_of(network, normalize, size.width)
    inputs, labels = images_of(network, size)
    key = jax.random.key(seed)
    variables = model.init(key, inputs[:1])
    steps = size.epochs * (len(inputs) // size.train_batch)
    *_, last = train(
        model,
        variables,
        (inputs, labels),
        key,
        num_steps=steps,
        schedule=size.learning_rate,
        momentum=size.momentum,
        batch_size=size.train_batch,
    )
    options: dict[str, Any] = {}
    if normalize:
        options = {"batch_statistics": "stored", "use_running_average": True}
    loss, params = adapters.from_linen(model, last.variables, losses.cross_entropy, **options)
    right = accuracy(model, last.variables, (inputs, labels))
    dense = hd.batches((inputs[: size.images], labels[: size.images]), size.batch_size)
    few = size.conv_images
    convolution = dense
    if few < size.images:
        convolution = hd.batches((inputs[:few], labels[:few]), min(size.batch_size, few))
    return Problem(loss, params, dense, convolution, right, normalize)


def num_pairs(layer: hd.Layer, size: Size) -> int:
    """The eigenvectors of a layer that are computed: at least 1.1 for each output.

    At least 49 of them are computed for dense layers, and 20 for convolutions.
    """
    least = max(RANKS) if layer.kind == "dense" else 20
    wanted = max(least, layer.outputs + layer.outputs // 8)
    return min(wanted, size.most, layer.inputs * layer.outputs)


def eigenspace(hessian: hd.Hessian, k: int) -> hd.Eigenspace:
    """The top pairs of an exact Hessian. Wanted are overlaps, which converge before residuals."""
    return hd.top_eigenspace(
        hessian, jax.random.key(1), k, which="LA", tolerance=1e-2, progress=False
    )


def predicted(factors: hd.KroneckerFactors, params: Any, name: str) -> dict[str, float] | None:
    """The overlap of E[M]'s top c - 1 eigenspace with its predictions from the dense layers behind.

    None for convolutions, and for the last layer. The rates are those of x > 0, so that nothing but
    a ReLU may stand between the layers.
    """
    dense = [each for each in factors.layers if each.startswith("fc")]
    behind = [each for each in dense if each > name]
    if name not in dense or not behind:
        return None
    weights = []
    for each in behind:
        kernel = params[each.partition("/")[0]]["kernel"]
        weights.append(hd.matricize(kernel, factors[each].layer))
    rates = [factors[each].active_inputs[0] for each in behind]
    _, vectors = np.linalg.eigh(factors[name].output[0])
    top = vectors[:, ::-1][:, : CLASSES - 1].T.astype(np.float32)
    forms = {"paper": (None, False), "rates, centered": (rates, True)}
    return {
        label: hd.overlap(
            hd.predicted_output_eigenspace(weights, own, centered=centered).astype(np.float32), top
        )
        for label, (own, centered) in forms.items()
    }


def measure_layer(
    problem: Problem, factors: hd.KroneckerFactors, name: str, other: Problem, size: Size
) -> dict[str, Any]:
    """The figures of one layer of a network, and its overlap with that of the other network."""
    start = time.perf_counter()
    own = factors[name]
    layer = own.layer
    hessian = problem.hessian(layer)
    kronecker = factors.restrict(lambda path: path == layer.leaf)
    k = num_pairs(layer, size)
    exact = eigenspace(hessian, k)
    approximate = kronecker.top(min(k, max(RANKS)))
    with_factors = hd.overlap_curve(exact[: approximate.rank], approximate)
    values = hd.singular_values(exact, layer)
    error = hd.decoupling_error(
        hessian, kronecker, jax.random.key(2), num_steps=size.steps, tolerance=1e-2, progress=False
    )
    models = hd.overlap_curve(exact, eigenspace(other.hessian(layer), k))
    return {
        "layer": name.removesuffix("/kernel"),
        "inputs": layer.inputs,
        "outputs": layer.outputs,
        "pairs": k,
        "ratio": float(own.input_ratio[0]),
        "alignment": float(own.mean_alignment[0]),
        "autocorrelation": np.linalg.eigvalsh(own.input[0])[::-1][:4].tolist(),
        "output": np.linalg.eigvalsh(own.output[0])[::-1][: CLASSES + 2].tolist(),
        "exact_flag": own.exact,
        "spectral": [error.spectral.value, error.spectral.lower, error.spectral.upper],
        "frobenius": [error.frobenius.value, error.frobenius.lower, error.frobenius.upper],
        "exact": exact.values.tolist(),
        "kronecker": approximate.values.tolist(),
        "overlap": with_factors.overlap.tolist(),
        "rank1": values[:, 0].tolist(),
        "second_singular": values[: CLASSES - 1, 1].tolist(),
        "models": models.overlap.tolist(),
        "predicted": None if problem.normalize else predicted(factors, problem.params, name),
        "seconds": time.perf_counter() - start,
    }


def measure_whole(problem: Problem, factors: hd.KroneckerFactors) -> dict[str, Any]:
    """The approximation of the whole Hessian's eigenspace, across layers."""
    hessian = hd.Hessian(problem.loss, problem.params, problem.dense)
    k = min(max(RANKS), len(factors.across))
    exact = eigenspace(hessian, k)
    approximate = factors.full_eigenspace(k)
    return {
        "exact": exact.values.tolist(),
        "approximate": approximate.values.tolist(),
        "overlap": hd.overlap_curve(exact, approximate).overlap.tolist(),
    }


def measure(network: str, normalize: bool, size: Size) -> dict[str, Any]:
    """All figures of one network: two models, of which the first is examined."""
    start = time.perf_counter()
    models = [trained(network, normalize, seed, size) for seed in (0, 1)]
    seconds = time.perf_counter() - start
    whole = network == "mlp" and not normalize
    factors = models[0].factors(across=whole)
    found = {
        "network": network + "-bn" * normalize,
        "size": size._asdict(),
        "accuracy": [model.accuracy for model in models],
        "loss": factors.description["data"]["loss"],
        "train_seconds": seconds,
        "layers": [
            measure_layer(models[0], factors, name, models[1], size) for name in factors.layers
        ],
    }
    if whole:
        found["whole"] = measure_whole(models[0], factors)
    return {**found, "seconds": time.perf_counter() - start}


# What is printed and drawn ------------------------------------------------------------------------


def peak(overlaps: list[float]) -> tuple[float, int]:
    """The largest overlap, and its rank."""
    return max(overlaps), int(np.argmax(overlaps)) + 1


def _at(values: Any, ranks: tuple[int, ...]) -> str:
    return "".join(f"{values[k - 1]:6.3f}" if k <= len(values) else f"{'':6}" for k in ranks)


def report(found: dict[str, Any]) -> None:
    """Print the tables of one network, with the paper's figures in parentheses or below."""
    name = found["network"]
    paper = PAPER.get(name, {})
    right = ", ".join(f"{each:.2%}" for each in found["accuracy"])
    print(
        f"\n{name}: training accuracy {right}; loss {found['loss']:.2g}; {found['seconds']:.0f} s"
    )
    print(
        f"{'':6}{'size':>10}{'l1/l2':>7}{'(v1.x)2':>9}{'spectral':>9}{'Frobenius':>10}"
        f"{'rank-1':>15}{'peak of two models':>28}"
    )
    for row in found["layers"]:
        label = row["layer"]
        rank1 = f"{np.mean(row['rank1'][: CLASSES - 1]):.3f}"
        if label in paper.get("rank1", {}):
            rank1 += f" ({paper['rank1'][label]:.3f})"
        height, place = peak(row["models"])
        top = f"{height:.3f} at {place}"
        if label in paper.get("peak", {}):
            top += " ({:.3f} at {})".format(*paper["peak"][label])
        print(
            f"{label:6}{row['inputs']:>6}x{row['outputs']:<3}{row['ratio']:>7.2f}"
            f"{row['alignment']:>9.4f}{row['spectral'][0]:>9.3f}{row['frobenius'][0]:>10.3f}"
            f"{rank1:>15}{top:>28}"
        )
    print("overlap with the Kronecker factors, top k".ljust(42) + "".join(f"{k:6}" for k in RANKS))
    rows = {row["layer"]: row["overlap"] for row in found["layers"]}
    if "whole" in found:
        rows["all"] = found["whole"]["overlap"]
    for label, overlaps in rows.items():
        print(f"  {label:40}{_at(overlaps, RANKS)}")
        if label in paper.get("overlap", {}):
            print(f"    {'the paper':38}" + "".join(f"{x:6.3f}" for x in paper["overlap"][label]))
    for row in found["layers"]:
        if row["predicted"]:
            cells = ", ".join(f"{label} {value:.3f}" for label, value in row["predicted"].items())
            print(f"  predicted eigenspace of E[M], {row['layer']}: {cells}")
    _report_eigenvalues(found, paper)


def _report_eigenvalues(found: dict[str, Any], paper: dict[str, Any]) -> None:
    print("top 12 eigenvalues")
    spaces = {
        row["layer"]: {"exact": row["exact"], "kronecker": row["kronecker"]}
        for row in found["layers"]
    }
    for label, kinds in spaces.items():
        for kind, values in kinds.items():
            print(f"{label:6}{kind:9}" + "".join(f" {x:5.3g}" for x in values[:12]))
            if label in paper.get(kind, {}):
                print(f"{'':6}{'paper':9}" + "".join(f" {x:5.3g}" for x in paper[kind][label]))


def draw(found: dict[str, Any]) -> plt.Figure:
    """Overlaps, singular values, eigenvalues and the overlap of two models, of every layer."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    (overlaps, rank1), (eigenvalues, models) = axes
    for index, row in enumerate(found["layers"]):
        color = f"C{index}"
        ranks = np.arange(1, len(row["overlap"]) + 1)
        overlaps.plot(ranks, row["overlap"], color=color, label=row["layer"])
        rank1.plot(np.arange(1, len(row["rank1"]) + 1), row["rank1"], color=color)
        both = min(len(row["exact"]), len(row["kronecker"]))
        eigenvalues.semilogy(np.arange(1, both + 1), row["exact"][:both], color=color)
        eigenvalues.semilogy(np.arange(1, both + 1), row["kronecker"][:both], ":", color=color)
        models.plot(np.arange(1, len(row["models"]) + 1), row["models"], color=color)
        if row["outputs"] <= len(row["models"]):
            models.axvline(row["outputs"], color=color, linewidth=0.6, linestyle="--")
    overlaps.axvline(CLASSES - 1, color="0.6", linewidth=0.6, linestyle="--")
    overlaps.set(xlabel="k", ylabel="overlap", ylim=(0, 1.02))
    overlaps.set_title("top k eigenspaces, exact and Kronecker")
    overlaps.legend()
    rank1.set(xlabel="eigenvector", ylabel="first singular value / Frobenius norm", ylim=(0, 1.02))
    rank1.set_title("rank-1 ratio of the exact eigenvectors")
    eigenvalues.set(xlabel="number", ylabel="eigenvalue")
    eigenvalues.set_title("exact (lines) and Kronecker (dotted)")
    models.set(xlabel="k (m: the outputs of the layer)", ylabel="overlap")
    models.set_title("top k eigenspaces of two models (dashed: k = m)")
    figure.suptitle(found["network"])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", nargs="+", default=["mlp", "lenet"], choices=SIZES["cpu"])
    parser.add_argument("--size", default="cpu", choices=SIZES)
    parser.add_argument("--width", type=int, help="of VGG-11 and ResNet-18")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--train-images", type=int)
    parser.add_argument("--plain", action="store_true", help="leave out BatchNorm")
    parser.add_argument("--name", help="of the results, by default the size")
    args = parser.parse_args()
    changes = {"width", "learning_rate", "epochs", "train_images"}
    given = {name: value for name, value in vars(args).items() if name in changes and value}
    for network in args.network:
        size = SIZES[args.size][network]._replace(**given)
        for normalize in (False,) if args.plain else (False, True):
            # No peak is expected with BatchNorm, so that fewer eigenvectors suffice.
            most = min(size.most, max(RANKS)) if normalize else size.most
            found = measure(network, normalize, size._replace(most=most))
            report(found)
            path = save(f"layer_structure_{args.name or args.size}_{found['network']}", found)
            draw(found).savefig(path.with_suffix(".png"), dpi=110)
            print(f"saved in {path.name}", flush=True)


if __name__ == "__main__":
    main()
