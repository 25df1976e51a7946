"""A plan says what a run then takes."""

import jax
import jax.numpy as jnp
import named_spectra as spectra
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import mlp

import hessdensity as hd
from hessdensity.estimators.density_settings import DensitySettings
from hessdensity.krylov import lanczos
from hessdensity.runs import run as run_module
from hessdensity.runs.memory import Free
from hessdensity.text import format_bytes
from hessdensity.vectors.basis import STORAGES
from hessdensity.vectors.random import random_block


def hessian_of(examples=60, batch_size=20):
    loss, params, batch = mlp(np.float32, examples=examples)
    return hd.Hessian(loss, params, hd.batches(batch, batch_size))


def held(state, kind):
    leaves = jax.tree.leaves((state.basis, state.vectors, state.previous))
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return sum(leaf.nbytes for leaf in arrays if leaf.sharding.memory_kind == kind)


@pytest.mark.parametrize("tier", STORAGES)
@pytest.mark.parametrize(("m0", "m", "k"), [(32, 16, 3), (20, 7, 1), (0, 9, 2)])
def test_planned_bytes_are_those_of_the_arrays_that_a_run_holds(tier, m0, m, k, key):
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(spectra.ALL["outliers"], jnp.float32), key)
    sizes = {"num_steps": m, "num_probes": k, "deflation_steps": m0}
    (choice,) = [
        each
        for each in DensitySettings(m, k, m0).layouts(operator.like.size, 1200, 0)
        if (each.basis, each.probes_at_once) == (tier, k)
    ]
    assert choice in hd.plan(operator, **sizes, timed=False).layouts
    deflated, deflation = None, None
    if tier != "none" and m0:
        deflation = lanczos.init(random_block(key, 9, 1, operator.like), m0, basis_storage=tier)
        for deflation in lanczos.iterate(operator, deflation):
            pass
        deflated = deflation.basis
    steps = m if tier != "none" else DensitySettings(m, k, m0).steps_without_basis
    state = lanczos.init(
        random_block(key, 0, k, operator.like), steps, deflated, basis_storage=tier
    )
    for state in lanczos.iterate(operator, state):
        pass
    device, host = held(state, "device"), held(state, "pinned_host")
    if deflation is not None:
        without = deflation._replace(vectors=None, previous=None)
        device, host = device + held(without, "device"), host + held(without, "pinned_host")
    # Beside these: the product and the sum it is added to, and on its way one chunk that waits on
    # the host.
    working = 2 * k * 1200 + (lanczos.CHUNK * k * 1200 if tier == "host" else 0)
    assert choice.host_bytes == host
    assert choice.device_bytes == device + working


def test_planned_products_and_passes_are_those_of_the_run(key):
    for basis, at_once in [("device", 3), ("device", 2), ("host", 1), ("none", 3), ("none", 1)]:
        hessian = hessian_of()
        density = hd.spectral_density(
            hessian,
            key,
            num_steps=5,
            num_probes=3,
            deflation_steps=8,
            basis=basis,
            probes_at_once=at_once,
            progress=False,
        )
        every = DensitySettings(5, 3, 8, probes_at_once=at_once).layouts(55, 4, 0)
        choice = next(
            each for each in every if (each.basis, each.probes_at_once) == (basis, at_once)
        )
        assert density.num_matvecs == choice.num_matvecs
        assert hessian.risk.passes.num_passes == choice.num_passes


def test_the_trade_is_bytes_for_passes(key):
    """4 (m0 + k m) bytes a weight and m0 + m passes with k probes side by side; 4 (m0 + m) and m0 +
    k m in turns."""
    n, m0, m, k = 1_000_000, 96, 48, 4
    every = {(c.basis, c.probes_at_once): c for c in DensitySettings(m, k, m0).layouts(n, 4 * n, 0)}
    together, turns = every["device", 4], every["device", 1]
    assert together.num_passes == m0 + m
    assert turns.num_passes == m0 + k * m
    assert together.device_bytes == 4 * n * (m0 + k * m + 4 * k)
    assert turns.device_bytes == 4 * n * (m0 + m + 4)
    assert {c.num_matvecs for c in every.values()} == {m0 + k * m}
    assert every["none", 4].device_bytes == 4 * n * 4 * k


def test_the_first_that_fits_is_chosen(key):
    operator = hd.Matrix.from_eigenvalues(jnp.linspace(0, 1, 1000), key)

    def chosen(vectors, host_bytes=10**9, **settings):
        sizes = {"device_bytes": 4000 * vectors, "host_bytes": host_bytes}
        plan = hd.plan(operator, **sizes, **settings, timed=False)
        assert plan.chosen.fits(plan.free)
        return plan.chosen.basis, plan.chosen.probes_at_once

    # A block, and probes without a basis in its place.
    found = [chosen(vectors) for vectors in (1000, 190, 30, 5)]
    assert found == [("device", 5), ("host", 5), ("none", 2), ("none", 1)]
    # A deflation run and probes.
    found = [chosen(vectors, num_probes=2) for vectors in (1000, 190, 80, 30, 5)]
    assert found == [("device", 2), ("host", 2), ("host", 2), ("host", 1), ("none", 1)]
    assert chosen(160, 0, num_probes=2) == ("device", 1)


