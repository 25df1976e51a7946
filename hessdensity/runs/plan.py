"""What a computation will take, before anything runs: bytes, passes over the data, time.

An estimator describes the ways to keep its vectors as `MemoryLayout`, in the order in which they
are to be tried. What is planned, chosen, and printed when memory runs out is the same for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax

from hessdensity.operators.protocol import Operator, check
from hessdensity.text import format_bytes, format_seconds, table
from hessdensity.vectors import trees

from .memory import Free, bytes_per_device


@dataclass(frozen=True)
class MemoryLayout:
    """One way to keep the vectors of a computation."""

    basis: str
    """Where its basis is kept: ``"device"``, ``"host"`` or ``"none"``."""
    probes_at_once: int
    """Vectors that go through the data together."""
    num_passes: int
    """Passes over the data, at most."""
    num_matvecs: int
    """Products, at most."""
    device_bytes: int
    """A device's peak, beside the weights: vectors, basis, activations."""
    host_bytes: int = 0
    """The host's peak, for each of its devices."""

    def fits(self, free: Free) -> bool:
        """Whether so much is free, as far as that is known."""
        both = self.host_bytes if free.shared else 0
        on_device = free.device is None or self.device_bytes + both <= free.device
        return on_device and self.host_bytes <= free.host


LayoutsOf: TypeAlias = Callable[[int, int, int], Sequence[MemoryLayout]]
"""(dimension n, bytes of a vector, bytes of a product's activations) -> the ways to keep the
vectors, the one that is taken first if it fits first."""


@dataclass(frozen=True)
class Plan:
    """What a computation will take with its settings. ``print`` it.

    All bytes are those of one device, or of the host for each of its devices.
    """

    computation: str
    """The name of the public call."""
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
    layouts: tuple[MemoryLayout, ...]
    """From the fastest on."""

    @property
    def chosen(self) -> MemoryLayout:
        """The first that fits; the one that needs least, if none does."""
        return next((each for each in self.layouts if each.fits(self.free)), self.layouts[-1])

    def __str__(self) -> str:
        name = self.computation.replace("_", " ")
        spread = f", spread over {self.num_devices} devices" if self.num_devices > 1 else ""
        sizes = {
            "weights": self.weight_bytes,
            "a vector": self.vector_bytes,
            "activations": self.activation_bytes,
        }
        listed = ", ".join(
            f"{part} {format_bytes(size)}" for part, size in sizes.items() if size is not None
        )
        free = "unknown" if self.free.device is None else format_bytes(self.free.device)
        lines = [
            f"Plan of a {name}: {self.dimension:,} weights{spread}",
            f"  on each device   {listed}; free {free}, and {format_bytes(self.free.host)} on the "
            "host",
        ]
        if self.seconds is not None:
            whole = format_seconds(self.seconds * self.chosen.num_matvecs)
            each = format_seconds(self.seconds)
            lines.append(f"  time             a product {each}, the run {whole} at most")
        return "\n".join([*lines, "", *self._rows(), *self._remarks()])

    def _rows(self) -> list[str]:
        rows = [("basis", "at once", "products", "passes", "on a device", "on the host", "")]
        for layout in self.layouts:
            fits = layout.fits(self.free)
            verdict = "fits" if fits else "does not fit"
            verdict += ", chosen" if fits and layout is self.chosen else ""
            counts = (layout.probes_at_once, layout.num_matvecs, layout.num_passes)
            sizes = (format_bytes(layout.device_bytes), format_bytes(layout.host_bytes))
            rows.append((layout.basis, *map(str, counts), *sizes, verdict))
        return table(rows, left={0, 6})

    def _remarks(self) -> list[str]:
        remarks = []
        if len({layout.probes_at_once for layout in self.layouts}) > 1:
            remarks.append(
                "  Together, probes share the passes over the data; one after the other, the memory "
                "of a basis."
            )
        if any(layout.basis == "none" for layout in self.layouts):
            remarks.append("  Without a basis the same number of products finds fewer outliers.")
        return remarks


def plan_from_sizes(
    computation: str,
    operator: Operator,
    layouts_of: LayoutsOf,
    free: Free,
    activations: int | None = None,
    seconds: float | None = None,
) -> Plan:
    """The plan with these figures. Nothing is asked of the operator: memory may be exhausted."""
    n, like = check(operator), trees.abstract(operator.like)
    weights = getattr(operator, "params", None)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(like) if leaf.sharding]
    vector_bytes = bytes_per_device(like)
    return Plan(
        computation=computation,
        dimension=n,
        num_devices=max((len(sharding.device_set) for sharding in shardings), default=1),
        weight_bytes=None if weights is None else bytes_per_device(weights),
        vector_bytes=vector_bytes,
        activation_bytes=activations,
        free=free,
        seconds=seconds,
        layouts=tuple(layouts_of(n, vector_bytes, activations or 0)),
    )


def first_that_fits(
    operator: Operator, layouts_of: LayoutsOf, num_vectors: int, free: Free
) -> MemoryLayout:
    """The first of the layouts that fits; the one that needs least, if none does.

    The activations are measured only where the choice depends on them: that costs a compilation.

    Args:
      operator: the operator.
      layouts_of: the layouts.
      num_vectors: vectors in a product, for its activations.
      free: what is free.
    """
    n, vector_bytes = check(operator), bytes_per_device(operator.like)
    first, *others = layouts_of(n, vector_bytes, 0)
    if not others or free.device is None or first.device_bytes < free.device / 4:
        return first
    measured = layouts_of(n, vector_bytes, activation_bytes(operator, num_vectors) or 0)
    return next((layout for layout in measured if layout.fits(free)), measured[-1])


def activation_bytes(operator: Operator, num_vectors: int) -> int | None:
    """What a product takes beside vectors and weights, where the operator can say."""
    measure = getattr(operator, "temporary_bytes", None)
    return None if measure is None else int(measure(num_vectors))


def time_product(operator: Operator) -> float:
    """Seconds of a product with one vector; of the second one, since the first may compile."""
    block = jax.tree.map(lambda leaf: leaf + 1, trees.zeros(operator.like, 1))
    seconds = math.inf
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(operator @ block)
        seconds = time.perf_counter() - start
    return seconds
