"""How often do the stated bounds hold the truth?

    python -m benchmarks.bounds

200 random spectra of five kinds (power laws, a bulk with outliers, clusters, indefinite, many exact
zeros), one random rotation and one estimate each, with and without deflation, at settings drawn at
random. On each: `cdf_bounds` at 50 points and `mass` of 20 intervals, by cause, given an enclosure
of the spectrum; the residual bounds of `extremes`; and whether the estimated error, which
`tolerance=` acts on, is above the true W1.

Quadrature and coupling are bounds for certain: they are compared with the cumulative of what the
probes themselves would see after infinitely many steps, which is known here, since the matrix is.
The combined bounds are compared with the spectrum, at their nominal 95 %.

Answer (2026-11-21), held of how many:

    quadrature, against the probes' own measure    10000 of 10000
    coupling, 1/n and 2 beta/n                       200 of 200
    cdf, plain and deflated                         99.68 %, 99.94 %  (nominal 95 %)
    mass, plain and deflated                        99.85 %, 100 %
    extremes, plain and deflated                      400 of 400, 400 of 400
    estimated error above the true W1                84 %, 83 %; median ratio 1.6 and 1.5

The mean width of the cumulative's combined bounds is 0.12 to 0.43 plain, 0.09 to 0.38 deflated, by
kind."""

import jax
import jax.numpy as jnp
import numpy as np

import hessdensity as hd
from benchmarks._harness import save
from hessdensity.vectors.random import random_block

SPECTRA = 200
POINTS = 50
INTERVALS = 20


