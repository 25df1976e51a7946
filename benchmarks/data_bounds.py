"""Do the error bars for the sample of data hold the population's value, and how wide are they?

    python -m benchmarks.data_bounds

The answer of the last run is in `results`, in data_bounds.json.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import hessdensity as hd
from benchmarks._harness import save

N = 30  # parameters, but for two problems with only outliers to ask for
EXAMPLES = 640
BATCHES = 16
PARTS = 8
SETS = 100
STEPS = 20
FLOOR = 0.05

WEIGHTS = np.random.default_rng(1).standard_normal(N)
LAYERS = ((4, 4), (4, 2))  # of a network with 30 parameters


class Problem(NamedTuple):
    """A loss, its parameters, and a law of the data."""

    loss: Callable[..., Any]
    params: Any
    draw: Callable[[np.random.Generator, int], Any]
    spectrum: np.ndarray  # of the population's Hessian, ascending
    level: float  # where the cdf is asked for


def half_square(w: Any, x: Any) -> Any:
    """The loss of a linear regression, whose Hessian is the covariance of x."""
    return jnp.mean((x @ w) ** 2) / 2


def middle(spectrum: np.ndarray) -> float:
    """A level in the middle of a spectrum, between two eigenvalues."""
    return float(spectrum[N // 2 : N // 2 + 2].mean())


def regression(variances: np.ndarray, level: float | None = None) -> Problem:
    """Gaussian inputs with the given variances."""
    spectrum = np.sort(variances)
    n = variances.size

    def draw(random: np.random.Generator, count: int) -> np.ndarray:
        return (random.standard_normal((count, n)) * np.sqrt(variances)).astype(np.float32)

    return Problem(
        half_square, jnp.zeros(n), draw, spectrum, middle(spectrum) if level is None else level
    )


def logistic_loss(w: Any, x: Any) -> Any:
    """The loss of a logistic regression whose labels are all 1: the Hessian depends on no label."""
    return jnp.mean(jax.nn.softplus(-x @ w))


def logistic() -> Problem:
    """Inputs with Student's t law of six degrees of freedom, two of them much larger."""
    scales = np.sqrt(np.r_[40.0, 20.0, np.linspace(1, 5, N - 2)])
    w = 0.3 * WEIGHTS / scales

    def draw(random: np.random.Generator, count: int) -> np.ndarray:
        return (random.standard_t(6, (count, N)) * scales).astype(np.float32)

    random = np.random.default_rng(10**6)
    total = np.zeros((N, N))
    for _ in range(40):
        x = draw(random, 50_000).astype(float)
        p = 1 / (1 + np.exp(-x @ w))
        total += (x * (p * (1 - p))[:, None]).T @ x / 50_000
    spectrum = np.linalg.eigvalsh(total / 40)
    return Problem(logistic_loss, jnp.asarray(w, jnp.float32), draw, spectrum, middle(spectrum))


def network_loss(params: Any, batch: Any) -> Any:
    """The cross-entropy of a network with one hidden layer."""
    x, labels = batch
    (first, one), (second, two) = params
    logits = jnp.tanh(x @ first + one) @ second + two
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
    return -jnp.mean(chosen)


def network() -> Problem:
    """A network with random weights: its Hessian has eigenvalues of both signs."""
    random = np.random.default_rng(2)
    params = [
        (
            jnp.asarray(random.standard_normal(shape), jnp.float32),
            jnp.asarray(random.standard_normal(shape[1]) / 2, jnp.float32),
        )
        for shape in LAYERS
    ]

    def draw(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        x = random.standard_normal((count, 4))
        labels = (np.sin(2 * x[:, 0]) + x[:, 1] + random.standard_normal(count) > 0).astype(int)
        return x.astype(np.float32), labels.astype(np.int32)

    flat, restore = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda vector, batch: network_loss(restore(vector), batch)))
    random = np.random.default_rng(10**6)
    matrix = np.mean([hessian(flat, draw(random, 5_000)) for _ in range(200)], axis=0)
    spectrum = np.linalg.eigvalsh(np.asarray(matrix, float))
    return Problem(network_loss, params, draw, spectrum, middle(spectrum))


def log_size(x: np.ndarray) -> np.ndarray:
    """log |x|, smooth at 0."""
    return np.log(x**2 + FLOOR**2) / 2


def functionals(problem: Problem) -> dict[str, tuple[Callable[..., Any], float]]:
    """Functionals of a density, and their values for the population."""
    spectrum = problem.spectrum
    level = problem.level
    return {
        "largest": (lambda density: density.extremes().largest, spectrum[-1]),
        "smallest": (lambda density: density.extremes().smallest, spectrum[0]),
        "trace": (lambda density: density.trace(), spectrum.sum()),
        "mean log": (lambda density: density.expectation(log_size), log_size(spectrum).mean()),
        "cdf": (lambda density: density.cdf(level), np.mean(spectrum <= level)),
    }


