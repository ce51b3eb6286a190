import contextlib
import io
import logging
import shutil

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.transforms import v2

from calib_guidance.data import ImageData
from calib_guidance.errors import ConfigurationError

WNIDS = ["n01440764", "n01484850", "n02123045"]  # 0, 2 and 281 of torchvision's classes
NUMBERS = [0, 2, 281]
PER_CLASS = {"train": 6, "val": 2}


def picture(number):
    """Noise of a size, mode and format of its own."""
    rng = np.random.default_rng(number)
    noise = rng.integers(0, 256, (20 + number % 5, 17 + number % 7, 3), dtype=np.uint8)
    mode = ("RGB", "L", "CMYK", "P", "RGBA")[number % 5]
    return Image.fromarray(noise).convert(mode), "JPEG" if mode in ("RGB", "L", "CMYK") else "PNG"


def encoded(number):
    image, form = picture(number)
    image.save(file := io.BytesIO(), form)
    return file.getvalue()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    patch.undo()


@pytest.fixture(scope="session")
def shipped_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    number = 0
    for split, count in PER_CLASS.items():
        for wnid in WNIDS:
            (root / split / wnid).mkdir(parents=True)
            for _ in range(count):
                suffix = picture(number)[1].lower()
                (root / split / wnid / f"{number}.{suffix}").write_bytes(encoded(number))
                number += 1
    return root


@pytest.fixture
def folder(shipped_folder, tmp_path):
    return shutil.copytree(shipped_folder, tmp_path / "images")


