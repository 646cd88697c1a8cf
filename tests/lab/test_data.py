"""Data sets: what is in a batch, in which order, and what is said where files are missing or damaged."""

import hashlib
import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from efreg.lab import data

MNIST_FILES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
CIFAR10_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
COLORS = {"apple": [(200, 30, 30), (180, 60, 20), (90, 10, 40)], "pear": [(60, 200, 40), (10, 90, 70)]}


def write_mnist(root, train=20, test=7):
    """A small MNIST in the idx format: magic number, sizes, bytes. Returns each part's images and labels."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    parts = []
    for prefix, n in (("train", train), ("t10k", test)):
        images, labels = pixels(n, 28, 28), np.arange(n, dtype=np.uint8) % 10
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
        parts.append((images, labels))
    return parts


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_cifar(root, name, monkeypatch, each=4):
    """A small CIFAR of pickled batches, whose checksums torchvision takes for the right ones."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    train, key = (CIFAR10_BATCHES, "labels") if name == "cifar10" else (["train"], "fine_labels")
    test = ["test_batch"] if name == "cifar10" else ["test"]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    batches = {}
    for i, file in enumerate(train + test):
        batches[file] = {"data": pixels(each, 3072) // (i + 1), key: list(range(i, i + each))}
        (folder / file).write_bytes(pickle.dumps(batches[file]))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: []}))
    for attribute, files in (("train_list", train), ("test_list", test)):
        monkeypatch.setattr(kind, attribute, [[file, md5(folder / file)] for file in files])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / kind.meta["filename"])})
    images = np.concatenate([batches[file]["data"] for file in train]).reshape(-1, 3, 32, 32)
    return images, [label for file in train for label in batches[file][key]]


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_folders(root, size=(5, 4)):
    """One folder a class, each image of one colour."""
    for part, (name, colors) in itertools.product(("train", "val"), COLORS.items()):
        folder = root / part / name
        folder.mkdir(parents=True)
        for i, color in enumerate(colors):
            Image.new("RGB", size, color).save(folder / f"{i}.png")


def everything(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def by_hand(image, mean, std, peak=255):
    """(x / peak − mean) / std of bytes [C, H, W], number by number."""
    out = torch.empty(image.shape)
    for c, y, x in np.ndindex(*image.shape):
        out[c, y, x] = (int(image[c, y, x]) / peak - mean[c]) / std[c]
    return out


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(everything(some), everything(others), strict=True))


def test_digits_are_split_for_good():
    """1347 and 450 images, the same ones whatever state numpy's random numbers are in."""
    np.random.seed(1)  # noqa: NPY002
    first = data.load("digits")
    np.random.seed(2)  # noqa: NPY002
    second = data.load("digits")
    assert (len(first.train), len(first.test)) == (1347, 450)
    assert same(first.train.batches(500), second.train.batches(500))
    assert same(first.test.batches(500), second.test.batches(500))


def test_digits_are_all_there_and_stratified():
    """Both parts together are scikit-learn's images, and a quarter of each class is for the test."""
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    whole = load_digits()
    parts = [everything(part.batches(500)) for part in (digits.train, digits.test)]
    images = torch.cat([part[0] for part in parts]) * 0.3760 + 0.3053
    found = sorted((16 * images).round().flatten(1).int().tolist())
    assert found == sorted(whole.data.astype(int).tolist())
    for digit in range(10):
        count = int((parts[1][1] == digit).sum())
        assert abs(count - (whole.target == digit).sum() / 4) < 1
    assert len(everything(digits.test.batches(7))[0]) == 450


def test_digits_are_normalised_by_their_own_mean_and_deviation():
    images, labels = everything(data.load("digits").train.batches(500))
    assert images.shape == (1347, 1, 8, 8)
    assert labels.dtype == torch.int64
    assert images.mean().abs() < 1e-3
    assert (images.std() - 1).abs() < 1e-3


def test_digits_belong_to_their_labels():
    from sklearn.datasets import load_digits

    whole = load_digits()
    label_of = {tuple(x): y for x, y in zip(whole.data.astype(int).tolist(), whole.target, strict=True)}
    for images, labels in data.load("digits").train.epoch(100, seed=3, epoch=1):
        stored = (16 * (images * 0.3760 + 0.3053)).round().int().flatten(1).tolist()
        assert [label_of[tuple(x)] for x in stored] == labels.tolist()


