"""The strictest world for every test, on eight fake devices; float64 and float32 where a test asks
for ``dtype``."""

import os
import sys

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

from pathlib import Path

import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def strict():
    """Accidental broadcasting and promotion raise, as tests alone can afford."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Drop the programs that a module has compiled: a process that keeps thousands of them runs out
    of memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    """Both precisions, each in the world its users live in: float32 without 64-bit types."""
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


@pytest.fixture
def key():
    return jax.random.key(20190130)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data, from HESSDENSITY_DATA or beside the project; skips where it is
    missing."""
    folder = Path(os.environ.get("HESSDENSITY_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(
            f"no real data in {folder.name!r} beside the project; set HESSDENSITY_DATA to the "
            "folder"
        )
    return folder
