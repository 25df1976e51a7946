"""A run says once that its products are not symmetric, and by how much, unless it is rounding."""

import logging

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import hessdensity as hd
from hessdensity.estimators.settings import MeasureSettings
from hessdensity.krylov import lanczos
from hessdensity.krylov.lanczos_engine import LanczosEngine
from hessdensity.runs.run import Run
from hessdensity.vectors.random import random_block

SETTINGS = {"num_steps": 12, "deflation_steps": 15, "progress": False}


@pytest.fixture
def said(caplog):
    """The warnings of symmetry so far."""
    caplog.set_level(logging.WARNING, logger="hessdensity")
    return lambda: [text for text in caplog.messages if "not symmetric" in text]


@pytest.mark.parametrize("make", networks.NOT_DERIVATIVES.values(), ids=networks.NOT_DERIVATIVES)
def test_a_rule_that_is_not_a_derivative_is_named_once_a_run_with_every_key(make, said):
    hessian = make().hessian()
    for count, seed in enumerate(range(3), 1):
        hd.spectral_density(hessian, jax.random.key(seed), **SETTINGS)
        assert len(said()) == count
    assert "(networks.py:" in said()[-1]
    assert "hd.verify_operator(operator, key)" in said()[-1]


@pytest.mark.parametrize("make", networks.HONEST.values(), ids=networks.HONEST)
def test_a_network_with_a_hessian_runs_without_a_word(make, said, dtype):
    hd.spectral_density(make().hessian(), jax.random.key(0), **SETTINGS)
    assert not said()


@pytest.mark.parametrize("short", ["bfloat16", "float16"])
def test_the_rounding_of_a_short_dtype_inside_of_the_model_is_no_warning(short, said):
    hd.spectral_density(networks.dense(jnp.tanh, short).hessian(), jax.random.key(0), **SETTINGS)
    assert not said()


def test_a_function_that_computes_in_a_short_dtype_is_told_as_a_cause(said):
    matrix = np.random.default_rng(0).standard_normal((80, 80))
    short = jnp.asarray(matrix + matrix.T, jnp.bfloat16)

    def multiply(v):
        return (short @ v.astype(jnp.bfloat16)).astype(jnp.float32)

    hd.spectral_density(hd.FunctionOperator(multiply, jnp.zeros(80)), jax.random.key(0), **SETTINGS)
    assert len(said()) == 1
    assert "a short dtype" in said()[0]


def execute(run, operator, seed, num_steps):
    """The last state of a Lanczos engine that a run has driven."""

    def make():
        start = random_block(jax.random.key(seed), 0, 2, operator.like)
        return LanczosEngine(lanczos.init(start, num_steps))

    return run.execute_engine(make, lambda engine: engine.state)


def test_the_figure_of_a_run_is_the_largest_of_its_engines():
    operator = networks.NOT_DERIVATIVES["gradients scaled by 0.9"]().hessian()
    run = Run(operator, MeasureSettings(), progress=False)
    assert run.asymmetry == 0
    states = [execute(run, operator, seed, 8) for seed in range(2)]
    assert run.asymmetry == max(lanczos.asymmetry(state).max() for state in states) > 1e-3


def test_a_resumed_run_has_the_same_figure_bit_for_bit(tmp_path):
    operator = networks.NOT_DERIVATIVES["gradients scaled by 0.9"]().hessian()
    found = []
    for num_steps in (5, 8, 8):
        run = Run(operator, MeasureSettings(), checkpoint=tmp_path / "run", progress=False)
        execute(run, operator, 0, num_steps)
        found.append(run.asymmetry)
    assert found[0] < found[1] == found[2]


def test_a_warning_costs_no_batch_while_products_are_symmetric():
    """The model is only examined when there is something to explain."""
    network = networks.dense(jnp.tanh)
    passes = []

    def batches():
        passes.append(None)
        return iter(network.batches)

    hessian = hd.Hessian(network.loss, network.params, batches)
    density = hd.spectral_density(hessian, jax.random.key(0), basis="device", **SETTINGS)
    assert len(passes) <= density.num_matvecs + 2  # the memory plan reads a batch
