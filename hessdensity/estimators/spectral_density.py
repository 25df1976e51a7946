"""Stochastic Lanczos quadrature with Krylov deflation: the one call of the main job."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hessdensity.krylov import lanczos
from hessdensity.operators.protocol import Operator, check
from hessdensity.runs import plan as planning
from hessdensity.runs.failures import explained
from hessdensity.runs.memory import free_memory
from hessdensity.runs.steps import Steps
from hessdensity.spectra.density import SpectralDensity

from .density_run import DensityRun


def spectral_density(
    operator: Operator,
    key: jax.Array,
    *,
    num_steps: int = 45,
    num_probes: int = 2,
    deflation_steps: int = 90,
    tolerance: float | None = None,
    max_matvecs: int | None = None,
    basis: str | None = None,
    probes_at_once: int | None = None,
    keep_eigenspace: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> SpectralDensity:
    """Estimate the distribution of an operator's eigenvalues, by Lanczos quadrature with Krylov
    deflation.

    Every probe is a random vector v uniform on the sphere. num_steps of Lanczos from it give the
    Gauss rule of its measure, sum over i of (v.q_i)^2 delta(t - lambda_i), whose expectation is the
    density: E[v vT] = I/n (Lin, Saad and Yang 2016; Ghorbani, Krishnan and Xiao 2019). Most of its
    error is the noise of the few eigenvalues far from the others. So a first run of deflation_steps
    keeps its basis, its Ritz values enter at weight 1/n each, without noise, and the probes see the
    rest of the space (`hessdensity.deflation` has the theorem). All probes go through one pass over
    the data together.

    Args: operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`. key: JAX random
      key; probe i uses ``fold_in(key, i)``, on any number of devices and beside any other probes.
      num_steps: Lanczos steps m of a probe, resolution: m nodes, exact for moments up to 2m - 1.
      Clipped to what
        deflation leaves of n.
      num_probes: probes k, precision: error bars shrink as 1/sqrt(k n). deflation_steps: Lanczos
      steps m0 of the deflation, clipped to n; 0 for none. Its run counts as one more probe.
      tolerance: go on, with more steps or more probes where the error is, until the estimated W1
      distance to the true
        spectrum, over the range of the nodes, is below it (`hessdensity.accuracy`); num_steps and
        num_probes are where that begins. ``description`` says what was reached ("error") and what
        was spent where ("spent": the steps of the deflation, and a pair (probes, steps) for each
        group of probes). The bases of what is there stay, and those of what is added come to them:
        more memory than planned.
      max_matvecs: products at which a run for a tolerance gives up, and says so; by default ten
        times what it would cost without a tolerance.
      basis: where the Lanczos bases are kept. ``"device"``: on the devices, sharded as the
        parameters are. ``"host"``: in the host's memory, each chunk of 8 vectors moved to the
        devices in every step; the result is the same bit for bit. ``"none"``: nowhere; of each
        probe three vectors remain. There is then no deflation run: the probes share its steps, and
        eigenvalues that they find go to weight 1/n (implicit deflation); but without
        reorthogonalisation each is found again and again, in steps that find nothing else
        (`deflation.merge_ghosts`). By default the first that fits (`planning.plan` has the table).
      probes_at_once: probes that go through the data together. Fewer than num_probes need less
        memory and more passes. By default as many as fit.
      keep_eigenspace: hand out the deflated Ritz vectors as ``density.eigenspace``, those that
        converged marked. They cost no product, and the memory of m0 vectors for as long as the
        density lives.
      checkpoint: a folder. Every step is saved there (its vectors and scalars: in all the basis
        once), and a later call with the same arguments goes on from it, in the middle of a probe,
        on any number of devices: after Ctrl-C, after SIGTERM, which ends the process within
        seconds, or after a crash. The result is that of an undisturbed run, bit for bit where the
        operator's products are; another number of devices changes it by rounding. In several
        processes all of them must see the folder, and together have the same batches as before,
        however many they are. A complete checkpoint costs one product, to see that the data are
        still the same.
      progress: show a bar of products done, their rate and the time left, on standard error.

    Returns: `SpectralDensity`. After Ctrl-C the one that the steps done so far give:
      ``description["stopped"]`` says so.

    Raises: TypeError: ``operator`` is none, or ``key`` is no key. ValueError: a number of steps or
      probes that is none; the operator turns out not to be symmetric.
        The checkpoint is none, or of other params, data, key or settings; names what differs.
      RuntimeError: data that are shuffled, with a checkpoint; another process died. MemoryError:
      out of memory; shows what would fit. lanczos.NonFiniteProduct: a product is not finite; its
      ``partial`` is the density from the steps before, if any.

    The defaults, 180 products, come from the benchmark deflation.

    Cost: m0 + k m products, in m0 + m passes over the data, if all probes go through them together.
    Memory: m0 + k (m + 4) vectors, with basis="none" 4 k.

    Example:
      >>> import hessdensity as hd
      >>> operator = hd.Matrix.from_eigenvalues(np.linspace(0, 1, 1000), jax.random.key(0))
      >>> density = spectral_density(operator, jax.random.key(1), num_steps=30, progress=False)
      >>> bool(abs(density.trace().value - 500) < 4 * density.trace().standard_error)
      True
    """
    check(operator, key)
    planning.check_settings(num_steps, num_probes, deflation_steps)
    _check_effort(tolerance, max_matvecs)
    _check_memory(basis, probes_at_once, keep_eigenspace, deflation_steps)
    settings = {
        "computation": "spectral_density",
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "num_steps": num_steps,
        "num_probes": num_probes,
        "deflation_steps": deflation_steps,
        "tolerance": tolerance,
        "max_matvecs": max_matvecs,
    }
    steps, free = Steps(checkpoint, operator, settings), free_memory(operator.like)
    bases: tuple[str, ...] = lanczos.TIERS if basis is None else (basis,)
    at_once = None if probes_at_once is None else min(probes_at_once, num_probes)
    if keep_eigenspace:
        bases = tuple(each for each in bases if each != "none")
    if steps.decisions:
        bases, at_once = _as_before(steps.decisions, bases, at_once)
    layout = planning.choose(operator, num_steps, num_probes, deflation_steps, bases, at_once, free)
    steps.decisions = {
        "keeps_basis": layout.basis != "none",
        "probes_at_once": layout.probes_at_once,
    }
    run = DensityRun(operator, key, num_steps, num_probes, deflation_steps, layout, steps, progress)

    def table() -> str:
        return str(planning.lay_out(operator, num_steps, num_probes, deflation_steps, free))

    with contextlib.closing(run), steps.kept(), explained(table, checkpoint):
        try:
            run.deflate()
            run.add_probes(num_probes)
            if tolerance is not None:
                run.refine(tolerance, max_matvecs)
            steps.check_data()
        except (KeyboardInterrupt, lanczos.NonFiniteProduct) as error:
            if isinstance(error, lanczos.NonFiniteProduct):
                error.partial = run.answer() if run.num_matvecs else None
                raise
            if not run.num_matvecs:
                raise
            run.stop(f"interrupted after {run.num_matvecs} products")
    return run.answer(keep_eigenspace)


def _as_before(
    decisions: dict[str, Any], bases: tuple[str, ...], at_once: int | None
) -> tuple[tuple[str, ...], int]:
    """The bases and the probes at once that a checkpoint's run can go on with, of those asked for."""
    kept = tuple(each for each in bases if (each != "none") == decisions["keeps_basis"])
    if not kept or at_once not in (None, decisions["probes_at_once"]):
        raise ValueError(
            "checkpoint: its run "
            f"{'kept a basis' if decisions['keeps_basis'] else 'kept no basis'}, with "
            f"{decisions['probes_at_once']} probes at once, and cannot go on otherwise. Leave "
            "basis, probes_at_once and keep_eigenspace as they were, or give another folder."
        )
    return kept, decisions["probes_at_once"]


def _check_effort(tolerance: float | None, max_matvecs: int | None) -> None:
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(
            f"tolerance={tolerance}, expected a W1 distance over the spectrum's range, such as "
            "1e-4."
        )
    if max_matvecs is not None and tolerance is None:
        raise ValueError(
            "max_matvecs is given without tolerance=; the settings fix the number of products then."
        )
    if max_matvecs is not None and (
        not isinstance(max_matvecs, int | np.integer) or max_matvecs < 1
    ):
        raise ValueError(f"max_matvecs={max_matvecs!r}, expected a whole number of at least 1.")


def _check_memory(
    basis: str | None, probes_at_once: int | None, keep_eigenspace: bool, deflation_steps: int
) -> None:
    if basis not in (None, *lanczos.TIERS):
        raise ValueError(
            f"basis={basis!r}, expected 'device', 'host', 'none', or None for what fits."
        )
    if probes_at_once is not None and (
        not isinstance(probes_at_once, int | np.integer) or probes_at_once < 1
    ):
        raise ValueError(
            f"probes_at_once={probes_at_once!r}, expected a whole number of at least 1, or None."
        )
    if keep_eigenspace and not deflation_steps:
        raise ValueError(
            "keep_eigenspace=True needs deflation: deflation_steps=0 finds no eigenspace."
        )
    if keep_eigenspace and basis == "none":
        raise ValueError(
            "keep_eigenspace=True needs a basis: give basis='device' or 'host', not 'none'."
        )
