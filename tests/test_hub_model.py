"""Trained models as repositories of the Hub, without a network: the library's cache stands for the Hub."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from calib_guidance.cli import main
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation import read_classifier
from calib_guidance.evaluation.hub_model import HubModel

SHORT = ["--trainer.accelerator=cpu", "--trainer.logger=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a short ``fit`` of a classifier on x_t wrote."""
    root = tmp_path_factory.mktemp("fit")
    options = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", f"--trainer.default_root_dir={root}"]
    main(["fit", "--config=digits_calibration", "--config=digits/noisy_inputs", *SHORT, *options])
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that keeps what is pushed to it in the cache that is read from."""
    cache = tmp_path / "cache"

    def upload(self, *, repo_id, folder_path, **options):
        repo = cache / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder_path, repo / "snapshots" / ("0" * 40))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)

    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(api, "upload_folder", upload)
    return {"cache_dir": cache, "local_files_only": True}


def test_a_classifier_comes_back_from_the_hub(folder, hub):
    HubModel.from_fit(folder).push_to_hub("me/digits", model_card_kwargs={"license": "mit"})
    model = HubModel.from_pretrained("me/digits", **hub)
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    trained = read_classifier(folder / "classifier.yaml").eval()
    assert torch.equal(model.module.eval()(x), trained(x))
    again = read_classifier(model.folder / "classifier.yaml").eval()  # what a predict configuration names
    assert torch.equal(again(x), trained(x))
    assert json.loads((model.folder / "config.json").read_text()) == yaml.safe_load(
        (folder / "classifier.yaml").read_text()
    )
    assert ModelCard.load(model.folder / "README.md").data.license == "mit"


def test_the_card_has_data_training_and_the_calibration_of_the_last_report(folder, tmp_path):
    HubModel.from_fit(folder).save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.library_name == "calib_guidance"
    (path,) = (folder / "calibration").glob("val-step*.json")
    report = json.loads(path.read_text())
    numbers = [report["accuracy"]["overall"], *report["ece"]["by_level"]]
    assert len(report["ece"]["by_level"]) == 5
    assert all(f"{number:.4f}" in card.text for number in numbers)
    for text in ("`Digits`", "noisy images x_t", "cross-entropy", "`SmallResNet`", "## Intended use", "t = 800–999"):
        assert text in card.text


def test_a_card_that_was_edited_is_kept(folder, tmp_path):
    saved = tmp_path / "saved"
    HubModel.from_fit(folder).save_pretrained(saved)
    (saved / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    HubModel.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text().endswith("Mine.\n")


def test_a_diffusion_model_comes_back(tmp_path, hub):
    fitted = tmp_path / "fit"
    main(["fit", "--config=digits_diffusion", *SHORT, "--trainer.max_steps=1", f"--trainer.default_root_dir={fitted}"])
    HubModel.from_fit(fitted).push_to_hub("me/diffusion")
    model = HubModel.from_pretrained("me/diffusion", **hub)
    weights = load_file(fitted / "network.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.module.network.state_dict().items())
    assert model.module.image_shape == (1, 8, 8)
    assert (model.module.prediction, model.module.num_classes) == ("v", 10)
    assert "`TrainDiffusion`" in (model.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_path": "os.system"}, "names the class os.system"),
        (
            {"init_args": {"network": {"class_path": "subprocess.Popen", "init_args": {"args": "true"}}}},
            "subprocess.Popen",
        ),
        ({"init_args": {"weights": "../classifier.safetensors"}}, "outside of its folder"),
    ],
)
def test_a_downloaded_description_runs_no_other_code(folder, tmp_path, change, message):
    saved = tmp_path / "saved"
    HubModel.from_fit(folder).save_pretrained(saved)
    description = yaml.safe_load((saved / "classifier.yaml").read_text())
    (saved / "classifier.yaml").write_text(yaml.safe_dump(description | change))
    with pytest.raises(ConfigurationError, match=message):
        HubModel.from_pretrained(saved)


def test_a_folder_without_an_export_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"config\.yaml"):
        HubModel.from_fit(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {class_path: TrainDiffusion, init_args: {}}\n")
    with pytest.raises(ConfigurationError, match="ExportWeights"):
        HubModel.from_fit(tmp_path)
