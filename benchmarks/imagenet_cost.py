"""What does a Hessian-vector product cost on an accelerator, for ImageNet's networks, beside
PyTorch's double backward?

    python -m benchmarks.imagenet_cost                # batches that fill an accelerator
    python -m benchmarks.imagenet_cost --size trial   # does it run? A few minutes of CPU

SqueezeNet 1.1 and ResNet-50 (stored statistics), float32, in two precisions of products: "highest",
and the device's default, which on accelerators is shorter (TF32, bfloat16). Both sides have the
same weights, batch and vector, and must agree on the loss and on H v before anything is timed; then
they take turns. PyTorch's inputs are normalized already, and of its two memory layouts the faster
one counts.

It has not run on an accelerator yet.
"""

import gc
import os
from collections.abc import Callable
from functools import partial
from typing import Any

# Leaves the other framework its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import click
import jax
import numpy as np

import hessdensity as hd
from benchmarks._harness import interleave, save
from benchmarks.imagenet import problem
from benchmarks.models.imagenet_networks import NETWORKS, Network
from benchmarks.models.weights import from_torch

PRECISIONS = ("highest", "default")
LAYOUTS = ("contiguous_format", "channels_last")
SIZES = {  # pixels (None: the network's), batch sizes
    "full": (None, (64, 128, 256, 512, 1024)),
    "trial": (64, (4,)),
}

# Dense TFLOP/s of one chip, by the beginning of what JAX calls it, as their makers state them:
# float32 "highest", and "default". TPUs make a float32 product of six in bfloat16.
PEAKS = {
    "NVIDIA A100": (19.5, 156.0),
    "NVIDIA H100": (67.0, 494.0),
    "NVIDIA H200": (67.0, 494.0),
    "TPU v4": (275 / 6, 275.0),
    "TPU v5 lite": (197 / 6, 197.0),
    "TPU v5p": (459 / 6, 459.0),
    "TPU v6 lite": (918 / 6, 918.0),
}


class Torch:
    """The same network in PyTorch, in one of its memory layouts, on its accelerator if any."""

    def __init__(self, name: str, layout: str) -> None:
        import torch

        from benchmarks.models.torch_networks import NETWORKS as networks

        self.torch = torch
        self._layout = getattr(torch, layout)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        model = networks[name]().eval()
        with torch.no_grad():
            for key, leaf in model.named_parameters():
                # Else, without trained statistics, the activations grow with every block.
                if key.endswith("bn3.weight"):
                    leaf.fill_(0.2)
        self.state = {key: leaf.numpy().copy() for key, leaf in model.state_dict().items()}
        self._model = model.to(self.device, memory_format=self._layout)

    def vector(self) -> dict[str, np.ndarray]:
        """A random vector, by the parameters' names."""
        rng = np.random.default_rng(0)
        shapes = {name: leaf.shape for name, leaf in self._model.named_parameters()}
        return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}

    def thunks(
        self, inputs: np.ndarray, labels: np.ndarray, vector: dict[str, np.ndarray], precision: str
    ) -> dict[str, Callable[[], Any]]:
        """The loss, its gradient and the product, each to be called without arguments."""
        torch = self.torch
        params = list(self._model.parameters())
        x = torch.from_numpy(inputs).to(self.device, memory_format=self._layout)
        y = torch.from_numpy(labels).to(self.device, torch.int64)
        v = [torch.from_numpy(leaf).to(self.device) for leaf in vector.values()]

        def loss() -> Any:
            for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
                backend.allow_tf32 = precision != "highest"
            return torch.nn.functional.cross_entropy(self._model(x), y)

        def finished(result: Any) -> Any:
            if self.device == "cuda":
                torch.cuda.synchronize()
            return [] if result is None else [leaf.detach().cpu().numpy() for leaf in result]

        def gradient(keep: bool = False) -> Any:
            result = torch.autograd.grad(loss(), params)
            return finished(result if keep else None)

        def product(keep: bool = False) -> Any:
            first = torch.autograd.grad(loss(), params, create_graph=True)
            result = torch.autograd.grad(first, params, v)
            return finished(result if keep else None)

        return {"loss": lambda: loss().item(), "gradient": gradient, "product": product}


