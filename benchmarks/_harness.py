"""Timing, and a record of what was timed on which machine."""

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

ROOT = Path(__file__).parents[1]


class Timing(NamedTuple):
    """Wall-clock seconds of one call."""

    median: float  # over the repeats
    spread: float  # interquartile range


def interleave(thunks: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, Timing]:
    """Time functions of no arguments against each other, from their call until their arrays are
    ready.

    One call of each goes first and is not counted (compilation, caches). Then they take turns: what
    else the machine does falls on all alike, and their ratios can be trusted further than their
    seconds."""
    for thunk in thunks.values():
        jax.block_until_ready(thunk())
    seconds: dict[str, list[float]] = {name: [] for name in thunks}
    for _ in range(repeats):
        for name, thunk in thunks.items():
            start = time.perf_counter()
            jax.block_until_ready(thunk())
            seconds[name].append(time.perf_counter() - start)
    return {name: _summary(samples) for name, samples in seconds.items()}


def measure(function: Callable, *args: Any, repeats: int = 5) -> Timing:
    """The time of `function(*args)` alone, after one call that is not counted."""
    return interleave({"only": lambda: function(*args)}, repeats)["only"]


def _summary(samples: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(middle, high - low)


def processes() -> ProcessPoolExecutor:
    """A pool of one process for each core, each of which computes with one thread on the CPU.

    For answers that are figures, not times.
    """
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    one = "--xla_cpu_multi_thread_eigen=false"
    os.environ.update({name: "1" for name in threads}, JAX_PLATFORMS="cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {one}".strip()
    return ProcessPoolExecutor(_cores(), multiprocessing.get_context("spawn"))


def environment() -> dict[str, Any]:
    """What a reader needs to judge a figure: versions, processor, accelerator, date. No host name,
    no paths."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "flax")},
        "system": platform.system(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "cpu": _cpu_model(),
        "cores": _cores(),
    }


def _cpu_model() -> str:
    # platform.processor() is empty or just "x86_64" on most Linux systems.
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match[1] if match else platform.processor()


def _cores() -> int:
    # A container may be given fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def save(question: str, result: Any) -> Path:
    """Write `result` (anything JSON holds), its command and environment to
    results/<machine>/<question>.json."""
    written = record(question, result)
    facts = written["environment"]
    if facts["platform"] == "cpu":
        machine = f"cpu {facts['cpu']} {facts['cores']} cores"
    else:
        machine = f"{facts['platform']} {facts['device_kind']} {facts['num_devices']} devices"
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / slug / f"{question}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=2) + "\n")
    return path


def record(question: str, result: Any) -> dict[str, Any]:
    """`result` with its question, command and environment."""
    return {
        "question": question,
        "command": _command(),
        "environment": environment(),
        "result": result,
    }


def _command() -> str:
    """This process's command line as typed in the project's root."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        program = ["-m", ".".join(script.relative_to(ROOT).with_suffix("").parts)]
    else:
        program = [script.name]
    return shlex.join(["python", *program, *sys.argv[1:]])
