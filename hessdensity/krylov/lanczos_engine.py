"""k independent Lanczos recurrences as an `Engine`, so that a run can drive them."""

from __future__ import annotations

from hessdensity.vectors.trees import Block

from . import lanczos
from .engine import Step
from .lanczos import LanczosState


class LanczosEngine:
    """A `LanczosState` as an `Engine`, so that a run can drive it."""

    def __init__(self, state: LanczosState) -> None:
        self.state = state

    @property
    def complete(self) -> bool:
        """Whether no step is left."""
        return lanczos.complete(self.state)

    @property
    def num_done(self) -> int:
        """The number of steps done."""
        return self.state.diagonal.shape[1]

    @property
    def asymmetry(self) -> float:
        """The largest `asymmetry` of all probes."""
        return float(lanczos.asymmetry(self.state).max())

    def request(self) -> Block:
        """The k vectors to be multiplied next."""
        return self.state.vectors

    def take(self, product: Block) -> Step:
        """Do a step by `update`, and return what it has added."""
        self.state = lanczos.update(self.state, product)
        return lanczos.last_step(self.state)

    def replay(self, step: Step) -> None:
        """Do a saved step by `replay`."""
        self.state = lanczos.replay(self.state, step)
