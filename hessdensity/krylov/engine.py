"""The interface of the engines: ask for a block, take its product, or replay a saved step."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from hessdensity.errors import NonFiniteProductError
from hessdensity.vectors import trees
from hessdensity.vectors.trees import Block


class Step(NamedTuple):
    """Everything that one product has added to an engine, which is enough to add it again."""

    vectors: Block | None
    """The block of vectors that were added, on the device, or None."""
    scalars: dict[str, Any]
    """Coefficients and decisions, in types that JSON can hold."""


class Engine(Protocol):
    """A computation by reverse communication. It asks for products and never calls an operator.

    ``while not engine.complete: engine.take(operator @ engine.request())``

    An engine that measures how far the products are from symmetric also has ``asymmetry``, a share
    of the operator's norm. `hessdensity.runs.run.Run` warns if rounding does not explain it.
    """

    @property
    def complete(self) -> bool:
        """Whether the engine needs no further product."""

    def request(self) -> Block:
        """The block whose product the engine needs next."""

    def take(self, product: Block) -> Step:
        """Take the product of the requested block, and return the step that it adds.

        Raises:
          FloatingPointError: the product holds a NaN or an infinity. The engine is unchanged.
          ValueError: the operator is not symmetric.
        """

    def replay(self, step: Step) -> None:
        """Add a step that `take` returned. The resulting state is the same bit for bit."""

    @property
    def num_done(self) -> int:
        """The number of steps done."""


ASYMMETRY = 0.05
"""A gap between u.Hv and v.Hu counts as an asymmetric operator from this share of its norm on. It
is far above the rounding error of a model in bfloat16, and far below a rule that is not a
derivative."""


def refuse_asymmetric(gap: float, norm: float) -> None:
    """Raise ValueError if u.Hv and v.Hu are too far apart for a symmetric operator."""
    if gap > ASYMMETRY * norm:
        raise ValueError(
            "the operator is not symmetric, or not the same in every product: u.Hv and v.Hu differ "
            f"by {gap / norm:.2g} of its norm. Examine it with hd.verify_operator(operator, key)."
        )


def multiply(operator: Any, block: Block, step: int) -> Block:
    """The product of an operator with a block, after checks.

    Args:
      operator: anything with ``like`` and ``@`` on blocks.
      block: k vectors.
      step: the number of the step, for the error message.

    Raises:
      NonFiniteProductError: the operator reports that its product is not finite, and where.
      ValueError: the product has another structure, shape or dtype than the block.
    """
    try:
        product = operator @ block
    except FloatingPointError as error:
        raise NonFiniteProductError(step, str(error)) from error
    return trees.as_block(product, operator.like, "the operator's product")[0]
