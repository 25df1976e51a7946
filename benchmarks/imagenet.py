"""What is the spectrum of an ImageNet network's Hessian: its density and its top eigenvalues?

    python benchmarks/imagenet.py --model squeezenet1_1 --weights FILE.safetensors \\
        --data IMAGES --checkpoint FOLDER

IMAGES is an ImageFolder's root (ROOT/WORDNET_ID/*.JPEG) or Parquet shards. The images are decoded
once; every product then reads the same bytes in the same order. Give the same command again to
resume a killed run. On a cluster, the same command with --distributed on every process.

Answer (2026-11-21, 2 shared cores of an AMD EPYC, JAX 0.10.2), of

    python benchmarks/imagenet.py --model squeezenet1_1 --weights ... --data ... \\
        --num-images 100 --batch-size 10 --num-steps 40 --num-probes 1 --deflation-steps 40 \\
        --checkpoint ... --cache ...

killed (kill -9) after 22 of its 80 products and given again: the trained SqueezeNet 1.1, top-1 62.0
% and top-5 82.0 % of 100 images of both shards, mean loss 1.652. Ten eigenvalues with residuals
from 2.9e-4 to 2.4e-2: 259.5, 236.1, 212.6, 199.1, 187.6, 183.9, 170.0, 161.9, 152.9, 148.8;
smallest -23.2; trace 11986 +- 680. The second run took 1,288 s for 58 products, beside other work
on the machine, and waited for the loader 0.1 % of the time."""

import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: its own folder is on the path, the project's root is not
    sys.path[0] = str(Path(__file__).parents[1])

import click
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import hessdensity as hd
from benchmarks._harness import record, save
from benchmarks.models.image_batches import Batch, ImageBatches, Watched, load
from benchmarks.models.imagenet import open_source
from benchmarks.models.imagenet_networks import NETWORKS, Network
from hessdensity import distributed

# The settings of `hd.spectral_density` that are options here.
STEPS = ("num_steps", "block_size", "num_probes", "deflation_steps")


