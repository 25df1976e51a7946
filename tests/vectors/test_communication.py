"""What travels between devices, read from compiled programs: first the reader on closed forms, then
the theorems."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import _programs
from benchmarks._hlo import Collective, collectives, memory, sent
from hessdensity.distributed import make_mesh
from hessdensity.krylov import lanczos
from hessdensity.vectors import basis as bases
from hessdensity.vectors import trees

TINY = {"vocab_size": 8 * 131, "width": 256, "depth": 2, "num_heads": 4, "max_length": 64}


def mesh_of(**axes):
    names = tuple(axes)
    return jax.make_mesh(tuple(axes.values()), names, axis_types=(AxisType.Auto,) * len(names))


def abstract(shape, mesh, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def found_in(function, *arguments):
    return collectives(jax.jit(function).lower(*arguments).compile())


MANUAL = {
    "psum": (lambda x: lax.psum(x, "data"), ("all-reduce", 64, 2 * 7 / 8 * 4 * 64)),
    "all_gather": (lambda x: lax.all_gather(x, "data"), ("all-gather", 8 * 64, 7 / 8 * 4 * 8 * 64)),
    "psum_scatter": (
        lambda x: lax.psum_scatter(x, "data", tiled=True),
        ("reduce-scatter", 64, 7 / 8 * 4 * 64),
    ),
    "all_to_all": (
        lambda x: lax.all_to_all(x, "data", 0, 0, tiled=True),
        ("all-to-all", 64, 7 / 8 * 4 * 64),
    ),
    "ppermute": (
        lambda x: lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]),
        ("collective-permute", 64, 4 * 64),
    ),
    "halves": (
        lambda x: lax.psum(x, "data").astype(jnp.bfloat16),
        ("all-reduce", 64, 2 * 7 / 8 * 4 * 64),
    ),
}


@pytest.mark.parametrize("name", MANUAL)
def test_a_collective_of_known_size_is_counted_as_the_ring_says(name):
    function, (kind, elements, bytes_sent) = MANUAL[name]
    mesh = mesh_of(data=8)
    everywhere = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    assert found_in(everywhere, abstract((512,), mesh, "data")) == [
        Collective(kind, elements, bytes_sent, 1)
    ]


def test_what_the_partitioner_adds_is_counted_in_the_groups_that_it_uses():
    mesh = mesh_of(rows=2, columns=4)
    x = abstract((64, 128), mesh, "rows", "columns")
    assert found_in(lambda x: x.sum(0), x) == [Collective("all-reduce", 32, 2 * 1 / 2 * 4 * 32, 1)]
    assert found_in(lambda x: x.sum(1), x) == [Collective("all-reduce", 32, 2 * 3 / 4 * 4 * 32, 1)]
    (gathered,) = found_in(
        lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("rows"))), x
    )
    assert gathered == Collective("all-gather", 32 * 128, 3 / 4 * 4 * 32 * 128, 1)


def test_a_loop_counts_as_often_as_it_runs_loops_within_loops_too():
    mesh = mesh_of(data=8)
    x = abstract((512,), mesh, "data")

    def sweep(x):
        def step(total, _):
            return lax.fori_loop(0, 3, lambda _, t: t + jnp.cos(t[None] + x).sum(), total), None

        return lax.scan(step, jnp.zeros((), x.dtype), length=5)[0]

    found = found_in(sweep, x)
    assert sum(each.elements * each.times for each in found) == 15
    assert sent(found) == pytest.approx(15 * 2 * 7 / 8 * 4)
    assert sent(found, scatter=True) == sent(found) / 2


def test_a_loop_of_unknown_length_is_refused():
    mesh = mesh_of(data=8)
    x = abstract((512,), mesh, "data")

    def climb(x):
        return lax.while_loop(
            lambda t: t < 1, lambda t: t + jnp.cos(t[None] + x).sum(), jnp.zeros((), x.dtype)
        )

    with pytest.raises(ValueError, match="unknown length"):
        found_in(climb, x)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "%s = (f32[8], f32[64]) all-gather-start(%x), replica_groups=[1,8]<=[8], "
            "dimensions={0}",
            ("all-gather", 64, 7 / 8 * 256),
        ),
        (
            "%s = (f32[64], f32[64], u32[], u32[]) collective-permute-start(%x), "
            "source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", 64, 256),
        ),
        (
            "%s = bf16[64]{0:T(1024)} all-reduce-start(%x), replica_groups={{0,1},{2,3}}, "
            "to_apply=%add",
            ("all-reduce", 64, 128),
        ),
        (
            "%s = pred[4] all-reduce(%x), replica_groups=mesh['x'=2,'y'=4], device_ids=([8]T(0)) "
            "{'x','y':(1)2}",
            ("all-reduce", 4, 6),
        ),
    ],
)
def test_the_forms_of_other_compilers_are_read(line, expected):
    text = f"HloModule m\n\nENTRY %main (x: f32[8]) -> f32[64] {{\n  {line}\n}}\n"
    assert collectives(SimpleNamespace(as_text=lambda: text)) == [Collective(*expected, 1)]


def test_groups_that_are_not_understood_are_refused():
    line = "%s = f32[8] all-reduce(%x), replica_groups=new, to_apply=%add"
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n"
    with pytest.raises(ValueError, match="not understood"):
        collectives(SimpleNamespace(as_text=lambda: text))


# The theorems -------------------------------------------------------------------------------------

# Shards on the first, the last and a middle axis; long axes, odd ones, no power of two anywhere but
# the devices'.
LEAVES = [
    ((4096,), "data"),
    ((8 * 1031,), "data"),
    ((50, 2048), None, "data"),
    ((2048, 50), "data"),
    ((1031, 56), None, "data"),
    ((56, 1031), "data"),
    ((3, 3, 16, 24), None, None, None, "data"),
    ((3, 16, 24), None, "data", None),
    ((3, 1031),),
    ((),),
    ((0, 4096), None, "data"),
]


def test_the_algebra_on_sharded_vectors_sends_scalars_alone_whatever_the_leaves():
    mesh = mesh_of(data=8)
    like = [abstract(shape, mesh, *spec) for shape, *spec in LEAVES]
    for name, kernel in _programs.kernels(like, 2).items():
        for each in collectives(kernel):
            assert each.kind == "all-reduce", name
            assert each.elements <= 2 * lanczos.CHUNK * len(LEAVES), name


def test_a_chunk_keeps_the_shards_of_its_vectors_on_two_mesh_axes_too():
    mesh = mesh_of(data=4, model=2)
    like = {
        "a": abstract((24, 2048), mesh, "data", "model"),
        "b": abstract((8 * 1031,), mesh, ("data", "model")),
    }
    vectors = _programs.block(like, 2)
    chunk = bases.first_row.lower(vectors).compile()
    assert memory(chunk).outputs == pytest.approx(8 * memory(chunk).arguments, rel=1e-3)
    shapes = jax.eval_shape(bases.first_row, vectors)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        chunk.output_shardings,
    )
    (found,) = found_in(bases.inner_products, placed, vectors)[:1]
    assert found.elements <= 2 * 8 * len(like)


@pytest.mark.parametrize("case", LEAVES, ids=str)
def test_inner_products_of_sharded_vectors_are_those_of_float64(case):
    shape, *spec = case
    mesh, rng = mesh_of(data=8), np.random.default_rng(0)
    a, b = (rng.uniform(0, 1, (2, *shape)).astype(np.float32) for _ in range(2))
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, *spec))) for x in (a, b)]
    rows = [x.astype(float).reshape(2, -1) for x in (a, b)]
    np.testing.assert_allclose(jax.jit(trees.inner)(*placed), (rows[0] * rows[1]).sum(1), rtol=1e-6)
    chunk = bases.first_row(placed[0])
    coefficients = bases.inner_products(chunk, placed[1])
    np.testing.assert_allclose(coefficients[:, 0], (rows[0] * rows[1]).sum(1), rtol=1e-6)
    left = jax.jit(bases.subtract_combination)(placed[1], jnp.full((2, 4), 0.5, jnp.float32), chunk)
    np.testing.assert_allclose(left, b - np.float32(0.5) * a, atol=1e-6)


@pytest.fixture(scope="module")
def problem():
    return _programs.transformer(make_mesh(), 16, **TINY)


@pytest.fixture(scope="module")
def kernels(problem):
    _, params, _ = problem
    return _programs.kernels(params, 2)


@pytest.fixture(scope="module")
def sent_by_gradient(problem):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # Flax's own
        return sent(collectives(_programs.gradient(*problem)))


def test_an_update_of_lanczos_sends_scalars_alone(problem, kernels):
    _, params, _ = problem
    sharded = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    steps, deflation = 45, 90
    for basis, bound in {"device": 2 * (steps + 2 * deflation + 40), "none": 20}.items():
        calls = _programs.calls(steps, deflation, basis)
        found = [
            each for name, times in calls.items() for each in collectives(kernels[name]) * times
        ]
        assert {each.kind for each in found} == {"all-reduce"}
        assert sum(each.elements * each.times for each in found) <= sharded * bound


@pytest.mark.parametrize("count", [1, 2])
def test_products_with_k_vectors_send_at_most_twice_k_gradients_and_keep_their_shards(
    problem, sent_by_gradient, count
):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        product = _programs.product(*problem, count)
    vectors, (shardings, _) = _programs.block(problem[1], count), product.output_shardings
    for leaf, sharding in zip(jax.tree.leaves(vectors), jax.tree.leaves(shardings), strict=True):
        assert sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert 0 < sent(collectives(product)) <= 2.1 * count * sent_by_gradient


def test_a_device_holds_its_share_of_every_vector_and_of_the_basis(problem, kernels):
    _, params, _ = problem
    small = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.sharding.is_fully_replicated)
    share = 4 * ((trees.size(params) - small) / 8 + small)
    tables = 8 * 64  # XLA's pointers to the leaves
    assert memory(kernels["normalize"]).outputs == pytest.approx(2 * share, abs=tables)
    assert memory(kernels["new chunk"]).outputs == pytest.approx(
        2 * lanczos.CHUNK * share, abs=tables
    )
    whole = 4 * trees.size(params)
    assert whole / share >= 7.5
    for name in ("coefficients", "subtract", "write row", "recur", "norm"):
        assert memory(kernels[name]).temporaries < 0.1 * share, name
