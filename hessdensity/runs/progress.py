"""The progress bar, on standard error: of the first process alone, and of products that were done,
not read back."""

from __future__ import annotations

from typing import Any

import jax


def make_bar(what: str, total: int | None, shown: bool, *, leave: bool = True) -> Any:
    """A bar of products, their rate and the time left; a context manager. ``leave`` it there at the
    end."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=what,
        unit="HVP",
        leave=leave,
        disable=not shown or jax.process_index() > 0,
    )


def count(bar: Any, products: int, *, read_back: bool = False) -> None:
    """So many more products are there; those read back from disk took no time, and do not count in
    the rate."""
    if read_back and not bar.disable:
        bar.initial += products
    bar.update(products)
