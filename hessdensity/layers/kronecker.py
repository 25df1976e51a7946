"""Compute the Kronecker factors of all layers in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.losses import roots
from hessdensity.losses.composed import ComposedLoss, parts
from hessdensity.losses.risk import EmpiricalRisk
from hessdensity.operators import gauss_newton
from hessdensity.operators.derivatives import equal_size
from hessdensity.operators.hessian import Hessian
from hessdensity.operators.protocol import check_count, check_key
from hessdensity.vectors import trees
from hessdensity.vectors.random import random_block
from hessdensity.vectors.selection import Where, select
from hessdensity.vectors.trees import PyTree

from .blocks import BlockDiagonal, BlockProducts
from .factor_sums import FactorSums, mixed_rows, non_finite_inputs
from .factors import KroneckerFactors
from .find import Layer, find_layers
from .layer_factors import LayerFactors
from .output_hessians import output_hessians

KINDS = ("gauss-newton", "hessian")

_ROWS = 16  # rows of the criterion's root that one program pulls back together
_MOST_ROWS = 4096  # with more outputs, exact factors must be asked for by a number of samples
_AGREE = 1e-3  # the largest relative difference of a batch's loss and its examples' losses


def kronecker_factors(
    loss: ComposedLoss,
    params: PyTree,
    data: Any,
    *,
    where: Where = "*",
    kind: str = "gauss-newton",
    num_samples: int | None = None,
    key: jax.Array | None = None,
    bias: bool = True,
    across: bool = False,
    precision: str | None = "highest",
    data_axis: str | None = "data",
    microbatch: int | None = None,
) -> KroneckerFactors:
    """Compute E[x x^T] and E[M] of every linear layer, over all examples.

    For a layer z = W x, the block of the Hessian is E[x x^T (x) M], where M is the second
    derivative of an example's loss by z. The decoupling conjecture says that it is close to
    E[x x^T] (x) E[M] (Wu, Zhu, Wu, Wang and Ge 2020; Martens and Grosse 2015, for the Fisher
    matrix). The layers are found in the model's jaxpr (`find_layers`).

    Convolutions and other layers with several positions p in an example: E[x x^T] is the mean over
    examples of the sum over positions, and E[M] the mean over examples and positions of the blocks
    of M that belong to one position. `layer_hessian` has the exact block, with all pairs of
    positions.

    Args:
      loss: a loss with two parts, of `compose` or an adapter.
      params: pytree of parameters.
      data: batches (inputs, *targets), as for `Hessian`.
      where: the kernels, as a glob on their paths or a predicate.
      kind: ``"gauss-newton"``: M = J^T A J, with the Jacobian J of the outputs by z and the second
        derivative A of the criterion. It is exact, by one backward pass for each output. It equals
        the Hessian's M in networks that are piecewise linear behind the layer. ``"hessian"``: the
        whole second derivative, by one Hessian product for each of the layer's outputs.
      num_samples: estimate E[M] by this many random rows of A for each example, instead of one for
        each output. After training the curvature lies in rare examples, so that one sample has an
        error of about 100 %, and 16 one of 20 %. Use it only for outputs in thousands. For
        ``"hessian"``, it is the number of random signs over the positions of an example.
      key: JAX random key of the samples and of the check for ``exact``; by default
        ``jax.random.key(0)``.
      bias: whether biases are part of the layers' vectors, with 1 as their input.
      across: also compute E[M] of all layers' outputs together, for `full_eigenspace`.
      precision: as for `Hessian`.
      data_axis: as for `Hessian`.
      microbatch: as for `Hessian`. A batch takes as much memory as ``16 x`` its activations.

    Returns:
      `KroneckerFactors`. Its ``exact`` says for each layer whether the Gauss-Newton matrix is the
      Hessian, decided by one product of each.

    Raises:
      TypeError: ``loss`` has no separate outputs and criterion, or its criterion cannot be sampled.
      ValueError: no layer matches, the kind is unknown, the model has too many outputs for exact
        factors, or the examples of a batch depend on each other.
      FloatingPointError: a sum is not finite. The message names the first layer.

    Cost: one pass over the data (two with the check for ``exact``). With c outputs, each batch
    costs about 1 + c / 3 gradients, and the products x x^T of all layers.

    Example:
      >>> import jax, jax.numpy as jnp, hessdensity as hd
      >>> from hessdensity import losses
      >>> loss = hd.compose(lambda w, x: x @ w, losses.mean_squared_error)
      >>> data = [(jnp.eye(3), jnp.zeros((3, 2)))]
      >>> factors = hd.kronecker_factors(loss, jnp.ones((3, 2)), data)
      >>> factors.eigenvalues().round(4).tolist()
      [0.3333, 0.3333, 0.3333, 0.3333, 0.3333, 0.3333]
    """
    if not isinstance(loss, ComposedLoss):
        raise TypeError(
            f"loss is a {type(loss).__name__}, whose outputs and criterion are not known; expected "
            "hd.compose(outputs, criterion), or the loss of an adapter."
        )
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}, expected 'gauss-newton' or 'hessian'.")
    key = jax.random.key(0) if key is None else key
    check_key(key)
    if num_samples is not None:
        check_count("num_samples", num_samples)
    risk = EmpiricalRisk(
        loss, params, data, precision=precision, data_axis=data_axis, microbatch=microbatch
    )
    piece = risk.first_piece()
    layers = _chosen(risk, piece, where)
    _check_rows(risk, piece, layers)
    samples = num_samples if kind == "gauss-newton" else None
    with_rows = kind == "gauss-newton" or across
    sums = _sums(risk, piece, layers, samples, across, key, with_rows)
    _check_examples(risk, sums)
    if kind == "hessian":
        outputs = jax.device_get(output_hessians(risk, layers, num_samples, key))
    else:
        outputs = sums["outputs"]
    deviations = _deviations(risk, layers, key) if kind == "gauss-newton" else {}
    found = {
        path: _layer_factors(layer, sums, outputs[path], deviations.get(path))
        for path, layer in layers.items()
    }
    description = {"factor": kind, "num_samples": num_samples, "data": risk.describe()}
    whole = np.asarray(sums["across"]) / float(sums["examples"]) if across else None
    return KroneckerFactors(found, risk.like, bias, description, whole)


def _chosen(risk: EmpiricalRisk, piece: PyTree, where: Where) -> dict[str, Layer]:
    """The layers whose kernels match."""
    assert isinstance(risk.loss, ComposedLoss)
    inputs, *_ = parts(piece)
    layers = find_layers(risk.loss.outputs, risk.params, inputs)
    if not layers:
        raise ValueError(
            "the model has no linear layer whose kernel is a leaf of params. Its leaves are used "
            f"as follows.\n{layers}"
        )
    shapes = {path: np.zeros(()) for path in layers}
    try:
        chosen = select(shapes, where).chosen
    except ValueError as error:
        others = "".join(f"\n  {name}: {reason}" for name, reason in layers.others.items())
        raise ValueError(f"{error}\nThe other leaves are not layers:{others}") from None
    return {path: layers[path] for path, own in zip(sorted(shapes), chosen, strict=True) if own}


def _sums(
    risk: EmpiricalRisk,
    piece: PyTree,
    layers: dict[str, Layer],
    num_samples: int | None,
    across: bool,
    key: jax.Array,
    with_rows: bool,
) -> dict[str, Any]:
    """The sums over the data of what the factors need, on the host."""
    count, kernel = 1, FactorSums(tuple(layers), False, None)
    calls: list[dict[str, Any]] = [{}]
    if with_rows:
        count, kernel, rows = _calls(risk, piece, tuple(layers), num_samples, across, key)
        calls = [{"outputs": each} for each in rows]
    calls[0]["inputs"] = ()
    arguments = [(call,) for call in calls]
    try:
        (found,), _ = risk.sum_parts(
            kernel, [arguments], [[None] * len(arguments)], what="a Kronecker factor"
        )
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} {_where_not_finite(risk, tuple(layers))}") from error
    found = jax.device_get(found)
    sums = dict(found[0])
    for name in {"outputs", "across"} & set(sums):
        every = [each[name] for each in found]
        sums[name] = jax.tree.map(lambda *leaves: sum(np.asarray(x, float) for x in leaves), *every)
        sums[name] = jax.tree.map(lambda leaf: leaf / count, sums[name])
    return sums


def _calls(
    risk: EmpiricalRisk,
    piece: PyTree,
    paths: tuple[str, ...],
    num_samples: int | None,
    across: bool,
    key: jax.Array,
) -> tuple[int, FactorSums, list[jax.Array]]:
    """(the number by which sums are divided, the kernel, its first argument in each call)."""
    assert isinstance(risk.loss, ComposedLoss)
    criterion = risk.loss.criterion
    if num_samples is not None:
        if criterion not in roots.SAMPLED:
            allowed = ", ".join(f"losses.{each.__name__}" for each in roots.SAMPLED)
            raise TypeError(
                f"criterion {getattr(criterion, '__name__', criterion)!r} cannot be sampled, "
                f"because its law is not known; expected one of {allowed}. Or leave num_samples "
                "out."
            )
        each = equal_size(num_samples, _ROWS)
        calls = -(-num_samples // each)
        return calls, FactorSums(paths, across, each), list(jax.random.split(key, calls))
    inputs, *_ = parts(piece)
    outputs = jax.eval_shape(risk.loss.outputs, risk.params, inputs)
    if not hasattr(outputs, "shape"):
        raise TypeError(
            f"outputs returns a {type(outputs).__name__}; expected one array, (examples, ...)."
        )
    number = roots.num_rows(outputs)
    if number > _MOST_ROWS:
        raise ValueError(
            f"an example has {number:,} outputs, shape {list(outputs.shape[1:])}, so that exact "
            f"factors take {number:,} backward passes. Give num_samples= for random ones."
        )
    each = equal_size(number, _ROWS)
    rows = [jnp.arange(first, first + each) for first in range(0, number, each)]
    return 1, FactorSums(paths, across, None), rows


def _where_not_finite(risk: EmpiricalRisk, paths: tuple[str, ...]) -> str:
    """The first layer whose inputs are not finite, in a sentence."""
    for _, piece in risk.passes:
        counts = non_finite_inputs(risk.loss, risk.params, piece, paths)
        for path in paths:
            if int(counts[path]):
                return f"The inputs of layer {path!r} have {int(counts[path])} such entries."
    return "The inputs of all layers are finite, so it is behind the last layer."


def _check_rows(risk: EmpiricalRisk, piece: PyTree, layers: dict[str, Layer]) -> None:
    """Raise ValueError if a layer's inputs for one example depend on another example."""
    with jax.default_matmul_precision(risk.precision):
        mixed = mixed_rows(risk.loss, risk.params, piece, tuple(layers))
    for path, change in jax.device_get(mixed).items():
        if change > _AGREE:
            raise ValueError(
                f"layer {path!r}: inputs that are taken for those of one example change by "
                f"{change:.1g} with another example. Either examples depend on each other, as with "
                "batch statistics. Or the model has folded its examples behind another axis, such "
                "as (time, batch) into one axis; put the batch first."
            )


