"""The same images written in every form that is read, each by the library whose form it is."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from calib_guidance.evaluation.features import FeatureExtractor, Features
from calib_guidance.runs import RunFolder

NUM_CLASSES = 3
KINDS = (
    "run folder",
    "npz",
    "compressed npz",
    "image folder",
    "class folders",
    "parquet",
    "plain parquet",
    "datasets folder",
    "arrow",
)


def pictures(count, channels=3, size=8, seed=0):
    """uint8 ``(count, size, size, channels)`` and labels, in order of label."""
    images = np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    return images, np.sort(np.arange(count) % NUM_CLASSES)


def picture(pixels):
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def png(pixels):
    """What stands in a file; bytes are left as they are."""
    if isinstance(pixels, bytes):
        return pixels
    buffer = io.BytesIO()
    picture(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write(folder, kind, images, labels, **identity):
    """The images in a form; gives what is to be read."""
    folder.mkdir(exist_ok=True, parents=True)
    encoded = [{"bytes": png(image), "path": None} for image in images]
    names = [f"class {number}" for number in range(NUM_CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"image": encoded, "label": labels.tolist()}, features)
    if kind == "run folder":
        run = RunFolder(folder / "run", 7, len(images))
        run.begin({"seed": 0, "uint8_rule": "truncate"} | identity, {})
        for shard in run.shards():
            assert run.claims.acquire(shard)
            columns = {"index": list(shard), "label": labels[shard.start : shard.stop].tolist()}
            run.write(shard, pa.Table.from_pydict(columns | {"image": encoded[shard.start : shard.stop]}))
        return folder / "run"
    if kind in ("npz", "compressed npz"):
        save = np.savez if kind == "npz" else np.savez_compressed
        save(folder / "images.npz", images, labels)
        return folder / "images.npz"
    if kind in ("image folder", "class folders"):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / "images" / (f"class {label}" if kind == "class folders" else "")
            place.mkdir(exist_ok=True, parents=True)
            (place / f"{number:06d}.png").write_bytes(png(image))
        return folder / "images"
    if kind == "parquet":
        half = len(images) // 2
        rows.select(range(half)).to_parquet(folder / "train-00000-of-00002.parquet", batch_size=5)
        rows.select(range(half, len(images))).to_parquet(folder / "train-00001-of-00002.parquet")
        return folder
    if kind == "plain parquet":
        columns = {"picture": [image["bytes"] for image in encoded], "label": labels}
        pq.write_table(pa.table(columns), folder / "images.parquet", row_group_size=9)
        return folder / "images.parquet"
    if kind == "datasets folder":
        rows.save_to_disk(folder / "saved")
        return folder / "saved"
    with pa.OSFile(str(folder / "images.arrow"), "wb") as file:
        table = rows.data.table
        with pa.ipc.new_stream(file, rows.features.arrow_schema) as writer:
            writer.write_table(table)
    return folder / "images.arrow"


class Projection(FeatureExtractor):
    """Sixteen random projections of pixels, far from zero; six "spatial" ones; and three logits."""

    name = "random projection"
    width, spatial_width, num_logits = 16, 6, 3

    def __init__(self, seed=0, pixels=8 * 8 * 3):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(pixels, 25, generator=torch.Generator().manual_seed(seed)))

    def forward(self, images):
        found = images.flatten(1).float() / 255 @ self.weight + 100
        return Features(found[:, :16], found[:, 16:22], found[:, 22:])
