"""Data sets on disk: what is read from folders in the official formats, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.datasets import DataSet, evaluation_batches
from experiments.files import DataError, read_image
from folders_on_disk import (
    CIFAR10_FILES,
    WNIDS,
    cifar10_content,
    coloured,
    load_dataset,
    random_images,
    write_cifar10,
    write_cifar100,
    write_class_folders,
    write_image,
    write_pickle,
    write_tiny_imagenet,
)
from PIL import Image

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


def test_loops_of_symbolic_links_end_and_each_image_is_read_once(tmp_path):
    folder = write_class_folders(tmp_path)
    before = len(load_dataset("folder", folder).train)
    one, *_ = sorted((folder / "train").iterdir())
    (one / "again").symlink_to(one)
    (one / "below").mkdir()
    (one / "below" / "up").symlink_to(one)
    assert len(load_dataset("folder", folder).train) == before


def brightest_channels(data: DataSet, split) -> list[tuple[int, int]]:
    """Of every sample: which channel is bright, and its label."""
    images, labels = split.batch(range(len(split)))
    return list(zip(images.float().mean(dim=(2, 3)).argmax(dim=1).tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("name", ["tiny-imagenet", "imagenet", "folder"])
def test_images_have_the_label_of_their_class(name, folders):
    data = load_dataset(name, folders[name], crop=None if name == "tiny-imagenet" else 32)
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
