"""Images decoded once, kept as bytes, and handed out as the same batches in every pass.

A run of Lanczos reads the same images in the same order a hundred times, and a core decodes a few
hundred a second: so they are decoded by Grain's threads before the first pass, into the host's
memory or a file on the local disk, 155 kB an image of 227 x 227. A pass then reads that, a few
batches ahead of the device."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import psutil
from tqdm import tqdm

from benchmarks.models.imagenet import Source, UnreadableImage, decode

HOLE = -1  # the label of a row without an image

Batch = tuple[np.ndarray, np.ndarray]


class Images(NamedTuple):
    """One process's share of the images."""

    images: np.ndarray  # (rows, size, size, 3) uint8, in memory or mapped from a file
    labels: np.ndarray  # (rows,) int32, HOLE where there is no image
    unreadable: list[str]  # why the rows left out are


class ImageBatches:
    """Batches (images uint8 (b, size, size, 3), labels int32 (b,)) that can be iterated again and
    again.

    The last one is smaller where the rows do not fill it. A row labelled `HOLE` holds no image, and
    weighs nothing."""

    def __init__(self, content: Images, batch_size: int) -> None:
        self.content, self.batch_size = content, batch_size
        self.num_images = int(np.sum(content.labels != HOLE))

    def __len__(self) -> int:
        return -(-len(self.content.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # A copy, made in a thread of Grain's: it is that which reads a mapped file from the disk.
        batches = grain.MapDataset.range(len(self)).map(self._copy)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
        return iter(batches.to_iter_dataset(options))

    def _copy(self, index: int) -> Batch:
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return np.array(self.content.images[rows]), np.array(self.content.labels[rows])


class Watched:
    """Data as they are, and how long their consumer has waited for them.

    `bar`, a tqdm bar, counts images and starts anew with every pass.
    """

    def __init__(self, data: Iterable[Batch], bar: Any = None) -> None:
        self._data, self._bar = data, bar
        self.seconds_waiting, self.num_images, self.num_passes = 0.0, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        self.num_passes += 1
        if self._bar is not None:
            self._bar.reset()
        start = time.perf_counter()
        for batch in self._data:
            self.seconds_waiting += time.perf_counter() - start
            yield batch
            self.num_images += len(batch[1])
            if self._bar is not None:
                self._bar.update(len(batch[1]))
            start = time.perf_counter()
        self.seconds_waiting += time.perf_counter() - start


def load(
    source: Source,
    *,
    size: int,
    crop: float,
    batch_size: int,
    num_images: int | None = None,
    cache: str | os.PathLike | None = None,
    skip_unreadable: bool = False,
    process: tuple[int, int] = (0, 1),
    multiple: int = 1,
    num_threads: int = 16,
    progress: bool = False,
) -> ImageBatches:
    """The source's images as batches, decoded now or found in the cache.

    Process p of P has every P-th image from the p-th on, and batches of batch_size / P: together
    they make the batches of a single process, whatever P is.

    Args:
      source: from `open_source`.
      size: pixels of a side, see `decode`.
      crop: see `decode`.
      batch_size: images of a batch of all processes together.
      num_images: at most as many, evenly spaced in the source: the first of a sorted folder would
        be of few classes.
      cache: a folder on a local disk; the images are kept there, mapped into memory, and found
        again by a later run with the same files, size and process. In the host's memory by default.
      skip_unreadable: leave out what cannot be read, the same rows in every pass; their reasons are
        in `content.unreadable`. Else the first one raises. What the disk itself refuses raises in
        any case: it may come and go.
      process: (p, P).
      multiple: of rows in a batch, the last one too, filled up with `HOLE`: the number of devices
        that share it.
      num_threads: that decode.
      progress: show a bar of images decoded.
    """
    count = process[1]
    multiple = math.lcm(multiple, count)
    if batch_size < 1 or batch_size % multiple:
        raise ValueError(
            f"batch_size={batch_size}, expected a multiple of {multiple}, the devices that share a "
            "batch"
        )
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images={num_images}, expected at least 1")
    total = len(source) if num_images is None else min(num_images, len(source))
    rows = (total + -total % multiple) // count
    share = _Share(source, size, crop, total, rows, process)
    if cache is None:
        _check_room(share.bytes, psutil.virtual_memory().available, "memory; name a cache folder")
        images, labels = np.empty(share.shape, np.uint8), np.empty(rows, np.int32)
        unreadable = share.decode(images, labels, skip_unreadable, num_threads, progress)
        content = Images(images, labels, unreadable)
    else:
        with _locked_folder(Path(cache), share.name()) as folder:
            if not folder.is_dir():
                _check_room(
                    share.bytes,
                    shutil.disk_usage(cache).free,
                    f"disk under {cache}; name another cache folder",
                )
                with _whole_or_not(folder) as partial:
                    images = np.lib.format.open_memmap(
                        partial / "images.npy", "w+", np.uint8, share.shape
                    )
                    labels = np.empty(rows, np.int32)
                    unreadable = share.decode(
                        images, labels, skip_unreadable, num_threads, progress
                    )
                    images.flush()
                    np.save(partial / "labels.npy", labels)
                    (partial / "unreadable.json").write_text(json.dumps(unreadable))
        content = Images(
            np.load(folder / "images.npy", mmap_mode="r"),
            np.load(folder / "labels.npy"),
            json.loads((folder / "unreadable.json").read_text()),
        )
    if content.unreadable and not skip_unreadable:
        _refuse(content.unreadable[0])
    return ImageBatches(content, batch_size // count)


class _Share(NamedTuple):
    """The rows of one process: which images they hold."""

    source: Source
    size: int
    crop: float
    total: int  # images of all processes
    rows: int
    process: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, self.size, self.size, 3

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape))

    def name(self) -> str:
        """Differs where the content does."""
        facts = [self.source.fingerprint(), *self[1:]]
        return f"images-{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}"

    def decode(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        skip_unreadable: bool,
        num_threads: int,
        progress: bool,
    ) -> list[str]:
        """Fill the arrays; what was unreadable."""
        index, count = self.process
        positions = grain.MapDataset.range(self.rows * count)[index::count]
        # Grain's threads look that many images ahead; it hands them on in order.
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
        unreadable = []
        examples = positions.map(self._example).to_iter_dataset(options)
        bar = {"desc": "decoding", "total": self.rows, "unit": "image", "disable": not progress}
        decoded = tqdm(examples, **bar)
        for row, (image, label, reason) in enumerate(decoded):
            if reason and not skip_unreadable:
                _refuse(reason)
            if reason:
                unreadable.append(reason)
            images[row], labels[row] = image, label
        return unreadable

    def _example(self, position: int) -> tuple[Any, int, str | None]:
        """The image at a position of all processes' order, its label, and why there is none."""
        if position >= self.total:
            return 0, HOLE, None
        record = self.source[position * len(self.source) // self.total]
        try:
            return decode(record, self.size, self.crop), record.label, None
        except UnreadableImage as error:
            return 0, HOLE, str(error)


def _refuse(reason: str) -> None:
    raise UnreadableImage(
        f"{reason}. Replace or remove it, or leave it out of every pass with skip_unreadable"
    )


def _check_room(needed: int, available: int, what: str) -> None:
    # A mapped file that outgrows its disk ends the process without a word, and so does memory.
    if needed > available:
        raise OSError(
            f"the decoded images take {needed / 1e9:.1f} GB; there are {available / 1e9:.1f} GB of "
            f"{what}"
        )


@contextlib.contextmanager
def _locked_folder(cache: Path, name: str) -> Iterator[Path]:
    """The folder's path, for one process at a time: another that wants the same images waits until
    they are there."""
    import fcntl

    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back by the system, however the process ends
        yield cache / name


@contextlib.contextmanager
def _whole_or_not(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when all is written; what a killed run has left is
    thrown away."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    os.rename(partial, folder)
