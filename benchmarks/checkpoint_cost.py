"""What does a checkpoint cost, as a share of a product with ResNet-50's Hessian at batch 256?

    python -m benchmarks.checkpoint_cost

ResNet-50, 25,557,032 weights, 224 x 224 random images in one batch of 256, 16 at a time
(`microbatch`), stored statistics. The vectors of Lanczos steps, one probe, are saved as
`checkpoint=` does, each on its own: "blocked" is the time until the run may go on, "whole" the time
until the step is on disk, which another thread spends beside the next product.

Answer (2026-11-21, 2 shared cores of an AMD EPYC, beside other work): 94.6 MB a step; blocked 0.048
s and whole 0.48 s, 0.016 % and 0.16 % of a product's 291 s."""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import hessdensity as hd
from benchmarks._harness import save
from benchmarks.models.imagenet_networks import NETWORKS
from hessdensity import adapters, losses
from hessdensity.krylov.engine import Step
from hessdensity.runs.steps import SavedSteps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--microbatch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    network = NETWORKS["resnet50"]
    random = np.random.default_rng(0)
    images = network.normalize(
        random.integers(0, 256, (args.batch_size, network.size, network.size, 3), np.uint8)
    )
    batch = np.asarray(images), random.integers(0, 1000, args.batch_size)
    loss, params = adapters.from_linen(
        network.model,
        network.initial(jax.random.key(0)),
        losses.cross_entropy,
        batch_statistics="stored",
    )
    hessian = hd.Hessian(loss, params, [batch], microbatch=args.microbatch)
    vectors = jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal((1, *leaf.shape)), leaf.dtype), hessian.like
    )

    blocked, whole = [], []
    folder = Path(tempfile.mkdtemp())
    steps = SavedSteps(folder, hd.FunctionOperator(lambda v: v, hessian.like), {})
    with steps.kept():
        for index in range(args.steps):
            start = time.perf_counter()
            scalars = {"diagonal": [0.0], "deflation_coupling": [[0.0] * 96]}
            steps.add(Step(vectors, scalars), 1)
            middle = time.perf_counter()
            steps.finish()
            if index:  # the first one makes threads
                blocked.append(middle - start)
                whole.append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / args.steps
    shutil.rmtree(folder)
    result = {
        "megabytes_a_step": size / 1e6,
        "blocked_seconds": statistics.median(blocked),
        "whole_seconds": statistics.median(whole),
    }
    print({name: round(value, 4) for name, value in result.items()}, flush=True)

    first, *_ = hd.batches(batch, args.microbatch)
    jax.block_until_ready(hd.Hessian(loss, params, [first]) @ vectors)  # compiles
    start = time.perf_counter()
    jax.block_until_ready(hessian @ vectors)
    result["product_seconds"] = time.perf_counter() - start
    for part in ("blocked", "whole"):
        result[f"{part}_share"] = result[f"{part}_seconds"] / result["product_seconds"]
    print({name: round(value, 5) for name, value in result.items()}, flush=True)
    if (args.batch_size, args.steps) == (256, 20):
        print(save("checkpoint_cost", result))


if __name__ == "__main__":
    main()
