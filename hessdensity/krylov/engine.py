"""The one interface of both engines: ask for a block, take its product, or replay a saved step."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from hessdensity.errors import NonFiniteProductError
from hessdensity.vectors import trees
from hessdensity.vectors.trees import Block


class Step(NamedTuple):
    """What one product has added to an engine, and all that is needed to add it again."""

    vectors: Block | None
    """The block of vectors that joined, on the device, or None where there was none."""
    scalars: dict[str, Any]
    """Coefficients and decisions, as JSON takes them."""


class Engine(Protocol):
    """A computation by reverse communication: it never calls an operator.

    ``while not engine.complete: engine.take(operator @ engine.request())``
    """

    @property
    def complete(self) -> bool:
        """Whether no product is left to ask for."""

    def request(self) -> Block:
        """The block whose product is asked for."""

    def take(self, product: Block) -> Step:
        """Take the product of the block that was asked for. Returns what it has added.

        Raises:
          FloatingPointError: the product holds a NaN or an infinity; the engine is as before.
          ValueError: the operator is not symmetric.
        """

    def replay(self, step: Step) -> None:
        """`take` without a product, from the step that it returned: the same state, bit for bit."""

    @property
    def num_done(self) -> int:
        """The number of steps done."""


def multiply(operator: Any, block: Block, step: int) -> Block:
    """The operator's product with a block, checked: the one place that calls an operator.

    Args:
      operator: anything with ``like`` and ``@`` on blocks.
      block: k vectors.
      step: the number of the step, for the error's message.

    Raises:
      NonFiniteProductError: the operator says that its product is not finite, and where.
      ValueError: the product has another structure, shape or dtype than the block.
    """
    try:
        product = operator @ block
    except FloatingPointError as error:
        raise NonFiniteProductError(step, str(error)) from error
    return trees.as_block(product, operator.like, "the operator's product")[0]
