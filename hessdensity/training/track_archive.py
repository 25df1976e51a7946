"""A track on disk: columns of one length, and the rules of all densities in one row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hessdensity.spectra import archive as _archive
from hessdensity.spectra.archive import Contents

FORMAT = "hessdensity.Track"
VERSION = 1

_PREFIX = "column_"


class TrackContents(NamedTuple):
    """The fields of a track that are saved."""

    columns: dict[str, np.ndarray]
    """Of one length, a row a checkpoint."""
    densities: list[Contents | None]
    """One or none a row."""
    about: dict[str, Any]
    """What JSON can say."""


def write(path: str | Path, contents: TrackContents) -> None:
    """Write to exactly ``path``."""
    rules = tuple(rule for density in contents.densities if density for rule in density.rules)
    heads = [d and {**d._asdict(), "rules": len(d.rules)} for d in contents.densities]
    arrays = {
        "about": np.array(json.dumps(contents.about, default=str)),
        "densities": np.array(json.dumps(heads, default=str)),
        **{_PREFIX + name: column for name, column in contents.columns.items()},
        **_archive.pack(rules),
    }
    _archive.store(path, FORMAT, VERSION, arrays)


def read(path: str | Path) -> TrackContents:
    """What `write` was given. Raises ValueError for any other file."""
    return _archive.load(path, FORMAT, VERSION, "track", "Track.save", _unpack)


def _unpack(saved: dict[str, Any]) -> TrackContents:
    columns = {
        name.removeprefix(_PREFIX): column
        for name, column in saved.items()
        if name.startswith(_PREFIX)
    }
    rules, heads = iter(_archive.unpack(saved)), json.loads(str(saved["densities"]))
    densities = [
        d and Contents(**{**d, "rules": tuple(next(rules) for _ in range(d["rules"]))})
        for d in heads
    ]
    return TrackContents(columns, densities, json.loads(str(saved["about"])))
