"""What do ten eigenpairs of a trained network's Hessian cost, in products and in passes over the
data?

    python -m benchmarks.top_eigenspace

`hd.top_eigenspace` with blocks of one and of four vectors, against ARPACK (SciPy's eigsh), LOBPCG
(JAX's lobpcg_standard) and power iteration with deflation. All are stopped at the same true
residual: the largest of the ten ||H q - lambda q|| is at most 1e-4 max|lambda|. A pass multiplies a
block of vectors; on a GPU or two cores four vectors in one pass cost some 1.4 gradients each,
instead of 2 (`benchmarks.hvp_cost`).

ARPACK looks at its residuals only when it restarts: it is run with many tolerances, and the
cheapest that suffices counts. JAX's LOBPCG multiplies 4 k vectors an iteration in two passes; one
that keeps its products would multiply k in one, which the line below it shows. Power iteration
counts from the first vector to the last.

Answer (2026-11-26), rank 10, products and passes; medians and ranges of 8 keys (4 for LOBPCG and
power iteration) on the 784-20-10 network, one key on ResNet-20 with 16 images and at most 200
products:

                                    784-20-10, products and passes             ResNet-20
    hessdensity, block_size=1       25 (22 to 26)       25 (22 to 26)          28 in 28
    hessdensity, block_size=4       48 (44 to 52)       12 (11 to 13)          52 in 13
    ARPACK                          28 (28 to 34)       28 (28 to 34)          34 in 34
    LOBPCG, JAX's                   410 (410 to 450)    21 (21 to 23)          not reached in 170
    LOBPCG, keeping its products    110 (110 to 120)    11 (11 to 12)          not reached in 50
    power iteration                 894 (807 to 1168)   894 (807 to 1168)      not reached in 200

Blocks of four are the default: under half of ARPACK's passes, fewer than twice its products. The
call itself goes on until each residual is at most 1e-4 of its own eigenvalue: 52 to 56 products,
and with block_size=1, whose search for copies comes on top, 29 or 30. A block of one sees no
multiplicity but through its fresh start: of 20 second copies it found 20, 20, 20, 20 and 12 where
the doubled eigenvalue was 4.4, 2.6, 2.1, 1.6 and 1.3 times the smallest wanted. The smallest
eigenvalues of such networks: `benchmarks.smallest_eigenvalues`.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental.sparse.linalg import lobpcg_standard
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

import hessdensity as hd
from benchmarks._harness import save
from benchmarks.mnist_reference import problem as reference_problem
from benchmarks.models.data import cifar10, folder
from benchmarks.models.resnet import ResNet, load_weights, normalize
from hessdensity import adapters, losses
from hessdensity.krylov.restarted import RestartedLanczos
from hessdensity.vectors import trees

RANK = 10
TOLERANCE = 1e-4
KEYS = 8  # on the reference, half as many for the two that cost most; one on the ResNet
ARPACK_TOLERANCES = (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 6e-4, 3e-4, 1e-4)
DOUBLED, COPY_KEYS = (3, 5, 7, 8, 9), 20  # eigenvalues made double, one at a time


class Point(NamedTuple):
    """Where a method stood."""

    products: int
    passes: int
    residual: float  # the largest of the ten, over max|lambda|


class Flat:
    """An operator on the columns of arrays (n, k), which counts."""

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.n = trees.size(operator.like)
        self.products = 0
        self.passes = 0

    def __call__(self, columns: np.ndarray) -> np.ndarray:
        self.products += columns.shape[1]
        self.passes += 1
        rows = np.asarray(columns, np.float32).T
        return trees.ravel(self.operator @ trees.unravel(rows, self.operator.like)).T.astype(float)


def worst(values: np.ndarray, vectors: np.ndarray, products: np.ndarray, norm: float) -> float:
    """The largest residual over the norm."""
    return float(np.linalg.norm(products - vectors * values, axis=0).max() / norm)


def block_lanczos(operator: Any, key: int, norm: float, cap: int, block_size: int) -> list[Point]:
    """What `hd.top_eigenspace` does, with a look at its residuals after each pass.

    It ends where all methods end: no residual exceeds the tolerance times the norm. The call itself
    judges each pair by its own size, and makes a pass more."""
    settings = {
        "rank": RANK,
        "which": "LM",
        "tolerance": TOLERANCE,
        "block_size": block_size,
        "basis_size": 256,
    }
    engine = RestartedLanczos(operator.like, jax.random.key(key), **settings)
    engine.begin(None)
    points = []
    while not engine.complete and engine.num_matvecs + block_size <= cap:
        engine.take(operator @ engine.request())
        if engine.num_matvecs >= RANK:
            space = engine.pairs()
            residual = float(space.residuals.max() / norm)
            points.append(Point(engine.num_matvecs, engine.num_passes, residual))
            # The engine would go on until each pair meets the tolerance of its own size.
            if residual <= TOLERANCE:
                break
    vectors = trees.ravel(space.vectors).T.astype(float)
    true = worst(space.values, vectors, Flat(operator)(vectors), norm)
    assert abs(true - points[-1].residual) < 2e-6, (true, points[-1])
    return points


def arpack(operator: Any, key: int, norm: float, cap: int) -> list[Point]:
    """eigsh with its own ncv. Every tolerance sees the same products, which are made once."""
    flat = Flat(operator)
    start = np.random.default_rng(key).standard_normal(flat.n)
    cache: list[np.ndarray] = []
    points = []
    for tolerance in ARPACK_TOLERANCES:
        count = 0

        def multiply(vector: np.ndarray) -> np.ndarray:
            nonlocal count
            if count == len(cache):
                cache.append(flat(vector.reshape(-1, 1))[:, 0])
            count += 1
            return cache[count - 1]

        shape = (flat.n, flat.n)
        try:
            linear = LinearOperator(shape, matvec=multiply, dtype=float)
            values, vectors = eigsh(
                linear, RANK, which="LM", tol=tolerance, v0=start, maxiter=max(cap // RANK, 1)
            )
        except ArpackNoConvergence:
            break
        residual = worst(values, vectors, Flat(operator)(vectors), norm)
        points.append(Point(count, count, residual))
        if residual <= TOLERANCE:
            break
    return points


class Reached(Exception):
    """The residuals are small enough, or the cap is reached: leaves LOBPCG's loop."""


