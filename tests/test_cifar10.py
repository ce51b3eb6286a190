"""docs/cifar10.md from the data to guided samples, its commands on a handful of images and two steps each."""

import shlex
import sys

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_from_disk

import calib_guidance
from calib_guidance.cli import main
from tests.docs_scripts import docs_script
from tests.runs import metrics, samples_of
from tests.test_documented_commands import commands

SMALLER = {
    "fit": [
        "--data.batch_size=10",
        "--trainer.max_steps=2",
        "--trainer.max_epochs=-1",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.val_check_interval=2",
    ],
    "predict": ["--data.num_samples=10", "--data.batch_size=10", "--model.sampler.steps=3"],
}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """The data set's files, with 40 images of noise."""
    folder, rng = tmp_path_factory.mktemp("parquet"), np.random.default_rng(0)
    features = Features({"img": Image(), "label": ClassLabel(num_classes=10)})
    for split, count in (("train", 20), ("test", 20)):
        pixels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        rows = {"img": list(pixels), "label": [k % 10 for k in range(count)]}
        Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000.parquet")
    return folder


def test_every_pixel_is_the_mean_of_four_and_the_commands_end_in_guided_samples(parquet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["cifar10.py", "--source", str(parquet)])
    docs_script("cifar10").main()
    before = Dataset.from_parquet(str(parquet / "test-00000.parquet"), cache_dir=str(tmp_path / "cache"))
    after = load_from_disk("data/cifar10_16")["test"]
    assert after["label"] == before["label"]
    image, small = (np.asarray(rows[3]["img"], np.float64) for rows in (before, after))
    means = image.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert small.shape == (16, 16, 3)
    assert np.abs(small - means).max() <= 0.5

    ran = commands("docs/cifar10.md")
    for words in ran:
        main([*words, *SMALLER.get(words[0], []), *(QUIET if words[0] != "ema" else [])])
    assert [words[0] for words in ran].count("fit") == 5
    assert shlex.join(ran[0]) == "predict --config cifar10"
    for run in ("cifar10", "cifar10_mine"):
        assert samples_of(f"outputs/{run}")["image"].shape == (10, 3, 16, 16)
        assert 0 < metrics(f"outputs/{run}")["fd"] < float("inf")
    used = [metrics(f"outputs/{run}")["weights"] for run in ("cifar10", "cifar10_mine")]
    assert used[0] != used[1]


@pytest.mark.parametrize(
    "overlays",
    [
        ["guidance/relu"],
        ["cifar10/fine_tuned", "score/js"],
        ["cifar10/noise_aware"],
        ["cifar10/classifier_free", "guidance/unguided"],
    ],
    ids=" ".join,
)
def test_shipped_models_make_images_of_the_requested_class(tmp_path, monkeypatch, overlays):
    monkeypatch.chdir(tmp_path)
    configs = [word for name in ["cifar10", "cifar10/no_plots", *overlays] for word in ("--config", name)]
    strength = (
        ["--model.guidance.scale=4"] if overlays[-1] != "guidance/unguided" else ["--model.denoiser.rule.weight=2"]
    )
    few = ["--data.num_samples=30", "--data.batch_size=30", "--model.sampler.steps=10"]
    main(["predict", *configs, *strength, *few, *QUIET])
    found = metrics("outputs/cifar10")
    assert found["classifier_accuracy"] > 0.5  # a tenth by chance
    assert 0 < found["fd"] < float("inf")


def test_models_by_name(in_root):
    noise = torch.zeros(2, 3, 16, 16)
    denoiser = calib_guidance.load_pretrained("cifar10", class_conditional=True)
    assert denoiser.image_shape == (3, 16, 16)
    for name in ("cifar10_classifier", "cifar10_classifier_x0"):
        classifier = calib_guidance.load_pretrained(name, softplus_beta=10.0)
        assert classifier(noise).shape == (2, 10)
