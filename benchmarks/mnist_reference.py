"""How close is stochastic Lanczos quadrature to the exact spectrum of a trained network, and which
settings are best?

    python -m benchmarks.mnist_reference

The verification figure of Ghorbani, Krishnan and Xiao (2019, Figure 1): a trained 784-20-10 network
on 2,000 MNIST images, all of whose 15,910 Hessian eigenvalues are known. Their settings are 90
steps, 10 probes and a smoothing of variance 1e-5 x max(1, range). W1 is the integral of |cdf
difference|, in units of the spectrum's range; L1 that of |difference of the smoothed densities|,
between 0 and 2.

Answer (2026-11-21): with their settings W1/range has median 6.8e-5 over 12 keys (11 of them <=
1e-4, the worst 2.0e-4) and L1 median 0.0026; +-2 standard errors of the trace held the truth 11
times. Means of W1/range and L1 over 144 probes:

    steps          1 probes          2 probes          4 probes         10 probes
       15    3.7e-04  0.063    3.1e-04  0.059    2.7e-04  0.057    2.4e-04  0.054
       30    2.8e-04  0.031    2.2e-04  0.028    1.8e-04  0.027    1.5e-04  0.025
       45    2.5e-04  0.012    2.0e-04  0.010    1.6e-04  0.009    1.3e-04  0.008
       60    2.5e-04  0.008    1.9e-04  0.006    1.5e-04  0.004    1.1e-04  0.003
       90    2.1e-04  0.008    1.5e-04  0.006    1.1e-04  0.004    8.0e-05  0.003
      120    2.1e-04  0.008    1.5e-04  0.006    1.1e-04  0.004    8.1e-05  0.003

180 products: 90 x 2 gives 1.53e-4 (+-7e-6) and 0.0060, 60 x 3 1.63e-4 and 0.0051, 45 x 4 1.58e-4
and 0.0088, 36 x 5 1.39e-4 and 0.0166. All of this is plain quadrature; what deflation makes of 180
products: benchmarks/deflation.py."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import hessdensity as hd
from benchmarks._harness import save
from benchmarks.models.data import folder, mnist_test
from benchmarks.models.mlp import MLP
from hessdensity.krylov import lanczos
from hessdensity.plots.density import plot_density
from hessdensity.spectra.quadrature import Tridiagonal, gauss_rule
from hessdensity.vectors.random import random_block

NUM_STEPS = (15, 30, 45, 60, 90, 120)
NUM_PROBES = (1, 2, 4, 10)
BUDGET = 180  # products
SHARED_OUT = ((90, 2), (60, 3), (45, 4), (36, 5), (30, 6), (20, 9), (15, 12))  # (steps, probes)
POOL = 144  # independent probes; every cell of the tables deals them out to disjoint runs
RUNS = 12  # of their settings


def network() -> tuple[Any, Any, tuple[np.ndarray, np.ndarray]]:
    """loss(params, batch) of the trained network, its params, and its only batch."""
    reference = np.load(folder("reference") / "mnist_mlp_784_20_10.npz")
    params = {
        "Dense_0": {"kernel": jnp.asarray(reference["W1"]), "bias": jnp.asarray(reference["b1"])},
        "Dense_1": {"kernel": jnp.asarray(reference["W2"]), "bias": jnp.asarray(reference["b2"])},
    }
    count = int(reference["num_examples"])
    images, labels = (array[:count] for array in mnist_test())
    model = MLP((20, 10))

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    inputs = ((images / 255 - 0.1307) / 0.3081).astype(np.float32)
    return loss, params, (inputs, labels)


def problem() -> tuple[hd.Hessian, np.ndarray]:
    """The Hessian and its exact eigenvalues."""
    loss, params, batch = network()
    eigenvalues = np.load(folder("reference") / "mnist_mlp_784_20_10.npz")["eigenvalues"]
    return hd.Hessian(loss, params, [batch]), eigenvalues


class Exact:
    """The exact spectrum, and how far an estimate is from it."""

    def __init__(self, eigenvalues: np.ndarray) -> None:
        self.eigenvalues = eigenvalues
        self.range = float(eigenvalues[-1] - eigenvalues[0])
        self.bandwidth = float(np.sqrt(1e-5 * max(1.0, self.range)))
        # Five points a standard deviation, over the spectrum and the tails of its ends.
        margin = 6 * self.bandwidth
        count = int(5 * (self.range + 2 * margin) / self.bandwidth)
        self.grid = np.linspace(eigenvalues[0] - margin, eigenvalues[-1] + margin, count)
        pieces = np.array_split(self.grid, 64)
        self.density = np.concatenate([self._smoothed(piece) for piece in pieces])

    def _smoothed(self, x: np.ndarray) -> np.ndarray:
        kernel = np.exp(-0.5 * ((x[:, None] - self.eigenvalues) / self.bandwidth) ** 2)
        return kernel.mean(axis=1) / (self.bandwidth * np.sqrt(2 * np.pi))

    def smoothed(self, density: hd.SpectralDensity) -> np.ndarray:
        """An estimate on the grid, under the same smoothing."""
        return density.pdf(self.grid, self.bandwidth).value

    def errors(self, density: hd.SpectralDensity, smoothed: np.ndarray) -> tuple[float, float]:
        """(W1 / range, L1)."""
        w1 = hd.distance(density, self.eigenvalues) / self.range
        return w1, float(np.trapezoid(np.abs(smoothed - self.density), self.grid))


def pool(hessian: hd.Hessian, num_steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tridiagonal matrices of `POOL` probes: their leading blocks are those of all shorter
    runs."""
    matrices = []
    for first in range(0, POOL, 10):
        start = random_block(jax.random.key(1), first, 10, hessian.like)
        *_, state = lanczos.iterate(hessian, lanczos.init(start, num_steps))
        matrices += zip(state.diagonal, state.off_diagonal, strict=True)
    return matrices


