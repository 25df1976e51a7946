"""How close is a density to a trained network's own spectrum, with 180 and with 120 products?

    python -m benchmarks.deflated_reference

As benchmarks/deflation.py, not on a matrix with the network's spectrum but on its Hessian:
784-20-10, 2,000 MNIST images, 15,910 eigenvalues known. Plain quadrature needs 900 products for a
W1/range of 7.3e-5.

Answer (2026-11-26), 20 keys:

                                             W1/range, worst        L1   trace, rms  found
    the default, a block of 36 x 5    180   2.49e-05  3.8e-05   0.0025        1.23%  53 to 57
    deflation, 90 then 45 x 2         180   2.78e-05  5.6e-05   0.0036        2.13%  42 to 45
    deflation, 80 then 40 x 1         120   3.48e-05  6.0e-05   0.0043        2.62%  40 to 43

The estimated error, 3.8e-05, 3.7e-05 and 5.0e-05 on average, was above the truth in 20, 19 and 18
runs. The trace's interval held it in 19 runs of each.
"""

import jax
import numpy as np

import hessdensity as hd
from benchmarks._harness import save
from benchmarks.mnist_reference import Exact, draw, problem

KEYS = 20
SETTINGS = {
    "the default, a block of 36 x 5": {},
    "deflation, 90 then 45 x 2": {"deflation_steps": 90},
    "deflation, 80 then 40 x 1": {"deflation_steps": 80, "num_steps": 40, "num_probes": 1},
}


def main() -> None:
    hessian, eigenvalues = problem()
    exact = Exact(eigenvalues)
    results = {}
    true_trace = float(eigenvalues.sum())
    for name, settings in SETTINGS.items():
        densities = [
            hd.spectral_density(hessian, jax.random.key(key), progress=False, **settings)
            for key in range(KEYS)
        ]
        errors = [exact.errors(density, exact.smoothed(density)) for density in densities]
        w1, l1 = zip(*errors, strict=True)
        traces = [density.trace() for density in densities]
        result = {
            "num_matvecs": densities[0].num_matvecs,
            "w1": w1,
            "l1": l1,
            "estimated_error": [density.description["error"]["total"] for density in densities],
            "trace": [trace.value for trace in traces],
            "exact_trace": true_trace,
            "trace_held": sum(trace.lower <= true_trace <= trace.upper for trace in traces),
            "outliers": [len(density.outliers) for density in densities],
        }
        results[name] = result
        rms = np.sqrt(np.mean([(trace.value / true_trace - 1) ** 2 for trace in traces]))
        above = sum(e >= w for e, w in zip(result["estimated_error"], w1, strict=True))
        print(f"{name}: {result['num_matvecs']} products, {KEYS} keys")
        print(f"  W1/range mean {np.mean(w1):.2e}, worst {max(w1):.1e}")
        print(
            f"  estimated {np.mean(result['estimated_error']):.1e} on average; above the truth in "
            f"{above} runs"
        )
        print(f"  L1 mean {np.mean(l1):.4f}, worst {max(l1):.4f}")
        print(
            f"  trace rms {rms:.2%}; its interval held the exact one {result['trace_held']} times"
        )
        print(
            f"  eigenvalues found: {min(result['outliers'])} to {max(result['outliers'])}",
            flush=True,
        )
        if not settings:
            median = densities[int(np.argsort(w1)[KEYS // 2])]
    path = save("deflated_reference", results)
    draw(median, exact).savefig(path.with_suffix(".png"), dpi=120)
    print(f"saved in {path.name}, the median run drawn in {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