def table(count, start=0, **columns):
    """Row i has label i mod 3 and is the picture start + i."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=WNIDS)}
    features.update({name: datasets.Value("int64") for name in columns})
    images = [{"bytes": encoded(start + i), "path": f"{start + i}.png"} for i in range(count)]
    columns = {"image": images, "label": [i % 3 for i in range(count)], **columns}
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    """Four files of 6 rows to train on, one of 5 to validate on."""
    root = tmp_path_factory.mktemp("parquet")
    rows = table(24, number=list(range(100, 124)), step=[i * 3 for i in range(24)])
    for part in range(4):
        rows.select(range(part * 6, part * 6 + 6)).to_parquet(root / f"train-{part}.parquet")
    table(5, 50, number=list(range(5)), step=[0] * 5).to_parquet(root / "validation-0.parquet")
    return root


def opened(source, **options):
    data = ImageData(str(source), **{"image_size": 8, "batch_size": 4, "seed": 0, **options})
    data.setup("fit")
    return data


def epoch(data, number=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def joined(batches, key):
    return torch.cat([batch[key] for batch in batches])


def test_a_folder_gives_images_in_range_with_torchvision_s_labels(folder):
    data = opened(folder, classes="imagenet")
    assert (data.num_classes, data.image_shape, data.class_names[281]) == (1000, (3, 8, 8), "tabby")
    train, heldout = epoch(data), list(data.val_dataloader())
    assert len(train) == 18 // 4
    images = joined(train + heldout, "image")
    assert images.shape[1:] == (3, 8, 8)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < -0.3
    assert 0.3 < images.max() <= 1
    assert joined(heldout, "label").tolist() == [number for number in NUMBERS for _ in range(2)]
    assert joined(heldout, "index").tolist() == list(range(6))
    assert "t" not in train[0]
    by_index = dict(zip(joined(train, "index").tolist(), joined(train, "label").tolist(), strict=True))
    assert all(label == NUMBERS[index // 6] for index, label in by_index.items())


def test_without_names_of_imagenet_labels_keep_the_training_split_s_numbers(folder):
    shutil.rmtree(folder / "val" / WNIDS[1])
    data = opened(folder)
    assert data.class_names == WNIDS
    assert joined(list(data.val_dataloader()), "label").tolist() == [0, 0, 2, 2]


def test_held_out_images_are_the_resized_middle(tmp_path):
    for split in ("train", "validation"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            image = np.zeros((16, 32, 3), dtype=np.uint8)
            image[:, 8:24] = (0, 51, 255)
            Image.fromarray(image).save(tmp_path / split / name / "x.png")
    data = opened(tmp_path, batch_size=2)
    batch = next(iter(data.val_dataloader()))
    inner = batch["image"][:, :, :, 1:-1]
    assert torch.allclose(inner, torch.tensor([-1.0, -0.6, 1.0]).view(3, 1, 1).expand_as(inner), atol=2 / 255)


@pytest.mark.parametrize("source", ["{}", "{}/{{split}}-*.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_by_folder_and_by_pattern(parquet, source, streaming):
    options = {"streaming": True, "samples_per_epoch": 24} if streaming else {}
    data = opened(source.format(parquet), index_column="number", time_column="step", **options)
    train = epoch(data)
    assert sorted(joined(train, "index").tolist()) == list(range(100, 124))
    assert torch.equal(joined(train, "t"), (joined(train, "index") - 100) * 3)
    assert torch.equal(joined(train, "label"), (joined(train, "index") - 100) % 3)
    assert joined(list(data.val_dataloader()), "index").tolist() == list(range(5))
    assert joined(epoch(data, 1), "index").tolist() != joined(train, "index").tolist()


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote(tmp_path, streaming):
    datasets.DatasetDict(train=table(12), validation=table(5, 50)).save_to_disk(tmp_path)
    data = opened(tmp_path, streaming=streaming, classes="imagenet")
    assert sorted(joined(epoch(data), "label").tolist()) == [0] * 4 + [2] * 4 + [281] * 4
    assert sorted(joined(list(data.val_dataloader()), "label").tolist()) == [0, 0, 2, 2, 281]


def test_arrow_files_and_a_part_of_a_split(tmp_path):
    table(12).save_to_disk(tmp_path / "rows")
    data = opened(tmp_path / "rows" / "*.arrow", train_split="train[:8]", val_split="train[8:]")
    assert sorted(joined(epoch(data), "index").tolist()) == list(range(8))
    assert len(data.val_dataloader().dataset) == 4


def test_a_streamed_folder_is_that_folder(folder):
    data, streamed = opened(folder), opened(folder, streaming=True)
    train = epoch(streamed)
    assert len(set(joined(train, "index").tolist())) == 16
    assert len(set(train[0]["label"].tolist())) > 1
    complete, stream = list(data.val_dataloader()), list(streamed.val_dataloader())
    images = joined(stream, "image")[data._data["val"].source.mixed().argsort()]  # any beginning has every class
    assert torch.equal(joined(complete, "image"), images)
    assert set(stream[0]["label"].tolist()) == {0, 1, 2}
    assert joined(stream, "index").min() >= 0
    # A hash of the file: the same in the next epoch.
    assert len({*joined(train, "index").tolist(), *joined(epoch(streamed, 1), "index").tolist()}) <= 18


def test_gray_images(folder):
    data = opened(folder, channels=1)
    assert data.image_shape == (1, 8, 8)
    assert epoch(data)[0]["image"].shape == (4, 1, 8, 8)


def test_crops_depend_on_seed_epoch_and_index_alone(folder):
    def crops(number=0, **options):
        train = epoch(opened(folder, **options), number)
        return dict(zip(joined(train, "index").tolist(), joined(train, "image"), strict=True))

    expected = crops(batch_size=9)
    torch.manual_seed(5)
    others = crops(batch_size=3, num_workers=2)
    assert expected.keys() == others.keys()
    assert all(torch.equal(expected[index], others[index]) for index in expected)
    for different in (crops(1, batch_size=9), crops(batch_size=9, seed=1)):
        assert not any(torch.equal(expected[index], different[index]) for index in expected)


def test_the_seed_is_that_of_seed_everything(folder):
    L.seed_everything(4, verbose=False)
    assert ImageData(str(folder), 8).seed == 4


def test_another_transform(folder):
    data = opened(folder, train_transform=v2.Resize((8, 8)))
    assert torch.equal(
        joined(epoch(data), "image").sum(0).sort().values, joined(epoch(data), "image").sum(0).sort().values
    )
    for transform, made in (
        (v2.Resize((8, 9)), r"torch.uint8 of shape \(3, 8, 9\)"),
        (v2.ToDtype(torch.float32), "float32"),
    ):
        with pytest.raises(
            ConfigurationError, match=rf"train_transform has to make 8-bit images of shape \(3, 8, 8\).*{made}"
        ):
            opened(folder, train_transform=transform)


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_images_come_as_often_as_asked_with_indices_of_their_own(parquet, streaming):
    data = opened(parquet, heldout_draws=3, streaming=streaming, samples_per_epoch=24 if streaming else None)
    batches = list(data.val_dataloader())
    assert len(set(joined(batches, "index").tolist())) == 15
    images = joined(batches, "image")
    assert torch.equal(images[:5], images[5:10])
    if not streaming:
        assert joined(batches, "index").tolist() == list(range(15))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_killed_run_sees_the_rest_of_its_epoch_once_and_the_same(parquet, streaming, number, num_workers, tmp_path):
    options = {"streaming": True, "samples_per_epoch": 24, "shuffle_buffer": 5} if streaming else {}
    options |= {"index_column": "number", "batch_size": 3, "num_workers": num_workers}
    complete = epoch(opened(parquet, **options), number)
    assert sorted(joined(complete, "index").tolist()) == list(range(100, 124))
    first = opened(parquet, **options).train_dataloader()
    first.sampler.set_epoch(number)
    iterator = iter(first)
    taken = [next(iterator) for _ in range(5)]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = opened(parquet, **options).train_dataloader()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.sampler.set_epoch(number)
    rest = list(second)
    assert torch.equal(joined(taken + rest, "index"), joined(complete, "index"))
    assert torch.equal(joined(taken + rest, "image"), joined(complete, "image"))


def test_a_stream_goes_round_until_the_epoch_is_full_and_is_resumed_there(parquet):
    options = {"streaming": True, "samples_per_epoch": 40, "index_column": "number", "shuffle_buffer": 7}
    complete = epoch(opened(parquet, **options))
    numbers = joined(complete, "index").tolist()
    assert len(numbers) == 40
    assert sorted(numbers[:24]) == list(range(100, 124))
    first = opened(parquet, **options).train_dataloader()
    iterator = iter(first)
    taken = [next(iterator) for _ in range(8)]
    second = opened(parquet, **options).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert torch.equal(joined(taken + list(second), "image"), joined(complete, "image"))


def test_devices_share_a_stream(parquet, monkeypatch):
    for world in (2, 3):
        shares = []
        for rank in range(world):
            monkeypatch.setattr(ImageData, "place", (rank, world))
            data = opened(parquet, streaming=True, samples_per_epoch=24, index_column="number", batch_size=2)
            shares.append((joined(epoch(data, 1), "index").tolist(), list(data.val_dataloader())))
        assert sorted(number for train, _ in shares for number in train) == list(range(100, 124))
        heldout = [batch for _, batches in shares for batch in batches]
        assert sorted(joined(heldout, "index").tolist()) == list(range(5))


def test_every_device_validates_at_least_one_image(folder, monkeypatch):
    """A device without a batch skips validation, where the others wait for it."""
    for rank in range(6):
        monkeypatch.setattr(ImageData, "place", (rank, 6))
        (batch,) = opened(folder).val_dataloader()
        assert batch["index"].tolist() == [rank]
    monkeypatch.setattr(ImageData, "place", (0, 7))
    with pytest.raises(ConfigurationError, match=r"6 images for 7 devices.* at most 6"):
        opened(folder).val_dataloader()


class Recorder(L.LightningModule):
    """Trains nothing and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained += batch["index"].tolist()
        assert set(batch) == {"image", "label", "index"}
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["index"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, root, ckpt_path=None, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **options,
    )
    trainer.fit(module := Recorder(), data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_images_are_skipped_and_named(folder, tmp_path, caplog, num_workers):
    files = sorted((folder / "train").rglob("*.jpeg"))
    files[0].write_bytes(b"no image")
    files[1].write_bytes(files[1].read_bytes()[:300])
    options = {"image_size": 8, "batch_size": 4, "num_workers": num_workers}
    data = ImageData(str(folder), **options, max_corrupt=0.2)
    with caplog.at_level(logging.WARNING):
        module = fit(data, tmp_path, max_epochs=3)
    assert len(set(module.trained)) == 16
    assert set(module.validated) == set(range(6))
    for file in files[:2]:
        name = file.relative_to(folder / "train")
        assert sum(f"skipped a corrupt image: {name}" in record.message for record in caplog.records) == 1
    assert any("split 'train': 2 corrupt images were skipped" in record.message for record in caplog.records)
    with pytest.raises(ConfigurationError, match=r"2 of 18 images are corrupt, more than data.max_corrupt \(0.05\)"):
        fit(ImageData(str(folder), **options, max_corrupt=0.05), tmp_path, max_epochs=3)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_where_nothing_can_be_read(folder, tmp_path, caplog, num_workers, streaming):
    """Two of three classes are corrupt: complete batches of them, while training and at every place of the validation."""
    for split in ("train", "val"):
        for file in [*(folder / split / WNIDS[0]).iterdir(), *(folder / split / WNIDS[2]).iterdir()]:
            file.write_bytes(b"no image")
    data = ImageData(
        str(folder), 8, batch_size=2, num_workers=num_workers, max_corrupt=0.7, streaming=streaming, shuffle_buffer=1
    )
    with caplog.at_level(logging.WARNING):
        module = fit(data, tmp_path, max_epochs=2, num_sanity_val_steps=0)
    assert len(module.trained) == 2 * 18
    assert len(set(module.validated)) == 2
    assert len(module.validated) == 4
    assert "split 'train': 12 corrupt images were skipped" in caplog.text
    assert "split 'validation': 4 corrupt images were skipped" in caplog.text


def test_a_file_that_is_gone_is_corrupt_and_so_is_a_row_without_an_image(folder, tmp_path):
    data = ImageData(str(folder), image_size=8, batch_size=18, max_corrupt=0)
    data.prepare_data()
    data.setup("fit")
    (gone := next((folder / "train" / WNIDS[0]).iterdir())).unlink()
    batch = next(iter(data.train_dataloader()))
    assert batch["corrupt"] == [f"{gone.relative_to(folder / 'train')} (No such file or directory)"]
    assert len(batch["index"]) == 18  # another image stands in for it
    rows = table(6).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[2]["image"] = None
    rows = datasets.Dataset.from_list(rows, table(1).features)
    datasets.DatasetDict(train=rows, validation=rows).save_to_disk(tmp_path / "rows")
    batch = next(iter(opened(tmp_path / "rows", batch_size=6).train_dataloader()))
    assert batch["corrupt"] == ["split 'train', row 2 (not an image)"]


def test_a_corrupt_fraction_of_a_stream_is_an_error(tmp_path):
    rows = table(40).cast_column("image", datasets.Image(decode=False)).to_list()
    for row in rows[::4]:
        row["image"]["bytes"] = b"no image"
    rows = datasets.Dataset.from_list(rows, table(1).features)
    datasets.DatasetDict(train=rows, validation=table(3)).save_to_disk(tmp_path)
    data = ImageData(str(tmp_path), 8, batch_size=20, streaming=True, max_corrupt=0.01)
    with pytest.raises(ConfigurationError, match="images are corrupt, more than data.max_corrupt"):
        fit(data, tmp_path, max_epochs=2)


def test_lightning_resumes_in_mid_epoch(folder, tmp_path):
    def data():
        return ImageData(str(folder), 8, batch_size=4, seed=0)

    checkpoints = {"enable_checkpointing": True, "max_epochs": 2, "limit_val_batches": 0}
    complete = fit(data(), tmp_path, **checkpoints).trained
    saver = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_top_k=-1)
    fit(data(), tmp_path, callbacks=[saver], **checkpoints)
    for step in (2, 4, 6):
        saved = next((tmp_path / "c").glob(f"*step={step}.ckpt"))
        assert fit(data(), tmp_path, ckpt_path=saved, max_epochs=2, limit_val_batches=0).trained == complete[4 * step :]


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_outside_the_range(tmp_path, streaming):
    rows = table(12).cast_column("label", datasets.Value("int64"))
    wrong = datasets.Dataset.from_dict({**table(4).to_dict(), "label": [0, 1, -1, 2]}, rows.features)
    datasets.DatasetDict(train=rows, validation=wrong).save_to_disk(tmp_path)
    with pytest.raises(ConfigurationError, match="numbers without names; state data.num_classes"):
        opened(tmp_path, streaming=streaming)
    with pytest.raises(ConfigurationError, match="split 'validation'.*label -1 is outside 0 … 2"):
        fit(ImageData(str(tmp_path), 8, batch_size=4, num_classes=3, streaming=streaming), tmp_path)
    with pytest.raises(ConfigurationError, match="the labels have no names to order them by"):
        opened(tmp_path, classes="imagenet")


