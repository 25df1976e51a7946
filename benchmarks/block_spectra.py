"""Do the blocks of a Hessian have similar spectra, and how much of the Hessian do they hold?

    python -m benchmarks.block_spectra

Zhang and others (2024) find that the blocks of a transformer's Hessian have heterogeneous spectra,
and those of a convolutional network homogeneous ones, at initialization. Here: a GPT on the
characters of a text (width 64, two layers, 400 steps of Adam; a block for each kernel and
embedding, with q, k and v by themselves) on 32 sequences of 64, and ResNet-20 with published
weights on 128 CIFAR-10 images (stored statistics of batch normalization; a block for each stage,
because one for each kernel takes a GPU: --resnet-groups leaf). Biases and normalization layers are
left out. The densities are those of `hd.layer_densities` with blocks of 2 starts and 10 steps.

JS is the mean Jensen-Shannon divergence over all pairs of blocks, in bits, between 0 and 1. The
densities are smoothed with a standard deviation of sqrt(1e-5) as by Zhang and others ("theirs"), or
of a tenth of the root mean square eigenvalue of all blocks together ("relative"), because the first
one depends on the scale of the loss. Zhang and others add up values on a grid of 50,000 points
instead, so that their numbers (83 for GPT-2, 0.1 for ResNet-18) have another unit. In parentheses:
the divergence of the two starts of the same block. The noise of the divergences between blocks is
about half of it, because their densities are means over two starts. Spread is the ratio of the
largest and the smallest root mean square eigenvalue of the blocks. The cosine is that of products
with the block-diagonal part and with the whole Hessian (`BlockDiagonal.cosine`).

Answer (2026-11-26, 8.5 minutes on two cores beside other work):

                        blocks   loss     JS, theirs   JS, relative   spread         cosine     s
    GPT, initial            15  4.732  0.136 (0.030)  0.082 (0.014)     37.1  0.222 ± 0.009   144
    GPT, trained            15  2.296  0.099 (0.040)  0.060 (0.020)     21.0  0.393 ± 0.017    64
    ResNet-20, initial       5  3.314  0.258 (0.131)  0.028 (0.022)      4.6  0.672 ± 0.014   142
    ResNet-20, trained       5  0.630  0.314 (0.185)  0.021 (0.012)     14.2  0.713 ± 0.017    76

In units of the root mean square eigenvalue, the blocks of the GPT differ about three times as much
as those of ResNet-20, at initialization and after training. For ResNet-20 the divergence is hardly
above its noise. In the GPT it is largest between the embeddings and the second layer, up to 0.31,
and small between q, k and v of one layer. Under the fixed smoothing, ResNet-20 seems to be the
heterogeneous one, but so is its noise: its eigenvalues are eight times as large, and the smoothing
is then too narrow for ten steps. Block sizes matter, too: a stage averages over its kernels.

Of the Hessian's Frobenius norm, the blocks hold 22 % in the GPT at initialization and 39 % after
training, so that most of a product with the Hessian comes from outside of the blocks. In ResNet-20
they hold 67 % and 71 %, as there are only five of them.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import hessdensity as hd
from benchmarks._harness import save
from benchmarks.models.data import cifar10, folder, shakespeare
from benchmarks.models.gpt import GPT
from benchmarks.models.resnet import ResNet, load_weights, normalize
from benchmarks.models.training import population_statistics, train_with_adam
from hessdensity import adapters, losses
from hessdensity.vectors import trees

THEIR_DEVIATION = 1e-5**0.5  # of the smoothing, in eigenvalue units
RELATIVE = 0.1  # the other smoothing, in units of the network's root mean square eigenvalue


class Problem(NamedTuple):
    """The Hessian of a network at two points, and its blocks."""

    hessians: dict[str, hd.Hessian]
    groups: dict[str, Any]


def gpt(args: argparse.Namespace) -> Problem:
    """A character GPT, at initialization and after training with Adam."""
    model = GPT(width=args.gpt_width, depth=args.gpt_depth, max_length=args.length)
    tokens, following = map(jnp.asarray, shakespeare(4096, args.length))
    variables = model.init(jax.random.key(0), tokens[:1])
    loss, start = adapters.from_linen(model, variables, losses.cross_entropy)
    params = train_with_adam(loss, start, (tokens, following), args.gpt_steps)
    batches = [(tokens[: args.sequences], following[: args.sequences])]
    groups: dict[str, Any] = {"tokens": "tokens/*", "positions": "positions/*"}
    for index in range(args.gpt_depth):
        parts = hd.slices(f"attention_{index}/qkv/kernel", axis=1, parts=3)
        groups |= {
            f"{name} {index}": part for name, part in zip("qkv", parts.values(), strict=True)
        }
        groups[f"out {index}"] = f"attention_{index}/out/kernel"
        groups[f"expand {index}"] = f"expand_{index}/kernel"
        groups[f"contract {index}"] = f"contract_{index}/kernel"
    groups["head"] = "head/kernel"
    points = {"initial": start, "trained": params}
    return Problem(
        {name: hd.Hessian(loss, at, batches, where=is_matrix) for name, at in points.items()},
        groups,
    )


def resnet20(args: argparse.Namespace) -> Problem:
    """ResNet-20 on CIFAR-10, at initialization and with published weights."""
    model = ResNet(20)
    images, labels = cifar10("train", args.images)
    inputs = normalize(images)
    initial = model.init(jax.random.key(0), inputs[:1])
    points = {
        "initial": population_statistics(model, initial, inputs),
        "trained": load_weights(folder("weights") / "cifar10_resnet20.safetensors"),
    }
    batches = hd.batches((np.asarray(inputs), labels), args.batch_size)
    hessians = {}
    for name, variables in points.items():
        loss, params = adapters.from_linen(
            model,
            variables,
            losses.cross_entropy,
            batch_statistics="stored",
            use_running_average=True,
        )
        hessians[name] = hd.Hessian(loss, params, batches, where=is_matrix)
    return Problem(hessians, RESNET_GROUPS[args.resnet_groups])


def is_matrix(path: str) -> bool:
    """Whether a leaf is a kernel or an embedding: biases and normalization layers are left out."""
    return path.endswith(("kernel", "embedding"))


STAGES = ("layer1", "layer2", "layer3")
RESNET_GROUPS: dict[str, Any] = {
    "stage": {"conv1": "conv1/*", **{s: f"{s}_*" for s in STAGES}, "linear": "linear/*"},
    "block": {
        "conv1": "conv1/*",
        **{f"{s}_{i}": f"{s}_{i}/*" for s in STAGES for i in range(3)},
        "linear": "linear/*",
    },
    "leaf": None,
}


# Distances ----------------------------------------------------------------------------------------


def shannon_distance(first: Any, second: Any, deviation: float) -> float:
    """The Jensen-Shannon divergence of two smoothed measures in bits, between 0 and 1.

    Args:
      first: (nodes, weights) of a measure of mass 1.
      second: those of the other one.
      deviation: standard deviation of the Gaussian that smooths them.
    """
    nodes = np.concatenate([first[0], second[0]])
    offsets = np.arange(-6, 6.01, 0.5) * deviation
    grid = np.unique((nodes[:, None] + offsets).ravel())
    p, q = (_smoothed(grid, *each, deviation) for each in (first, second))
    mean = (p + q) / 2
    divergences = [
        np.trapezoid(np.where(x > 0, x * np.log2(np.where(x > 0, x / mean, 1)), 0), grid)
        for x in (p, q)
    ]
    return float(np.clip(np.mean(divergences), 0, 1))


def _smoothed(grid: np.ndarray, nodes: Any, weights: Any, deviation: float) -> np.ndarray:
    found = np.zeros_like(grid)
    for node, weight in zip(nodes, weights, strict=True):
        found += weight * np.exp(-0.5 * ((grid - node) / deviation) ** 2)
    # Trapezoids between the peaks of a narrow kernel do not add up to 1 exactly.
    return np.maximum(found / np.trapezoid(found, grid), 1e-300)


def measure_of(density: hd.SpectralDensity, rules: slice = slice(None)) -> tuple[Any, Any]:
    """(nodes, weights) of the mean of some rules of a density."""
    nodes, weights = zip(*(rule.estimate for rule in density.rules[rules]), strict=True)
    return np.concatenate(nodes), np.concatenate(weights) / len(nodes)


def distances(densities: dict[str, hd.SpectralDensity], deviation: float) -> np.ndarray:
    """The divergences of all pairs. On the diagonal are those of two starts of the same block."""
    names = list(densities)
    found = np.zeros((len(names), len(names)))
    every = [measure_of(density) for density in densities.values()]
    for i, j in itertools.combinations(range(len(names)), 2):
        found[i, j] = found[j, i] = shannon_distance(every[i], every[j], deviation)
    for i, density in enumerate(densities.values()):
        starts = measure_of(density, slice(0, 1)), measure_of(density, slice(1, 2))
        found[i, i] = shannon_distance(*starts, deviation)
    return found


# The measurement ----------------------------------------------------------------------------------


def measure(hessian: hd.Hessian, groups: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The densities of all blocks, their distances, and the cosine of the products."""
    start = time.perf_counter()
    blocks = hd.BlockDiagonal(hessian, groups)
    densities = hd.layer_densities(
        blocks,
        jax.random.key(1),
        block_size=args.block_size,
        num_steps=args.num_steps,
        progress=False,
    )
    # Two vectors at once, as in the densities, so that no further program is compiled.
    keys = jax.random.split(jax.random.key(2), args.vectors // 2)
    cosines = [blocks.cosine(key, 2).value for key in keys]
    sizes = {name: density.dimension for name, density in densities.items()}
    squares = [density.dimension * density.moment(2).value for density in densities.values()]
    scale = float(np.sqrt(sum(squares) / sum(sizes.values())))
    return {
        "sizes": sizes,
        "largest": {name: density.extremes().largest.value for name, density in densities.items()},
        "mean": {name: density.moment(1).value for name, density in densities.items()},
        "rms": {
            name: float(np.sqrt(density.moment(2).value)) for name, density in densities.items()
        },
        "scale": scale,
        "theirs": distances(densities, THEIR_DEVIATION).tolist(),
        "relative": distances(densities, RELATIVE * scale).tolist(),
        "cosine": [float(np.mean(cosines)), float(np.std(cosines) / np.sqrt(len(cosines)))],
        "loss": hessian.describe()["loss"],
        "seconds": time.perf_counter() - start,
    }


def pairs(matrix: Any) -> tuple[float, float]:
    """(the mean over all pairs, the mean of the diagonal)."""
    array = np.asarray(matrix)
    upper = array[np.triu_indices(len(array), 1)]
    return float(upper.mean()), float(np.diag(array).mean())


def report(name: str, found: dict[str, Any]) -> None:
    """Print the summary of a network."""
    theirs, their_floor = pairs(found["theirs"])
    relative, floor = pairs(found["relative"])
    spread = max(found["rms"].values()) / min(found["rms"].values())
    cosine, error = found["cosine"]
    print(
        f"{name:19}{len(found['sizes']):>7}{found['loss']:>7.3f}"
        f"{f'{theirs:.3f} ({their_floor:.3f})':>15}{f'{relative:.3f} ({floor:.3f})':>15}"
        f"{spread:>9.1f}{f'{cosine:.3f} ± {error:.3f}':>15}{found['seconds']:>6.0f}",
        flush=True,
    )


HEADER = (
    f"{'':19}{'blocks':>7}{'loss':>7}{'JS, theirs':>15}{'JS, relative':>15}{'spread':>9}"
    f"{'cosine':>15}{'s':>6}"
)


def draw(results: dict[str, dict[str, Any]]) -> plt.Figure:
    """Heat maps of the divergences under the relative smoothing."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(4.2 * len(results), 4.6), layout="constrained", squeeze=False
    )
    most = max(np.triu(found["relative"], 1).max() for found in results.values())
    for ax, (name, found) in zip(axes[0], results.items(), strict=True):
        matrix = np.array(found["relative"])
        np.fill_diagonal(matrix, np.nan)
        image = ax.imshow(matrix, vmin=0, vmax=most, cmap="viridis")
        labels = list(found["sizes"])
        ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        ax.set_yticks(range(len(labels)), labels, fontsize=8)
        ax.set_title(f"{name}: mean {pairs(found['relative'])[0]:.3f}")
    figure.colorbar(image, ax=axes, shrink=0.7, label="Jensen-Shannon divergence, bits")
    return figure


PROBLEMS: dict[str, Callable[[argparse.Namespace], Problem]] = {"GPT": gpt, "ResNet-20": resnet20}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--gpt-width", type=int, default=64)
    parser.add_argument("--gpt-depth", type=int, default=2)
    parser.add_argument("--gpt-steps", type=int, default=400)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--resnet-groups", default="stage", choices=RESNET_GROUPS)
    parser.add_argument("--block-size", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--vectors", type=int, default=6, help="for the cosines, even")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    results = {}
    print(HEADER)
    for problem_name in args.problems:
        problem = PROBLEMS[problem_name](args)
        for point, hessian in problem.hessians.items():
            name = f"{problem_name}, {point}"
            results[name] = measure(hessian, problem.groups, args)
            report(name, results[name])
        size = trees.size(hessian.like)
        print(f"  n = {size:,}; rms eigenvalue of each block, trained:")
        print("  " + ", ".join(f"{k} {v:.2g}" for k, v in results[name]["rms"].items()), flush=True)
    path = save("block_spectra", results)
    draw(results).savefig(path.with_suffix(".png"), dpi=110)
    print(f"saved in {path.name}, drawn in {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
