"""What a spectral density will take, before anything runs: bytes, passes over the data, time, and
what fits."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hessdensity.operators.protocol import Operator, check
from hessdensity.vectors import trees as _trees
from hessdensity.vectors.basis import CHUNK

from .memory import Free, bytes_per_device, free_memory, in_words

PyTree = Any

_WORKING = 4  # vectors a probe beside the basis: the last two, the product, and the sum that it is added to


@dataclass(frozen=True)
class Choice:
    """One way to keep the bases of a run."""

    basis: str
    """``"device"``, ``"host"`` or ``"none"``."""
    probes_at_once: int
    """Probes that go through the data together; the others wait, and need no memory."""
    num_passes: int
    """Passes over the data."""
    num_matvecs: int
    """Products."""
    device_bytes: int
    """A device's peak, beside the weights: vectors, basis, activations."""
    host_bytes: int
    """The host's, for each of its devices."""

    def fits(self, free: Free) -> bool:
        """Whether so much is free, as far as that is known."""
        both = self.host_bytes if free.shared else 0
        return (
            free.device is None or self.device_bytes + both <= free.device
        ) and self.host_bytes <= free.host


@dataclass(frozen=True)
class Plan:
    """What `spectral_density` will take with these settings. ``print`` it.

    All bytes are those of one device, or of the host for each of its devices.
    """

    dimension: int
    """n, the number of weights that form a vector."""
    num_devices: int
    """Devices over which a vector is spread."""
    weight_bytes: int | None
    """Weights, there already; None for an operator that does not say."""
    vector_bytes: int
    """One vector."""
    activation_bytes: int | None
    """What a product needs beside vectors and weights; None for an operator that does not say."""
    free: Free
    """What is free, beside the weights."""
    seconds: float | None
    """One product with one vector, timed; None where it was not."""
    choices: tuple[Choice, ...]
    """From the fastest on."""

    @property
    def chosen(self) -> Choice:
        """The first that fits; the one that needs least, if none does."""
        return next((choice for choice in self.choices if choice.fits(self.free)), self.choices[-1])

    def __str__(self) -> str:
        spread = f", spread over {self.num_devices} devices" if self.num_devices > 1 else ""
        parts = {
            "weights": self.weight_bytes,
            "a vector": self.vector_bytes,
            "activations": self.activation_bytes,
        }
        listed = ", ".join(
            f"{name} {in_words(size)}" for name, size in parts.items() if size is not None
        )
        free = "unknown" if self.free.device is None else in_words(self.free.device)
        lines = [
            f"Plan of a spectral density: {self.dimension:,} weights{spread}",
            f"  on each device   {listed}; free {free}, and {in_words(self.free.host)} on the host",
        ]
        if self.seconds is not None:
            whole = self.seconds * self.chosen.num_matvecs
            lines.append(
                f"  time             a product {_time(self.seconds)}, the run {_time(whole)} at "
                "most"
            )
        lines += ["", "  basis    probes at once  products  passes   on a device   on the host"]
        for choice in self.choices:
            verdict = "fits" if choice.fits(self.free) else "does not fit"
            verdict += ", chosen" if choice is self.chosen and choice.fits(self.free) else ""
            lines.append(
                f"  {choice.basis:<8} {choice.probes_at_once:>14} {choice.num_matvecs:>9} "
                f"{choice.num_passes:>7} {in_words(choice.device_bytes):>13} "
                f"{in_words(choice.host_bytes):>13}   {verdict}"
            )
        lines += [
            "  Together, probes share the passes over the data; one after the other, the memory "
            "of a basis.",
            "  Without a basis as many products find fewer outliers.",
        ]
        return "\n".join(lines)


def plan(
    operator: Operator,
    num_steps: int = 45,
    num_probes: int = 2,
    *,
    deflation_steps: int = 90,
    device_bytes: int | None = None,
    host_bytes: int | None = None,
    timed: bool = True,
) -> Plan:
    """What `spectral_density` will take with the same settings: memory, products, passes, time; and
    what fits.

    Per weight, a float32 basis takes 4 (m0 + k m) bytes with all k probes side by side, in m0 + m
    passes over the data, and 4 (m0 + m) with one after the other, in m0 + k m passes; spread over
    the devices as the weights are.

    Args: operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`. Its vectors may
      be abstract, with
        shardings (``jax.ShapeDtypeStruct``), if ``timed`` is False.
      num_steps: Lanczos steps m of a probe. num_probes: probes k. deflation_steps: m0.
      device_bytes: memory for vectors, basis and activations on a device; by default nine tenths of
      what is free now. host_bytes: the host's memory for each of its devices; likewise. timed: time
      one product, after one that compiles it.

    Returns:
      `Plan`.

    Raises:
      TypeError: ``operator`` is none.
      ValueError: a number of steps or probes that is none.

    Cost: two products with one vector; none without ``timed``. A `Hessian`'s program is compiled
    for the activations. In several processes all of them must call.

    Example:
      >>> import hessdensity as hd
      >>> plan = hd.plan(hd.Matrix.from_eigenvalues(np.ones(1000), jax.random.key(0)))
      >>> plan.vector_bytes, plan.chosen.basis, plan.chosen.num_matvecs, plan.chosen.num_passes
      (4000, 'device', 180, 135)
    """
    check(operator)
    check_settings(num_steps, num_probes, deflation_steps)
    free = free_memory(operator.like)
    if device_bytes is not None or host_bytes is not None:
        free = Free(
            free.device if device_bytes is None else device_bytes,
            free.host if host_bytes is None else host_bytes,
        )
    activations = _activation_bytes(operator, num_probes)
    seconds = _time_product(operator) if timed else None
    return lay_out(operator, num_steps, num_probes, deflation_steps, free, activations, seconds)


