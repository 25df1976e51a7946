"""Stochastic Lanczos quadrature: the one call of the main job."""

from __future__ import annotations

import logging
import time
from importlib.metadata import version

import jax
import numpy as np

from . import _trees, lanczos
from .density import SpectralDensity
from .operators import Operator, describe
from .quadrature import gauss_rule

logger = logging.getLogger("hessdensity")


def spectral_density(
    operator: Operator, key: jax.Array, *, num_steps: int = 60, num_probes: int = 3, progress: bool = True
) -> SpectralDensity:
    """Estimate the distribution of an operator's eigenvalues (Lin, Saad and Yang 2016; Ghorbani et al. 2019).

    Every probe is a random vector v uniform on the sphere. num_steps of Lanczos from it give the Gauss rule of its
    measure, sum over i of (v.q_i)^2 delta(t - lambda_i), whose expectation is the density: E[v vT] = I/n. All probes
    go through one pass over the data together.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`.
      key: JAX random key; probe i uses ``fold_in(key, i)``, on any number of devices and beside any other probes.
      num_steps: Lanczos steps m, resolution: m nodes a probe, exact for moments up to 2m - 1. Clipped to n.
      num_probes: probes k, precision: error bars shrink as 1/sqrt(k n).
      progress: show a bar of products done, their rate and the time left, on standard error.

    Returns:
      `SpectralDensity`. After Ctrl-C the one that the steps done so far give: ``description["stopped"]`` says so.

    Raises:
      TypeError: ``operator`` is none, or ``key`` is no key.
      ValueError: num_steps or num_probes < 1; the operator turns out not to be symmetric.
      lanczos.NonFiniteProduct: a product is not finite; its ``partial`` is the density from the steps before, if any.

    The defaults, 180 products, come from the benchmark mnist_reference: of the ways to spend them, 90 x 2, 60 x 3 and
    45 x 4 are equal in W1, and 60 x 3 is the best in L1.

    Cost: num_steps x num_probes products, in num_steps passes over the data. Memory: num_probes x (num_steps + 4)
    vectors for the basis, which keeps the recurrence orthogonal.

    Example:
      >>> import hessdensity as hd
      >>> operator = hd.Matrix.from_eigenvalues(np.linspace(0, 1, 1000), jax.random.key(0))
      >>> density = spectral_density(operator, jax.random.key(1), num_steps=30, progress=False)
      >>> bool(abs(density.trace().value - 500) < 4 * density.trace().standard_error)
      True
    """
    _check(operator, key, num_steps, num_probes)
    from tqdm import tqdm

    start, stopped = time.perf_counter(), None
    state = lanczos.init(_trees.random_block(key, 0, num_probes, operator.like), num_steps)
    num_steps, tridiagonals = state.num_steps, (state.diagonal, state.off_diagonal, state.noise)

    def answer() -> SpectralDensity:
        rules = tuple(
            gauss_rule(diagonal, off_diagonal, 2 * noise)
            for diagonal, off_diagonal, noise in zip(*tridiagonals, strict=True)
        )
        description = {
            "operator": describe(operator),
            "num_steps": num_steps,
            "num_probes": num_probes,
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "seconds": time.perf_counter() - start,
            "stopped": stopped,
            "versions": {package: version(package) for package in ("hessdensity", "jax", "numpy")},
        }
        return SpectralDensity(rules, _trees.size(operator.like), tridiagonals[0].size, description)

    # The bar counts products; the state cannot be used after an interrupted step, but the tridiagonals are the host's.
    with tqdm(total=num_steps * num_probes, desc="spectral density", unit="HVP", disable=not progress) as bar:
        try:
            for step in lanczos.iterate(operator, state):
                tridiagonals = step.diagonal, step.off_diagonal, step.noise
                bar.update(num_probes)
        except (KeyboardInterrupt, lanczos.NonFiniteProduct) as error:
            done = tridiagonals[0].shape[1]
            if isinstance(error, lanczos.NonFiniteProduct):
                error.partial = answer() if done else None
                raise
            if not done:
                raise
            stopped = f"interrupted after {done} of {num_steps} steps"
            logger.warning("spectral_density: %s; this is the density from those.", stopped)
    return answer()


def _check(operator: Operator, key: jax.Array, num_steps: int, num_probes: int) -> None:
    if not hasattr(operator, "like") or not hasattr(operator, "__matmul__"):
        raise TypeError(
            f"operator is a {type(operator).__name__}; expected hd.Hessian(loss, params, data), hd.Matrix(array), or "
            "an object with `like` and `@`."
        )
    for name, value in (("num_steps", num_steps), ("num_probes", num_probes)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r}, expected a whole number of at least 1.")
    if not isinstance(key, jax.Array):
        raise TypeError(f"key is a {type(key).__name__}; expected a JAX random key, such as jax.random.key(0).")
    for name, leaf in zip(_trees.paths(operator.like), jax.tree.leaves(operator.like), strict=True):
        if np.dtype(leaf.dtype) not in (np.dtype("float32"), np.dtype("float64")):
            raise TypeError(f"operator.like: leaf {name!r} is {leaf.dtype}; expected float32 or float64 vectors.")
    if not _trees.size(operator.like):
        raise ValueError("operator.like holds no entries; expected vectors of at least one dimension.")
