"""Names of classes travel with the samples: into the files, the exports and the evaluation."""

import datasets
import pytest
import yaml
from torch import nn

from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.cli import main
from calib_guidance.data import ImageSet, imagenet_names
from calib_guidance.data.imagenet import read_class_names, same_classes
from calib_guidance.errors import ConfigurationError
from calib_guidance.report.runs import open_runs
from tests.conftest import ROOT
from tests.image_files import pictures, write

NAMES = [f"digit {word}" for word in ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]]


def predict(folder, *arguments):
    overlay = {"trainer": {"callbacks": [{"class_path": "SampleWriter"}]}}
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    options = (
        *("--config=lightning_configs/predict/digits.yaml", f"--config={folder / 'overlay.yaml'}"),
        *("--model.sampler.steps=2", "--data.num_samples=10", "--data.batch_size=10"),
        *(f"--trainer.default_root_dir={folder / 'run'}", "--trainer.accelerator=cpu"),
    )
    main(["predict", *options, *arguments])
    return folder / "run"


@pytest.mark.parametrize("stated", ["data", "classifier"])
def test_names_of_samples(tmp_path, monkeypatch, capsys, stated):
    monkeypatch.chdir(ROOT)
    place = "--data.class_names" if stated == "data" else "--model.guidance.classifier.class_names"
    run = predict(tmp_path, f"{place}={NAMES}")
    table = datasets.load_dataset("parquet", data_files=str(run / "samples/*.parquet"), cache_dir=tmp_path)["train"]
    assert table.features["label"] == datasets.ClassLabel(names=NAMES)
    assert ImageSet(run).source.class_names == NAMES
    main(["export", str(run), "--to=png"])
    assert {path.name for path in (run / "samples_png").iterdir()} == set(NAMES)
    main(["export", str(run), "--to=hf"])
    assert datasets.load_from_disk(str(run / "samples_hf")).features["label"].names == NAMES
    (found,) = open_runs([run], {})
    assert [found.class_name(number) for number in range(10)] == NAMES
    capsys.readouterr()
    predict(tmp_path, "--data.class_names=null")  # names are not pixels: the same run, complete
    assert "holds the samples of another configuration" not in capsys.readouterr().err


def test_without_names_labels_are_numbers_of_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = predict(tmp_path)
    table = datasets.load_dataset("parquet", data_files=str(run / "samples/*.parquet"), cache_dir=tmp_path)["train"]
    assert table.features["label"] == datasets.ClassLabel(names=[str(number) for number in range(10)])
    assert ImageSet(run).source.class_names is None
    main(["export", str(run), "--to=png"])
    assert {path.name for path in (run / "samples_png").iterdir()} == {f"{number:04d}" for number in range(10)}


def test_forms_of_names(tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert read_class_names(str(tmp_path / "names.txt"), 2) == ["a", "b"]
    assert read_class_names("imagenet", 1000) == imagenet_names()[0]
    for names, message in (
        (["a", "a"], "2 names, 1 of them different, for 2 classes"),
        (["a"], "1 names, 1 of them different, for 2 classes"),
        ("nothing.txt", "'nothing.txt' is neither imagenet nor a text file"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            read_class_names(names, 2)


def test_equal_numbers_must_be_equal_classes(tmp_path, capsys):
    """A folder that lacks a class numbers the others again: its labels are not those of the classifier."""
    assert same_classes(["n01440764", "n01443537"], ["tench", "goldfish"])
    assert not same_classes(["n01440764", "n01443537"], ["goldfish", "tench"])
    assert same_classes(["0", "1", "2"], ["tench", "goldfish"])  # numbers say nothing
    pixels, labels = pictures(30)
    names = ["class 0", "class 1", "class 2"]
    reference = write(tmp_path / "all", "class folders", pixels, labels)
    samples = write(tmp_path / "some", "class folders", pixels[labels != 1], labels[labels != 1])
    classifier = OffTheShelfClassifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), 3, class_names=names)
    assert classifier.class_names == names
    (tmp_path / "guide.yaml").write_text(
        yaml.safe_dump(
            {
                "class_path": "OffTheShelfClassifier",
                "init_args": {
                    "network": {"class_path": "SmallResNet", "init_args": {"num_classes": 3, "in_channels": 3}},
                    "num_classes": 3,
                    "class_names": names,
                },
            }
        )
    )
    guide = f"classifier:{tmp_path / 'guide.yaml'}"
    arguments = ["evaluate", str(samples), f"--reference={reference}", f"--features={guide}", "--allow-few"]
    with pytest.raises(SystemExit):
        main([*arguments, f"--output={tmp_path / 'out'}"])
    message = "numbers the classes class 0, class 2, the reference"
    assert message in capsys.readouterr().err
    (samples / "class 1").mkdir()
    main([*arguments, f"--output={tmp_path / 'out'}"])
    said = capsys.readouterr().out
    assert "20 images, 3 classes: class 0, class 1, class 2" in said
    assert "30 images, 3 classes: class 0, class 1, class 2" in said
