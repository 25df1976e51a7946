"""When a pair has converged: its residual against its own size, rounding, rest and noise."""

import numpy as np
import pytest

from hessdensity.krylov.convergence import Convergence

TOLERANCE, EPSILON = 1e-4, 1e-7


def judged(looks, *, noise=0.0, norm=1.0, whole=False):
    """The judgment on one pair after these looks at its (value, residual)."""
    judge = Convergence(TOLERANCE, EPSILON)
    for value, residual in looks:
        judge.look(np.array([value]), np.array([residual]), np.array([noise]), norm, whole)
    return judge


@pytest.mark.parametrize("size", [1.0, 0.01, 2e-3])
def test_a_residual_is_judged_by_the_size_of_its_own_value(size):
    assert judged([(-size, 9e-5 * size)] * 2).converged.all()
    assert not judged([(-size, 2e-4 * size)] * 2).converged.any()


def test_a_value_that_still_moves_has_not_converged():
    assert not judged([(1.0, 1e-5)]).converged.any()
    assert not judged([(1.0, 1e-5), (1.001, 1e-5)]).converged.any()
    assert judged([(1.0, 1e-5), (1.001, 1e-5), (1.001, 1e-5)]).converged.all()


def test_in_the_whole_space_no_value_can_move():
    assert judged([(1.0, 1e-5)], whole=True).converged.all()


def test_at_the_rounding_floor_a_value_must_rest_for_three_passes():
    looks = [(1e-5, 5e-8)] * 4
    assert not judged(looks[:3]).converged.any()
    assert judged(looks).converged.all()
    assert not judged([(1e-5, 2e-7)] * 9).converged.any()  # above the floor


def test_a_residual_above_its_value_is_only_that_of_a_zero():
    assert judged([(2e-8, 9e-8)] * 4).converged.all()
    assert not judged([(1e-3, 2e-3)] * 9).converged.any()
    assert not judged([(1e-8, 2e-7)] * 9).converged.any()
    assert judged([(0.0, 0.0)] * 2, norm=0.0).converged.all()


def test_a_new_pair_begins_to_rest_anew():
    judge = judged([(1.0, 1e-5)] * 3)
    both = np.array([1.0, 0.5]), np.array([1e-5, 1e-5]), np.zeros(2)
    judge.look(*both, 1.0, False)
    assert not judge.converged.any()
    judge.look(*both, 1.0, False)
    assert judge.converged.all()


def test_a_run_stagnates_where_residuals_consist_of_noise():
    looks = [(1.0, 1e-3)] * 4
    assert judged(looks, noise=9e-4, norm=2.0).noise == pytest.approx(5e-4)
    assert judged(looks[:3], noise=9e-4).noise is None
    assert judged(looks, noise=1e-4).noise is None  # most of it is not noise
    assert judged([(1.0, 1e-5)] * 4, noise=1e-5).noise is None  # it has converged
    moving = [(1 + i / 1000, 1e-3) for i in range(9)]
    assert judged(moving, noise=9e-4).noise is None
