"""Plans of computations: the memory, products, passes and time that they will take."""

from __future__ import annotations

import dataclasses
from typing import Any

from hessdensity.operators.protocol import Operator, check
from hessdensity.runs.memory import Free, free_memory
from hessdensity.runs.plan import Plan, Settings, activation_bytes, plan_from_sizes, time_product

from . import settings as all_settings
from .density_settings import DensitySettings

_COMPUTATIONS = {each.computation: each for each in all_settings.ALL}


def plan(
    operator: Operator,
    *,
    computation: str = DensitySettings.computation,
    device_bytes: int | None = None,
    host_bytes: int | None = None,
    timed: bool = True,
    **settings: Any,
) -> Plan:
    """Plan a computation with its settings: the memory, products, passes and time it will take.

    For each weight, a float32 basis of a spectral density takes 4 b (m + 1) bytes for a block of b
    starts and m steps, in m passes over the data. A deflation run of m0 steps and k probes take
    4 (m0 + k m) bytes if the probes run together, in m0 + m passes, or 4 (m0 + m) bytes one after
    the other, in m0 + k m passes. The basis is spread over the devices as the weights are.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`. If ``timed`` is
        False, its parameters or vectors may be abstract, with shardings
        (``jax.ShapeDtypeStruct``). Then nothing of their size is allocated.
      computation: ``"spectral_density"``, ``"top_eigenspace"``, ``"spectral_measure"``,
        ``"part_densities"``, ``"trace"`` or ``"track"``. The plan of a track is that of one of
        its checkpoints.
      device_bytes: memory for vectors, basis and activations on one device. The default is nine
        tenths of the memory that is free now.
      host_bytes: memory of the host for each of its devices, with the same default.
      timed: whether to time one product, after another one that compiles it. It is not possible
        for a `Hessian` at abstract parameters.
      settings: settings of the computation, such as ``num_steps=30`` or ``rank=10``.

    Returns:
      `Plan`. ``print(plan)`` shows every way to keep the vectors, and which of them fit.
      ``plan.chosen`` is the one that a run takes.

    Raises:
      TypeError: ``operator`` lacks ``like`` or ``@``, or a setting is unknown or missing.
      ValueError: the computation is unknown, or a setting is out of range.
      MemoryError (in ``plan.chosen``): no way to keep the vectors fits.

    Cost: two products with one vector, or none if ``timed`` is False. The program of a `Hessian` is
    compiled to measure its activations. With several processes, all of them must call.

    Example:
      >>> import jax, numpy as np, hessdensity as hd
      >>> operator = hd.Matrix.from_eigenvalues(np.ones(1000), jax.random.key(0))
      >>> plan = hd.plan(operator)
      >>> plan.vector_bytes, plan.chosen.basis, plan.chosen.num_matvecs, plan.chosen.num_passes
      (4000, 'device', 180, 36)
      >>> hd.plan(operator, computation="top_eigenspace", rank=10).chosen.num_matvecs
      1000
    """
    n = check(operator)
    chosen = _settings_of(computation, settings)
    chosen.layouts(n, 1, 0)  # refuses sizes that do not fit n, before anything is measured
    free = free_memory(operator.like)
    if device_bytes is not None or host_bytes is not None:
        free = Free(
            free.device if device_bytes is None else device_bytes,
            free.host if host_bytes is None else host_bytes,
        )
    activations = activation_bytes(operator, chosen.num_vectors)
    seconds = time_product(operator) if timed else None
    return plan_from_sizes(operator, chosen, free, activations, seconds)


def _settings_of(computation: str, settings: dict[str, Any]) -> Settings:
    if computation not in _COMPUTATIONS:
        raise ValueError(
            f"computation={computation!r}, expected one of {', '.join(map(repr, _COMPUTATIONS))}."
        )
    chosen = _COMPUTATIONS[computation]
    fields = [field.name for field in dataclasses.fields(chosen)]
    required = [
        field.name
        for field in dataclasses.fields(chosen)
        if field.default is dataclasses.MISSING and field.name not in settings
    ]
    unknown = [name for name in settings if name not in fields]
    if unknown or required:
        problem = f"{unknown[0]}= is unknown" if unknown else f"{required[0]}= is missing"
        raise TypeError(f"plan of {computation}: {problem}. Its settings are {', '.join(fields)}.")
    return chosen(**settings)
