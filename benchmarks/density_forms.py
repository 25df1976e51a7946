"""Which form of a density is better on real networks, at equal products, passes and time?

    python -m benchmarks.density_forms [--keys 3]

A deflation run and probes against a leave-one-out block (the default of `hd.spectral_density` is
one of 36 x 5), on the Hessians of the trained 784-20-10 network on MNIST, all of whose eigenvalues
are known, of a GPT of 0.8 M weights after 500 steps of Adam on a text (16 sequences of 64 tokens),
and of a trained ResNet-20 (32 CIFAR-10 images, stored statistics of batch normalization). The last
two are compared with a long run: 200 steps of deflation and 8 probes of 100 steps. Their trace is
that of `hd.trace` with 400 products.

W1 is in units of the range. The trace's error is a root mean square over the keys. Gradients are
the seconds of a run, after one that compiles, divided by those of a gradient.

Answer (2026-11-26, beside other work on the machine, which is in the gradients). The intervals of
the trace held it in 11 of 15 runs on the first network (in 57 of 60 with the 20 keys of
`benchmarks.deflated_reference`) and in 15 of 15 on the GPT. ResNet-20 was not measured to the end.

                                 products passes gradients          W1 / range trace rms outliers
    784-20-10 network
    deflation 90, then 45 x 2         180    135       349    3.46e-05 ± 1e-05     3.66%       44
    deflation 80, then 40 x 1         120    120       253    3.88e-05 ± 1e-05     3.88%       41
    block 45 x 4                      180     45       327    2.96e-05 ± 5e-06     2.21%       54
    block 36 x 5                      180     36       371    2.25e-05 ± 2e-06     1.08%       54
    block 45 x 5                      225     45       475    1.91e-05 ± 3e-06     1.27%       74
    GPT
    deflation 90, then 45 x 2         180    135       788    5.57e-05 ± 2e-06     1.58%       31
    deflation 80, then 40 x 1         120    120       602    6.96e-05 ± 1e-05     3.40%       26
    block 45 x 4                      180     45       908    5.12e-05 ± 1e-06     1.88%       38
    block 36 x 5                      180     36       584    6.32e-05 ± 2e-05     1.43%       38
    block 45 x 5                      225     45       800    5.39e-05 ± 3e-06     1.47%       51

On the GPT, the estimated error of the reference is 2.5e-4, of quadrature in the bulk, so that W1
cannot tell the forms apart there.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hessdensity as hd
from benchmarks._harness import measure, save
from benchmarks.mnist_reference import problem as mnist_problem
from benchmarks.models.data import cifar10, folder, shakespeare
from benchmarks.models.gpt import GPT
from benchmarks.models.resnet import ResNet, load_weights, normalize
from benchmarks.models.training import train_with_adam
from hessdensity import adapters, losses
from hessdensity.vectors import trees

FORMS: dict[str, dict[str, int]] = {
    "deflation 90, then 45 x 2": {"deflation_steps": 90},
    "deflation 80, then 40 x 1": {"deflation_steps": 80, "num_steps": 40, "num_probes": 1},
    "block 45 x 4": {"block_size": 4, "num_steps": 45},
    "block 36 x 5": {"block_size": 5, "num_steps": 36},
    "block 45 x 5": {"block_size": 5, "num_steps": 45},
}


class Problem(NamedTuple):
    """A Hessian and its spectrum, as well as it is known."""

    hessian: hd.Hessian
    truth: Any  # what `hd.distance` takes
    range: float
    trace: float


def resnet20(args: argparse.Namespace) -> Problem:
    model = ResNet(20)
    variables = load_weights(folder("weights") / "cifar10_resnet20.safetensors")
    images, labels = cifar10("train", args.images)
    loss, params = adapters.from_linen(
        model, variables, losses.cross_entropy, batch_statistics="stored", use_running_average=True
    )
    data = hd.batches((np.asarray(normalize(images)), labels), args.images)
    return referenced(hd.Hessian(loss, params, data), args)


def gpt(args: argparse.Namespace) -> Problem:
    model = GPT()
    tokens, following = map(jnp.asarray, shakespeare(4096, 64))
    count = args.sequences
    params = model.init(jax.random.key(0), tokens[:1])["params"]

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    params = train_with_adam(loss, params, (tokens, following), args.gpt_steps)
    return referenced(hd.Hessian(loss, params, [(tokens[:count], following[:count])]), args)


def mnist(args: argparse.Namespace) -> Problem:
    hessian, eigenvalues = mnist_problem()
    return Problem(hessian, eigenvalues, float(np.ptp(eigenvalues)), float(eigenvalues.sum()))


def referenced(hessian: hd.Hessian, args: argparse.Namespace) -> Problem:
    """The problem with a long run as the truth."""
    long = hd.spectral_density(
        hessian,
        jax.random.key(2**20),
        deflation_steps=args.reference,
        num_steps=100,
        num_probes=8,
        progress=False,
    )
    nodes = np.concatenate([rule.nodes for rule in long.rules])
    trace = hd.trace(hessian, jax.random.key(2**21), num_matvecs=400, progress=False)
    print(f"reference: {long.description['error']}")
    print(f"trace {trace}, of the reference {long.trace()}", flush=True)
    return Problem(hessian, long, float(np.ptp(nodes)), trace.value)


def row(problem: Problem, settings: dict[str, int], keys: int) -> dict[str, Any]:
    """The errors of one form, and what it costs."""
    w1, traces, seconds, outliers = [], [], [], []
    for key in range(-1, keys):  # the first compiles
        start = time.perf_counter()
        density = hd.spectral_density(
            problem.hessian, jax.random.key(key + 1), progress=False, **settings
        )
        if key < 0:
            continue
        seconds.append(time.perf_counter() - start)
        w1.append(hd.distance(density, problem.truth) / problem.range)
        traces.append(density.trace())
        outliers.append(len(density.outliers))
    passes = settings.get("deflation_steps", 0)
    return {
        "products": density.num_matvecs,
        "passes": passes + settings.get("num_steps", 45),
        "w1": w1,
        "trace": [trace.value for trace in traces],
        "trace_rms": float(np.sqrt(np.mean([(t.value / problem.trace - 1) ** 2 for t in traces]))),
        "trace_held": sum(t.lower <= problem.trace <= t.upper for t in traces),
        "outliers": statistics.median(outliers),
        "seconds": statistics.median(seconds),
    }


PROBLEMS: dict[str, Callable[[argparse.Namespace], Problem]] = {
    "784-20-10 network": mnist,
    "GPT": gpt,
    "ResNet-20": resnet20,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--reference", type=int, default=200)
    parser.add_argument("--gpt-steps", type=int, default=500)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in args.problems:
        problem = PROBLEMS[name](args)
        gradient = measure(problem.hessian.gradient).median
        print(f"\n{name}: n = {trees.size(problem.hessian.like):,}, a gradient {gradient:.4f} s")
        print(
            f"{'':28}{'products':>9}{'passes':>7}{'gradients':>10}{'W1 / range':>20}"
            f"{'trace rms':>10}{'held':>6}{'outliers':>9}"
        )
        results[name] = {"gradient_seconds": gradient, "trace": problem.trace}
        for form, settings in FORMS.items():
            cell = row(problem, settings, args.keys)
            results[name][form] = cell
            deviation = np.std(cell["w1"], ddof=1) / np.sqrt(args.keys)
            error = f"{np.mean(cell['w1']):.2e} ± {deviation:.0e}"
            print(
                f"{form:28}{cell['products']:>9}{cell['passes']:>7}"
                f"{cell['seconds'] / gradient:>10.0f}{error:>20}{cell['trace_rms']:>10.2%}"
                f"{cell['trace_held']:>6}{cell['outliers']:>9g}",
                flush=True,
            )
        path = save("density_forms", results)
    print(f"saved in {path.name}")


if __name__ == "__main__":
    main()
