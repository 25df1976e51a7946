"""A demonstration on real data: a network whose whole Hessian is small enough to be computed.

It is trained on scikit-learn's handwritten digits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity import adapters, losses
from hessdensity.data.batches import batches
from hessdensity.errors import needs_extra
from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.distance import distance

WIDTHS = (64, 16, 10)
TRAINING_STEPS = 400


def problem(training_steps: int = TRAINING_STEPS) -> tuple[losses.Loss, Any, list[Any]]:
    """``(loss, params, data)`` of a small ReLU network trained on handwritten digits.

    The network has the widths 64-16-10 and 1,210 weights. It is trained with Adam on 1,797 digits.

    Args:
      training_steps: number of full-batch steps; 0 gives the network at initialization.

    Raises:
      ModuleNotFoundError: scikit-learn, which contains the digits, is not installed.
    """
    import optax

    with needs_extra("demo", "the demonstration"):
        from flax import nnx

    images, labels = _digits()
    keys = nnx.Rngs(0)
    layers = [
        nnx.Linear(WIDTHS[0], WIDTHS[1], rngs=keys),
        nnx.relu,
        nnx.Linear(WIDTHS[1], WIDTHS[2], rngs=keys),
    ]
    loss, params = adapters.from_nnx(nnx.Sequential(*layers), losses.cross_entropy)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, (images, labels)), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(training_steps):
        params, state = step(params, state)
    return loss, params, batches((images, labels), 600)


def _digits() -> tuple[jax.Array, jax.Array]:
    with needs_extra("demo", "the demonstration"):
        from sklearn.datasets import load_digits
    digits = load_digits()
    return jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target, jnp.int32)


def comparison(density: SpectralDensity, eigenvalues: np.ndarray) -> str:
    """A table of estimates, each beside the exact value from all eigenvalues."""
    extremes = density.extremes()
    near = 1e-3 * float(np.abs(eigenvalues).max())
    share = density.mass(-near, near)
    exact_share = np.mean(np.abs(eigenvalues) <= near)
    gap = distance(density, eigenvalues) / np.ptp(eigenvalues)
    rows = [
        ("", "estimate", "exact"),
        ("largest eigenvalue", f"{extremes.largest:.6g}", f"{eigenvalues.max():.6g}"),
        ("smallest eigenvalue", f"{extremes.smallest:.6g}", f"{eigenvalues.min():.6g}"),
        ("trace", f"{density.trace():.4g}", f"{eigenvalues.sum():.4g}"),
        ("Frobenius norm", f"{density.frobenius_norm():.4g}", f"{np.linalg.norm(eigenvalues):.4g}"),
        (
            f"share in ±{near:.2g}",
            f"{share.value:.3f} in [{share.lower:.3f}, {share.upper:.3f}]",
            f"{exact_share:.3f}",
        ),
        (
            "median eigenvalue",
            f"{density.quantile(0.5).value:.2g}",
            f"{np.median(eigenvalues):.2g}",
        ),
        ("W1 distance / range", f"{gap:.1e}", "0"),
    ]
    return "\n".join(f"  {name:<22}{estimate:>28}{exact:>14}" for name, estimate, exact in rows)
