"""Many devices and many processes: a mesh, parameters sharded over it, and connected processes.

Nothing else in the package depends on this module. It returns JAX's own objects, and a mesh or
shardings made in any other way work as well.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hessdensity.data.batches import fresh, refuse_misuse
from hessdensity.vectors.trees import PyTree

logger = logging.getLogger("hessdensity")

_called = False


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 30,
    shutdown_timeout: int = 60,
    connect_timeout: int = 300,
) -> None:
    """Connect the processes of a job. Call it before any other use of JAX.

    It calls ``jax.distributed.initialize``, which detects SLURM, Open MPI, Kubernetes and TPU pods.
    There no argument is needed. On other clusters the first three arguments must be given together.
    A process that belongs to no job continues alone, so that the same script runs anywhere. A
    second call does nothing.

    Args:
      coordinator_address: ``"host:port"`` of process 0, with any free port.
      num_processes: the number of processes.
      process_id: the number of this process, from 0.
      heartbeat_timeout: seconds after which a process that no longer answers, because it was killed
        or stopped, counts as dead. The others then end with an error, because none of them can
        continue without it.
      shutdown_timeout: seconds that a process waits for the others after it has finished or raised
        an error. Then all of them end. A process whose loader hangs has done neither; `watch` ends
        it.
      connect_timeout: seconds that the processes wait for each other in this call.

    Raises:
      ValueError: some but not all of the first three arguments are given, or the address is not
        ``"host:port"``.
      RuntimeError: JAX has been used already, or there is no coordinator at the address. (If other
        processes are missing, or on a cluster, JAX itself ends the process after the timeout.)

    Example:
      >>> start()  # doctest: +SKIP
      >>> mesh = make_mesh()  # of the devices of all processes  # doctest: +SKIP
    """
    global _called
    if _called or jax.distributed.is_initialized():
        return
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"start: {' and '.join(missing)} missing; give coordinator_address, num_processes and "
            "process_id together, or none of them where JAX detects the cluster (SLURM, Open MPI, "
            "Kubernetes, TPU pods)."
        )
    if coordinator_address and process_id:
        _wait_for(coordinator_address, process_id, connect_timeout)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=connect_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=shutdown_timeout,
        )
    except ValueError as error:
        # This is JAX's error when it finds no cluster.
        if not missing or "coordinator_address" not in str(error):
            raise
        logger.info("start: no cluster found; this process runs alone.")
    except RuntimeError as error:
        if "before any JAX calls" not in str(error):
            raise
        raise RuntimeError(
            "start: JAX has been used already, so its devices are fixed. Call "
            "hessdensity.distributed.start() first, before any array is made and before "
            "jax.devices()."
        ) from error
    _called = True


def _wait_for(address: str, process_id: int, timeout: float) -> None:
    """Wait until the coordinator listens.

    JAX waits too, but after its timeout it aborts the process with a stack of C++ frames.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"coordinator_address={address!r}, expected 'host:port', such as '10.0.0.1:1234'."
        )
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"start: process {process_id} found no coordinator at {address} within "
                    f"{timeout} s ({error}). Check that process 0 runs on that host, and that the "
                    "port is open there."
                ) from error
        time.sleep(0.2)


def watch(data: Any, timeout: float) -> Iterable[Any]:
    """Limit the time for each batch: if the loader hangs, its process ends, and so do all others.

    A process that waits for its disk forever still answers, so the others would wait for it
    forever. Here the wait for each batch is bounded. After ``timeout`` seconds the process prints
    the stack of each of its threads and ends immediately, with exit status 1. The others end as
    they do when a process dies (see `start`).

    Args:
      data: batches, as for `Hessian`.
      timeout: seconds that a batch may take. Allow many times the time of the slowest batch.

    Returns:
      The same batches. They can be iterated as often as ``data``.

    Raises:
      TypeError: data that cannot be iterated twice, as for `Hessian`.

    Example:
      >>> [len(batch) for batch in watch([np.zeros(3), np.zeros(2)], timeout=600)]
      [3, 2]
    """
    return _Watched(data, timeout)