def lobpcg(operator: Any, key: int, norm: float, cap: int) -> list[Point]:
    """JAX's, run without compilation, so that its products can be counted and watched."""
    flat, points = Flat(operator), []

    def multiply(columns: jax.Array) -> jax.Array:
        with jax.disable_jit(False):
            if columns.shape[1] == 1:  # its check of shapes, which computes nothing
                return columns
            x = np.asarray(columns, float)
            product = flat(x)
            if x.shape[1] == RANK:
                values = (x * product).sum(0)
                points.append(Point(flat.products, flat.passes, worst(values, x, product, norm)))
                if points[-1].residual <= TOLERANCE or flat.products + 4 * RANK > cap:
                    raise Reached
            return jnp.asarray(product, jnp.float32)

    start = jax.random.normal(jax.random.key(key), (flat.n, RANK))
    try:
        with jax.disable_jit():
            lobpcg_standard(multiply, start, m=10_000, tol=0.0)
    except Reached:
        pass
    return points


def frugal(points: list[Point]) -> list[Point]:
    """The same iterations, had LOBPCG kept its products."""
    return [Point(RANK * (i + 1), i + 1, point.residual) for i, point in enumerate(points)]


def power_iteration(operator: Any, key: int, norm: float, cap: int) -> list[Point]:
    """One eigenvector after the other, each kept orthogonal to those before, as PyHessian does.

    The part of a residual along the vectors before, as large as their own residuals, is left out:
    no further product would make it smaller."""
    flat, rng = Flat(operator), np.random.default_rng(key)
    found = np.zeros((flat.n, 0))
    residuals: list[float] = []
    points = []
    for _ in range(RANK):
        vector = rng.standard_normal(flat.n)
        residuals.append(np.inf)
        while flat.products < cap:
            vector -= found @ (found.T @ vector)
            vector /= np.linalg.norm(vector)
            product = flat(vector[:, None])[:, 0]
            value = float(vector @ product)
            outside = product - found @ (found.T @ product)
            residuals[-1] = float(np.linalg.norm(outside - value * vector)) / norm
            largest = max(residuals) if len(residuals) == RANK else np.inf
            points.append(Point(flat.products, flat.passes, largest))
            if residuals[-1] <= TOLERANCE:
                break
            vector = product
        found = np.concatenate([found, vector[:, None]], axis=1)
    return points


METHODS: dict[str, Callable[..., list[Point]]] = {
    "hessdensity, block_size=1": lambda *args: block_lanczos(*args, block_size=1),
    "hessdensity, block_size=4": lambda *args: block_lanczos(*args, block_size=4),
    "ARPACK": arpack,
    "LOBPCG, JAX's": lobpcg,
    "power iteration": power_iteration,
}


def runs(
    operator: Any, norm: float, keys: int, caps: dict[str, int]
) -> Iterator[tuple[str, list[list[Point]]]]:
    """(method, the points of each key's run)."""
    for name, method in METHODS.items():
        cap = caps.get(name, 5000)
        slow = name.startswith(("LOBPCG", "power"))
        count = (keys + 1) // 2 if slow else keys
        histories = [method(operator, key, norm, cap) for key in range(count)]
        yield name, histories
        if name.startswith("LOBPCG"):
            yield "LOBPCG, keeping its products", [frugal(points) for points in histories]


