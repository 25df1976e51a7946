"""The command line does the main job from a file of the user's, and answers a mistake in one
sentence."""

import functools
import re
import sys

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import hessdensity as hd
from hessdensity import demo
from hessdensity.cli import main

PROBLEM = """
import jax.numpy as jnp
import numpy as np
import hessdensity as hd

X = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)

def regression():
    return (lambda w, x: jnp.mean((x @ w) ** 2)), jnp.ones(5), hd.batches(X, 8)

def operator():
    return hd.Matrix(np.diag(np.arange(1.0, 7.0, dtype=np.float32)))

def nothing():
    return None

def broken():
    import a_package_that_is_missing

constant = 3
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``hessdensity run`` in a folder that holds the user's module ``mine``."""
    (tmp_path / "mine.py").write_text(PROBLEM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield lambda *arguments: CliRunner().invoke(main, ["run", *arguments])
    sys.modules.pop("mine", None)


def png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("problem", "kind", "n"), [("regression", "Hessian", 5), ("operator", "Matrix", 6)]
)
def test_a_problem_or_an_operator_gives_a_summary_a_file_and_a_figure(
    run, tmp_path, problem, kind, n
):
    result = run(
        f"mine:{problem}",
        "--num-steps",
        "4",
        "--num-probes",
        "3",
        "--deflation-steps",
        "0",
        "--out",
        "d.npz",
        "--plot",
        "d.png",
    )
    assert result.exit_code == 0, result.output
    assert f"Spectral density of a {kind}, n = {n}" in result.stdout
    assert "Density: d.npz\nFigure: d.png\n" in result.stdout
    assert png(tmp_path / "d.png")
    density = hd.SpectralDensity.load("d.npz")
    assert str(density) in result.stdout
    assert (density.dimension, len(density.rules), density.nodes.shape) == (n, 3, (3, 4))
    assert density.num_matvecs == 12


def test_the_saved_density_is_the_one_that_the_library_gives(run, key):
    result = run(
        "mine:operator", "--num-steps", "4", "--seed", "7", "--out", "d.npz", "--no-progress"
    )
    assert result.exit_code == 0, result.output
    expected = hd.spectral_density(
        hd.Matrix(np.diag(np.arange(1.0, 7.0, dtype=np.float32))),
        jax.random.key(7),
        num_steps=4,
        progress=False,
    )
    saved = hd.SpectralDensity.load("d.npz")
    np.testing.assert_array_equal(saved.nodes, expected.nodes)
    np.testing.assert_array_equal(saved.weights, expected.weights)


def test_nothing_is_written_unless_asked(run, tmp_path):
    before = set(tmp_path.iterdir())
    assert run("mine:operator").exit_code == 0
    assert {path for path in tmp_path.iterdir() if path.name != "__pycache__"} == before


@pytest.mark.parametrize(("option", "shown"), [("--progress", True), ("--no-progress", False)])
def test_the_progress_bar_counts_products_on_standard_error(run, option, shown):
    result = run(
        "mine:operator", "--num-steps", "4", "--num-probes", "3", "--deflation-steps", "0", option
    )
    assert ("12/12" in result.stderr) == shown
    assert "HVP" not in result.stdout


