"""The package's compiled programs for parameters that are shapes and shardings alone: nothing is
allocated or run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.models.stacked_gpt import StackedGPT
from hessdensity import losses
from hessdensity.distributed import place
from hessdensity.krylov import lanczos
from hessdensity.losses import kernels as kernels_of
from hessdensity.operators.derivatives import PRODUCTS
from hessdensity.vectors import basis as bases
from hessdensity.vectors import orthogonalize, trees
from hessdensity.vectors.trees import PyTree


def transformer(
    mesh: Mesh, batch: int, **sizes: int
) -> tuple[Callable, PyTree, jax.ShapeDtypeStruct]:
    """(loss, params, tokens) of a `StackedGPT`, fully sharded over the mesh, tokens too."""
    model = StackedGPT(mesh, **sizes)
    tokens = jax.ShapeDtypeStruct(
        (batch, sizes["max_length"]), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    params = jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens)["params"], tokens)

    def loss(params: PyTree, tokens: jax.Array) -> losses.Total:
        return losses.next_token_cross_entropy(model.apply({"params": params}, tokens), tokens)

    return loss, place(params, mesh), tokens


def block(like: PyTree, count: int) -> PyTree:
    """An abstract block of vectors, each sharded as ``like`` is."""

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (count, *leaf.shape), leaf.dtype, sharding=trees.stacked_sharding(leaf, 1)
        )

    return jax.tree.map(stack, like)


def gradient(loss: Callable, params: PyTree, batch: PyTree) -> Any:
    """The gradient of one batch."""
    loss = jax.tree_util.Partial(loss)
    return kernels_of.add_batch.lower(
        kernels_of.gradient_kernel, loss, params, batch, (), params
    ).compile()


def product(loss: Callable, params: PyTree, batch: PyTree, count: int) -> Any:
    """The products of one batch with a block of ``count`` vectors."""
    vectors, loss = block(params, count), jax.tree_util.Partial(loss)
    kernel = PRODUCTS[kernels_of.FORWARD_OVER_REVERSE]
    return kernels_of.add_batch.lower(kernel, loss, params, batch, (vectors,), vectors).compile()


def kernels(like: PyTree, count: int) -> dict[str, Any]:
    """The kernels of a Lanczos update of ``count`` probes; those marked "against" read the
    deflation's basis."""
    vectors, scalars = block(like, count), jax.ShapeDtypeStruct((count,), trees.scalar_dtype(like))
    factors = jax.ShapeDtypeStruct((count, lanczos.CHUNK), scalars.dtype)
    compiled = {
        "recur": lanczos._recur.lower(vectors, vectors, vectors, scalars),
        "norm": trees.norm.lower(vectors),
        "normalize": trees.normalize.lower(vectors, scalars),
        "new chunk": bases.first_row.lower(vectors),
        "local": orthogonalize._orthogonalize_locally.lower(vectors, vectors, vectors),
    }
    compiled = {name: lowered.compile() for name, lowered in compiled.items()}
    for name, probes in {"": vectors, " against": block(like, 1)}.items():
        made = bases.first_row.lower(probes)
        shapes, shardings = made.out_info, made.compile().output_shardings
        chunk = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        compiled["coefficients" + name] = bases.inner_products.lower(chunk, vectors).compile()
        subtract = bases.subtract_in_place.lower(vectors, factors, chunk)
        compiled["subtract" + name] = subtract.compile()
        if not name:
            row = jax.ShapeDtypeStruct((), jnp.int32)
            compiled["write row"] = bases.write_row.lower(chunk, vectors, row).compile()
    return compiled


def calls(num_steps: int, deflation_steps: int, basis: str = "device") -> dict[str, int]:
    """How often the last update of a run calls each kernel, where orthogonalizing once is enough,
    as it mostly is."""
    chunks, against = (-(-steps // lanczos.CHUNK) for steps in (num_steps, deflation_steps))
    if basis == "none":
        return {"recur": 1, "local": 1, "normalize": 1}
    return {
        "recur": 1,
        "norm": 2,
        "normalize": 1,
        "write row": 1,
        "coefficients": chunks,
        "subtract": chunks,
        # The first time for the coupling, the second time for its rounding error.
        "coefficients against": 2 * against,
        "subtract against": 2 * against,
    }
