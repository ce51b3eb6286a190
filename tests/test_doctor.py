"""The doctor finds what is wrong before a run, all of it, and touches nothing."""

import re

import pytest
import torch
import yaml
from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from calib_guidance.cli import main, parsed
from calib_guidance.cli.doctor import dry_run
from calib_guidance.cli.doctor.files import missing_files
from calib_guidance.cli.doctor.measure import Meter, extrapolate
from calib_guidance.networks import SmallResNet
from calib_guidance.runs import RunFolder
from calib_guidance.weights.io import save_weights
from tests.conftest import ROOT

DIGITS = "--config=lightning_configs/predict/digits.yaml"
IMAGENET = "--config=lightning_configs/predict/imagenet128/resnet101_js.yaml"
CPU = "--trainer.accelerator=cpu"
DENOISER = "--model.init_args.denoiser.init_args"


@pytest.fixture
def examine(in_root, tmp_path, capsys, monkeypatch):
    """Exit status and report of the doctor; nothing is written where the run would write."""
    monkeypatch.setattr(dry_run, "PATIENCE", 0.0)  # nothing at the run's batch size

    def examine(*words):
        out = tmp_path / "out"
        before = sorted(out.rglob("*"))
        try:
            main(["doctor", *words, f"--trainer.default_root_dir={out}", CPU])
            status = 0
        except SystemExit as stop:
            status = stop.code
        assert sorted(out.rglob("*")) == before
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return examine


def marked(report, mark):
    return [line for line in report.splitlines() if line.startswith(f"  {mark} ")]


class TestGo:
    def test_sampling(self, examine, monkeypatch):
        monkeypatch.setattr(dry_run, "PATIENCE", 60.0)
        status, report = examine(DIGITS)
        assert status == 0
        assert report.rstrip().splitlines()[-1].startswith("GO: calib-guidance predict")
        assert len([line for line in marked(report, "ok") if "checkpoints/digits/" in line]) == 3
        assert "denoiser: ADMDenoiser, 0.83 M parameters, samples 1×8×8" in report
        assert "with a batch of 100: guided step" in report
        assert "for 1,000 images" in report
        (rates,) = re.findall(r"expected images per second on one GPU: A100 ([\d.e+]+), H100 ([\d.e+]+)", report)
        assert 0 < float(rates[0]) <= float(rates[1])

    def test_training(self, examine):
        status, report = examine("--config=lightning_configs/fit/digits_calibration.yaml")
        assert status == 0
        assert "GO: calib-guidance fit" in report
        assert "8 batches of 125 per epoch" in report
        assert "for 40,000 images" in report  # 40 epochs of 8 batches of 125

    def test_denoising(self, examine):
        status, report = examine("--config=lightning_configs/predict/digits_denoised.yaml")
        assert status == 0
        assert "10,000 requests" in report
        assert ": denoised batch" in report
        assert "decoding" not in report

    def test_training_on_denoised_images(self, examine):
        overlay = "--config=lightning_configs/digits/denoised_inputs.yaml"
        status, report = examine("--config=lightning_configs/fit/digits_calibration.yaml", overlay)
        assert status == 0
        assert "input_transform.denoiser: ADMDenoiser" in report

    def test_an_interval_is_less_work(self, examine):
        overlay = "--config=lightning_configs/guidance/unguided.yaml"
        status, report = examine(DIGITS, overlay)
        assert status == 0
        assert "guided step" not in report
        interval = "--model.init_args.guidance.init_args.schedule.init_args.interval=[0,500]"
        status, report = examine(DIGITS, "--model.init_args.sampler.init_args.steps=20", interval)
        assert status == 0
        assert ": step" in report
        assert ", guided step" in report