def test_mnist_is_resized_and_normalised(tmp_path):
    """[1, 32, 32], as PIL resizes to within one grey level of 255, with the mean and deviation of GReg."""
    (train, train_labels), (test, test_labels) = write_mnist(tmp_path)
    mnist = data.load("mnist", tmp_path)
    for part, images, labels in ((mnist.train, train, train_labels), (mnist.test, test, test_labels)):
        found, found_labels = everything(part.batches(6))
        assert found_labels.tolist() == labels.tolist()
        for one, stored in zip(found, images, strict=True):
            resized = np.asarray(Image.fromarray(stored).resize((32, 32), Image.Resampling.BILINEAR))
            expected = by_hand(resized[None], (0.1307,), (0.3081,))
            assert one.shape == (1, 32, 32)
            assert (one - expected).abs().max() <= 1.001 / 255 / 0.3081


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ],
)
def test_cifar_is_normalised_as_in_the_paper(name, mean, std, tmp_path, monkeypatch):
    """CIFAR-10 with ImageNet's mean and deviation, CIFAR-100 with its own; to float32's rounding."""
    images, labels = write_cifar(tmp_path, name, monkeypatch)
    cifar = data.load(name, tmp_path)
    assert cifar.info.num_classes == int(name.removeprefix("cifar"))
    found, found_labels = everything(cifar.train.batches(3))
    assert found_labels.tolist() == labels
    for one, stored in zip(found, images, strict=True):
        torch.testing.assert_close(one, by_hand(stored, mean, std), rtol=0, atol=1e-6)
    assert everything(cifar.test.batches(3))[0].shape == (4, 3, 32, 32)


