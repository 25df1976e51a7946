"""Does BatchNorm remove the Hessian's outliers, and the gradient from their eigenspace? Is it the
batch's statistics?

    python -m benchmarks.batchnorm_gradient
    python -m benchmarks.batchnorm_gradient --size paper  # for a GPU

The first trains ResNet-8 of width 8 on 4,096 images of 16 x 16 pixels, the second ResNet-32 on
CIFAR-10, for 100,000 steps.

The question of Ghorbani, Krishnan and Xiao (2019). One ResNet is trained on CIFAR-10 in three ways:
without normalization; with BatchNorm on the batch's statistics; with BatchNorm on those of the
whole training set, which are constants for the gradient. As there, the loss is the mean
cross-entropy + 2e-4 x half the squared kernels, for training and for the Hessian, whose batches of
128 are fixed: with batch statistics it is that of the mean over these batches. At every checkpoint:
the density, zeta = lambda_1 / lambda_10 of the largest eigenvalues, and the gradient's
concentration, the share of its squared norm in their eigenspace. A fourth row, "seen otherwise", is
the network trained with the batch's statistics under those of the whole set: the same parameters,
another Hessian.

Answer (2026-11-21, one key; the Hessian's data are the first 1,024 training images; 90 products a
line):

                            step   loss train  test lambda_1 lambda_10 smallest   zeta concentration
    none                       0  2.992  9.0%  7.8%   99.117    13.614  -21.193   7.28         0.957
    none                      32  2.141 21.1% 21.1%    9.917     0.959   -0.497  10.34         0.722
    none                     128  1.816 33.0% 31.6%   11.863     1.309   -0.824   9.06         0.882
    none                     512  1.286 56.3% 44.0%   10.648     2.282   -0.374   4.67         0.780
    none                   1,024  0.527 85.9% 44.8%   14.122     4.227   -0.218   3.34         0.746
    batch                      0  2.593  9.2%  8.8%    4.895     1.076  -21.139   4.55         0.749
    batch                     32  1.930 29.8% 29.0%    6.097     1.247   -0.489   4.89         0.651
    batch                    128  1.553 45.5% 41.0%    4.143     1.518   -0.287   2.73         0.561
    batch                    512  0.767 75.9% 43.6%    4.069     2.048   -0.350   1.99         0.506
    batch, seen otherwise    512  0.740 75.9% 43.6%   49.905     6.033   -0.799   8.27         0.792
    batch                  1,024  0.213 99.5% 45.2%    3.106     1.533   -0.039   2.03         0.259
    batch, seen otherwise  1,024  0.189 99.5% 45.2%   29.659     3.551   -0.076   8.35         0.283
    population                 0  2.595  9.2%  8.8%   27.892     5.131   -7.553   5.44         0.921
    population                32  1.985 28.9% 28.8%   17.503     1.749   -0.715  10.01         0.325
    population               128  1.697 37.9% 36.8%   11.790     1.686   -0.368   6.99         0.903
    population               512  1.587 45.3% 42.4%   10.214     1.549   -0.385   6.60         0.956
    population             1,024  1.491 52.5% 46.9%   13.120     1.350   -0.115   9.72         0.890

As in the paper, zeta is smallest with the batch's statistics at every checkpoint, and large again
with the whole set's; so it is the statistics that follow the weights, not the normalization. The
gradient's concentration agrees but for step 32. Unlike the paper's, neither effect is absent with
the batch's statistics early in training (concentration 0.75 to 0.51), and without normalization
zeta falls as the training set is fitted. How slowly the population's loss falls depends on how old
its statistics are, here up to three steps (`refresh_every`): it is no clean comparison of speeds.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import hessdensity as hd
from benchmarks._harness import save
from benchmarks.models import training
from benchmarks.models.data import cifar10, downsample
from benchmarks.models.resnet import ResNet, normalize
from hessdensity import adapters, losses
from hessdensity.plots.density import plot_density

RANK = 10  # the number of classes
BATCH_SIZE = 128
WEIGHT_DECAY = 2e-4
TOLERANCE = 1e-3  # of a residual, over the largest eigenvalue
NONE, BATCH, POPULATION, SEEN = "none", "batch", "population", "batch, seen otherwise"


class Size(NamedTuple):
    """One experiment."""

    depth: int
    width: int
    side: int  # pixels of an image
    images: int
    test_images: int
    hessian_images: int  # the first of the images
    num_steps: int
    schedule: dict[int, float]  # the step at which the learning rate is multiplied, and by what
    refresh_every: int  # steps between two looks at the whole set's statistics
    checkpoints: tuple[int, ...]
    augment: bool
    learning_rate: float = 0.1
    deflation_steps: int = 60
    lanczos_steps: int = 30


SIZES = {
    "trial": Size(
        depth=8,
        width=8,
        side=8,
        images=256,
        test_images=100,
        hessian_images=128,
        num_steps=8,
        schedule={},
        refresh_every=1,
        checkpoints=(0, 4, 8),
        augment=False,
        deflation_steps=20,
        lanczos_steps=5,
    ),
    "small": Size(
        depth=8,
        width=8,
        side=16,
        images=4096,
        test_images=2000,
        hessian_images=1024,
        num_steps=1024,
        schedule={768: 0.1},
        refresh_every=4,
        checkpoints=(0, 32, 128, 512, 1024),
        augment=False,
    ),
    "paper": Size(
        depth=32,
        width=16,
        side=32,
        images=50_000,
        test_images=10_000,
        hessian_images=50_000,
        num_steps=100_000,
        schedule={40_000: 0.1, 60_000: 0.1, 80_000: 0.1},
        # The whole set's statistics cost a pass over it, as much as many steps: they are a few
        # steps old.
        refresh_every=100,
        checkpoints=(0, 500, 5_000, 30_000, 50_000, 100_000),
        augment=True,
        deflation_steps=90,
        lanczos_steps=60,
    ),
}


def objective(criterion: Any, params: Any, batch: Any) -> jax.Array:
    """The loss that is trained: with the squared kernels."""
    return criterion(params, batch) + WEIGHT_DECAY * training.half_squared_kernels(params)


def problem(model: ResNet, variables: Any, statistics: str) -> tuple[Any, Any]:
    """(loss, params) of a checkpoint as the variant's training sees it."""
    options: dict[str, Any] = {}
    if model.normalize:
        stored = statistics == POPULATION
        options = {
            "batch_statistics": "stored" if stored else "batch",
            "use_running_average": stored,
        }
    criterion, params = adapters.from_linen(model, variables, losses.cross_entropy, **options)
    return jax.tree_util.Partial(objective, criterion), params


