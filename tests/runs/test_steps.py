"""A run that was stopped at any moment goes on, and ends with the answer of an undisturbed one."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import named_spectra as spectra
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import mlp

import hessdensity as hd

VALUES = spectra.ALL["outliers"]
SETTINGS = {"num_steps": 7, "num_probes": 2, "deflation_steps": 12, "progress": False}
HERE = Path(__file__).parents[1]


class Counted:
    """An operator that counts its products, and is stopped (Ctrl-C) in the one after ``limit``."""

    def __init__(self, operator, limit=None):
        self.operator, self.limit, self.num_passes = operator, limit, 0
        self.like, self.describe = operator.like, operator.describe

    def __matmul__(self, block):
        if self.num_passes == self.limit:
            raise KeyboardInterrupt
        self.num_passes += 1
        return self.operator @ block


def matrix(key, dtype=np.float32, values=VALUES):
    return hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key)


def assert_equal(ours, theirs):
    for a, b in zip(ours.rules, theirs.rules, strict=True):
        for field in ("nodes", "weights", "residuals"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


@pytest.mark.parametrize("basis", ["device", "host", "none"])
def test_a_density_stopped_after_every_step_goes_on_bit_for_bit(basis, key, dtype, tmp_path):
    operator, settings = matrix(key, dtype), {**SETTINGS, "basis": basis}
    whole, done = hd.spectral_density(operator, key, **settings), 0
    for _ in range(12):
        stopped = Counted(operator, limit=2)
        try:
            density = hd.spectral_density(stopped, key, checkpoint=tmp_path / "run", **settings)
        except KeyboardInterrupt:  # before the first product of all
            raise AssertionError from None
        done += stopped.num_passes
        if density.description["stopped"] is None:
            break
    assert_equal(density, whole)
    assert done == len(list((tmp_path / "run").iterdir())) == (13 if basis == "none" else 19)
    again = Counted(operator)
    assert_equal(hd.spectral_density(again, key, checkpoint=tmp_path / "run", **settings), whole)
    assert again.num_passes == 0


def test_a_run_for_a_tolerance_makes_the_same_decisions_when_it_goes_on(key, tmp_path):
    settings = {
        "num_steps": 5,
        "num_probes": 1,
        "deflation_steps": 10,
        "tolerance": 1e-3,
        "progress": False,
    }
    whole = hd.spectral_density(matrix(key), key, **settings)
    assert whole.num_matvecs > 15
    for limit in (13, 6, 9, None):
        density = hd.spectral_density(
            Counted(matrix(key), limit), key, checkpoint=tmp_path / "run", **settings
        )
    assert_equal(density, whole)
    assert density.description["spent"] == whole.description["spent"]


@pytest.mark.parametrize(
    "settings", [{"block_size": 2, "basis_size": 14}, {"block_size": 1}], ids=["restarts", "copies"]
)
def test_an_eigenspace_stopped_on_the_way_goes_on_bit_for_bit(settings, key, tmp_path):
    operator = matrix(key, values=np.append(np.linspace(-1, 1, 1200), [3.0, 3.0, 4.0, 5.0]))
    settings |= {"which": "LA", "progress": False}
    whole = hd.top_eigenspace(operator, key, 4, **settings)
    for limit in (3, 7, 4, None):
        space = hd.top_eigenspace(
            Counted(operator, limit), key, 4, checkpoint=tmp_path / "run", **settings
        )
    assert space.num_passes == whole.num_passes > 10
    for field in ("values", "residuals", "converged", "vectors"):
        np.testing.assert_array_equal(getattr(space, field), getattr(whole, field))
    assert space.converged.all()


def test_a_warm_started_eigenspace_goes_on_and_refuses_another_start(key, tmp_path):
    operator = matrix(key)
    starts = [
        hd.top_eigenspace(operator, each, 2, tolerance=0.1, progress=False)
        for each in jax.random.split(key)
    ]
    settings = {"checkpoint": tmp_path / "run", "progress": False}
    whole = hd.top_eigenspace(operator, key, 2, start=starts[0], progress=False)
    hd.top_eigenspace(Counted(operator, 2), key, 2, start=starts[0], **settings)
    space = hd.top_eigenspace(operator, key, 2, start=starts[0], **settings)
    np.testing.assert_array_equal(space.vectors, whole.vectors)
    with pytest.raises(ValueError, match=r"settings.start was '\w+', is '\w+'"):
        hd.top_eigenspace(operator, key, 2, start=starts[1], **settings)


def test_every_step_is_written_once_and_holds_its_own_vectors_alone(key, tmp_path):
    operator = hd.FunctionOperator(
        jax.jit(lambda v: v * jnp.linspace(-1, 1, 50_000)), jnp.zeros(50_000)
    )
    folder = tmp_path / "run"
    hd.spectral_density(Counted(operator, 14), key, checkpoint=folder, **SETTINGS)

    def files():
        return {
            path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()
        }

    before = files()
    hd.spectral_density(operator, key, checkpoint=folder, **SETTINGS)
    after = files()
    assert {path: after[path] for path in before} == before
    steps = [
        sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
        for step in sorted(folder.iterdir())
    ]
    assert len(steps) == 19
    for size, vectors in zip(steps, [1] * 12 + [2] * 7, strict=True):
        assert 0.8 * 200_000 * vectors < size < 200_000 * vectors + 20_000


def test_a_sharded_run_goes_on_with_another_number_of_devices(key, tmp_path):
    n = 4096
    values = jnp.linspace(-1, 1, n).at[-3:].set(jnp.array([4.0, 6.0, 9.0]))

    def operator_on(count, limit=None):
        mesh = jax.make_mesh(
            (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
        )
        like = jax.ShapeDtypeStruct(
            (n,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
        )
        placed = jax.device_put(values, like.sharding)
        return Counted(hd.FunctionOperator(jax.jit(lambda v: v * placed), like), limit)

    whole = hd.spectral_density(operator_on(8), key, **SETTINGS)
    for count, limit in [(8, 5), (2, 5), (1, 4), (4, None)]:
        density = hd.spectral_density(
            operator_on(count, limit), key, checkpoint=tmp_path / "run", **SETTINGS
        )
    assert density.description["stopped"] is None
    for a, b in zip(density.rules, whole.rules, strict=True):
        np.testing.assert_allclose(a.nodes, b.nodes, atol=1e-5 * 9)
    assert hd.distance(density, whole) < 1e-5 * 9


def test_vectors_may_be_any_tree(key, tmp_path):
    loss, params, batch = mlp(np.float32)
    hessian = hd.Hessian(loss, params, [batch], where="first/*")  # None where leaves are held
    whole = hd.spectral_density(hessian, key, **SETTINGS)
    for limit in (5, None):
        density = hd.spectral_density(
            Counted(hessian, limit), key, checkpoint=tmp_path / "run", **SETTINGS
        )
    assert_equal(density, whole)


def hessian_of(seed=0, examples=64, batch_size=20, factor=1.0, order=1):
    loss, params, (x, y) = mlp(np.float32, examples=64, seed=seed)
    params = jax.tree.map(lambda leaf: leaf * factor, params)
    return hd.Hessian(
        loss, params, hd.batches((x[:examples][::order], y[:examples][::order]), batch_size)
    )


def test_another_computations_checkpoint_is_refused_and_the_difference_named(key, tmp_path):
    folder, other = tmp_path / "run", jax.random.key(1)
    hd.spectral_density(Counted(hessian_of(), 4), key, checkpoint=folder, **SETTINGS)

    def resumed(operator, key=key, **changed):
        return hd.spectral_density(operator, key, checkpoint=folder, **(SETTINGS | changed))

    for call, said in [
        (lambda: resumed(hessian_of(factor=1.001)), r"operator.params was '\w+', is '\w+'"),
        (lambda: resumed(hessian_of(), num_steps=8), r"settings.num_steps was 7, is 8"),
        (lambda: resumed(hessian_of(), tolerance=0.1), r"settings.tolerance was None, is 0.1"),
        (lambda: resumed(hessian_of(), other), r"settings.key\S* was"),
        (lambda: resumed(hessian_of(examples=60)), r"operator.num_examples was 64, is 60"),
        (lambda: resumed(hessian_of(batch_size=32)), r"operator.batch_losses had 4 entries, now 2"),
        (lambda: resumed(hessian_of(order=-1)), r"operator.batch_losses\[0\] was \S+, is \S+"),
        (lambda: resumed(matrix(key)), r"operator.kind was 'Hessian', is 'Matrix'"),
        (
            lambda: resumed(hessian_of(), basis="none"),
            "kept a basis, with 2 probes at once, and can only",
        ),
        (
            lambda: resumed(hessian_of(), probes_at_once=1),
            "with 2 probes at once, and can only continue",
        ),
        (
            lambda: hd.top_eigenspace(hessian_of(), key, 2, checkpoint=folder, progress=False),
            "'top_eigenspace'",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
    # None of them has spoilt it.
    assert_equal(
        resumed(hessian_of(), basis="host"), hd.spectral_density(hessian_of(), key, **SETTINGS)
    )


def test_shuffled_data_are_refused_with_a_checkpoint(key, tmp_path):
    loss, params, batch = mlp(np.float32)
    batches, random = hd.batches(batch, 16), np.random.default_rng(0)
    hessian = hd.Hessian(loss, params, lambda: (batches[i] for i in random.permutation(4)))
    with (
        pytest.warns(UserWarning, match="another order"),
        pytest.raises(RuntimeError, match="Pass shuffle=False"),
    ):
        hd.spectral_density(hessian, key, checkpoint=tmp_path / "run", **SETTINGS)


def test_a_folder_that_is_no_checkpoint_is_refused(key, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name, said in [
        ("full", "holds 'thesis.tex', which is not a step"),
        ("file", "is a file; expected a folder"),
    ]:
        with pytest.raises(ValueError, match=said):
            hd.spectral_density(matrix(key), key, checkpoint=tmp_path / name, **SETTINGS)
    hd.spectral_density(Counted(matrix(key), 5), key, checkpoint=tmp_path / "run", **SETTINGS)
    shutil.rmtree(tmp_path / "run" / "step_000003")
    with pytest.raises(
        ValueError, match=r"step 3 of 5 is missing. Put it back, or delete the steps after it"
    ):
        hd.spectral_density(matrix(key), key, checkpoint=tmp_path / "run", **SETTINGS)


def test_a_step_that_cannot_be_written_is_told_as_such(key, tmp_path):
    operator = hd.FunctionOperator(
        jax.jit(lambda v: v * jnp.linspace(-1, 1, 50_000)), jnp.zeros(50_000)
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, before[1])
    )  # a full disk, for files above that
    try:
        with pytest.raises(
            RuntimeError,
            match=r"run' cannot be written \(.*\). The steps before are saved. Make room",
        ):
            hd.spectral_density(operator, key, checkpoint=tmp_path / "run", **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # Room again: the run goes on from whatever is there.
    density = hd.spectral_density(operator, key, checkpoint=tmp_path / "run", **SETTINGS)
    assert density.description["stopped"] is None


def test_a_complete_checkpoint_is_not_the_answer_for_other_data(key, tmp_path):
    settings = {"checkpoint": tmp_path / "run", **SETTINGS}
    whole = hd.spectral_density(hessian_of(), key, **settings)
    assert_equal(hd.spectral_density(hessian_of(), key, **settings), whole)
    with pytest.raises(ValueError, match=r"operator.batch_losses\[0\] was \S+, is \S+"):
        hd.spectral_density(hessian_of(order=-1), key, **settings)
    settings = {"checkpoint": tmp_path / "top", "progress": False}
    hd.top_eigenspace(hessian_of(), key, 2, **settings)
    with pytest.raises(ValueError, match=r"operator.batch_losses\[0\] was \S+, is \S+"):
        hd.top_eigenspace(hessian_of(order=-1), key, 2, **settings)


def test_a_resumed_restart_takes_the_rotation_of_the_first_run(key, tmp_path, monkeypatch):
    """Another machine's eigh may give other signs, and what is on disk belongs to those of the
    first."""
    operator = matrix(key, values=np.append(np.linspace(-1, 1, 1200), [3.0, 4.0, 5.0]))
    settings = {"which": "LA", "block_size": 2, "basis_size": 14, "progress": False}
    whole = hd.top_eigenspace(operator, key, 3, **settings)
    hd.top_eigenspace(Counted(operator, 9), key, 3, checkpoint=tmp_path / "run", **settings)
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda a: (eigh(a)[0], -eigh(a)[1]))
    space = hd.top_eigenspace(operator, key, 3, checkpoint=tmp_path / "run", **settings)
    np.testing.assert_allclose(space.values, whole.values, rtol=1e-6)
    assert space.converged.all()


def test_settings_may_be_numpy_numbers_and_more_probes_at_once_than_there_are(key, tmp_path):
    settings = {
        "checkpoint": tmp_path / "run",
        "progress": False,
        "deflation_steps": 12,
        "probes_at_once": 5,
    }
    whole = hd.spectral_density(matrix(key), key, num_steps=np.int64(7), num_probes=2, **settings)
    assert_equal(
        hd.spectral_density(matrix(key), key, num_steps=7, num_probes=2, **settings), whole
    )


# Killed processes. The child is this file; a product of its operator takes a moment, or an hour. --


class Slow(Counted):
    def __matmul__(self, block):
        time.sleep(0.05 if self.num_passes != self.limit else 3600)
        self.num_passes += 1
        return self.operator @ block


def child(folder, limit):
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), str(limit)],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(folder, step, process):
    while not (folder / f"step_{step:06}").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def test_what_a_kill_at_any_of_20_random_moments_leaves_is_a_usable_checkpoint(key, tmp_path):
    """A stopped process's folder is what SIGKILL would leave of it at that moment; every one of
    them is resumed."""
    random, folder, snapshots = np.random.default_rng(0), tmp_path / "run", []
    process = child(folder, limit=10**9)
    try:
        wait_for_step(folder, 0, process)
        for index in range(20):
            time.sleep(random.uniform(0.0, 0.1))
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # else a rename may still be under way
            snapshots.append(shutil.copytree(folder, tmp_path / f"killed_{index}"))
            process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    whole = hd.spectral_density(matrix(jax.random.key(0)), key, **SETTINGS)
    found = [
        sum(step.name.count("tmp") == 0 for step in snapshot.iterdir()) for snapshot in snapshots
    ]
    assert len(set(found)) > 3
    for snapshot in [*snapshots, folder]:
        assert_equal(
            hd.spectral_density(matrix(jax.random.key(0)), key, checkpoint=snapshot, **SETTINGS),
            whole,
        )


def test_sigterm_ends_a_run_within_seconds_on_its_last_step_though_a_product_takes_an_hour(
    key, tmp_path
):
    folder = tmp_path / "run"
    process = child(folder, limit=4)
    wait_for_step(folder, 3, process)
    time.sleep(0.2)
    start = time.monotonic()
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same call resumes the run from there" in output
    operator = Counted(matrix(jax.random.key(0)))
    density = hd.spectral_density(operator, key, checkpoint=folder, **SETTINGS)
    assert operator.num_passes == 19 - 4
    assert_equal(density, hd.spectral_density(matrix(jax.random.key(0)), key, **SETTINGS))


def test_signal_handlers_are_as_before_after_a_run(key, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    hd.spectral_density(matrix(key), key, checkpoint=tmp_path / "run", **SETTINGS)
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_what_a_checkpoint_says_of_itself_is_readable(key, tmp_path):
    hd.spectral_density(hessian_of(), key, checkpoint=tmp_path / "run", **SETTINGS)
    about = json.loads((tmp_path / "run" / "step_000000" / "scalars" / "metadata").read_text())[
        "about"
    ]
    assert about["settings"]["num_steps"] == 7
    assert about["operator"]["num_examples"] == 64
    assert about["decisions"] == {"keeps_basis": True, "probes_at_once": 2}


if __name__ == "__main__":
    slow = Slow(matrix(jax.random.key(0)), int(sys.argv[2]))
    hd.spectral_density(slow, jax.random.key(20190130), checkpoint=sys.argv[1], **SETTINGS)
