"""What does a Hessian-vector product cost, in gradients, for one vector and for four that share a
pass over the data?

    python -m benchmarks.hvp_cost

Answer (2026-11-21, 2 cores of an AMD EPYC, JAX 0.10.2), in gradients per vector:

                                       weights    gradient     H v   H v, of four
    MLP 784-256-256-10, 512 images     269,322    0.0044 s    2.70           1.64
    ResNet-20, 128 images              269,722    0.7383 s    1.82           1.19
    GPT, 32 x 64 tokens                818,176    0.2117 s    1.73           1.17
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax

import hessdensity as hd
from benchmarks._harness import interleave, save
from benchmarks.models.gpt import GPT
from benchmarks.models.mlp import MLP
from benchmarks.models.resnet import ResNet

# Random weights and inputs: dense arithmetic takes the same time whatever the numbers.
KEY = jax.random.key(0)

Problem = tuple[Callable[[Any, Any], jax.Array], Any, Any]  # loss(params, batch), params, batch


def mlp() -> Problem:
    model = MLP((256, 256, 10))
    batch = jax.random.normal(KEY, (512, 784)), jax.random.randint(KEY, (512,), 0, 10)
    return loss_of(model), model.init(KEY, batch[0])["params"], batch


def resnet20() -> Problem:
    model = ResNet(depth=20)
    batch = jax.random.normal(KEY, (128, 32, 32, 3)), jax.random.randint(KEY, (128,), 0, 10)
    variables = model.init(KEY, batch[0], use_running_average=True)
    stats = variables["batch_stats"]

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply(
            {"params": params, "batch_stats": stats}, batch[0], use_running_average=True
        )
        return cross_entropy(logits, batch[1])

    return loss, variables["params"], batch


def gpt() -> Problem:
    model = GPT()
    tokens = jax.random.randint(KEY, (32, 65), 0, 65)
    batch = tokens[:, :-1], tokens[:, 1:]
    return loss_of(model), model.init(KEY, batch[0])["params"], batch


def loss_of(model: nn.Module) -> Callable[[Any, Any], jax.Array]:
    """loss(params, batch) of a model that has no other variables."""

    def loss(params: Any, batch: Any) -> jax.Array:
        return cross_entropy(model.apply({"params": params}, batch[0]), batch[1])

    return loss


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def random_block(params: Any, size: int) -> Any:
    """`size` vectors: like params, with one more leading axis."""
    return jax.tree.map(lambda leaf: jax.random.normal(KEY, (size, *leaf.shape)), params)


def cost(problem: Problem, repeats: int) -> dict[str, Any]:
    """Seconds of one gradient, of one product, and of one product with a block of four vectors."""
    loss, params, batch = problem
    gradient = jax.jit(jax.grad(loss))
    hessian = hd.Hessian(loss, params, [batch])
    one, four = random_block(params, 1), random_block(params, 4)
    # The operator's default precision for the gradient too: else, on a GPU, TF32 would be compared
    # with float32.
    with jax.default_matmul_precision("highest"):
        timings = interleave(
            {
                "gradient": lambda: gradient(params, batch),
                "one": lambda: hessian @ one,
                "four": lambda: hessian @ four,
            },
            repeats,
        )
    return {
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "gradients_per_product": timings["one"].median / timings["gradient"].median,
        "gradients_per_product_of_four": timings["four"].median / timings["gradient"].median / 4,
    }


if __name__ == "__main__":
    problems = {  # milliseconds need more repeats than seconds
        "MLP 784-256-256-10, 512 images": (mlp, 50),
        "ResNet-20, 128 images": (resnet20, 5),
        "GPT, 32 x 64 tokens": (gpt, 5),
    }
    result = {}
    print(f"{'':32}{'weights':>10}{'gradient':>12}{'H v':>8}{'H v, of four':>15}")
    for name, (problem, repeats) in problems.items():
        result[name] = answer = cost(problem(), repeats)
        cells = [
            f"{name:32}",
            f"{answer['num_params']:>10,}",
            f"{answer['seconds']['gradient']['median']:>10.4f} s",
            f"{answer['gradients_per_product']:>8.2f}",
            f"{answer['gradients_per_product_of_four']:>15.2f}",
        ]
        print("".join(cells))
    print(f"H v in gradients per vector; saved in {save('hvp_cost', result).name}")
