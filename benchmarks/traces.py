"""Which estimate of the trace needs the fewest products, and do the error bars hold the truth?

    python -m benchmarks.traces

Relative errors (root mean square over keys) against products: random vectors alone (Girard 1989; Hutchinson 1990),
Hutch++ (Meyer, Musco, Musco and Woodruff 2021), `hessdensity.trace` (XTrace, and XNysTrace where no eigenvalue is
negative) and the trace of `hessdensity.spectral_density`, half of whose products deflate. Three spectra: the trained
784-20-10 network with all 15,910 eigenvalues known, 20 outliers over a light power-law bulk, and 1/i.

Answer:
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import hessdensity as hd
from benchmarks._harness import save
from benchmarks.models.data import folder

PRODUCTS = (30, 60, 120, 180, 360)
KEYS = 20

Answer = tuple[float, bool | None]  # the trace, and whether the interval holds the true one


def spectra() -> dict[str, np.ndarray]:
    """Eigenvalues by name."""
    reference = np.load(folder("reference") / "mnist_mlp_784_20_10.npz")["eigenvalues"]
    bulk = 1e-3 / np.arange(1, 7981) ** 0.5
    return {
        "trained network": reference,
        "outliers": np.concatenate([np.geomspace(10, 0.5, 20), bulk]),
        "hyperbolic": 1 / np.arange(1, 8001),
    }


def columns(operator: hd.Matrix, vectors: np.ndarray) -> np.ndarray:
    return np.asarray(operator @ jnp.asarray(vectors.T)).T


def girard(operator: hd.Matrix, seed: int, products: int, exact: float) -> Answer:
    vectors = np.random.default_rng(seed).standard_normal((*operator.like.shape, products)).astype(np.float32)
    vectors *= np.sqrt(len(vectors)) / np.linalg.norm(vectors, axis=0)
    return float(np.sum(vectors * columns(operator, vectors), dtype=float) / products), None


def hutch_plus_plus(operator: hd.Matrix, seed: int, products: int, exact: float) -> Answer:
    count = products // 3
    vectors = np.random.default_rng(seed).standard_normal((*operator.like.shape, 2 * count)).astype(np.float32)
    basis = np.linalg.qr(columns(operator, vectors[:, :count]))[0]
    tests = vectors[:, count:] - basis @ (basis.T @ vectors[:, count:])
    inside = np.sum(basis * columns(operator, basis), dtype=float)
    return float(inside + np.sum(tests * columns(operator, tests), dtype=float) / count), None


def exchangeable(operator: hd.Matrix, seed: int, products: int, exact: float, semidefinite: bool) -> Answer:
    found = hd.trace(operator, jax.random.key(seed), products, semidefinite=semidefinite, progress=False)
    return found.value, bool(found.lower <= exact <= found.upper)


def of_the_density(operator: hd.Matrix, seed: int, products: int, exact: float) -> Answer:
    settings = {"deflation_steps": products // 2, "num_steps": products // 4, "num_probes": 2}
    density = hd.spectral_density(operator, jax.random.key(seed), **settings, progress=False)
    found = density.trace()
    return float(found.value), bool(found.lower <= exact <= found.upper)


METHODS: dict[str, Callable[..., Answer]] = {
    "Girard-Hutchinson": girard,
    "Hutch++": hutch_plus_plus,
    "XTrace": partial(exchangeable, semidefinite=False),
    "XNysTrace": partial(exchangeable, semidefinite=True),
    "spectral density": of_the_density,
}


def cell(method: Callable[..., Answer], operator: hd.Matrix, products: int, exact: float) -> dict[str, Any]:
    """What `KEYS` runs gave."""
    answers = [method(operator, seed, products, exact) for seed in range(KEYS)]
    errors = np.array([value for value, _ in answers]) / exact - 1
    held = [held for _, held in answers if held is not None]
    return {"products": products, "rms": float(np.sqrt(np.mean(errors**2))), "held": sum(held) if held else None}


def draw(result: dict[str, dict[str, list[dict[str, Any]]]]) -> plt.Figure:
    """Error against products, a panel for each spectrum."""
    figure, axes = plt.subplots(1, len(result), figsize=(13, 4), layout="constrained")
    for ax, (name, methods) in zip(axes, result.items(), strict=True):
        for method, cells in methods.items():
            ax.loglog([c["products"] for c in cells], [c["rms"] for c in cells], "o-", markersize=4, label=method)
        ax.set_title(name)
        ax.set_xlabel("products")
        ax.set_xticks(PRODUCTS, [str(products) for products in PRODUCTS])
        ax.minorticks_off()
    axes[0].set_ylabel("relative error of the trace (rms)")
    axes[-1].legend(frameon=False)
    return figure


def main() -> None:
    result: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, eigenvalues in spectra().items():
        operator = hd.Matrix.from_eigenvalues(jnp.asarray(eigenvalues, jnp.float32), jax.random.key(2024))
        exact = float(eigenvalues.sum())
        chosen = {m: f for m, f in METHODS.items() if m != "XNysTrace" or eigenvalues.min() >= 0}
        print(f"\n{name}: n = {len(eigenvalues):,}, trace {exact:.8g}; rms of {KEYS} keys, and how often bars held")
        print(f"{'products':>18}" + "".join(f"{products:>14}" for products in PRODUCTS))
        result[name] = {}
        for method, run in chosen.items():
            cells = [cell(run, operator, products, exact) for products in PRODUCTS]
            result[name][method] = cells
            held = ["" if c["held"] is None else f" ({c['held']})" for c in cells]
            print(
                f"{method:>18}" + "".join(f"{c['rms']:>9.1e}{h:>5}" for c, h in zip(cells, held, strict=True)),
                flush=True,
            )
    path = save("traces", result)
    draw(result).savefig(path.with_suffix(".png"), dpi=120)
    print(f"\nsaved in {path.name}, drawn in {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