def jax_thunks(
    network: Network, variables: Any, batch: Any, vector: Any, precision: str
) -> dict[str, Callable[[], Any]]:
    """As `Torch.thunks`, the product being the one that every user calls."""
    loss, params = problem(network, variables)
    hessian = hd.Hessian(loss, params, [batch], precision=precision)

    def mean(params: Any, batch: Any) -> jax.Array:
        total = loss(params, batch)
        return total.sum / total.count

    value, gradient = jax.jit(mean), jax.jit(jax.grad(mean))

    def run(function: Callable) -> Any:
        with jax.default_matmul_precision(precision):
            return function(params, batch)

    return {
        "loss": lambda: float(run(value)),
        "gradient": partial(run, gradient),
        "product": lambda: hessian @ vector,
    }


def flops(network: Network, variables: Any, batch: Any, vector: Any) -> dict[str, float]:
    """Operations an image, as the compiler counts them in what it has compiled."""
    loss, params = problem(network, variables)

    def gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: loss(p, batch).sum)(params)

    def product(params: Any, vector: Any, batch: Any) -> Any:
        return jax.jvp(partial(gradient, batch=batch), (params,), (vector,))[1]

    compiled = {
        "gradient": jax.jit(gradient).lower(params, batch).compile(),
        "product": jax.jit(product).lower(params, vector, batch).compile(),
    }
    return {
        name: program.cost_analysis()["flops"] / len(batch[1]) for name, program in compiled.items()
    }


def agree(
    ours: dict[str, Callable], theirs: dict[str, Callable], names: list[str]
) -> dict[str, float]:
    """How far the two sides are apart; raises if that is no rounding."""
    product = jax.tree.map(np.asarray, ours["product"]())
    other = from_torch(dict(zip(names, theirs["product"](keep=True), strict=True)))["params"]
    differences = jax.tree.map(lambda a, b: float(np.sum((a - np.asarray(b)) ** 2)), product, other)
    size = sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(product))
    losses = ours["loss"](), theirs["loss"]()
    apart = {
        "loss": abs(losses[0] / losses[1] - 1),
        "product": (sum(jax.tree.leaves(differences)) / size) ** 0.5,
    }
    # A unit within rounding of zero may be on here and off there; nothing else sets the two apart.
    if not (apart["loss"] < 1e-4 and apart["product"] < 1e-2):
        raise RuntimeError(
            f"the two sides differ, relative to their size, by {apart}: they are not the same "
            "problem"
        )
    return apart


def fits(thunk: Callable[[], Any]) -> bool:
    """Whether there is memory for a call."""
    try:
        jax.block_until_ready(thunk())
    except RuntimeError as error:
        if "out of memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error):
            gc.collect()
            return False
        raise
    return True


