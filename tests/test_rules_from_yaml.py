"""Every rule and negative that is shipped as a configuration, on the digits, by the command line."""

import math

import pytest
import torch
import yaml

import calib_guidance
from calib_guidance import denoisers
from calib_guidance.cli import main
from calib_guidance.data import DigitImages
from calib_guidance.denoisers import Combination, Negative, Rule, UnconditionalModel
from calib_guidance.networks import UNet
from tests.conftest import ROOT
from tests.runs import read_samples

FILES = sorted(p for folder in ("rule", "negative") for p in (ROOT / "lightning_configs" / folder).glob("*.yaml"))
STEADY = ["--model.guidance.stabilizer={ema: 0.9, max_norm: 5.0, parallel: 0.5}"]


def sample(folder, *options):
    argv = ["predict", "--config=digits", "--config=digits/classifier_free", *options]
    argv += ["--model.sampler.steps=3", "--data.num_samples=4", "--data.batch_size=4", "--data.shard_size=4"]
    argv += ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu"]
    main([*argv, '--trainer.callbacks=[{"class_path": "SampleWriter"}]'])
    return torch.cat([part["image"] for part in read_samples(folder / "samples")])


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return sample(tmp_path_factory.mktemp("cfg"), "--model.guidance=null")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_rule_and_negative_runs(path, expected, tmp_path, in_root):
    images = sample(tmp_path, "--model.guidance=null", f"--config={path.parent.name}/{path.stem}")
    assert not torch.equal(images, expected)


@pytest.mark.parametrize("name", ["tfg", "dps", "freedom", "universal", "loss_guided"])
def test_every_special_case_of_training_free_guidance_runs(name, expected, tmp_path, in_root):
    images = sample(tmp_path, f"--config=guidance/{name}")
    assert not torch.equal(images, expected)


def test_every_rule_and_negative_has_a_configuration():
    used = {line for path in FILES for line in path.read_text().replace(",", " ").replace("}", " ").split()}
    for kind in (Rule, Negative):
        for name in vars(denoisers):
            part = getattr(denoisers, name)
            if isinstance(part, type) and issubclass(part, kind) and not getattr(part, "__abstractmethods__", None):
                assert name in used or name == "MiddleHead", name  # for networks with two heads
    assert all(yaml.safe_load(path.read_text())["model"]["denoiser"] for path in FILES)


@torch.no_grad()
def test_the_weak_model_is_the_one_of_its_configuration_and_weaker(in_root):
    """By the error of x̂0 on digits that neither has seen, at every noise level; and by name, as in the configurations."""
    main_, weak = (calib_guidance.load_pretrained(name) for name in ("digits", "digits_weak"))
    base, own, negative = (
        yaml.safe_load((ROOT / f"lightning_configs/{name}.yaml").read_text())["model"]
        for name in ("fit/digits_diffusion", "fit/digits_weak", "negative/autoguidance")
    )
    trained = base["init_args"]["network"]["init_args"] | own["network"]
    stated = negative["denoiser"]["negative"]["init_args"]["denoiser"]["init_args"]
    assert stated["network"]["init_args"] | {"dropout": 0.1} == trained
    assert stated["checkpoint"] == "checkpoints/digits/weak.safetensors"
    UNet(**trained).load_state_dict(weak.network.state_dict())
    digits = DigitImages(split="heldout")
    x0, y = torch.stack([d["image"] for d in digits]), torch.tensor([d["label"] for d in digits])
    for t in (200, 500, 800):
        abar = main_.schedule.alphas_cumprod[t]
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t))
        x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise
        errors = [float((model(x_t, t, y).x0 - x0).square().mean()) for model in (main_, weak)]
        assert 1.05 * errors[0] < errors[1] < 3 * errors[0]


@torch.no_grad()
def test_the_shipped_model_without_labels_is_an_unconditional_one(in_root):
    """Classifier-free guidance, by a second model."""
    conditional = calib_guidance.load_pretrained("digits")
    negative = UnconditionalModel(calib_guidance.load_pretrained("digits", class_conditional=False))
    x, y = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    found, expected = Combination(conditional, negative=negative), Combination(conditional)
    torch.testing.assert_close(found(x, 500, y).x0, expected(x, 500, y).x0, atol=1e-5, rtol=1e-5)
    assert found.nfe == expected.nfe == 2


def test_a_stabilizer_and_a_rule_run_with_a_classifier_on_top(expected, tmp_path, in_root):
    plain = sample(tmp_path / "plain", "--config=rule/apg")
    steady = sample(tmp_path / "steady", "--config=rule/apg", *STEADY)
    assert not torch.equal(plain, steady)
