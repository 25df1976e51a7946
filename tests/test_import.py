"""`import hessdensity` is cheap: it loads nothing heavy and touches no device."""

import subprocess
import sys

import pytest


def run(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def loaded():
    """Top-level packages that the import loads."""
    return run("import sys, hessdensity; print(*{name.split('.')[0] for name in sys.modules})")


@pytest.mark.parametrize(
    "package",
    ["matplotlib", "flax", "optax", "orbax", "sklearn", "scipy", "tqdm", "click", "grain", "torch"],
)
def test_the_import_does_not_load(package, loaded):
    assert "hessdensity" in loaded
    assert package not in loaded


@pytest.mark.parametrize(
    "module", ["hessdensity", "hessdensity.cli", "hessdensity.adapters", "hessdensity.losses"]
)
def test_the_import_initializes_no_backend(module):
    # Whoever imports before jax.distributed.initialize, or before choosing a platform, must still
    # be free to do so.
    ask = "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    code = f"import {module}; {ask}"
    assert run(code) == ["False"]


def test_the_import_leaves_jax_as_it_was():
    before = "import jax; before = dict(jax.config.values)"
    code = f"{before}; import hessdensity; print(before == jax.config.values)"
    assert run(code) == ["True"]
