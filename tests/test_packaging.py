"""Extras, versions and hooks: what pyproject.toml says, and the files that must agree with it."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from calib_guidance.classifiers import CLIPClassifier
from calib_guidance.denoisers import TinyDecoder, VAEDecoder
from calib_guidance.denoisers.from_diffusers import process_of
from calib_guidance.denoisers.prompts import text_pipeline
from calib_guidance.evaluation import CLIPFeatures, InceptionFeatures
from calib_guidance.networks import DiT
from calib_guidance.weights.ldm_vae import ldm_decoder
from tests.conftest import ROOT
from tests.runs import refused

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FEATURES = {
    "a transformer": ("diffusers", "diffusers", DiT),
    "an autoencoder": ("diffusers", "diffusers", lambda: VAEDecoder({})),
    "a tiny autoencoder": ("diffusers", "diffusers", lambda: TinyDecoder({})),
    "an autoencoder of latent diffusion": ("diffusers", "diffusers", lambda: ldm_decoder({})),
    "a scheduler": ("diffusers", "diffusers", lambda: process_of({"_class_name": "DDPMScheduler"})),
    "prompts": ("transformers", "text", lambda: text_pipeline("folder")),
    "prompts, without diffusers": ("diffusers", "text", lambda: text_pipeline("folder")),
    "CLIP": ("open_clip", "clip", lambda: CLIPClassifier(["a cat", "a dog"])),
    "CLIP's features": ("open_clip", "clip", CLIPFeatures),
    "Inception": ("torch_fidelity", "eval", InceptionFeatures),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_names_the_extra_that_it_needs(feature, monkeypatch):
    library, extra, use = FEATURES[feature]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"needs {library}, .*pip install 'calib-guidance\[{extra}\]'"):
        use()
    assert any(library in re.sub("[-.]", "_", requirement) for requirement in EXTRAS[extra])


def test_lightnings_logger_names_its_extra(monkeypatch, tmp_path, capsys):
    for module in ("lightning.fabric.loggers.tensorboard", "lightning.pytorch.loggers.tensorboard"):
        for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
            monkeypatch.setattr(f"{module}.{name}", False, raising=False)
    logger = f"--trainer.logger.init_args.save_dir={tmp_path}"
    message = refused(capsys, "fit", "--config=digits_classifier", "--trainer.logger=TensorBoardLogger", logger)
    assert "pip install 'calib-guidance[tensorboard]'" in message


def test_what_the_readme_starts_with_needs_no_extra():
    """With every library hidden that only an extra installs, its first example runs and its first command is read."""
    extras = ("app", "clip", "diffusers", "eval", "text")
    names = {re.match(r"[\w-]+", requirement)[0] for extra in extras for requirement in EXTRAS[extra]}
    hidden = [name.replace("-", "_").removesuffix("_torch") for name in names]
    assert {"diffusers", "gradio", "open_clip", "torch_fidelity", "transformers"} == {*hidden}
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden}))\n"
        "from calib_guidance.cli import main\n"
        "try: main(['predict', '--config=digits', '--print_config'])\n"
        f"except SystemExit as stop: assert not stop.code\n{example}\n"
        "assert images.shape == (10, 1, 8, 8)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_extra_is_documented_and_tested():
    table = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs/install.md").read_text(), re.MULTILINE)
    assert {name for cell in table for name in re.findall(r"`(\w+)`", cell)} == set(EXTRAS)
    assert {requirement for extra in EXTRAS if extra != "docs" for requirement in EXTRAS[extra]} <= set(EXTRAS["test"])


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert citation["version"] == newest == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_hooks_run_the_versions_of_make_lint():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for hook in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        name = re.match("ruff|codespell", hook["hooks"][0]["id"])[0]
        assert hook["rev"] == f"v{pinned[name]}"
