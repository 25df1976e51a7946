"""How much memory is free, and how much memory arrays take on each device."""

from __future__ import annotations

import math
import platform
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hessdensity.vectors import trees
from hessdensity.vectors.trees import PyTree

_SHARE = 0.9  # the share of the free memory that a plan may use
_CGROUP = Path("/sys/fs/cgroup")


class Free(NamedTuple):
    """Memory that a plan may use, in bytes."""

    device: int | None
    """On each device, or None if it is unknown."""
    host: int
    """On the host, for each of its devices."""
    shared: bool = False
    """Whether both are the same memory, as it is if the devices are CPUs."""


def bytes_per_device(tree: PyTree) -> int:
    """Bytes of a tree's arrays, concrete or abstract, on one device."""

    def held(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(map(held, jax.tree.leaves(trees.abstract(tree))))


def free_memory(like: PyTree) -> Free:
    """Nine tenths of the memory that is free now.

    If the vectors span several processes, the result is that of the process with the least memory,
    because all of them must choose alike. The call is then a collective of these processes.
    """
    shardings = [leaf.sharding for leaf in jax.tree.leaves(trees.abstract(like)) if leaf.sharding]
    everywhere = set().union(*(sharding.device_set for sharding in shardings)) or {
        jax.local_devices()[0]
    }
    devices = [device for device in everywhere if device.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in devices]
    shared = all(device.platform == "cpu" for device in devices)
    known = not shared and all(each and "bytes_limit" in each for each in stats)
    device = (
        min(_SHARE * (each["bytes_limit"] - each["bytes_in_use"]) for each in stats)
        if known
        else np.inf
    )
    host = _SHARE * _free_on_host() / max(len(devices), 1)
    neighbors = 1
    if len(everywhere) > len(devices):
        from jax.experimental.multihost_utils import process_allgather

        here = zlib.crc32(platform.node().encode()) % 2**24  # small enough for float32
        facts = np.asarray(process_allgather(np.array([device, host, here], np.float32)), float)
        device, host = facts[:, :2].min(axis=0)
        neighbors = int(max(np.unique(facts[:, 2], return_counts=True)[1]))
    host /= neighbors
    device = host if shared else device
    return Free(int(device) if np.isfinite(device) else None, int(host), shared)


def _free_on_host() -> int:
    """The number of bytes free on this host, or in this job's share of it."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (
            int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):  # there is no such group, or it has no limit ("max")
        return free
    return min(free, limit - used)