def measure(
    model: ResNet, variables: Any, statistics: str, data: Any, size: Size
) -> dict[str, Any]:
    """The figures of one checkpoint, with its density."""
    start = time.perf_counter()
    key = jax.random.key(2)
    loss, params = problem(model, variables, statistics)
    hessian = hd.Hessian(loss, params, data)
    density = hd.spectral_density(
        hessian,
        key,
        num_steps=size.lanczos_steps,
        num_probes=1,
        deflation_steps=size.deflation_steps,
        keep_eigenspace=True,
        progress=False,
    )
    top = density.eigenspace[:RANK]
    num_matvecs = density.num_matvecs
    accepted = TOLERANCE * np.abs(density.eigenspace.values).max()
    if np.any(top.residuals > accepted):
        # Early in training the ten largest are no outliers, and a single run does not find them
        # all.
        top = hd.top_eigenspace(
            hessian, key, RANK, which="LA", tolerance=TOLERANCE, start=top, progress=False
        )
        num_matvecs += top.num_matvecs
    gradient = hd.gradient(loss, params, data)
    smallest = density.extremes().smallest
    trace = density.trace()
    return {
        "loss": hessian.describe()["loss"],
        "eigenvalues": top.values.tolist(),
        "residuals": top.residuals.tolist(),
        "converged": bool(np.all(top.residuals <= accepted)),
        "zeta": float(top.values[0] / top.values[-1]),
        "gradient_concentration": np.asarray(hd.gradient_concentration(gradient, top)).tolist(),
        "smallest": [smallest.value, smallest.standard_error],
        "trace": [trace.value, trace.standard_error],
        "num_matvecs": num_matvecs,
        "seconds": time.perf_counter() - start,
        "density": density,
    }


def experiment(size: Size, variant: str) -> Iterator[dict[str, Any]]:
    """Train one variant; the figures of every checkpoint."""
    images, labels = cifar10("train", size.images)
    arrays = np.asarray(normalize(downsample(images, size.side))), labels
    test_images, test_labels = cifar10("test", size.test_images)
    test = np.asarray(normalize(downsample(test_images, size.side))), test_labels
    data = hd.batches(tuple(array[: size.hessian_images] for array in arrays), BATCH_SIZE)
    model = ResNet(size.depth, width=size.width, normalize=variant != NONE)
    run = training.train(
        model,
        model.init(jax.random.key(0), arrays[0][:1]),
        arrays,
        jax.random.key(1),
        num_steps=size.num_steps,
        schedule=optax.piecewise_constant_schedule(size.learning_rate, size.schedule),
        batch_size=BATCH_SIZE,
        weight_decay=WEIGHT_DECAY,
        statistics="population" if variant == POPULATION else "batch",
        refresh_every=size.refresh_every,
        checkpoints=size.checkpoints,
        augment=training.crop_and_flip if size.augment else None,
    )
    for step, variables in run:
        if variant == BATCH:  # running averages lag behind the parameters
            variables = training.population_statistics(model, variables, arrays[0])
        about = {
            "step": step,
            "train_accuracy": training.accuracy(model, variables, arrays),
            "test_accuracy": training.accuracy(model, variables, test),
        }
        yield {"variant": variant, **about, **measure(model, variables, variant, data, size)}
        if variant == BATCH and step in size.checkpoints[-2:]:
            yield {"variant": SEEN, **about, **measure(model, variables, POPULATION, data, size)}