def _check_examples(risk: EmpiricalRisk, sums: dict[str, Any]) -> None:
    """Raise ValueError if the loss is not the sum of the losses of the examples by themselves."""
    mean = risk.describe()["loss"]
    other = float(sums["each"]) / float(sums["examples"])
    if abs(mean - other) > _AGREE * max(abs(mean), abs(other)):
        raise ValueError(
            f"the mean loss is {mean:.6g}, but {other:.6g} if the criterion gets one example at a "
            "time. The factors need examples that do not depend on each other, and a criterion "
            "that returns their mean or hd.Total(sum, count)."
        )


def _layer_factors(
    layer: Layer, sums: dict[str, Any], output: Any, deviation: float | None
) -> LayerFactors:
    """The factors of a layer from the sums over the data."""
    examples = float(sums["examples"])
    inputs = sums["inputs"][layer.path]
    places = float(inputs["positions"])
    return LayerFactors(
        layer,
        np.asarray(inputs["square"], float) / examples,
        np.asarray(output, float) / places,
        np.asarray(inputs["sum"], float) / places,
        np.asarray(inputs["active"], float) / places,
        places / examples,
        deviation,
    )


def _deviations(risk: EmpiricalRisk, layers: dict[str, Layer], key: jax.Array) -> dict[str, float]:
    """|H v - G v| / |H v| for a random v, of each layer's kernel.

    H and G are the blocks that belong to the layer. If it is a stack, they belong to its first
    slice, behind which all others lie: two slices have mixed derivatives, which no factor has.
    """
    kernels = {layer.leaf for layer in layers.values()}
    own = risk.restrict(kernels.__contains__)
    blocks = BlockDiagonal(Hessian.of(own))
    masks = _masks(layers, blocks)
    random = blocks.split(random_block(key, 0, trees.count(masks), own.like))
    vectors = {name: jax.tree.map(jnp.multiply, random[name], masks[name]) for name in masks}
    exact = blocks.multiply(vectors)
    names, groups = list(blocks.groups), tuple(blocks.groups.values())
    calls = [{i: vectors[names[i]] for i in program} for program in blocks.programs(1)]
    (sums,), (count,) = own.sum_parts(
        BlockProducts(groups, gauss_newton.PRODUCTS[own.mode]),
        [[(call,) for call in calls]],
        [[None] * len(calls)],
        what="a Gauss-Newton product",
    )
    norms, gaps = {}, {}
    for products in sums:
        for i, product in products.items():
            name = names[i]
            other = jax.tree.map(lambda a, mask: a * mask, exact[name], masks[name])
            gap = jax.tree.map(lambda a, b, m: a - m * b / count, other, product, masks[name])
            norms[name], gaps[name] = np.asarray(trees.norm(other)), np.asarray(trees.norm(gap))
    found = {}
    for path, layer, place in _places(layers):
        norm, gap = float(norms[layer.leaf][place]), float(gaps[layer.leaf][place])
        found[path] = gap / norm if norm else (np.inf if gap else 0.0)
    return found


def _places(layers: dict[str, Layer]) -> Iterator[tuple[str, Layer, int]]:
    """Each layer, and its number among the layers that have a part of the same leaf."""
    seen: dict[str, int] = {}
    for path, layer in layers.items():
        place = seen.setdefault(layer.leaf, 0)
        seen[layer.leaf] += 1
        yield path, layer, place


def _masks(layers: dict[str, Layer], blocks: BlockDiagonal) -> dict[str, PyTree]:
    """For each leaf, a block of vectors: 1 at the entries of each of its layers, 0 elsewhere."""
    most = 1 + max(place for _, _, place in _places(layers))
    masks = blocks.split(trees.zeros(blocks.like, most))
    for _, layer, place in _places(layers):
        matrix = jnp.zeros(layer.shape).at[(0,) * len(layer.stack)].set(1)

        def put(
            leaf: jax.Array, layer: Layer = layer, matrix: Any = matrix, place: int = place
        ) -> jax.Array:
            like = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            (mask,) = jax.linear_transpose(layer.matrix, like)(matrix.astype(leaf.dtype))
            return leaf.at[place].set(mask)

        masks[layer.leaf] = jax.tree.map(put, masks[layer.leaf])
    return masks
