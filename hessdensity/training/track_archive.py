"""A track on disk, in a single file or point by point in the checkpoint of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hessdensity.spectra import archive
from hessdensity.spectra.archive import Contents
from hessdensity.spectra.quadrature import Rule

FORMAT = "hessdensity.Track"
VERSION = 3

_PREFIX = "column_"


class TrackContents(NamedTuple):
    """The fields of a track that are saved."""

    columns: dict[str, np.ndarray]
    """Arrays of the same length, with a row for each checkpoint."""
    densities: list[Contents | None]
    """A density or None for each row."""
    about: dict[str, Any]
    """Further fields, in types that JSON can hold."""


def write(path: str | Path, contents: TrackContents) -> None:
    """Write to exactly ``path``."""
    rules = tuple(rule for density in contents.densities if density for rule in density.rules)
    heads = [d and {**d._asdict(), "rules": len(d.rules)} for d in contents.densities]
    arrays = {
        "about": np.array(json.dumps(contents.about, default=str)),
        "densities": np.array(json.dumps(heads, default=str)),
        **{_PREFIX + name: column for name, column in contents.columns.items()},
        **archive.pack(rules),
    }
    archive.store(path, FORMAT, VERSION, arrays)


def read(path: str | Path) -> TrackContents:
    """The contents that `write` saved. Raises ValueError for any other file."""
    return archive.load(path, {FORMAT}, VERSION, "track", "Track.save", _unpack)


def _unpack(saved: dict[str, Any]) -> TrackContents:
    columns = {
        name.removeprefix(_PREFIX): column
        for name, column in saved.items()
        if name.startswith(_PREFIX)
    }
    rules = iter(archive.unpack(saved))
    densities = []
    for head in json.loads(str(saved["densities"])):
        own = tuple(next(rules) for _ in range(head["rules"])) if head else ()
        densities.append(_contents(head, own) if head else None)
    return TrackContents(columns, densities, json.loads(str(saved["about"])))


def density_as_json(contents: Contents | None) -> dict[str, Any] | None:
    """A density in types that JSON can hold. Floats keep every bit."""
    if contents is None:
        return None
    return {**contents._asdict(), "rules": list(map(archive.rule_as_json, contents.rules))}


def density_from_json(saved: dict[str, Any] | None) -> Contents | None:
    """The inverse of `density_as_json`."""
    if saved is None:
        return None
    return _contents(saved, tuple(map(archive.rule_from_json, saved["rules"])))


def _contents(head: dict[str, Any], rules: tuple[Rule, ...]) -> Contents:
    return Contents(rules, head["dimension"], head["num_matvecs"], head["description"])
