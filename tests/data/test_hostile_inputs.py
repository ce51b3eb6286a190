"""Damaged, lying and unusual inputs: one line each, which names the file and what to do, from every reader that meets them."""

import io
import os
import struct
import zipfile
import zlib
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from calib_guidance.data import ImageData, ImageSet, SampleRequests
from calib_guidance.errors import ConfigurationError
from tests.image_files import picture, pictures, png

CPU = SimpleNamespace(root_device=torch.device("cpu"))


def table(path, **columns):
    pq.write_table(pa.table(columns), path)


def encoded(count=4):
    return [png(image) for image in pictures(count)[0]]


def npz(path, header=None, arr_0=None, **arrays):
    """An .npz whose arr_0 has a header of one's own before 192 bytes of pixels."""
    with zipfile.ZipFile(path, "w") as archive:
        if header is not None:
            text = header.encode().ljust(117) + b"\n"
            archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(192))
        for name, array in ({} if arr_0 is None else {"arr_0": arr_0}) | arrays:
            np.save(file := io.BytesIO(), array)
            archive.writestr(f"{name}.npy", file.getvalue())


def shape(*sizes):
    return f"{{'descr': '|u1', 'fortran_order': False, 'shape': {sizes}, }}"


def thin(path, width=50_000_000):
    """A PNG of 1 × 50,000,000 pixels, written by hand: 50 kB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, 1, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1 + width))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def folder(root, save, name="b.png"):
    """A class folder of a good image and of one that ``save`` writes."""
    (root / "train/a").mkdir(parents=True)
    picture(pictures(1)[0][0]).save(root / "train/a/a.png")
    save(root / "train/a" / name)


def saved(root, **damage):
    datasets.Dataset.from_dict({"image": encoded(), "label": [0, 1, 2, 3]}).save_to_disk(root / "saved")
    for name, content in damage.items():
        next((root / "saved").glob(name.replace("_", "*"))).write_bytes(content)


# What is written; then the source in it, options, and what the message says.
CASES = {
    "parquet of text": (
        lambda root: table(root / "x.parquet", text=["a", "b"]),
        ("x.parquet", {}, r"which column holds the images is not clear, the columns are: text\. Name it with "),
    ),
    "parquet with an unknown image column": (
        lambda root: table(root / "x.parquet", image=encoded()),
        ("x.parquet", {"image_column": "img"}, r"'img' is not there; the columns that fit are: image"),
    ),
    "parquet of pixels in lists": (
        lambda root: table(root / "x.parquet", image=[[0, 1, 2]] * 4),
        ("x.parquet", {"image_column": "image"}, r"'image' holds List.*; the columns that fit are: none"),
    ),
    "parquet of paths": (
        lambda root: table(root / "x.parquet", image=["a.png"] * 4),
        ("x.parquet", {}, "which column holds the images is not clear"),
    ),
    **{
        f"labels of type {kind}": (
            lambda root, labels=labels: table(root / "x.parquet", image=encoded(), label=labels),
            ("x.parquet", {"label_column": "label"}, r"'label' holds .*; the columns that fit are: none"),
        )
        for kind, labels in {
            "text": list("abcd"),
            "float": [0.0, 1, 2, 3],
            "list": [[0]] * 4,
            "bool": [True] * 4,
        }.items()
    },
    "files of several schemas": (
        lambda root: [
            table(root / "a.parquet", image=encoded(), label=[0, 1, 2, 3]),
            table(root / "b.parquet", picture=encoded(), text=list("abcd")),
        ],
        ("*.parquet", {}, r"b\.parquet.*other columns"),
    ),
    "no parquet": (
        lambda root: (root / "x.parquet").write_bytes(b"{}"),
        ("x.parquet", {}, r"x\.parquet.* cannot be read as parquet"),
    ),
    "truncated parquet": (
        lambda root: [
            table(root / "x.parquet", image=encoded(40)),
            (root / "x.parquet").write_bytes((root / "x.parquet").read_bytes()[:-3000]),
        ],
        ("x.parquet", {}, r"x\.parquet.* cannot be read as parquet"),
    ),
    "no arrow": (
        lambda root: (root / "x.arrow").write_bytes(b"no arrow"),
        ("x.arrow", {}, r"x\.arrow.* cannot be read"),
    ),
    "damaged save_to_disk": (
        lambda root: saved(root, state_json=b"{"),
        ("saved", {}, r"saved cannot be read .*save_to_disk"),
    ),
    "save_to_disk without its data": (
        lambda root: saved(root, **{"data-_arrow": b""}),
        ("saved", {}, r"saved cannot be read .*save_to_disk"),
    ),
    "npz of 2**60 images": (
        lambda root: npz(root / "x.npz", shape(2**60, 8, 8, 3)),
        ("x.npz", {}, r"x\.npz.*arr_0 says it holds .* bytes, and holds 192"),
    ),
    "npz of one image too many": (
        lambda root: npz(root / "x.npz", shape(2, 8, 8, 3)),
        ("x.npz", {}, r"x\.npz.*arr_0 says it holds 384 bytes, and holds 192"),
    ),
    "npz with bytes to spare": (
        lambda root: npz(root / "x.npz", shape(1, 4, 4, 3)),
        ("x.npz", {}, r"x\.npz.*arr_0 says it holds 48 bytes, and holds 192"),
    ),
    "npz of negative size": (
        lambda root: npz(root / "x.npz", shape(-1, 8, 8, 3)),
        ("x.npz", {}, r"x\.npz: arr_0.npy is not a numpy array: .*shape"),
    ),
    "npz of images without pixels": (
        lambda root: npz(root / "x.npz", shape(1, 0, 8, 3)),
        ("x.npz", {}, r"x\.npz: arr_0.npy is not a numpy array: .*shape"),
    ),
    "npz with a header that is not Python": (
        lambda root: npz(root / "x.npz", "{'descr': '|u1', __import__('os')"),
        ("x.npz", {}, r"x\.npz: arr_0.npy is not a numpy array"),
    ),
    "npz with a header of other keys": (
        lambda root: npz(root / "x.npz", "{'descr': '|u1', 'shape': (1, 8, 8, 3)}"),
        ("x.npz", {}, r"x\.npz: arr_0.npy is not a numpy array"),
    ),
    "npz with a type that is none": (
        lambda root: npz(root / "x.npz", shape(1, 8, 8, 3).replace("|u1", "|zz")),
        ("x.npz", {}, r"x\.npz: arr_0.npy is not a numpy array"),
    ),
    "npz that is not an archive": (
        lambda root: np.save(open(root / "x.npz", "wb"), np.zeros((1, 8, 8, 3), np.uint8)),  # noqa: SIM115
        ("x.npz", {}, r"x\.npz cannot be read as \.npz"),
    ),
    "an image of 1×50,000,000": (
        lambda root: folder(root, thin),
        ("train", {}, r"b\.png \(50,000,000×1 pixels.*crop it\)"),
    ),
    "a FIFO": (
        lambda root: folder(root, os.mkfifo),
        ("train", {}, r"b\.png \(not a file\)"),
    ),
    "an empty file": (lambda root: folder(root, lambda path: path.touch()), ("train", {}, r"b\.png \(not an image\)")),
    "32 bits": (
        lambda root: folder(root, Image.fromarray(np.zeros((8, 8), np.float32)).save, "b.tiff"),
        ("train", {}, r"b\.tiff \(32 bits a channel, mode F: save it with 8 or 16 bits\)"),
    ),
    "a name that is not UTF-8": (
        lambda root: folder(root, lambda path: path.touch(), os.fsdecode(b"\xff.png")),
        ("train", {}, r"\\udcff\.png \(not an image\)"),
    ),
    "a part of a split without an end": (
        lambda root: folder(root, lambda path: path.touch()),
        (".", {"split": "train[:90"}, r"'\[:90' is not a part of a split of 2 images; expected one such as \[:90%\]"),
    ),
    "a part of a split in words": (
        lambda root: folder(root, lambda path: path.touch()),
        (".", {"split": "train[half]"}, r"'\[half\]' is not a part of a split of 2 images"),
    ),
}


def one_line(error, message):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    text.encode()
    error.match(message)


@pytest.mark.parametrize("case", CASES)
def test_evaluate(tmp_path, case):
    write, (source, options, message) = CASES[case]
    write(tmp_path)
    with pytest.raises(ConfigurationError) as error:
        list(ImageSet(tmp_path / source, max_corrupt=0, **options).batches(2))
    one_line(error, message)


@pytest.mark.parametrize("case", [case for case in CASES if "npz" not in case])
def test_fit(tmp_path, case):
    write, (source, options, message) = CASES[case]
    write(tmp_path)
    split = options.get("split", "train")
    options = {name: value for name, value in options.items() if name != "split"}
    place, classes = (tmp_path, None) if source in ("train", ".") else (tmp_path / source, 4)
    data = ImageData(str(place), 8, train_split=split, val_split=split, num_classes=classes, max_corrupt=0, **options)
    data.trainer = SimpleNamespace(training=False, testing=False, global_rank=0, world_size=1, strategy=CPU)

    def validate():
        data.setup("validate")
        for batch in data.val_dataloader():
            data.on_before_batch_transfer(batch, 0)

    with pytest.raises(ConfigurationError) as error:
        validate()
    one_line(error, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n1\ntwo\n3\n", r"labels.txt, line 3: 'two' is not a class number from 0 to 4"),
        ("0\n1\n\n7\n2\n", r"labels.txt, line 4: '7' is not a class number from 0 to 4"),
        ("0\n-1\n1\n1\n", r"labels.txt, line 2: '-1' is not a class number"),
        ("0\n1.0\n2\n3\n", r"labels.txt, line 2: '1.0' is not a class number"),
        ("0\n²\n2\n3\n", r"labels.txt, line 2: '²' is not a class number"),
        ("0\n" + "9" * 5000 + "\n2\n3\n", r"labels.txt, line 2: '9{40}' is not a class number"),
        ("0\n1\n", r"labels.txt has 2 class numbers, data.num_samples is 4: write as many, one per line"),
        ("", r"labels.txt has 0 class numbers"),
        (b"0\n\xff\n1\n1\n", r"labels.txt is not UTF-8 text"),
    ],
)
def test_files_of_labels(tmp_path, text, message):
    (tmp_path / "labels.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError) as error:
        SampleRequests(num_samples=4, num_classes=5, labels=str(tmp_path / "labels.txt"))
    one_line(error, message)
