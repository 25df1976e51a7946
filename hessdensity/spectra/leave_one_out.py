"""Leave-one-out deflation: every start of a block is a probe that the other starts deflate.

A block of b random starts goes through the data q times. The products span a block Krylov space of
up to b q dimensions, inside which everything below is small dense algebra. Probe i deflates the
Krylov space D_i of the other b - 1 starts. So it has (b - 1)(q - 1) deflated directions without a
product of its own, and D_i is independent of probe i, as deflation requires. Krylov deflation in
turn spends products on directions that only the probes after it can use.

Theorem. Let A be symmetric, T_i the compression of A to D_i, C_i the compression to its complement,
and B_i the block that couples the two. The rank of B_i is at most b - 1. For every x, the number of
eigenvalues up to x of A differs by at most b - 1 from that of T_i and C_i together. So the
cumulatives differ by at most (b - 1)/n, and their W1 distance is at most 2 |B_i|_nuclear / n.

Proof. A maps all blocks of D_i but the last into D_i, and the last block has b - 1 vectors. So
A = (T_i + C_i) + E, where the eigenvalues of E are the singular values of B_i and their negatives.
Its positive and its negative part have rank b - 1 each, and move every counting function by at most
b - 1 (Weyl's interlacing). The mean of |lambda_j(A) - lambda_j(T_i + C_i)| over sorted eigenvalues
is at most the sum of |eigenvalues of E| divided by n (Lidskii).

Deflation inside a block Krylov space is due to Chen and Hallman (2023), who estimate traces.
Hallman (2025) leaves one start out. Bhattacharjee, Jayaram, Musco, Musco and Ray (2024) study
densities after explicit and implicit deflation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .deflation import deflated_rule
from .evidence import ends_of_the_spectrum
from .quadrature import Rule, Tridiagonal

# Ritz values are copies of one eigenvalue if they differ by at most this share of their residuals,
# and if their residuals are at most the second share of their distance to the others.
_SAME, _CONVERGED = 0.01, 0.1

# A recurrence ends where the parts of its products outside of the block Krylov space, each squared
# and relative to the part inside, add up to more than this.
_OUTSIDE = 0.5


class BlockKrylov(NamedTuple):
    """The products of a block Krylov run, A Z = Z T + W outside, on the host."""

    matrix: np.ndarray
    """(size, size) float64: T = Z^T A Z, up to rounding symmetric."""
    outside: np.ndarray
    """(rows, size) float64: components of the products outside of the span of Z."""
    starts: np.ndarray
    """(size, b) float64: the starts, in the basis Z."""
    num_steps: int
    """q: the number of products of the block."""
    rounding_error: float
    """Error of the entries, in eigenvalue units."""


def leave_one_out(block: BlockKrylov, dimension: int) -> tuple[Rule, ...]:
    """The rules of a block: one for each start, with the Krylov space of the others deflated.

    Args:
      block: the products.
      dimension: n.

    Cost: O(b (b q)^3) on the host.
    """
    block = block._replace(matrix=(block.matrix + block.matrix.T) / 2)
    if block.matrix.shape[0] == dimension and not block.outside.any():
        values = np.linalg.eigvalsh(block.matrix)
        residuals = np.full(dimension, 2 * block.rounding_error)
        return (Rule(values, np.full(dimension, 1 / dimension), dimension, residuals),)
    multiple = multiple_eigenspaces(block)
    block = _as_deep_as_it_is(block, multiple)
    starts = range(block.starts.shape[1])
    alone = [recurrence(block, _no_columns(block), i) for i in starts]
    enclosure = ends_of_the_spectrum(alone, dimension)
    return tuple(
        _rule(block, i, krylov_of_others(block, i, multiple), dimension).enclosed(enclosure)
        for i in starts
    )


def _rule(block: BlockKrylov, index: int, deflated: np.ndarray, dimension: int) -> Rule:
    """The rule of one start in the complement of the Krylov space of the others."""
    products = block.matrix @ deflated
    inner = deflated.T @ products
    ritz, vectors = np.linalg.eigh((inner + inner.T) / 2)
    # B_i = (I - D D^T) A D
    coupling = np.concatenate([products - deflated @ inner, block.outside @ deflated])
    residuals = np.linalg.norm(coupling @ vectors, axis=0)
    singular = np.linalg.svd(coupling, compute_uv=False)
    count = block.starts.shape[1] - 1
    probe = recurrence(block, deflated, index)
    return deflated_rule(
        ritz,
        np.maximum(residuals, 2 * block.rounding_error),
        probe,
        dimension,
        float(singular[:count].sum()),
        count + 1,
    )


def recurrence(block: BlockKrylov, deflated: np.ndarray, index: int) -> Tridiagonal:
    """The Lanczos recurrence of one start in the complement of some columns.

    It is that of the compression to the block Krylov space. The operator's own recurrence has a
    part outside of this space, which is of the order of sqrt(b/n) at first and grows. The
    recurrence ends where these parts are no longer small together. Further steps would converge to
    eigenvalues of the compression that are not those of the operator. They would make the error of
    W1 by up to 70 % larger, and that of quadrature would look smaller than it is.
    """
    matrix = block.matrix
    basis = np.zeros((matrix.shape[0], 0))
    vector = _orthogonal(block.starts[:, index], deflated)
    vector = vector / np.linalg.norm(vector)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    couplings: list[np.ndarray] = []
    left = 0.0
    while True:
        basis = np.concatenate([basis, vector[:, None]], axis=1)
        product = matrix @ vector
        diagonal.append(float(vector @ product))
        couplings.append(deflated.T @ product)
        rest = _orthogonal(product, np.concatenate([deflated, basis], axis=1))
        inside = float(np.linalg.norm(rest))
        outside = float(np.linalg.norm(block.outside @ vector))
        # Before the last step, this part is what the starts of D_i have in common with the probe.
        left += (outside / inside) ** 2 if inside else np.inf
        ends = len(diagonal) == block.num_steps or left > _OUTSIDE
        beta = float(np.hypot(inside, outside)) if ends else inside
        beta = beta if beta > 2 * block.rounding_error else 0.0
        off_diagonal.append(beta)
        if ends or not beta:
            break
        vector = rest / np.linalg.norm(rest)
    return Tridiagonal(
        np.array(diagonal), np.array(off_diagonal), np.array(couplings), block.rounding_error
    )


def krylov_of_others(block: BlockKrylov, index: int, multiple: list[np.ndarray]) -> np.ndarray:
    """Orthonormal columns of the block Krylov space of all starts but one, with q - 1 blocks."""
    new = np.delete(block.starts, index, axis=1)
    own = _own_copies(new, multiple)
    found = _no_columns(block)
    for step in range(block.num_steps - 1):
        kept = np.concatenate([own, found], axis=1)
        new = _orthonormal(new, kept, 4 * block.rounding_error if step else 0.0)
        if not new.shape[1]:
            break
        found = np.concatenate([found, new], axis=1)
        new = block.matrix @ new
    return found


def _own_copies(others: np.ndarray, multiple: list[np.ndarray]) -> np.ndarray:
    """Orthonormal eigenvectors in the span of Z that the other starts cannot reach: (size, g).

    In exact arithmetic, b - 1 starts reach at most b - 1 copies of an eigenvalue, those in the span
    of their projections to its eigenspace. The next copy belongs to the start that is left out.
    Rounding would mix it into the Krylov space of the others after some steps, as it does with the
    ghosts of a recurrence. Then the probe would miss this eigenvalue, and the trace would be off by
    tens of percent. So the Krylov space is kept orthogonal to these copies.
    """
    found = [np.zeros((len(others), 0))]
    for space in multiple:
        axes, lengths, _ = np.linalg.svd(space.T @ others)
        reached = int(np.sum(lengths > 1e-6 * lengths.max(initial=0)))
        found.append(space @ axes[:, reached:])
    return np.concatenate(found, axis=1)


def _as_deep_as_it_is(block: BlockKrylov, multiple: list[np.ndarray]) -> BlockKrylov:
    """The block with the number of steps that its Krylov space really has.

    In exact arithmetic, b starts reach at most b copies of an eigenvalue. Rounding adds others,
    which take the place of directions of the Krylov space. An exhausted space needs no limit,
    because it has no further directions.
    """
    size, count = block.starts.shape
    if np.linalg.norm(block.outside, axis=0).max() <= 16 * block.rounding_error:
        return block
    added = sum(max(space.shape[1] - count, 0) for space in multiple)
    return block._replace(num_steps=max(min(block.num_steps, (size - added) // count), 2))


def multiple_eigenspaces(block: BlockKrylov) -> list[np.ndarray]:
    """Orthonormal bases of the multiple eigenvalues in the span of Z, (size, copies) each."""
    values, vectors = np.linalg.eigh(block.matrix)
    residuals = np.linalg.norm(block.outside @ vectors, axis=0)
    same = 16 * block.rounding_error
    apart = np.diff(values) > same + _SAME * (residuals[1:] + residuals[:-1])
    first = np.flatnonzero(np.insert(apart, 0, True))
    found = []
    for a, b in zip(first, np.append(first[1:], values.size), strict=True):
        below = values[a] - values[a - 1] if a else np.inf
        above = values[b] - values[b - 1] if b < values.size else np.inf
        # Copies that rounding has brought later, and that are on their way, do not hide these.
        least = residuals[a:b].min()
        settled = residuals[a:b] <= min(_CONVERGED * min(below, above), max(same, 2 * least))
        copies = values[a:b][settled]
        if copies.size > 1 and np.ptp(copies) <= same + _SAME * least:
            found.append(vectors[:, a:b][:, settled])
    return found


def _no_columns(block: BlockKrylov) -> np.ndarray:
    return np.zeros((block.matrix.shape[0], 0))


def _orthogonal(vectors: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The vectors without their components along orthonormal columns."""
    for _ in range(2):
        vectors = vectors - columns @ (columns.T @ vectors)
    return vectors


def _orthonormal(vectors: np.ndarray, columns: np.ndarray, negligible: float) -> np.ndarray:
    """Orthonormal columns for the parts of some vectors that are orthogonal to other columns."""
    left, lengths, _ = np.linalg.svd(_orthogonal(vectors, columns), full_matrices=False)
    return _orthogonal(left[:, lengths > negligible], columns)
