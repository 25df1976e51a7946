"""How fast is the Lanczos engine alone, how orthogonal is its basis, and what share of the memory's
speed is that?

    python -m benchmarks.lanczos_engine

n = 1e6, 90 steps, one probe, float32, against matfree's `tridiag_sym`, which reorthogonalizes in
full too. The operator is a diagonal, so that nearly all the time is the engine's. First calls,
compilation included, are fresh processes'.

Answer (2026-11-21, 2 cores of an AMD EPYC, JAX 0.10.2, matfree 0.6.3):

                       warm  first call   max|V VT - I|  memory speed
    hessdensity      3.25 s      4.02 s         3.3e-07           33%
    matfree         14.16 s     14.60 s         1.6e-04            8%
    ratio              4.4x        3.6x

Memory is read at 30 GB/s. Compilation takes 0.55, 0.49 and 0.53 s for 30, 90 and 180 steps: it does
not grow. There is one setting, the accurate one."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matfree import decomp

from benchmarks._harness import ROOT, interleave, save
from hessdensity.krylov import lanczos

KEY = jax.random.key(1)
N, STEPS = 1_000_000, 90
BLOCK = 2**16  # columns of the basis taken to float64 at a time


def spectrum(n: int) -> jax.Array:
    """Like a trained network's: nearly all of it close to 0, two tails, and ten outliers."""
    bulk = 1e-3 * jax.random.t(jax.random.key(0), 3.0, (n - 10,))
    return jnp.concatenate([jnp.clip(bulk, -0.3, 1.0), jnp.geomspace(1.5, 10.0, 10)])


class Diagonal:
    """A diagonal matrix as an operator on blocks."""

    def __init__(self, values: jax.Array) -> None:
        self.values = values
        self.like = jax.ShapeDtypeStruct(values.shape, values.dtype)

    def __matmul__(self, block: jax.Array) -> jax.Array:
        return _multiply(self.values, block)


_multiply = jax.jit(jnp.multiply)


def problem(n: int) -> tuple[Diagonal, jax.Array]:
    """An operator and a block of one start vector."""
    values, start = jax.block_until_ready((spectrum(n), jax.random.normal(KEY, (1, n))))
    return Diagonal(values), start


def competitors(n: int, num_steps: int) -> dict[str, Callable[[], Any]]:
    """Both, ready to run on the same operator from the same start."""
    operator, start = problem(n)
    vector = jax.block_until_ready(start[0])
    tridiagonalize = jax.jit(decomp.tridiag_sym(num_steps, reortho="full"), static_argnums=0)

    def hessdensity() -> lanczos.LanczosState:
        *_, state = lanczos.iterate(operator, lanczos.init(start, num_steps))
        return state

    return {
        "hessdensity": hessdensity,
        "matfree": lambda: tridiagonalize(_multiply, vector, operator.values),
    }


def basis(name: str) -> np.ndarray:
    """The Lanczos vectors as rows (STEPS, N)."""
    if name == "matfree":
        return np.asarray(competitors(N, STEPS)[name]().Q_tall)
    operator, start = problem(N)
    state = lanczos.init(start, STEPS)
    rows = [np.array(state.vectors[0])]  # copied: the next update takes the memory over
    rows += [np.array(state.vectors[0]) for state in lanczos.iterate(operator, state)]
    return np.stack(rows[:STEPS])


def loss_of_orthogonality(rows: np.ndarray) -> float:
    """max |V VT - I|, summed in float64."""
    parts = (rows[:, i : i + BLOCK].astype(float) for i in range(0, rows.shape[1], BLOCK))
    return float(np.abs(sum(part @ part.T for part in parts) - np.eye(len(rows))).max())


def reading_speed() -> float:
    """Bytes a second at which all cores read 512 MB: the best of two sums, ten times each.

    Reading alone, for the engine writes one vector where it reads many.
    """
    array = jnp.ones((8, 2**24))
    seconds = []

    def sum_of_rows(rows: jax.Array) -> jax.Array:
        return sum(rows[index] for index in range(len(rows)))

    for total in (jax.jit(jnp.sum), jax.jit(sum_of_rows)):
        total(array).block_until_ready()
        for _ in range(10):
            start = time.perf_counter()
            total(array).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds)


def first_and_second(name: str, n: int, num_steps: int) -> list[float]:
    """Seconds of this process's first run, compilation included, and of its second."""
    run = competitors(n, num_steps)[name]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds


def in_fresh_processes(
    name: str, n: int, num_steps: int, processes: int = 3
) -> tuple[float, float]:
    """Medians of `first_and_second` over processes that have compiled nothing yet."""
    module = [sys.executable, "-m", "benchmarks.lanczos_engine"]
    command = [*module, "--first", name, str(n), str(num_steps)]
    samples = []
    for _ in range(processes):
        run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        samples.append(json.loads(run.stdout))
    first, second = (statistics.median(column) for column in zip(*samples, strict=True))
    return first, second


def main() -> None:
    runs = competitors(N, STEPS)
    warm = interleave(runs)
    speed = reading_speed()
    # Each step must read the vectors so far twice: once for the coefficients, once to subtract
    # them.
    must_read = 2 * 4 * N * STEPS * (STEPS + 1) / 2
    rows = {}
    print(f"{'':14}{'warm':>9}{'first call':>12}{'max|V VT - I|':>16}{'memory speed':>14}")
    for name in runs:
        seconds = warm[name].median
        rows[name] = row = {
            "warm": warm[name]._asdict(),
            "first_call": in_fresh_processes(name, N, STEPS)[0],
            "loss_of_orthogonality": loss_of_orthogonality(basis(name)),
            "bytes_per_second": must_read / seconds,
            "share_of_memory_speed": must_read / seconds / speed,
        }
        cells = [
            f"{name:14}",
            f"{seconds:>7.2f} s",
            f"{row['first_call']:>10.2f} s",
            f"{row['loss_of_orthogonality']:>16.1e}",
            f"{row['share_of_memory_speed']:>14.0%}",
        ]
        print("".join(cells))
    ratios = {
        "warm": warm["matfree"].median / warm["hessdensity"].median,
        "first_call": rows["matfree"]["first_call"] / rows["hessdensity"]["first_call"],
    }
    print(f"{'ratio':14}{ratios['warm']:>8.1f}x{ratios['first_call']:>11.1f}x")
    print(
        f"memory is read at {speed / 1e9:.0f} GB/s; the basis must be read in "
        f"{must_read / 1e9:.1f} GB"
    )
    compilation = {}
    for name in runs:
        pairs = {steps: in_fresh_processes(name, N // 10, steps) for steps in (30, 90, 180)}
        compilation[name] = {steps: first - second for steps, (first, second) in pairs.items()}
        listed = ", ".join(
            f"{seconds:.2f} s for {steps} steps" for steps, seconds in compilation[name].items()
        )
        print(f"compilation, {name}: {listed}")
    result = {
        "competitors": rows,
        "ratios": ratios,
        "reading_speed": speed,
        "compilation": compilation,
    }
    print(f"saved in {save('lanczos_engine', result).name}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--first"]:
        print(json.dumps(first_and_second(sys.argv[2], *map(int, sys.argv[3:]))))
    else:
        main()
