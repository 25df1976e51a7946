"""The measured points of a track on disk, and the folders of the point that is being measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from hessdensity.krylov.engine import Step
from hessdensity.operators.protocol import Operator, describe
from hessdensity.runs.steps import SavedSteps, differences, plain
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.vectors import trees
from hessdensity.vectors.trees import Block, Vector

from . import track_archive
from .track import TrackPoint


class SavedPoints:
    """The points of one track, in the folder ``points`` of a checkpoint.

    The computations of the current point save their steps in folders with its number. These are
    deleted when the point itself is saved, or later if that was interrupted.

    Args:
      checkpoint: the folder of the track.
      like: shapes, dtypes and shardings of one vector.
      identity: what the points depend on; compared when the track is resumed.

    Raises:
      ValueError: the folder belongs to another computation.
    """

    def __init__(self, checkpoint: str | Path, like: Vector, identity: dict[str, Any]) -> None:
        self._path = str(checkpoint)
        self._steps = SavedSteps(f"{checkpoint}/points", _Vectors(like), identity)
        self._unchecked: tuple[Operator, dict[str, Any]] | None = None

    def folder(self, number: int, name: str) -> str:
        """The folder of a computation of point ``number``."""
        return f"{self._path}/{name}-{number:06}"

    def take(
        self, number: int, step: float, operator: Operator
    ) -> tuple[TrackPoint, Eigenspace] | None:
        """The next point and its eigenspace, or None if they are not on disk.

        Raises:
          ValueError: the point was measured at another step, or at other parameters.
        """
        if not (found := self._steps.take()):
            return None
        (vectors, scalars), _ = found
        saved = scalars["operator"]
        self._unchecked = operator, saved
        was = {"step": scalars["columns"]["step"], "params": saved.get("params")}
        now = {"step": float(step), "params": describe(operator).get("params")}
        for name, value in now.items():
            if was[name] != value:
                raise ValueError(
                    f"checkpoint={self._path!r}: checkpoint number {number} had {name} "
                    f"{was[name]!r}, now {value!r}. Give the same checkpoints in the same order, "
                    "or another folder."
                )
        density = track_archive.density_from_json(scalars["density"])
        point = TrackPoint.of(scalars["columns"], density)
        pairs = point.values, vectors, point.residuals, point.converged
        about = scalars["space"]
        return point, Eigenspace(*pairs, point.num_matvecs, about["passes"], about["description"])

    def add(self, number: int, point: TrackPoint, space: Eigenspace, operator: Operator) -> None:
        """Save point ``number``, and delete the steps that led to it and to earlier ones."""
        contents = point.density.contents() if point.density else None
        scalars = {
            "operator": describe(operator),
            "columns": point.columns(),
            "density": track_archive.density_as_json(contents),
            "space": {"passes": space.num_passes, "description": space.description},
        }
        self._steps.add(Step(space.vectors, plain(scalars)), point.num_matvecs)
        self._steps.finish()
        self._clear(number)

    def _clear(self, last: int) -> None:
        """Delete the steps of points up to number ``last``, which are saved themselves."""
        from etils import epath

        if jax.process_index() > 0:
            return
        for entry in epath.Path(self._path).iterdir():
            _, _, number = entry.name.rpartition("-")
            if number.isdigit() and int(number) <= last:
                entry.rmtree()

    def check_data(self) -> None:
        """Refuse other data than those of the points that were read.

        Cost: a product of the last of these points, once.
        """
        if self._unchecked is None:
            return
        operator, saved = self._unchecked
        if not set(saved) <= set(describe(operator)):
            jax.block_until_ready(operator @ trees.zeros(operator.like, 1))
        if found := differences(saved, plain(describe(operator)), "operator."):
            raise ValueError(
                f"checkpoint={self._path!r} is another computation's: {'; '.join(found)}. Call "
                "with the arguments that it was made with, or give another folder."
            )
        self._unchecked = None


class _Vectors:
    """What all points have in common: the shape of their vectors. Each records its own operator."""

    def __init__(self, like: Vector) -> None:
        self.like = like

    def __matmul__(self, block: Block) -> Block:
        raise TypeError("each point of a track has its own operator")

    def describe(self) -> dict[str, Any]:
        """Nothing that a resumed track would have to agree with."""
        return {}
