"""The settings of a spectral density, and the ways to keep its bases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from hessdensity.operators.protocol import check_count
from hessdensity.runs.plan import MemoryLayout, Settings
from hessdensity.vectors.basis import CHUNK, STORAGES

# Vectors of a probe beside the basis: the last two, a product, and the sum over the batches.
WORKING = 4

_DEFAULT = cast(int, None)  # not given: the default of the form, or None in the other form

# The default and the least number of each form. Both cost 180 products, which
# ``benchmarks/deflation.py`` has compared.
_BLOCK = {"num_steps": (36, 1), "block_size": (5, 2)}
_PROBES = {"num_steps": (45, 1), "num_probes": (2, 1), "deflation_steps": (90, 0)}


@dataclass(frozen=True, eq=False, repr=False)
class DensitySettings(Settings):
    """The settings of `spectral_density`, which documents them.

    They are those of a block, unless a setting is given that only a deflation run and probes have.
    Settings of the other form stay None.
    """

    computation: ClassVar[str] = "spectral_density"

    num_steps: int = _DEFAULT
    num_probes: int = _DEFAULT
    deflation_steps: int = _DEFAULT
    tolerance: float | None = None
    max_matvecs: int | None = None
    basis: str | None = None
    probes_at_once: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None:
            self._check_block()
        defaults = _PROBES if self._only_probes() or self.basis == "none" else _BLOCK
        for name, (default, least) in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            check_count(name, getattr(self, name), least)
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

    def _only_probes(self) -> dict[str, int]:
        """The given settings that a block does not have."""
        names = ("num_probes", "deflation_steps", "probes_at_once")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _check_block(self) -> None:
        for name, given in self._only_probes().items():
            raise ValueError(
                f"{name}={given} and block_size={self.block_size}: each start of a block is a "
                f"probe, which the others deflate. Leave {name} out, or block_size."
            )
        if self.basis == "none":
            raise ValueError(
                f"basis='none' and block_size={self.block_size}: a block needs its basis. Give "
                "basis='host', or leave block_size out."
            )

    @property
    def num_vectors(self) -> int:
        """The number of vectors in a product."""
        return self.block_size or self.num_probes or 1

    def without_basis(self) -> DensitySettings:
        """Probes without a basis, for the products of a block."""
        assert self.block_size is not None
        half = max(self.block_size * self.num_steps // 2, 1)
        return DensitySettings(
            num_probes=2,
            num_steps=half - half // 2,
            deflation_steps=half // 2 * 2,
            tolerance=self.tolerance,
            max_matvecs=self.max_matvecs,
            basis="none",
        )

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
        once, which takes seconds where one more pass over the data takes minutes. Where the basis
        of a block fits nowhere, probes without a basis take its place.
        """
        if self.block_size is not None:
            found = self._block_layouts(n, vector_bytes, activations)
            found += self.without_basis().layouts(n, vector_bytes, activations)
            return [each for each in found if self.basis in (None, each.basis)]
        k = self.num_probes
        groups = sorted({-(-k // parts) for parts in range(1, k + 1)}, reverse=True)
        if self.probes_at_once is not None:
            groups = [min(self.probes_at_once, k)]
        ways = [(storage, groups[0]) for storage in ("device", "host")]
        ways += [(storage, each) for storage in ("device", "host") for each in groups[1:]]
        ways += [("none", each) for each in dict.fromkeys([groups[0], groups[-1]])]
        found = [self._layout(*way, n, vector_bytes, activations) for way in ways]
        return [each for each in found if self.basis in (None, each.basis)]

    def _block_layouts(self, n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        """The ways to keep the basis of a block."""
        assert self.block_size is not None
        b = min(self.block_size, n)
        products = min(self.num_steps * b, n)
        every = whole_chunks(products + b)
        working = WORKING * b
        sizes = {"device": (every + working, 0), "host": (2 * CHUNK + working, every - CHUNK)}
        return [
            MemoryLayout(
                basis=storage,
                probes_at_once=b,
                num_passes=-(-products // b),
                num_matvecs=products,
                device_bytes=on_device * vector_bytes + activations,
                host_bytes=max(on_host, 0) * vector_bytes,
            )
            for storage, (on_device, on_host) in sizes.items()
        ]

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
    first = whole_chunks(m0)
    each = whole_chunks(m)
    if storage == "device":
        return first + k * each + WORKING * k, 0
    if storage == "none":
        return WORKING * k, 0
    # The last chunk of every basis stays on the device, and one other chunk at a time is moved
    # there.
    on_device = CHUNK * (bool(m0) + 2 * k) + WORKING * k
    return on_device, max(first - CHUNK, 0) + k * max(each - CHUNK, 0)


def whole_chunks(steps: int) -> int:
    """The number of vectors in as many whole chunks as the steps need."""
    return -(-steps // CHUNK) * CHUNK
