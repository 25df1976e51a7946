"""The block-diagonal part of a Hessian: one block for each group of leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.data.passes import Count
from hessdensity.losses.composed import bind
from hessdensity.losses.kernels import REVERSE_OVER_REVERSE, Kernel, divide, refuses_forward
from hessdensity.losses.risk import EmpiricalRisk
from hessdensity.losses.total import Loss, Total
from hessdensity.operators.algebra import Wrapper
from hessdensity.operators.derivatives import PRODUCTS, group_size, program_bytes
from hessdensity.operators.hessian import Hessian
from hessdensity.operators.protocol import check_count, check_key
from hessdensity.spectra.estimate import Estimate
from hessdensity.vectors import trees
from hessdensity.vectors.random import random_block
from hessdensity.vectors.trees import Block, PyTree, Vector

from .find import Layer
from .partition import Group, Groups, LeafSlice, group_of, partition

# Tangents in a program. More share the gradient that all of them need, and take longer to compile.
_TANGENTS = 16


@dataclass(frozen=True)
class BlockProducts:
    """A kernel: products of the blocks of a batch's matrix, each with its own vectors.

    For each group, it takes derivatives by the leaves of this group alone. All other leaves are
    constants, whose tangents and gradients the program does not contain.
    """

    groups: tuple[Group, ...]
    """The groups."""
    products: Kernel
    """The kernel of the products with one block, such as one of `derivatives.PRODUCTS`."""

    def __call__(
        self, loss: Loss, params: Vector, batch: PyTree, vectors: dict[int, Block]
    ) -> tuple[Total, dict[int, Block]]:
        """The batch's loss, and the products of some groups with their vectors."""
        found = {}
        for number, block in vectors.items():
            group = self.groups[number]
            own = bind(group, loss, params)
            total, found[number] = self.products(own, group.take(params), batch, block)
        return total, found


