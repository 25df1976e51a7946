"""What a computation will take: memory, products, passes, time; and what fits."""

from __future__ import annotations

import dataclasses
from typing import Any

from hessdensity.operators.protocol import Operator, check
from hessdensity.runs.memory import Free, free_memory
from hessdensity.runs.plan import Plan, activation_bytes, plan_from_sizes, time_product

from . import settings as all_settings

_COMPUTATIONS = {each.computation: each for each in all_settings.ALL}


def plan(
    operator: Operator,
    *,
    computation: str = all_settings.DensitySettings.computation,
    device_bytes: int | None = None,
    host_bytes: int | None = None,
    timed: bool = True,
    **settings: Any,
) -> Plan:
    """What a computation will take with the same settings: memory, products, passes and time.

    For each weight, a float32 basis of a spectral density takes 4 (m0 + k m) bytes with all k
    probes side by side, in m0 + m passes over the data, and 4 (m0 + m) with one after the other, in
    m0 + k m passes. It is spread over the devices as the weights are.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`. Its vectors may be
        abstract, with shardings (``jax.ShapeDtypeStruct``), if ``timed`` is False.
      computation: ``"spectral_density"``, ``"top_eigenspace"``, ``"spectral_measure"``,
        ``"part_densities"`` or ``"trace"``. A `track` takes what `spectral_density` and
        `top_eigenspace` take, one after the other, and the last eigenvectors.
      device_bytes: memory for vectors, basis and activations on a device; nine tenths of what is
        free now by default.
      host_bytes: the host's memory for each of its devices; likewise.
      timed: time one product, after one that compiles it.
      settings: those of the computation, such as ``num_steps=30`` or ``rank=10``.

    Returns:
      `Plan`.

    Raises:
      TypeError: ``operator`` lacks ``like`` or ``@``; a setting that the computation does not have.
      ValueError: an unknown computation, or a setting outside its range.

    Cost: two products with one vector; none without ``timed``. A `Hessian`'s program is compiled
    for the activations. In several processes all of them must call.

    Example:
      >>> import jax, numpy as np, hessdensity as hd
      >>> operator = hd.Matrix.from_eigenvalues(np.ones(1000), jax.random.key(0))
      >>> plan = hd.plan(operator)
      >>> plan.vector_bytes, plan.chosen.basis, plan.chosen.num_matvecs, plan.chosen.num_passes
      (4000, 'device', 180, 135)
      >>> hd.plan(operator, computation="top_eigenspace", rank=10).chosen.num_matvecs
      1000
    """
    n = check(operator)
    chosen = _settings_of(computation, settings)
    chosen.layouts(n, 1, 0)  # refuses sizes that do not go with n, before anything is measured
    free = free_memory(operator.like)
    if device_bytes is not None or host_bytes is not None:
        free = Free(
            free.device if device_bytes is None else device_bytes,
            free.host if host_bytes is None else host_bytes,
        )
    activations = activation_bytes(operator, chosen.num_vectors)
    seconds = time_product(operator) if timed else None
    return plan_from_sizes(computation, operator, chosen.layouts, free, activations, seconds)


def _settings_of(computation: str, settings: dict[str, Any]) -> Any:
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
        raise TypeError(f"plan of {computation}: {problem}; its settings are {', '.join(fields)}.")
    return chosen(**settings)
