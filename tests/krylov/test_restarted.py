"""The restarted block Lanczos engine: a run that is resumed at any step is the undisturbed one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessdensity as hd
from hessdensity.krylov.engine import Step
from hessdensity.krylov.restarted import RestartedLanczos

N = 200


def random_spectrum(rng):
    """One of five kinds: a bulk, outliers, copies, zeros, and equal distances."""
    kinds = [
        rng.standard_normal(N),
        np.r_[0.1 * rng.standard_normal(N - 5), -3, 2, 4, 7, 10],
        np.r_[np.linspace(-1, 1, N - 8), [3.0] * 3, [5.0] * 3, -4, -4],
        np.r_[np.arange(1.0, 9.0), np.zeros(N - 8)],
        np.linspace(-1, 1, N),
    ]
    return kinds[rng.integers(len(kinds))]


def random_engine(rng):
    """(a function that makes one engine again and again, its largest number of steps)."""
    rank, block_size = int(rng.integers(1, 8)), int(rng.integers(1, 4))
    settings = {
        "rank": rank,
        "which": str(rng.choice(["LM", "LA", "SA"])),
        "tolerance": float(10 ** rng.uniform(-5, -2)),
        "block_size": block_size,
        "basis_size": N if rng.random() < 0.2 else rank + 3 * block_size + int(rng.integers(15)),
    }
    key = jax.random.key(int(rng.integers(1000)))
    start = jnp.asarray(rng.standard_normal((3, N)), jnp.float32) if rng.random() < 0.3 else None

    def make():
        engine = RestartedLanczos(jax.ShapeDtypeStruct((N,), jnp.float32), key, **settings)
        engine.begin(start)
        return engine

    return make


def saved(step):
    """A step as it comes back from a file."""
    vectors = None if step.vectors is None else jnp.asarray(np.array(step.vectors))
    return Step(vectors, json.loads(json.dumps(step.scalars)))


def finish(engine, operator, most):
    """Take the remaining steps and return them as they come back from a file."""
    steps = []
    while not engine.complete and engine.num_done < most:
        steps.append(saved(engine.take(operator @ engine.request())))
    return steps


@pytest.mark.parametrize("seed", range(16))
def test_a_run_stopped_at_any_step_and_resumed_is_the_undisturbed_one_bit_for_bit(seed):
    rng = np.random.default_rng(seed)
    values = jnp.asarray(random_spectrum(rng), jnp.float32)
    operator = hd.Matrix.from_eigenvalues(values, jax.random.key(seed))
    make = random_engine(rng)
    whole = make()
    steps = finish(whole, operator, 40)
    for stopped in {1, len(steps) - 1, int(rng.integers(1, len(steps) + 1))}:
        resumed = make()
        for step in steps[:stopped]:
            resumed.replay(step)
        finish(resumed, operator, 40)
        assert resumed.num_done == whole.num_done
        assert resumed.complete == whole.complete
        for one, other in zip(resumed.pairs(), whole.pairs(), strict=True):
            np.testing.assert_array_equal(one, other)
