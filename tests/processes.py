"""Real processes on this machine, each with fake devices of its own, connected over gloo on the
loopback.

    with Processes("scenarios:density", 2, tmp_path, batches="uneven") as processes:
        results = [ended.result for ended in processes.wait()]

Each process calls ``scenarios.density(batches="uneven")``, a function of a module in this folder,
after ``hessdensity.distributed.start``; what it returns, as JSON, is the process's result. For what
is to happen in the middle of a run, ``wait_for(index, text)`` waits until a process has printed a
text, and ``signal(index, SIGKILL)`` sends it a signal. One process (count=1) is started without any
coordinator, as an ordinary program is. Whatever happens, nothing outlives the ``with`` block."""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Ended(NamedTuple):
    """How a process has ended."""

    code: int
    """Its exit status, the negative signal number if one killed it."""
    seconds: float
    """From the start of `wait` to its end, at most a tenth too long."""
    result: Any
    """What its function returned, or None."""
    output: str
    """All it has written to standard output and standard error."""


class TimeLimitError(AssertionError):
    """The processes were not done in time; the message ends with what they wrote."""


class Processes:
    """``count`` processes that run one function.

    Args:
      scenario: ``"module:function"``, the module in this folder.
      count: number of processes.
      folder: where output and results go, such as tmp_path; one call after another may share it.
      devices: fake devices of each process.
      options: keyword arguments of `hessdensity.distributed.start`.
      arguments: keyword arguments of the function, JSON.
    """

    def __init__(self, scenario, count, folder, *, devices=2, options=None, **arguments):
        self._folder = Path(folder) / f"processes-{time.monotonic_ns()}"
        self._folder.mkdir(parents=True)
        options = dict(options or {})
        if count > 1:
            options |= {"coordinator_address": f"127.0.0.1:{_free_port()}", "num_processes": count}
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(
                map(str, [HERE.parent, HERE, HERE / "runs", HERE / "benchmarks"])
            ),
            "PYTHONUNBUFFERED": "1",
        }
        self._running = []
        for index in range(count):
            own = options | ({"process_id": index} if count > 1 else {})
            task = [
                scenario,
                json.dumps(arguments),
                json.dumps(own),
                str(self._path(index, "json")),
            ]
            with self._path(index, "out").open("w") as output:
                process = subprocess.Popen(
                    [sys.executable, __file__, *task],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            self._running.append(process)

    def wait(self, limit=120, only=None):
        """A list of `Ended` of all processes, or of those ``only``, once they have ended.

        `TimeLimitError` after ``limit`` seconds.
        """
        began, ended = time.monotonic(), {}
        awaited = range(len(self._running)) if only is None else only
        while len(ended) < len(awaited):
            for index in set(awaited) - set(ended):
                if self._running[index].poll() is not None:
                    ended[index] = time.monotonic() - began
            self._check(
                began, limit, f"only {sorted(ended)} of the processes {list(awaited)} have ended"
            )
        return [
            Ended(
                self._running[index].returncode,
                ended[index],
                self._result(index),
                self.output(index),
            )
            for index in awaited
        ]

    def wait_for(self, index, text, limit=120):
        """Waits until process ``index`` has written ``text``."""
        began = time.monotonic()
        while text not in self.output(index):
            self._check(began, limit, f"process {index} has not written {text!r}")
            if self._running[index].poll() is not None and text not in self.output(index):
                raise AssertionError(
                    f"process {index} has ended without writing {text!r}:\n{self.output(index)}"
                )

    def signal(self, index, number=signal.SIGKILL):
        """Sends a signal: SIGKILL, SIGTERM, SIGSTOP, SIGCONT."""
        self._running[index].send_signal(number)

    def output(self, index):
        """What a process has written so far."""
        return self._path(index, "out").read_text(errors="replace")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._running:
            if process.poll() is None:
                # Its own session: what it has started goes with it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _path(self, index, suffix):
        return self._folder / f"{index}.{suffix}"

    def _result(self, index):
        path = self._path(index, "json")
        return json.loads(path.read_text()) if path.exists() else None

    def _check(self, began, limit, what):
        if time.monotonic() - began > limit:
            written = [
                f"--- process {index}\n{self.output(index)[-3000:]}"
                for index in range(len(self._running))
            ]
            raise TimeLimitError("\n".join([f"{what} after {limit} s", *written]))
        time.sleep(0.1)


def run(scenario, count, folder, *, devices=2, limit=120, options=None, **arguments):
    """The results of all processes; AssertionError with the output of one that failed."""
    with Processes(
        scenario, count, folder, devices=devices, options=options, **arguments
    ) as processes:
        ended = processes.wait(limit)
    for index, one in enumerate(ended):
        assert one.code == 0, f"process {index} ended with {one.code}:\n{one.output[-3000:]}"
    return [one.result for one in ended]


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _main(scenario, arguments, options, path):
    from hessdensity import distributed

    distributed.start(**json.loads(options))
    module, function = scenario.split(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    partial = Path(path).with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(path)


if __name__ == "__main__":
    _main(*sys.argv[1:])
