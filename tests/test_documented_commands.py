"""The commands of README, tutorial and the page of evaluation, run one after the other on fewer samples and steps.

Pages of ImageNet's rows are not here: each row runs in test_published_configs, each fit in test_fit_imagenet. The other pages:
docs/own_images.md runs in test_docs, docs/cluster.md in test_sampling_processes, docs/cifar10.md in test_cifar10, and
docs/experiments.md in test_experiments.
"""

import json
import shlex

import pytest
import yaml

from calib_guidance.cli import main
from tests.conftest import ROOT
from tests.test_readme import PAGES, text

SMALLER = {
    "fit": [
        "--trainer.max_epochs=1",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=2",
    ],
    "predict": ["--data.num_samples=60", "--data.batch_size=60", "--model.sampler.steps=3"],
    "experiment": ["--dry-run"],
}
SMALLER["fit"] += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
SMALLER["predict"] += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
IMAGENET = ("imagenet", "dinov2", "inception")  # their weights and images cannot be here


def commands(page, of_imagenet=False):
    """Words of the commands of a page, in order."""
    lines = text(page).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("calib-guidance ")]
    return [words for words in found if of_imagenet or not any(name in word for name in IMAGENET for word in words)]


def run(words):
    """Run one command; ``status`` exits with what it found."""
    status = 0
    try:
        main([*words, *SMALLER.get(words[0], [])])
    except SystemExit as stop:
        status = stop.code
    assert not status, words


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    """As a user runs them after `pip install`, anywhere."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorial(in_empty_folder):
    ran = [words for words in commands("docs/tutorial.md") if words[0] != "app"]  # test_app opens the page
    for words in ran:
        run(words)
    assert {words[0] for words in ran} == {"fit", "predict", "status", "report", "experiment"}
    runs = ("unguided", "plain", "calibrated", "tempered", "ddpm")
    found = [
        json.loads(in_empty_folder.joinpath("outputs/tutorial", name, "metrics.json").read_text()) for name in runs
    ]
    assert [result["num_samples"] for result in found] == [60] * len(runs)
    assert "gradient_norm_t" in found[2]
    assert (in_empty_folder / "tutorial.html").stat().st_size > 10_000


def test_readme_and_evaluation(in_empty_folder, capsys):
    """Runs of the README, then what docs/evaluate.md does with two runs, a reference and a classifier."""
    for words in commands("README.md"):
        run(words)
    for words in commands("docs/evaluate.md"):
        if words[0] in ("report", "predict"):
            run(words)
    for path in ("outputs/digits/report.html", "tilted.html", "outputs/grid/metrics.json"):
        assert (in_empty_folder / path).stat().st_size > 1000, path
    assert list((in_empty_folder / "plots").iterdir())

    classifier = yaml.safe_load((ROOT / "lightning_configs/digits/measured_only.yaml").read_text())["trainer"][
        "callbacks"
    ][1]
    classifier = classifier["init_args"]["features"]["init_args"]["classifier"]
    (in_empty_folder / "eval_classifier.yaml").write_text(yaml.safe_dump(classifier))
    places = {"outputs/plain": "outputs/digits", "outputs/js": "outputs/tilted", "theirs.npz": "samples.npz"}
    run(["export", "outputs/digits", "--to", "npz", "--output", "samples.npz"])
    run(["reference", "samples.npz", "--features", "classifier:eval_classifier.yaml", "--output", "heldout.npz"])
    (compared,) = [words for words in commands("docs/evaluate.md") if "outputs/plain" in words]
    capsys.readouterr()
    run([places.get(word, word) for word in compared])
    assert "A − B" in capsys.readouterr().out


def test_pages_with_commands_are_known():
    """A new page with commands runs here, or is named above with the test that runs its commands."""
    here = {"README.md", "docs/tutorial.md", "docs/evaluate.md"}
    rows = {"lightning_configs/README.md", "docs/own_classifier.md", "docs/own_model.md", "docs/calibration.md"}
    elsewhere = {"docs/own_images.md", "docs/cluster.md", "docs/cifar10.md", "docs/experiments.md"}
    assert {page for page in PAGES if commands(page, of_imagenet=True)} == here | rows | elsewhere
