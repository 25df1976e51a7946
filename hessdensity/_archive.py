"""A spectral density on disk: a versioned npz without pickles."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .quadrature import Rule

FORMAT = "hessdensity.SpectralDensity"
VERSION = 2

_COLUMNS = ("nodes", "weights", "residuals")


class Contents(NamedTuple):
    """The fields of a density that are saved."""

    rules: tuple[Rule, ...]
    dimension: int
    num_matvecs: int
    description: dict[str, Any]
    given: bool


def write(path: str | Path, contents: Contents) -> None:
    """Write to exactly ``path``; what of the description JSON does not know is written as its text."""
    rules = contents.rules
    columns: dict[str, Any] = {name: np.concatenate([getattr(rule, name) for rule in rules]) for name in _COLUMNS}
    with open(path, "wb") as file:
        np.savez(
            file,
            format=np.array(FORMAT),
            version=np.array(VERSION),
            dimension=np.array(contents.dimension),
            num_matvecs=np.array(contents.num_matvecs),
            description=np.array(json.dumps(contents.description, default=str)),
            given=np.array(contents.given),
            lengths=np.array([rule.nodes.size for rule in rules]),
            num_deflated=np.array([rule.num_deflated for rule in rules]),
            coupling=np.array([rule.coupling for rule in rules]),
            **columns,
        )


def read(path: str | Path) -> Contents:
    """What `write` was given. Raises ValueError for any other file."""
    refusal = f"path={str(path)!r} is not a saved density; expected a file written by SpectralDensity.save."
    try:
        # np.load gives a bare array for a .npy file, which is no context manager.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            saved = dict(archive)
        if str(saved["format"]) != FORMAT:
            raise ValueError(f"format {saved['format']}")
        version = int(saved["version"])
    except (zipfile.BadZipFile, ValueError, EOFError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(refusal) from error
    if version > VERSION:
        raise ValueError(
            f"path={str(path)!r} has version {version} of the format, and this hessdensity reads up to {VERSION}; "
            "upgrade hessdensity."
        )
    try:
        return _unpack(saved)
    except (ValueError, KeyError) as error:
        raise ValueError(f"path={str(path)!r} is a damaged density: {error!r}. Save it again.") from error


def _unpack(saved: dict[str, Any]) -> Contents:
    ends = np.cumsum(saved["lengths"])[:-1]
    columns = (np.split(saved[name], ends) for name in _COLUMNS)
    # Version 1 knew of no coupling, and of no given vectors.
    coupling = saved.get("coupling", np.zeros(ends.size + 1))
    rules = tuple(
        Rule(nodes, weights, int(num_deflated), residuals, float(coupling))
        for nodes, weights, residuals, num_deflated, coupling in zip(
            *columns, saved["num_deflated"], coupling, strict=True
        )
    )
    description = json.loads(str(saved["description"]))
    given = bool(saved.get("given", False))
    return Contents(rules, int(saved["dimension"]), int(saved["num_matvecs"]), description, given)
