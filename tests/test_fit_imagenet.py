"""Every ImageNet configuration of ``fit``, at full architecture, on a generated image folder."""

import copy
import functools
import gc
import itertools
import json

import pytest
import torch
import yaml
from PIL import Image

from calib_guidance.cli import main
from calib_guidance.cli.parsed import read_configuration
from tests.conftest import ROOT

WNIDS = ("n01440764", "n02123045", "n07753592")  # tench, tabby, banana
FIT = ROOT / "lightning_configs/fit"
NOISINGS, OBJECTIVES = ("clean", "noisy", "denoised_imagenet128"), ("cross_entropy", "smooth_ece")
OFFLINE = {"input_transform": "denoised_offline", "objective": "smooth_ece_binned"}
PLAIN = {"fit": "50"}
NETWORKS = {
    "imagenet128_adm_noise_aware": "calib_guidance.networks.EncoderUNet",
    "imagenet224_convnext_tiny": "timm/convnext_tiny.fb_in1k",
    "imagenet224_vit_small": "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
}
# In place of ADM-128, which is built in a test of its own: 421 million parameters.
SMALL_ADM = {
    "class_path": "calib_guidance.networks.UNet",
    "init_args": {
        "image_size": 128,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [8, 16],
        "channel_mult": [1, 1, 2, 3, 4],
        "num_classes": 1000,
        "num_heads": 4,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
}
CASES = [
    *({"fit": "50", "input_transform": name, "objective": OBJECTIVES[0]} for name in NOISINGS[1:]),
    {"fit": "50", "input_transform": NOISINGS[0], "objective": OBJECTIVES[1]},
    {"fit": "101", "input_transform": NOISINGS[-1], "objective": OBJECTIVES[1]},
    *({"fit": name} for name in sorted(p.stem for p in FIT.glob("imagenet*.yaml") if "resnet" not in p.stem)),
]


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    """That of a trained network, most of a GB, which refers to itself."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two splits of three of ImageNet's classes, three images and one of each, one image of them damaged."""
    folder = tmp_path_factory.mktemp("imagenet")
    generator = torch.Generator().manual_seed(0)
    for split, wnid, number in itertools.product(("train", "val"), WNIDS, range(3)):
        if split == "val" and number:
            continue
        path = folder / split / wnid / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 10, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).resize((160, 140)).save(path)
    damaged = folder / "train" / WNIDS[0] / "damaged.JPEG"
    damaged.write_bytes((folder / "train" / WNIDS[0] / "0.JPEG").read_bytes()[:300])
    return folder


@functools.cache
def resolved(name):
    return read_configuration([f"--config={FIT / name}.yaml"]).options.as_dict()


