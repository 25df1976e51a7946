"""What is the Hessian of a trained CIFAR-10 network like: its density, its outliers, and where the
gradient lies?

    python -m benchmarks.cifar_trained

ResNet-20 and ResNet-32 with published weights, BatchNorm on its stored statistics, mean
cross-entropy over the first 1,024 training images. One deflated run gives the density; its own Ritz
vectors give the ten largest eigenvalues and their eigenspace, for no further product. zeta =
lambda_1 / lambda_10, and the gradient's concentration, the share of its squared norm in that
eigenspace, are those of Ghorbani, Krishnan and Xiao (2019).

Answer (2026-11-21, 2 shared cores of an AMD EPYC, about 50 minutes each; ResNet-32 with
--deflation-steps 45 and --num-steps 25). All ten pairs converged. The images are JPEG copies of
those that the networks were trained on, hence the loss.

                test    loss   lambda_1   lambda_10   zeta   smallest          trace   concentration
    ResNet-20 81.03%   0.485      170.3        35.6   4.79      -4.30    2008 +- 70            0.879
    ResNet-32 82.56%   0.503      296.0        46.1   6.42      -4.53   2786 +- 121            0.728

Most of the gradient lies in the top ten directions, as in the paper for networks without batch
statistics, but next to nothing of it in the first two: 0.001 (ResNet-20) and 0.066 (ResNet-32).

The figures are of fewer images (2026-11-26). With `--images 256 --test-images 2000`, ResNet-20 has
a loss of 0.536, lambda_1 188.6, lambda_10 51.5, zeta 3.66, smallest -8.27, a trace of 2060 (1804 to
2317) and a concentration of 0.771. With `--images 128 --test-images 500 --deflation-steps 45
--num-steps 25`, ResNet-32 has a loss of 0.353, lambda_1 411.6, lambda_10 73.6, zeta 5.59, smallest
-13.2, a trace of 2518 (2188 to 2849) and a concentration of 0.539. Their bands show that 95 and 70
products do not resolve the densities between 0.1 and 1 in size."""

import argparse
import time
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

import hessdensity as hd
from benchmarks._harness import save
from benchmarks.models.data import cifar10, folder
from benchmarks.models.resnet import ResNet, load_weights, normalize
from benchmarks.models.training import accuracy
from hessdensity import adapters, losses
from hessdensity.plots.density import plot_density

BATCH_SIZE = 128
RANK = 10  # the number of classes


def measure(depth: int, args: argparse.Namespace) -> tuple[dict[str, Any], hd.SpectralDensity]:
    """The figures of one network, and its density."""
    model = ResNet(depth)
    variables = load_weights(folder("weights") / f"cifar10_resnet{depth}.safetensors")
    images, labels = cifar10("test", args.test_images)
    right = accuracy(model, variables, (normalize(images), labels))
    print(f"ResNet-{depth}: {right:.2%} of {len(labels):,} test images right", flush=True)

    images, labels = cifar10("train", args.images)
    data = hd.batches((np.asarray(normalize(images)), labels), BATCH_SIZE)
    loss, params = adapters.from_linen(
        model, variables, losses.cross_entropy, batch_statistics="stored", use_running_average=True
    )
    hessian = hd.Hessian(loss, params, data)
    start = time.perf_counter()
    density = hd.spectral_density(
        hessian,
        jax.random.key(0),
        num_steps=args.num_steps,
        num_probes=args.num_probes,
        deflation_steps=args.deflation_steps,
        keep_eigenspace=True,
    )
    seconds = time.perf_counter() - start
    eigenspace = density.eigenspace[:RANK]
    smallest = density.extremes().smallest
    gradient = hd.gradient(loss, params, data)
    concentration = hd.gradient_concentration(gradient, eigenspace)
    trace = density.trace()
    result = {
        "depth": depth,
        "num_params": density.dimension,
        "test_accuracy": right,
        "test_images": args.test_images,
        "images": args.images,
        "batch_size": BATCH_SIZE,
        "loss": hessian.describe()["loss"],
        "seconds": seconds,
        "num_matvecs": density.num_matvecs,
        "deflation_steps": args.deflation_steps,
        "num_steps": args.num_steps,
        "num_probes": args.num_probes,
        "eigenvalues": eigenspace.values.tolist(),
        "residuals": eigenspace.residuals.tolist(),
        "converged": eigenspace.converged.tolist(),
        "smallest": [smallest.value, smallest.standard_error],
        "trace": [trace.value, trace.standard_error],
        "zeta": float(eigenspace.values[0] / eigenspace.values[-1]),
        "gradient_concentration": np.asarray(concentration).tolist(),
        "rules": [
            {"nodes": rule.nodes.tolist(), "weights": rule.weights.tolist()}
            for rule in density.rules
        ],
    }
    print(density)
    pairs = (eigenspace.values, eigenspace.residuals, eigenspace.converged, concentration)
    found = enumerate(zip(*pairs, strict=True), start=1)
    for rank, (value, residual, converged, share) in found:
        note = "" if converged else "  not converged"
        print(
            f"{rank:5} eigenvalue {value:10.4f}, residual {residual:.1e}, gradient up to here "
            f"{share:.3f}{note}"
        )
    print(
        f"      loss {result['loss']:.4f}, zeta {result['zeta']:.2f}, {seconds:.0f} s", flush=True
    )
    return result, density


def draw(result: dict[str, Any], density: hd.SpectralDensity) -> plt.Figure:
    """The density with its ten largest eigenvalues, and the gradient's share in them."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(2, 1)
    )
    plot_density(density, left, x_scale="symlog")
    left.plot(
        result["eigenvalues"],
        [0.02] * RANK,
        "|",
        color="C3",
        markersize=10,
        transform=left.get_xaxis_transform(),
    )
    left.set_title(
        f"ResNet-{result['depth']} on {result['images']:,} images: {density.num_matvecs} products"
    )
    right.bar(np.arange(1, RANK + 1), result["gradient_concentration"], color="C3")
    right.set(ylim=(0, 1), xlabel="k", ylabel="share of |gradient|$^2$ in the top k eigenvectors")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 32])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--deflation-steps", type=int, default=60)
    parser.add_argument("--num-steps", type=int, default=35)
    parser.add_argument("--num-probes", type=int, default=1)
    args = parser.parse_args()
    for depth in args.depth:
        result, density = measure(depth, args)
        path = save(f"cifar_trained_resnet{depth}", result)
        draw(result, density).savefig(path.with_suffix(".png"), dpi=120)
        print(f"saved in {path.name}, drawn in {path.with_suffix('.png').name}\n", flush=True)


if __name__ == "__main__":
    main()