def test_a_block_that_fits_nowhere_is_replaced_by_probes_with_its_products(key, monkeypatch):
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(spectra.ALL["outliers"], jnp.float32), key)
    monkeypatch.setattr(run_module, "free_memory", lambda like: Free(30 * 1200, 0))
    density = hd.spectral_density(operator, key, block_size=4, num_steps=10, progress=False)
    alone = hd.spectral_density(
        operator,
        key,
        num_probes=2,
        num_steps=10,
        deflation_steps=20,
        basis="none",
        progress=False,
    )
    assert density.num_matvecs == 40
    assert density.description["basis"] == "none"
    assert "2 probes of 20 steps" in str(density)
    np.testing.assert_array_equal(density.nodes, alone.nodes)


def test_the_default_takes_what_fits(key, monkeypatch):
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(spectra.ALL["outliers"], jnp.float32), key)
    for device, host, expected in [
        (10**6, 10**6, "device"),
        (70_000, 10**6, "host"),
        (30_000, 0, "none"),
    ]:
        free = Free(device, host)
        monkeypatch.setattr(run_module, "free_memory", lambda like, free=free: free)
        density = hd.spectral_density(
            operator, key, num_steps=16, deflation_steps=40, progress=False
        )
        assert density.description["basis"] == expected


def test_an_eigenspace_that_is_to_be_kept_has_a_basis(key, monkeypatch):
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(spectra.ALL["outliers"], jnp.float32), key)
    settings = {"num_steps": 8, "deflation_steps": 16, "progress": False}
    vector = 4 * operator.like.size
    for vectors, fits in [(40, True), (8, False)]:
        free = Free(vectors * vector, 0)
        monkeypatch.setattr(run_module, "free_memory", lambda like, free=free: free)
        assert hd.spectral_density(operator, key, **settings).num_matvecs == 32
        if fits:
            density = hd.spectral_density(operator, key, **settings, keep_eigenspace=True)
            assert density.eigenspace.rank == 16
        else:
            with pytest.raises(MemoryError, match="allow no way to keep the vectors"):
                hd.spectral_density(operator, key, **settings, keep_eigenspace=True)


def test_where_nothing_fits_plan_and_run_refuse_with_the_table(key, monkeypatch):
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(spectra.ALL["outliers"], jnp.float32), key)
    plan = hd.plan(operator, device_bytes=1, host_bytes=1, timed=False)
    assert plan.fitting is None
    assert "Nothing fits into the free memory" in str(plan)
    assert "chosen" not in str(plan)
    with pytest.raises(MemoryError, match=r"nothing fits[\s\S]*does not fit"):
        _ = plan.chosen
    monkeypatch.setattr(run_module, "free_memory", lambda like: Free(1, 1))
    for call in (
        lambda: hd.spectral_density(operator, key, progress=False),
        lambda: hd.spectral_density(operator, key, block_size=3, progress=False),
        lambda: hd.top_eigenspace(operator, key, 3, progress=False),
    ):
        with pytest.raises(
            MemoryError, match=r"allow no way[\s\S]*does not fit[\s\S]*Nothing fits"
        ):
            call()


def test_a_hessian_at_abstract_parameters_can_be_planned_and_nothing_else(key):
    loss, params, batch = mlp(np.float32, examples=60)
    data = hd.batches(batch, 20)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    hessian = hd.Hessian(loss, abstract, data)
    assert {leaf.dtype for leaf in jax.tree.leaves(hessian.like)} == {jnp.dtype("float32")}
    plan, concrete = (
        hd.plan(operator, timed=False) for operator in (hessian, hd.Hessian(loss, params, data))
    )
    assert plan.layouts == concrete.layouts
    assert plan.activation_bytes == concrete.activation_bytes > 0
    vector = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    for call in (lambda: hessian @ vector, hessian.gradient, lambda: hd.plan(hessian)):
        with pytest.raises(TypeError, match="params holds descriptions of arrays"):
            call()


def test_abstract_parameters_of_a_model_too_large_for_this_machine_take_no_memory():
    wide = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)

    def loss(w, x):
        return jnp.mean((x @ w[:1]) ** 2)

    plan = hd.plan(hd.Hessian(loss, wide, [jnp.ones((2, 1))]), timed=False)
    assert plan.vector_bytes == plan.weight_bytes == 4 * 10**12
    assert plan.fitting is None


