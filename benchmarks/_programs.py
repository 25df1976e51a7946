"""The package's compiled programs for parameters that are shapes and shardings alone: nothing is
allocated or run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.models.stacked_gpt import StackedGPT
from hessdensity import losses
from hessdensity.losses import total
from hessdensity.distributed import place
from hessdensity.krylov import lanczos
from hessdensity.operators import derivatives as _products
from hessdensity.vectors import basis as _gram_schmidt
from hessdensity.vectors import chunks as _basis
from hessdensity.vectors import trees

PyTree = Any


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
    return total._add_gradient.lower(jax.tree_util.Partial(loss), params, params, batch).compile()


def product(loss: Callable, params: PyTree, batch: PyTree, count: int) -> Any:
    """The products of one batch with a block of ``count`` vectors."""
    vectors, mode = block(params, count), _products.FORWARD_OVER_REVERSE
    lowered = _products.add_products.lower(
        jax.tree_util.Partial(loss), params, vectors, vectors, batch, mode=mode
    )
    return lowered.compile()


def kernels(like: PyTree, count: int) -> dict[str, Any]:
    """The kernels of a Lanczos update of ``count`` probes; those marked "against" read the
    deflation's basis."""
    vectors, scalars = block(like, count), jax.ShapeDtypeStruct((count,), trees.scalar_dtype(like))
    factors = jax.ShapeDtypeStruct((count, lanczos.CHUNK), scalars.dtype)
    new_chunk = jax.jit(partial(_basis.chunk, rows=lanczos.CHUNK))
    compiled = {
        "recur": lanczos._recur.lower(vectors, vectors, vectors, scalars),
        "norm": jax.jit(trees.norm).lower(vectors),
        "normalize": lanczos._normalize.lower(vectors, scalars),
        "new chunk": new_chunk.lower(vectors),
        "local": _gram_schmidt._orthogonalize_locally.lower(vectors, vectors, vectors),
    }
    compiled = {name: lowered.compile() for name, lowered in compiled.items()}
    for name, probes in {"": vectors, " against": block(like, 1)}.items():
        made = new_chunk.lower(probes)
        shapes, shardings = made.out_info, made.compile().output_shardings
        chunk = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        subtract = partial(jax.jit, donate_argnums=0)(_basis.subtract_combination)
        write = partial(jax.jit, donate_argnums=0)(_basis.write_row)
        compiled["coefficients" + name] = (
            jax.jit(_basis.coefficients).lower(chunk, vectors).compile()
        )
        compiled["subtract" + name] = subtract.lower(vectors, factors, chunk).compile()
        if not name:
            compiled["write row"] = write.lower(
                chunk, vectors, jax.ShapeDtypeStruct((), jnp.int32)
            ).compile()
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
        "coefficients against": 2
        * against,  # once for what couples them, once more for the rounding of that
        "subtract against": 2 * against,
    }
