"""Readers for the data folder: each returns (inputs, labels) as NumPy arrays, in file order and
unnormalized."""

import gzip
import io
import os
from pathlib import Path

import numpy as np

DEFAULT = Path(__file__).parents[2] / ".." / "shared" / "data"


def folder(name: str) -> Path:
    """The folder `name` (mnist, cifar10, text, weights) of the data: under $HESSDENSITY_DATA, or
    beside the project."""
    root = Path(os.environ.get("HESSDENSITY_DATA", DEFAULT))
    if not (root / name).is_dir():
        raise FileNotFoundError(
            f"no folder {name!r} in {root}: set HESSDENSITY_DATA to the folder that holds it"
        )
    return root / name


def cifar10(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` images of "train" or "test": uint8 (count, 32, 32, 3), labels int32
    (count,)."""
    import pyarrow.parquet as parquet
    from PIL import Image

    file = parquet.ParquetFile(folder("cifar10") / f"{split}-00000-of-00001.parquet")
    if count > file.metadata.num_rows:
        raise ValueError(f"count={count}: the {split} split has {file.metadata.num_rows} images")
    table = next(file.iter_batches(batch_size=count))
    images = [
        np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in table["image"].to_pylist()
    ]
    return np.stack(images), table["label"].to_numpy().astype(np.int32)


def downsample(images: np.ndarray, size: int) -> np.ndarray:
    """Square images (n, m, m, c) averaged over squares of m / size pixels: float32 (n, size, size,
    c)."""
    count, side, *_, channels = images.shape
    if side % size:
        raise ValueError(f"size={size} does not divide the images' {side} pixels")
    squares = images.reshape(count, size, side // size, size, side // size, channels)
    return squares.mean((2, 4), np.float32)


def mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of "train" or "test" from the original files: uint8 (n, 28, 28), labels int32
    (n,)."""
    prefix = {"train": "train", "test": "t10k"}[split]
    # The IDX headers are 16 and 8 bytes; the sizes in them are known, so only the bytes after them
    # matter.
    images = gzip.decompress((folder("mnist") / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder("mnist") / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int32),
    )


def mnist_test() -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 MNIST test images: `mnist("test")`."""
    return mnist("test")


def shakespeare(num_sequences: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive pieces of the text as tokens: inputs and next characters, both int32
    (num_sequences, length).

    A token is the rank of its character among the 65 that occur.
    """
    text = np.frombuffer((folder("text") / "tinyshakespeare.txt").read_bytes(), np.uint8)
    needed = num_sequences * length + 1
    if needed > len(text):
        raise ValueError(
            f"{num_sequences} sequences of {length} need {needed} characters; the text has "
            f"{len(text)}"
        )
    tokens = np.unique(text, return_inverse=True)[1][:needed].astype(np.int32)
    return tokens[:-1].reshape(num_sequences, length), tokens[1:].reshape(num_sequences, length)