def spectrum(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Eigenvalues of a kind, of random size, shape and scale."""
    n = int(rng.choice([240, 400, 700, 1100]))  # few sizes: every one is compiled anew
    scale = 10 ** rng.uniform(-3, 3)
    bulk = rng.standard_normal(n)
    match kind:
        case "power law":
            values = np.arange(1.0, n + 1) ** -rng.uniform(0.4, 2)
        case "bulk and outliers":
            values = np.concatenate([0.1 * bulk[10:], rng.uniform(0.5, 10, 10)])
        case "clusters":
            centers = rng.standard_normal(8)
            values = rng.choice(centers, n, p=rng.dirichlet(np.ones(8))) + 1e-3 * bulk
        case "indefinite":
            values = bulk * np.abs(bulk) ** rng.uniform(0, 2)
        case "many zeros":
            values = np.where(rng.random(n) < rng.uniform(0.3, 0.95), 0, bulk)
    return scale * values


KINDS = ("power law", "bulk and outliers", "clusters", "indefinite", "many zeros")


def seen_by_probes(
    operator: hd.Matrix, key: jax.Array, density: hd.SpectralDensity, x: np.ndarray, rounding: float
) -> tuple[np.ndarray, np.ndarray]:
    """(least, most) of the cumulative that a plain run's probes would show after infinitely many
    steps.

    From the dense matrix; an eigenvalue within the rounding of x may lie on either side of it.
    """
    values, vectors = np.linalg.eigh(hd.dense(operator))
    probes = np.asarray(random_block(key, 0, len(density.rules), operator.like), float)
    weights = np.mean((probes @ vectors) ** 2, axis=0)
    sums = np.concatenate([[0.0], np.cumsum(weights / weights.sum())])
    return tuple(
        sums[np.searchsorted(values, x + sign * rounding, side="right")] for sign in (-1, 1)
    )


def one(index: int) -> dict:
    """What held on one random spectrum."""
    rng = np.random.default_rng(index)
    kind = KINDS[index % len(KINDS)]
    values = np.sort(spectrum(kind, rng))
    size = np.abs(values).max()
    n = values.size
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, jnp.float32), jax.random.key(index))
    key = jax.random.key(10_000 + index)
    plain, deflated = (
        hd.spectral_density(
            operator,
            key,
            num_steps=int(rng.choice([10, 20, 40])),
            num_probes=int(rng.choice([1, 2, 4])),
            deflation_steps=steps,
            progress=False,
        )
        for steps in (0, int(rng.choice([10, 30, 60])))
    )
    slack = 1e-6 * size  # float32's rounding of the eigenvalues themselves
    margin = 0.01 * np.ptp(values)
    enclosure = (values[0] - margin, values[-1] + margin)
    # Not within the rounding of an eigenvalue, where the question has no answer in float32.
    candidates = np.concatenate([values, rng.uniform(values[0], values[-1], n)])
    x = rng.choice(candidates, 4 * POINTS) + 8 * slack
    x = x[np.abs(x[:, None] - values).min(axis=1) > 4 * slack][:POINTS]
    truth = np.searchsorted(values, x, side="right") / n
    ends = np.sort(rng.choice(x, (INTERVALS, 2)), axis=1)
    result = {"kind": kind, "n": n}
    least, most = seen_by_probes(operator, key, plain, x, slack)
    low, high = plain.cdf_bounds(x, enclosure).quadrature
    result["quadrature"] = [int(np.sum((low <= most + 1e-6) & (least <= high + 1e-6))), x.size]
    for name, density in (("plain", plain), ("deflated", deflated)):
        bounds = density.cdf_bounds(x, enclosure)
        held = (bounds.lower <= truth + 1e-9) & (truth <= bounds.upper + 1e-9)
        masses = [density.mass(a, b) for a, b in ends]
        exact = [np.mean((values >= a) & (values <= b)) for a, b in ends]
        inside = [
            m.lower <= e + 1e-9 and e <= m.upper + 1e-9 for m, e in zip(masses, exact, strict=True)
        ]
        residual = [
            np.abs(values - end.value).min() <= end.standard_error + slack
            for end in density.extremes()
        ]
        error = density.description["error"]["total"]
        result[name] = {
            "cdf": [int(held.sum()), x.size],
            "mass": [int(np.sum(inside)), INTERVALS],
            "extremes": [int(np.sum(residual)), 2],
            "estimated error": [int(hd.distance(density, values) <= error * np.ptp(values)), 1],
            "error over truth": error * np.ptp(values) / max(hd.distance(density, values), 1e-300),
            "width": float(np.mean(bounds.upper - bounds.lower)),
        }
    result["coupling"] = coupling(operator, key, values, int(rng.choice([5, 20])))
    return result


def coupling(operator: hd.Matrix, key: jax.Array, values: np.ndarray, num_steps: int) -> list[int]:
    """[1 or 0, 1]: whether the theorem's two bounds held, on a dense split in float64."""
    matrix = hd.dense(operator)
    basis = np.zeros((0, values.size))
    vector = np.asarray(random_block(key, 7, 1, operator.like), float)[0]
    for _ in range(num_steps + 1):
        for _ in range(3):
            vector = vector - basis.T @ (basis @ vector)
        beta = np.linalg.norm(vector)
        if len(basis) == num_steps or beta <= 1e-6 * np.abs(values).max():
            break
        basis = np.concatenate([basis, vector[None] / beta])
        vector = matrix @ basis[-1]
    rest = np.linalg.svd(basis)[2][len(basis) :]
    split = np.sort(np.concatenate([np.linalg.eigvalsh(q @ matrix @ q.T) for q in (basis, rest)]))
    exact = np.linalg.eigvalsh(matrix)
    slack = 1e-6 * np.abs(values).max()
    # Interlacing: the i-th value of one lies between the (i-1)-th and the (i+1)-th of the other.
    interlaced = np.all(split[1:] >= exact[:-1] - slack) and np.all(split[:-1] <= exact[1:] + slack)
    return [int(interlaced and np.abs(split - exact).sum() <= 2 * beta + slack * values.size), 1]


def share(pairs: list[list[int]]) -> dict:
    held, of = np.sum(pairs, axis=0)
    return {"held": int(held), "of": int(of), "share": float(held / of)}


def main() -> None:
    runs = []
    for index in range(SPECTRA):
        runs.append(one(index))
        if index % 20 == 19:
            print(f"{index + 1} of {SPECTRA} spectra", flush=True)
    table = {
        "quadrature, against the probes' own measure": share([r["quadrature"] for r in runs]),
        "coupling, 1/n and 2 beta/n": share([r["coupling"] for r in runs]),
    }
    for name in ("plain", "deflated"):
        for what in ("cdf", "mass", "extremes", "estimated error"):
            table[f"{what}, {name}"] = share([r[name][what] for r in runs])
    print(f"\n{'':48}{'held':>8}{'of':>8}{'share':>9}")
    for what, row in table.items():
        print(f"{what:48}{row['held']:>8}{row['of']:>8}{row['share']:>9.2%}")
    ratios = {
        name: np.quantile([r[name]["error over truth"] for r in runs], [0.05, 0.5, 0.95])
        for name in ("plain", "deflated")
    }
    for name, (low, middle, high) in ratios.items():
        print(
            f"estimated error over true W1, {name}: median {middle:.2f}, 90 % between {low:.2f} "
            f"and {high:.2f}"
        )
    print("by kind, combined cdf bounds: share held, and mean width")
    for kind in KINDS:
        chosen = [r for r in runs if r["kind"] == kind]
        cells = []
        for name in ("plain", "deflated"):
            held = share([r[name]["cdf"] for r in chosen])["share"]
            width = np.mean([r[name]["width"] for r in chosen])
            cells.append(f"{name} {held:.2%}, {width:.3f}")
        print(f"  {kind:20}{'   '.join(cells)}")
    path = save(
        "bounds",
        {"table": table, "error_ratio": {k: list(v) for k, v in ratios.items()}, "runs": runs},
    )
    print(f"saved in {path.name}")


if __name__ == "__main__":
    main()
