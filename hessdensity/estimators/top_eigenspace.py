"""The top of a spectrum, by restarted block Lanczos, with the residual of every pair."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from hessdensity.krylov.restarted import RestartedLanczos
from hessdensity.operators.protocol import Operator, check
from hessdensity.runs.plan import MemoryLayout
from hessdensity.runs.run import Driver, Run
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
    """Compute eigenpairs at an end of the spectrum, by block Lanczos with thick restarts.

    A block of vectors goes through the data together, and its products extend an orthonormal basis.
    The result is the eigenpairs of the operator's compression to this basis, once their residuals
    ||H q - lambda q|| are small. These are true residuals of the computed products, and they cost
    no further products. A full basis is cut down to the best pairs.

    Every pair is judged by its own size, and not by the norm of the operator. So the small
    eigenvalues at one end of a spectrum are found beside large ones at the other end, as the
    smallest eigenvalues of a network (``which="SA"``).

    Eigenvalues of multiplicity up to ``block_size - 1`` are found with all of their copies. If as
    many copies are found as the block has vectors (with block_size=1 this is always so), there may
    be more copies, which cannot be seen from the first block. The run then follows a fresh random
    block, orthogonal to everything that was found, for a few steps. It continues if a new
    eigenvalue enters there. This search is cheap (two or three steps where no eigenvalue is near),
    but it may miss a copy of an eigenvalue that is hardly larger than the smallest one wanted. With
    block_size=1, on the spectrum of a trained network, a second copy was found in 80 of 80 runs if
    the eigenvalue was at least 1.6 times as large, and in 12 of 20 at 1.3 times.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`. It must be
        symmetric.
      key: JAX random key, for the start of the run.
      rank: number of eigenpairs to find, 1 to n.
      which: ``"LM"`` for the largest in magnitude, ``"LA"`` for the algebraically largest, ``"SA"``
        for the algebraically smallest.
      tolerance: a pair has converged when its residual is at most tolerance x |lambda|, with its
        own eigenvalue lambda, and the last pass has moved lambda by at most as much. The error of
        the eigenvalue is then far smaller, about residual^2 divided by the distance to its
        neighbors. No residual can be smaller than the rounding error of the products, epsilon x
        max|lambda|. A residual at this limit suffices if it is smaller than |lambda| and lambda
        has been at rest for three passes. A pair whose residual exceeds |lambda| has never
        converged, except that a value and a residual that are both at this limit count as a zero.
      block_size: number of vectors in a pass over the data. Larger blocks need fewer passes and
        more products.
      basis_size: largest number of vectors in the basis. A smaller basis needs more products,
        above all for eigenvalues that are far smaller than those at the other end. The default is
        n if n is at most 1,000. Otherwise it is 256, 128 or 3 rank + 4 block_size, the first of
        them that fits into memory. A run with few products fills only a part of it. Each multiple
        eigenvalue that a fresh block finds may add a block to the basis.
      max_matvecs: number of products after which the run returns the pairs as they are then. The
        default is 100 rank, but at least 1,000.
      start: an `Eigenspace` of a similar operator, such as that of the last training checkpoint, or
        a block of vectors. Random combinations of it start the run. One vector of the block remains
        random, to find new eigenvectors.
      checkpoint: a folder in which every step is saved. Calling again with the same arguments
        resumes the run, as for `spectral_density`.
      progress: show a bar of products done and pairs converged, on standard error.

    Returns:
      `Eigenspace` of the wanted pairs, with algebraically descending values for each ``which``. Its
      ``converged`` marks the pairs that have converged. Some may not have if max_matvecs is
      reached, at Ctrl-C, or if the open residuals have come down to the noise of the products.
      Products in bfloat16 have a noise of about 3e-4 of the norm, which no further product reduces.
      ``description["stopped"]`` then says so. After Ctrl-C there may also be fewer than rank pairs.
      ``description["rounding"]`` is the rounding error of residuals, epsilon x max|lambda|.

    Raises:
      TypeError: ``operator`` lacks ``like`` or ``@``, or ``key`` is not a JAX random key.
      ValueError: an argument is out of range, or the operator turns out not to be symmetric.
      NonFiniteProductError: a product is not finite. ``partial`` is the eigenspace from the steps
        before, if there are any.

    Cost: on the Hessian of a trained network with 15,910 weights, for the 10 largest eigenvalues
    about 52 products in 13 passes, and for the 5 smallest, which are 200 times smaller, about 132
    in 33. With block_size=1, about 30 and 75 products, each of which is a pass.

    Memory: the basis, half as many vectors again at a restart, rank vectors and a few blocks. The
    basis holds as many vectors as there are products, up to basis_size. `hd.plan` shows the bytes.

    Sources: Lanczos (1950); Golub and Underwood (1977) for blocks; Wu and Simon (2000) for the
    thick restart; Stewart (2001) for the form H V = Z T, in which a restart is a rotation; Lehoucq,
    Sorensen and Yang (1998) for residuals relative to each value, as in ARPACK.

    Example:
      >>> import jax, numpy as np, hessdensity as hd
      >>> eigenvalues = np.append(np.linspace(-1, 1, 500), [8, 8, -9])
      >>> operator = hd.Matrix.from_eigenvalues(eigenvalues, jax.random.key(0))
      >>> space = top_eigenspace(operator, jax.random.key(1), 3, progress=False)
      >>> space.values.round(3).tolist(), bool(space.converged.all())
      ([8.0, 8.0, -9.0], True)
    """
    n = check(operator, key)
    given = EigenspaceSettings(rank, which, tolerance, block_size, basis_size, max_matvecs)
    settings = given.resolved(n)
    check_tolerance(operator, tolerance)
    vectors = start.vectors if isinstance(start, Eigenspace) else start
    others = {"start": None if vectors is None else fingerprint(vectors)}
    run = Run(operator, settings, key=key, others=others, checkpoint=checkpoint, progress=progress)
    size = basis_size_of(run, settings)
    engine = RestartedLanczos(operator.like, key, rank, which, tolerance, settings.block_size, size)
    most = settings.max_matvecs or n

    def compute() -> Iterator[None]:
        engine.begin(vectors)
        for _ in find_pairs(run, engine, most):
            run.bar.set_postfix_str(f"{engine.num_converged} of {rank} converged")
            yield

    def answer() -> Eigenspace:
        return Eigenspace(
            *engine.pairs(),
            run.num_matvecs,
            engine.num_passes,
            run.describe(basis_size=size, rounding=engine.floor),
        )

    space = run.execute(compute, answer)
    warn_of_open_pairs("top_eigenspace", space, rank, tolerance, run.stopped)
    return space


def find_pairs(run: Driver, engine: RestartedLanczos, max_matvecs: int) -> Iterator[None]:
    """Drive an engine that has begun until it is complete, or stop it, and say why."""
    steps = run.drive(engine)
    while not engine.complete:
        if run.num_matvecs + engine.block_size > max_matvecs:
            run.stopped = f"max_matvecs={max_matvecs} reached"
            return
        next(steps)
        if engine.complete and engine.noise is not None:
            run.stopped = f"the products' noise of {engine.noise:.1g} of the norm is reached"
        yield


def warn_of_open_pairs(
    name: str, space: Eigenspace, rank: int, tolerance: float, stopped: str | None
) -> None:
    """Log which pairs have not converged, or only to rounding. An interruption is logged before."""
    if (stopped or "").startswith("interrupted"):
        return
    found = space.converged.sum()
    if found < rank:
        reason = stopped or "the space is exhausted"
        logger.warning("%s: %s; %d of %d pairs have converged.", name, reason, found, rank)
    limited = space.converged & (space.residuals > tolerance * np.abs(space.values))
    if limited.any():
        logger.warning(
            "%s: %d of %d pairs have converged only to the rounding error of %s, "
            "because residuals below %.2g cannot be computed for this operator.",
            name,
            limited.sum(),
            rank,
            trees.scalar_dtype(trees.one_of(space.vectors)),
            space.description["rounding"],
        )


def basis_size_of(run: Run, settings: EigenspaceSettings) -> int:
    """The largest size of the basis that fits into memory, or that of the run that is resumed."""
    sizes = settings.basis_sizes(run.dimension)
    found: list[MemoryLayout] = []

    def layouts(n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        found[:] = settings.layouts(n, vector_bytes, activations)
        return found

    if "basis_size" not in run.steps.decisions:
        chosen = run.choose(layouts)
        run.steps.decisions = {"basis_size": sizes[found.index(chosen)]}
    return int(run.steps.decisions["basis_size"])


def check_tolerance(operator: Operator, tolerance: float) -> None:
    """Raise ValueError if residuals cannot be as small as this, or if it is not a share."""
    finest = 32 * trees.epsilon(operator.like)
    if not finest <= tolerance < 1:
        raise ValueError(
            f"tolerance={tolerance!r}, expected a share of |lambda| below 1 and at least "
            f"{finest:.2g}, the limit that rounding sets for vectors of "
            f"{trees.scalar_dtype(operator.like)}."
        )
