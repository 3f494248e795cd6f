"""Small image data for the recipes: scikit-learn's bundled digits, and Fashion-MNIST in IDX files.

Everything stays in memory, so a batch is one indexing operation and no worker process is needed. The validation split
is always cut from the training images by its own seed; the test images are touched by ``trainer.test`` alone.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import math
import urllib.request
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Pair = tuple[Tensor, Tensor]

FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
"""The four published files and their checksums."""

FASHION_MNIST_MIRRORS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
"""Where the published files lie, tried in this order."""


class DataFileError(OSError):
    """A data file is missing, is not what its name promises, or cannot be downloaded. The message says what to do."""


def read_idx(path: str | Path) -> Tensor:
    """Read a file in IDX format, the format of MNIST and its relatives.

    Args:
        path: The file; gunzipped on the fly when its name ends in ``.gz``.

    Returns:
        uint8, with the shape that the file's header states.

    Raises:
        DataFileError: If the file is missing, damaged, not IDX, or not of unsigned bytes.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "labels-idx1-ubyte")
        >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 9]))
        >>> read_idx(path)
        tensor([7, 0, 9], dtype=torch.uint8)
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError as error:
        raise DataFileError(f"There is no data file '{path}'.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataFileError(
            f"The data file '{path}' is damaged ({error or 'it ends too early'}). Delete it and fetch it again."
        ) from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise DataFileError(f"'{path}' is not an IDX file: its first bytes are {raw[:4]!r}, expected two zero bytes.")
    if raw[2] != 8:
        raise DataFileError(f"'{path}' holds type {raw[2]:#04x}, but only unsigned bytes (0x08) are supported.")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4)]
    if len(raw) != start + math.prod(shape):
        raise DataFileError(
            f"The data file '{path}' is damaged: its header promises {tuple(shape)}, that is {math.prod(shape):,} "
            f"bytes, but {len(raw) - start:,} follow. Delete it and fetch it again."
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)[start:].reshape(shape)


def verify_sha256(path: Path, sha256: str) -> None:
    """Check that a file is the published one.

    Raises:
        DataFileError: If its checksum is another.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DataFileError(
            f"The data file '{path}' is damaged or another file of the same name: expected SHA-256 {sha256}, found "
            f"{found}. Delete it and fetch it again, or pass verify=False if you mean to use a file of your own."
        )


def download(name: str, mirrors: Sequence[str], folder: Path, sha256: str | None) -> Path:
    """Download one file with a progress bar; it gets its name only once its checksum is right.

    Args:
        name: File name, on the mirrors and in ``folder``.
        mirrors: Addresses of folders, with a slash at the end, tried in order.
        folder: Where to put it; made when missing.
        sha256: Checksum of the whole file, in hexadecimal; None accepts any file.

    Returns:
        The path of the file.

    Raises:
        DataFileError: If no mirror gave a file with this checksum. Nothing is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    part = folder / f"{name}.part"
    failures = []
    for mirror in mirrors:
        try:
            with _progress(name) as progress, urllib.request.urlopen(mirror + name, timeout=60) as source:  # noqa: S310
                _copy(source, part, progress, name)
            if sha256 is not None:
                verify_sha256(part, sha256)
        except DataFileError:
            failures.append(f"{mirror}{name}: it does not have the published checksum")
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{mirror}{name}: {error}")
        else:
            part.replace(path)
            return path
        finally:
            part.unlink(missing_ok=True)
    tried = "\n  ".join(failures) or "no mirror was given"
    raise DataFileError(
        f"Could not download '{name}':\n  {tried}\nFetch it by hand, put it into '{folder}' and start again."
    )


def _copy(source: IO[bytes], part: Path, progress: Progress, name: str) -> None:
    headers = getattr(source, "headers", {})
    length = headers.get("Content-Length")
    task = progress.add_task(name, total=int(length) if length else None)
    with part.open("wb") as target:
        while chunk := source.read(1 << 18):
            target.write(chunk)
            progress.advance(task, len(chunk))


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Progress]:
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


