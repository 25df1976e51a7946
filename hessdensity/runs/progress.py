"""The progress bar on standard error, which only the first process shows."""

from __future__ import annotations

from typing import Any

import jax


def make_bar(what: str, total: int | None, shown: bool, *, leave: bool = True) -> Any:
    """A bar with products, their rate and the time left. ``leave`` keeps it after the end."""
    from tqdm import tqdm

    hidden = not shown or jax.process_index() > 0
    return tqdm(total=total, desc=what, unit="HVP", leave=leave, disable=hidden)


def count(bar: Any, products: int, *, read_back: bool = False) -> None:
    """Add products to the bar. The rate leaves out those read from disk, which took no time."""
    if read_back and not bar.disable:
        bar.initial += products
    bar.update(products)
