"""Data sets: images in batches, on the device, in an order that is a pure function of (seed, epoch).

The small sets are held as one uint8 tensor and cropped, flipped and normalised a batch at a time on the
device; image folders go through torchvision's transforms and a DataLoader.
"""

import copy
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Info:
    """What a data set holds: how many classes, the shape of an image [C, H, W], and how it is normalised.

    mean, std: per channel, of values in [0, 1]; peak: the largest value that a stored byte takes.
    padding: of the random crop in training, in pixels; 0 trains on the images as they are.
    """

    num_classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    peak: int = 255


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

INFOS = {
    "digits": Info(10, (1, 8, 8), (0.3053,), (0.3760,), peak=16),
    "mnist": Info(10, (1, 32, 32), (0.1307,), (0.3081,)),
    "cifar10": Info(10, (3, 32, 32), IMAGENET_MEAN, IMAGENET_STD, padding=4),
    "cifar100": Info(100, (3, 32, 32), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), padding=4),
}
"""The sets of known size; those of method.md's tables are normalised as there."""

NAMES = (*INFOS, "imagefolder")
"""The data sets that can be asked for by name."""


W = TypeVar("W", Tensor, Sequence[int])


class Part(NamedTuple):
    """What one of several processes has of something: all of it where there is one process."""

    rank: int = 0
    processes: int = 1

    def of(self, whole: W) -> W:
        """Its slice of a sequence or a tensor; no process has more than one element more than another."""
        begin, end = (len(whole) * rank // self.processes for rank in (self.rank, self.rank + 1))
        return whole[begin:end]


class Images(Protocol):
    """One half of a data set, train or test."""

    def __len__(self) -> int:
        """How many there are, for all processes together."""

    def share(self, part: Part) -> "Images":
        """The same images as one of several processes sees them."""

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every image once, in the stored order, not augmented; of these a process has its part."""

    def epoch(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """Every image once, shuffled and augmented as (seed, epoch) says.

        A process has its part of every batch.
        """


class Data(NamedTuple):
    """A data set: what it holds, and its two parts."""

    info: Info
    train: Images
    test: Images


class Missing(FileNotFoundError):
    """Nothing of a data set is where it was looked for."""


def load(
    name: str, root: str | Path = "data", *, download: bool = False, device: torch.device | str = "cpu"
) -> Data:
    """The data set `name`, one of NAMES, from the folder `root` (digits come with scikit-learn).

    Nothing is fetched unless `download`. Batches lie on `device`.
    Raises ValueError for an unknown name or damaged files, FileNotFoundError where files are missing, and
    where all are the Missing among these.
    """
    holds = info(name, root)
    if name == "imagefolder":
        return Data(holds, *_load_folders(Path(root), device))
    parts = _load_digits() if name == "digits" else _load_torchvision(name, Path(root), download)
    return Data(holds, *(InMemory(holds, *part, device) for part in parts))


def hold_out(data: Data, count: int) -> Data:
    """The same data set with `count` of its training images, always the same ones, in the test images' place.

    What is chosen by them is chosen without a look at the test images. Raises ValueError where too few are
    left to train on, or the images are not held in memory.
    """
    images = data.train
    if not isinstance(images, InMemory):
        raise ValueError(
            "image folders hold nothing out: drop --held-out, or move images from train/ to val/"
        )
    if not 0 < count < len(images):
        raise ValueError(
            f"cannot hold out {count} of {len(images)} training images: --held-out must be from 1 to "
            f"{len(images) - 1}"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.labels.device)
    return Data(data.info, images.only(order[count:]), images.only(order[:count]))


def share(data: Data, part: Part) -> Data:
    """The same data set as one of several processes sees it."""
    return data._replace(train=data.train.share(part), test=data.test.share(part))


def info(name: str, root: str | Path = "data") -> Info:
    """What the data set `name` holds, before anything is read or fetched. Raises as `load` does."""
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}: there are {', '.join(NAMES)}")
    return INFOS[name] if name in INFOS else _info_of_folders(Path(root))


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, such as (seed, epoch)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class InMemory:
    """Images held on the device as one uint8 tensor [n, C, H, W], with their labels [n]."""

    def __init__(self, info: Info, images: Tensor, labels: Tensor, device: torch.device | str = "cpu"):
        self.padding, self.part = info.padding, Part()
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std = (
            info.peak * torch.tensor(values, device=device).view(-1, 1, 1) for values in (info.mean, info.std)
        )

    def only(self, index: Tensor) -> "InMemory":
        """Some of the images."""
        some = copy.copy(self)
        some.images, some.labels = self.images[index], self.labels[index]
        return some

    def share(self, part: Part) -> "InMemory":
        shared = copy.copy(self)
        shared.part = part
        return shared

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        split = (self.part.of(whole).split(batch_size) for whole in (self.images, self.labels))
        for images, labels in zip(*split, strict=True):
            yield self._normalise(images), labels

    def epoch(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        order = torch.randperm(len(self), generator=generator)
        for chosen in order.split(batch_size):
            index = chosen.to(self.labels.device)
            images = self.images[index]
            if self.padding:
                images = crop_and_flip(images, self.padding, generator)
            yield self._normalise(self.part.of(images)), self.part.of(self.labels[index])

    def _normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def crop_and_flip(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image [C, H, W] of the batch padded with zeros, cropped at random, flipped half of the time."""
    n, channels, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    rows, columns = torch.arange(height), torch.arange(width)
    rows = (top + rows).to(images.device)
    columns = (left + torch.where(flip, columns.flip(0), columns)).to(images.device)
    padded = F.pad(images, (padding,) * 4)
    image, channel = (torch.arange(k, device=images.device) for k in (n, channels))
    return padded[
        image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]


def _load_digits() -> list[Batch]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=digits.target, random_state=0
    )
    return [(images[part], labels[part]) for part in (train, test)]


