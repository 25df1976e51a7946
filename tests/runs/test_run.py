"""Every long computation can be stopped, killed, resumed and planned in the same way."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import computations
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessdensity as hd
from hessdensity.runs.failures import undisturbed

HERE = Path(__file__).parents[1]
OPTIONS = {"progress": False}
every_computation = pytest.mark.parametrize("name", computations.ALL)


def compute(name, before=lambda: None, **options):
    operator = computations.hessian(before)
    return computations.ALL[name](operator, jax.random.key(0), **OPTIONS, **options)


def after(limit, error):
    """A function that raises an error when it is called for the time after ``limit``."""
    calls = iter(range(limit))

    def before():
        if next(calls, None) is None:
            raise error

    return before


@pytest.fixture(scope="module")
def whole():
    """The numbers of undisturbed computations, and how many products each takes."""
    found = {}
    for name in computations.ALL:
        calls = []
        _, numbers = compute(name, lambda calls=calls: calls.append(None))
        found[name] = numbers, len(calls)
    return found


def assert_same(numbers, expected):
    for ours, theirs in zip(numbers, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@every_computation
def test_a_run_stopped_on_the_way_is_resumed_bit_for_bit(name, whole, tmp_path):
    expected, count = whole[name]
    done = 0
    for rounds in range(count):
        calls = []

        def before(calls=calls):
            if len(calls) == 5:
                raise KeyboardInterrupt
            calls.append(None)

        try:
            result, numbers = compute(name, before, checkpoint=tmp_path / "run")
        except KeyboardInterrupt:  # within the first of the checkpoints of a track
            done += len(calls)
            continue
        done += len(calls)
        if about(result)["stopped"] is None:
            break
    assert_same(numbers, expected)
    # No product is done twice, save one for each resumed part to see that the data are the same:
    # of a track these are its points and the computation of the present one.
    assert count <= done <= count + (2 * rounds if name == "track" else 3)
    again = []
    _, numbers = compute(name, lambda: again.append(None), checkpoint=tmp_path / "run")
    assert_same(numbers, expected)
    assert len(again) <= 1 + (name == "trace, semidefinite")


def about(result):
    return result.description


def has_step(folder, number):
    """Whether so many steps are on disk, while another process writes there."""
    try:
        return any(folder.glob(f"**/step_{number:06}"))
    except FileNotFoundError:  # a folder that was renamed meanwhile
        return False


@every_computation
def test_a_run_killed_at_a_random_moment_is_resumed_bit_for_bit(name, whole, tmp_path):
    expected, count = whole[name]
    process = subprocess.Popen(
        [sys.executable, computations.__file__, name, str(tmp_path / "run"), "0.05"],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        limit = time.monotonic() + 120
        while not has_step(tmp_path / "run", 2):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(np.random.default_rng(len(name)).uniform(0, 0.3))
    finally:
        process.kill()
        process.communicate()
    calls = []
    _, numbers = compute(name, lambda: calls.append(None), checkpoint=tmp_path / "run")
    assert_same(numbers, expected)
    assert len(calls) < count


@every_computation
def test_ctrl_c_returns_what_is_there_and_says_so(name, whole):
    _, count = whole[name]
    calls = []

    def before():
        calls.append(None)
        if len(calls) == (30 if name == "track" else count - 1):
            raise KeyboardInterrupt

    result, _ = compute(name, before)
    stopped = about(result)["stopped"]
    assert stopped.startswith("interrupted after")
    assert ("checkpoint" in stopped) == (name == "track")


@every_computation
@pytest.mark.parametrize("error", [FloatingPointError("the gradient is not finite in batch 3")])
def test_a_product_that_is_not_finite_raises_with_the_partial_answer(name, error, whole):
    _, count = whole[name]
    with pytest.raises(hd.NonFiniteProductError, match="not finite in batch 3") as caught:
        compute(name, after(30 if name == "track" else count - 2, error))
    assert type(caught.value.partial) is type(compute(name)[0])
    with pytest.raises(hd.NonFiniteProductError, match="not finite in batch 3") as caught:
        compute(name, after(0, error))
    assert caught.value.partial is None


@every_computation
def test_sigterm_raises_with_the_partial_answer_and_ends_a_program_with_143(name, whole):
    _, count = whole[name]
    calls = []

    def before():
        calls.append(None)
        if len(calls) == (30 if name == "track" else count - 1):
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(hd.RunTerminated, match="SIGTERM") as caught:
        compute(name, before)
    assert caught.value.code == 143
    assert type(caught.value.partial) is type(compute(name)[0])
    assert signal.getsignal(signal.SIGTERM) == handler


@every_computation
def test_out_of_memory_is_answered_with_the_plan(name):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.")
    with pytest.raises(MemoryError, match=r"(?s)out of memory .*Plan of .*on a device") as caught:
        compute(name, after(2, error))
    assert caught.value.__cause__ is None


@every_computation
def test_a_description_has_one_format(name, whole):
    found = about(compute(name)[0])
    for entry in ("computation", "operator", "stopped", "versions"):
        assert entry in found
    assert found["computation"] == name.partition(",")[0]
    assert found["operator"]["kind"] in ("Hessian", "Notified")
    assert found["stopped"] is None
    assert set(found["versions"]) == {"hessdensity", "jax", "numpy"}


def test_signals_wait_until_a_step_is_whole():
    done = []

    def terminate(number, frame):
        raise hd.RunTerminated("SIGTERM")

    def whole_step(number, name):
        with undisturbed():
            os.kill(os.getpid(), number)
            done.append(name)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(hd.RunTerminated):
            whole_step(signal.SIGTERM, "the step")
        with pytest.raises(KeyboardInterrupt):
            whole_step(signal.SIGINT, "another")
        assert signal.getsignal(signal.SIGTERM) is terminate
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done == ["the step", "another"]


def test_outside_of_the_main_thread_signals_are_left_alone():
    found = []
    thread = threading.Thread(target=lambda: found.append(compute("trace")))
    thread.start()
    thread.join()
    assert len(found) == 1


def test_steps_of_version_1_are_refused_by_the_version_of_their_format(tmp_path, key):
    hd.spectral_measure(hd.Matrix(jnp.eye(3)), jnp.ones(3), 1, checkpoint=tmp_path, **OPTIONS)
    path = tmp_path / "step_000000" / "scalars" / "metadata"
    path.write_text(path.read_text().replace('"format": 3, ', ""))
    with pytest.raises(ValueError, match="version 1 of the format, and this hessdensity can only"):
        hd.spectral_measure(hd.Matrix(jnp.eye(3)), jnp.ones(3), 1, checkpoint=tmp_path, **OPTIONS)


def test_a_track_refuses_other_checkpoints_than_those_it_has_saved(tmp_path, key):
    settings = {"rank": 1, "density": False, "checkpoint": tmp_path / "run", **OPTIONS}

    def make(scale):
        return computations.hessian(scale=scale)

    hd.track(make, [(0, 1.0), (1, 1.1)], key, **settings)
    with pytest.raises(ValueError, match="checkpoint number 1 had params"):
        hd.track(make, [(0, 1.0), (1, 1.2)], key, **settings)
    with pytest.raises(ValueError, match=r"checkpoint number 1 had step 1.0, now 5.0"):
        hd.track(make, [(0, 1.0), (5, 1.1)], key, **settings)


def test_a_resumed_track_refuses_other_data(tmp_path, key):
    settings = {"rank": 1, "density": False, "checkpoint": tmp_path / "run", **OPTIONS}
    x = np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32)

    def track(factor, *steps):
        def make(scale):
            batches = [(factor * x, np.ones(20, np.float32))]
            return hd.Hessian(computations.loss, computations.weights(scale), batches)

        return hd.track(make, [(step, 1.0 + step) for step in steps], key, **settings)

    whole = track(1, 0, 1)
    np.testing.assert_array_equal(track(1, 0, 1).values, whole.values)
    for steps in ((0, 1), (0, 1, 2)):
        with pytest.raises(ValueError, match=r"operator.batch_losses\[0\] was"):
            track(2, *steps)
    assert len(track(1, 0, 1, 2)) == 3


def test_what_an_interruption_leaves_of_a_saved_point_does_not_hinder_the_next(tmp_path, key):
    settings = {"rank": 1, "density": False, "checkpoint": tmp_path / "run", **OPTIONS}

    def make(scale):
        return computations.hessian(scale=scale)

    hd.track(make, [(0, 1.0)], key, **settings)
    left = tmp_path / "run" / "eigenspace-000000"
    (left / "step_000000").mkdir(parents=True)
    track = hd.track(make, [(0, 1.0), (1, 1.1)], key, **settings)
    assert len(track) == 2
    assert not left.exists()
    again = hd.track(make, [(0, 1.0), (1, 1.1)], key, **settings)
    assert again.eigenspace.num_passes == track.eigenspace.num_passes > 0
    assert again.eigenspace.description["rank"] == 1


def test_an_interrupted_exact_trace_claims_nothing(key):
    values = np.r_[np.full(10, 1000.0), np.zeros(90)].astype(np.float32)
    operator = computations.Interrupted(hd.Matrix(jnp.diag(jnp.asarray(values))), 1)
    found = hd.trace(operator, key, 100, **OPTIONS)
    assert found.description["stopped"] == "interrupted after 8 products"
    assert (found.lower, found.upper) == (-np.inf, np.inf)


def test_a_hessian_and_its_data_are_let_go_without_a_collector():
    """A circle of references would keep parameters on the device until Python looks for it."""
    gc.collect()
    gc.disable()
    try:
        operator = computations.hessian()
        found = weakref.ref(operator.risk)
        operator @ operator.params
        operator.gradient(operator.params)
        hd.verify_operator(operator, jax.random.key(0))
        del operator
        assert found() is None
    finally:
        gc.enable()


def test_a_tracker_without_a_checkpoint_keeps_no_parameters(key):
    tracker = hd.Tracker(
        lambda scale: computations.hessian(scale=scale), key, rank=1, density=False, **OPTIONS
    )
    tracker.measure(0, 1.0)
    assert tracker._saved is None