def test_vectors_are_counted_by_their_shards():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    like = {
        "both": jax.ShapeDtypeStruct(
            (8, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "model"))
        ),
        "one": jax.ShapeDtypeStruct(
            (8, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("model"))
        ),
        "all": jax.ShapeDtypeStruct(
            (3,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
        ),
    }
    plan = hd.plan(hd.FunctionOperator(lambda v: v, like), timed=False)
    assert plan.vector_bytes == 4 * (8 + 16 + 3)
    assert plan.num_devices == 8
    assert "131 weights, spread over 8 devices" in str(plan)


def test_a_plan_can_be_read(key):
    text = str(hd.plan(hessian_of(), num_steps=10, num_probes=2, deflation_steps=20))
    print(text)
    for part in [
        "Plan of a spectral density: 55 weights",
        "weights 220 B, a vector 220 B, activations",
        "the run",
        "passes",
        "fits, chosen",
    ]:
        assert part in text
    hopeless = hd.plan(hessian_of(), device_bytes=1, host_bytes=1, timed=False)
    assert str(hopeless).count("does not fit") == len(hopeless.layouts)
    assert hopeless.seconds is None
    assert [format_bytes(size) for size in (0, 999, 1000, 123_456, 1.5e9, 2e12, 3.2e15)] == [
        "0 B",
        "999 B",
        "1 KB",
        "123 KB",
        "1.5 GB",
        "2 TB",
        "3,200 TB",
    ]


def test_activations_are_what_the_compiled_product_says():
    hessian = hessian_of(60, 60)
    plan = hd.plan(hessian, num_probes=2, timed=False)
    assert plan.activation_bytes == hessian.temporary_bytes(2) > 60 * 5 * 4
    assert plan.layouts[0].device_bytes == plan.activation_bytes + 220 * (56 + 4 * 2)


class Exhausting:
    """Its products need more than there is; XLA's own way to say so."""

    like = jax.ShapeDtypeStruct((5000,), jnp.float32)

    def __matmul__(self, block):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 40000000000 bytes.\nAllocator ..."
        )


def test_out_of_memory_is_answered_with_the_table(key):
    with pytest.raises(
        MemoryError, match=r"allocating 40000000000 bytes.\)[\s\S]*20 KB[\s\S]*fits, chosen"
    ) as caught:
        hd.spectral_density(Exhausting(), key, progress=False)
    assert caught.value.__suppress_context__
    with pytest.raises(
        MemoryError,
        match=r"a vector 20 KB[\s\S]*1.9 MB[\s\S]*A smaller basis_size \(at least",
    ):
        hd.top_eigenspace(Exhausting(), key, 10, progress=False)


@pytest.mark.parametrize(
    ("settings", "said"), [({"num_steps": 0}, "num_steps=0"), ({"num_probes": -1}, "num_probes")]
)
def test_settings_that_cannot_be_are_refused(settings, said, key):
    with pytest.raises(ValueError, match=said):
        hd.plan(hd.Matrix.from_eigenvalues(jnp.ones(3), key), **settings)
    with pytest.raises(TypeError, match="operator is a int"):
        hd.plan(3)


@pytest.mark.parametrize(
    ("computation", "settings", "products"),
    [
        ("spectral_density", {"num_steps": 4, "deflation_steps": 6}, 14),
        ("top_eigenspace", {"rank": 2, "max_matvecs": 40}, 40),
        ("spectral_measure", {"num_steps": 9}, 9),
        ("part_densities", {"num_steps": 4, "num_probes": 3}, 12),
        ("trace", {"num_matvecs": 20}, 20),
        ("track", {"rank": 2, "max_matvecs": 40, "num_steps": 4, "deflation_steps": 6}, 54),
    ],
)
def test_every_computation_has_a_plan(computation, settings, products):
    plan = hd.plan(hessian_of(), computation=computation, **settings, timed=False)
    assert plan.computation == computation
    assert plan.chosen.num_matvecs == products
    assert plan.chosen.device_bytes > plan.activation_bytes > 0
    assert f"Plan of a {computation.replace('_', ' ')}: 55 weights" in str(plan)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"computation": "spectrum"}, ValueError, "computation='spectrum', expected one of"),
        ({"computation": "trace"}, TypeError, "plan of trace: num_matvecs= is missing"),
        ({"rank": 3}, TypeError, "plan of spectral_density: rank= is unknown"),
        ({"computation": "top_eigenspace", "rank": 56}, ValueError, "rank=56, .* from 1 to 55"),
    ],
)
def test_a_plan_refuses_settings_that_its_computation_does_not_have(settings, error, said):
    with pytest.raises(error, match=said):
        hd.plan(hessian_of(), **settings, timed=False)