# The width of each column, its format, and its value.
COLUMNS: dict[str, tuple[int, str, Callable[[dict[str, Any]], Any]]] = {
    "step": (7, ",", lambda record: record["step"]),
    "loss": (8, ".3f", lambda record: record["loss"]),
    "train": (7, ".1%", lambda record: record["train_accuracy"]),
    "test": (7, ".1%", lambda record: record["test_accuracy"]),
    "lambda_1": (10, ".3f", lambda record: record["eigenvalues"][0]),
    "lambda_10": (10, ".3f", lambda record: record["eigenvalues"][-1]),
    "smallest": (10, ".3f", lambda record: record["smallest"][0]),
    "zeta": (8, ".2f", lambda record: record["zeta"]),
    "concentration": (15, ".3f", lambda record: record["gradient_concentration"][-1]),
}
HEADER = " " * 22 + "".join(f"{name:>{width}}" for name, (width, _, _) in COLUMNS.items())


def row(record: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [f"{record['variant']:22}"]
    for width, form, value in COLUMNS.values():
        cells.append(f"{value(record):>{width}{form}}")
    if not record["converged"]:
        cells.append("  not converged")
    return "".join(cells)


def draw(records: list[dict[str, Any]], size: Size) -> plt.Figure:
    """The last two spectra of each variant, and what happens along training."""
    variants = (NONE, POPULATION, BATCH, SEEN)
    titles = {
        NONE: "no normalization",
        POPULATION: "BatchNorm, the whole set's statistics",
        BATCH: "BatchNorm, the batch's statistics",
        SEEN: "trained with the batch's statistics,\nseen with the whole set's",
    }
    figure = plt.figure(figsize=(14, 8), layout="constrained")
    grid = figure.add_gridspec(2, 12)
    for column, variant in enumerate(variants):
        ax = figure.add_subplot(grid[0, 3 * column : 3 * column + 3])
        before, last = [record for record in records if record["variant"] == variant][-2:]
        for record, color in ((before, "0.7"), (last, f"C{column}")):
            plot_density(
                record["density"],
                ax,
                bandwidth=record["eigenvalues"][0] / 200,
                color=color,
                label=f"step {record['step']:,}",
                outliers=record is last,
            )
        ax.set_title(titles[variant], fontsize=10)
        ax.legend(frameon=False, fontsize=7)
    panels = {
        "loss": "loss",
        "zeta = lambda_1 / lambda_10": "zeta",
        "gradient's share in the top 10 eigenvectors": "concentration",
    }
    for index, (name, column_name) in enumerate(panels.items()):
        _, _, value = COLUMNS[column_name]
        ax = figure.add_subplot(grid[1, 4 * index : 4 * index + 4])
        for column, variant in enumerate(variants):
            chosen = [record for record in records if record["variant"] == variant]
            points = [(record["step"], value(record)) for record in chosen]
            style = "--" if variant == SEEN else "-"
            ax.plot(*zip(*points, strict=True), "o" + style, color=f"C{column}", label=variant)
        ax.set_xscale("symlog", linthresh=min(step for step in size.checkpoints if step))
        ax.set(xlabel="step", ylabel=name)
        if "share" in name:
            ax.set_ylim(0, 1)
    ax.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    name = parser.parse_args().size
    size = SIZES[name]
    records = []
    print(HEADER, flush=True)
    for variant in (NONE, BATCH, POPULATION):
        for record in experiment(size, variant):
            records.append(record)
            print(row(record), flush=True)
        # After every variant: an hour's work should survive the next one's failure.
        kept = [
            {name: value for name, value in record.items() if name != "density"}
            for record in records
        ]
        path = save(f"batchnorm_gradient_{name}", {"size": size._asdict(), "checkpoints": kept})
    draw(records, size).savefig(path.with_suffix(".png"), dpi=110)
    print(f"saved in {path.name}, drawn in {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
