"""Every rule and negative that is shipped as a configuration, on the digits, by the command line."""

import pytest
import torch
import yaml

from calib_guidance import denoisers
from calib_guidance.cli import main
from calib_guidance.denoisers import Negative, Rule
from tests.conftest import ROOT
from tests.runs import read_samples

pytestmark = pytest.mark.usefixtures("parts_read_once")

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
                # The default, those of two models, and that of networks with two heads.
                others = ("Unconditional", "UnconditionalModel", "Autoguidance", "MiddleHead")
                assert name in used or name in others, name
    assert all(yaml.safe_load(path.read_text())["model"]["denoiser"] for path in FILES)


def test_a_stabilizer_and_a_rule_run_with_a_classifier_on_top(expected, tmp_path, in_root):
    plain = sample(tmp_path / "plain", "--config=rule/apg")
    steady = sample(tmp_path / "steady", "--config=rule/apg", *STEADY)
    assert not torch.equal(plain, steady)
