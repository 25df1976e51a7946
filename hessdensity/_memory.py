"""How much memory there is, and how much arrays take of it on each device."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from . import _trees

PyTree = Any

_SHARE = 0.9  # of the free memory may be planned for


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

    return sum(map(held, jax.tree.leaves(_trees.abstract(tree))))


def free_memory(like: PyTree) -> Free:
    """Nine tenths of what is free now, of the process that has least: all of them must choose alike."""
    import psutil

    shardings = [leaf.sharding for leaf in jax.tree.leaves(like) if leaf.sharding]
    devices = set().union(*(sharding.addressable_devices for sharding in shardings)) or {jax.local_devices()[0]}
    host = int(_SHARE * psutil.virtual_memory().available) // len(devices)
    stats = [device.memory_stats() for device in devices]
    shared = all(device.platform == "cpu" for device in devices)
    if shared:
        device = host
    elif all(each and "bytes_limit" in each for each in stats):
        device = min(int(_SHARE * (each["bytes_limit"] - each["bytes_in_use"])) for each in stats)
    else:
        device = -1
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import process_allgather

        device, host = np.asarray(process_allgather(np.array([device, host], np.float32))).min(axis=0).astype(int)
    return Free(None if device < 0 else int(device), int(host), shared)


def in_words(count: float) -> str:
    """Bytes in words, three digits."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:,.0f} TB"
