"""ImageNet as it lies on disk: a folder of folders, or Parquet shards; and how one of its images is
read.

A source has a length, gives records by position, and is what Grain calls a random-access data
source."""

import bisect
import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

# ImageNet's own .JPEG in lower case, and what else is found in such folders.
SUFFIXES = (".jpeg", ".jpg", ".png")


class Record(NamedTuple):
    """One image as stored."""

    name: str  # its file, or file and row
    data: bytes | None
    label: int


class Source(Protocol):
    """Images in a fixed order."""

    num_classes: int | None  # where the source knows

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Record: ...

    def fingerprint(self) -> str:
        """A hash of names, sizes and labels, wherever the files lie."""


class UnreadableImage(ValueError):
    """The bytes are there, but no image; the message names the file."""


class ImageFolder:
    """Images as root/CLASS/NAME.JPEG; the label is the position of CLASS among all folders of the
    root, sorted.

    For ImageNet's 1,000 WordNet ids that is the usual 0..999. Folders without images count, those
    of a subset of the classes may be left empty."""

    def __init__(self, root: str | os.PathLike) -> None:
        self._root = Path(root)
        self._classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.num_classes: int | None = len(self._classes)
        self._files: list[tuple[str, int, int]] = []  # name, bytes, label
        for label, folder in enumerate(self._classes):
            with os.scandir(self._root / folder) as entries:
                found = [
                    (e.name, e.stat().st_size) for e in entries if e.name.lower().endswith(SUFFIXES)
                ]
            self._files += [(name, size, label) for name, size in sorted(found)]
        if not self._files:
            raise FileNotFoundError(
                f"{root}: no image in its {len(self._classes)} folders; expected files "
                "ROOT/CLASS/NAME.JPEG"
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, position: int, /) -> Record:
        name, _, label = self._files[position]
        path = self._root / self._classes[label] / name
        return Record(str(path), path.read_bytes(), label)

    def fingerprint(self) -> str:
        return _digest(["folder", self._classes, self._files])


class Parquet:
    """Images in the rows of Parquet shards: columns `image` {bytes, path} and `label`, as published
    hubs lay them out.

    Rows are read a row group at a time, and the last few groups kept: an in-order pass reads every
    group once."""

    num_classes = None
    _KEPT = 4

    def __init__(self, shards: Sequence[Path]) -> None:
        import pyarrow.parquet as parquet

        self._files = [parquet.ParquetFile(path) for path in shards]
        self._shards = list(shards)
        # (shard, row group, its first row in the shard)
        self._groups: list[tuple[int, int, int]] = []
        lengths: list[int] = []
        for shard, file in enumerate(self._files):
            names = file.schema_arrow.names
            if not {"image", "label"} <= set(names):
                raise ValueError(
                    f"{shards[shard]}: columns {names}; expected `image` {{bytes, path}} and "
                    "`label`"
                )
            groups = range(file.metadata.num_row_groups)
            sizes = [file.metadata.row_group(group).num_rows for group in groups]
            firsts = accumulate(sizes, initial=0)
            self._groups += [(shard, group, next(firsts)) for group in groups]
            lengths += sizes
        self._ends = list(accumulate(lengths))
        self._tables: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()  # Grain reads from several threads, a ParquetFile bears one

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, position: int, /) -> Record:
        group = bisect.bisect_right(self._ends, position)
        row = position - (self._ends[group - 1] if group else 0)
        with self._lock:
            table = self._table(group)
        shard, _, first = self._groups[group]
        image, label = table["image"][row].as_py(), table["label"][row].as_py()
        name = f"{self._shards[shard]}, row {first + row} ({image['path']})"
        if label is None or label < 0:
            raise ValueError(
                f"{name} has the label {label}: a test split, whose labels are not given, has no "
                "loss"
            )
        return Record(name, image["bytes"], label)

    def _table(self, group: int) -> Any:
        if group not in self._tables:
            shard, number, _ = self._groups[group]
            self._tables[group] = self._files[shard].read_row_group(
                number, columns=["image", "label"]
            )
            while len(self._tables) > self._KEPT:
                self._tables.popitem(last=False)
        return self._tables[group]

    def fingerprint(self) -> str:
        return _digest(["parquet", [(path.name, path.stat().st_size) for path in self._shards]])


def open_source(path: str | os.PathLike) -> Source:
    """The images under `path`: an ImageFolder's root; a Parquet shard, a folder of shards, or a
    pattern of them.

    Raises FileNotFoundError where there are none, and ValueError where a folder's shards are of
    several splits."""
    path = Path(path)
    if "*" in path.name:
        shards = sorted(path.parent.glob(path.name))
    else:
        shards = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        beginnings = {shard.name.split("-")[0] for shard in shards}
        splits = sorted(beginnings & {"train", "validation", "val", "test"})
        if len(splits) > 1:
            raise ValueError(
                f"{path} holds the splits {', '.join(splits)}; name one, as "
                f"{path / splits[0]}-*.parquet"
            )
    if not all(shard.is_file() for shard in shards) or not (shards or path.is_dir()):
        raise FileNotFoundError(
            f"{path}: expected a folder of class folders, a folder of .parquet files, or such files"
        )
    return Parquet(shards) if shards else ImageFolder(path)


def decode(record: Record, size: int, crop: float = 1.0) -> np.ndarray:
    """The image's central square, of `crop` times the shorter side, resized: uint8 (size, size, 3),
    red green blue.

    Bicubic, Pillow's own choice; grey, palette and CMYK images, of which ImageNet has some, become
    RGB. Raises `UnreadableImage`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(record.data or b"")) as image:
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UnreadableImage(f"{record.name} is no image that can be read ({reason})") from error
    side = crop * min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))


def _digest(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()