class TestNoGo:
    def test_everything_that_is_missing_is_named_with_its_source(self, examine, monkeypatch):
        monkeypatch.setattr(dry_run, "free_memory", lambda device: 10**9)  # the weights need more than half of it
        status, report = examine(IMAGENET, "--data.init_args.labels=classes.txt")
        assert status == 1
        assert "NO-GO: 2 missing" in report
        assert "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/128x128_diffusion.pt" in report
        assert f"required by {DENOISER}.checkpoint" in report
        assert "license MIT" in report
        assert "classes.txt: no such file of labels" in report
        assert "it is downloaded at first use" in report
        assert "resnet101-cd907fc2.pth" in report
        # Without memory for it, and yet looked at.
        assert "421.53 M parameters, samples 3×128×128, 1000 classes" in report
        assert "no batch is run" in report
        assert "GFLOP" in report or "TFLOP" in report
        assert "total time" not in report

    @pytest.mark.parametrize(
        ("row", "networks"),
        [
            ("imagenet512/adm_noise_aware", ("559.00 M parameters, samples 3×512×512, 1000 classes", "54.45 M")),
            ("imagenet256/adm_unconditional_noise_aware", ("552.81 M parameters, samples 3×256×256", "54.10 M")),
        ],
    )
    def test_rows_without_their_weights_are_counted_without_memory(self, examine, monkeypatch, row, networks):
        monkeypatch.setattr(dry_run, "free_memory", lambda device: 10**9)
        status, report = examine(f"--config=lightning_configs/predict/{row}.yaml", "--data.batch_size=1")
        assert status == 1
        assert "NO-GO: 2 missing" in report
        assert all(text in report for text in networks)
        assert "TFLOP per image, all steps together" in report

    def test_a_reference_that_is_not_there(self, examine, tmp_path):
        callbacks = yaml.safe_load((ROOT / "lightning_configs/predict/digits.yaml").read_text())["trainer"]["callbacks"]
        (quality,) = [c for c in callbacks if c["class_path"].endswith("SampleQuality")]
        quality["init_args"]["reference"] = str(tmp_path / "reference.npz")
        (tmp_path / "quality.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [quality]}}))
        words = (DIGITS, f"--config={tmp_path / 'quality.yaml'}", "--data.init_args.batch_size=2")
        status, report = examine(*words)
        assert status == 1
        assert f"{tmp_path / 'reference.npz'}: no such reference" in report
        (tmp_path / "reference.npz").write_bytes(b"")
        status, report = examine(*words)
        assert status == 0
        assert f"{tmp_path / 'reference.npz'}" in "".join(marked(report, "ok"))

    def test_too_little_memory_names_the_batch_size_that_fits(self, examine, monkeypatch):
        monkeypatch.setattr(dry_run, "free_memory", lambda device: 9 * 10**6)
        status, report = examine(DIGITS)
        assert status == 1
        (line,) = [line for line in report.splitlines() if "set data.batch_size to" in line]
        fits = int(line.split()[-3])
        assert 1 < fits < 100
        status, report = examine(DIGITS, f"--data.init_args.batch_size={fits}", "--data.init_args.num_samples=1")
        assert status == 0
        status, report = examine(DIGITS, f"--data.init_args.batch_size={fits + 1}", "--data.init_args.num_samples=1")
        assert status == 1

    def test_problems_of_several_parts_at_once(self, examine, tmp_path):
        save_weights(SmallResNet(), tmp_path / "wrong.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"not a weights file")
        classifier = "--model.init_args.guidance.init_args.classifier.init_args"
        status, report = examine(
            DIGITS,
            f"{DENOISER}.checkpoint={tmp_path / 'wrong.safetensors'}",
            f"{classifier}.weights={tmp_path / 'broken.safetensors'}",
            "--data.init_args.num_classes=11",
        )
        assert status == 1
        wrong = "\n".join(marked(report, "wrong"))
        assert "wrong.safetensors does not fit UNet" in wrong
        assert "broken.safetensors: expected weights" in wrong
        assert "the requests have 11 classes, the classifier 10" in wrong
        assert "NO-GO: 3 wrong" in report

    def test_an_image_size_that_the_network_cannot_take(self, examine):
        status, report = examine(DIGITS, f"{DENOISER}.image_size=9")
        assert status == 1
        assert "multiples of 2" in "".join(marked(report, "wrong"))

    def test_torn_groups_and_classes(self, examine):
        overlay = "--config=lightning_configs/score/tilted.yaml"
        status, report = examine(DIGITS, overlay, "--data.init_args.batch_size=4", "--data.init_args.num_classes=11")
        assert status == 1
        assert "must be a multiple of 10, got 4" in report
        assert "the requests have 11 classes" in report

    def test_samples_of_an_earlier_run(self, examine, tmp_path):
        folder = tmp_path / "out/samples"
        folder.mkdir(parents=True)
        (folder / "00000000-00000009.parquet").write_bytes(b"kept")
        status, report = examine("--config=lightning_configs/predict/digits_denoised.yaml")
        assert status == 1
        assert "no run.json that says what made them" in report
        callbacks = [{"class_path": "calib_guidance.callbacks.SampleWriter", "init_args": {"restart": True}}]
        (tmp_path / "restart.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        RunFolder(tmp_path / "other", 4, 4).begin({}, {})
        (tmp_path / "other/run.json").rename(tmp_path / "out/run.json")
        for more, said in (
            ((), "is resumed if both make the same samples"),
            ((f"--config={tmp_path}/restart.yaml",), "will be removed"),
        ):
            status, report = examine(DIGITS, *more)
            assert status == 0
            assert said in report
        assert (folder / "00000000-00000009.parquet").read_bytes() == b"kept"

    def test_gradients_that_vanish(self, examine, tmp_path):
        classifier = {"init_args": {"weights": None, "temperature": 1e39}}
        config = {"model": {"init_args": {"guidance": {"init_args": {"classifier": classifier}}}}}
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(config))
        status, report = examine(DIGITS, f"--config={tmp_path / 'more.yaml'}")
        assert status == 1
        assert "the gradient is zero everywhere" in report

    def test_what_the_hub_has_is_named_and_not_asked_for(self, examine, tmp_path):
        denoiser = {"network": None, "checkpoint": "hf://someone/dit", "vae": "hf://stabilityai/sd-vae-ft-mse"}
        guidance = {"decoder": {"class_path": "calib_guidance.denoisers.decoders.TinyDecoder"}}
        model = {"denoiser": {"init_args": {"denoiser": {"init_args": denoiser}}}, "guidance": {"init_args": guidance}}
        (tmp_path / "hub.yaml").write_text(yaml.safe_dump({"model": {"init_args": model}}))
        dit = "--config=lightning_configs/predict/imagenet256/dit_resnet101.yaml"
        status, report = examine(dit, f"--config={tmp_path / 'hub.yaml'}")
        assert status == 1
        notes = "\n".join(marked(report, "note"))
        for name in ("someone/dit", "stabilityai/sd-vae-ft-mse", "madebyollin/taesd"):
            assert f"hf://{name} is not in this machine's cache" in notes
        assert "NO-GO: 1 missing" in report
        assert "name the network beside its checkpoint" in report

    def test_devices_that_are_not_here(self, examine):
        status, report = examine(DIGITS, "--trainer.devices=0")
        assert status == 1
        assert "trainer: " in "".join(marked(report, "wrong"))
        assert "measured on this cpu" in report  # and the rest is looked at all the same


class TestImages:
    """A fit on a folder of images."""

    @pytest.fixture
    def config(self, tmp_path):
        for split in ("train", "validation"):
            for number in range(4):
                path = tmp_path / "images" / split / f"class{number % 2}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), (number, 0, 0)).save(path)
        config = yaml.safe_load((ROOT / "lightning_configs/fit/imagenet128_resnet50.yaml").read_text())
        network = {
            "class_path": "calib_guidance.networks.SmallResNet",
            "init_args": {"num_classes": 2, "in_channels": 3},
        }
        config["model"]["init_args"]["classifier"]["init_args"] |= {
            "network": network,
            "num_classes": 2,
            "weights": None,
        }
        config["trainer"] |= {"precision": "32-true", "logger": False}
        config["data"]["init_args"] = {
            "source": str(tmp_path / "images"),
            "image_size": 32,
            "batch_size": 2,
            "num_workers": 3,
        }
        return config

    def examine(self, examine, config, tmp_path):
        (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
        return examine(f"--config={tmp_path / 'fit.yaml'}")

    def test_go(self, examine, config, tmp_path):
        status, report = self.examine(examine, config, tmp_path)
        assert status == 0, report
        assert "2 batches of 2 per epoch" in report
        assert "the run has 3" in report

    def test_a_class_count_that_differs(self, examine, config, tmp_path):
        config["model"]["init_args"]["classifier"]["init_args"]["num_classes"] = 3
        config["model"]["init_args"]["classifier"]["init_args"]["network"]["init_args"]["num_classes"] = 3
        status, report = self.examine(examine, config, tmp_path)
        assert status == 1
        assert "the data has 2 classes, the classifier 3" in report

    def test_no_such_folder(self, examine, config, tmp_path):
        config["data"]["init_args"]["source"] = str(tmp_path / "nowhere")
        status, report = self.examine(examine, config, tmp_path)
        assert status == 1
        assert "nowhere is neither a folder" in report

    def test_a_hub_id_is_not_downloaded(self, examine, config, tmp_path):
        config["data"]["init_args"] |= {"source": "someone/something", "num_classes": 2}
        status, report = self.examine(examine, config, tmp_path)
        assert status == 0
        assert "https://huggingface.co/datasets/someone/something" in report
        assert "the number of images is not known" in report


class TestCommandLine:
    def test_a_misspelt_option(self, examine):
        status, report = examine(DIGITS, f"{DENOISER}.chekpoint=x")
        assert status == 2
        assert "did you mean 'checkpoint'?" in report

    def test_no_configuration(self, examine):
        status, report = examine()
        assert status == 2
        assert "--config" in report


def test_missing_files_of_a_configuration(in_root):
    """With their source and the option that names them; weights that are downloaded at first use are not among them."""
    assert missing_files(parsed.read_configuration([DIGITS]).options) == []
    (found,) = missing_files(parsed.read_configuration([IMAGENET]).options)
    assert found.startswith("checkpoints/128x128_diffusion.pt; public: adm_imagenet128")
    assert found.endswith(f"required by {DENOISER}.checkpoint")


def test_a_batch_is_every_step_of_its_kind():
    meter = Meter(None, iter([0, 9, 9, 10, 10, 12, 12, 17, 17]).__next__)
    for kind in ("guided step", "guided step", "guided step", "decoding"):
        meter.lap(kind)
    meter.times["guided step"] = 100
    assert meter.range("guided step") == (1, 2)  # without the warm-up
    assert meter.total() == (105, 205)


@pytest.mark.parametrize("fixed", [0.0, 0.3, 24.0])
@pytest.mark.parametrize("counts", [(1,), (1, 7), (1, 64)])
def test_the_range_of_a_batch_holds_what_it_takes(counts, fixed):
    """A batch of n takes fixed + n·0.02 seconds, ± 10 % from one to the next."""

    def takes(n):
        return fixed + 0.02 * n

    low, high = extrapolate({n: (0.9 * takes(n), 1.1 * takes(n)) for n in counts}, 64)
    assert low <= takes(64) <= high
    if 64 in counts:  # measured at the run's own size: the range is that of the measurement
        assert (low, high) == pytest.approx((0.9 * takes(64), 1.1 * takes(64)))


def test_a_batch_too_slow_for_the_run_s_size_is_measured_at_two_smaller_ones(examine, monkeypatch):
    monkeypatch.setattr(Meter, "one_each", property(lambda meter: 2.0 * meter.batch_size))
    monkeypatch.setattr(dry_run, "PATIENCE", 20.0)
    status, report = examine(DIGITS)
    assert status == 0
    assert "with a batch of 10: guided step" in report
    assert "the run's batches of 100 take too long here: their times are estimated" in report


def test_nothing_reaches_the_network():
    with parsed.without_network():
        with pytest.raises(OSError, match="would be downloaded, from download.pytorch.org"):
            torch.hub.load_state_dict_from_url("https://download.pytorch.org/models/none.pth", "/nonexistent")
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download("someone/something", "model.safetensors")
    assert not is_offline_mode()