class _Watched:
    """Batches of data; a batch that takes too long ends the process."""

    def __init__(self, data: Any, timeout: float) -> None:
        refuse_misuse(data)
        self._data = data
        self._timeout = timeout

    def __iter__(self) -> Iterator[Any]:
        batches = fresh(self._data)
        while True:
            # faulthandler's clock runs in a thread that does not need the interpreter lock, which
            # the hanging loader may hold. It needs a file: a replacement of sys.stderr, such as in
            # a notebook, may not be one, so this uses the process's own standard error.
            faulthandler.dump_traceback_later(
                self._timeout, exit=True, file=sys.__stderr__ or sys.stderr
            )
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                faulthandler.cancel_dump_traceback_later()
            yield batch


def make_mesh(
    *, data: int | None = None, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Make a mesh of all devices of all processes, with the axis "data".

    If ``model`` is greater than 1, the mesh also has an axis "model".

    Args:
      data: number of devices along "data". Batches are split over them, and by `place` also
        parameters. The default is the number of devices divided by ``model``.
      model: number of devices along "model", for parameters that you shard yourself.
      devices: the devices of the mesh, by default all.

    Raises:
      ValueError: ``data`` x ``model`` is not the number of devices.

    Example:
      >>> mesh = make_mesh(data=1, devices=jax.devices()[:1])
      >>> mesh.axis_names, mesh.size
      (('data',), 1)
    """
    devices = jax.devices() if devices is None else list(devices)
    length = len(devices) // max(model, 1) if data is None else data
    if model < 1 or length * model != len(devices):
        raise ValueError(
            f"data={data}, model={model}, but there are {len(devices)} devices; expected data x "
            "model of them: leave data out, or pass devices=jax.devices()[:count]."
        )
    shape, names = ((length, model), ("data", "model")) if model > 1 else ((length,), ("data",))
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def place(tree: PyTree, mesh: Mesh, *, axis: str = "data", min_size: int = 2**14) -> PyTree:
    """Shard parameters fully over a mesh (FSDP): each device holds its part of every large leaf.

    A leaf of at least ``min_size`` entries is split along the longest of its dimensions that the
    mesh axis divides. All other leaves are replicated. All vectors of this package take the
    shardings of the parameters.

    Args:
      tree: pytree of arrays, on the host or on devices. With several processes, each must give the
        same values. A pytree of ``jax.ShapeDtypeStruct`` serves for a plan: it only gets shardings.
      mesh: a mesh, such as one from `make_mesh`.
      axis: the mesh axis over which leaves are split.
      min_size: number of entries of the smallest leaf that is split. Splitting smaller leaves is
        not worth the communication.

    Returns:
      The same tree, placed on the mesh.

    Raises:
      ValueError: the mesh has no such axis.

    Example:
      >>> mesh = make_mesh(devices=jax.devices()[:1])
      >>> tree = {"kernel": np.zeros((512, 64), np.float32), "bias": np.zeros(64, np.float32)}
      >>> placed = place(tree, mesh)
      >>> print(placed["kernel"].sharding.spec, placed["bias"].sharding.spec)
      P('data', None) P()
    """
    if axis not in mesh.axis_names:
        raise ValueError(
            f"axis={axis!r}, but the mesh has the axes {mesh.axis_names}; expected one of them."
        )

    def put(leaf: Any) -> Any:
        abstract = isinstance(leaf, jax.ShapeDtypeStruct | jax.Array)
        leaf = leaf if abstract else np.asarray(leaf)
        sharding = NamedSharding(mesh, _spec(leaf.shape, mesh.shape[axis], axis, min_size))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, sharding)
        # Each process gives its own devices their parts, so that nothing is sent.
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, tree)


def _spec(shape: tuple[int, ...], count: int, axis: str, min_size: int) -> PartitionSpec:
    """Split the longest dimension that ``count`` divides, or none if the leaf is small."""
    divisible = [
        dimension for dimension, length in enumerate(shape) if length and length % count == 0
    ]
    if math.prod(shape) < min_size or not divisible:
        return PartitionSpec()
    longest = max(divisible, key=lambda dimension: shape[dimension])
    return PartitionSpec(
        *[axis if dimension == longest else None for dimension in range(len(shape))]
    )
