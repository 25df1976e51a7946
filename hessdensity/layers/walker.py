"""Evaluate a model equation by equation, and find the uses of its parameters in linear maps.

The model is any JAX function. It is traced to a jaxpr, which is a list of simple operations. A
*use* is a product or a convolution, one of whose operands is a leaf of the parameters, possibly
transposed, reshaped or sliced, while the other does not depend on the parameters directly. The
walker records the other operand (the input x of the layer), and adds a *tap* to the result: an
array of zeros, by which everything after it can be differentiated.

The evaluation descends into jit, rematerialization, custom derivative rules and scans, if a leaf
goes in. Anything else that a leaf goes into is written down with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core

from .uses import Origin, Use

# Operations on a kernel that only move its entries, and those that change only its type or place.
_MOVES = {"reshape", "transpose", "squeeze", "expand_dims", "rev", "slice", "split", "unstack"}
_RESHAPES = {"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim"}
_KEEPS = {"convert_element_type", "copy", "copy_p", "sharding_constraint", "optimization_barrier"}
_KEEPS |= {"reduce_precision", "device_put", "name"}
_PRODUCTS = {"dot_general": "dense", "conv_general_dilated": "convolution"}
_REMAT = {"checkpoint", "remat", "remat2"}
# Their jaxprs are evaluated several times, or not at all, or on pieces of the operands.
_CLOSED = {"while", "cond", "shard_map", "xla_pmap", "pallas_call"}


class Found(NamedTuple):
    """What a walk has found in a jaxpr."""

    values: list[Any]
    """The values of the outputs."""
    origins: list[Origin | None]
    """For each output, the leaf that it is."""
    made: dict[int, str]
    """For each output that is the result of a use, up to its shape: the name of the use."""


class _Scope:
    """The variables of one jaxpr: their values, their origins, and the uses that made them."""

    def __init__(self, jaxpr: core.Jaxpr) -> None:
        self._jaxpr = jaxpr
        self.values: dict[Any, Any] = {}
        self.origins: dict[Any, Origin] = {}
        self.made: dict[Any, str] = {}

    def value(self, variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else self.values[variable]

    def origin(self, variable: Any) -> Origin | None:
        return None if isinstance(variable, core.Literal) else self.origins.get(variable)

    def maker(self, variable: Any) -> str | None:
        return None if isinstance(variable, core.Literal) else self.made.get(variable)

    def define(
        self, variable: Any, value: Any, origin: Origin | None = None, made: str | None = None
    ) -> None:
        self.values[variable] = value
        if origin is not None:
            self.origins[variable] = origin
        if made is not None:
            self.made[variable] = made

    def alone(self, equation: Any) -> tuple[list[Any], Callable[..., list[Any]]]:
        """The variables of an equation, and the equation as a function of their values."""
        unique = dict.fromkeys(v for v in equation.invars if not isinstance(v, core.Literal))
        single = self._jaxpr.replace(
            constvars=[],
            invars=list(unique),
            outvars=equation.outvars,
            eqns=[equation],
            effects=equation.effects,
        )
        return list(unique), core.jaxpr_as_fun(core.ClosedJaxpr(single, ()))


class Walker:
    """Evaluates jaxprs, and finds the uses of the parameters.

    Args:
      names: the paths of the leaves.
      taps: arrays to add to the results of uses, by the name of the use.
    """

    def __init__(self, names: Sequence[str], taps: dict[str, Any] | None = None) -> None:
        self._names = names
        self._taps = taps or {}
        self._counts: dict[int, int] = {}
        self._scans: tuple[int, ...] = ()
        self.uses: dict[str, Use] = {}
        """The uses that were found, by name."""
        self.inputs: dict[str, Any] = {}
        """The input of each use, behind the axes of the scans around it."""
        self.others: dict[int, list[str]] = {}
        """For each leaf, the operations that use it in another way."""

    def run(
        self,
        jaxpr: Any,
        constants: Sequence[Any],
        values: Sequence[Any],
        origins: Sequence[Origin | None],
        made: Sequence[str | None] = (),
    ) -> Found:
        """Evaluate a jaxpr at some values."""
        scope = _Scope(jaxpr)
        for variable, value in zip(jaxpr.constvars, constants, strict=True):
            scope.define(variable, value)
        made = made or [None] * len(values)
        for variable, *known in zip(jaxpr.invars, values, origins, made, strict=True):
            scope.define(variable, *known)
        for equation in jaxpr.eqns:
            self._evaluate(equation, scope)
        outputs = jaxpr.outvars
        makers = {i: scope.maker(v) for i, v in enumerate(outputs)}
        return Found(
            [scope.value(v) for v in outputs],
            [scope.origin(v) for v in outputs],
            {i: name for i, name in makers.items() if name is not None},
        )

    def _evaluate(self, equation: Any, scope: _Scope) -> None:
        """Evaluate one equation."""
        name = equation.primitive.name
        origins = [scope.origin(v) for v in equation.invars]
        places = [i for i, origin in enumerate(origins) if origin is not None]
        if name in _KEEPS:
            self._keeps(equation, scope, origins)
        elif not places:
            self._plain(equation, scope)
        elif len(places) == 1 and self._moves(equation, scope, origins[places[0]]):
            pass
        elif name in _PRODUCTS and _is_kernel(equation, origins, places):
            self._use(equation, scope, origins[places[0]], places[0])
        elif name == "scan":
            self._scan(equation, scope, origins)
        elif (inner := _inner_jaxpr(equation)) is not None:
            self._descend(equation, scope, inner, origins)
        else:
            if len(places) != 1 or not self._adds_bias(equation, scope, places[0]):
                self.note(origins, name)
            self._plain(equation, scope)

    def note(self, origins: Sequence[Origin | None], what: str) -> None:
        """Write down what leaves are used for."""
        for origin in origins:
            if origin is not None:
                reasons = self.others.setdefault(origin.leaf, [])
                if what not in reasons:
                    reasons.append(what)

    def _plain(self, equation: Any, scope: _Scope) -> None:
        """Evaluate an equation as it is. A result that is only moved stays that of its use."""
        variables, function = scope.alone(equation)
        use = None
        if equation.primitive.name in _RESHAPES:
            use = scope.maker(equation.invars[0])
        results = function(*[scope.values[v] for v in variables])
        for variable, value in zip(equation.outvars, results, strict=True):
            scope.define(variable, value, made=use)

    def _keeps(self, equation: Any, scope: _Scope, origins: Sequence[Origin | None]) -> None:
        """Evaluate an operation, each of whose results is one of its operands."""
        variables, function = scope.alone(equation)
        results = function(*[scope.values[v] for v in variables])
        makers = map(scope.maker, equation.invars)
        for variable, *known in zip(equation.outvars, results, origins, makers, strict=True):
            scope.define(variable, *known)

    def _moves(self, equation: Any, scope: _Scope, origin: Any) -> bool:
        """Follow a leaf through an operation that only moves its entries, if this is one."""
        name = equation.primitive.name
        broadcasts = name == "broadcast_in_dim"
        if name not in _MOVES and not broadcasts:
            return False
        variables, function = scope.alone(equation)
        results = function(*[scope.values[v] for v in variables])
        source, target = equation.invars[0].aval, equation.outvars[0].aval
        for place, (variable, value) in enumerate(zip(equation.outvars, results, strict=True)):
            if broadcasts and source.size != target.size:
                moved = replace(origin, broadcast=True)
            else:
                moved = origin.then(lambda leaf, place=place: function(leaf)[place])
            scope.define(variable, value, moved)
        return True

    def _adds_bias(self, equation: Any, scope: _Scope, place: int) -> bool:
        """Whether an operation adds a leaf to the result of a use, as its first bias."""
        if equation.primitive.name not in ("add", "add_any"):
            return False
        origin: Any = scope.origin(equation.invars[place])
        made_by = scope.maker(equation.invars[1 - place])
        use = None if made_by is None else self.uses[made_by]
        if use is None or use.bias is not None:
            return False
        if equation.outvars[0].aval.shape == use.z.shape and not origin.broadcast:
            shape = equation.invars[place].aval.shape
            own = {axis for axis, length in enumerate(shape) if length > 1}
            if not own <= use.output_axes:  # it varies over examples or positions
                return False
        use.bias = origin.leaf
        return True

    def _use(self, equation: Any, scope: _Scope, origin: Any, side: int) -> None:
        """Record a use, and add its tap."""
        count = self._counts.get(origin.leaf, 0)
        self._counts[origin.leaf] = count + 1
        path = self._names[origin.leaf]
        name = f"{path}#{count}" if count else path
        x = scope.value(equation.invars[1 - side])
        kernel = equation.invars[side].aval
        variables, function = scope.alone(equation)
        (z,) = function(*[scope.values[v] for v in variables])
        self.uses[name] = Use(
            name,
            origin,
            _PRODUCTS[equation.primitive.name],
            dict(equation.params),
            side,
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(z.shape, z.dtype),
            tuple(kernel.shape),
            self._scans,
        )
        self.inputs[name] = x
        if name in self._taps:
            z = z + self._taps[name].astype(z.dtype)
        scope.define(equation.outvars[0], z, made=name)

    def _descend(
        self, equation: Any, scope: _Scope, inner: Any, origins: Sequence[Origin | None]
    ) -> None:
        """Evaluate an operation that contains a jaxpr, by walking through it."""
        values = [scope.value(v) for v in equation.invars]
        made = [scope.maker(v) for v in equation.invars]
        if equation.primitive.name in _REMAT:
            found = self._rematerialized(equation, inner, values, origins)
        else:
            found = self.run(inner.jaxpr, inner.consts, values, origins, made)
        for i, variable in enumerate(equation.outvars):
            scope.define(variable, found.values[i], found.origins[i], found.made.get(i))

    def _rematerialized(
        self, equation: Any, inner: Any, values: list[Any], origins: Sequence[Origin | None]
    ) -> Found:
        """Walk through a part whose activations are computed again for derivatives."""
        found: list[Found] = []

        def body(values: list[Any], taps: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
            walker = self._inside(taps, self._scans)
            found[:] = [walker.run(inner.jaxpr, inner.consts, values, origins)]
            walkers[:] = [walker]
            return found[0].values, walker.inputs

        walkers: list[Walker] = []
        settings = {name: equation.params.get(name) for name in ("prevent_cse", "policy")}
        outputs, inputs = jax.checkpoint(body, **settings)(values, self._taps)
        self._take_over(walkers[0], inputs)
        return Found(outputs, found[0].origins, found[0].made)

    def _scan(self, equation: Any, scope: _Scope, origins: Sequence[Origin | None]) -> None:
        """Walk through the body of a scan. Taps and inputs get an axis for its steps."""
        parameters = equation.params
        num_constants, num_carry = _scan_sizes(parameters)
        inner, length = _closed(parameters["jaxpr"]), parameters["length"]
        values = [scope.value(v) for v in equation.invars]
        first = num_constants + num_carry
        constants, initial = values[:num_constants], values[num_constants:first]
        slices = tuple(values[first:])
        self.note(origins[num_constants:first], "the carry of a scan")
        inside = [
            *(origin and origin.inside(False) for origin in origins[:num_constants]),
            *([None] * num_carry),
            *(origin and origin.inside(True) for origin in origins[first:]),
        ]
        walkers: list[Walker] = []

        def body(carry: tuple[Any, ...], step: Any) -> tuple[Any, Any]:
            slice_, taps = step
            walker = self._inside(taps, (*self._scans, length))
            values = [*constants, *carry, *slice_]
            found = walker.run(inner.jaxpr, inner.consts, values, inside)
            walker.note(found.origins, "returned by a scan")
            walkers[:] = [walker]
            return tuple(found.values[:num_carry]), (found.values[num_carry:], walker.inputs)

        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), slices)
        jax.eval_shape(lambda *step: body(step[0], (step[1], {})), tuple(initial), one)
        own = {name: self._taps[name] for name in walkers[0].uses if name in self._taps}
        options = {name: parameters[name] for name in ("reverse", "unroll")}
        carry, (outputs, inputs) = lax.scan(
            body, tuple(initial), (slices, own), length=length, **options
        )
        self._take_over(walkers[0], inputs)
        for variable, value in zip(equation.outvars, [*carry, *outputs], strict=True):
            scope.define(variable, value)

    def _inside(self, taps: dict[str, Any], scans: tuple[int, ...]) -> Walker:
        """A walker for an inner jaxpr, which counts uses on from this one."""
        walker = Walker(self._names, taps)
        walker._counts = dict(self._counts)
        walker._scans = scans
        return walker

    def _take_over(self, walker: Walker, inputs: dict[str, Any]) -> None:
        """Add what the walker of an inner jaxpr has found."""
        self.uses.update(walker.uses)
        self.inputs.update(inputs)
        self._counts = walker._counts
        for leaf, reasons in walker.others.items():
            known = self.others.setdefault(leaf, [])
            known.extend(reason for reason in reasons if reason not in known)


def _scan_sizes(parameters: dict[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan."""
    if "num_consts" in parameters:
        return parameters["num_consts"], parameters["num_carry"]
    constants, carry, _ = parameters["ft_in"].unpack()  # since JAX 0.11
    return len(constants), len(carry)


def _closed(jaxpr: Any) -> Any:
    """A jaxpr with its constants, whether the operation has it so or not."""
    return jaxpr if hasattr(jaxpr, "jaxpr") else core.ClosedJaxpr(jaxpr, ())


def _is_kernel(equation: Any, origins: Sequence[Origin | None], places: list[int]) -> bool:
    """Whether the leaf among the operands of a product is its kernel."""
    (place, *more) = places
    origin = origins[place]
    if more or origin is None or origin.broadcast:
        return False
    if equation.primitive.name == "dot_general":
        return True
    return place == 1 and equation.params["batch_group_count"] == 1


def _inner_jaxpr(equation: Any) -> Any | None:
    """The jaxpr that an operation evaluates once with its own operands, or None."""
    if equation.primitive.name in _CLOSED:
        return None
    found = [
        inner
        for name, inner in equation.params.items()
        if name in ("jaxpr", "call_jaxpr", "fun_jaxpr")
    ]
    if len(found) != 1:
        return None
    closed = _closed(found[0])
    fits = len(closed.jaxpr.invars) == len(equation.invars)
    return closed if fits and len(closed.jaxpr.outvars) == len(equation.outvars) else None
