"""What do products with all layers' blocks, and all layers' Kronecker factors, cost in gradients?

    python -m benchmarks.layer_cost [--only costs|top]

One batch, random weights and inputs. A block is a layer's kernel and bias (for the GPT and the
ResNet, all leaves of a module). In units of the gradient, by XLA's count of operations and by time:

- H v, one product with the whole Hessian;
- all blocks: `BlockDiagonal`, the derivative of the gradient by each block's leaves alone;
- masked: the same products from one linearization of the whole gradient, with L masked vectors;
- factors: the sums of `kronecker_factors`, in one call for the 10 outputs, or with 8 samples where
  an example has thousands of outputs.

The last lines time the 100 largest eigenpairs of the factors of a layer of 512 x 4,608 weights.

Answer (2026-11-26, two cores beside other work), in gradients by operations, and by time:

                            blocks 1.5 (1+L/3)         H v   all blocks       masked    factors
    F-200^2, 3 layers            3         3.0  1.74  1.39  1.56   1.32   4.32   3.47  4.81 4.31
    MLP, 10 layers              10         6.5  2.25  1.97  3.19   2.67  17.22  14.94  6.33 5.61
    ResNet-8, 16 x 16           15         9.0  2.57  2.04  6.11   3.56  29.15  18.61  7.25 4.16
    GPT, 8 x 64 tokens          28        15.5  2.71  2.52 18.56  14.15  56.78  39.21  8.92 4.48

The expected law of 1 + L/3 gradients holds for kernels, whose tangents need a matrix product of the
three of a gradient. In the GPT, the tangents of attention and of the elementwise operations between
a block and the outputs cost more, so that its 28 blocks need 1.8 times as much.

The 100 largest eigenpairs take 0.47 s where the eigenvalues of the factors fall as 1/i, and 1.06 s
where they fall as 1/sqrt(i) (with nothing else on the machine).
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import hessdensity as hd
from benchmarks._harness import interleave, save
from benchmarks.models.gpt import GPT
from benchmarks.models.mlp import MLP
from benchmarks.models.resnet import ResNet
from hessdensity import adapters, losses
from hessdensity.layers.blocks import BlockProducts
from hessdensity.layers.factor_sums import FactorSums
from hessdensity.layers.kronecker_products import top_products
from hessdensity.layers.partition import partition
from hessdensity.losses.kernels import FORWARD_OVER_REVERSE, add_batch, gradient_kernel
from hessdensity.operators.derivatives import PRODUCTS
from hessdensity.vectors import trees

KEY = jax.random.key(0)
PER_PROGRAM = 16  # blocks


class Network(NamedTuple):
    """A model with a batch."""

    model: nn.Module
    batch: Any
    criterion: Callable
    options: dict[str, Any]


def networks() -> dict[str, Network]:
    images = jax.random.normal(KEY, (500, 784)), jax.random.randint(KEY, (500,), 0, 10)
    small = jax.random.normal(KEY, (64, 16, 16, 3)), jax.random.randint(KEY, (64,), 0, 10)
    tokens = jax.random.randint(KEY, (8, 64), 0, 65)
    stored = {"batch_statistics": "stored", "use_running_average": True}
    entropy = losses.cross_entropy
    return {
        "F-200^2, 3 layers": Network(MLP((200, 200, 10)), images, entropy, {}),
        "MLP, 10 layers": Network(MLP((128,) * 9 + (10,)), images, entropy, {}),
        "ResNet-8, 16 x 16 images": Network(ResNet(depth=8, width=8), small, entropy, stored),
        "GPT, 8 x 64 tokens": Network(GPT(), (tokens, tokens), losses.next_token_cross_entropy, {}),
    }


def masked(loss: Callable, params: Any, batch: Any, blocks: list[Any]) -> Any:
    """A kernel: the products of one linearization of the gradient with masked vectors."""

    def gradient(params: Any) -> tuple[Any, Any]:
        total, found = gradient_kernel(loss, params, batch)
        return found, total

    _, multiply, total = jax.linearize(gradient, params, has_aux=True)
    return total, [multiply(vector) for vector in blocks]


def measure(name: str, network: Network) -> dict[str, Any]:
    inputs, _ = network.batch
    options = {k: v for k, v in network.options.items() if k != "batch_statistics"}
    variables = network.model.init(KEY, inputs, **options)
    loss, params = adapters.from_linen(
        network.model, variables, network.criterion, **network.options
    )
    hessian = hd.Hessian(loss, params, [network.batch])
    risk = hessian.risk
    paths = trees.paths(hessian.like)
    modules = {path.rpartition("/")[0] for path in paths}
    groups = partition(
        hessian.like,
        {module: lambda path, m=module: path.rpartition("/")[0] == m for module in sorted(modules)},
    )
    layers = hd.find_layers(loss.outputs, params, inputs)
    vector = jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape, leaf.dtype), params)
    block = trees.as_single(vector)
    parts = [group.take(block, 1) for group in groups.values()]
    numbers = list(range(len(parts)))
    programs = [numbers[i : i + PER_PROGRAM] for i in range(0, len(parts), PER_PROGRAM)]
    zeros = trees.zeros(hessian.like)
    masks = [group.put(zeros, group.take(vector)) for group in groups.values()]
    many = jax.eval_shape(loss.outputs, params, inputs).ndim > 2
    rows = jax.random.key(1) if many else jnp.arange(10)
    factors = FactorSums(tuple(layers), False, 8 if many else None)
    calls: dict[str, list[tuple[Any, tuple[Any, ...]]]] = {
        "gradient": [(gradient_kernel, ())],
        "H v": [(PRODUCTS[FORWARD_OVER_REVERSE], (block,))],
        "all blocks": [
            (
                BlockProducts(tuple(groups.values()), PRODUCTS[FORWARD_OVER_REVERSE]),
                ({i: parts[i] for i in program},),
            )
            for program in programs
        ],
        "masked": [(masked, (masks,))],
        "factors": [(factors, ({"inputs": (), "outputs": rows},))],
    }
    operations = {}
    thunks = {}
    with jax.default_matmul_precision("highest"):
        for label, each in calls.items():
            programs_ = [
                add_batch.lower(
                    kernel, risk.loss, risk.params, network.batch, arguments, None
                ).compile()
                for kernel, arguments in each
            ]
            operations[label] = sum(p.cost_analysis()["flops"] for p in programs_)

            def run(each: Any = each, programs_: Any = programs_) -> Any:
                return [
                    p(risk.loss, risk.params, network.batch, arguments, None)
                    for p, (_, arguments) in zip(programs_, each, strict=True)
                ]

            thunks[label] = run
        times = interleave(thunks, repeats=7)
    result = {
        "network": name,
        "weights": trees.size(hessian.like),
        "blocks": len(groups),
        "layers": len(layers),
        "gradient_seconds": times["gradient"].median,
        "operations": {k: v / operations["gradient"] for k, v in operations.items()},
        "times": {k: v.median / times["gradient"].median for k, v in times.items()},
    }
    law = 1 + len(groups) / 3
    print(f"{name}: {result['weights']:,} weights, {len(groups)} blocks, 1 + L/3 = {law:.1f}")
    for label in list(calls)[1:]:
        print(
            f"    {label:12} {result['operations'][label]:6.2f} gradients by operations, "
            f"{result['times'][label]:6.2f} by time",
            flush=True,
        )
    return result


def top_of_a_large_layer() -> dict[str, float]:
    """Seconds for the 100 largest products of factors of 4,608 inputs and 512 outputs."""
    rng = np.random.default_rng(0)
    found = {}
    for name, decay in (("eigenvalues as 1/i", 1.0), ("as 1/sqrt(i)", 0.5)):
        factors = []
        for size in (4608, 512):
            rows = rng.standard_normal((2000, size)) * np.arange(1, size + 1) ** (-decay / 2)
            factors.append(rows.T @ rows / 2000)
        start = time.perf_counter()
        top_products(*factors, 100)
        found[name] = time.perf_counter() - start
        print(f"top 100 of 512 x 4,608, {name}: {found[name]:.2f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("costs", "top"))
    only = parser.parse_args().only
    if only != "top":
        costs = [measure(name, network) for name, network in networks().items()]
        print(f"saved in {save('layer_cost', costs).name}")
    if only != "costs":
        print(f"saved in {save('layer_cost_top', top_of_a_large_layer()).name}")


if __name__ == "__main__":
    main()
