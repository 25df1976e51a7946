"""Every long computation under one interface, for tests of what they have in common."""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import hessdensity as hd
from hessdensity.operators.algebra import Wrapper

N = 60


class Interrupted(Wrapper):
    """An operator that raises ``error`` in the product after ``limit``, and counts its products."""

    def __init__(self, operator, limit=None, error=KeyboardInterrupt, pause=0.0):
        super().__init__(operator)
        self.limit, self.error, self.pause, self.num_passes = limit, error, pause, 0

    def __matmul__(self, block):
        if self.num_passes == self.limit:
            raise self.error
        time.sleep(self.pause)
        self.num_passes += 1
        return self._operator @ block


class Notified(hd.Hessian):
    """A Hessian that calls ``before()`` before each of its products."""

    before = staticmethod(lambda: None)

    def multiply_parts(self, block, num_parts):
        self.before()
        return super().multiply_parts(block, num_parts)


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["kernel"]).sum(1) - y) ** 2)


def weights(scale=1.0):
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(scale * rng.standard_normal((10, 6)), jnp.float32)}


def data():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((40, 10)), rng.standard_normal(40)
    return hd.batches((x.astype(np.float32), y.astype(np.float32)), 5)


def hessian(before=lambda: None, scale=1.0):
    """A Hessian of 60 weights on 8 batches."""
    made = Notified(loss, weights(scale), data())
    made.before = before
    return made


def _density(operator, key, **options):
    found = hd.spectral_density(operator, key, num_steps=6, deflation_steps=8, **options)
    return found, [rule.nodes for rule in found.rules] + [rule.weights for rule in found.rules]


def _eigenspace(operator, key, **options):
    found = hd.top_eigenspace(operator, key, 3, block_size=2, basis_size=12, **options)
    return found, [found.values, found.residuals, found.vectors["kernel"]]


def _measure(operator, key, **options):
    vector = jax.tree.map(jnp.ones_like, weights())
    found = hd.spectral_measure(operator, vector, 12, **options)
    return found, [found.rules[0].nodes, found.rules[0].weights]


def _parts(operator, key, **options):
    found = hd.part_densities(operator, key, 4, num_steps=6, **options)
    rules = [rule for density in found.densities for rule in density.rules]
    return found, [found.counts, *(rule.nodes for rule in rules)]


def _trace(operator, key, **options):
    found = hd.trace(operator, key, 40, block_size=4, **options)
    return found, [found.value, found.standard_error]


def _nystrom(operator, key, **options):
    gauss_newton = positive(operator)
    found = hd.trace(gauss_newton, key, 20, semidefinite=True, block_size=4, **options)
    return found, [found.value, found.standard_error]


def _exact(operator, key, **options):
    found = hd.trace(operator, key, 100, block_size=5, **options)
    return found, [found.value, found.standard_error]


def _track(operator, key, **options):
    def make_operator(scale):
        made = hessian(scale=scale)
        made.before = operator.before
        return made

    settings = {"rank": 2, "num_steps": 4, "deflation_steps": 5, "block_size": 2, **options}
    found = hd.track(make_operator, [(0, 1.0), (1, 1.1), (2, 1.2)], key, **settings)
    nodes = [rule.nodes for density in found.densities for rule in density.rules]
    return found, [found.values, found.overlaps, found.concentrations, *nodes]


class Positive(Wrapper):
    """The square of an operator: positive semi-definite."""

    def __matmul__(self, block):
        return self._operator @ (self._operator @ block)


def positive(operator):
    return Positive(operator)


ALL = {
    "spectral_density": _density,
    "top_eigenspace": _eigenspace,
    "spectral_measure": _measure,
    "part_densities": _parts,
    "trace": _trace,
    "trace, semidefinite": _nystrom,
    "trace, exact": _exact,
    "track": _track,
}
"""Name -> function of (operator, key, **options) to (result, numbers that decide equality)."""


if __name__ == "__main__":  # a process to be killed: name of the computation, folder, pause
    name, folder, pause = sys.argv[1:]

    def before():
        time.sleep(float(pause))

    print("begins", flush=True)
    ALL[name](hessian(before), jax.random.key(0), checkpoint=folder, progress=False)
    print("ends", flush=True)
