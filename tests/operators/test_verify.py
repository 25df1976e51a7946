"""`verify_operator` passes what is a Hessian, and names what is wrong with what is none."""

import itertools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import hessdensity as hd
from hessdensity.operators.verify import Check, Verification

RNG = np.random.default_rng(0)
N = 12
X = RNG.standard_normal((9, N))
SYMMETRIC = X.T @ X / 9
PARAMS = RNG.standard_normal(N)
BATCHES = hd.batches(X, 4)


def loss(w, x):
    """Not quadratic: the Hessian is another one at another point."""
    return jnp.mean(jnp.logaddexp(x @ w, 0) ** 2)


BOTH = pytest.mark.usefixtures("dtype")  # float64, and float32 as everywhere else


def of_matrix(array):
    array = jnp.asarray(array)
    return hd.FunctionOperator(lambda v: v @ array, jnp.zeros(N))


def names(report):
    """The checks that failed, by their first word."""
    return [failure.split(":")[0] for failure in report.failures]


# What passes --------------------------------------------------------------------------------------


@BOTH
def test_a_hessian_passes_in_all_five_checks(key):
    report = hd.verify_operator(hd.Hessian(loss, jnp.asarray(PARAMS), BATCHES), key)
    assert report
    assert len(report.checks) == 5


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_hessian_passes_on_any_scale(scale, key):
    hessian = hd.Hessian(lambda w, x: scale * loss(w, x), jnp.asarray(PARAMS), BATCHES)
    assert hd.verify_operator(hessian, key)
    wrong = of_matrix(scale * np.triu(SYMMETRIC))
    assert "symmetry" in names(hd.verify_operator(wrong, key))


def test_the_hessian_of_some_leaves_passes(key):
    def split_loss(params, x):
        return loss(jnp.concatenate([params["a"], params["b"]]), x)

    params = {"a": jnp.asarray(PARAMS[:5]), "b": jnp.asarray(PARAMS[5:])}
    assert hd.verify_operator(hd.Hessian(split_loss, params, BATCHES, where="b"), key)


@BOTH
def test_a_relu_network_passes_in_spite_of_its_kinks(key):
    def relu_loss(w, x):
        return jnp.mean((jax.nn.relu(x @ w.reshape(N, 3)).sum(1) - 1) ** 2)

    hessian = hd.Hessian(relu_loss, jnp.asarray(RNG.standard_normal(3 * N)), BATCHES)
    assert hd.verify_operator(hessian, key)


KEYS = [jax.random.key(seed) for seed in range(3)]


@BOTH
@pytest.mark.parametrize("make", networks.HONEST.values(), ids=networks.HONEST)
def test_a_network_with_a_hessian_passes_with_every_key(make):
    hessian = make().hessian()
    for key in KEYS:
        report = hd.verify_operator(hessian, key)
        assert report, str(report)


@pytest.mark.parametrize("short", ["bfloat16", "float16"])
def test_a_network_in_a_short_dtype_passes(short, key):
    assert len(hd.verify_operator(networks.dense(jnp.tanh, short).hessian(), key).checks) == 5
    report = hd.verify_operator(networks.dense(jax.nn.relu, short).hessian(), key)
    assert report
    assert f"The derivative was not checked: its differences in {short}" in str(report)


@pytest.mark.parametrize(
    "array", [SYMMETRIC, -SYMMETRIC, np.zeros((N, N))], ids=["positive", "negative", "zero"]
)
def test_a_symmetric_matrix_passes_in_the_three_checks_that_need_no_loss(array, key):
    report = hd.verify_operator(hd.Matrix(array), key)
    assert report
    assert len(report.checks) == 3


# What fails ---------------------------------------------------------------------------------------


@BOTH
def test_a_matrix_that_is_not_symmetric_fails_for_symmetry_alone(key):
    assert names(hd.verify_operator(of_matrix(np.triu(SYMMETRIC)), key)) == ["symmetry"]


@pytest.mark.parametrize("make", networks.NOT_DERIVATIVES.values(), ids=networks.NOT_DERIVATIVES)
def test_a_rule_that_is_not_a_derivative_fails_for_symmetry_with_every_key(make):
    hessian = make().hessian()
    for key in KEYS:
        report = hd.verify_operator(hessian, key)
        assert "symmetry" in names(report)
        (found,) = (check for check in report.checks if check.name.startswith("symmetry"))
        assert found.error > 4 * found.allowed
        assert "custom derivative rules" in found.diagnosis
        assert "(networks.py:" in str(report)


@BOTH
def test_a_nonlinear_map_fails_for_linearity_alone(key):
    # On vectors of unit length this is the identity: symmetric there, and the same every time.
    operator = hd.FunctionOperator(lambda v: jnp.linalg.norm(v) * v, jnp.zeros(N))
    assert names(hd.verify_operator(operator, key)) == ["linearity"]


def test_an_affine_map_fails_for_linearity(key):
    operator = hd.FunctionOperator(lambda v: v + 0.1, jnp.zeros(N))
    assert "linearity" in names(hd.verify_operator(operator, key))


class Changing:
    """A Hessian on the first call, another one on the second, as if every call saw other data."""

    def __init__(self):
        self.like = jax.ShapeDtypeStruct((N,), jnp.zeros(0).dtype)
        self.factors = itertools.cycle([1.0, 1.1])

    def __matmul__(self, block):
        return next(self.factors) * block @ jnp.asarray(SYMMETRIC)


@BOTH
def test_an_operator_that_answers_differently_twice_fails_for_repeatability(key):
    assert "repeatability" in names(hd.verify_operator(Changing(), key))


