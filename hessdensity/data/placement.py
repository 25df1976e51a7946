"""How batches reach the devices: in pieces, each split over the mesh or copied to every device.

A sum over examples may be taken in pieces. A batch therefore need not have a length that suits the
mesh or a device's memory. With several processes, a batch consists of the rows of all of them
(`hessdensity.data.processes`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from hessdensity.vectors import trees
from hessdensity.vectors.trees import PyTree

from .batches import leading_lengths
from .processes import PLACED, RAGGED, ProcessBatches, gather, rows


class BatchPlacement:
    """The devices to which batches go, and the pieces into which they are cut.

    Host arrays, and arrays that JAX itself has put on its default device, go to the parameters'
    devices. There they are split over the data axis of the mesh, or copied whole if there is no
    such axis. Rows left over because the axis does not divide their number go to every device. They
    go in pieces no longer than a device's share of the first batch, because that many rows are
    known to fit. Arrays that the user has placed stay where they are.

    Args:
      params: the parameters.
      data_axis: the mesh axis over which rows are split. If it is None, or if the mesh has no such
        axis, rows are not split.
      microbatch: the most examples in a piece, per process, but at least one per device. None sets
        no limit.
      whole: batches must not be cut, because the loss is not a mean over independent examples.

    Raises:
      ValueError: ``microbatch`` < 1, or given although batches must not be cut; parameters on
        different devices, or on a mesh that includes several but not all of the processes.
    """

    def __init__(
        self,
        params: PyTree = (),
        data_axis: str | None = None,
        microbatch: int | None = None,
        whole: bool = False,
    ) -> None:
        if microbatch is not None and (
            not isinstance(microbatch, int | np.integer) or microbatch < 1
        ):
            raise ValueError(
                f"microbatch={microbatch!r}, expected a whole number of at least 1, or None."
            )
        if microbatch is not None and whole:
            raise ValueError(
                f"microbatch={microbatch}, but the loss says that its batches must not be cut "
                "(batch statistics): cutting them would change the Hessian. Use smaller batches, "
                "or jax.checkpoint in the model."
            )
        self._axis = data_axis
        self._microbatch = microbatch
        self._whole = whole
        self._everywhere = self._split = _common_sharding(params)
        self._processes = self._count = self._own = 1
        if isinstance(self._everywhere, NamedSharding):
            mesh: Any = self._everywhere.mesh
            self._processes = _num_processes(mesh)
            self._own = 1 if self._processes == 1 else 0
            if data_axis is not None and data_axis in mesh.axis_names:
                self._split = NamedSharding(mesh, PartitionSpec(data_axis))
                self._count = mesh.shape[data_axis]
                self._own = _own_share(mesh, data_axis, self._processes)
        # The most rows of a piece on each device, and on all devices together.
        self._share = (
            None if microbatch is None else max(microbatch * self._processes // self._count, 1)
        )
        self._size = self._share and self._share * self._count
        self._agreement = ProcessBatches(_length)

    def pieces(self, batches: Iterator[PyTree]) -> Iterator[tuple[int, PyTree]]:
        """Yield each batch's number with each of its pieces, placing a piece when it is needed."""
        arrays = (_arrays(batch, index) for index, batch in enumerate(batches))
        alone = ((batch, np.array([_length(batch)])) for batch in arrays)
        together = self._agreement.batches(arrays)
        for index, (batch, lengths) in enumerate(alone if self._processes == 1 else together):
            if lengths[0] == PLACED:
                pieces = self._cut_placed(batch, index)
            elif lengths[0] == RAGGED:
                self._refuse_microbatch(batch, index)
                pieces = iter([self._put(batch, self._everywhere)])
            else:
                pieces = self._cut(batch, lengths.clip(0), index)
            yield from ((index, piece) for piece in pieces)

    def _cut(self, batch: PyTree, lengths: np.ndarray, index: int) -> Iterator[PyTree]:
        """Cut a batch into pieces, and place them.

        First come the rows that every process has in equal number; each process places its own rows
        on its own devices. Then come the rows left over, which are sent to all processes.

        Args:
          batch: the rows of this process.
          lengths: the numbers of rows of all processes.
          index: the batch's number.
        """
        total = int(lengths.sum())
        # The rows of each process that its own devices divide evenly, the same in every process.
        head = int(lengths.min()) // self._own * self._own if self._own else 0
        # The rows left over in all processes, and how many of them the data axis divides evenly.
        rest = total - head * self._processes
        even = rest // self._count * self._count
        if self._whole and (even < rest or (head and rest)):
            raise ValueError(
                f"data: batch {index} has {' + '.join(map(str, lengths))} examples, which the "
                f"{self._count} devices of the mesh axis {self._axis!r} do not divide evenly. The "
                "loss says that its batches must not be cut (batch statistics). Drop the last "
                "examples, use another batch size, or pass data_axis=None to have all examples of "
                "a batch on every device."
            )
        if not total:
            yield self._put(batch, self._everywhere)
            return
        size = self._size // self._processes if self._size else head
        for start in range(0, head, size or 1):
            yield self._put_own(rows(batch, start, min(size, head - start)))
        if rest and self._processes > 1:
            batch = gather(rows(batch, head, total), lengths - head)
            head = 0
        size = self._size or even
        for start in range(0, even, size or 1):
            yield self._put(rows(batch, head + start, min(size, even - start)), self._split)
        # The first batch shows how many rows fit on a device. The largest batch so far would show
        # more, but then a later pass would be cut differently from the first.
        if self._share is None:
            self._share = total // self._count or total
        share = self._share if self._size else max(self._share, (total - rest) // self._count)
        for start in range(even, rest, share):
            yield self._put(rows(batch, head + start, min(share, rest - start)), self._everywhere)

    def _cut_placed(self, batch: PyTree, index: int) -> Iterator[PyTree]:
        """Cut arrays on devices, so that each device uses only its own rows and none are sent."""
        batch = jax.tree.map(
            lambda leaf: leaf if _is_placed(leaf) else self._put(leaf, self._everywhere), batch
        )
        self._check_devices(batch, index)
        if self._microbatch is None:
            yield batch
            return
        self._refuse_microbatch(batch, index)
        leaves = [leaf for leaf in jax.tree.leaves(batch) if leaf.ndim]
        own = min(leaf.sharding.shard_shape(leaf.shape)[0] for leaf in leaves)
        share = max(self._microbatch * self._processes * own // max(leaves[0].shape[0], 1), 1)
        if own <= share:
            yield batch
            return
        for start in range(0, own, share):
            stop = min(start + share, own)
            yield jax.tree.map(
                lambda leaf, start=start, stop=stop: _own_rows(leaf, own, start, stop), batch
            )

    def _put(self, batch: PyTree, sharding: Sharding | None) -> PyTree:
        """Place rows that every process holds on the devices of all processes."""

        def put(leaf: Any) -> jax.Array:
            where: Any = sharding if leaf.ndim else self._everywhere
            if self._processes == 1:
                return jax.device_put(leaf, where)
            # Not device_put: the processes would first compare their values.
            values = np.asarray(leaf)
            return jax.make_array_from_callback(values.shape, where, lambda part: values[part])

        return jax.tree.map(put, batch)

    def _put_own(self, batch: PyTree) -> PyTree:
        """Place this process's rows on its own devices, as a part of an array of all processes."""
        if self._processes == 1:
            return self._put(batch, self._split)

        def put(leaf: Any) -> jax.Array:
            values = np.asarray(leaf)
            shape = (len(leaf) * self._processes, *leaf.shape[1:])
            return jax.make_array_from_process_local_data(self._split, values, shape)

        return jax.tree.map(lambda leaf: put(leaf) if leaf.ndim else self._put(leaf, None), batch)

    def _check_devices(self, batch: PyTree, index: int) -> None:
        wanted = None if self._everywhere is None else self._everywhere.device_set
        for name, leaf in zip(trees.paths(batch), jax.tree.leaves(batch), strict=True):
            wanted = wanted or leaf.sharding.device_set
            if leaf.sharding.device_set != wanted:
                raise ValueError(
                    f"data: batch {index}, leaf {name!r} is on {_names(leaf.sharding)}, but the "
                    f"params, or other leaves, are on {_names(wanted)}. Leave batches as NumPy "
                    "arrays, which go where the params are, or place both on the same mesh with "
                    "jax.device_put."
                )

    def _refuse_microbatch(self, batch: PyTree, index: int) -> None:
        if self._microbatch is not None and _common_length(batch) is None:
            raise ValueError(
                f"microbatch={self._microbatch}, but batch {index} cannot be cut, because its "
                f"leaves have no common length: {leading_lengths(batch)}. Give them the same "
                "leading axis, or leave microbatch out."
            )


def _is_placed(leaf: Any) -> bool:
    """Whether the user has chosen the devices of an array."""
    return isinstance(leaf, jax.Array) and getattr(leaf, "committed", True)


def _common_length(batch: PyTree) -> int | None:
    """The number of rows that all leaves except scalars have, or None if they differ."""
    lengths = set(leading_lengths(batch).values()) - {None}
    return lengths.pop() if len(lengths) == 1 else None


def _length(batch: PyTree) -> int:
    """The number of rows of a batch, or `PLACED` or `RAGGED`."""
    if any(map(_is_placed, jax.tree.leaves(batch))):
        return PLACED
    length = _common_length(batch)
    return RAGGED if length is None else length


def _arrays(batch: PyTree, index: int) -> PyTree:
    """The batch with lists, numbers and other libraries' tensors turned into NumPy arrays."""

    def convert(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return trees.auto_axes(leaf)
        try:
            array = np.asarray(leaf)
        except Exception as error:
            raise TypeError(
                f"data: batch {index}, leaf {jax.tree_util.keystr(path)!r} is a "
                f"{type(leaf).__name__} that cannot become an array ({error}); convert it in the "
                "loader."
            ) from error
        if array.dtype.kind not in "biufcV" or array.dtype.names:
            raise TypeError(
                f"data: batch {index}, leaf {jax.tree_util.keystr(path)!r} is a "
                f"{type(leaf).__name__} of dtype {array.dtype}; expected numbers. Drop it in the "
                "loader, or encode it as an array."
            )
        return array

    return jax.tree.map_with_path(convert, batch)


def _common_sharding(params: PyTree) -> Sharding | None:
    """Replicated on the parameters' mesh; without a mesh where they were placed; else None."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    shardings = [leaf.sharding for leaf in leaves if _is_placed(leaf)]
    for sharding in shardings:
        if sharding.device_set != shardings[0].device_set:
            raise ValueError(
                f"params: some leaves are on {_names(shardings[0])}, others on {_names(sharding)}. "
                "Place all of them on the same mesh: hessdensity.distributed.place(params, mesh)."
            )
    meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
    if meshes:
        return NamedSharding(meshes[0], PartitionSpec())
    return shardings[0] if shardings else None


def _names(sharding: Sharding | set[Any]) -> str:
    devices = sharding.device_set if isinstance(sharding, Sharding) else sharding
    names = [str(device) for device in sorted(devices, key=lambda device: device.id)]
    return names[0] if len(names) == 1 else f"{len(names)} devices ({names[0]} to {names[-1]})"


def _num_processes(mesh: Mesh) -> int:
    owners = {device.process_index for device in mesh.devices.flat}
    if 1 < len(owners) < jax.process_count():
        raise ValueError(
            f"params: their mesh has the devices of {len(owners)} of the {jax.process_count()} "
            "processes; expected the devices of one process or of all processes, such as "
            "hessdensity.distributed.make_mesh() takes."
        )
    return len(owners)


def _own_share(mesh: Mesh, axis: str, num_processes: int) -> int:
    """The number of places along an axis at which all devices belong to this process.

    It is 0 unless every process has the same number of them, an equal share of the axis.
    """
    places = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0).reshape(mesh.shape[axis], -1)
    owners = [{device.process_index for device in place} for place in places]
    counts = {process: owners.count({process}) for process in set().union(*owners)}
    return (
        len(places) // num_processes
        if set(counts.values()) == {len(places) // num_processes}
        else 0
    )


def _own_rows(leaf: jax.Array, own: int, start: int, stop: int) -> jax.Array:
    """Rows ``start`` to ``stop`` among the ``own`` rows of every device; scalars stay."""
    return _cut_rows(leaf.sharding, own, stop - start)(leaf, start) if leaf.ndim else leaf


@functools.lru_cache
def _cut_rows(sharding: Sharding, own: int, length: int) -> Any:
    """A compiled function (array, start) that takes ``length`` rows from each ``own`` rows."""

    def cut(leaf: jax.Array, start: jax.Array) -> jax.Array:
        runs = leaf.reshape(-1, own, *leaf.shape[1:])
        part = jax.lax.dynamic_slice_in_dim(runs, start, length, axis=1)
        return part.reshape(-1, *leaf.shape[1:])

    return jax.jit(cut, out_shardings=sharding)