def measure(problem: Problem, sets: int) -> dict[str, dict[str, list[float]]]:
    """Whether each interval held the population's value, and its width, for every data set."""
    found: dict[str, dict[str, list[float]]] = {}
    small = problem.spectrum.size == N

    def note(name: str, kind: str, truth: float, lower: float, upper: float) -> None:
        row = found.setdefault(name, {})
        row.setdefault(f"{kind} held", []).append(float(lower <= truth <= upper))
        row.setdefault(f"{kind} width", []).append(float(upper - lower))

    for seed in range(sets):
        data = problem.draw(np.random.default_rng(seed), EXAMPLES)
        batches = hd.batches(data, EXAMPLES // BATCHES)
        hessian = hd.Hessian(problem.loss, problem.params, batches)
        key = jax.random.key(seed)
        if not small:
            note_eigenvalues(note, problem, hessian, key)
            continue
        settings: dict[str, Any] = {"num_steps": STEPS, "num_probes": 2, "progress": False}
        parts = hd.part_densities(hessian, key, PARTS, **settings)
        paired = hd.spectral_density(hessian, key, deflation_steps=0, **settings)
        whole = hd.spectral_density(hessian, key, deflation_steps=STEPS, **settings)
        for name, (functional, truth) in functionals(problem).items():
            estimate = parts.estimate(functional, paired=paired)
            low, high = (end + estimate.bias for end in estimate.data)
            note(name, "data alone", truth, low, high)
            note(name, "paired", truth, estimate.lower, estimate.upper)
            both = parts.estimate(functional, whole, paired)
            note(name, "whole, paired", truth, both.lower, both.upper)
        note_eigenvalues(note, problem, hessian, key)
    return found


def note_eigenvalues(
    note: Callable[..., None], problem: Problem, hessian: hd.Hessian, key: jax.Array
) -> None:
    """Note the intervals of `eigenvalue_data_error` for the three largest eigenvalues."""
    space = hd.top_eigenspace(hessian, key, 3, which="LA", progress=False)
    error = hd.eigenvalue_data_error(hessian, space)
    for place in range(3):
        truth = problem.spectrum[-1 - place]
        name = f"eigenvalue {place + 1}"
        note(name, "data alone", truth, error.data[0][place], error.data[1][place])
        note(name, "eigenvalue_data_error", truth, error.lower[place], error.upper[place])


def summary(values: dict[str, list[float]]) -> dict[str, float]:
    """The share of intervals that held, in percent, and their median width."""
    return {
        name: 100 * float(np.mean(each)) if "held" in name else float(np.median(each))
        for name, each in values.items()
    }


def show(name: str, problem: Problem, rows: dict[str, dict[str, float]]) -> None:
    """Print a table of one problem."""
    kinds = ("data alone", "paired", "whole, paired")
    ends = ("data alone", "eigenvalue_data_error")
    print(f"\n    {name}")
    print(f"{'truth':>24}" + "".join(f"{kind:>18}" for kind in kinds))
    truths = functionals(problem)
    for row, cells in rows.items():
        if row in truths:
            parts = (
                f"{cells[f'{kind} held']:8.0f} % {cells[f'{kind} width']:7.3g}" for kind in kinds
            )
            print(f"    {row:<12}{truths[row][1]:8.3g}" + "".join(parts))
        else:
            truth = problem.spectrum[-int(row[-1])]
            parts = (
                f"{cells[f'{kind} held']:8.0f} % {cells[f'{kind} width']:7.3g}" for kind in ends
            )
            print(f"    {row:<12}{truth:8.3g}" + "".join(parts))


def main() -> None:
    """Measure every problem, print the tables and save them."""
    sets = int(sys.argv[1]) if len(sys.argv) > 1 else SETS
    problems = {
        "outlier and spread bulk": regression(np.r_[np.linspace(0.5, 2, N - 1), 9.0]),
        "outlier and flat bulk": regression(np.r_[np.ones(N - 1), 9.0], level=1.5),
        "outlier, 640 parameters": regression(np.r_[np.ones(639), 9.0], level=1.5),
        "outlier, 1280 parameters": regression(np.r_[np.ones(1279), 9.0], level=1.5),
        "power law": regression(9.0 / np.arange(1, N + 1)),
        "logistic regression": logistic(),
        "network": network(),
    }
    start = time.perf_counter()
    result = {}
    for name, problem in problems.items():
        rows = {row: summary(cells) for row, cells in measure(problem, sets).items()}
        show(name, problem, rows)
        result[name] = {"largest": problem.spectrum[: -N - 1 : -1].tolist(), "rows": rows}
    print(f"\n    {sets} data sets each, {time.perf_counter() - start:.0f} s")
    if sets == SETS:
        save("data_bounds", result)


if __name__ == "__main__":
    main()