def test_a_noisy_operator_fails_for_repeatability(key):
    rng = np.random.default_rng(0)
    operator = hd.FunctionOperator(
        lambda v: v @ jnp.asarray(SYMMETRIC) + 0.1 * jnp.asarray(rng.standard_normal(N)),
        jnp.zeros(N),
    )
    assert "repeatability" in names(hd.verify_operator(operator, key))


def test_an_operator_that_is_not_finite_fails_in_every_check(key):
    assert names(hd.verify_operator(of_matrix(np.full((N, N), np.nan)), key)) == [
        "symmetry",
        "linearity",
        "repeatability",
    ]


batch_gradient = jax.jit(lambda w, x: len(x) * jax.grad(loss)(w, x))
batch_hessian = jax.jit(lambda w, x: len(x) * jax.hessian(loss)(w, x))


class OwnHessian:
    """As a user writes one: products and gradients in plain JAX, for the last check to compare.

    Args:
      shift: how far from the parameters the products are taken.
      divide: how the batches' sums make the products: the mean over all examples, if it is right.
    """

    def __init__(self, shift=0.0, divide=lambda sums, counts: sum(sums) / sum(counts)):
        self.params = jnp.asarray(PARAMS)
        self.like = jax.ShapeDtypeStruct((N,), self.params.dtype)
        self.batches = [jnp.asarray(batch) for batch in BATCHES]
        counts = [len(batch) for batch in BATCHES]
        self.matrix = divide([batch_hessian(self.params + shift, x) for x in self.batches], counts)

    def gradient(self, offset):
        return sum(batch_gradient(self.params + offset, x) for x in self.batches) / len(X)

    def __matmul__(self, block):
        return block @ self.matrix


@BOTH
def test_a_users_own_hessian_passes(key):
    report = hd.verify_operator(OwnHessian(), key)
    assert report
    assert len(report.checks) == 4


def batch_means(sums, counts):
    return [total / count for total, count in zip(sums, counts, strict=True)]


WRONG = {
    "at another point": {"shift": 1.0},
    "summed over examples": {"divide": lambda sums, counts: sum(sums)},
    "summed over batches": {"divide": lambda sums, counts: sum(batch_means(sums, counts))},
    "the mean of batch means": {"divide": lambda sums, counts: sum(batch_means(sums, counts)) / 3},
    "of the opposite sign": {"divide": lambda sums, counts: -sum(sums) / sum(counts)},
}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_a_symmetric_operator_that_is_not_the_derivative_of_its_gradient_fails_for_that_alone(
    mistake, key
):
    assert names(hd.verify_operator(OwnHessian(**mistake), key)) == ["derivative"]


LOSSES = {
    "a sum": (lambda w, b: jnp.sum((b[0] @ w) ** 2), "It is the sum over the examples."),
    "a masked mean": (
        lambda w, b: jnp.sum((b[0] @ w) ** 2 * b[1]) / jnp.sum(b[1]),
        "Return hd.Total(sum, count) for a masked or weighted mean.",
    ),
    "a loss of batch statistics": (
        lambda w, b: jnp.mean((b[0] @ w - jnp.mean(b[0] @ w)) ** 4),
        "Set loss.whole_batch = True",
    ),
}


@BOTH
@pytest.mark.parametrize(("loss", "said"), LOSSES.values(), ids=LOSSES)
def test_a_loss_that_is_not_a_mean_over_examples_fails_for_that_alone(loss, said, key):
    mask = (np.arange(9) % 3 > 0).astype(X.dtype)
    real = jnp.zeros(0).dtype
    batches = hd.batches((X.astype(real), mask.astype(real)), 4)
    hessian = hd.Hessian(loss, jnp.asarray(PARAMS), batches)
    for operator in (hessian, hd.Restricted(hessian, "*")):
        report = hd.verify_operator(operator, key)
        assert names(report) == ["mean over examples"]
        assert said in " ".join(str(report).splitlines())
        assert max(map(len, str(report).splitlines())) <= 100


# The report ---------------------------------------------------------------------------------------


def test_the_tolerance_of_the_first_three_checks_is_the_callers(key):
    nearly = of_matrix(SYMMETRIC + 1e-2 * np.triu(SYMMETRIC))
    assert "symmetry" in names(hd.verify_operator(nearly, key))
    assert hd.verify_operator(nearly, key, tolerance=0.1)


def test_a_printed_report_says_what_fails_and_what_passed_with_its_error(key):
    lines = str(hd.verify_operator(of_matrix(np.triu(SYMMETRIC)), key)).splitlines()
    assert lines[0] == "The operator fails: symmetry: u.H(Hu) = Hu.Hu"
    assert [line.split()[:2] for line in lines[1:]] == [
        ["FAILED", "symmetry:"],
        ["passed", "linearity:"],
        ["passed", "repeatability:"],
    ]
    assert all("error" in line and "allowed" in line for line in lines[1:])
    assert max(map(len, lines)) <= 100


def test_a_printed_report_of_a_good_operator_says_so(key):
    lines = str(hd.verify_operator(hd.Matrix(SYMMETRIC), key)).splitlines()
    assert lines[0] == "The operator passes all checks"
    assert "FAILED" not in "".join(lines)


def test_a_printed_report_says_why_a_check_was_not_made(key):
    report = hd.verify_operator(hd.Hessian(loss, jnp.asarray(PARAMS), hd.batches(X, 1)), key)
    assert report
    assert len(report.checks) == 4
    assert str(report).splitlines()[-1] == (
        "Whether the loss is a mean over examples was not checked: no batch has two examples."
    )


def test_a_report_is_false_where_a_check_failed_and_a_nan_is_a_failure():
    good, bad = Check("good", 0.1, 0.1), Check("bad", float("nan"), 0.1)
    assert Verification((good,))
    assert not Verification((good, bad))
    assert Verification((good, bad)).failures == ("bad",)