def line(name: str, histories: list[list[Point]]) -> str:
    """Median and range over the keys of those that reached the tolerance."""
    last = [points[-1] for points in histories]
    if not all(point.residual <= 1.1 * TOLERANCE for point in last):
        residual = max(point.residual for point in last)
        return f"    {name:32}not reached in {last[0].products} products: {residual:.1e}"
    cells = []
    for counts in zip(*[point[:2] for point in last], strict=True):
        spread = f" ({min(counts)} to {max(counts)})" if len(counts) > 1 else ""
        cells.append(f"{statistics.median(counts):g}{spread}")
    return f"    {name:32}{cells[0]:24}{cells[1]}"


def resnet20(images: int) -> hd.Hessian:
    """ResNet-20 with its trained weights, BatchNorm on stored statistics, on training images of
    CIFAR-10."""
    model, variables = ResNet(20), load_weights(folder("weights") / "cifar10_resnet20.safetensors")
    inputs, labels = cifar10("train", images)
    loss, params = adapters.from_linen(
        model, variables, losses.cross_entropy, batch_statistics="stored", use_running_average=True
    )
    return hd.Hessian(loss, params, [(np.asarray(normalize(inputs)), labels)])


def copies(eigenvalues: np.ndarray) -> dict[str, int]:
    """In how many of `COPY_KEYS` runs block_size=1 finds both copies, one of the ten being made
    double.

    A Krylov space from one vector holds one copy alone; a random rotation of the spectrum stands
    for the Hessian."""
    found = {}
    for position in DOUBLED:
        doubled = np.sort([*eigenvalues[1:], eigenvalues[-position]])[::-1]
        operator = hd.Matrix.from_eigenvalues(jnp.asarray(doubled, jnp.float32), jax.random.key(99))
        spaces = [
            hd.top_eigenspace(operator, jax.random.key(key), RANK, block_size=1, progress=False)
            for key in range(COPY_KEYS)
        ]
        errors = [np.abs(space.values - doubled[:RANK]).max() for space in spaces]
        right = sum(error < TOLERANCE * doubled[0] for error in errors)
        found[f"{eigenvalues[-position] / eigenvalues[-RANK]:.2g}"] = int(right)
    return found


def draw(results: dict[str, dict[str, list[list[Point]]]]) -> plt.Figure:
    """The largest of the ten residuals against products and against passes, the first key of each
    method."""
    figure, axes = plt.subplots(
        len(results), 2, figsize=(12, 4.2 * len(results)), layout="constrained", squeeze=False
    )
    labels = ("products with a vector", "passes over the data")
    for row, (problem, methods) in zip(axes, results.items(), strict=True):
        for count, (ax, label) in enumerate(zip(row, labels, strict=True)):
            for (name, histories), color in zip(methods.items(), plt.cm.tab10.colors, strict=False):
                points = [point for point in histories[0] if np.isfinite(point.residual)]
                ax.plot(
                    [point[count] for point in points],
                    [point.residual for point in points],
                    color=color,
                    label=name,
                    marker="o",
                    markersize=3,
                    linestyle=":" if name == "ARPACK" else "-",
                )
            ax.axhline(TOLERANCE, color="0.6", linewidth=0.8)
            ax.set(
                xscale="log",
                yscale="log",
                xlabel=label,
                ylabel="largest of ten residuals / max|λ|",
                title=problem,
            )
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--images", type=int, default=16, help="of the ResNet's Hessian; 0 leaves it out"
    )
    parser.add_argument("--cap", type=int, default=200, help="products of a method on the ResNet")
    args = parser.parse_args()

    reference, eigenvalues = reference_problem()
    results: dict[str, dict[str, list[list[Point]]]] = {}

    def report(problem: str, operator: Any, norm: float, keys: int, caps: dict[str, int]) -> None:
        print(f"{problem}\n    {'':32}{'products':24}passes", flush=True)
        results[problem] = {}
        for name, histories in runs(operator, norm, keys, caps):
            results[problem][name] = histories
            print(line(name, histories), flush=True)
            settings = {"rank": RANK, "tolerance": TOLERANCE}
            path = save("top_eigenspace", {**settings, "copies": found, "points": results})
            draw(results).savefig(path.with_suffix(".png"), dpi=120)
            plt.close()

    found = copies(eigenvalues)
    print(
        f"second copies found by block_size=1, of {COPY_KEYS}, by size over the smallest wanted: "
        f"{found}",
        flush=True,
    )
    title = f"784-20-10 network, MNIST, n = {len(eigenvalues):,}"
    report(f"{title}: {KEYS} keys", reference, float(np.abs(eigenvalues).max()), KEYS, {})
    if args.images:
        hessian = resnet20(args.images)
        norm = hd.top_eigenspace(hessian, jax.random.key(1), 1, progress=False).values[0]
        title = f"ResNet-20, {args.images} CIFAR-10 images, n = {trees.size(hessian.like):,}"
        report(title, hessian, float(abs(norm)), 1, dict.fromkeys(METHODS, args.cap))


if __name__ == "__main__":
    main()
