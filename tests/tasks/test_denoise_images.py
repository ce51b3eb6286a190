"""Data sets of denoised images, as the command line writes them."""

import os

import pytest
import torch
import yaml
from datasets import load_dataset
from torch.utils.data import TensorDataset

from calib_guidance.backend.images import from_uint8
from calib_guidance.cli import main
from calib_guidance.data import DenoiseRequests, digits
from calib_guidance.denoisers import ADMDenoiser
from calib_guidance.diffusion.rng import DIFFUSION, SampleStreams
from calib_guidance.errors import ConfigurationError
from calib_guidance.networks import UNet
from calib_guidance.training import DenoisedInput
from tests import processes
from tests.conftest import ROOT
from tests.runs import QUICK, samples_of, tables

CONFIG = "lightning_configs/predict/digits_denoised.yaml"
HALF_A_LEVEL = 0.5 / 127.5


def arguments(folder, batch=500):
    """Two draws of the 500 held-out digits."""
    data = ("images.init_args.split=heldout", "draws_per_image=2", f"batch_size={batch}")
    data = [f"--data.init_args.{a}" for a in data]
    return ["predict", f"--config={CONFIG}", f"--trainer.default_root_dir={folder}", *data, *QUICK]


def denoise(folder, *more, batch=500):
    main([*arguments(folder, batch), *more])


