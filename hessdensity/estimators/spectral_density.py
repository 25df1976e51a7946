"""The spectral density of an operator, by stochastic Lanczos quadrature with Krylov deflation."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import cast

import jax

from hessdensity.operators.protocol import Operator, check
from hessdensity.runs.plan import MemoryLayout
from hessdensity.runs.run import Driver, Run
from hessdensity.spectra.density import SpectralDensity

from .block_density import BlockDensityRun
from .density_form import DensityForm
from .density_run import DensityRun
from .density_settings import DensitySettings


def spectral_density(
    operator: Operator,
    key: jax.Array,
    *,
    num_steps: int | None = None,
    num_probes: int | None = None,
    deflation_steps: int | None = None,
    tolerance: float | None = None,
    max_matvecs: int | None = None,
    basis: str | None = None,
    probes_at_once: int | None = None,
    block_size: int | None = None,
    keep_eigenspace: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> SpectralDensity:
    """Estimate the distribution of an operator's eigenvalues, by deflated Lanczos quadrature.

    Every probe is a random vector v, uniform on the sphere. num_steps Lanczos steps from it give
    the Gauss rule of its measure, sum over i of (v.q_i)^2 delta(t - lambda_i). The expectation of
    this measure is the density, because E[v v^T] = I/n (Lin, Saad and Yang 2016; Ghorbani, Krishnan
    and Xiao 2019).

    Most of the error is the noise of the few eigenvalues that are far from the others. Deflation
    avoids it: eigenvalues that are known enter with weight 1/n each, without noise, and a probe
    sees the rest of the space. There are two forms.

    - A block (the default). One block of block_size starts goes through the data num_steps times.
      Every start is a probe, and the Krylov space of the others is deflated
      (`hessdensity.spectra.leave_one_out` has the theorem).
    - A deflation run and probes, if num_probes or deflation_steps is given. A first run of
      deflation_steps keeps its basis, which the probes after it avoid
      (`hessdensity.spectra.deflation` has the theorem).

    Both make 180 products by default, the block in 36 passes over the data and the other form in
    135. On six spectra (``benchmarks/deflation.py``) and a trained network
    (``benchmarks/deflated_reference.py``) the block is as accurate or more, and most of all for the
    trace. Take the other form for a spectrum without outliers that needs a high resolution
    (``deflation_steps=0``), for many probes, or where the data go through the model with one vector
    at a time.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`.
      key: JAX random key. Probe i uses ``fold_in(key, i)``, whatever the number of devices and of
        other probes.
      num_steps: Lanczos steps m of each probe, 36 by default in a block and 45 otherwise. They
        determine the resolution: m nodes, exact for moments up to 2m - 1 without deflation. Clipped
        to the number of dimensions that deflation leaves.
      num_probes: probes k behind a deflation run, 2 by default. They determine the precision: error
        bars shrink as 1/sqrt(k n).
      deflation_steps: Lanczos steps m0 of the deflation run, 90 by default, clipped to n, or 0 for
        no deflation. The run counts as one more probe.
      tolerance: largest acceptable error, which is the estimated W1 distance to the true spectrum,
        divided by the range of the nodes (`hessdensity.spectra.accuracy`). The run starts with
        num_steps and num_probes, and adds steps or probes, whichever reduce the larger error, until
        the tolerance is met. ``description`` records the error that was reached ("error") and how
        the products were spent ("spent": the steps of the deflation, and a pair (probes, steps) for
        each group of probes). All bases are kept while others are added, which takes more memory
        than planned.
      max_matvecs: number of products at which a run with a tolerance stops and reports it. The
        default is ten times the number without a tolerance.
      basis: where the Lanczos bases are kept. ``"device"``: on the devices, sharded as the
        parameters are. ``"host"``: in the memory of the host. Every step moves each chunk of 8
        vectors to the devices. The result is identical bit for bit. ``"none"``: nowhere. Only three
        vectors of each probe are kept, and there is neither a block nor a deflation run: two probes
        share the products, and the eigenvalues that both find get weight 1/n (implicit deflation).
        But without reorthogonalization, every eigenvalue is found again and again, in steps that
        find nothing else (`hessdensity.spectra.ghosts.merge_ghosts`). With a single probe,
        nothing shows that an eigenvalue is simple, so that none gets weight 1/n. By default the
        first of these that fits (`hessdensity.plan` prints the table).
      probes_at_once: number of probes behind a deflation run that go through the data together.
        Fewer than num_probes need less memory and more passes. By default as many as fit.
      block_size: number b of starts of the block, 5 by default.
      keep_eigenspace: return the Ritz vectors of the block or of the deflation run as
        ``density.eigenspace``, in which the converged pairs are marked. This costs no products, but
        the memory of these vectors for as long as the density exists.
      checkpoint: a folder in which every step is saved. Its vectors and scalars take the space of
        the basis once. Calling again with the same arguments resumes the run, even in the middle of
        a probe and on another number of devices. This works after Ctrl-C, after SIGTERM (see
        `RunTerminated`) and after a crash. The result is identical to that of an
        uninterrupted run, bit for bit if the operator's products are. Another number of devices
        changes it by rounding. With several processes, all of them must see the folder. Their
        number may change, but together they must have the same batches as before. With a complete
        checkpoint, a call costs one product, which checks that the data are still the same.
      progress: show a bar on standard error, with the products done, their rate and the time left.

    Returns:
      `SpectralDensity`. After Ctrl-C it is the density from the steps done so far, and
      ``description["stopped"]`` says so.

    Raises:
      TypeError: ``operator`` lacks ``like`` or ``@``, or ``key`` is not a JAX random key.
      ValueError: an argument is out of range, such as a number of steps that is not a whole number.
        Or the operator turns out not to be symmetric. Or ``checkpoint`` is not a checkpoint, or it
        belongs to other params, data, key or settings. The message names the difference.
      RuntimeError: the data are shuffled and a checkpoint is given, or another process has died.
      MemoryError: no way to keep the bases fits, or the memory is exhausted. The message shows
        the plan.
      NonFiniteProductError: a product is not finite. ``partial`` is the density from the steps
        before, if there are any.

    Cost: b m products in m passes over the data for a block. For a deflation run and probes,
    m0 + k m products, in m0 + m passes if all probes share the passes. Memory: b (m + 5) vectors
    for a block, m0 + k (m + 4) for the other form, or 5 k with basis="none".

    Every error bar of the result holds three errors: of the probes, of quadrature, and of the
    coupling that deflation leaves out. See `SpectralDensity`.

    Sources: Lin, Saad and Yang (2016); Ghorbani, Krishnan and Xiao (2019). Bhattacharjee, Jayaram,
    Musco, Musco and Ray (2024) deflate densities too. Chen and Hallman (2023) and Hallman (2025)
    deflate traces inside Krylov spaces.

    Example:
      >>> import jax, numpy as np, hessdensity as hd
      >>> operator = hd.Matrix.from_eigenvalues(np.linspace(0, 1, 1000), jax.random.key(0))
      >>> density = spectral_density(operator, jax.random.key(1), num_steps=30, progress=False)
      >>> bool(abs(density.trace().value - 500) < 4 * density.trace().standard_error)
      True
    """
    check(operator, key)
    settings = DensitySettings(
        cast(int, num_steps),
        cast(int, num_probes),
        cast(int, deflation_steps),
        tolerance,
        max_matvecs,
        basis,
        probes_at_once,
        block_size,
    )
    _check_kept(settings, keep_eigenspace)
    run = Run(operator, settings, key=key, checkpoint=checkpoint, progress=progress)
    layout = density_layout(run, settings, keep_eigenspace)
    run.total = layout.num_matvecs
    density = density_form(run, key, settings, layout)
    return run.execute(density.compute, functools.partial(density.answer, keep_eigenspace))


def density_form(
    run: Driver, key: jax.Array, settings: DensitySettings, layout: MemoryLayout
) -> DensityForm:
    """The computation of a density by these settings, with its bases kept as the layout says."""
    if settings.block_size is None:
        return DensityRun(run, key, settings, layout)
    if layout.basis == "none":
        return DensityRun(run, key, settings.without_basis(), layout)
    return BlockDensityRun(run, key, settings, layout)


def density_layout(run: Run, settings: DensitySettings, keep_eigenspace: bool) -> MemoryLayout:
    """The first layout of the bases that fits, and with which a resumed run can continue."""
    before = run.steps.decisions

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
                    f"{before['probes_at_once']} probes at once, and can only continue in this "
                    "way. Leave basis, probes_at_once and keep_eigenspace as they were, or give "
                    "another folder."
                )
        return found

    layout = run.choose(allowed)
    run.steps.decisions = {
        "keeps_basis": layout.basis != "none",
        "probes_at_once": layout.probes_at_once,
    }
    return layout


def _check_kept(settings: DensitySettings, keep_eigenspace: bool) -> None:
    if keep_eigenspace and settings.deflation_steps == 0:
        raise ValueError(
            "keep_eigenspace=True needs deflation, but deflation_steps=0. Give deflation_steps of "
            "at least 1, or keep_eigenspace=False."
        )
    if keep_eigenspace and settings.basis == "none":
        raise ValueError(
            "keep_eigenspace=True needs a basis: give basis='device' or 'host', not 'none'."
        )
