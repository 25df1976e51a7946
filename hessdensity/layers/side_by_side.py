"""Several computations side by side, which share the passes over the data.

Each computation has one group of leaves, and asks for products with its own block of the diagonal.
All of them go through the data together, as one engine of one `Run`. So the run has one checkpoint,
one bar and one plan, and each computation gets the products that it would get alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from hessdensity.krylov.engine import Engine, Step
from hessdensity.operators.algebra import Wrapper
from hessdensity.runs.progress import make_bar
from hessdensity.runs.run import Run
from hessdensity.vectors import trees
from hessdensity.vectors.trees import Block, Vector

from .blocks import BlockDiagonal
from .partition import Group

logger = logging.getLogger("hessdensity")

T = TypeVar("T")


class Lane:
    """The place of one computation in a run: it drives an engine, like a `Run` of its own.

    Args:
      name: the name of the group.
      group: the group of leaves.
      operator: the operator that the run multiplies.
      run: the run.
    """

    def __init__(self, name: str, group: Group, operator: BlockDiagonal, run: Run) -> None:
        self.operator = _Shapes(group.take(operator.like))
        self.dimension = trees.size(self.operator.like)
        self.num_matvecs = 0
        self.asymmetry = 0.0
        self.stopped: str | None = None
        self.bar = make_bar(name, None, False)
        self.engine: Engine | None = None
        """The engine that waits for a product."""
        self._name = name
        self._run = run

    def drive(self, engine: Engine) -> Iterator[None]:
        """Wait for the remaining products of an engine."""
        while not engine.complete:
            self.engine = engine
            yield
        self.engine = None

    def took(self, count: int) -> None:
        """Count the products that the engine has taken."""
        self.num_matvecs += count
        self.asymmetry = max(self.asymmetry, getattr(self.engine, "asymmetry", 0.0))

    def stop(self, reason: str) -> None:
        """Record why the computation ends early, and log it."""
        self.stopped = reason
        logger.warning(
            "%s of %s: %s. The result is that of the products done so far.",
            self._run.computation,
            self._name,
            reason,
        )

    def describe(self, **more: Any) -> dict[str, Any]:
        """The description of the run, for this group."""
        described = self._run.describe(group=self._name, **more)
        operator = {**described["operator"], "kind": f"Hessian of {self._name!r}"}
        stopped = self.stopped or described["stopped"]
        return {**described, "operator": operator, "stopped": stopped}


class _Shapes:
    """The shapes of an operator, without products."""

    def __init__(self, like: Vector) -> None:
        self.like = like


class Needed(Wrapper):
    """A block-diagonal operator that multiplies only the groups that are needed."""

    def __init__(self, operator: BlockDiagonal) -> None:
        super().__init__(operator)
        self._blocks = operator
        self.needed: list[str] = list(operator.groups)
        """The groups whose products are needed. The others may be zero."""

    def __matmul__(self, block: Block) -> Block:
        products = self._blocks.multiply(self._blocks.split(block), self.needed)
        return self._blocks.join(products, jax.tree.map(jnp.zeros_like, block))


class SideBySide:
    """An `Engine` of several computations, each of which drives engines of its own.

    Args:
      operator: the operator that the run multiplies.
      blocks: its block-diagonal operator.
      lanes: the place of each computation.
      computations: what each of them does. They yield whenever they wait for a product.
    """

    def __init__(
        self,
        operator: Needed,
        blocks: BlockDiagonal,
        lanes: Mapping[str, Lane],
        computations: Mapping[str, Iterator[None]],
    ) -> None:
        self._operator = operator
        self._blocks = blocks
        self._lanes = lanes
        self._computations = dict(computations)
        self._counts: dict[str, int] = {}  # of the vectors that each lane asked for
        self.num_done = 0
        for name in lanes:
            self._advance(name)

    def _advance(self, name: str) -> None:
        """Let a computation continue until it waits for a product, or ends."""
        if next(self._computations[name], self) is self:
            self._lanes[name].engine = None

    @property
    def _waiting(self) -> dict[str, Engine]:
        """The engines that wait for a product."""
        return {name: lane.engine for name, lane in self._lanes.items() if lane.engine}

    @property
    def complete(self) -> bool:
        """Whether all computations have ended."""
        return not self._waiting

    @property
    def asymmetry(self) -> float:
        """The largest asymmetry of all groups."""
        return max(lane.asymmetry for lane in self._lanes.values())

    def request(self) -> Block:
        """The blocks of all engines that wait, as one block, filled up with zeros."""
        blocks = {name: engine.request() for name, engine in self._waiting.items()}
        self._counts = {name: trees.count(block) for name, block in blocks.items()}
        self._operator.needed = list(blocks)
        return self._merge(blocks)

    def take(self, product: Block) -> Step:
        """Give each engine its own product."""
        parts = self._blocks.split(product)
        steps = {}
        for name, engine in self._waiting.items():
            count = self._counts[name]
            steps[name] = engine.take(_first(parts[name], count))
            self._lanes[name].took(count)
        self._finish(steps)
        vectors = {name: step.vectors for name, step in steps.items() if step.vectors is not None}
        scalars = {
            name: {
                "step": step.scalars,
                "products": self._counts[name],
                "vectors": 0 if step.vectors is None else trees.count(step.vectors),
            }
            for name, step in steps.items()
        }
        return Step(self._merge(vectors) if vectors else None, scalars)

    def replay(self, step: Step) -> None:
        """Give each engine its own saved step."""
        parts = {} if step.vectors is None else self._blocks.split(step.vectors)
        steps = {}
        for name, engine in self._waiting.items():
            saved = step.scalars[name]
            count = saved["vectors"]
            steps[name] = Step(_first(parts[name], count) if count else None, saved["step"])
            engine.replay(steps[name])
            self._lanes[name].took(saved["products"])
        self._finish(steps)

    def _finish(self, steps: Mapping[str, Step]) -> None:
        self.num_done += 1
        for name in steps:
            self._advance(name)

    def _merge(self, blocks: Mapping[str, Block]) -> Block:
        """One block of the blocks of some groups, filled up with zeros."""
        most = max(map(trees.count, blocks.values()))
        padded = {name: _filled(block, most) for name, block in blocks.items()}
        return self._blocks.join(padded, trees.zeros(self._blocks.like, most))


def _first(block: Block, count: int) -> Block:
    """The first vectors of a block."""
    if trees.count(block) == count:
        return block
    return jax.tree.map(lambda leaf: leaf[:count], block)


def _filled(block: Block, count: int) -> Block:
    """A block, filled up with zero vectors."""
    missing = count - trees.count(block)
    if not missing:
        return block
    return jax.tree.map(
        lambda leaf: jnp.concatenate([leaf, jnp.zeros((missing, *leaf.shape[1:]), leaf.dtype)]),
        block,
    )


def run_side_by_side(
    run: Run,
    operator: Needed,
    blocks: BlockDiagonal,
    make: Callable[[Lane], tuple[Callable[[], Iterator[None]], Callable[[], T]]],
) -> dict[str, T]:
    """Run a computation for every group, and return their answers.

    Args:
      run: the run. Its operator is ``operator``.
      operator: multiplies the groups that are needed.
      blocks: the block-diagonal operator.
      make: for the lane of a group, the computation and its answer from the products done so far.
    """
    lanes = {name: Lane(name, group, blocks, run) for name, group in blocks.groups.items()}
    answers: dict[str, Callable[[], T]] = {}

    def engine() -> SideBySide:
        computations = {}
        for name, lane in lanes.items():
            compute, answers[name] = make(lane)
            computations[name] = compute()
        return SideBySide(operator, blocks, lanes, computations)

    def answer(_: SideBySide) -> dict[str, T]:
        return {name: each() for name, each in answers.items()}

    return run.execute_engine(engine, answer)
