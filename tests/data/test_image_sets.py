"""Anybody's images: every form gives the same batches, and what is wrong with one is said."""

import logging
import struct
import tracemalloc
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image

from calib_guidance.data import ImageData
from calib_guidance.data.base import Row
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.data.preprocess import CONVERSIONS, UnreadableImageError, decode, image_size
from calib_guidance.errors import ConfigurationError
from tests.image_files import KINDS, picture, pictures, png, write


def read(images, batch_size=6, world_size=1):
    """All images ``(N, C, H, W)``, labels and indices, rank after rank."""
    batches = [batch for rank in range(world_size) for batch in images.batches(batch_size, rank, world_size)]
    return [torch.cat(column) for column in zip(*batches, strict=True)]


def channels_first(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("channels", [1, 3])
def test_every_form_gives_the_same_batches(tmp_path, channels):
    pixels, labels = pictures(25, channels)
    hashes = set()
    for kind in KINDS:
        images = ImageSet(write(tmp_path / kind, kind, pixels, labels))
        assert (images.num_images, images.image_shape) == (25, (channels, 8, 8)), kind
        batches = list(images.batches(6))
        assert [len(batch.image) for batch in batches] == [6, 6, 6, 6, 1], kind
        image, label, index = (torch.cat(column) for column in zip(*batches, strict=True))
        assert image.dtype == torch.uint8
        assert torch.equal(image, channels_first(pixels)), kind
        assert torch.equal(index, torch.arange(25)), kind
        known = kind != "image folder"
        assert images.labelled == known
        assert torch.equal(label, torch.from_numpy(labels) if known else torch.full((25,), -1)), kind
        hashes.add(images.sha256)
    assert len(hashes) == 1
    pixels[24, 7, 7, 0] ^= 1
    other = ImageSet(write(tmp_path / "other", "npz", pixels, labels))
    read(other)
    assert other.sha256 not in hashes | {None}


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_them_without_overlap_or_loss(tmp_path, kind):
    pixels, labels = pictures(25)
    source = write(tmp_path, kind, pixels, labels)
    complete = list(ImageSet(source).batches(4))
    for world_size in (2, 3, 9):
        shares = [list(ImageSet(source).batches(4, rank, world_size)) for rank in range(world_size)]
        for number, batch in enumerate(complete):  # batches are made of the same images, whichever process makes them
            mine = shares[number % world_size][number // world_size]
            assert all(torch.equal(one, other) for one, other in zip(batch, mine, strict=True))
        assert sum(map(len, shares)) == len(complete)


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    pixels, labels = pictures(10)
    rows = datasets.load_from_disk(str(write(tmp_path, "datasets folder", pixels, labels)))
    splits = datasets.DatasetDict(train=rows.select(range(4)), test=rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, streaming: splits)
    images = ImageSet("somebody/pictures", split="test")
    assert torch.equal(read(images)[0], channels_first(pixels))
    assert len(images.source.class_names) == 3
    assert images.provenance()["kind"] == "datasets id"
    assert ImageSet("somebody/pictures").num_images == 4  # train, where none is named
    with pytest.raises(ConfigurationError, match="has no split 'dev'; it has: train, test. Name a split with --split"):
        ImageSet("somebody/pictures", split="dev")


def test_a_run_says_its_rule_and_its_numbers(tmp_path):
    pixels, labels = pictures(25)
    run = write(tmp_path, "run folder", pixels, labels)
    assert ImageSet(run).provenance()["uint8_rule"] == "truncate"
    (run / "samples/00000007.parquet").unlink()
    with pytest.raises(ConfigurationError, match=r"not complete: 7 of 25 .*7–13 \(00000007.parquet is missing\)"):
        ImageSet(run)


def test_a_damaged_run(tmp_path):
    run = write(tmp_path, "run folder", *pictures(25))
    path = run / "samples/00000014.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match="00000014.parquet is not what was written.*Re-run predict"):
        read(ImageSet(run))
    (run / "run.json").unlink()
    with pytest.raises(ConfigurationError, match="run folder without its run.json"):
        ImageSet(run)


# Image folders


def test_folders_as_classes(tmp_path):
    pixels, _ = pictures(4)
    for folder, labels in (("0003 0010 0010 0003", [3, 3, 10, 10]), ("owl hen hen tit", [0, 0, 1, 2])):
        for number, name in enumerate(folder.split()):
            (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
            picture(pixels[number]).save(tmp_path / folder / name / f"{number}.png")
        assert read(ImageSet(tmp_path / folder))[1].tolist() == labels
        assert len(ImageSet(tmp_path / folder).source.class_names) == max(labels) + 1
    picture(pixels[0]).save(tmp_path / folder / "stray.png")
    assert not ImageSet(tmp_path / folder).labelled
    for number in (0, 999, 1000, 2500):  # EDM's generator
        (tmp_path / f"edm/{number // 1000 * 1000:06d}").mkdir(parents=True, exist_ok=True)
        picture(pixels[0]).save(tmp_path / f"edm/{number // 1000 * 1000:06d}/{number:06d}.png")
    assert not ImageSet(tmp_path / "edm").labelled


def test_folders_as_splits(tmp_path):
    pixels, labels = pictures(6)
    for split, part in (("train", slice(4)), ("val", slice(4, 6))):
        (write(tmp_path / split, "class folders", pixels[part], labels[part])).rename(tmp_path / "all")
        (tmp_path / split).rmdir()
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "all").rename(tmp_path / "data" / split)
    with pytest.raises(ConfigurationError, match="has several splits, train, val: name one with --split"):
        ImageSet(tmp_path / "data")
    assert ImageSet(tmp_path / "data", split="train").num_images == 4
    with pytest.raises(ConfigurationError, match="has no split .test.; it has: train, val. Name .* --split"):
        ImageSet(tmp_path / "data", split="test")


def test_forms_of_images(tmp_path):
    """What is lossless is read exactly; other files and hidden ones are passed over."""
    (pixels,) = pictures(1)[0]
    for ending in ("png", "webp", "bmp", "tiff", "PNG"):
        picture(pixels).save(tmp_path / f"image.{ending}", lossless=True)
    picture(pixels).save(tmp_path / "jpeg.jpeg", quality=100, subsampling=0)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._image.png").write_text("no image")
    found, _, _ = read(ImageSet(tmp_path))
    assert len(found) == 6
    exact = channels_first(pixels[None])[0]
    assert sum(torch.equal(image, exact) for image in found) == 5
    assert (found.int() - exact.int()).abs().max() <= 4  # JPEG


def test_empty(tmp_path):
    with pytest.raises(ConfigurationError, match="no images found in"):
        ImageSet(tmp_path)
    np.savez(tmp_path / "empty.npz", np.zeros((0, 8, 8, 3), np.uint8))
    with pytest.raises(ConfigurationError, match="no images found in .*empty.npz"):
        ImageSet(tmp_path / "empty.npz")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    with pytest.raises(ConfigurationError, match="no images found in .*empty.parquet"):
        ImageSet(tmp_path / "empty.parquet")
    with pytest.raises(ConfigurationError, match="neither a folder"):
        ImageSet(tmp_path / "nothing there")
    (tmp_path / "file.txt").touch()
    with pytest.raises(ConfigurationError, match="file.txt is neither a folder, nor"):
        ImageSet(tmp_path / "file.txt")


# Sizes and colors


@pytest.mark.parametrize("kind", ["image folder", "plain parquet"])
def test_mixed_sizes(tmp_path, kind):
    small, big = pictures(5)[0], pictures(3, size=16)[0]
    labels = np.zeros(8, int)
    source = write(tmp_path, kind, [*small, *big], labels)
    names = {
        "image folder": ("000000.png", "000005.png"),
        "plain parquet": ("split .train., row 0", "split .train., row 5"),
    }
    first, other = names[kind]
    with pytest.raises(ConfigurationError, match=rf"8×8 \(first {first}\) and 16×16 \(first {other}\). --size N"):
        read(ImageSet(source))
    images = ImageSet(source, size=8)
    found = read(images)[0]
    assert torch.equal(found[:5], channels_first(small))  # of that size already
    halved = big.reshape(3, 8, 2, 8, 2, 3).astype(float).mean((2, 4))
    assert abs(found[5:].numpy().transpose(0, 2, 3, 1) - halved).max() <= 1  # box, rounded along each axis
    assert images.provenance()["preprocessing"]["size"] == 8
    assert images.provenance()["preprocessing"]["how"].endswith("ADM")
    assert images.provenance()["decoder"].startswith("Pillow ")


def test_a_folder_of_mixed_sizes_is_found_before_it_is_read(tmp_path):
    source = write(tmp_path, "image folder", [*pictures(5)[0], *pictures(1, size=16)[0]], np.zeros(6, int))
    with pytest.raises(ConfigurationError, match="several sizes"):
        ImageSet(source)


def test_crops_against_their_definitions(tmp_path):
    """A picture whose middle square is known; ADM's order of operations, and EDM's."""
    wide = np.random.default_rng(1).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    source = write(tmp_path, "image folder", [wide], np.zeros(1, int))
    box = Image.fromarray(wide).resize((45, 20), Image.Resampling.BOX)
    bicubic = box.resize((27, 12), Image.Resampling.BICUBIC)
    expected = np.asarray(bicubic)[:, 7:19]
    assert np.array_equal(read(ImageSet(source, size=12))[0][0].permute(1, 2, 0).numpy(), expected)
    expected = np.asarray(Image.fromarray(wide[:, 25:65]).resize((12, 12), Image.Resampling.LANCZOS))
    found = ImageSet(source, size=12, resize="lanczos")
    assert np.array_equal(read(found)[0][0].permute(1, 2, 0).numpy(), expected)
    assert "conversions" in found.provenance()
    larger = ImageSet(source, size=64)
    read(larger)
    assert larger.provenance()["conversions"] == {"enlarged to the size": 1}


def test_gray_and_color(tmp_path):
    gray, color = pictures(3, 1)[0], pictures(2, 3)[0]
    source = write(tmp_path, "image folder", [*gray, *color], np.zeros(5, int))
    with pytest.raises(
        ConfigurationError, match=r"gray images \(first 000000.png\) and color images \(first 000003.png\)"
    ):
        read(ImageSet(source))
    images = ImageSet(source, mode="RGB")
    found = read(images)[0]
    assert torch.equal(found[:3], channels_first(gray).expand(-1, 3, -1, -1))
    assert torch.equal(found[3:], channels_first(color))
    assert images.provenance()["conversions"] == {"gray to RGB": 3}
    assert images.notes == ["3 of 5 images: gray to RGB"]
    images = ImageSet(source, mode="L")
    assert read(images)[0].shape == (5, 1, 8, 8)
    assert images.provenance()["conversions"] == {"RGB to gray": 2}


def test_alpha(tmp_path):
    """Opaque, transparent, gray with alpha and a palette with a transparent color: dropped as PIL's convert does, counted."""
    (pixels,) = pictures(1)[0]
    for name, alpha in (("a", 255), ("b", 7)):
        Image.fromarray(np.dstack([pixels, np.full((8, 8), alpha, np.uint8)])).save(tmp_path / f"{name}.png")
    palette = Image.fromarray(pixels).quantize(16)
    palette.save(tmp_path / "c.png", transparency=3)
    palette.save(tmp_path / "d.png")
    images = ImageSet(tmp_path)
    found = read(images)[0]
    for place in (0, 1):
        assert torch.equal(found[place], channels_first(pixels[None])[0])
    for place in (2, 3):
        assert torch.equal(found[place], channels_first(np.asarray(palette.convert("RGB"))[None])[0])
    assert list(images.provenance()["conversions"].items()) == [
        ("alpha channel dropped, all of it opaque", 1),
        ("alpha channel dropped of transparent images: the colors beneath count, as in torch-fidelity", 2),
        ("palette, CMYK and others to RGB", 1),
    ]
    list(images.batches(2))  # read again, they count once
    assert images.provenance()["conversions"]["alpha channel dropped, all of it opaque"] == 1
    rgba = np.dstack([pixels, np.full((8, 8), 255, np.uint8)])[None]
    np.savez(tmp_path / "rgba.npz", rgba)
    assert torch.equal(read(ImageSet(tmp_path / "rgba.npz"))[0], channels_first(pixels[None]))


def test_more_than_8_bits(tmp_path):
    """16 bits are divided by 257, so that 0 and 65535 become 0 and 255; what has no known range is refused."""
    deep = np.array([[0, 128, 129, 257 * 100, 65535 - 129, 65535 - 128, 65535, 300]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    images = ImageSet(tmp_path)
    assert read(images)[0].flatten().tolist() == [0, 0, 1, 100, 254, 255, 255, 1]
    assert images.provenance()["conversions"] == {"16 bits to 8, divided by 257": 1}
    Image.fromarray(np.zeros((1, 8), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(
        ConfigurationError, match=r"float.tiff \(32 bits a channel, mode F: save it with 8 or 16 bits\)"
    ):
        read(ImageSet(tmp_path))


def png16(pixels):
    """A PNG of 16 bits a channel, uint16 (H, W, C), written by hand: Pillow writes none of color."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_of_every_kind_are_rounded(channels):
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, channels)).astype(np.uint16)
    found, done = decode(png16(pixels))
    colors = channels - (channels % 2 == 0)
    assert np.array_equal(np.atleast_3d(np.asarray(found)), np.rint(pixels[..., :colors] / 257))
    assert "16 bits to 8, divided by 257" in [name for bit, name in enumerate(CONVERSIONS) if done >> bit & 1]
    with pytest.raises(UnreadableImageError):
        decode(png16(pixels)[:70])


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_the_orientation_of_exif_is_ignored(tmp_path, form):
    """Also by TIFF files, which Pillow turns."""
    pixels = pictures(1)[0][0][:5]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        path = tmp_path / f"{orientation}.{form.lower()}"
        picture(pixels).save(path, exif=exif, **({} if form == "JPEG" else {"lossless": True}))
        assert image_size(Row("", path)) == (5, 8)
        assert np.asarray(decode(path.read_bytes())[0]).shape == (5, 8, 3)
    images = ImageSet(tmp_path)
    found = read(images)[0]
    if form != "JPEG":
        assert torch.equal(found, channels_first(pixels[None]).expand(8, -1, -1, -1))
    assert images.notes == ["7 of 8 images: orientation of EXIF ignored"]


@pytest.mark.parametrize("form", ["gif", "png", "webp", "tiff"])
def test_of_several_frames_the_first_is_read_and_said_to_be(tmp_path, form):
    one, two = (picture(pixels) for pixels in pictures(2)[0])
    (tmp_path / "train/a").mkdir(parents=True)
    one.save(tmp_path / f"train/a/x.{form}", save_all=True, append_images=[two], lossless=True)
    one.save(tmp_path / f"train/a/y.{form}", lossless=True)
    images = ImageSet(tmp_path / "train")
    found = read(images)[0]
    assert torch.equal(found[0], found[1])
    assert "1 of 2 images: the first of several frames or pages" in images.notes
    data = ImageData(str(tmp_path), 8, train_split="train", val_split="train")
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert batch["note"] == [f"a/x.{form}: of its several frames or pages, only the first is read"]


# What cannot be read


@pytest.mark.parametrize("kind", ["image folder", "plain parquet", "datasets folder"])
def test_corrupt_images_are_named_and_counted(tmp_path, kind, caplog):
    pixels, labels = pictures(20)
    pixels = list(pixels)
    pixels[3], pixels[11] = png(pixels[3])[:90], b"no image"
    source = write(tmp_path, kind, pixels, labels)
    names = {
        "image folder": ("000003.png", "000011.png"),
        "plain parquet": ("split 'train', row 3", "split 'train', row 11"),
        "datasets folder": ("split 'train', row 3", "split 'train', row 11"),
    }[kind]
    images = ImageSet(source, max_corrupt=0.1)
    with caplog.at_level(logging.WARNING):
        _, label, index = read(images)
    assert index.tolist() == [i for i in range(20) if i not in (3, 11)]
    assert label.tolist() == ([-1] * 18 if kind == "image folder" else labels[index].tolist())
    assert [problem.partition(" (")[0] for problem in images.skipped] == list(names)
    assert images.skipped[1] == f"{names[1]} (not an image)"
    assert all(f"skipped a corrupt image: {name} (" in caplog.text for name in names)
    found = images.provenance()
    assert (found["num_images"], found["num_skipped"]) == (20, 2)
    assert found["sha256"] is not None
    assert images.notes[0].startswith(f"2 of 20 images were skipped: {names[0]}")
    with pytest.raises(
        ConfigurationError, match=r"2 of 20 images are corrupt, more than --max-corrupt \(0.01\)"
    ) as error:
        read(ImageSet(source))
    assert all(name in str(error.value) for name in names)


def test_the_first_images_may_be_corrupt(tmp_path):
    pixels, labels = pictures(6)
    source = write(tmp_path, "image folder", [b"", *pixels[1:]], labels)
    assert read(ImageSet(source, max_corrupt=0.5))[2].tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(ConfigurationError, match="1 of 6 images are corrupt"):
        ImageSet(source)
    source = write(tmp_path / "all", "image folder", [b"1", b"2"], labels[:2])
    with pytest.raises(ConfigurationError, match="no image can be read: 000000.png .not an image., 000001.png"):
        ImageSet(source, max_corrupt=1)


# .npz


WRONG = {
    "no arr_0": ({"x": np.zeros((2, 8, 8, 3), np.uint8)}, "has no arr_0, it has: x"),
    "floats": (
        {"arr_0": np.zeros((2, 8, 8, 3))},
        "arr_0 is float64 .2, 8, 8, 3., images are uint8 .*by the rule of its model",
    ),
    "channels first": ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, "images.transpose.0, 2, 3, 1."),
    "no channel": ({"arr_0": np.zeros((2, 8, 8), np.uint8)}, r"add the channel: images\[..., None\]"),
    "two channels": ({"arr_0": np.zeros((2, 8, 8, 2), np.uint8)}, "C = 1 or 3: reshape it"),
    "pickled": ({"arr_0": np.array([{}, {}], dtype=object)}, "pickled objects are not loaded"),
    "Fortran": ({"arr_0": np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8))}, "numpy.ascontiguousarray"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_npz_of_something_else(tmp_path, wrong):
    arrays, message = WRONG[wrong]
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(ConfigurationError, match=message):
        ImageSet(tmp_path / "images.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_npz(tmp_path, compressed):
    pixels, labels = pictures(25, size=16)
    path = write(tmp_path, "compressed npz" if compressed else "npz", pixels, labels)
    complete = path.read_bytes()
    data = bytearray(complete)
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match="images.npz is damaged"):
        read(ImageSet(path))
    with pytest.raises(ConfigurationError, match="images.npz is damaged"):  # by the one who reads the end
        read(ImageSet(path), world_size=3)
    path.write_bytes(complete[:-100])
    with pytest.raises(ConfigurationError, match="cannot be read as .npz"):
        ImageSet(path)


def test_npz_whose_second_array_is_not_labels(tmp_path, caplog):
    np.savez(tmp_path / "images.npz", pictures(4)[0], np.zeros((4, 10)))
    images = ImageSet(tmp_path / "images.npz")
    assert not images.labelled
    assert "arr_1 is float64 (4, 10), no class for each of 4 images" in caplog.text


def test_memory_is_bounded(tmp_path):
    """Ten times the images in an .npz do not take more memory: peak of Python's and numpy's allocations."""
    peaks = []
    for count in (100, 1000):
        np.savez_compressed(tmp_path / f"{count}.npz", np.zeros((count, 64, 64, 3), np.uint8))
        tracemalloc.start()
        for _ in ImageSet(tmp_path / f"{count}.npz").batches(10):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < 1000 * 64 * 64 * 3 / 4


# Tables


def test_columns_are_found_or_named(tmp_path):
    pixels, _ = pictures(4)
    data = [png(image) for image in pixels]
    other = [png(255 - image) for image in pixels]
    table = pa.table({"before": data, "after": other, "number": [4, 3, 2, 1], "text": list("abcd")})
    pq.write_table(table, path := tmp_path / "pairs.parquet")
    with pytest.raises(
        ConfigurationError, match="not clear, the columns are: before, after, number, text. .*--image-column"
    ):
        ImageSet(path)
    images = ImageSet(path, image_column="after", label_column="number")
    image, label, _ = read(images)
    assert torch.equal(image, 255 - channels_first(pixels))
    assert label.tolist() == [4, 3, 2, 1]
    for options, message in (
        (
            {"image_column": "number"},
            "--image-column 'number' holds Value.'int64'.; the columns that fit are: before, after",
        ),
        ({"image_column": "after", "label_column": "class"}, "--label-column 'class' is not there; .* fit are: number"),
        (
            {"image_column": "after", "subset": "x"},
            "--subset has no meaning for .*pairs.parquet, which is of the kind parquet",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            ImageSet(path, **options)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigurationError, match="cannot be read as parquet"):
        ImageSet(tmp_path / "broken.parquet")


def test_splits_of_parquet(tmp_path):
    pixels, labels = pictures(10)
    for split, part in (("train", slice(6)), ("validation", slice(6, 10))):
        write(tmp_path / split, "parquet", pixels[part], labels[part])
        for path in (tmp_path / split).iterdir():
            (tmp_path / "data").mkdir(exist_ok=True)
            path.rename(tmp_path / "data" / path.name.replace("train", split))
    with pytest.raises(ConfigurationError, match="has several splits, train, validation: name one with --split"):
        ImageSet(tmp_path / "data")
    for source in (tmp_path / "data", tmp_path / "data" / "{split}-*.parquet"):
        assert torch.equal(read(ImageSet(source, split="validation"))[0], channels_first(pixels[6:]))
    with pytest.raises(
        ConfigurationError, match="has no split .test.; it has: train, validation. Name a split with --split"
    ):
        ImageSet(tmp_path / "data", split="test")
    with pytest.raises(ConfigurationError, match="no files match"):
        ImageSet(tmp_path / "data" / "test-*.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "nearest"}, "--resize: unknown 'nearest'; known: adm, lanczos"),
        ({"mode": "CMYK"}, "--mode: unknown 'CMYK'; known: RGB, L"),
        ({"size": 0}, "--size must be 1 or more, got 0"),
        ({"max_corrupt": 5}, "--max-corrupt must be in .0, 1., got 5"),
        ({"split": "train"}, "--split has no meaning for .*images.npz, which is of the kind npz"),
    ],
)
def test_options_without_meaning(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(write(tmp_path, "npz", *pictures(3)), **options)
