"""A job of several processes that loses one ends, and goes on later with as many processes as there
are then."""

import signal
import time

import jax
import numpy as np
import pytest
import scenarios
from processes import Processes, run

import hessdensity as hd
from hessdensity import distributed


def job(checkpoint, pause=0.0):
    """A density with a checkpoint on all devices of all processes; the global batches are the same
    on any number."""
    mesh = distributed.make_mesh()
    params = distributed.place(scenarios.weights(), mesh, min_size=8)
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((40, 8)).astype(np.float32), rng.random(40).astype(np.float32)
    first, count = jax.process_index(), jax.process_count()
    passes = iter(range(10**6))

    def batches():
        print(f"pass {next(passes)}", flush=True)
        for start in range(0, 40, 16):  # the last one is of 8
            time.sleep(pause)
            yield x[start : start + 16][first::count], y[start : start + 16][first::count]

    hessian = hd.Hessian(scenarios.loss, params, batches)
    settings = {"num_steps": 6, "deflation_steps": 8, "progress": False, "checkpoint": checkpoint}
    found = hd.spectral_density(hessian, jax.random.key(0), **settings)
    return {
        "rules": [[rule.nodes.tolist(), rule.weights.tolist()] for rule in found.rules],
        "fingerprint": found.description["operator"]["params"],
        "passes": next(passes),
    }


@pytest.mark.parametrize(
    ("number", "word", "count", "devices"),
    [(signal.SIGKILL, "lost contact", 1, 4), (signal.SIGTERM, "SIGTERM: the process ends", 4, 1)],
    ids=["one is killed", "all are told to end"],
)
def test_a_job_that_is_stopped_goes_on_with_another_number_of_processes(
    number, word, count, devices, tmp_path
):
    whole = job(None)
    assert whole["passes"] == 14
    options = {"heartbeat_timeout": 10, "shutdown_timeout": 10}
    folder = str(tmp_path / "run")
    with Processes(
        "test_killed_jobs:job", 2, tmp_path, options=options, checkpoint=folder, pause=0.3
    ) as processes:
        processes.wait_for(1, "pass 5", limit=300)
        if number == signal.SIGTERM:
            processes.signal(0, number)
        processes.signal(1, number)
        ended = processes.wait(60)
    assert all(one.code != 0 for one in ended)
    assert word in ended[0].output, ended[0].output[-3000:]
    resumed = run(
        "test_killed_jobs:job", count, tmp_path, devices=devices, limit=300, checkpoint=folder
    )
    for one in resumed:
        assert 14 - 5 <= one["passes"] <= 14 - 3
        scenarios.assert_same(one | {"passes": 14}, whole)