class BlockDiagonal(Wrapper):
    """The block-diagonal part of a Hessian: a block for each group of leaves, and zeros elsewhere.

    All blocks are multiplied in one pass over the data. For each group, this takes the derivative
    of the gradient by its leaves alone. The groups share the gradient that they all need.

    Args:
      hessian: the `Hessian`.
      groups: a mapping from names to globs, predicates or parts of leaves (`slices`); or globs,
        which are then also the names; or None for one group for each leaf. Every entry must be in
        one group.

    Raises:
      TypeError: ``hessian`` is not a `Hessian`.
      ValueError: a group matches no leaf, groups overlap, or leaves are in no group.

    Cost: a product with one vector is one pass over the data and costs about 1 + L/3 gradients for
    L layers of a network, while a full product costs about two.

    Example:
      >>> import jax.numpy as jnp, hessdensity as hd
      >>> loss = lambda p, x: jnp.mean((x @ p["a"] * p["b"]) ** 2)
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(())}
      >>> blocks = hd.BlockDiagonal(hd.Hessian(loss, params, [jnp.eye(2)]))
      >>> blocks @ {"a": jnp.ones(2), "b": jnp.ones(())}
      {'a': Array([1., 1.], dtype=float32), 'b': Array(2., dtype=float32)}
    """

    def __init__(self, hessian: Hessian, groups: Groups = None) -> None:
        _check_hessian(hessian)
        super().__init__(hessian)
        self.hessian = hessian
        """The whole Hessian."""
        self.groups: Mapping[str, Group] = partition(hessian.like, groups)
        """The groups by name."""

    def __matmul__(self, vectors: Block | Vector) -> Block | Vector:
        block, single = trees.as_block(vectors, self.like)
        product = self.join(self.multiply(self.split(block)), block)
        return trees.first_vector(product) if single else product

    def split(self, block: Block) -> dict[str, Block]:
        """The parts of a block of vectors that belong to each group."""
        return {name: group.take(block, 1) for name, group in self.groups.items()}

    def join(self, parts: Mapping[str, Block], block: Block) -> Block:
        """A block of vectors with the parts of some groups replaced."""
        for name, part in parts.items():
            block = self.groups[name].put(block, part, 1)
        return block

    def multiply(
        self, parts: Mapping[str, Block], needed: Collection[str] | None = None
    ) -> dict[str, Block]:
        """The product of each block with its own vectors, in one pass over the data.

        Args:
          parts: for each group, a block of k vectors like its part of ``like``.
          needed: the groups whose products are wanted; by default all. A program whose groups are
            not needed is not run.
        """
        names = list(self.groups)
        (count,) = {trees.count(part) for part in parts.values()}
        size = group_size(self.like, count)
        wanted = set(names if needed is None else needed)
        programs = [each for each in self.programs(size) if wanted & {names[i] for i in each}]
        calls = [
            {i: trees.split(parts[names[i]], size)[piece] for i in program}
            for program in programs
            for piece in range(-(-count // size))
        ]

        risk = self.hessian.risk
        try:
            sums, total = self._sums(calls)
        except TypeError as error:
            if risk.mode == REVERSE_OVER_REVERSE or not refuses_forward(error):
                raise
            # The Hessian changes its mode, checks it and says so.
            self.hessian @ self.join(parts, trees.zeros(self.like, count))
            sums, total = self._sums(calls)
        found: dict[str, list[Block]] = {}
        for result in sums:
            for number, product in result.items():
                found.setdefault(names[number], []).append(product)
        return {name: divide(trees.join(pieces), total) for name, pieces in found.items()}

    def _sums(self, calls: list[dict[int, Block]]) -> tuple[list[dict[int, Block]], Count]:
        """The sums of the products of some calls over the data, and the number of examples."""
        risk = self.hessian.risk
        (sums,), (total,) = risk.sum_parts(
            BlockProducts(tuple(self.groups.values()), PRODUCTS[risk.mode]),
            [[(call,) for call in calls]],
            [[jax.tree.map(jnp.zeros_like, call) for call in calls]],
            what="a Hessian-vector product",
        )
        return sums, total

    def programs(self, size: int) -> list[list[int]]:
        """The groups of each program. Those of similar size are done at the same time."""
        parts = [trees.size(group.take(self.like)) for group in self.groups.values()]
        order = [int(i) for i in np.argsort(parts, kind="stable")]
        most = max(_TANGENTS // size, 1)
        return [order[i : i + most] for i in range(0, len(order), most)]

    def cosine(self, key: jax.Array, num_vectors: int = 10) -> Estimate:
        """The cosine between products with the block-diagonal part and with the whole Hessian.

        For random v, it is E[Bv . Hv] / sqrt(E[|Bv|^2] E[|Hv|^2]) = |B| / |H| in Frobenius norms,
        because the blocks and the rest of H are orthogonal. It is 1 if the Hessian is
        block-diagonal.

        Args:
          key: JAX random key of the vectors.
          num_vectors: the number of vectors.

        Returns:
          `Estimate`: the root of the ratio of the mean squared lengths |Bv|^2 and |Hv|^2, with the
          standard error of the delta method.

        Raises:
          ValueError: the Hessian is zero.

        Cost: num_vectors products of each kind, in two passes over the data.
        """
        check_key(key)
        check_count("num_vectors", num_vectors, 2)
        block = random_block(key, 0, num_vectors, self.like)
        own = np.asarray(trees.norm(self @ block), float) ** 2
        whole = np.asarray(trees.norm(self.hessian @ block), float) ** 2
        if not whole.any():
            raise ValueError("the Hessian is zero, so the cosine is not defined.")
        ratio = own.mean() / whole.mean()
        spread = np.std(own - ratio * whole, ddof=1) / np.sqrt(num_vectors) / whole.mean()
        value = float(np.sqrt(ratio))
        error = float(spread / (2 * value)) if value else 0.0
        return Estimate(value, error, max(value - 1.96 * error, 0.0), min(value + 1.96 * error, 1))

    def temporary_bytes(self, num_vectors: int) -> int:
        """Bytes on each device that a product needs in addition to its arguments and results.

        They are those of the program with the largest groups.
        """
        groups = tuple(self.groups.values())
        size = group_size(self.like, num_vectors)
        program = self.programs(size)[-1]
        return program_bytes(
            self.hessian.risk,
            lambda mode: BlockProducts(groups, PRODUCTS[mode]),
            {i: groups[i].take(self.like) for i in program},
            size,
        )

    def describe(self) -> dict[str, Any]:
        """The description of the Hessian, and the groups."""
        names = trees.paths(self.like)
        groups = {name: group.describe(names) for name, group in self.groups.items()}
        return {**self.hessian.describe(), "kind": "BlockDiagonal", "groups": groups}


def layer_hessian(hessian: Hessian, layer: str | Layer | LeafSlice) -> Hessian:
    """The Hessian of one layer: a block of the diagonal.

    Args:
      hessian: the `Hessian`.
      layer: a `Layer` of `find_layers`, whose kernel is taken; or the path of a leaf, of a module
        (``"Dense_0"`` for all of its leaves), or a glob; or a part of a leaf (`slices`).

    Returns:
      A `Hessian`. Its vectors have None in place of the other leaves, as with ``where=``.

    Raises:
      TypeError: ``hessian`` is not a `Hessian`.
      ValueError: nothing matches (the message lists the paths), or the layer has only a part of a
        leaf, which `slices` describes.

    Cost: none. A product costs about two gradients, and less for a layer near the outputs.

    Example:
      >>> import jax.numpy as jnp, hessdensity as hd
      >>> loss = lambda p, x: jnp.mean((x @ p["a"] * p["b"]) ** 2)
      >>> hessian = hd.Hessian(loss, {"a": jnp.ones(2), "b": jnp.ones(())}, [jnp.eye(2)])
      >>> hd.dense(hd.layer_hessian(hessian, "a")).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    _check_hessian(hessian)
    if isinstance(layer, LeafSlice):
        return of_group(hessian, group_of(hessian.like, "layer", layer))
    if isinstance(layer, Layer):
        if layer.path != layer.leaf:
            raise ValueError(
                f"layer={layer.path!r} has only a part of the leaf {layer.leaf!r}. Describe it by "
                f"an axis and a number of parts, as hd.slices({layer.leaf!r}, axis, parts) does."
            )
        layer = layer.leaf
    names = trees.paths(hessian.like)
    if layer in names:
        return hessian.restrict(lambda path: path == layer)
    if any(name.startswith(f"{layer}/") for name in names):
        return hessian.restrict(lambda path: path.startswith(f"{layer}/"))
    return hessian.restrict(layer)


def of_group(hessian: Hessian, group: Group) -> Hessian:
    """The Hessian as a function of a group's part of the parameters alone."""
    risk = hessian.risk
    own = EmpiricalRisk(
        bind(group, risk.loss, risk.params),
        group.take(risk.params),
        risk.passes.forgetful(),
        precision=risk.precision,
    )
    own.whole_batch = risk.whole_batch
    return Hessian.of(own)


def _check_hessian(hessian: Any) -> None:
    if not isinstance(hessian, Hessian):
        raise TypeError(
            f"hessian is a {type(hessian).__name__}; expected hd.Hessian(loss, params, data)."
        )
