"""Results on disk: versioned npz files without pickles. Here a spectral density's, and what all of
them share."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .quadrature import Rule

FORMAT = "hessdensity.SpectralDensity"
VERSION = 2

_COLUMNS = ("nodes", "weights", "residuals")
T = TypeVar("T")


class Contents(NamedTuple):
    """The fields of a density that are saved."""

    rules: tuple[Rule, ...]
    dimension: int
    num_matvecs: int
    description: dict[str, Any]
    given: bool


def write(path: str | Path, contents: Contents) -> None:
    """Write to exactly ``path``; what of the description JSON does not know is written as its text."""
    arrays = {
        "dimension": np.array(contents.dimension),
        "num_matvecs": np.array(contents.num_matvecs),
        "description": np.array(json.dumps(contents.description, default=str)),
        "given": np.array(contents.given),
        **pack(contents.rules),
    }
    store(path, FORMAT, VERSION, arrays)


def read(path: str | Path) -> Contents:
    """What `write` was given. Raises ValueError for any other file."""
    return load(path, FORMAT, VERSION, "density", "SpectralDensity.save", _unpack)


def _unpack(saved: dict[str, Any]) -> Contents:
    description = json.loads(str(saved["description"]))
    given = bool(saved.get("given", False))
    return Contents(
        unpack(saved), int(saved["dimension"]), int(saved["num_matvecs"]), description, given
    )


def pack(rules: tuple[Rule, ...]) -> dict[str, np.ndarray]:
    """Any number of rules as a few arrays, one after the other."""
    columns = {
        name: np.concatenate([np.zeros(0), *(getattr(rule, name) for rule in rules)])
        for name in _COLUMNS
    }
    return {
        "lengths": np.array([rule.nodes.size for rule in rules], int),
        "num_deflated": np.array([rule.num_deflated for rule in rules], int),
        "coupling": np.array([rule.coupling for rule in rules], float),
        **columns,
    }


def unpack(saved: dict[str, Any]) -> tuple[Rule, ...]:
    """The inverse of `pack`."""
    columns = (np.split(saved[name], np.cumsum(saved["lengths"]))[:-1] for name in _COLUMNS)
    # Version 1 of the densities knew of no coupling.
    coupling = saved.get("coupling", np.zeros(len(saved["lengths"])))
    return tuple(
        Rule(nodes, weights, int(num_deflated), residuals, float(beta))
        for nodes, weights, residuals, num_deflated, beta in zip(
            *columns, saved["num_deflated"], coupling, strict=True
        )
    )


def store(path: str | Path, form: str, version: int, arrays: dict[str, Any]) -> None:
    """Write arrays to exactly ``path``, and what they are."""
    with open(path, "wb") as file:
        np.savez(file, format=np.array(form), version=np.array(version), **arrays)


def load(
    path: str | Path,
    form: str,
    version: int,
    what: str,
    writer: str,
    unpack: Callable[[dict[str, Any]], T],
) -> T:
    """What ``unpack`` makes of the arrays that `store` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is of another format, or of a newer version, or damaged.
    """
    refusal = f"path={str(path)!r} is not a saved {what}; expected a file written by {writer}."
    try:
        # np.load gives a bare array for a .npy file, which is no context manager.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            saved = dict(archive)
        if str(saved["format"]) != form:
            raise ValueError(f"format {saved['format']}")
        found = int(saved["version"])
    except (zipfile.BadZipFile, ValueError, EOFError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(refusal) from error
    if found > version:
        raise ValueError(
            f"path={str(path)!r} has version {found} of the format, and this hessdensity reads up "
            f"to {version}; upgrade hessdensity."
        )
    try:
        return unpack(saved)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"path={str(path)!r} is a damaged {what}: {error!r}. Save it again."
        ) from error