def lay_out(
    operator: Operator,
    num_steps: int,
    num_probes: int,
    deflation_steps: int,
    free: Free,
    activations: int | None = None,
    seconds: float | None = None,
) -> Plan:
    """The plan with these figures: nothing is asked of the operator, for there may be no memory
    left to do so."""
    n, like, weights = (
        check(operator),
        _trees.abstract(operator.like),
        getattr(operator, "params", None),
    )
    shardings = [leaf.sharding for leaf in jax.tree.leaves(like) if leaf.sharding]
    vector_bytes = bytes_per_device(like)
    found = choices(n, vector_bytes, activations or 0, num_steps, num_probes, deflation_steps)
    return Plan(
        dimension=n,
        num_devices=max((len(sharding.device_set) for sharding in shardings), default=1),
        weight_bytes=None if weights is None else bytes_per_device(weights),
        vector_bytes=vector_bytes,
        activation_bytes=activations,
        free=free,
        seconds=seconds,
        choices=tuple(found),
    )


def choose(
    operator: Operator,
    num_steps: int,
    num_probes: int,
    deflation_steps: int,
    bases: tuple[str, ...],
    probes_at_once: int | None,
    free: Free,
) -> Choice:
    """The first of the choices that fits, of those with one of these bases and, where it is given,
    probes at once.

    The activations are asked for only where it depends on them: they cost a compilation.
    """
    n, vector_bytes = check(operator), bytes_per_device(operator.like)

    def candidates(activation_bytes: int) -> list[Choice]:
        every = choices(
            n,
            vector_bytes,
            activation_bytes,
            num_steps,
            num_probes,
            deflation_steps,
            probes_at_once,
        )
        return [choice for choice in every if choice.basis in bases]

    (first, *others) = candidates(0)
    if not others or free.device is None or first.device_bytes < free.device / 4:
        return first
    measured = candidates(_activation_bytes(operator, num_probes) or 0)
    return next((choice for choice in measured if choice.fits(free)), measured[-1])


def choices(
    n: int,
    vector_bytes: int,
    activation_bytes: int,
    num_steps: int,
    num_probes: int,
    deflation_steps: int,
    probes_at_once: int | None = None,
) -> list[Choice]:
    """The ways to keep the bases of a run, the one that is taken first if it fits first.

    The host before groups: a step moves the basis once, seconds where a pass over the data is
    minutes."""
    groups = sorted({-(-num_probes // parts) for parts in range(1, num_probes + 1)}, reverse=True)
    groups = groups if probes_at_once is None else [min(probes_at_once, num_probes)]
    ways = [(tier, groups[0]) for tier in ("device", "host")]
    ways += [(tier, k) for tier in ("device", "host") for k in groups[1:]]
    ways += [("none", k) for k in dict.fromkeys([groups[0], groups[-1]])]
    m0 = min(deflation_steps, n)
    m = min(num_steps, n - m0)
    alone = min(without_basis(num_steps, num_probes, deflation_steps), n)
    found = []
    for tier, k in ways:
        turns, (on_device, on_host) = -(-num_probes // k), _vectors_kept(tier, k, m0, m)
        found.append(
            Choice(
                basis=tier,
                probes_at_once=k,
                num_matvecs=num_probes * alone if tier == "none" else m0 + num_probes * m,
                num_passes=turns * alone if tier == "none" else m0 + turns * m,
                device_bytes=on_device * vector_bytes + activation_bytes,
                host_bytes=on_host * vector_bytes,
            )
        )
    return found


def check_settings(num_steps: int, num_probes: int, deflation_steps: int) -> None:
    """Refuse numbers of steps or probes that are none."""
    for name, value in {
        "num_steps": num_steps,
        "num_probes": num_probes,
        "deflation_steps": deflation_steps,
    }.items():
        least = 0 if name == "deflation_steps" else 1
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r}, expected a whole number of at least {least}.")


def without_basis(num_steps: int, num_probes: int, deflation_steps: int) -> int:
    """Steps of a probe without a basis: the deflation is then no run of its own, and the probes
    share its steps."""
    return num_steps + -(-deflation_steps // num_probes)


def _vectors_kept(tier: str, k: int, m0: int, m: int) -> tuple[int, int]:
    """(vectors on the device at the peak, on the host), in whole chunks."""
    first, each = (-(-steps // CHUNK) * CHUNK for steps in (m0, m))
    if tier == "device":
        return first + k * each + _WORKING * k, 0
    if tier == "none":
        return _WORKING * k, 0
    # Of every basis the last chunk stays on the device, and one chunk at a time comes to it.
    return CHUNK * (bool(m0) + 2 * k) + _WORKING * k, max(first - CHUNK, 0) + k * max(
        each - CHUNK, 0
    )


def _activation_bytes(operator: Operator, num_vectors: int) -> int | None:
    measure = getattr(operator, "temporary_bytes", None)
    return None if measure is None else int(measure(num_vectors))


def _time_product(operator: Operator) -> float:
    """Seconds of a product with one vector; of the second one, since the first may compile."""
    block = jax.tree.map(lambda leaf: leaf + 1, _trees.zeros(operator.like, 1))
    seconds = math.inf
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(operator @ block)
        seconds = time.perf_counter() - start
    return seconds


def _time(seconds: float) -> str:
    for limit, divisor, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"
