"""What does deflation gain: the error of the density against products, for four ways to spend them?

    python -m benchmarks.deflation

Plain: k probes of m steps. Implicit: the same without a basis, with every isolated eigenvalue that
two probes show to be simple reset to weight 1/n. Block (the default of `spectral_density`): one
block of k starts, of which each is deflated by the others, in m passes over the data. Krylov: a run
of m0 steps whose basis all probes avoid, its own quadrature counting as one more probe; "without
its own" leaves that out. Sequential: every run avoids the bases of all before it; the last k - 1
are averaged.

On spectra that are known exactly: the trained 784-20-10 network's (15,910 eigenvalues, W1 over the
range) and five synthetic ones. A probe uniform on the sphere sees nothing of a matrix but its
spectrum, so that the matrices are random rotations of these eigenvalues.

Answer (2026-11-26), W1 / range and the trace's error (root mean square) with 180 products; means of
20 keys on the network, of 4 on the others:

                             plain, 60 x 3      plain, 90 x 2   90, then 45 x 2       block, 36 x 5
    passes                              60                 90               135                  36
    trained network       1.4e-04  12.39%   1.3e-04  13.40%   2.6e-05   1.97%   2.6e-05   1.34%
    20 outliers           1.2e-04  11.60%   1.6e-04  18.63%   3.6e-07   0.01%   2.7e-07   0.00%
    power law             1.6e-04  10.31%   1.5e-04   9.15%   3.1e-05   1.83%   2.6e-05   0.76%
    zeros, bulk           2.7e-04   4.71%   3.5e-04   4.65%   8.1e-05   1.38%   6.7e-05   1.25%
    multiple outliers     7.6e-04   6.85%   4.0e-04   7.67%   5.2e-04   7.04%   4.2e-04   6.55%
    no outliers           2.6e-03   0.15%   3.2e-03   0.59%   2.9e-03   0.45%   3.0e-03   0.37%

The block is as accurate or more, in a quarter of the passes. Plain quadrature needs 900 products
for 7.3e-5 on the network. Without outliers it is the best with 180.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import hessdensity as hd
from benchmarks._harness import processes, save
from benchmarks.models.data import folder
from hessdensity.krylov import lanczos
from hessdensity.spectra import deflation
from hessdensity.spectra.quadrature import Rule, Tridiagonal
from hessdensity.vectors import trees
from hessdensity.vectors.basis import Basis
from hessdensity.vectors.random import random_block

REFERENCE = "trained network"
KEYS = 20  # on its spectrum
SYNTHETIC_KEYS = 4
BANDWIDTH = 1 / 500  # of the range, for L1


class Settings(NamedTuple):
    deflation_steps: int
    num_steps: int
    num_probes: int

    @property
    def products(self) -> int:
        return self.deflation_steps + self.num_steps * self.num_probes

    @property
    def passes(self) -> int:
        return self.deflation_steps + self.num_steps

    def __str__(self) -> str:
        probes = f"{self.num_steps} x {self.num_probes}"
        return f"{self.deflation_steps}, then {probes}" if self.deflation_steps else probes


def spectra() -> dict[str, np.ndarray]:
    """The eigenvalues, by name."""
    rng = np.random.default_rng(0)
    reference = np.load(folder("reference") / "mnist_mlp_784_20_10.npz")["eigenvalues"]
    gram = rng.standard_normal((1500, 3000))
    tail = 0.05 * np.arange(1.0, 7981.0) ** -0.8 * rng.choice([1.0, -0.3], 7980)
    return {
        REFERENCE: reference,
        "20 outliers, light tail": np.concatenate([np.geomspace(1, 20, 20), tail]),
        "power law 1/i": 1 / np.arange(1.0, 8001.0),
        "zeros, bulk, outliers": np.concatenate(
            [np.linalg.eigvalsh(gram @ gram.T / 3000), np.zeros(4490), np.linspace(5, 60, 10)]
        ),
        "multiple outliers": np.concatenate(
            [np.repeat([10.0, 5, 2], [3, 20, 50]), 0.1 * rng.standard_normal(7927)]
        ),
        "no outliers": np.cos(np.pi * (np.arange(8000) + 0.5) / 8000) + 1,
    }


def plain(operator: hd.Matrix, key: jax.Array, settings: Settings) -> tuple[Rule, ...]:
    return hd.spectral_density(operator, key, progress=False, **settings._asdict()).rules


def implicit(operator: hd.Matrix, key: jax.Array, settings: Settings) -> tuple[Rule, ...]:
    return hd.spectral_density(
        operator, key, basis="none", progress=False, **settings._asdict()
    ).rules


def block(operator: hd.Matrix, key: jax.Array, settings: Settings) -> tuple[Rule, ...]:
    return hd.spectral_density(
        operator,
        key,
        num_steps=settings.num_steps,
        block_size=settings.num_probes,
        progress=False,
    ).rules


def without_its_own(operator: hd.Matrix, key: jax.Array, settings: Settings) -> tuple[Rule, ...]:
    return plain(operator, key, settings)[1:]


def sequential(operator: hd.Matrix, key: jax.Array, settings: Settings) -> tuple[Rule, ...]:
    n = trees.size(operator.like)
    chunks = ()
    size = 0
    nodes = np.zeros(0)
    rules = []
    for index in range(settings.num_probes):
        start = random_block(key, index, 1, operator.like)
        state = lanczos.init(start, settings.num_steps, Basis(chunks, size))
        *_, state = lanczos.iterate(operator, state)
        own = Tridiagonal(state.diagonal[0], state.off_diagonal[0])
        rules.append(deflation.deflated_rule(nodes, np.zeros(size), own, n, 0.0))
        # The last chunk of each run may hold zeros after its last vector, which change nothing.
        chunks = (*chunks, *state.basis.chunks)
        size += settings.num_steps
        nodes = np.sort(np.concatenate([nodes, rules[-1].nodes[nodes.size :]]))
    return tuple(rules[1:])


Method = Callable[[hd.Matrix, jax.Array, Settings], tuple[Rule, ...]]
RUNS: list[tuple[str, Method, Settings]] = [
    ("plain", plain, Settings(0, 60, 1)),
    ("plain", plain, Settings(0, 60, 2)),
    ("plain", plain, Settings(0, 60, 3)),
    ("plain", plain, Settings(0, 90, 2)),
    ("plain", plain, Settings(0, 90, 10)),
    ("implicit", implicit, Settings(0, 60, 2)),
    ("implicit", implicit, Settings(0, 60, 3)),
    ("implicit", implicit, Settings(0, 90, 2)),
    ("Krylov", plain, Settings(40, 40, 1)),
    ("Krylov", plain, Settings(60, 60, 1)),
    ("Krylov", plain, Settings(80, 40, 1)),
    ("Krylov", plain, Settings(60, 60, 2)),
    ("Krylov", plain, Settings(90, 45, 2)),
    ("Krylov", plain, Settings(90, 90, 1)),
    ("Krylov", plain, Settings(120, 80, 3)),
    ("without its own", without_its_own, Settings(60, 60, 1)),
    ("without its own", without_its_own, Settings(60, 60, 2)),
    ("without its own", without_its_own, Settings(90, 45, 2)),
    ("block", block, Settings(0, 40, 3)),
    ("block", block, Settings(0, 60, 3)),
    ("block", block, Settings(0, 45, 4)),
    ("block", block, Settings(0, 36, 5)),
    ("block", block, Settings(0, 45, 5)),
    ("block", block, Settings(0, 30, 6)),
    ("block", block, Settings(0, 90, 5)),
    ("block", block, Settings(0, 135, 5)),
    ("sequential", sequential, Settings(0, 40, 3)),
    ("sequential", sequential, Settings(0, 60, 3)),
    ("sequential", sequential, Settings(0, 45, 4)),
]


class Exact:
    """A spectrum, and how far rules are from it."""

    def __init__(self, eigenvalues: np.ndarray) -> None:
        self.eigenvalues = np.sort(eigenvalues)
        self.range = float(np.ptp(eigenvalues))
        self.width = BANDWIDTH * self.range
        self.grid = np.linspace(
            self.eigenvalues[0] - 6 * self.width, self.eigenvalues[-1] + 6 * self.width, 2600
        )
        edges = self.eigenvalues[:, None]
        pieces = np.array_split(self.grid, 20)
        smoothed = [self._kernel(piece - edges).mean(axis=0) for piece in pieces]
        self.density = np.concatenate(smoothed)

    def _kernel(self, x: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * (x / self.width) ** 2) / (self.width * np.sqrt(2 * np.pi))

    def errors(self, rules: tuple[Rule, ...]) -> dict[str, float]:
        density = hd.SpectralDensity(rules, self.eigenvalues.size, 0)
        smoothed = density.pdf(self.grid, self.width).value
        return {
            "w1": hd.distance(density, self.eigenvalues) / self.range,
            "l1": float(np.trapezoid(np.abs(smoothed - self.density), self.grid)),
            "trace": float(density.moment(1).value / self.eigenvalues.mean() - 1),
        }


def row(task: tuple[str, int]) -> dict:
    """Mean W1/range and L1, root mean square relative error of the trace, over the keys.

    Args:
      task: the name of a spectrum, and the index of a run in `RUNS`.
    """
    name, index = task
    eigenvalues = spectra()[name]
    method, function, settings = RUNS[index]
    keys = KEYS if name == REFERENCE else SYNTHETIC_KEYS
    exact = Exact(eigenvalues)
    operator = hd.Matrix.from_eigenvalues(
        jnp.asarray(eigenvalues, jnp.float32), jax.random.key(1000)
    )
    errors = [exact.errors(function(operator, jax.random.key(k), settings)) for k in range(keys)]
    w1 = [error["w1"] for error in errors]
    return {
        "method": method,
        "settings": str(settings),
        "products": settings.products,
        "passes": settings.passes * (settings.num_probes if method == "sequential" else 1),
        "w1": float(np.mean(w1)),
        "w1_standard_error": float(np.std(w1, ddof=1) / np.sqrt(keys)),
        "l1": float(np.mean([error["l1"] for error in errors])),
        "trace_rms": float(np.sqrt(np.mean([error["trace"] ** 2 for error in errors]))),
    }


def draw(results: dict[str, list[dict]]) -> plt.Figure:
    """W1 against products, a panel a spectrum, a marker a way to spend them."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    methods = ("plain", "implicit", "without its own", "sequential", "Krylov", "block")
    markers = dict(zip(methods, "os^DvP", strict=True))
    for ax, (name, rows) in zip(axes.flat, results.items(), strict=True):
        for method, marker in markers.items():
            chosen = [r for r in rows if r["method"] == method]
            products = [r["products"] for r in chosen]
            ax.plot(products, [r["w1"] for r in chosen], marker, label=method, alpha=0.8)
        ax.set(xscale="log", yscale="log", title=name)
        ticks = [60, 120, 180, 360, 900]
        ax.set_xticks(ticks, map(str, ticks))
        ax.xaxis.minorticks_off()
    for ax in axes[1]:
        ax.set_xlabel("Hessian-vector products")
    for ax in axes[:, 0]:
        ax.set_ylabel("W1 / range")
    axes[0, 0].legend(frameon=False)
    return figure


def main() -> None:
    names = {name: eigenvalues.size for name, eigenvalues in spectra().items()}
    results: dict[str, list[dict]] = {name: [] for name in names}
    tasks = [(name, index) for name in names for index in range(len(RUNS))]
    with processes() as pool:
        for (name, index), cell in zip(tasks, pool.map(row, tasks), strict=True):
            if not index:
                keys = KEYS if name == REFERENCE else SYNTHETIC_KEYS
                print(f"\n{name}, n = {names[name]:,}: means over {keys} keys")
                print(
                    f"{'':16}{'steps':>18}{'products':>9}{'passes':>7}{'W1 / range':>20}{'L1':>9}"
                    f"{'trace rms':>11}"
                )
            results[name].append(cell)
            error = f"{cell['w1']:.2e} ± {cell['w1_standard_error']:.0e}"
            print(
                f"{cell['method']:16}{cell['settings']:>18}{cell['products']:>9}{cell['passes']:>7}"
                f"{error:>20}{cell['l1']:>9.4f}{cell['trace_rms']:>11.2%}",
                flush=True,
            )
    path = save("deflation", results)
    draw(results).savefig(path.with_suffix(".png"), dpi=120)
    print(f"\nsaved in {path.name}, drawn in {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
