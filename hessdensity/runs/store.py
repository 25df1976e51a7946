"""The steps of a computation on disk (Orbax), each in a folder of its own that is written once.

A step appears whole or not at all, whatever ends the process. So the steps on disk always run from
the first one to the last one without a gap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from hessdensity.errors import needs_extra
from hessdensity.vectors.trees import Block

_VECTORS = "vectors"
_SCALARS = "scalars"
_PREFIX = "step"


class StepStore:
    """The steps of one computation, in a folder.

    Saving is asynchronous: `append` returns when the arrays have left the device, and waits only
    for the step before. With several processes, each of them calls every method, and the folder
    must be on a file system that all of them see. Each process writes the shards that it holds.
    Steps can be read back in another sharding.

    Args:
      path: the folder, which is created if it does not exist. A path with a scheme (``gs://...``)
        may be any that Orbax takes.

    Raises:
      ValueError: the folder holds anything but such steps, or one of the steps is missing.
      RuntimeError: a step cannot be written. Every method that writes raises it.
    """

    def __init__(self, path: str | Path) -> None:
        with needs_extra("checkpoint", "checkpoint="):
            import orbax.checkpoint as ocp
            from etils import epath

        folder = epath.Path(path if "://" in str(path) else Path(path).absolute())
        _refuse_other(folder, path)
        options = ocp.CheckpointManagerOptions(
            step_prefix=_PREFIX,
            step_format_fixed_length=6,
            cleanup_tmp_directories=True,
            max_to_keep=None,
        )
        self._ocp = ocp
        self._path = str(path)
        self._manager = ocp.CheckpointManager(
            folder, options=options, item_names=(_VECTORS, _SCALARS)
        )
        steps = sorted(self._manager.all_steps())
        if steps != list(range(len(steps))):
            missing = min(set(range(len(steps))) - set(steps))
            raise ValueError(
                f"checkpoint={str(path)!r}: step {missing} of {steps[-1] + 1} is missing. Put it "
                "back, or delete the steps after it, to resume the run from there."
            )
        self.length = len(steps)
        """The number of steps on disk, or on their way there."""

    def scalars(self, step: int) -> dict[str, Any]:
        """The scalars of a step, counted from 0."""
        return self._restore(step, _SCALARS, self._ocp.args.JsonRestore())

    def vectors(self, step: int, like: Block) -> Block:
        """The vectors of a step, counted from 0, with ``like``'s shapes, dtypes and shardings."""
        found = self._restore(step, _VECTORS, self._ocp.args.StandardRestore(_numbered(like)))
        return jax.tree.unflatten(
            jax.tree.structure(like), [found[name] for name in _numbered(like)]
        )

    def _restore(self, step: int, name: str, args: Any) -> Any:
        return self._manager.restore(step, args=self._ocp.args.Composite(**{name: args}))[name]

    def append(self, vectors: Block | None, scalars: dict[str, Any]) -> None:
        """Save one more step: a pytree of arrays or None, and scalars that JSON can hold."""
        args = {_SCALARS: self._ocp.args.JsonSave(scalars)}
        if vectors is not None:
            args[_VECTORS] = self._ocp.args.StandardSave(_numbered(vectors))
        with self._writing():
            self._manager.save(self.length, args=self._ocp.args.Composite(**args))
        self.length += 1

    def finish(self) -> None:
        """Wait until all steps are on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until all steps are on disk, and release the folder."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"checkpoint={self._path!r} cannot be written ({reason}). The steps before are "
                "saved. Make room, and call again to resume the run."
            ) from error


def _numbered(tree: Block) -> dict[str, Any]:
    """The leaves by their number, a tree that Orbax can save whatever the nodes of this one are."""
    return {f"{index:06}": leaf for index, leaf in enumerate(jax.tree.leaves(tree))}


def _refuse_other(folder: Any, path: str | Path) -> None:
    """Raise ValueError if the path is a file, or a folder with anything but steps."""
    expected = "expected a folder of its own: a new or empty one, or the checkpoint to resume."
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"checkpoint={str(path)!r} is a file; {expected}")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    strange = [name for name in names if not name.startswith(f"{_PREFIX}_")]
    if strange:
        raise ValueError(
            f"checkpoint={str(path)!r} holds {strange[0]!r}, which is not a step of a run; "
            f"{expected}"
        )
