"""The spectra of all layers in one run: a density or an eigenspace for each group of leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, cast

import jax

from hessdensity.estimators.density_settings import DensitySettings
from hessdensity.estimators.settings import EigenspaceSettings
from hessdensity.estimators.spectral_density import density_form, density_layout
from hessdensity.estimators.top_eigenspace import (
    basis_size_of,
    check_tolerance,
    find_pairs,
    warn_of_open_pairs,
)
from hessdensity.krylov.restarted import RestartedLanczos
from hessdensity.operators.hessian import Hessian
from hessdensity.operators.protocol import check
from hessdensity.runs.run import Run
from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.vectors import trees

from .blocks import BlockDiagonal
from .partition import Groups
from .side_by_side import Lane, Needed, run_side_by_side


class LayerDensitySettings(DensitySettings):
    """The settings of `layer_densities`."""

    computation: ClassVar[str] = "layer_densities"


class LayerEigenspaceSettings(EigenspaceSettings):
    """The settings of `layer_eigenspaces`."""

    computation: ClassVar[str] = "layer_eigenspaces"


def layer_densities(
    hessian: Hessian | BlockDiagonal,
    key: jax.Array,
    groups: Groups = None,
    *,
    num_steps: int | None = None,
    num_probes: int | None = None,
    deflation_steps: int | None = None,
    tolerance: float | None = None,
    max_matvecs: int | None = None,
    basis: str | None = None,
    block_size: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> dict[str, SpectralDensity]:
    """Estimate the spectral density of each layer's block of the Hessian, all in one run.

    All blocks go through the data together (`BlockDiagonal`). Each result equals, bit for bit, that
    of ``spectral_density(layer_hessian(hessian, group), key, ...)`` alone if the products do.

    Args:
      hessian: a `Hessian`, or its `BlockDiagonal`.
      key: JAX random key. Each group uses it as it would alone.
      groups: as for `BlockDiagonal`; by default one group for each leaf. Leave it out if
        ``hessian`` is a `BlockDiagonal`.
      num_steps: Lanczos steps for each group, as for `spectral_density`, and so are all settings
        below. A group of few dimensions needs fewer.
      num_probes: probes behind a deflation run, for each group.
      deflation_steps: steps of each group's deflation run.
      tolerance: the largest acceptable error of each group.
      max_matvecs: number of products at which a group with a tolerance stops.
      basis: where the bases are kept.
      block_size: number of starts of each group's block.
      checkpoint: a folder in which every step of all groups is saved, as for `spectral_density`.
      progress: show a bar of passes over the data.

    Returns:
      A `SpectralDensity` for each group, by name. After Ctrl-C each is that of the steps so far.

    Raises:
      TypeError, ValueError, MemoryError, RuntimeError: as for `spectral_density` and
        `BlockDiagonal`.

    Cost: as many passes as one `spectral_density` with the same settings, each of which costs about
    1 + L/3 gradients for each vector and L layers. The bases of all groups together take the memory
    of one basis of the whole space.

    Example:
      >>> import jax, jax.numpy as jnp, hessdensity as hd
      >>> loss = lambda p, x: jnp.mean((x @ p["a"] * p["b"]) ** 2)
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(())}
      >>> hessian = hd.Hessian(loss, params, [jnp.eye(2)])
      >>> found = hd.layer_densities(hessian, jax.random.key(0), progress=False)
      >>> {name: round(density.trace().value, 4) for name, density in found.items()}
      {'a': 2.0, 'b': 2.0}
    """
    blocks, operator = _operators(hessian, groups)
    check(blocks, key)
    settings = LayerDensitySettings(
        cast(int, num_steps),
        cast(int, num_probes),
        cast(int, deflation_steps),
        tolerance,
        max_matvecs,
        basis,
        None,
        block_size,
    )
    run = Run(operator, settings, key=key, checkpoint=checkpoint, progress=progress)
    layout = density_layout(run, settings, False)
    run.total = layout.num_matvecs

    def make(lane: Lane) -> tuple[Callable[[], Iterator[None]], Callable[[], SpectralDensity]]:
        choices = settings.layouts(lane.dimension, 1, 0)
        own = next(each for each in choices if each.basis == layout.basis)
        form = density_form(lane, key, settings, own)
        return form.compute, form.answer

    return run_side_by_side(run, operator, blocks, make)


def layer_eigenspaces(
    hessian: Hessian | BlockDiagonal,
    key: jax.Array,
    rank: int,
    groups: Groups = None,
    *,
    which: str = EigenspaceSettings.which,
    tolerance: float = EigenspaceSettings.tolerance,
    block_size: int = EigenspaceSettings.block_size,
    basis_size: int | None = None,
    max_matvecs: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Eigenspace]:
    """Compute eigenpairs of each layer's block of the Hessian, all in one run.

    All blocks go through the data together (`BlockDiagonal`). Each result equals, bit for bit, that
    of ``top_eigenspace(layer_hessian(hessian, group), key, rank, ...)`` alone if the products do.

    Args:
      hessian: a `Hessian`, or its `BlockDiagonal`.
      key: JAX random key. Each group uses it as it would alone.
      rank: number of eigenpairs of each group. A group of fewer dimensions has all of its pairs.
      groups: as for `BlockDiagonal`; by default one group for each leaf. Leave it out if
        ``hessian`` is a `BlockDiagonal`.
      which: which eigenpairs, as for `top_eigenspace`, and so are all settings below.
      tolerance: residual at which a pair has converged, as a share of its eigenvalue.
      block_size: number of vectors of each group in a pass over the data.
      basis_size: largest number of vectors in the basis of each group.
      max_matvecs: number of products of a group after which its pairs are returned as they are.
      checkpoint: a folder in which every step of all groups is saved.
      progress: show a bar of passes over the data.

    Returns:
      An `Eigenspace` for each group, by name. Its vectors have None in place of the other leaves.

    Raises:
      TypeError, ValueError, MemoryError, RuntimeError: as for `top_eigenspace` and `BlockDiagonal`.

    Cost: as many passes as the group that needs most of them.
    """
    blocks, operator = _operators(hessian, groups)
    check_tolerance(blocks, tolerance)
    given = LayerEigenspaceSettings(rank, which, tolerance, block_size, basis_size, max_matvecs)
    settings = given.resolved(check(blocks, key))
    run = Run(operator, settings, key=key, checkpoint=checkpoint, progress=progress)
    size = basis_size_of(run, settings)

    def make(lane: Lane) -> tuple[Callable[[], Iterator[None]], Callable[[], Eigenspace]]:
        own = replace(given, rank=min(rank, lane.dimension)).resolved(lane.dimension)
        most = min(size, lane.dimension) if basis_size is None else size
        engine = RestartedLanczos(
            lane.operator.like, key, own.rank, which, tolerance, own.block_size, most
        )

        def compute() -> Iterator[None]:
            engine.begin(None)
            yield from find_pairs(lane, engine, own.max_matvecs or lane.dimension)

        def answer() -> Eigenspace:
            described = lane.describe(basis_size=most, rounding=engine.floor)
            return Eigenspace(*engine.pairs(), lane.num_matvecs, engine.num_passes, described)

        return compute, answer

    spaces = run_side_by_side(run, operator, blocks, make)
    for name, space in spaces.items():
        wanted = min(rank, trees.size(blocks.groups[name].take(blocks.like)))
        stopped = space.description["stopped"]
        label = f"layer_eigenspaces of {name!r}"
        warn_of_open_pairs(label, space, wanted, tolerance, stopped)
    return spaces


def _operators(hessian: Hessian | BlockDiagonal, groups: Groups) -> tuple[BlockDiagonal, Needed]:
    if isinstance(hessian, BlockDiagonal):
        if groups is not None:
            raise ValueError(
                "groups is given, but hessian is an hd.BlockDiagonal, which has its own groups. "
                "Give groups to one of them."
            )
        blocks = hessian
    else:
        blocks = BlockDiagonal(hessian, groups)
    return blocks, Needed(blocks)