DAMAGE = (RuntimeError, ValueError, TypeError, AssertionError, EOFError, KeyError, pickle.UnpicklingError)
"""What torchvision raises on files that are not what they should be."""


def _load_torchvision(name: str, root: Path, download: bool) -> list[Batch]:
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if not download:
        _require_files(name, root, _files(kind))
    try:
        parts = [kind(root, train=train, download=download) for train in (True, False)]
    except DAMAGE as error:
        raise ValueError(
            f"{name} in {root} is damaged ({error}): remove it and add --download, or copy it again"
        ) from error
    return [_tensors(part.data, part.targets, INFOS[name].shape) for part in parts]


def _files(kind: Any) -> list[str]:
    """The files of a torchvision data set, relative to its root."""
    if kind.__name__ == "MNIST":
        return [f"MNIST/raw/{Path(archive).stem}" for archive, _ in kind.resources]
    listed = [file for file, _ in kind.train_list + kind.test_list]
    return [f"{kind.base_folder}/{file}" for file in [*listed, kind.meta["filename"]]]


def _require_files(name: str, root: Path, files: list[str]) -> None:
    missing = [file for file in files if not (root / file).is_file()]
    if missing == files:
        raise Missing(
            f"no {name} in {root} (looked for {files[0]}): name its folder with --data, "
            "or fetch it with `efreg train --download`"
        )
    if missing:
        raise FileNotFoundError(
            f"{name} in {root} is incomplete, {', '.join(missing)} missing: complete it, or add --download"
        )


def _tensors(data: Any, targets: Any, shape: tuple[int, int, int]) -> Batch:
    """Images [n, H, W] or [n, H, W, C] of bytes as [n, C, *size], and their labels."""
    from torchvision.transforms.v2.functional import resize

    images = torch.as_tensor(data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return resize(images.contiguous(), list(shape[1:]), antialias=True), torch.as_tensor(targets).long()


Transform = Callable[[Any], Tensor]
"""From an image, as torchvision has read it, to what the network takes."""


class Folder:
    """Images in one folder a class, through torchvision's transforms; one random stream an image."""

    def __init__(self, path: Path, train: Transform, test: Transform, device: torch.device | str = "cpu"):
        from torchvision.datasets import ImageFolder

        self.train = ImageFolder(path, train, loader=_read_image)
        self.test = ImageFolder(path, test, loader=_read_image)
        self.classes, self.device, self.part = self.test.classes, torch.device(device), Part()

    def __len__(self) -> int:
        return len(self.test)

    def share(self, part: Part) -> "Folder":
        shared = copy.copy(self)
        shared.part = part
        return shared

    def batches(self, batch_size: int) -> Iterator[Batch]:
        return self._load(self.test, _cut(self.part.of(range(len(self))), batch_size))

    def epoch(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        order = torch.randperm(len(self), generator=generator).tolist()
        mine = [self.part.of(batch) for batch in _cut(order, batch_size)]
        return self._load(_Seeded(self.train, seed, epoch), mine)

    def _load(self, images: Dataset, batches: list[Sequence[int]]) -> Iterator[Batch]:
        """The images that each batch lists."""
        loader = DataLoader(
            images,
            batch_sampler=[list(batch) for batch in batches],
            num_workers=min(8, os.cpu_count() or 1),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )
        try:
            for batch, labels in loader:
                yield batch.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except OSError as error:
            # A worker puts its traceback in front of the message; ours would keep the workers from ending.
            reason = str(error).rpartition("OSError: ")[2].strip()
            raise ValueError(reason) from error.with_traceback(None)


def _cut(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


class _Seeded(Dataset):
    """Images whose random transforms depend on (seed, epoch, index), whatever worker loads them."""

    def __init__(self, images: Dataset, seed: int, epoch: int):
        self.images, self.seed, self.epoch = images, seed, epoch

    def __getitem__(self, index: int) -> Any:
        torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
        return self.images[index]


def _read_image(path: str) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise OSError(f"{path} is damaged ({type(error).__name__}): replace it or take it out") from error


def _info_of_folders(root: Path) -> Info:
    train, val = (_classes(root / part) for part in ("train", "val"))
    if train != val:
        raise ValueError(
            f"{root / 'train'} and {root / 'val'} hold different classes: give both the same folders"
        )
    return Info(len(train), (3, 224, 224), IMAGENET_MEAN, IMAGENET_STD)


def _classes(path: Path) -> set[str]:
    if not path.is_dir():
        raise Missing(f"no folder {path}: --data names a folder with train/ and val/, one folder a class")
    if not (classes := {entry.name for entry in path.iterdir() if entry.is_dir()}):
        raise FileNotFoundError(f"no images in {path}: it needs one folder a class")
    return classes


def _load_folders(root: Path, device: torch.device | str) -> list[Folder]:
    from torchvision.transforms import v2

    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    train = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *finish])
    test = v2.Compose([v2.Resize(256), v2.CenterCrop(224), *finish])
    return [_open_folder(root / part, train, test, device) for part in ("train", "val")]


def _open_folder(path: Path, train: Transform, test: Transform, device: torch.device | str) -> Folder:
    try:
        return Folder(path, train, test, device)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no images in {path}: it needs one folder a class ({error})") from error
