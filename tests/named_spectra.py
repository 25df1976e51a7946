"""Named exact spectra, shared by all tests: what each is for stands beside it."""

import numpy as np


def _outliers(n: int) -> np.ndarray:
    bulk = np.random.default_rng(0).standard_normal(n - 5) * 0.1
    return np.concatenate([bulk, [-3.0, 2.0, 4.0, 7.0, 10.0]])


ORDINARY = {
    "linear": np.linspace(-1, 1, 200),
    "geometric": np.geomspace(1e-4, 1, 200),  # as a converged least-squares problem
    "ring": 2
    - 2 * np.cos(2 * np.pi * np.arange(200) / 200),  # a ring's Laplacian: every eigenvalue twice
    "outliers": _outliers(300),  # a bulk around zero and a few far away, as in a trained network
}

# Each has fewer distinct eigenvalues than steps: the Krylov space is exhausted.
BREAKDOWN = {
    "identity": np.ones(50),
    "zero": np.zeros(50),
    "three values": np.repeat([-1.0, 0.5, 2.0], 40),
    "eight of 300": np.concatenate(
        [np.arange(1.0, 9.0) * 10 / 8, np.zeros(292)]
    ),  # peers answer -3.7e3 .. 3.8e3 here
    "fewer than steps": np.linspace(1, 2, 7),
    "one": np.array([3.0]),
}

ALL = ORDINARY | BREAKDOWN


def lanczos(values, masses, num_steps):
    """(diagonal, off_diagonal), float64, of a measure with these atoms: Lanczos on a diagonal,
    fully orthogonalized."""
    basis, diagonal, off = [np.sqrt(masses)], [], []
    for _ in range(num_steps):
        product = values * basis[-1]
        diagonal.append(product @ basis[-1])
        for _ in range(3):
            for vector in basis:
                product = product - (product @ vector) * vector
        norm = np.linalg.norm(product)
        norm = 0.0 if norm < 1e-12 * np.abs(values).max() else norm
        off.append(norm)
        basis.append(product / norm if norm else 0 * product)
    return np.array(diagonal), np.array(off)