@dataclass(frozen=True)
class CrossEntropy:
    """loss(statistics, params, batch) over the batch's rows that hold an image. Equal for equal
    networks."""

    network: Network

    def __call__(self, statistics: Mapping[str, Any], params: Any, batch: Batch) -> hd.Total:
        images, labels = batch
        present = labels >= 0
        logits = self.network.logits({"params": params, **statistics}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return hd.Total(jnp.sum(jnp.where(present, losses, 0)), jnp.sum(present))


def problem(network: Network, variables: Mapping[str, Any]) -> tuple[Any, Any]:
    """(loss, params) for `hd.Hessian`; statistics are arguments of what is compiled, like the
    parameters."""
    statistics = {name: collection for name, collection in variables.items() if name != "params"}
    return jax.tree_util.Partial(CrossEntropy(network), statistics), variables["params"]


def accuracy(
    network: Network, variables: Mapping[str, Any], data: Iterable[Batch], mesh: Mesh | None
) -> tuple[float, float, int]:
    """Shares of the images whose label is the first, and among the first five, and how many there
    are."""
    counts = [0, 0, 0]
    for batch in data:
        if mesh is not None:
            rows = NamedSharding(mesh, PartitionSpec("data"))
            batch = tuple(jax.make_array_from_process_local_data(rows, part) for part in batch)
        right = _right(network, variables, batch)
        counts = [a + int(b) for a, b in zip(counts, right, strict=True)]
    first, five, images = counts
    if not images:
        raise ValueError("none of the images can be read; see what was skipped")
    return first / images, five / images, images


@partial(jax.jit, static_argnames="network")
def _right(network: Network, variables: Mapping[str, Any], batch: Batch) -> tuple[jax.Array, ...]:
    images, labels = batch
    logits = network.logits(variables, images)
    above = jnp.sum(logits > jnp.take_along_axis(logits, labels[:, None], axis=1), axis=1)
    present = labels >= 0
    return jnp.sum(present & (above < 1)), jnp.sum(present & (above < 5)), jnp.sum(present)


def read(settings: dict[str, Any], network: Network, devices: int, progress: bool) -> ImageBatches:
    """This process's images."""
    source = open_source(settings["data"])
    if settings["weights"] and source.num_classes not in (None, 1000):
        raise ValueError(
            f"{settings['data']} has {source.num_classes} class folders, but the weights know "
            "1,000 classes by the positions of their sorted WordNet ids; add the missing folders, "
            "empty ones will do"
        )
    return load(
        source,
        size=network.size,
        crop=network.crop,
        batch_size=settings["batch_size"],
        num_images=settings["num_images"],
        cache=settings["cache"],
        skip_unreadable=settings["skip_unreadable"],
        process=(jax.process_index(), jax.process_count()),
        multiple=devices,
        progress=progress,
    )


def measure(settings: dict[str, Any], say: Any) -> tuple[dict[str, Any], hd.SpectralDensity]:
    """The figures, and the density."""
    network = NETWORKS[settings["model"]]
    mesh, devices = None, 1
    progress = settings["progress"] and jax.process_index() == 0
    if settings["weights"]:
        variables = network.load(settings["weights"])
    else:
        variables = network.initial(jax.random.key(0))
        say("RANDOM WEIGHTS: no --weights given; this is the spectrum of an untrained network.")
    if settings["mesh"] or settings["distributed"]:
        mesh = distributed.make_mesh()
        devices = mesh.size
        variables = distributed.place(variables, mesh)
    start = time.perf_counter()
    data = read(settings, network, devices, progress)
    seconds_reading = time.perf_counter() - start
    for reason in data.content.unreadable:
        say(f"skipped: {reason}")
    top1, top5, num_images = accuracy(network, variables, data, mesh)
    say(
        f"{settings['model']}, {num_images:,} images ({len(data.content.unreadable)} skipped, read "
        f"in {seconds_reading:.0f} s): top-1 {top1:.1%}, top-5 {top5:.1%}"
    )
    shown = {
        "desc": "  this pass",
        "unit": "image",
        "leave": False,
        "miniters": 1,
        "disable": not progress,
    }
    with tqdm(total=len(data.content.labels), **shown) as bar:
        # A loader that hangs must not leave the other processes waiting for ever.
        watched = Watched(distributed.watch(data, timeout=600), bar)
        loss, params = problem(network, variables)
        hessian = hd.Hessian(loss, params, watched, precision=settings["precision"])
        optional = {"checkpoint": settings["checkpoint"]} if settings["checkpoint"] else {}
        start = time.perf_counter()
        density = hd.spectral_density(
            hessian,
            jax.random.key(settings["seed"]),
            **{name: settings[name] for name in STEPS},
            progress=progress,
            **optional,
        )
        seconds = time.perf_counter() - start
    top = density.outliers[: settings["rank"]]
    smallest = density.extremes().smallest
    trace = density.trace()
    result = {
        "model": settings["model"],
        "batch_size": settings["batch_size"],
        **{name: density.description[name] for name in STEPS},
        "trained": bool(settings["weights"]),
        "precision": settings["precision"],
        "num_params": density.dimension,
        "num_images": num_images,
        "skipped_by_this_process": data.content.unreadable,
        "top1": top1,
        "top5": top5,
        "loss": density.description["operator"].get("loss"),
        "num_matvecs": density.num_matvecs,
        "stopped": density.description.get("stopped"),
        "passes_in_this_run": watched.num_passes,
        "seconds_reading": seconds_reading,
        "seconds_in_this_run": seconds,
        "images_per_second": watched.num_images * jax.process_count() / seconds,
        "share_of_time_waiting_for_the_loader": watched.seconds_waiting / seconds,
        "eigenvalues": top[:, 0].tolist(),
        "residuals": top[:, 1].tolist(),
        "smallest": [smallest.value, smallest.standard_error],
        "trace": [trace.value, trace.standard_error],
    }
    return result, density


def report(result: dict[str, Any], density: hd.SpectralDensity, rank: int, say: Any) -> None:
    """The answer in words."""
    say(f"\n{density}\n")
    found = list(zip(result["eigenvalues"], result["residuals"], strict=True))
    say(f"top eigenvalues, {len(found)} of the {rank} asked for converged:")
    for number, (value, residual) in enumerate(found, start=1):
        say(f"{number:5} {value:14.6g}, residual {residual:.1e}")
    say(
        f"\n{result['passes_in_this_run']} passes in {result['seconds_in_this_run']:.0f} s, "
        f"{result['images_per_second']:.1f} images/s; waiting for the loader "
        f"{result['share_of_time_waiting_for_the_loader']:.1%} of the time"
    )


def write(result: dict[str, Any], density: hd.SpectralDensity, out: str | None) -> Path:
    """Density, figure and JSON, as `out` with their suffixes, or among the benchmarks' results; the
    JSON's path."""
    import matplotlib.pyplot as plt

    question = f"imagenet_{result['model']}"
    if out is None:
        path = save(question, result)
    else:
        path = Path(f"{out}.json")
        path.write_text(json.dumps(record(question, result), indent=2) + "\n")
    stem = str(path).removesuffix(".json")
    density.save(f"{stem}.npz")
    figure, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
    density.plot(ax, x_scale="symlog")
    ax.set_title(
        f"{result['model']} on {result['num_images']:,} ImageNet images: {result['num_matvecs']} "
        "products"
    )
    figure.savefig(f"{stem}.png", dpi=120)
    return path


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option(
    "--model", type=click.Choice(list(NETWORKS)), default="squeezenet1_1", help="The network."
)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False),
    help="Safetensors file, PyTorch's names.",
)
@click.option(
    "--data",
    required=True,
    help="ImageFolder's root; a Parquet file, a folder of them, or FOLDER/val*.",
)
@click.option(
    "--num-images",
    type=click.IntRange(min=1),
    help="At most as many, evenly spaced; all by default.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=50, help="Images a batch, over all devices."
)
@click.option(
    "--num-steps", type=click.IntRange(min=1), help="Lanczos steps, and passes of a block."
)
@click.option("--block-size", type=click.IntRange(min=2), help="Starts of a block, 5 by default.")
@click.option("--num-probes", type=click.IntRange(min=1), help="Random starts without a block.")
@click.option(
    "--deflation-steps", type=click.IntRange(min=0), help="Steps before probes without a block."
)
@click.option(
    "--precision",
    type=click.Choice(["highest", "high", "default"]),
    default="highest",
    help="Of products.",
)
@click.option("--seed", default=0, help="Seed of the probes.")
@click.option("--checkpoint", type=click.Path(), help="Folder from which a killed run resumes.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False),
    help="Folder on a local disk for the decoded images.",
)
@click.option("--skip-unreadable", is_flag=True, help="Leave unreadable images out of every pass.")
@click.option("--rank", type=click.IntRange(min=1), default=10, help="Top eigenvalues printed.")
@click.option("--mesh", is_flag=True, help="Spread weights, vectors and batches over all devices.")
@click.option(
    "--distributed", is_flag=True, help="As --mesh, over all processes of a cluster's job."
)
@click.option(
    "--out", help="Write OUT.npz, OUT.png and OUT.json; among the benchmarks' results by default."
)
@click.option("--progress/--no-progress", default=True, help="Show images/s and the time left.")
def main(**settings: Any) -> None:
    """Density and top eigenvalues of the Hessian of an ImageNet network's mean loss."""
    if settings["out"] and not Path(settings["out"]).absolute().parent.is_dir():
        raise click.BadParameter(f"--out {settings['out']}: that folder does not exist.")
    if settings["distributed"]:
        distributed.start()  # before JAX looks for devices
    first = jax.process_index() == 0
    say = partial(tqdm.write, file=sys.stdout) if first else lambda words: None
    try:
        result, density = measure(settings, say)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if first:
        report(result, density, settings["rank"], say)
        path = write(result, density, settings["out"])
        say(f"saved beside {path.name}: the density (.npz) and the figure (.png)")


if __name__ == "__main__":
    main()