def table(
    exact: Exact, matrices: list, num_steps: int, probes: tuple[int, ...]
) -> list[dict[str, float]]:
    """Errors with num_steps and each number of probes, averaged over as many runs as the pool
    makes."""
    rules = [
        gauss_rule(Tridiagonal(diagonal[:num_steps], off[:num_steps])) for diagonal, off in matrices
    ]
    n = len(exact.eigenvalues)
    singles = [hd.SpectralDensity((rule,), n, num_steps) for rule in rules]
    smoothed = np.stack([exact.smoothed(single) for single in singles])
    cells = []
    for k in probes:
        runs = [slice(i, i + k) for i in range(0, POOL - k + 1, k)]
        errors = []
        for run in runs:
            density = hd.SpectralDensity(tuple(rules[run]), n, num_steps * k)
            errors.append(exact.errors(density, smoothed[run].mean(axis=0)))
        w1, l1 = np.mean(errors, axis=0)
        w1_spread, _ = np.std(errors, axis=0, ddof=1)
        cell = {
            "num_steps": num_steps,
            "num_probes": k,
            "runs": len(runs),
            "w1": float(w1),
            "w1_standard_error": float(w1_spread / np.sqrt(len(runs))),
            "l1": float(l1),
        }
        cells.append(cell)
    return cells


def draw(density: hd.SpectralDensity, exact: Exact) -> plt.Figure:
    """Estimate over exact: the whole spectrum, and the bulk."""
    figure, (whole, bulk) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for ax in (whole, bulk):
        plot_density(
            density, ax, bandwidth=exact.bandwidth, eigenvalues=exact.eigenvalues, label="estimate"
        )
    bulk.set_xlim(-0.2, 0.4)
    bulk.get_legend().remove()
    whole.set_title(
        f"784-20-10 on MNIST: {density.num_matvecs} products for {density.dimension:,} eigenvalues"
    )
    bulk.set_title("the bulk")
    return figure


def their_settings(hessian: hd.Hessian, exact: Exact) -> tuple[dict[str, Any], hd.SpectralDensity]:
    """90 steps, 10 probes: what `RUNS` keys gave, and the run whose W1 is the (upper) median."""
    runs = []
    for key in range(RUNS):
        density = hd.spectral_density(
            hessian,
            jax.random.key(key),
            num_steps=90,
            num_probes=10,
            deflation_steps=0,
            progress=False,
        )
        runs.append((*exact.errors(density, exact.smoothed(density)), density))
    runs.sort(key=lambda run: run[0])
    w1, l1, densities = zip(*runs, strict=True)
    traces = [density.trace() for density in densities]
    true_trace = float(exact.eigenvalues.sum())
    median = RUNS // 2
    result = {
        "w1": w1,
        "l1": l1,
        "trace": [trace.value for trace in traces],
        "trace_standard_error": [trace.standard_error for trace in traces],
        "exact_trace": true_trace,
        "seconds": statistics.median(density.description["seconds"] for density in densities),
    }
    held = sum(trace.lower <= true_trace <= trace.upper for trace in traces)
    low, high = densities[median].extremes()
    print(f"90 steps, 10 probes, {RUNS} keys, {result['seconds']:.1f} s each")
    print(
        f"  W1/range   median {w1[median]:.1e}, worst {w1[-1]:.1e}; {sum(w <= 1e-4 for w in w1)} "
        f"of {RUNS} <= 1e-4"
    )
    print(f"  L1         median {statistics.median(l1):.4f}, worst {max(l1):.4f}")
    print(
        f"  trace      {traces[median]:.4g} in the median run, exact {true_trace:.5g}; ±2 s.e. "
        f"held it {held} times"
    )
    print(f"  extremes   {low.value:.7f} and {high.value:.6f}")
    print(f"  exact      {exact.eigenvalues[0]:.7f} and {exact.eigenvalues[-1]:.6f}")
    return result, densities[median]


def main() -> None:
    hessian, eigenvalues = problem()
    exact = Exact(eigenvalues)
    verification, density = their_settings(hessian, exact)

    matrices = pool(hessian, BUDGET)
    rows = [table(exact, matrices, num_steps, NUM_PROBES) for num_steps in NUM_STEPS]
    print(f"\nW1/range and L1, means over the runs that {POOL} probes make")
    print("steps" + "".join(f"{f'{k} probes':>18}" for k in NUM_PROBES))
    for row in rows:
        cells = [f"{cell['w1']:>11.1e}{cell['l1']:>7.3f}" for cell in row]
        print(f"{row[0]['num_steps']:5}{''.join(cells)}")
    shared = [
        table(exact, matrices, num_steps, (num_probes,))[0] for num_steps, num_probes in SHARED_OUT
    ]
    print(f"\n{BUDGET} products, steps x probes: W1/range and L1")
    for cell in shared:
        settings = f"{cell['num_steps']} x {cell['num_probes']}"
        print(
            f"{settings:>9}{cell['w1']:>11.2e} ± {cell['w1_standard_error']:.0e}{cell['l1']:>8.4f}"
        )

    result = {
        "their_settings": verification,
        "cells": [cell for row in rows for cell in row],
        "budget": shared,
    }
    path = save("mnist_reference", result)
    draw(density, exact).savefig(path.with_suffix(".png"), dpi=120)
    print(f"\nsaved in {path.name}, drawn in {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