class ImageDataset(Dataset[Pair]):
    """Images and labels in memory, handed out a whole batch at a time.

    Args:
        images: uint8 or float ``(num, channels, height, width)``.
        labels: int64 ``(num,)``.
        mean: Subtracted from each pixel.
        std: Then each pixel is divided by it, > 0.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: float, std: float) -> None:
        self.images = images
        self.labels = labels
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Pair:
        return (self.images[index].float() - self.mean) / self.std, self.labels[index]

    def __getitems__(self, indices: list[int]) -> Pair:
        at = torch.as_tensor(indices)
        return (self.images[at].float() - self.mean) / self.std, self.labels[at]


def _as_fetched(batch: Any) -> Any:
    """Stand in for collation: `ImageDataset` hands out batches already."""
    return batch


class ImageDataModule(pl.LightningDataModule, ABC):
    """Images in memory, with a validation split cut from the training images.

    Args:
        batch_size: Images per step and process.
        val_fraction: Share of the training images that is held out for validation, between 0 and 1.
        seed: Seeds the validation split, and nothing else.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, batch_size: int, val_fraction: float, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}.")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.splits: Mapping[str, ImageDataset] = {}

    @abstractmethod
    def load(self) -> tuple[Pair, Pair]:
        """Return training and test images ``(num, channels, height, width)`` with labels ``(num,)``."""

    def setup(self, stage: str) -> None:
        """Load the images and cut the validation split."""
        del stage  # all of it is in memory anyway
        if self.splits:
            return
        (images, labels), (test_images, test_labels) = self.load()
        train, val = train_test_split(
            torch.arange(len(labels)).numpy(),
            test_size=self.val_fraction,
            random_state=self.seed,
            stratify=labels.numpy(),
        )
        train, val = torch.from_numpy(train), torch.from_numpy(val)
        pixels = images[train].float()
        mean, std = float(pixels.mean()), float(pixels.std())
        self.splits = {
            "train": ImageDataset(images[train], labels[train], mean, std),
            "val": ImageDataset(images[val], labels[val], mean, std),
            "test": ImageDataset(test_images, test_labels, mean, std),
        }

    def _loader(self, split: str, *, train: bool = False) -> DataLoader[Pair]:
        images = self.splits[split]
        return DataLoader(
            images,
            batch_size=self.batch_size,
            shuffle=train,
            drop_last=train and len(images) >= self.batch_size,  # a rest of few images misleads batch norm
            collate_fn=_as_fetched,
        )

    def train_dataloader(self) -> DataLoader[Pair]:
        """Return shuffled training batches, all of the same size."""
        return self._loader("train", train=True)

    def val_dataloader(self) -> DataLoader[Pair]:
        """Return the images held out from training."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Pair]:
        """Return the test images."""
        return self._loader("test")


class Digits(ImageDataModule):
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: 10 classes, no download.

    A fixed, stratified fifth of them is the test set, whatever the seed.

    Args:
        batch_size: Images per step and process.
        val_fraction: Share of the training images that is held out for validation, between 0 and 1.
        seed: Seeds the validation split, and nothing else.

    Example:
        >>> data = Digits(batch_size=32)
        >>> data.setup("fit")
        >>> {name: len(split) for name, split in data.splits.items()}
        {'train': 1221, 'val': 216, 'test': 360}
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    def __init__(self, batch_size: int = 64, val_fraction: float = 0.15, seed: int = 0) -> None:
        super().__init__(batch_size, val_fraction, seed)

    def load(self) -> tuple[Pair, Pair]:
        """Return training and test images ``(num, 1, 8, 8)`` with labels ``(num,)``."""
        bunch = load_digits()
        images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(bunch.target).long()
        train, test = train_test_split(
            torch.arange(len(labels)).numpy(), test_size=0.2, random_state=0, stratify=labels.numpy()
        )
        train, test = torch.from_numpy(train), torch.from_numpy(test)
        return (images[train], labels[train]), (images[test], labels[test])


class FashionMNIST(ImageDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothing, 28x28 pixels, 10 classes.

    Args:
        data_dir: Folder of the four IDX files, gzipped as published or unpacked.
        download: Fetch what is missing in ``data_dir``, with progress, and check it.
        batch_size: Images per step and process.
        val_fraction: Share of the training images that is held out for validation, between 0 and 1.
        seed: Seeds the validation split, and nothing else.
        num_train: Use only this many of the training images (before the validation split), None for all.
        verify: Check the published checksums of gzipped files; turn it off to use data of your own in this format.
        mirrors: Addresses of folders that hold the four files, tried in order.

    Raises:
        ValueError: If an argument is out of its range.
        DataFileError: In ``prepare_data`` or ``setup``, if a file is missing, damaged or cannot be downloaded.

    Reference:
        Xiao et al., "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
        arXiv:1708.07747.
    """

    def __init__(
        self,
        data_dir: str = "data/fashion_mnist",
        *,
        download: bool = False,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_train: int | None = None,
        verify: bool = True,
        mirrors: list[str] | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed)
        if num_train is not None and num_train < 1:
            raise ValueError(f"num_train must be at least 1, got {num_train}.")
        self.data_dir = Path(data_dir).expanduser()
        self.download = download
        self.num_train = num_train
        self.verify = verify
        self.mirrors = tuple(FASHION_MNIST_MIRRORS if mirrors is None else mirrors)

    def prepare_data(self) -> None:
        """Fetch what is missing, or say what is."""
        for name, sha256 in FASHION_MNIST_SHA256.items():
            if self._find(name) is None:
                if not self.download:
                    raise DataFileError(
                        f"There is no '{name}' in '{self.data_dir}' (looked for '{name.removesuffix('.gz')}' too). "
                        f"Set data.init_args.data_dir to the folder that has it, or data.init_args.download to true."
                    )
                download(name, self.mirrors, self.data_dir, sha256 if self.verify else None)

    def load(self) -> tuple[Pair, Pair]:
        """Return training and test images ``(num, 1, height, width)`` with labels ``(num,)``."""
        train, test = self._pair("train"), self._pair("t10k")
        return (train[0][: self.num_train], train[1][: self.num_train]), test

    def _find(self, name: str) -> Path | None:
        candidates = (self.data_dir / name, self.data_dir / name.removesuffix(".gz"))
        return next((path for path in candidates if path.is_file()), None)

    def _read(self, name: str) -> tuple[Path, Tensor]:
        path = self._find(name) or self.data_dir / name
        if self.verify and path.suffix == ".gz" and path.is_file():
            verify_sha256(path, FASHION_MNIST_SHA256[name])
        return path, read_idx(path)

    def _pair(self, part: str) -> Pair:
        path, images = self._read(f"{part}-images-idx3-ubyte.gz")
        labels_path, labels = self._read(f"{part}-labels-idx1-ubyte.gz")
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataFileError(
                f"'{path}' and '{labels_path}' do not belong together: expected (num, height, width) and (num,), found "
                f"{tuple(images.shape)} and {tuple(labels.shape)}."
            )
        return images.unsqueeze(1), labels.long()


class Indexed(Dataset[tuple[Any, Any]]):
    """A dataset whose items are ``(index, item)``: for what is remembered of each example, as `ALIGPlus` does.

    Batches are ``(indices, batch)``, with indices as int64 ``(batch,)``. A dataset that hands out whole batches keeps
    doing so; its ``collate_fn`` must leave them as they are.

    Args:
        dataset: Any dataset with indices.

    Raises:
        TypeError: If it has none.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = Indexed(TensorDataset(torch.tensor([5.0, 6.0, 7.0])))
        >>> indices, (x,) = next(iter(DataLoader(data, batch_size=2)))
        >>> indices, x
        (tensor([0, 1]), tensor([5., 6.]))
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"{type(dataset).__name__} has no indices: examples of a stream cannot be told apart. Use a dataset "
                "with `__len__` and `__getitem__`."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        if not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        items = self.dataset.__getitems__(indices)
        return list(zip(indices, items, strict=True)) if isinstance(items, list) else (torch.as_tensor(indices), items)
