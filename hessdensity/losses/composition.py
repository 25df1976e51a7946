"""The parts of a loss that can make its second derivatives asymmetric: custom rules, short dtypes.

They are read off the jaxpr of the loss, which is traced once and never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from hessdensity.vectors import trees
from hessdensity.vectors.trees import PyTree, Vector

from .total import Loss

_JAX = str(Path(jax.__file__).parent)
_FULL_PRECISION = ("highest", "float32")


class Composition(NamedTuple):
    """The custom derivative rules of a model, and the floating-point types that it computes in."""

    rules: tuple[str, ...] = ()
    """Functions with a ``custom_vjp`` or ``custom_jvp``, and their places. JAX's own are left out.
    """
    short: tuple[str, ...] = ()
    """Dtypes of less than 32 bits that occur, and a matrix-product precision that is lowered."""
    epsilon: float = 0.0
    """The largest rounding unit of the numbers computed, at most that of bfloat16."""

    def tolerance(self, like: Vector) -> float:
        """The relative error of products that rounding explains, with a wide margin.

        float32 products are symmetric to 1e-7 to 1e-5 of their norm, and to 1e-3 near a minimum of
        the loss. A model in bfloat16 has products that are symmetric to 1e-3 and linear to 2e-2.

        Args:
          like: the vectors of the products.
        """
        if self.short:
            return 4 * self.epsilon
        return 1e-3 if max(self.epsilon, trees.epsilon(like)) > 1e-8 else 1e-9

    def explain(self) -> str:
        """The most likely causes of asymmetric products, in sentences."""
        if self.rules:
            return (
                f"The model has custom derivative rules: {', '.join(self.rules)}. A rule that is "
                "not the derivative of its function does this (surrogate and straight-through "
                "gradients, scaled or clipped gradients)."
            )
        if self.short:
            return f"The model computes in short numbers ({', '.join(self.short)}), which round."
        return (
            "The cause may be a custom derivative rule, a short dtype, data that change, or a loss "
            "near its minimum, where rounding dominates (use float64)."
        )


def examine(loss: Loss, params: Vector, batch: PyTree, precision: str | None) -> Composition:
    """Find the custom rules and the short dtypes of a loss.

    Args:
      loss: the loss.
      params: its parameters, or their shapes.
      batch: a batch, or its shapes.
      precision: the matrix-product precision under which the loss is computed.
    """
    jaxpr = jax.make_jaxpr(loss)(params, batch)
    rules: set[str] = set()
    dtypes: set[Any] = set()
    for equation in _equations(jaxpr.jaxpr):
        outputs = [getattr(output.aval, "dtype", None) for output in equation.outvars]
        dtypes.update(dtype for dtype in outputs if dtype and jnp.issubdtype(dtype, jnp.floating))
        if equation.primitive.name.startswith("custom_"):
            rules.update(_rule(equation))
    short = sorted(str(dtype) for dtype in dtypes if dtype.itemsize < 4)
    units = [float(jnp.finfo(dtype).eps) for dtype in dtypes]
    if precision not in _FULL_PRECISION:
        short.append(f"precision={precision!r}")
        units.append(float(jnp.finfo(jnp.bfloat16).eps))
    # float8 is used for a few products only. With its unit, 0.125, any mistake would be tolerated.
    coarsest = float(jnp.finfo(jnp.bfloat16).eps)
    epsilon = min(max([trees.epsilon(params), *units]), coarsest)
    return Composition(tuple(sorted(rules)), tuple(short), epsilon)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, and of the jaxprs inside."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _rule(equation: Any) -> Iterator[str]:
    """The name and place of a function with a custom rule, unless it is a function of JAX."""
    called = equation.params.get("call_jaxpr")
    if called is None or equation.primitive.name not in ("custom_jvp_call", "custom_vjp_call"):
        return
    info = getattr(called.jaxpr.debug_info, "func_src_info", None) or "a function"
    name, _, place = info.partition(" at ")
    if not place.startswith(_JAX):
        yield f"{name} ({Path(place).name})" if place else name
