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
WITH_MATRIX = (
    hd.Rule(
        [0.5, 2.0, 3.0],
        [0.25, 0.5, 0.25],
        1,
        [0.1, 0.0, 0.2],
        0.3,
        4,
        [2.2, 2.6],
        [0.4, 0.1],
        enclosure=(0.4, 3.3),
    ),
    hd.Rule(
        [1.0, 3.0, 4.0],
        [0.5, 0.2, 0.3],
        1,
        [0.0, 0.1, 0.1],
        diagonal=[2.0, 3.0, 3.5],
        off_diagonal=[1.0, 0.5, 0.2],
        pinned=True,
    ),
    RULES[1],
)
LATER = ("coupling_rank", "diagonal", "off_diagonal", "pinned", "enclosure")


def write_version_2(path, given):
    """What version 0.1.0 wrote."""
    arrays = {
        "dimension": np.array(40),
        "num_matvecs": np.array(5),
        "description": np.array(json.dumps({"key": [0, 1]})),
        "given": np.array(given),
        **archive.pack(RULES),
    }
    for name in ("coupling_rank", "pinned", "steps", "diagonal", "off_diagonal", "low", "high"):
        del arrays[name]
    archive.store(path, "hessdensity.SpectralDensity", 2, arrays)


def assert_same(loaded, rules=RULES):
    assert (loaded.dimension, loaded.num_matvecs, loaded.description) == (40, 5, {"key": [0, 1]})
    for ours, theirs in zip(loaded.rules, rules, strict=True):
        for field in ("nodes", "weights", "residuals", "num_deflated", "coupling", *LATER):
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
    saved = kind(WITH_MATRIX, 40, 5, {"key": [0, 1]})
    saved.save(tmp_path / "result.npz")
    loaded = kind.load(tmp_path / "result.npz")
    assert type(loaded) is kind
    assert_same(loaded, WITH_MATRIX)
    assert str(loaded) == str(saved)
    with np.load(tmp_path / "result.npz") as saved:
        assert int(saved["version"]) == 4


def test_a_rule_in_json_keeps_every_bit():
    for rule in WITH_MATRIX:
        again = archive.rule_from_json(json.loads(json.dumps(archive.rule_as_json(rule))))
        for field in ("nodes", "weights", "residuals", "num_deflated", "coupling", *LATER):
            np.testing.assert_array_equal(getattr(again, field), getattr(rule, field))


def test_rules_without_a_matrix_keep_their_values_and_have_certain_bounds_for_shares():
    density = hd.SpectralDensity(RULES[1:], 40, 5)
    assert density.moment(1).value == 2.5
    assert density.moment(1).quadrature[0] == pytest.approx(2.5, abs=0.1)
    assert density.cdf(2.0).quadrature == (0, 1)


def test_a_density_is_a_measure_that_adds_trace_and_norm():
    assert issubclass(hd.SpectralDensity, hd.SpectralMeasure)
    added = set(dir(hd.SpectralDensity)) - set(dir(hd.SpectralMeasure))
    assert added == {"trace", "frobenius_norm", "outliers", "eigenspace"}
    measure = hd.SpectralMeasure(RULES, 40, 5)
    assert measure.moment(1).standard_error == 0
    assert measure.cdf(1.5).probes == (measure.cdf(1.5).value,) * 2
    assert "Rayleigh quotient" in str(measure)
    assert "trace" not in str(measure)
