"""How much memory there is, and how much arrays take of it on each device."""

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

_SHARE = 0.9  # of the free memory may be planned for
_CGROUP = Path("/sys/fs/cgroup")


class Free(NamedTuple):
    """Memory that may be planned for, in bytes."""

    device: int | None
    """On each device; None where it is unknown."""
    host: int
    """On the host, for each of its devices."""
    shared: bool = False
    """Whether that is the same memory, as where the devices are processors."""


def bytes_per_device(tree: PyTree) -> int:
    """Bytes of a tree's arrays, concrete or abstract, on one device."""

    def held(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(map(held, jax.tree.leaves(trees.abstract(tree))))


def free_memory(like: PyTree) -> Free:
    """Nine tenths of what is free now. Where vectors span processes, of the one that has least: all
    must choose alike.

    A collective of these processes then.
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
    host, neighbors = _SHARE * _free_on_host() / max(len(devices), 1), 1
    if len(everywhere) > len(devices):
        from jax.experimental.multihost_utils import process_allgather

        here = zlib.crc32(platform.node().encode()) % 2**24  # float32 holds it
        facts = np.asarray(process_allgather(np.array([device, host, here], np.float32)), float)
        (device, host), neighbors = (
            facts[:, :2].min(axis=0),
            int(max(np.unique(facts[:, 2], return_counts=True)[1])),
        )
    host /= neighbors
    device = host if shared else device
    return Free(int(device) if np.isfinite(device) else None, int(host), shared)


def _free_on_host() -> int:
    """Bytes free on this host, or in this job's share of it."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (
            int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):  # there is no such group, or it has no limit ("max")
        return free
    return min(free, limit - used)
