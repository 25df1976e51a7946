"""The settings of every computation, which are the only place where a default stands.

Settings are checked when they are made. They know how much memory their computation can take.
They are never compared or printed. The methods for that would only take time at import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from hessdensity.operators.protocol import check_count
from hessdensity.runs.plan import MemoryLayout, Settings

from .density_settings import WORKING, DensitySettings, whole_chunks

# Up to this dimension, a basis of the whole space takes only megabytes and never has to restart.
_SMALL = 1000

# Sizes of a basis of eigenvectors that seldom has to restart, from the best one down. It takes only
# as much of this memory as its run has products.
_ROOMY = (256, 128)


@dataclass(frozen=True, eq=False, repr=False)
class EigenspaceSettings(Settings):
    """The settings of `top_eigenspace`, which documents them."""

    computation: ClassVar[str] = "top_eigenspace"
    hint: ClassVar[str] = (
        "A smaller basis_size (at least rank + 3 block_size), block_size or rank needs less memory "
        "on a device. More devices help, too."
    )

    rank: int
    which: str = "LM"
    tolerance: float = 1e-4
    block_size: int = 4
    basis_size: int | None = None
    max_matvecs: int | None = None

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_count("block_size", self.block_size)
        if self.which not in ("LM", "LA", "SA"):
            raise ValueError(
                f"which={self.which!r}, expected 'LM' (largest in magnitude), 'LA' (largest) or "
                "'SA' (smallest eigenvalues)."
            )

    @property
    def num_vectors(self) -> int:
        """The number of vectors in a product."""
        return self.block_size

    def resolved(self, n: int) -> EigenspaceSettings:
        """The settings for dimension n, with every default filled in except that of the basis.

        Raises:
          ValueError: a size is too small, or the rank is too large.
        """
        check_count("rank", self.rank, 1, n)
        block_size = min(self.block_size, n)
        least = self.rank + 3 * block_size
        if self.basis_size is not None and self.basis_size < min(least, n):
            raise ValueError(
                f"basis_size={self.basis_size!r}, expected at least rank + 3 block_size = {least}, "
                "for the wanted pairs, a block to multiply, its products and a fresh block."
            )
        max_matvecs = self.max_matvecs
        if max_matvecs is None:
            max_matvecs = max(100 * self.rank, 1000)
        if max_matvecs < self.rank + block_size:
            raise ValueError(
                f"max_matvecs={max_matvecs!r}, expected at least rank + block_size = "
                f"{self.rank + block_size}, because fewer products give fewer pairs."
            )
        return replace(self, block_size=block_size, max_matvecs=max_matvecs)

    def basis_sizes(self, n: int) -> list[int]:
        """The numbers of vectors in the basis that these settings allow, the best one first."""
        if self.basis_size is not None:
            return [self.basis_size]
        if n <= _SMALL:
            return [n]
        least = 3 * self.rank + 4 * self.block_size
        return [size for size in _ROOMY if size > least] + [least]

    def layouts(self, n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        """One layout for each size of the basis.

        Vectors: the basis, half as much again at a restart, the pairs and a few blocks.
        """
        known = self.resolved(n)
        assert known.max_matvecs is not None
        b = known.block_size
        passes = -(-known.max_matvecs // b)
        vectors = [known.rank + size * 3 // 2 + WORKING * b for size in known.basis_sizes(n)]
        return [
            MemoryLayout("device", b, passes, known.max_matvecs, each * vector_bytes + activations)
            for each in vectors
        ]


@dataclass(frozen=True, eq=False, repr=False)
class MeasureSettings(Settings):
    """The settings of `spectral_measure`, which documents them."""

    computation: ClassVar[str] = "spectral_measure"

    num_steps: int = 60

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)

    def layouts(self, n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        """The only layout: the basis on the device."""
        m = min(self.num_steps, n)
        size = (whole_chunks(m) + WORKING) * vector_bytes + activations
        return [MemoryLayout("device", 1, m, m, size)]


@dataclass(frozen=True, eq=False, repr=False)
class PartSettings(Settings):
    """The settings of `part_densities`, which documents them."""

    computation: ClassVar[str] = "part_densities"

    num_parts: int = 8
    num_steps: int = 45
    num_probes: int = 2

    def __post_init__(self) -> None:
        check_count("num_parts", self.num_parts, 2)
        check_count("num_steps", self.num_steps)
        check_count("num_probes", self.num_probes)

    @property
    def num_vectors(self) -> int:
        """The number of vectors in a product with one batch."""
        return self.num_probes

    def layouts(self, n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        """The only layout: the bases of all parts on the device."""
        m = min(self.num_steps, n)
        all_probes = self.num_parts * self.num_probes
        size = all_probes * (whole_chunks(m) + WORKING) * vector_bytes + activations
        return [MemoryLayout("device", self.num_probes, m, self.num_probes * m, size)]


@dataclass(frozen=True, eq=False, repr=False)
class TraceSettings(Settings):
    """The settings of `trace`, which documents them."""

    computation: ClassVar[str] = "trace"

    num_matvecs: int
    semidefinite: bool = False
    block_size: int = 8

    def __post_init__(self) -> None:
        check_count("num_matvecs", self.num_matvecs, 4)
        check_count("block_size", self.block_size)

    @property
    def num_vectors(self) -> int:
        """The number of vectors in a product."""
        return self.block_size

    def layouts(self, n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        """The only layout: a basis of the products, and the test vectors if ``semidefinite``."""
        products = min(self.num_matvecs, n)
        b = self.block_size
        kept = 2 * whole_chunks(products) if self.semidefinite else whole_chunks(products // 2)
        size = (kept + WORKING * b) * vector_bytes + activations
        return [MemoryLayout("device", b, -(-products // b), products, size)]


@dataclass(frozen=True, eq=False, repr=False)
class TrackSettings(Settings):
    """The settings of `Tracker`, which documents them, for each of its checkpoints."""

    computation: ClassVar[str] = "track"

    rank: int = 10
    which: str = "LA"
    tolerance: float = EigenspaceSettings.tolerance
    block_size: int = EigenspaceSettings.block_size
    max_matvecs: int | None = None
    density: bool = True
    num_steps: int = DensitySettings.num_steps
    num_probes: int = DensitySettings.num_probes
    deflation_steps: int = DensitySettings.deflation_steps

    def __post_init__(self) -> None:
        self.eigenspace  # noqa: B018 (its settings check themselves)
        self.spectrum  # noqa: B018

    @property
    def eigenspace(self) -> EigenspaceSettings:
        """The settings of the eigenspace."""
        return EigenspaceSettings(
            self.rank,
            self.which,
            self.tolerance,
            self.block_size,
            max_matvecs=self.max_matvecs,
        )

    @property
    def spectrum(self) -> DensitySettings:
        """The settings of the density."""
        return DensitySettings(self.num_steps, self.num_probes, self.deflation_steps)

    @property
    def num_vectors(self) -> int:
        """The most vectors in a product."""
        return max(self.block_size, self.spectrum.num_vectors)

    def layouts(self, n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        """The layouts of the density, which runs after the eigenspace and beside its vectors."""
        *_, space = self.eigenspace.layouts(n, vector_bytes, activations)
        space = replace(space, device_bytes=space.device_bytes + self.rank * vector_bytes)
        if not self.density:
            return [space]
        return [
            replace(
                each,
                num_passes=each.num_passes + space.num_passes,
                num_matvecs=each.num_matvecs + space.num_matvecs,
                device_bytes=max(each.device_bytes + self.rank * vector_bytes, space.device_bytes),
            )
            for each in self.spectrum.layouts(n, vector_bytes, activations)
        ]


ALL: Sequence[type[Settings]] = (
    DensitySettings,
    EigenspaceSettings,
    MeasureSettings,
    PartSettings,
    TraceSettings,
    TrackSettings,
)