def fit(folder, source, case, tmp_path, max_corrupt=0.2, batch_size=2, **model):
    """Two steps of a configuration, without weights; its classifier as written."""
    name = case["fit"] if "_" in case["fit"] else f"imagenet128_resnet{case['fit']}"
    configs = [FIT / f"{name}.yaml"]
    configs += [
        ROOT / f"lightning_configs/{folder}/{case[part]}.yaml"
        for part, folder in (("input_transform", "input"), ("objective", "objective"))
        if part in case
    ]
    merged = copy.deepcopy(resolved(name))
    classifier = merged["model"]["init_args"]["classifier"]["init_args"]
    changes = {"classifier": {"init_args": {("weights" if "weights" in classifier else "checkpoint"): None}}} | model
    if case.get("input_transform") == "denoised_imagenet128":
        denoiser = {"init_args": {"checkpoint": None, "network": SMALL_ADM}}
        changes["input_transform"] = {"init_args": {"denoiser": denoiser}}
    callbacks = [c for c in merged["trainer"]["callbacks"] if "ModelCheckpoint" not in c["class_path"]]
    callbacks[-1]["init_args"]["path"] = None
    trainer = {
        "callbacks": callbacks,
        "max_steps": 2,
        "max_epochs": -1,
        "val_check_interval": 2,
        "limit_val_batches": 1.0,
    }
    trainer |= {"num_sanity_val_steps": 0, "precision": "32-true", "logger": False, "enable_checkpointing": False}
    trainer |= {"default_root_dir": str(folder), "accelerator": "cpu", "enable_progress_bar": False}
    data = {"source": str(source), "batch_size": batch_size, "num_workers": 0, "max_corrupt": max_corrupt}
    test = tmp_path / "test.yaml"
    test.write_text(yaml.safe_dump({"trainer": trainer, "model": {"init_args": changes}, "data": {"init_args": data}}))
    main(["fit", *(f"--config={path}" for path in (*configs, test))])
    return yaml.safe_load((folder / "classifier.yaml").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_configuration(images, in_root, tmp_path, case):
    description = fit(tmp_path / "out", images, case, tmp_path, batch_size=1)
    (report,) = (tmp_path / "out/calibration").glob("val-*.json")
    measured = json.loads(report.read_text())
    assert measured["nll"]["overall"] > 0
    assert 0 <= measured["ece"]["overall"] <= 1
    levels = sum(count > 0 for count in measured["count"])
    assert levels == 1 if case.get("input_transform") == "clean" else levels >= 1
    network = description["init_args"]["network"]
    if "_" not in case["fit"]:
        assert network == f"torchvision/resnet{case['fit']}"
    else:
        assert (network if isinstance(network, str) else network["class_path"]) == NETWORKS[case["fit"]]


def test_the_denoiser_is_the_one_that_is_sampled():
    """That of input/denoised_imagenet128 and of the offline way is backbone/adm128."""

    def denoiser(path, *keys):
        node = yaml.safe_load((ROOT / "lightning_configs" / path).read_text())["model"]
        node = node.get("init_args", node)
        for key in keys:
            node = node[key]["init_args"]
        return node["denoiser"]

    sampled = denoiser("backbone/adm128.yaml")
    assert denoiser("input/denoised_imagenet128.yaml", "input_transform") == sampled
    assert denoiser("predict/imagenet128_denoised.yaml") == sampled


def test_denoised_beforehand(images, in_root, tmp_path):
    """The offline way: predict writes both splits, and fit reads them."""
    model = {"denoiser": {"init_args": {"checkpoint": None, "network": SMALL_ADM}}}
    data = {"images": {"init_args": {"source": str(images)}}, "num_workers": 0, "batch_size": 3, "max_corrupt": 0.2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"model": {"init_args": model}, "data": {"init_args": data}}))
    for split in ("train", "validation"):
        main(
            [
                "predict",
                "--config=lightning_configs/predict/imagenet128_denoised.yaml",
                f"--config={tmp_path / 'small.yaml'}",
                f"--data.init_args.images.init_args.split={split}",
                f"--trainer.default_root_dir={tmp_path / 'denoised' / split}",
                "--trainer.accelerator=cpu",
                "--trainer.enable_progress_bar=false",
            ]
        )
    written = [len(list((tmp_path / "denoised" / s / "samples").glob("*.parquet"))) for s in ("train", "validation")]
    assert written == [4, 1]
    source = tmp_path / "denoised/{split}/samples/*.parquet"
    description = fit(tmp_path / "out", source, {"fit": "50"} | OFFLINE, tmp_path)
    assert description["init_args"]["network"] == "torchvision/resnet50"
    measured = json.loads(next((tmp_path / "out/calibration").glob("val-*.json")).read_text())
    assert sum(measured["count"]) == 3
    assert sum(count > 0 for count in measured["count"]) > 1  # t came along


class TestRefusals:
    """Before any training, with the cause and the cure."""

    def refuse(self, capsys, *arguments, **keywords):
        with pytest.raises(SystemExit) as stop:
            fit(*arguments, **keywords)
        assert stop.value.code == 2
        return capsys.readouterr().err

    def test_a_denoiser_of_another_image_size(self, images, in_root, tmp_path, capsys, monkeypatch):
        config = yaml.safe_load((ROOT / "lightning_configs/input/denoised_imagenet128.yaml").read_text())
        denoiser = config["model"]["input_transform"]["init_args"]["denoiser"]["init_args"]
        denoiser["network"] = SMALL_ADM | {"init_args": SMALL_ADM["init_args"] | {"image_size": 64}}
        denoiser["checkpoint"] = None
        input_transform = config["model"]["input_transform"]
        message = self.refuse(capsys, tmp_path / "out", images, PLAIN, tmp_path, input_transform=input_transform)
        assert "the data has images of 3×128×128, the denoiser takes 3×64×64" in message

    def test_no_images(self, in_root, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        assert "no images found" in self.refuse(capsys, tmp_path / "out", tmp_path / "empty", PLAIN, tmp_path)

    def test_class_names_that_imagenet_does_not_have(self, images, in_root, tmp_path, capsys):
        for split in ("train", "val"):
            folder = tmp_path / "pets" / split / "dog"
            folder.mkdir(parents=True)
            Image.new("RGB", (140, 140)).save(folder / "0.png")
        message = self.refuse(capsys, tmp_path / "out", tmp_path / "pets", PLAIN, tmp_path)
        assert "dog" in message

    def test_too_many_corrupt_images(self, images, in_root, tmp_path, capsys):
        broken = tmp_path / "broken"
        for split, number in itertools.product(("train", "val"), range(6)):
            path = broken / split / WNIDS[0] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (140, 140)).save(path)
        for number in range(2):
            (broken / "train" / WNIDS[0] / f"{number}.png").write_bytes(b"not an image")
        message = self.refuse(capsys, tmp_path / "out", broken, PLAIN, tmp_path, max_corrupt=0.1)
        assert "are corrupt" in message
        assert "max_corrupt" in message
