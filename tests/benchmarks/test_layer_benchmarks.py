"""The benchmarks of layers run at a tiny size, and what they compute is what they say."""

import jax
import pytest

from benchmarks import output_eigenspace


@pytest.fixture(autouse=True)
def lenient(strict):
    """Flax and Optax promote dtypes; the strict world is the package's."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


# The output eigenspace ----------------------------------------------------------------------------


def test_rates_and_centering_improve_the_predicted_output_eigenspace():
    rows = [output_eigenspace.measure(n, 0, 512) for n in (48, 96)]
    for row in rows:
        paper, rates, centered = row["overlaps"].values()
        assert paper < rates < centered
        assert abs(paper - row["rates"]) < 0.08  # the expected overlap, up to the size
        assert 0 < row["gap"] < 1
    figure = output_eigenspace.draw(rows)
    assert len(figure.axes[0].get_legend().get_texts()) == 3
