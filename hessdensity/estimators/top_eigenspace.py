"""The top of a spectrum: restarted block Lanczos, with the residual of every pair."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import numpy as np

from hessdensity.krylov.restarted import RestartedLanczos
from hessdensity.operators.protocol import Operator, check
from hessdensity.runs.memory import free_memory
from hessdensity.runs.plan import plan_from_sizes
from hessdensity.runs.run import Run, key_data
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.vectors import trees
from hessdensity.vectors.fingerprint import fingerprint
from hessdensity.vectors.trees import Block

from .settings import EigenspaceSettings

logger = logging.getLogger("hessdensity")


def top_eigenspace(
    operator: Operator,
    key: jax.Array,
    rank: int,
    *,
    which: str = EigenspaceSettings.which,
    tolerance: float = EigenspaceSettings.tolerance,
    block_size: int = EigenspaceSettings.block_size,
    basis_size: int | None = None,
    max_matvecs: int | None = None,
    start: Eigenspace | Block | None = None,
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

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`. Symmetric.
      key: JAX random key of the start.
      rank: number of eigenpairs wanted, 1 to n.
      which: ``"LM"`` the largest in magnitude, ``"LA"`` the algebraically largest, ``"SA"`` the
        smallest.
      tolerance: a pair has converged when its residual is at most tolerance x max|lambda|. The
        eigenvalue is then off by far less, about residual^2 over the distance to its neighbors.
      block_size: vectors a pass over the data. Large ones need fewer passes and more products.
      basis_size: vectors that the basis may hold (default 3 rank + 4 block_size, or n up to n =
        1,000); fewer need more products. Each multiple eigenvalue found by a fresh start may add a
        block to it.
      max_matvecs: products after which what is there is returned (default 100 rank, at least
        1,000).
      start: an `Eigenspace` of a similar operator, such as the last checkpoint's, or a block of
        vectors: random combinations of it start the run. One vector of the block remains random,
        for what is new.
      checkpoint: a folder. Every step is saved there, and a later call with the same arguments goes
        on from it, as for `spectral_density`.
      progress: show a bar of products done and pairs converged, on standard error.

    Returns:
      `Eigenspace` of the wanted pairs, values descending algebraically for each ``which``. Pairs
      that have not converged when max_matvecs is reached, or at Ctrl-C (then there may be fewer
      than rank), are marked so.

    Raises:
      TypeError: ``operator`` is none, or ``key`` is no key.
      ValueError: an argument outside its range; the operator turns out not to be symmetric.
      NonFiniteProductError: a product is not finite; its ``partial`` is the eigenspace before, if
        any.

    Cost: on the Hessian of a trained network with 15,910 weights, rank 10, some 50 products in 12
    passes; with block_size=1 some 28, each a pass. Memory: basis_size vectors, at a restart half as
    many again, rank and a few
    blocks: with the defaults 5 rank + 10 block_size + 24 at most.

    Sources: Lanczos (1950); Golub and Underwood (1977) for blocks; Wu and Simon (2000) for the
    thick restart; Stewart (2001) for the form H V = Z T, in which a restart is a rotation.

    Example:
      >>> import hessdensity as hd
      >>> operator = hd.Matrix.from_eigenvalues(np.append(np.linspace(-1, 1, 500), [8, 8, -9]), jax.random.key(0))
      >>> space = top_eigenspace(operator, jax.random.key(1), 3, progress=False)
      >>> space.values.round(3).tolist(), bool(space.converged.all())
      ([8.0, 8.0, -9.0], True)
    """
    n = check(operator, key)
    settings = EigenspaceSettings(rank, which, tolerance, block_size, basis_size, max_matvecs)
    block_size, basis_size, max_matvecs = settings.sizes(n)
    _check_tolerance(operator, tolerance)
    given = start.vectors if isinstance(start, Eigenspace) else start
    free = free_memory(operator.like)

    def table() -> str:
        plan = plan_from_sizes(settings.computation, operator, settings.layouts, free)
        return (
            f"{plan}\n  A smaller basis_size (now {basis_size}; at least rank + 3 block_size), "
            "block_size or rank needs less, as do more devices."
        )

    kept = {
        "rank": rank,
        "which": which,
        "tolerance": tolerance,
        "block_size": block_size,
        "basis_size": basis_size,
        "max_matvecs": max_matvecs,
        "start": None if given is None else fingerprint(given),
        "key": key_data(key),
    }
    options = {"checkpoint": checkpoint, "progress": progress}
    run = Run(settings.computation, operator, kept, table=table, **options)
    engine = RestartedLanczos(operator.like, key, rank, which, tolerance, block_size, basis_size)

    def compute() -> None:
        engine.begin(given)
        steps = run.drive(engine)
        while not engine.complete:
            if run.num_matvecs + block_size > max_matvecs:
                run.stopped = f"max_matvecs={max_matvecs} reached"
                return
            next(steps)
            run.bar.set_postfix_str(f"{engine.num_converged} of {rank} converged")

    def answer() -> Eigenspace:
        return Eigenspace(*engine.pairs(), run.num_matvecs, engine.num_passes, run.describe())

    space = run.execute(compute, answer)
    if not np.all(space.converged) or space.rank < rank:
        reason = run.stopped or "the space is exhausted"
        found = space.converged.sum()
        logger.warning("top_eigenspace: %s; %d of %d pairs have converged.", reason, found, rank)
    return space


def _check_tolerance(operator: Operator, tolerance: float) -> None:
    finest = 32 * trees.epsilon(operator.like)
    if not finest <= tolerance < 1:
        raise ValueError(
            f"tolerance={tolerance!r}, expected from {finest:.2g}, what rounding allows vectors of "
            f"{trees.scalar_dtype(operator.like)}, to 1: a share of max|lambda|."
        )
