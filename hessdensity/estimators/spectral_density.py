"""Stochastic Lanczos quadrature with Krylov deflation: the one call of the main job."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax

from hessdensity.operators.protocol import Operator, check
from hessdensity.runs.memory import Free, free_memory
from hessdensity.runs.plan import MemoryLayout, first_that_fits, plan_from_sizes
from hessdensity.runs.run import Run, key_data
from hessdensity.runs.steps import SavedSteps
from hessdensity.spectra.density import SpectralDensity

from .density_run import DensityRun
from .settings import DensitySettings


def spectral_density(
    operator: Operator,
    key: jax.Array,
    *,
    num_steps: int = DensitySettings.num_steps,
    num_probes: int = DensitySettings.num_probes,
    deflation_steps: int = DensitySettings.deflation_steps,
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

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`.
      key: JAX random key; probe i uses ``fold_in(key, i)``, on any number of devices and beside any
        other probes.
      num_steps: Lanczos steps m of a probe, resolution: m nodes, exact for moments up to 2m - 1.
        Clipped to what deflation leaves of n.
      num_probes: probes k, precision: error bars shrink as 1/sqrt(k n).
      deflation_steps: Lanczos steps m0 of the deflation, clipped to n; 0 for none. Its run counts
        as one more probe.
      tolerance: go on, with more steps or more probes where the error is, until the estimated W1
        distance to the true spectrum, over the range of the nodes, is below it
        (`hessdensity.accuracy`); num_steps and num_probes are where that begins. ``description``
        says what was reached ("error") and what was spent where ("spent": the steps of the
        deflation, and a pair (probes, steps) for each group of probes). The bases of what is there
        stay, and those of what is added come to them: more memory than planned.
      max_matvecs: products at which a run for a tolerance gives up, and says so; by default ten
        times what it would cost without a tolerance.
      basis: where the Lanczos bases are kept. ``"device"``: on the devices, sharded as the
        parameters are. ``"host"``: in the host's memory, each chunk of 8 vectors moved to the
        devices in every step; the result is the same bit for bit. ``"none"``: nowhere; of each
        probe three vectors remain. There is then no deflation run: the probes share its steps, and
        eigenvalues that they find go to weight 1/n (implicit deflation); but without
        reorthogonalization each is found again and again, in steps that find nothing else
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

    Returns:
      `SpectralDensity`. After Ctrl-C the one that the steps done so far give:
      ``description["stopped"]`` says so.

    Raises:
      TypeError: ``operator`` is none, or ``key`` is no key.
      ValueError: a number of steps or probes that is none; the operator turns out not to be
        symmetric. The checkpoint is none, or of other params, data, key or settings; names what
        differs.
      RuntimeError: data that are shuffled, with a checkpoint; another process died.
      MemoryError: out of memory; shows what would fit.
      NonFiniteProductError: a product is not finite; its ``partial`` is the density from the steps
        before, if any.

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
    settings = DensitySettings(
        num_steps,
        num_probes,
        deflation_steps,
        tolerance,
        max_matvecs,
        basis,
        probes_at_once,
    )
    _check_kept(settings, keep_eigenspace)
    free = free_memory(operator.like)

    def table() -> str:
        every = dataclasses.replace(settings, basis=None, probes_at_once=None)
        return str(plan_from_sizes(every.computation, operator, every.layouts, free))

    # Where the bases are kept changes no step, and may differ when the run is resumed.
    kept = {**dataclasses.asdict(settings), "key": key_data(key)}
    del kept["basis"], kept["probes_at_once"]
    name, options = settings.computation, {"checkpoint": checkpoint, "progress": progress}
    run = Run(name, operator, kept, table=table, **options)
    layout = _layout(run.steps, operator, settings, keep_eigenspace, free)
    run.bar.total = layout.num_matvecs
    density = DensityRun(run, key, settings, layout)

    def compute() -> None:
        density.deflate()
        density.add_probes(num_probes)
        if tolerance is not None:
            density.refine(tolerance, max_matvecs)

    return run.execute(compute, functools.partial(density.answer, keep_eigenspace))


def _layout(
    steps: SavedSteps,
    operator: Operator,
    settings: DensitySettings,
    keep_eigenspace: bool,
    free: Free,
) -> MemoryLayout:
    """Where the bases are kept: where they fit, and where the run that is resumed can continue."""
    before = steps.decisions

    def allowed(n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        found = settings.layouts(n, vector_bytes, activations)
        if keep_eigenspace:
            found = [each for each in found if each.basis != "none"]
        if before:
            found = [
                each
                for each in found
                if (each.basis != "none") == before["keeps_basis"]
                and each.probes_at_once == before["probes_at_once"]
            ]
            if not found:
                raise ValueError(
                    "checkpoint: its run kept "
                    f"{'a basis' if before['keeps_basis'] else 'no basis'}, with "
                    f"{before['probes_at_once']} probes at once, and cannot continue otherwise. "
                    "Leave basis, probes_at_once and keep_eigenspace as they were, or give another "
                    "folder."
                )
        return found

    layout = first_that_fits(operator, allowed, settings.num_vectors, free)
    steps.decisions = {
        "keeps_basis": layout.basis != "none",
        "probes_at_once": layout.probes_at_once,
    }
    return layout


def _check_kept(settings: DensitySettings, keep_eigenspace: bool) -> None:
    if keep_eigenspace and not settings.deflation_steps:
        raise ValueError(
            "keep_eigenspace=True needs deflation: deflation_steps=0 finds no eigenspace."
        )
    if keep_eigenspace and settings.basis == "none":
        raise ValueError(
            "keep_eigenspace=True needs a basis: give basis='device' or 'host', not 'none'."
        )