def test_the_figure_may_be_on_a_symlog_axis(run, tmp_path):
    assert run("mine:operator", "--plot", "d.png", "--x-scale", "symlog").exit_code == 0
    assert png(tmp_path / "d.png")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mine"], "'mine' names no function; expected package.module:function"),
        (["mine:absent"], "module 'mine' has no function 'absent'"),
        (["absent:problem"], "module 'absent' is neither in the current folder nor installed"),
        (
            ["absent.inner:problem"],
            "module 'absent' is neither in the current folder nor installed",
        ),
        (
            ["mine:operator", "--out", "absent/d.npz"],
            "'absent/d.npz': the folder '.*absent' does not exist",
        ),
        (
            ["mine:operator", "--plot", "absent/d.png"],
            "'absent/d.png': the folder '.*absent' does not exist",
        ),
        (["mine:operator", "--plot", "d.pgn"], "pgn"),
        (["mine:operator", "--num-steps", "0"], "--num-steps"),
        (["mine:operator", "--num-probes", "0"], "--num-probes"),
        (["mine:operator", "--x-scale", "log"], "'log' is not one of 'linear', 'symlog'"),
        (["mine:constant"], "constant"),
        (["mine:nothing"], "nothing"),
        ([], "Missing argument 'PROBLEM'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_in_a_sentence_before_anything_is_computed(
    run, monkeypatch, arguments, sentence
):
    monkeypatch.setattr(hd.Matrix, "__matmul__", lambda *_: pytest.fail("a product was computed"))
    result = run(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert re.search(sentence, " ".join(result.stderr.split()))


def test_a_module_that_the_users_own_code_misses_is_not_taken_for_the_users_mistake(run):
    result = run("mine:broken")
    assert isinstance(result.exception, ModuleNotFoundError)
    assert result.exception.name == "a_package_that_is_missing"


@pytest.mark.parametrize("command", [[], ["run"], ["demo"]], ids=["hessdensity", "run", "demo"])
def test_help_says_what_it_does_and_with_which_defaults(command):
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    if command:
        assert all(
            word in text
            for word in (
                "--num-steps",
                "[default: ",
                "--num-probes",
                "--deflation-steps",
                "--seed",
                "--plot",
            )
        )
    else:
        assert all(word in text for word in ("demo", "run", "Hessian"))


def test_the_version_is_the_packages():
    assert hd.__version__ in CliRunner().invoke(main, ["--version"]).stdout


def test_the_demonstration_prints_estimates_beside_the_exact_answers(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo, "WIDTHS", (64, 2, 10))  # 160 weights instead of 1,210
    monkeypatch.setattr(demo, "problem", functools.partial(demo.problem, training_steps=3))
    figure = tmp_path / "demo.png"
    with jax.numpy_dtype_promotion("standard"):  # Adam's step count is an integer
        result = CliRunner().invoke(
            main, ["demo", "--plot", str(figure), "--num-steps", "8", "--num-probes", "4"]
        )
    assert result.exit_code == 0, result.output
    assert png(figure)
    text = result.stdout
    assert "Spectral density of a Hessian, n = 160" in text
    assert "1,797 examples" in text
    table = text[text.index("estimate  ") :].splitlines()
    assert table[0].split() == ["estimate", "exact"]
    for name in ("trace", "Frobenius norm"):
        (row,) = [line.split() for line in table if line.strip().startswith(name)]
        low, _, high, exact = (part.strip("()") for part in row[-4:])
        assert 2 * float(low) - float(high) <= float(exact) <= 2 * float(high) - float(low)
    assert "W1 distance / range" in text
    assert f"Figure: {figure}" in text


def test_without_scikit_learn_the_demonstration_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 1
    assert "pip install 'hessdensity[demo]'" in result.stderr


def test_the_table_of_the_demonstration_holds_the_exact_figures():
    eigenvalues = np.array([-1.0, 0.0, 0.0, 1.0, 2.0])
    rule = hd.Rule(eigenvalues, np.full(5, 0.2), 0, np.zeros(5))
    rows = {line[:24].strip(): line[24:].split() for line in demo.comparison(
        hd.SpectralDensity((rule,), 5, 5), eigenvalues).splitlines()}  # fmt: skip
    assert float(rows["largest eigenvalue"][0]) == float(rows["largest eigenvalue"][-1]) == 2
    assert float(rows["trace"][0]) == float(rows["trace"][-1]) == 2
    assert float(rows["share in ±0.002"][-1]) == 0.4
    assert float(rows["W1 distance / range"][0]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--block-size", "3", "--num-probes", "4"], "num_probes=4 and block_size=3"),
        (["--block-size", "3", "--deflation-steps", "0"], "deflation_steps=0 and block_size=3"),
        (["--block-size", "3", "--basis", "none"], "a block needs its basis"),
    ],
)
def test_settings_of_two_forms_are_refused_before_anything_is_computed(run, options, said):
    result = run("mine:operator", *options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