def measure(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The figures of one network, at every batch size and precision."""
    pixels, batch_sizes = SIZES[settings["size"]]
    network = NETWORKS[name]
    batch_sizes = settings["batch_sizes"] or batch_sizes
    pixels = pixels or network.size
    torch = {layout: Torch(name, layout) for layout in LAYOUTS}
    variables = jax.device_put(from_torch(torch[LAYOUTS[0]].state))
    vector = torch[LAYOUTS[0]].vector()
    ours = jax.device_put(from_torch(vector)["params"])
    rng = np.random.default_rng(1)
    result: dict[str, Any] = {"pixels": pixels, "runs": []}
    for batch_size in batch_sizes:
        images = rng.integers(0, 256, (batch_size, pixels, pixels, 3), np.uint8)
        labels = rng.integers(0, 1000, batch_size).astype(np.int32)
        batch = jax.device_put((images, labels))
        inputs = np.ascontiguousarray(np.asarray(network.normalize(images)).transpose(0, 3, 1, 2))
        for precision in PRECISIONS:
            mine = jax_thunks(network, variables, batch, ours, precision)
            if not fits(mine["product"]):
                result["runs"].append(
                    {"batch_size": batch_size, "precision": precision, "fits": False}
                )
                continue
            if "apart" not in result:
                theirs = torch[LAYOUTS[0]].thunks(inputs, labels, vector, precision)
                result["apart"] = agree(mine, theirs, list(vector))
                result["flops_per_image"] = flops(network, variables, batch, ours)
            timed = {"gradient": mine["gradient"], "product": mine["product"]}
            for layout in LAYOUTS:
                theirs = torch[layout].thunks(inputs, labels, vector, precision)
                if fits(theirs["product"]):
                    for key in ("gradient", "product"):
                        timed[f"torch {key}, {layout}"] = theirs[key]
            timings = interleave(timed, settings["repeats"])
            seconds = {key: timing._asdict() for key, timing in timings.items()}
            flops_per_image = result["flops_per_image"]
            run = _figures(batch_size, precision, seconds, flops_per_image, settings)
            result["runs"].append(run)
            _print(name, run)
    return result


def _figures(
    batch_size: int,
    precision: str,
    seconds: dict[str, Any],
    flops: dict[str, float],
    settings: dict[str, Any],
) -> dict[str, Any]:
    product = seconds["product"]["median"]
    peak = settings[f"peak_{precision}"] or _peak(precision)
    torch_gradient = _fastest(seconds, "torch gradient")
    torch_product = _fastest(seconds, "torch product")
    tflops_per_second = flops["product"] * batch_size / product / 1e12
    return {
        "batch_size": batch_size,
        "precision": precision,
        "fits": True,
        "seconds": seconds,
        "images_per_second": batch_size / product,
        "product_in_gradients": product / seconds["gradient"]["median"],
        "tflops_per_second": tflops_per_second,
        "peak_tflops_per_second": peak,
        "share_of_peak": peak and tflops_per_second / peak,
        "times_faster_than_torch": torch_product and torch_product / product,
        "torch_product_in_gradients": torch_product and torch_product / torch_gradient,
    }


def _fastest(seconds: dict[str, Any], beginning: str) -> float | None:
    found = [timing["median"] for key, timing in seconds.items() if key.startswith(beginning)]
    return min(found, default=None)


def _peak(precision: str) -> float | None:
    kind = jax.devices()[0].device_kind
    found = [peaks for name, peaks in PEAKS.items() if kind.startswith(name)]
    return found[0][PRECISIONS.index(precision)] if found else None


def _print(name: str, run: dict[str, Any]) -> None:
    cells = [
        f"{name:14}",
        f"{run['batch_size']:>6}",
        f"{run['precision']:>9}",
        f"{run['images_per_second']:>12.1f} images/s",
        f"{run['product_in_gradients']:>7.2f} gradients",
        f"{run['tflops_per_second']:>8.2f} TFLOP/s",
    ]
    share = run["share_of_peak"]
    if share is not None:
        cells.append(f", {share:.1%} of the peak")
    faster = run["times_faster_than_torch"]
    if faster is None:
        cells.append(", PyTorch: no memory")
    else:
        cells.append(f", {faster:.2f} times as fast as PyTorch")
    click.echo("".join(cells))


@click.command(context_settings={"show_default": True})
@click.option(
    "--size", type=click.Choice(list(SIZES)), default="full", help="Image and batch sizes."
)
@click.option(
    "--model",
    "models",
    type=click.Choice(["squeezenet1_1", "resnet50"]),
    multiple=True,
    help="Both.",
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    help="Instead of the size's.",
)
@click.option("--peak-highest", type=float, help="The chip's TFLOP/s in float32; known for some.")
@click.option(
    "--peak-default",
    type=float,
    help="The chip's TFLOP/s in the default precision; known for some.",
)
@click.option("--repeats", type=click.IntRange(min=2), default=5, help="Of every timing.")
def main(**settings: Any) -> None:
    """Time H v in JAX and in PyTorch."""
    result = {
        name: measure(name, settings)
        for name in settings["models"] or ("squeezenet1_1", "resnet50")
    }
    if settings["size"] == "trial":
        click.echo("a trial: it shows that this runs, and nothing about an accelerator; not saved")
        return
    click.echo(f"saved in {save('imagenet_cost', result).name}")


if __name__ == "__main__":
    main()