def test_cifar_is_cropped_and_flipped_in_training_only(tmp_path, monkeypatch):
    images, _ = write_cifar(tmp_path, "cifar10", monkeypatch)
    cifar = data.load("cifar10", tmp_path)
    assert same(cifar.train.batches(4), cifar.train.batches(4))
    assert not same(cifar.train.epoch(4, 0, 0), cifar.train.epoch(4, 0, 1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    stored = [torch.from_numpy(image) for image in images]
    for batch, _ in cifar.train.epoch(4, 0, 0):
        for image in (255 * (batch * std + mean)).round().to(torch.uint8):
            assert any(offsets(image, whole, 4) for whole in stored)


def test_a_crop_is_a_window_of_the_padded_image():
    """Each image by itself, all its channels alike: any of 9 × 9 windows, flipped half of the time."""
    images = torch.randint(1, 256, (300, 2, 5, 7), dtype=torch.uint8)
    found = [
        offsets(crop, image, 4)
        for crop, image in zip(data.crop_and_flip(images, 4, torch.Generator()), images, strict=True)
    ]
    assert all(len(choices) >= 1 for choices in found)
    tops, lefts, flips = zip(*(choices[0] for choices in found if len(choices) == 1), strict=True)
    assert set(tops) == set(lefts) == set(range(9))
    assert 0.4 < np.mean(flips) < 0.6
    assert len({(top, left) for top, left in zip(tops, lefts, strict=True)}) > 70


def offsets(crop, image, padding):
    """(top, left, flipped) of every window of the padded image that equals the crop, by looking at each."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    return [
        (top, left, flipped)
        for top, left, flipped in itertools.product(range(2 * padding + 1), range(2 * padding + 1), (0, 1))
        if torch.equal(crop.flip(2) if flipped else crop, padded[:, top : top + height, left : left + width])
    ]


def test_without_room_nothing_is_cropped():
    images = torch.randint(1, 256, (20, 2, 5, 7), dtype=torch.uint8)
    for crop, image in zip(data.crop_and_flip(images, 0, torch.Generator()), images, strict=True):
        assert torch.equal(crop, image) or torch.equal(crop, image.flip(2))


def test_order_is_a_function_of_seed_and_epoch(tmp_path, monkeypatch):
    """Neither earlier epochs nor torch's own random numbers change what an epoch brings."""
    write_cifar(tmp_path, "cifar10", monkeypatch)
    first, second = (data.load("cifar10", tmp_path).train for _ in range(2))
    for epoch in range(3):
        torch.manual_seed(epoch)
        list(second.epoch(4, 5, epoch))
    assert same(first.epoch(4, 5, 2), second.epoch(4, 5, 2))
    others = [(5, 1), (6, 2), (2, 5)]
    assert not any(same(first.epoch(4, 5, 2), first.epoch(4, *other)) for other in others)


def test_an_epoch_brings_every_image_once():
    digits = data.load("digits").train
    sizes = [len(labels) for _, labels in digits.epoch(64, 0, 0)]
    assert sizes == 21 * [64] + [3]
    images, _ = everything(digits.epoch(64, 0, 0))
    stored, _ = everything(digits.batches(64))
    assert not torch.equal(images, stored)
    assert sorted(images.flatten(1).tolist()) == sorted(stored.flatten(1).tolist())


def test_seeds_differ():
    """Of (a, b) and (b, a), of neighbours, and all fit what torch takes as a seed."""
    seeds = {data.seed_of(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_image_folders(tmp_path):
    """[3, 224, 224] from images of any size; labels by the names of the folders, in alphabetical order."""
    write_folders(tmp_path)
    folders = data.load("imagefolder", tmp_path)
    assert folders.info.num_classes == 2
    images, labels = everything(folders.test.batches(2))
    assert images.shape == (5, 3, 224, 224)
    assert labels.tolist() == [0, 0, 0, 1, 1]
    for image, color in zip(images, [c for colors in COLORS.values() for c in colors], strict=True):
        pixel = np.array(color, dtype=np.uint8)[:, None, None]
        expected = by_hand(pixel, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        torch.testing.assert_close(image, expected.expand(3, 224, 224), rtol=0, atol=1e-5)


def test_image_folders_in_an_order_of_their_own(tmp_path, monkeypatch):
    """Shuffled and augmented as (seed, epoch) says, whatever the number of workers."""
    write_folders(tmp_path)
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(pixels(40, 30, 3) // (1 + int(path.stem))).save(path)
    train = data.load("imagefolder", tmp_path).train
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    expected = list(train.epoch(2, 7, 3))
    assert len(train) == len(everything(expected)[1]) == 5
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    torch.manual_seed(99)
    assert same(train.epoch(2, 7, 3), expected)
    others, _ = everything(train.epoch(2, 7, 4))
    assert not any(torch.equal(a, b) for a in others for b in everything(expected)[0])


@pytest.mark.parametrize("name", ["imagenet", "", "CIFAR10", "mnist "])
def test_an_unknown_name_lists_the_choices(name):
    with pytest.raises(ValueError, match=r"unknown data set .*digits, mnist, cifar10, cifar100, imagefolder"):
        data.load(name)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_a_folder_without_the_set(name, tmp_path):
    """The message names set, folder and both ways out; nothing is made there."""
    folder = tmp_path / "nothing here"
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, folder)
    for part in (f"no {name} in {folder}", "--data", "--download"):
        assert part in str(error.value)
    assert not folder.exists()


@pytest.mark.parametrize("file", MNIST_FILES)
def test_half_an_mnist(file, tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / file).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"mnist in {tmp_path} is incomplete, .*{file} missing: .*--download"
    ):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("file", [*CIFAR10_BATCHES, "test_batch", "batches.meta"])
def test_half_a_cifar(file, tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    (tmp_path / "cifar-10-batches-py" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"cifar10 in {tmp_path} is incomplete, .*{file} missing"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("length", [0, 3, 8, 16, 1000])
@pytest.mark.parametrize("file", MNIST_FILES)
def test_a_truncated_mnist(file, length, tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    if length >= path.stat().st_size:
        length = path.stat().st_size - 1
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"mnist in {tmp_path} is damaged .*remove it and add --download"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("byte", [0, 7, 9, 10, 13, 255])
@pytest.mark.parametrize("file", MNIST_FILES)
def test_an_mnist_of_another_type(file, byte, tmp_path):
    """Byte 2 of an idx file is the type of its numbers: 8 for bytes."""
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    content = bytearray(path.read_bytes())
    content[2] = byte
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"mnist in {tmp_path} is damaged"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_cifar(file, tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"cifar10 in {tmp_path} is damaged .*remove it and add --download"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "CIFAR100"])
def test_nothing_is_fetched_unless_asked(name, tmp_path, monkeypatch):
    from torchvision import datasets

    fetched = []
    monkeypatch.setattr(getattr(datasets, name), "download", lambda self: fetched.append(self.root))
    with pytest.raises(FileNotFoundError):
        data.load(name.lower(), tmp_path)
    assert fetched == []
    with pytest.raises(ValueError, match="is damaged"):
        data.load(name.lower(), tmp_path, download=True)
    assert fetched == [tmp_path]


def test_what_a_set_holds_is_known_beforehand(tmp_path):
    """Enough to check a training before anything is fetched."""
    assert data.info("cifar100", tmp_path / "nowhere").num_classes == 100
    write_folders(tmp_path)
    assert data.info("imagefolder", tmp_path) == data.load("imagefolder", tmp_path).info


def test_image_folders_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path / 'train'}: --data names a folder"):
        data.load("imagefolder", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no images in {tmp_path / 'train'}: .*one folder a class"):
        data.load("imagefolder", tmp_path)
    write_folders(tmp_path / "other")
    (tmp_path / "other" / "train").replace(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path / 'val'}: --data names"):
        data.load("imagefolder", tmp_path)


def test_image_folders_without_images(tmp_path):
    write_folders(tmp_path)
    for path in (tmp_path / "val" / "pear").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no images in {tmp_path / 'val'}: .*pear"):
        data.load("imagefolder", tmp_path)


def test_image_folders_of_other_classes(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "val" / "pear").rename(tmp_path / "val" / "plum")
    with pytest.raises(ValueError, match=f"{tmp_path / 'train'} and .*val hold different classes"):
        data.load("imagefolder", tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_damaged_image(content, tmp_path):
    """One sentence with the file's name, not the traceback of a worker."""
    write_folders(tmp_path, size=(50, 50))
    path = tmp_path / "val" / "apple" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    images = data.load("imagefolder", tmp_path).test
    with pytest.raises(ValueError) as error:
        list(images.batches(2))
    assert str(error.value).startswith(f"{path} is damaged (")
    assert str(error.value).endswith("): replace it or take it out")
