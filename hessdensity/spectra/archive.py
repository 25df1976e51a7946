"""Densities and measures of vectors on disk, as versioned npz files without pickles.

All earlier versions can still be read. Version 4 has the tridiagonal matrix of each probe. Rules
of earlier versions lack it, so that their smooth estimates have no error of quadrature. Versions 1
and 2 wrote a measure as a density that was marked as ``given``.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .quadrature import Rule

VERSION = 4

_FORMATS = {"density": "hessdensity.SpectralDensity", "measure": "hessdensity.SpectralMeasure"}
_NAMES = {"density": "a spectral density", "measure": "the measure of a vector"}
_COLUMNS = ("nodes", "weights", "residuals")  # one entry for each node
_MATRIX = ("diagonal", "off_diagonal")  # one entry for each step of the probe
_SCALARS = {"num_deflated": int, "coupling": float, "coupling_rank": int, "pinned": bool}
_ENDS = ("low", "high")  # of the enclosure
T = TypeVar("T")


class Contents(NamedTuple):
    """The fields of a density or a measure that are saved."""

    rules: tuple[Rule, ...]
    dimension: int
    num_matvecs: int
    description: dict[str, Any]


def write(path: str | Path, kind: str, contents: Contents) -> None:
    """Write to exactly ``path``. Parts of the description that JSON cannot hold become text."""
    arrays = {
        "dimension": np.array(contents.dimension),
        "num_matvecs": np.array(contents.num_matvecs),
        "description": np.array(json.dumps(contents.description, default=str)),
        **pack(contents.rules),
    }
    store(path, _FORMATS[kind], VERSION, arrays)


def read(path: str | Path, kind: str) -> Contents:
    """The contents that `write` saved.

    Raises:
      ValueError: the file holds something else. If it is the other type of result, the message
        names the method that reads it.
    """

    def unpack_one(saved: dict[str, Any]) -> tuple[str, Contents]:
        form = str(saved["format"])
        given = bool(saved.get("given", False))  # of versions 1 and 2
        found = "measure" if given or form == _FORMATS["measure"] else "density"
        description = json.loads(str(saved["description"]))
        sizes = int(saved["dimension"]), int(saved["num_matvecs"])
        return found, Contents(unpack(saved), *sizes, description)

    writer = _FORMATS[kind].partition(".")[2]
    forms = set(_FORMATS.values())
    found, contents = load(path, forms, VERSION, kind, f"{writer}.save", unpack_one)
    if found != kind:
        other = _FORMATS[found].partition(".")[2]
        raise ValueError(
            f"path={str(path)!r} holds {_NAMES[found]}, expected {_NAMES[kind]}. "
            f"Read it with hd.{other}.load(path)."
        )
    return contents


def pack(rules: tuple[Rule, ...]) -> dict[str, np.ndarray]:
    """Any number of rules as a few arrays, which hold one rule after the other."""
    arrays = {
        name: np.concatenate([np.zeros(0), *(getattr(rule, name) for rule in rules)])
        for name in (*_COLUMNS, *_MATRIX)
    }
    scalars: dict[str, np.ndarray] = {
        name: np.array([getattr(rule, name) for rule in rules], kind)
        for name, kind in _SCALARS.items()
    }
    ends = np.array([rule.enclosure for rule in rules], float).reshape(-1, 2).T
    return {
        "lengths": np.array([rule.nodes.size for rule in rules], int),
        "steps": np.array([rule.diagonal.size for rule in rules], int),
        **dict(zip(_ENDS, ends, strict=True)),
        **scalars,
        **arrays,
    }


def unpack(saved: dict[str, Any]) -> tuple[Rule, ...]:
    """The inverse of `pack`."""
    count = len(saved["lengths"])
    fields: list[dict[str, Any]] = [{} for _ in range(count)]
    for names, lengths in ((_COLUMNS, "lengths"), (_MATRIX, "steps")):
        for name in names if lengths in saved else ():
            parts = np.split(saved[name], np.cumsum(saved[lengths]))[:-1]
            for field, part in zip(fields, parts, strict=True):
                field[name] = part
    for name, kind in _SCALARS.items():
        for field, value in zip(fields, saved.get(name, ()), strict=name in saved):
            field[name] = kind(value)
    if _ENDS[0] in saved:
        for field, *ends in zip(fields, *(saved[end] for end in _ENDS), strict=True):
            field["enclosure"] = (float(ends[0]), float(ends[1]))
    return tuple(Rule(**field) for field in fields)


def rule_as_json(rule: Rule) -> dict[str, Any]:
    """A rule in types that JSON can hold. Floats keep every bit."""
    arrays = {name: getattr(rule, name).tolist() for name in (*_COLUMNS, *_MATRIX)}
    return arrays | {name: getattr(rule, name) for name in (*_SCALARS, "enclosure")}


def rule_from_json(saved: dict[str, Any]) -> Rule:
    """The inverse of `rule_as_json`."""
    return Rule(**{**saved, "enclosure": tuple(saved["enclosure"])})


def store(path: str | Path, form: str, version: int, arrays: dict[str, Any]) -> None:
    """Write arrays to exactly ``path``, along with the name and the version of their format."""
    with open(path, "wb") as file:
        np.savez(file, format=np.array(form), version=np.array(version), **arrays)


def load(
    path: str | Path,
    forms: set[str],
    version: int,
    what: str,
    writer: str,
    unpack: Callable[[dict[str, Any]], T],
) -> T:
    """The result of ``unpack`` on the arrays that `store` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file has another format or a newer version, or it is damaged.
    """
    refusal = f"path={str(path)!r} is not a saved {what}; expected a file written by {writer}."
    try:
        # For a .npy file, np.load returns a bare array, which is not a context manager.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            saved = dict(archive)
        if str(saved["format"]) not in forms:
            raise ValueError(f"format {saved['format']}")
        found = int(saved["version"])
    except (zipfile.BadZipFile, ValueError, EOFError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(refusal) from error
    if found > version:
        raise ValueError(
            f"path={str(path)!r} has version {found} of the format, and this hessdensity reads "
            f"versions up to {version}. Upgrade hessdensity."
        )
    try:
        return unpack(saved)
    except (ValueError, KeyError, RuntimeError) as error:
        message = f"path={str(path)!r} is a damaged {what}: {error!r}. Save it again."
        raise ValueError(message) from error
