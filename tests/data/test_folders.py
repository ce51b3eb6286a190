"""Folders of images: ``fit`` and ``evaluate`` read them by one rule. Expected values are written out by hand."""

import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from calib_guidance.data import ImageData, ImageSet
from calib_guidance.data.base import mixed
from calib_guidance.errors import ConfigurationError


def save(root, *names):
    """Images of 8×8; image i is gray level i."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number,) * 3).save(root / name)


def both(root, split="train", **options):
    """``{gray level: label}`` as ``fit`` and as ``evaluate`` read a split, and the class names of each."""
    data = ImageData(str(root), 8, batch_size=1, train_split=split, val_split=split, **options)
    data.setup("validate")
    fitted = {}
    for batch in data.val_dataloader():
        if "image" in batch:
            fitted[round((float(batch["image"][0, 0, 0, 0]) + 1) * 127.5)] = int(batch["label"])
    images = ImageSet(root, split=split, max_corrupt=options.get("max_corrupt", 0.01))
    evaluated = {}
    for batch in images.batches(2):
        evaluated |= dict(zip(batch.image[:, 0, 0, 0].tolist(), batch.label.tolist(), strict=True))
    assert data.class_names == images.source.class_names
    assert data.num_classes == len(images.source.class_names)
    return fitted, evaluated, data.class_names


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        # By value, not as text, where all are decimal; numbers without a folder are classes too.
        (["10/a.png", "2/a.png", "0/a.png"], [10, 2, 0], [str(i) for i in range(11)]),
        (["0003/a.png", "0010/a.png"], [3, 10], [str(i) for i in range(11)]),
        # As text where one is not.
        (["10/a.png", "2/a.png", "b/a.png"], [0, 1, 2], ["10", "2", "b"]),
        # The first folder, however deep the image lies.
        (["a/x.png", "a/deep/er/x.png", "b/deep/x.png"], [0, 0, 1], ["a", "b"]),
        (["n1/images/0.png", "n2/images/0.png"], [0, 1], ["n1", "n2"]),
    ],
)
def test_class_numbers(tmp_path, names, labels, classes):
    save(tmp_path / "train", *names)
    expected = dict(enumerate(labels))
    assert both(tmp_path) == (expected, expected, classes)


def test_validation_folders_are_numbered_as_training_folders(tmp_path, caplog):
    save(tmp_path / "train", "cat/0.png", "dog/0.png", "owl/0.png")
    save(tmp_path / "val", "dog/0.png", "owl/0.png")
    data = ImageData(str(tmp_path), 8)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert torch.cat([batch["label"] for batch in data.val_dataloader()]).tolist() == [1, 2]
    assert "split 'validation' lacks 1 of the 3 classes to train on: cat" in caplog.text


def test_an_empty_class_keeps_its_number_and_is_named(tmp_path, caplog):
    save(tmp_path / "train", "a/0.png", "c/0.png")
    (tmp_path / "train/b").mkdir()
    (tmp_path / "train/d").symlink_to(tmp_path / "gone")
    (tmp_path / "train/.cache").mkdir()
    with caplog.at_level(logging.WARNING):
        fitted, evaluated, classes = both(tmp_path)
    assert fitted == evaluated == {0: 0, 1: 2}
    assert classes == ["a", "b", "c", "d"]
    assert caplog.text.count("2 classes without images keep their numbers: b, d") == 2  # once for each reader
    assert "dangling links: 1 (d)" in caplog.text


def test_strays_are_named_and_leave_no_labels(tmp_path, caplog):
    save(tmp_path / "train", "a/0.png", "b/0.png", "stray.png")
    with caplog.at_level(logging.WARNING):
        images = ImageSet(tmp_path, split="train")
    assert not images.labelled
    assert images.num_images == 3
    message = "images beside the class folders: 1 (stray.png)"
    assert message in caplog.text
    with pytest.raises(ConfigurationError, match=re.escape(f"split 'train': no classes, because {message}")):
        ImageData(str(tmp_path), 8).setup("fit")


@pytest.mark.parametrize("names", [["7/0.png", "07/0.png"], ["0/0.png", "20240131/0.png"]])
def test_numbers_that_are_not_those_of_classes(tmp_path, names):
    save(tmp_path / "train", *names)
    assert not ImageSet(tmp_path, split="train").labelled
    with pytest.raises(ConfigurationError, match="folders are not numbers of classes: 0"):
        ImageData(str(tmp_path), 8).setup("fit")


def test_without_class_folders(tmp_path):
    save(tmp_path / "train", "0.png", "1.png")
    assert not ImageSet(tmp_path / "train").labelled
    with pytest.raises(ConfigurationError, match="no classes, because the images are not in folders"):
        ImageData(str(tmp_path), 8).setup("fit")


def test_dangling_links_are_skipped_images(tmp_path, caplog):
    save(tmp_path / "train", "a/0.png", "a/1.png", "b/0.png")
    (tmp_path / "train/a/2.png").symlink_to(tmp_path / "gone.png")
    with caplog.at_level(logging.WARNING):
        fitted, evaluated, _ = both(tmp_path, max_corrupt=0.25)
    assert fitted == evaluated == {0: 0, 1: 0, 2: 1}
    assert "a/2.png (dangling link)" in caplog.text
    with pytest.raises(ConfigurationError, match=r"1 of 4 images are corrupt.*a/2.png \(dangling link\)"):
        list(ImageSet(tmp_path, split="train").batches(4))


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    save(tmp_path / "elsewhere", "0.png", "1.png")
    save(tmp_path / "train", "a/0.png")
    (tmp_path / "train/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "train")
    images = ImageSet(tmp_path, split="train")
    assert [(row.name, row.label) for (row,) in images.source.read(range(i, i + 1) for i in range(3))] == [
        ("a/0.png", 0),
        ("b/0.png", 1),
        ("b/1.png", 1),
    ]


@pytest.mark.parametrize("split", ["val", "valid", "validation"])
def test_names_of_the_validation_split(tmp_path, split):
    save(tmp_path / "valid", "a/0.png", "b/0.png")
    assert both(tmp_path, split)[:2] == ({0: 0, 1: 1}, {0: 0, 1: 1})


def test_parts_of_a_split(tmp_path):
    """Of images that are sorted by class, every part has the same fraction of each."""
    save(tmp_path / "train", *(f"{name}/{i}.png" for name in "abcd" for i in range(10)))
    first, rest = (both(tmp_path, split)[0] for split in ("train[:90%]", "train[90%:]"))
    assert both(tmp_path, "train[:90%]")[1] == first
    assert first.keys() | rest.keys() == set(range(40))
    assert [*first.values()] == [label for label in range(4) for _ in range(9)]  # in order, each without one
    assert [*rest.values()] == [0, 1, 2, 3]
    assert both(tmp_path, "train[4:8]")[0].keys() == both(tmp_path, "train[10%:20%]")[0].keys()


def test_any_beginning_of_the_mixed_order_has_its_fraction_of_every_class():
    labels = np.repeat([3, 1, 0], [600, 300, 100])
    order = mixed(1000, labels)
    assert sorted(order) == list(range(1000))
    for size in (10, 50, 333, 900):
        counts = np.bincount(labels[order[:size]], minlength=4)
        assert np.abs(counts - size * np.array([0.1, 0.3, 0, 0.6])).max() <= 1.5
    assert sorted(mixed(5, None)) == list(range(5))


def test_a_limited_validation_sees_every_class(tmp_path):
    save(tmp_path / "train", *(f"{name}/{i}.png" for name in "abcd" for i in range(10)))
    data = ImageData(str(tmp_path), 8, batch_size=4, train_split="train", val_split="train", heldout_draws=2)
    data.setup("validate")
    cpu = SimpleNamespace(root_device=torch.device("cpu"))
    for limit in (2, 1, 0.1):
        data.trainer = SimpleNamespace(limit_val_batches=limit, global_rank=0, world_size=1, strategy=cpu)
        batches = list(data.val_dataloader())
        assert set(batches[0]["label"].tolist()) == {0, 1, 2, 3}
        assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(80))


def test_16_bits_are_the_same_in_both(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 257 * 40, np.uint16)).save(tmp_path / "train" / name / "0.png")
    data = ImageData(str(tmp_path), 8, train_split="train", val_split="train")
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch["image"], torch.full((2, 3, 8, 8), 40 / 127.5 - 1))
    (batch,) = ImageSet(tmp_path, split="train", mode="RGB").batches(2)
    assert torch.equal(batch.image, torch.full((2, 3, 8, 8), 40, dtype=torch.uint8))


def test_the_summary(tmp_path):
    save(tmp_path / "train", *(f"class{i:02d}/0.png" for i in range(12)))
    names = ", ".join(f"class{i:02d}" for i in range(10))
    source = ImageSet(tmp_path, split="train").source
    assert source.summary() == f"{tmp_path}, split 'train': 12 images, 12 classes: {names}, …"
