"""A spectral density on disk: a versioned npz without pickles."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from .quadrature import Rule

FORMAT = "hessdensity.SpectralDensity"
VERSION = 1

_COLUMNS = ("nodes", "weights", "residuals")


def write(
    path: str | Path, rules: tuple[Rule, ...], dimension: int, num_matvecs: int, description: dict[str, Any]
) -> None:
    """Write to exactly ``path``; what of the description JSON does not know is written as its text."""
    columns: dict[str, Any] = {name: np.concatenate([getattr(rule, name) for rule in rules]) for name in _COLUMNS}
    with open(path, "wb") as file:
        np.savez(
            file,
            format=np.array(FORMAT),
            version=np.array(VERSION),
            dimension=np.array(dimension),
            num_matvecs=np.array(num_matvecs),
            description=np.array(json.dumps(description, default=str)),
            lengths=np.array([rule.nodes.size for rule in rules]),
            num_deflated=np.array([rule.num_deflated for rule in rules]),
            **columns,
        )


def read(path: str | Path) -> tuple[tuple[Rule, ...], int, int, dict[str, Any]]:
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


def _unpack(saved: dict[str, Any]) -> tuple[tuple[Rule, ...], int, int, dict[str, Any]]:
    ends = np.cumsum(saved["lengths"])[:-1]
    columns = (np.split(saved[name], ends) for name in _COLUMNS)
    rules = tuple(
        Rule(nodes, weights, int(num_deflated), residuals)
        for nodes, weights, residuals, num_deflated in zip(*columns, saved["num_deflated"], strict=True)
    )
    return rules, int(saved["dimension"]), int(saved["num_matvecs"]), json.loads(str(saved["description"]))
