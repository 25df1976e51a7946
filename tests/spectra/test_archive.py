"""Files of earlier versions of the format are read, and each type reads its own."""

import json

import numpy as np
import pytest

import hessdensity as hd
from hessdensity.spectra import archive

RULES = (
    hd.Rule([0.5, 2.0, 3.0], [0.25, 0.5, 0.25], 1, [0.1, 0.0, 0.2], 0.3),
    hd.Rule([1.0, 4.0], [0.5, 0.5], 0, [0.0, 0.1]),
)


def write_version_2(path, given):
    """What version 0.1.0 wrote."""
    arrays = {
        "dimension": np.array(40),
        "num_matvecs": np.array(5),
        "description": np.array(json.dumps({"key": [0, 1]})),
        "given": np.array(given),
        **archive.pack(RULES),
    }
    archive.store(path, "hessdensity.SpectralDensity", 2, arrays)


def assert_same(loaded):
    assert (loaded.dimension, loaded.num_matvecs, loaded.description) == (40, 5, {"key": [0, 1]})
    for ours, theirs in zip(loaded.rules, RULES, strict=True):
        for field in ("nodes", "weights", "residuals", "num_deflated", "coupling"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))


@pytest.mark.parametrize("given", [False, True])
def test_files_of_version_2_are_read_as_the_type_that_they_hold(given, tmp_path):
    write_version_2(tmp_path / "old.npz", given)
    own, other = hd.SpectralDensity, hd.SpectralMeasure
    own, other = (other, own) if given else (own, other)
    loaded = own.load(tmp_path / "old.npz")
    assert type(loaded) is own
    assert_same(loaded)
    with pytest.raises(ValueError, match=rf"Read it with hd\.{own.__name__}\.load\(path\)"):
        other.load(tmp_path / "old.npz")


@pytest.mark.parametrize("kind", [hd.SpectralDensity, hd.SpectralMeasure])
def test_a_result_saved_and_loaded_is_the_same_and_of_the_same_type(kind, tmp_path):
    kind(RULES, 40, 5, {"key": [0, 1]}).save(tmp_path / "result.npz")
    loaded = kind.load(tmp_path / "result.npz")
    assert type(loaded) is kind
    assert_same(loaded)
    with np.load(tmp_path / "result.npz") as saved:
        assert int(saved["version"]) == 3


def test_a_density_is_a_measure_that_adds_trace_and_norm():
    assert issubclass(hd.SpectralDensity, hd.SpectralMeasure)
    added = set(dir(hd.SpectralDensity)) - set(dir(hd.SpectralMeasure))
    assert added == {"trace", "frobenius_norm", "outliers", "eigenspace"}
    measure = hd.SpectralMeasure(RULES, 40, 5)
    assert measure.moment(1).standard_error == 0
    assert measure.cdf(1.5).lower == measure.cdf(1.5).value == measure.cdf(1.5).upper
    assert "Rayleigh quotient" in str(measure)
    assert "trace" not in str(measure)