def test_class_names_that_do_not_match(folder):
    (folder / "val" / WNIDS[1]).rename(folder / "val" / "n01484851")
    with pytest.raises(
        ConfigurationError, match="split 'validation': its class names do not match.*n01484851.*n01484850"
    ):
        opened(folder)
    with pytest.raises(ConfigurationError, match="1 of 3 class names are not ImageNet's: 'n01484851'"):
        opened(folder, classes="imagenet")
    with pytest.raises(ConfigurationError, match="num_classes is 10, but there are 3 named classes"):
        opened(folder, num_classes=10)


def test_where_there_is_nothing(folder, tmp_path, parquet):
    for source, message in (
        (tmp_path / "none", "neither a folder, nor a pattern of .parquet or .arrow files, .* nor a hub id"),
        (tmp_path / "*.parquet", "no files match"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            opened(source)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="no images found in"):
        opened(tmp_path / "empty")
    with pytest.raises(
        ConfigurationError,
        match="has no split 'test'; it has: train, val. Name",
    ):
        opened(folder, val_split="test")
    with pytest.raises(ConfigurationError, match="has no split 'test'; it has: train, validation"):
        opened(parquet, val_split="test")
    with pytest.raises(
        ConfigurationError,
        match="data.label_column 'fine_label' is not there; the .* are: label, number, step",
    ):
        opened(parquet, label_column="fine_label")
    with pytest.raises(ConfigurationError, match="image_column 'number' holds .*; the columns that fit are: image"):
        opened(parquet, image_column="number")
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    with pytest.raises(ConfigurationError, match="no images found in .*val"):
        opened(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"channels": 2}, "channels must be 1 or 3"),
        ({"classes": "cifar"}, "classes must be imagenet or null"),
        ({"max_corrupt": 2.0}, r"max_corrupt must be in \[0, 1\]"),
        ({"samples_per_epoch": 5}, "samples_per_epoch is for streams"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigurationError, match=message):
        ImageData("x/y", 8, **options)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'ILSVRC/imagenet-1k' is a gated dataset on the Hub."),
            "accept its terms at https://huggingface.co/datasets/ILSVRC/imagenet-1k, then run `hf auth login` or set HF_TOKEN",
        ),
        (datasets.exceptions.DatasetNotFoundError("doesn't exist"), "neither a path here nor a data set on the hub"),
        (ConnectionError("no network"), "cannot be reached .*name a local copy with data.source"),
        (OfflineModeIsEnabled("offline"), "cannot be reached"),
    ],
)
def test_a_hub_data_set_that_cannot_be_had(monkeypatch, error, message):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    data = ImageData("ILSVRC/imagenet-1k", 8, classes="imagenet")
    with pytest.raises(ConfigurationError, match=message):
        data.prepare_data()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_with_the_names_of_imagenet(monkeypatch, streaming):
    names = ["crane2" if n == 517 else name for n, name in enumerate(ImageNetInfo("imagenet-1k").label_descriptions())]
    names[0], names[999] = names[999], names[0]
    rows = datasets.Dataset.from_dict({**table(4).to_dict(), "label": [0, 517, 999, 134]})
    rows = rows.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=names))
    splits = {"train": rows, "validation": rows}
    if streaming:
        splits = {name: rows.to_iterable_dataset() for name, rows in splits.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, streaming: splits)
    with (
        pytest.raises(ConfigurationError, match="does not state how many images")
        if streaming
        else contextlib.nullcontext()
    ):
        opened("ILSVRC/imagenet-1k", classes="imagenet", streaming=streaming)
    data = opened(
        "ILSVRC/imagenet-1k", classes="imagenet", streaming=streaming, samples_per_epoch=4 if streaming else None
    )
    assert joined(list(data.val_dataloader()), "label").tolist() == [999, 517, 0, 134]


def test_overfit_batches_of_lightning(folder, tmp_path):
    data = ImageData(str(folder), 8, batch_size=4)
    assert fit(data, tmp_path, overfit_batches=2, max_epochs=2).trained == [*range(8), *range(8)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_encoded_images(tmp_path, streaming):
    rows = {"picture": [encoded(i) for i in range(6)], "class": [i % 2 for i in range(6)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    data = ImageData(
        str(tmp_path / "*.parquet"),
        8,
        batch_size=3,
        val_split="train",
        image_column="picture",
        label_column="class",
        num_classes=2,
        streaming=streaming,
        samples_per_epoch=6 if streaming else None,
    )
    data.setup("fit")
    assert joined(list(data.val_dataloader()), "label").tolist() == [0, 1] * 3
    assert sorted(joined(epoch(data), "label").tolist()) == [0] * 3 + [1] * 3
