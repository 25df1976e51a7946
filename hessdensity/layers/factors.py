"""Kronecker factors of layers: the Hessian of a layer as E[x x^T] (x) E[M]."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.quadrature import Rule
from hessdensity.text import plural, table
from hessdensity.vectors import trees
from hessdensity.vectors.selection import Where, select
from hessdensity.vectors.trees import Block, Vector

from .kronecker_products import CONVERGED, top_products
from .layer_factors import KernelView, LayerFactors


class _Place(NamedTuple):
    """One Kronecker product: that of a layer, a slice of its stack and a group."""

    path: str
    place: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """Kronecker factors of layers, as a block-diagonal operator on their kernels and biases.

    With W as a matrix (n, m), a layer's block is E[x x^T] (x) E[M], in this order. Its product with
    a matrix V is E[x x^T] V E[M]. Its eigenvalues are the products of the eigenvalues of both
    factors. With a bias, x is (x; 1).

    `kronecker_factors` makes it, and ``print(factors)`` shows a table.
    """

    layers: Mapping[str, LayerFactors]
    """The factors of each layer, by path."""
    whole: Vector
    """Shapes of the parameters, of which the layers have some leaves."""
    bias: bool
    """Whether biases are part of the vectors."""
    description: dict[str, Any] = field(default_factory=dict)
    """The settings, and what is known of the data."""
    across: np.ndarray | None = None
    """(m1 + m2 + ..., same) float64: E[M] of the outputs of all layers together, or None."""

    # The operator ---------------------------------------------------------------------------------

    @functools.cached_property
    def like(self) -> Vector:
        """Shapes and dtypes of one vector: the kernels and biases, and None for other leaves."""
        kept = set(self._leaves())
        names = trees.paths(self.whole)
        leaves = [
            leaf if name in kept else None
            for name, leaf in zip(names, jax.tree.leaves(self.whole), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(self.whole), leaves)

    def _leaves(self) -> Iterator[str]:
        for factors in self.layers.values():
            yield factors.layer.leaf
            if self.bias and factors.layer.bias is not None:
                yield factors.layer.bias

    def __matmul__(self, vectors: Block | Vector) -> Block | Vector:
        block, single = trees.as_block(vectors, self.like)
        parts = dict(zip(trees.paths(self.like), jax.tree.leaves(block), strict=True))
        products = {name: jnp.zeros_like(leaf) for name, leaf in parts.items()}
        with jax.default_matmul_precision("highest"):
            for view, left, right in self._on_device:
                own = {name: parts[name] for name in view.leaves}
                matrix = jax.vmap(view.matrix)(own)
                product = left @ matrix @ right
                for name, leaf in jax.vmap(view.leaves_of)(product).items():
                    products[name] = products[name] + leaf
        result = jax.tree.unflatten(jax.tree.structure(self.like), list(products.values()))
        return trees.first_vector(result) if single else result

    @functools.cached_property
    def _on_device(self) -> list[tuple[KernelView, jax.Array, jax.Array]]:
        """The view and the two factors of each layer, in the dtype of its vectors."""
        found = []
        for path, factors in self.layers.items():
            view = self._view(path)
            both = self._input(path), factors.output
            left, right = (jnp.asarray(factor, view.dtype) for factor in both)
            found.append((view, left, right))
        return found

    def _input(self, path: str) -> np.ndarray:
        factors = self.layers[path]
        return factors.augmented() if self._has_bias(path) else factors.input

    def _has_bias(self, path: str) -> bool:
        return self.bias and self.layers[path].layer.bias is not None

    def _view(self, path: str) -> KernelView:
        layer = self.layers[path].layer
        shapes = dict(zip(trees.paths(self.whole), jax.tree.leaves(self.whole), strict=True))
        bias = layer.bias if self._has_bias(path) else None
        # The path of a bare array is empty.
        leaves = [layer.leaf] if bias is None else [layer.leaf, bias]
        return KernelView(layer, bias, {name: shapes[name] for name in leaves})

    def restrict(self, where: Where) -> KroneckerFactors:
        """The factors of fewer layers: those whose kernel matches ``where``.

        Raises:
          ValueError: no kernel matches, or some biases match while others do not.
        """
        names = trees.paths(self.like)
        kept = {
            name for name, own in zip(names, select(self.like, where).chosen, strict=True) if own
        }
        layers = {path: f for path, f in self.layers.items() if f.layer.leaf in kept}
        if not layers:
            raise ValueError(
                f"where={where!r} matches no kernel. The layers are: {', '.join(self.layers)}."
            )
        biases = any(f.layer.bias in kept for f in layers.values())
        across = self.across
        if across is not None:
            rows = np.concatenate([np.r_[self._rows_across[path]] for path in layers])
            across = across[np.ix_(rows, rows)]
        found = KroneckerFactors(layers, self.whole, self.bias and biases, self.description, across)
        if set(trees.paths(found.like)) != kept:
            raise ValueError(
                f"where={where!r} matches {', '.join(sorted(kept))}; expected the kernel and bias "
                "of all its layers, or the kernels alone."
            )
        return found

    def __getitem__(self, path: str) -> LayerFactors:
        try:
            return self.layers[path]
        except KeyError:
            raise KeyError(
                f"layer {path!r} does not exist. The layers are: {', '.join(self.layers)}"
            ) from None

    @property
    def input(self) -> dict[str, np.ndarray]:
        """E[x x^T] of each layer, by path (see `LayerFactors`)."""
        return {path: factors.input for path, factors in self.layers.items()}

    @property
    def output(self) -> dict[str, np.ndarray]:
        """E[M] of each layer, by path."""
        return {path: factors.output for path, factors in self.layers.items()}

    @property
    def mean_input(self) -> dict[str, np.ndarray]:
        """The mean input of each layer, by path."""
        return {path: factors.mean_input for path, factors in self.layers.items()}

    @property
    def exact(self) -> dict[str, bool | None]:
        """For each layer, whether the Gauss-Newton matrix is its Hessian, up to rounding."""
        return {path: factors.exact for path, factors in self.layers.items()}

    # Spectra --------------------------------------------------------------------------------------

    def eigenvalues(self) -> np.ndarray:
        """All eigenvalues, (dimension,) float64, in descending order.

        Raises:
          ValueError: two layers share entries, as tied weights do.

        Cost: no products. O(n^3 + m^3) for a layer of n inputs and m outputs.
        """
        found = [np.zeros(self._num_outside())]
        for path in self.layers:
            left = np.linalg.eigvalsh(self._input(path))
            right = np.linalg.eigvalsh(self.layers[path].output)
            found.append((left[..., :, None] * right[..., None, :]).ravel())
        return np.sort(np.concatenate(found))[::-1]

    def density(self) -> SpectralDensity:
        """The spectral density. It has no error, because all eigenvalues are known."""
        values = self.eigenvalues()[::-1]
        n = values.size
        rounding = float(np.finfo(float).eps * np.abs(values).max(initial=0))
        rule = Rule(values, np.full(n, 1 / n), n, np.full(n, rounding))
        return SpectralDensity((rule,), n, 0, {"operator": self.describe()})

    def top(self, k: int) -> Eigenspace:
        """The k largest eigenvalues and their eigenvectors, v (x) u of both factors.

        Of a large factor, only the largest eigenpairs are computed. They suffice if the product of
        the smallest of them and the largest of the other factor is at most the k-th product found;
        otherwise more of them are computed. So the result is certain.

        Args:
          k: the number of pairs, at most the dimension. Entries that are in no layer, whose
            eigenvalue is 0, do not count.

        Raises:
          ValueError: k is out of range, or two layers share entries, as tied weights do.

        Returns:
          `Eigenspace`. Its vectors are like ``like``.

        Cost: no products.
        """
        n = trees.size(self.like) - self._num_outside()
        if not 1 <= k <= n:
            raise ValueError(f"k={k!r}, expected a whole number from 1 to {n:,}, the dimension.")
        found: list[tuple[float, int, _Place, np.ndarray, np.ndarray]] = []
        for path in self.layers:
            left, right = self._input(path), self.layers[path].output
            for index in np.ndindex(left.shape[:-2]):
                for value, v, u in top_products(left[index], right[index], k):
                    found.append((value, len(found), _Place(path, index), v, u))
        best = heapq.nlargest(k, found, key=lambda each: (each[0], -each[1]))
        vectors = trees.join([self._eigenvector(place, v, u) for _, _, place, v, u in best])
        values = np.array([each[0] for each in best])
        residuals = np.full(k, CONVERGED * np.abs(values).max())
        return Eigenspace(values, vectors, residuals, np.ones(k, bool), 0, 0, self.describe())

    def full_eigenspace(self, k: int) -> Eigenspace:
        """Approximate top eigenvectors of the whole Hessian, across layers.

        An eigenpair (sigma, u) of E[M] of the outputs of all layers together gives the vector w
        that has u_p (x) E[x_p] in layer p, and the eigenvalue sigma |w|^2. The vectors are
        orthonormalized in descending order.

        Args:
          k: the number of pairs.

        Returns:
          `Eigenspace`, whose residuals are unknown and hence NaN, and which is marked as not
          converged.

        Raises:
          ValueError: the factors were computed without ``across=True``, or k is out of range.

        Source: Wu, Zhu, Wu, Wang and Ge (2020).
        """
        if self.across is None:
            raise ValueError(
                "the outputs of different layers were not combined; compute the factors with "
                "hd.kronecker_factors(..., across=True)."
            )
        if not 1 <= k <= len(self.across):
            raise ValueError(
                f"k={k!r}, expected a whole number from 1 to {len(self.across):,}, the outputs of "
                "all layers."
            )
        sigmas, outputs = np.linalg.eigh(self.across)
        vectors = trees.join([self._across_layers(u) for u in outputs.T[::-1][:k]])
        rows = trees.ravel(vectors).astype(float)
        values = sigmas[::-1][:k] * np.sum(rows**2, axis=1)
        order = np.argsort(values)[::-1]
        basis = np.linalg.qr(rows[order].T)[0].T
        return Eigenspace(
            values[order],
            trees.unravel(basis, self.like),
            np.full(k, np.nan),
            np.zeros(k, bool),
            0,
            0,
            self.describe(),
        )

    @property
    def _rows_across(self) -> dict[str, slice]:
        """The rows of ``across`` that belong to each layer."""
        sizes = [math.prod(f.output.shape[:-1]) for f in self.layers.values()]
        ends = np.cumsum(sizes)
        rows = [slice(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]
        return dict(zip(self.layers, rows, strict=True))

    def _across_layers(self, outputs: np.ndarray) -> Block:
        """The vector with u_p (x) E[x_p] in each layer, as a block of one."""
        total = trees.zeros(self.like)
        for path, factors in self.layers.items():
            view = self._view(path)
            mean = factors.mean_input
            if self._has_bias(path):
                mean = np.concatenate([mean, np.ones((*mean.shape[:-1], 1))], axis=-1)
            shape = (*mean.shape[:-1], factors.layer.outputs)
            part = outputs[self._rows_across[path]].reshape(shape)
            matrix = mean[..., :, None] * part[..., None, :]
            own = view.leaves_of(jnp.asarray(matrix, view.dtype))
            total = trees.add(total, self._with_zeros(own))
        return trees.as_single(total)

    def _with_zeros(self, own: dict[str, jax.Array]) -> Vector:
        """A vector with some leaves, and zeros in the others."""
        pairs = zip(trees.paths(self.like), jax.tree.leaves(self.like), strict=True)
        leaves = [own.get(name, jnp.zeros(leaf.shape, leaf.dtype)) for name, leaf in pairs]
        return jax.tree.unflatten(jax.tree.structure(self.like), leaves)

    def _num_outside(self) -> int:
        """The number of entries of a vector that are in no layer."""
        leaves = zip(trees.paths(self.like), jax.tree.leaves(self.like), strict=True)
        counts = {name: np.zeros(leaf.shape) for name, leaf in leaves}
        for path in self.layers:
            view = self._view(path)
            shape = (*self._input(path).shape[:-1], self.layers[path].layer.outputs)
            for name, own in view.leaves_of(jnp.ones(shape, view.dtype)).items():
                counts[name] += np.asarray(own)
                if counts[name].max(initial=0) > 1:
                    raise ValueError(
                        f"layer {path!r} shares entries of {name!r} with another layer, so that "
                        "the eigenvalues are not products of those of the factors. Leave one of "
                        "them out (where=, bias=False), or use hd.spectral_density(factors, key)."
                    )
        return sum(int(np.sum(count == 0)) for count in counts.values())

    def _eigenvector(self, place: _Place, v: np.ndarray, u: np.ndarray) -> Block:
        """The eigenvector v (x) u of one Kronecker product, as a block of one vector."""
        view = self._view(place.path)
        shape = (*self._input(place.path).shape[:-1], self.layers[place.path].layer.outputs)
        matrix = np.zeros(shape)
        matrix[place.place] = np.outer(v, u)
        own = view.leaves_of(jnp.asarray(matrix, view.dtype))
        return trees.as_single(self._with_zeros(own))

    def describe(self) -> dict[str, Any]:
        """A description of this operator."""
        return {"kind": "Kronecker approximation", "layers": list(self.layers), **self.description}

    def __str__(self) -> str:
        rows = [["layer", "kind", "inputs", "outputs", "largest", "of E[xx^T]", "of E[M]", "note"]]
        for path, factors in self.layers.items():
            left = np.linalg.eigvalsh(self._input(path))[..., -1]
            right = np.linalg.eigvalsh(factors.output)[..., -1]
            best = int(np.argmax(left * right))
            ends = float((left * right).ravel()[best]), left.ravel()[best], right.ravel()[best]
            layer = factors.layer
            sizes = f"{layer.inputs:,}", f"{layer.outputs:,}"
            note = _note(factors, self.description.get("factor"))
            rows.append([path, layer.kind, *sizes, *(f"{end:.4g}" for end in ends), note])
        n = trees.size(self.like)
        lines = [f"Kronecker factors of {plural(len(self.layers), 'layer')}, n = {n:,}"]
        return "\n".join([*lines, *table(rows, left={0, 1, 7})])


def _note(factors: LayerFactors, kind: str | None) -> str:
    """What is special about the factors of a layer."""
    notes = [f"also used by {each}" for each in factors.layer.also]
    if factors.layer.num_uses > 1:
        notes.append(f"used {factors.layer.num_uses} times, each as further positions")
    if kind == "gauss-newton" and factors.exact is False:
        notes.append(f"Gauss-Newton is not the Hessian: off by {factors.deviation:.2g}")
    return "; ".join(notes)