@pytest.fixture(scope="module")
def denoiser():
    network = yaml.safe_load((ROOT / CONFIG).read_text())["model"]["init_args"]["denoiser"]["init_args"]["network"]
    weights = str(ROOT / "checkpoints/digits/diffusion.safetensors")
    return ADMDenoiser(UNet(**network["init_args"]), weights, "cosine", prediction="v", class_conditional=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("denoised"), os.getcwd()
    os.chdir(ROOT)
    try:
        denoise(folder)
    finally:
        os.chdir(before)
    return folder


def test_it_is_a_data_set(run, tmp_path):
    rows = load_dataset("parquet", data_files=str(run / "samples/*.parquet"), split="train", cache_dir=str(tmp_path))
    assert set(rows.column_names) == {"index", "source", "label", "t", "seed", "image"}
    assert rows["index"] == list(range(1000))
    assert rows["source"] == [i % 500 for i in range(1000)]
    assert rows["label"] == digits("heldout")[1].tolist() * 2
    assert rows[3]["image"].size == (8, 8)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["steps"] == "100"


def test_images_are_the_definition(run, denoiser):
    """x_t of the written t and the keyed noise, through the network and v = √ᾱ·ε − √(1−ᾱ)·x0, one draw unlike the other."""
    found = samples_of(run)
    t, images = found["t"], digits("heldout")[0]
    assert set(t.tolist()) <= set(denoiser.schedule.respace("100").timesteps.tolist())
    assert (t[:500] != t[500:]).float().mean() > 0.9
    abar = torch.tensor(denoiser.schedule.alphas_cumprod)[t].float().view(-1, 1, 1, 1)
    noise = SampleStreams([0] * 1000, range(1000), (1, 8, 8), stream=DIFFUSION)()
    x_t = abar.sqrt() * images[found["source"]] + (1 - abar).sqrt() * noise
    with torch.no_grad():
        v = denoiser.network(x_t, t)[:, :1]  # the other channel is the variance
    expected = (abar.sqrt() * x_t - (1 - abar).sqrt() * v).clamp(-1, 1)
    difference = from_uint8(found["image"]) - expected
    assert difference.abs().max() <= HALF_A_LEVEL + 1e-4
    # Rounding to the nearest level has no bias; cutting off would have one of half a level. Ends of the scale are exact.
    inside = difference[expected.abs() < 1]
    assert abs(inside.mean()) < 5 * HALF_A_LEVEL / 3**0.5 / len(inside) ** 0.5


def test_online_is_the_same_for_the_same_keys(run, denoiser):
    found = samples_of(run)
    images, labels = digits("heldout")
    batch = {"image": images, "label": labels, "index": torch.arange(500)}
    for precision, allowed in (("fp32", 1e-4), ("bf16", 0.1)):
        x, t = DenoisedInput(denoiser, "100", precision=precision)(batch, seed=0)
        assert torch.equal(t, found["t"][:500])
        difference = (from_uint8(found["image"][:500]) - x).abs()
        assert difference.max() <= HALF_A_LEVEL + allowed
        # Of a rounding error the mean is a quarter of a level; bf16 adds 0.0012, measured.
        assert difference.mean() < HALF_A_LEVEL / 2 + 0.002


def test_batch_size_and_readers_change_rounding_only(in_root, run, tmp_path):
    denoise(tmp_path, "--data.init_args.num_workers=2", batch=130)
    found, expected = samples_of(tmp_path), samples_of(run)
    for key in ("index", "source", "label", "t", "seed"):
        assert torch.equal(found[key], expected[key])
    difference = (found["image"].int() - expected["image"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(in_root, tmp_path):
    """300 does not divide 1,000: one process has a batch of 100 at the end."""
    denoise(tmp_path / "one", batch=300)
    ddp = ("--trainer.strategy=ddp", "--trainer.devices=2")
    processes.succeed(*arguments(tmp_path / "two", 300), *ddp, ranks=2)
    assert tables(tmp_path / "one") == tables(tmp_path / "two")
    assert len(tables(tmp_path / "one")) == 4


class TestRefusals:
    """Each before anything is denoised."""

    @pytest.fixture
    def refuse(self, in_root, tmp_path, capsys):
        def run(*more, folder=tmp_path, command=None):
            with pytest.raises(SystemExit) as stop:
                main(command or [*arguments(folder), *more])
            assert stop.value.code == 2
            return capsys.readouterr().err

        yield run
        assert not list(tmp_path.rglob("*.parquet"))

    def test_a_denoiser_of_another_image_size(self, refuse):
        message = refuse("--model.init_args.denoiser.init_args.image_size=16")
        assert "the data has images of 1×8×8, the denoiser takes 1×16×16" in message
        assert "set the image size of the data" in message

    def test_classes_of_data_and_denoiser_differ(self, refuse):
        message = refuse(
            "--model.init_args.denoiser.init_args.class_conditional=true", "--data.init_args.num_classes=11"
        )
        assert "the data has 11 classes, the denoiser 10" in message

    def test_a_label_outside(self, refuse):
        assert "outside 0 … 0 (data.num_classes)" in refuse("--data.init_args.num_classes=1")

    @pytest.mark.parametrize("name", ["draws_per_image", "batch_size", "num_classes"])
    def test_numbers_out_of_range(self, refuse, name):
        assert f"data.{name} must be at least 1, got 0" in refuse(f"--data.init_args.{name}=0")

    def test_requests_without_images(self, refuse, tmp_path):
        config = yaml.safe_load((ROOT / CONFIG).read_text())
        config["data"] = {"class_path": "calib_guidance.data.SampleRequests", "init_args": {"num_samples": 2}}
        (tmp_path / "requests.yaml").write_text(yaml.safe_dump(config))
        assert "set data.class_path to calib_guidance.data.DenoiseRequests, got SampleRequests" in refuse(
            command=["predict", f"--config={tmp_path}/requests.yaml", f"--trainer.default_root_dir={tmp_path}"]
        )

    def test_images_without_labels(self):
        dataset = DenoiseRequests(TensorDataset(torch.zeros(3, 1, 8, 8)))
        with pytest.raises(
            ConfigurationError, match="expected a data set of dicts with image, label and index, got tuple"
        ):
            _ = dataset.image_shape
        with pytest.raises(ConfigurationError, match="holds no images"):
            DenoiseRequests(TensorDataset(torch.zeros(0)))

    def test_values_of_the_noise_levels(self, refuse):
        assert "known: bf16, fp16, fp32" in refuse("--model.init_args.precision=half")
        assert "cannot take 2000 of the 1000 steps" in refuse("--model.init_args.steps=2000")
        assert "weights must be numbers of at least 0" in refuse("--model.init_args.weights=[0.0]")

    def test_a_folder_with_samples(self, refuse, run):
        before = tables(run)
        assert "data.init_args.seed: 0 in the folder, now 5" in refuse("--data.init_args.seed=5", folder=run)
        assert tables(run) == before
