"""The settings of every computation, which are the only place where a default stands.

Settings are checked when they are made. They know how much memory their computation can take.
They are never compared or printed. The methods for that would only take time at import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hessdensity.operators.protocol import check_count
from hessdensity.runs.plan import MemoryLayout, Settings
from hessdensity.vectors.basis import CHUNK, STORAGES

# Up to this dimension, a basis of the whole space takes only megabytes and never has to restart.
_SMALL = 1000

# Vectors of a probe beside the basis: the last two, a product, and the sum over the batches.
_WORKING = 4


@dataclass(frozen=True, eq=False, repr=False)
class DensitySettings(Settings):
    """The settings of `spectral_density`, which documents them."""

    computation: ClassVar[str] = "spectral_density"

    num_steps: int = 45
    num_probes: int = 2
    deflation_steps: int = 90
    tolerance: float | None = None
    max_matvecs: int | None = None
    basis: str | None = None
    probes_at_once: int | None = None

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)
        check_count("num_probes", self.num_probes)
        check_count("deflation_steps", self.deflation_steps, 0)
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(
                f"tolerance={self.tolerance}, expected a W1 distance over the spectrum's range, "
                "between 0 and 1, such as 1e-4."
            )
        if self.max_matvecs is not None:
            if self.tolerance is None:
                raise ValueError(
                    "max_matvecs is given without tolerance=. The numbers of steps and probes then "
                    "fix the number of products: leave max_matvecs out, or give a tolerance."
                )
            check_count("max_matvecs", self.max_matvecs)
        if self.basis not in (None, *STORAGES):
            raise ValueError(
                f"basis={self.basis!r}, expected 'device', 'host', 'none', or None for the first "
                "that fits."
            )
        if self.probes_at_once is not None:
            check_count("probes_at_once", self.probes_at_once)

    @property
    def num_vectors(self) -> int:
        """The number of vectors in a product."""
        return self.num_probes

    def everywhere(self) -> DensitySettings:
        """The same settings, with every place for the bases allowed."""
        return replace(self, basis=None, probes_at_once=None)

    def identity(self) -> dict[str, Any]:
        """All settings except where the bases are kept, which does not change the steps."""
        kept = super().identity()
        del kept["basis"], kept["probes_at_once"]
        return kept

    @property
    def steps_without_basis(self) -> int:
        """Steps of a probe without a basis. The probes share the steps of a deflation run."""
        return self.num_steps + -(-self.deflation_steps // self.num_probes)

    def layouts(self, n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        """The ways to keep the bases that these settings allow, in order of preference.

        The host comes before smaller groups of probes. With the host, each step moves the basis
        once, which takes seconds where one more pass over the data takes minutes.
        """
        k = self.num_probes
        groups = sorted({-(-k // parts) for parts in range(1, k + 1)}, reverse=True)
        if self.probes_at_once is not None:
            groups = [min(self.probes_at_once, k)]
        ways = [(storage, groups[0]) for storage in ("device", "host")]
        ways += [(storage, each) for storage in ("device", "host") for each in groups[1:]]
        ways += [("none", each) for each in dict.fromkeys([groups[0], groups[-1]])]
        found = [self._layout(*way, n, vector_bytes, activations) for way in ways]
        return [each for each in found if self.basis in (None, each.basis)]

    def _layout(
        self, storage: str, at_once: int, n: int, vector_bytes: int, activations: int
    ) -> MemoryLayout:
        m0 = min(self.deflation_steps, n)
        m = min(self.num_steps, n - m0)
        if storage == "none":
            m0 = 0
            m = min(self.steps_without_basis, n)
        turns = -(-self.num_probes // at_once)
        on_device, on_host = _vectors_kept(storage, at_once, m0, m)
        return MemoryLayout(
            basis=storage,
            probes_at_once=at_once,
            num_passes=m0 + turns * m,
            num_matvecs=m0 + self.num_probes * m,
            device_bytes=on_device * vector_bytes + activations,
            host_bytes=on_host * vector_bytes,
        )


def _vectors_kept(storage: str, k: int, m0: int, m: int) -> tuple[int, int]:
    """(vectors on the device at the peak, vectors on the host), in whole chunks."""
    first = _whole(m0)
    each = _whole(m)
    if storage == "device":
        return first + k * each + _WORKING * k, 0
    if storage == "none":
        return _WORKING * k, 0
    # The last chunk of every basis stays on the device, and one other chunk at a time is moved
    # there.
    on_device = CHUNK * (bool(m0) + 2 * k) + _WORKING * k
    return on_device, max(first - CHUNK, 0) + k * max(each - CHUNK, 0)


def _whole(steps: int) -> int:
    """The number of vectors in as many whole chunks as the steps need."""
    return -(-steps // CHUNK) * CHUNK


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
        """The settings for dimension n, with every default filled in.

        Raises:
          ValueError: a size is too small, or the rank is too large.
        """
        check_count("rank", self.rank, 1, n)
        block_size = min(self.block_size, n)
        basis_size = self.basis_size
        if basis_size is None:
            basis_size = n if n <= _SMALL else 3 * self.rank + 4 * block_size
        least = self.rank + 3 * block_size
        if basis_size < min(least, n):
            raise ValueError(
                f"basis_size={basis_size!r}, expected at least rank + 3 block_size = {least}, for "
                "the wanted pairs, a block to multiply, its products and a fresh block."
            )
        max_matvecs = self.max_matvecs
        if max_matvecs is None:
            max_matvecs = max(100 * self.rank, 1000)
        if max_matvecs < self.rank + block_size:
            raise ValueError(
                f"max_matvecs={max_matvecs!r}, expected at least rank + block_size = "
                f"{self.rank + block_size}, because fewer products give fewer pairs."
            )
        return replace(self, block_size=block_size, basis_size=basis_size, max_matvecs=max_matvecs)

    def layouts(self, n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        """The only layout: the basis, half as much again at a restart, pairs and a few blocks."""
        known = self.resolved(n)
        assert known.basis_size is not None
        assert known.max_matvecs is not None
        vectors = known.rank + known.basis_size * 3 // 2 + _WORKING * known.block_size
        size = vectors * vector_bytes + activations
        passes = -(-known.max_matvecs // known.block_size)
        return [MemoryLayout("device", known.block_size, passes, known.max_matvecs, size)]


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
        size = (_whole(m) + _WORKING) * vector_bytes + activations
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
        size = all_probes * (_whole(m) + _WORKING) * vector_bytes + activations
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
        kept = 2 * _whole(products) if self.semidefinite else _whole(products // 2)
        size = (kept + _WORKING * b) * vector_bytes + activations
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
        return max(self.block_size, self.num_probes)

    def layouts(self, n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        """The layouts of the density, which runs after the eigenspace and beside its vectors."""
        (space,) = self.eigenspace.layouts(n, vector_bytes, activations)
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
