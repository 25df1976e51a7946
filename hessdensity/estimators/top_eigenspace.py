"""The top of a spectrum: restarted block Lanczos, with the residual of every pair."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hessdensity.krylov.lanczos import NonFiniteProduct
from hessdensity.krylov.restarting import MERIT, BlockRun
from hessdensity.operators.protocol import Operator, check
from hessdensity.runs.failures import explained
from hessdensity.runs.memory import bytes_per_device, free_memory, in_words
from hessdensity.runs.progress import count, make_bar
from hessdensity.runs.steps import Steps
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.vectors import trees as _trees
from hessdensity.vectors.fingerprint import fingerprint

PyTree = Any
logger = logging.getLogger("hessdensity")

_SMALL = 1000  # dimensions: all the basis there can be takes some megabytes, and then there is no restart


def top_eigenspace(
    operator: Operator,
    key: jax.Array,
    rank: int,
    *,
    which: str = "LM",
    tolerance: float = 1e-4,
    block_size: int = 4,
    basis_size: int | None = None,
    max_matvecs: int | None = None,
    start: Eigenspace | PyTree | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Eigenspace:
    """Eigenpairs at an end of the spectrum, by block Lanczos with thick restarts.

    A block of vectors goes through the data together; its products extend an orthonormal basis, and
    the eigenpairs of the operator's compression to it are the answer once their residuals ||H q -
    lambda q|| are small: true residuals, of the products as they were, at no further cost. A full
    basis is cut down to the best pairs.

    Eigenvalues of multiplicity up to ``block_size - 1`` are found with all their copies. Where as
    many copies are found as the block has vectors (with block_size=1: always) there may be more,
    invisible from where the block started: then a fresh random block, orthogonal to all that was
    found, is followed for a few steps, and the run goes on if a new eigenvalue enters there. That
    is cheap (two steps where nothing is near) and may miss a copy of what is hardly larger than the
    smallest eigenvalue wanted: with block_size=1, on a trained network's spectrum, a second copy
    was found in 60 runs of 60 from twice as large on, in 18 of 20 at 1.6 times, in 10 of 20 at 1.3
    times.

    Args: operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`. Symmetric. key:
      JAX random key of the start. rank: number of eigenpairs wanted, 1 to n. which: ``"LM"`` the
      largest in magnitude, ``"LA"`` the algebraically largest, ``"SA"`` the smallest. tolerance: a
      pair has converged when its residual is at most tolerance x max|lambda|. The eigenvalue is
      then off
        by far less, about residual^2 over the distance to its neighbours.
      block_size: vectors a pass over the data. Large ones need fewer passes and more products.
      basis_size: vectors that the basis may hold (default 3 rank + 4 block_size, or n up to n =
      1,000); fewer need
        more products. Each multiple eigenvalue found by a fresh start may add a block to it.
      max_matvecs: products after which what is there is returned (default 100 rank, at least
      1,000). start: an `Eigenspace` of a similar operator, such as the last checkpoint's, or a
      block of vectors: random
        combinations of it start the run. One vector of the block remains random, for what is new.
      checkpoint: a folder. Every step is saved there, and a later call with the same arguments goes
        on from it, as for `spectral_density`.
      progress: show a bar of products done and pairs converged, on standard error.

    Returns: `Eigenspace` of the wanted pairs, values descending algebraically for each ``which``.
      Pairs that have not converged when max_matvecs is reached, or at Ctrl-C (then there may be
      fewer than rank), are marked so.

    Raises: TypeError: ``operator`` is none, or ``key`` is no key. ValueError: an argument outside
      its range; the operator turns out not to be symmetric. lanczos.NonFiniteProduct: a product is
      not finite; its ``partial`` is the eigenspace before, if any.

    Cost: on the Hessian of a trained network with 15,910 weights, rank 10, some 50 products in 12
    passes; with block_size=1 some 28, each a pass. Memory: basis_size vectors, at a restart half as
    many again, rank and a few blocks: with the defaults 5 rank + 10 block_size + 24 at most.

    Sources: Lanczos (1950); Golub and Underwood (1977) for blocks; Wu and Simon (2000) for the
    thick restart; Stewart (2001) for the form H V = Z T, in which a restart is a rotation.

    Example:
      >>> import hessdensity as hd
      >>> operator = hd.Matrix.from_eigenvalues(np.append(np.linspace(-1, 1, 500), [8, 8, -9]), jax.random.key(0))
      >>> space = top_eigenspace(operator, jax.random.key(1), 3, progress=False)
      >>> space.values.round(3).tolist(), bool(space.converged.all())
      ([8.0, 8.0, -9.0], True)
    """
    n = _check(operator, key, rank, which, tolerance, block_size)
    block_size = min(block_size, n)
    basis_size, max_matvecs = _sizes(rank, n, block_size, basis_size, max_matvecs)
    settings = {
        "computation": "top_eigenspace",
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "rank": rank,
        "which": which,
        "tolerance": tolerance,
        "block_size": block_size,
        "basis_size": basis_size,
        "max_matvecs": max_matvecs,
        "start": None if start is None else fingerprint(getattr(start, "vectors", start)),
    }
    steps, stopped, free = Steps(checkpoint, operator, settings), None, free_memory(operator.like)
    run = BlockRun(operator, key, rank, which, tolerance, block_size, basis_size, steps)

    def answer() -> Eigenspace:
        kept = {
            name: settings[name]
            for name in ("which", "tolerance", "block_size", "basis_size", "key")
        }
        more = {
            "operator": steps.describe(),
            "seconds": steps.seconds,
            "stopped": stopped,
            "versions": {package: version(package) for package in ("hessdensity", "jax", "numpy")},
        }
        return run.answer({**kept, **more})

    def table() -> str:
        each = bytes_per_device(operator.like)
        most = rank + basis_size * 3 // 2 + 4 * block_size
        return (
            f"top_eigenspace keeps {most} vectors of {in_words(each)}, {in_words(most * each)} on "
            "each device, where "
            f"{'an unknown amount' if free.device is None else in_words(free.device)} is free. A "
            f"smaller basis_size (now {basis_size}; at least rank + 3 block_size), block_size or "
            "rank needs less, as do more devices."
        )

    with (
        steps.kept(),
        explained(table, checkpoint),
        make_bar("top eigenspace", None, progress) as bar,
    ):
        run.begin(start)
        try:
            while not run.complete:
                if run.num_matvecs + block_size > max_matvecs:
                    stopped = f"max_matvecs={max_matvecs} reached"
                    break
                read_back = steps.on_disk
                count(bar, run.step(), read_back=read_back)
                bar.set_postfix_str(f"{run.num_converged} of {rank} converged")
            steps.check_data()
        except KeyboardInterrupt:
            if not run.num_passes:
                raise
            stopped = f"interrupted after {run.num_matvecs} products"
        except FloatingPointError as error:
            refusal = NonFiniteProduct(run.num_passes, str(error))
            refusal.partial = answer() if run.num_passes else None
            raise refusal from error
    result = answer()
    if not np.all(result.converged) or result.rank < rank:
        reason = stopped or "the space is exhausted"
        logger.warning(
            "top_eigenspace: %s; %d of %d pairs have converged.",
            reason,
            result.converged.sum(),
            rank,
        )
    return result


def _check(
    operator: Operator, key: jax.Array, rank: int, which: str, tolerance: float, block_size: int
) -> int:
    """Refuse what cannot be computed; returns n."""
    n = check(operator, key)
    if not isinstance(rank, int | np.integer) or not 1 <= rank <= n:
        raise ValueError(f"rank={rank!r}, expected a whole number from 1 to n = {n:,}.")
    if not isinstance(block_size, int | np.integer) or block_size < 1:
        raise ValueError(f"block_size={block_size!r}, expected a whole number of at least 1.")
    if which not in MERIT:
        raise ValueError(
            f"which={which!r}, expected 'LM' (largest in magnitude), 'LA' (largest) or 'SA' "
            "(smallest eigenvalues)."
        )
    finest = 32 * _trees.epsilon(operator.like)
    if not finest <= tolerance < 1:
        raise ValueError(
            f"tolerance={tolerance!r}, expected from {finest:.2g}, what rounding allows vectors of "
            f"{_trees.scalar_dtype(operator.like)}, to 1: a share of max|lambda|."
        )
    return n


def _sizes(
    rank: int, n: int, block_size: int, basis_size: int | None, max_matvecs: int | None
) -> tuple[int, int]:
    """(basis_size, max_matvecs), the defaults where they are None."""
    if basis_size is None:
        basis_size = n if n <= _SMALL else 3 * rank + 4 * block_size
    if basis_size < min(rank + 3 * block_size, n):
        raise ValueError(
            f"basis_size={basis_size!r}, expected at least rank + 3 block_size = "
            f"{rank + 3 * block_size}: the pairs wanted, a block to be multiplied, its products "
            "and a fresh block."
        )
    max_matvecs = max(100 * rank, 1000) if max_matvecs is None else max_matvecs
    if max_matvecs < rank + block_size:
        raise ValueError(
            f"max_matvecs={max_matvecs!r}, expected at least rank + block_size = "
            f"{rank + block_size}: fewer products give fewer pairs."
        )
    return basis_size, max_matvecs
