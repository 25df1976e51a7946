"""How well do the weights behind a layer predict the top eigenspace of its E[M], at initialization?

    python -m benchmarks.output_eigenspace

The experiment of Wu, Zhu, Wu, Wang and Ge (2020) with two random layers: z = W1 x with n outputs,
logits W2 relu(z) for c = 10 classes, rectified standard normal inputs x of d = n^1.1 dimensions,
entries of W1 of variance 1/d, and of W2 of variance 1/n. E[M], the mean second derivative of the
cross-entropy by z, has c - 1 large eigenvalues. Their eigenspace is that of
`hd.kronecker_factors`, over 8,192 inputs. Three predictions are made by
`hd.predicted_output_eigenspace` from W2 alone, or from W2 and the activation rates q, the share of
inputs with z > 0:

- the paper's: the row space of W2 without the direction of the sum of its rows;
- with rates: the same for W2 diag(q);
- rates, centered: the span of the rows of W2 diag(q) minus their mean.

The paper's closed form takes each q as 1/2. With rectified inputs, q varies from neuron to neuron,
because E[W1 x] is not 0. The last two columns are the overlap that the paper's formula is then
expected to have for large n, (E q)^2 / E q^2 over the neurons, and lambda_c / lambda_(c-1) of E[M].

Answer (2026-11-26, 1.5 minutes on two cores beside other work), means and standard deviations of 5
seeds:

       n     d the paper's formula        with rates   rates, centered  expected    gap
      64    97     0.8555 ± 0.0202   0.9695 ± 0.0059   0.9917 ± 0.0012    0.8497  0.528
     128   208     0.8349 ± 0.0190   0.9854 ± 0.0037   0.9971 ± 0.0004    0.8332  0.361
     256   446     0.8370 ± 0.0077   0.9928 ± 0.0036   0.9992 ± 0.0002    0.8339  0.170
     512   955     0.8327 ± 0.0113   0.9974 ± 0.0009   0.9998 ± 0.0000    0.8287  0.081
    1024  2048     0.8252 ± 0.0048   0.9985 ± 0.0007   0.9999 ± 0.0000    0.8249  0.047

The paper's formula does not converge to the eigenspace: its overlap stays at (E q)^2 / E q^2, here
0.83. With activation rates the overlap tends to 1. 1 - overlap is then 1.3 / n to 2 / n, and
centering the rows makes it 4 to 16 times smaller. So the rates are the factor that the paper's
formula lacks. The paper's theorem on the gap holds: lambda_c / lambda_(c-1) tends to 0.
"""

import argparse
import math
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import hessdensity as hd
from benchmarks._harness import save
from hessdensity import losses

CLASSES = 10
EXPONENT = 1.1  # of n, for the number of inputs
BATCH_SIZE = 1024
PREDICTIONS = {
    "the paper's formula": {"rates": False, "centered": False},
    "with rates": {"rates": True, "centered": False},
    "rates, centered": {"rates": True, "centered": True},
}
WIDTHS = (20, 18, 18)  # of the columns


def outputs(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The logits of two layers without biases."""
    return jax.nn.relu(x @ params["first"]) @ params["second"]


LOSS = hd.compose(outputs, losses.cross_entropy)


def measure(n: int, seed: int, num_examples: int) -> dict[str, Any]:
    """The overlaps of all predictions with the top eigenspace of E[M], for one pair of layers."""
    rng = np.random.default_rng([n, seed])
    d = round(n**EXPONENT)
    params = {
        "first": rng.standard_normal((d, n), np.float32) / np.float32(math.sqrt(d)),
        "second": rng.standard_normal((n, CLASSES), np.float32) / np.float32(math.sqrt(n)),
    }
    inputs = np.maximum(rng.standard_normal((num_examples, d), np.float32), 0)
    labels = rng.integers(0, CLASSES, num_examples).astype(np.int32)
    params = jax.tree.map(jnp.asarray, params)
    factors = hd.kronecker_factors(LOSS, params, hd.batches((inputs, labels), BATCH_SIZE))
    values, vectors = np.linalg.eigh(factors["first"].output[0])
    top = vectors[:, ::-1][:, : CLASSES - 1].T.astype(np.float32)
    layer = factors["second"].layer
    weight = hd.matricize(params["second"], layer)
    rates = factors["second"].active_inputs[0]
    found = {}
    for name, form in PREDICTIONS.items():
        own = [rates] if form["rates"] else None
        rows = hd.predicted_output_eigenspace([weight], own, centered=form["centered"])
        found[name] = hd.overlap(rows.astype(np.float32), top)
    return {
        "n": n,
        "d": d,
        "seed": seed,
        "overlaps": found,
        "rates": float(rates.mean() ** 2 / np.mean(rates**2)),
        "gap": float(values[-CLASSES] / values[-CLASSES + 1]),
    }


def draw(rows: list[dict[str, Any]]) -> plt.Figure:
    """1 - overlap against n: every seed as a point, and the mean as a line."""
    figure, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    sizes = sorted({row["n"] for row in rows})
    for color, name in zip(("C3", "C1", "C0"), PREDICTIONS, strict=True):
        missing = {n: [1 - r["overlaps"][name] for r in rows if r["n"] == n] for n in sizes}
        ax.loglog(sizes, [np.mean(missing[n]) for n in sizes], color=color, label=name)
        for n in sizes:
            ax.plot([n] * len(missing[n]), missing[n], ".", color=color, alpha=0.5)
    ax.set_xticks(sizes, [str(n) for n in sizes], minor=False)
    ax.set_xticks([], minor=True)
    ax.set(xlabel="n, outputs of the first layer", ylabel="1 - overlap with the eigenspace of E[M]")
    ax.set_title("Top 9 eigenspace of E[M], predicted from the second layer")
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=8192)
    args = parser.parse_args()
    header = "".join(f"{name:>{width}}" for name, width in zip(PREDICTIONS, WIDTHS, strict=True))
    print(f"{'n':>4} {'d':>5}{header}{'expected':>10}{'gap':>7}")
    rows = []
    for n in args.sizes:
        own = [measure(n, seed, args.examples) for seed in range(args.seeds)]
        rows += own
        cells = []
        for name, width in zip(PREDICTIONS, WIDTHS, strict=True):
            values = [row["overlaps"][name] for row in own]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{f'{np.mean(values):.4f}{spread}':>{width}}")
        theory = np.mean([row["rates"] for row in own])
        gap = np.mean([row["gap"] for row in own])
        print(f"{n:4} {own[0]['d']:5}{''.join(cells)}{theory:>10.4f}{gap:>7.3f}", flush=True)
    path = save("output_eigenspace", rows)
    draw(rows).savefig(path.with_suffix(".png"), dpi=120)
    print(f"saved in {path.name}, drawn in {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
