"""Many devices and many processes: a mesh, parameters sharded over it, the processes connected.

Nothing else in the package needs this room: what it returns is JAX's own, and a mesh or shardings
made in any other way do as well."""

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

logger = logging.getLogger("hessdensity")
from hessdensity.vectors.trees import PyTree

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
    """Connects the processes of a job; to be called first of all, before any other use of JAX.

    ``jax.distributed.initialize``, which finds out by itself what SLURM, Open MPI, Kubernetes and
    TPU pods say; then no argument is needed. A process that belongs to no job goes on alone, so
    that the same script runs anywhere. A second call does nothing.

    Args:
      coordinator_address: ``"host:port"`` of process 0, any free port. All three or none: on other
        clusters.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.
      heartbeat_timeout: seconds after which a process that no longer answers, killed or stopped,
        counts as dead. The others then end with an error: none can go on without it.
      shutdown_timeout: seconds that a process that is done, or has raised an error, waits for the
        others to be so too; then all of them end. A loader that hangs is none of these: `watch`.
      connect_timeout: seconds that the processes wait for each other here.

    Raises:
      ValueError: some of the three arguments are missing, or the address is none.
      RuntimeError: JAX has been used already; there is no coordinator at the address. (If other
        processes are missing, or on a cluster, JAX itself ends the process when the time is over.)

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
            f"start: {' and '.join(missing)} missing; expected coordinator_address, num_processes "
            "and process_id together, or none of them where the cluster tells (SLURM, Open MPI, "
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
        # JAX's word for "no cluster found".
        if not missing or "coordinator_address" not in str(error):
            raise
        logger.info("start: no cluster found; this process is alone.")
    except RuntimeError as error:
        if "before any JAX calls" not in str(error):
            raise
        raise RuntimeError(
            "start: JAX has been used already, and its devices are fixed. Call "
            "hessdensity.distributed.start() first, before any array is made and before "
            "jax.devices()."
        ) from error
    _called = True


def _wait_for(address: str, process_id: int, timeout: float) -> None:
    """Until the coordinator listens. JAX waits too, but then aborts the process with a stack of C++
    frames."""
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
                    f"{timeout} s ({error}). Is process 0 running on that host, and is the port "
                    "open there?"
                ) from error
        time.sleep(0.2)


def watch(data: Any, timeout: float) -> Iterable[Any]:
    """Data whose loader may not hang: if it does, its process ends, and with it all others.

    A process that waits for its disk for ever still answers, so that the others would wait for it
    for ever too. Here the wait for each batch is bounded: after ``timeout`` seconds the process
    prints where each of its threads stands and ends at once, with exit status 1. The others end as
    they do when a process dies (`start`).

    Args:
      data: batches, as for `Hessian`.
      timeout: seconds that a batch may take; many times what the slowest does.

    Returns:
      The same batches, as often as the data can be iterated.

    Raises:
      TypeError: data that cannot be iterated twice, as for `Hessian`.

    Example:
      >>> [len(batch) for batch in watch([np.zeros(3), np.zeros(2)], timeout=600)]
      [3, 2]
    """
    return _Watched(data, timeout)


class _Watched:
    def __init__(self, data: Any, timeout: float) -> None:
        refuse_misuse(data)
        self._data, self._timeout = data, timeout

    def __iter__(self) -> Iterator[Any]:
        batches = fresh(self._data)
        while True:
            # Its clock runs in a thread that needs no interpreter lock, which what hangs may hold.
            # The process's own standard error, since what stands in for it, in a notebook say, may
            # be no file.
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
    """A mesh of all devices of all processes: an axis "data", and an axis "model" where it is
    longer than 1.

    Args:
      data: devices along "data", over which batches (and by `place` parameters) are split; by
        default all that ``model`` leaves.
      model: devices along "model", for parameters that you shard yourself.
      devices: the devices, all by default.

    Raises:
      ValueError: data x model is not the number of devices.

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
    """Parameters fully sharded over a mesh (FSDP): each device holds its part of every large leaf.

    A leaf of at least ``min_size`` entries is split along its longest dimension that the axis
    divides; the others are replicated. All vectors of this package take the shardings of the
    parameters.

    Args:
      tree: pytree of arrays, on the host or on devices; in several processes the same values in
        each. Of ``jax.ShapeDtypeStruct``, for a plan: these with shardings.
      mesh: such as `make_mesh` gives.
      axis: the mesh axis to split over.
      min_size: entries of the smallest leaf that is split: small ones are not worth the
        communication.

    Raises:
      ValueError: the mesh has no such axis.

    Example:
      >>> mesh = make_mesh(devices=jax.devices()[:1])
      >>> placed = place({"kernel": np.zeros((512, 64), np.float32), "bias": np.zeros(64, np.float32)}, mesh)
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
        values = np.asarray(leaf)  # each process hands its own devices their parts: nothing is sent
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, tree)


def _spec(shape: tuple[int, ...], count: int, axis: str, min_size: int) -> PartitionSpec:
    divisible = [
        dimension for dimension, length in enumerate(shape) if length and length % count == 0
    ]
    if math.prod(shape) < min_size or not divisible:
        return PartitionSpec()
    longest = max(divisible, key=lambda dimension: shape[dimension])
    return PartitionSpec(
        *[axis if dimension == longest else None for dimension in range(len(shape))]
    )
