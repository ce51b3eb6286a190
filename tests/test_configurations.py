"""Configuration files that are based on others."""

import json
from pathlib import Path

import pytest
import yaml

from calib_guidance.cli import main
from calib_guidance.cli.configs import expand_bases
from calib_guidance.errors import ConfigurationError


@pytest.fixture
def write(tmp_path):
    def write(name, **content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def configs(words):
    assert words[::2] == ["--config"] * (len(words) // 2)
    return words[1::2]


def test_bases_come_first_and_are_relative_to_the_file(write):
    write("common/base.yaml", seed=1)
    write("common/middle.yaml", base="base.yaml", seed=2)
    other = write("other.yaml", seed=3)
    row = write("row.yaml", base=["common/middle.yaml", "other.yaml"], seed=4)
    found = configs(expand_bases(["--config", row]))
    texts = [f if "\n" in f else Path(f).read_text() for f in found]
    assert [yaml.safe_load(text)["seed"] for text in texts] == [1, 2, 3, 4]
    assert found[2].endswith("other.yaml")
    # A file without a base, and every other word, stay as they are.
    words = ["predict", f"--config={other}", "--data.seed", "7", "--config"]
    assert expand_bases(words) == ["predict", "--config", other, "--data.seed", "7", "--config"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"base": "row.yaml"}, "based on itself"),
        ({"base": "nowhere.yaml"}, "row.yaml: no such file: .*nowhere.yaml"),
        ({"base": {"a": 1}}, "base must be the path"),
    ],
)
def test_bases_that_cannot_be(write, content, message):
    with pytest.raises(ConfigurationError, match=message):
        expand_bases(["-c", write("row.yaml", **content)])


def test_a_row_runs_and_what_is_saved_stands_alone(in_root, write, tmp_path):
    row = write(
        "row.yaml", base=str(in_root / "lightning_configs/predict/digits.yaml"), data={"init_args": {"seed": 5}}
    )
    later = write("later.yaml", data={"init_args": {"num_samples": 10, "batch_size": 10}})
    main(
        [
            "predict",
            f"--config={row}",
            f"--config={later}",
            "--model.init_args.sampler.init_args.steps=2",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.accelerator=cpu",
            "--trainer.callbacks=null",
            "--trainer.enable_progress_bar=false",
        ]
    )
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert "base" not in saved
    assert (
        saved["data"]["init_args"] | {"seed": 5, "num_samples": 10, "labels": "balanced"} == saved["data"]["init_args"]
    )


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver", "dpm_solver_sde", "unipc"])
def test_overlays_of_samplers_make_digits(in_root, write, tmp_path, name):
    """25 evaluations each; the evaluation classifier names most of what was asked for."""
    callbacks = yaml.safe_load(Path("lightning_configs/predict/digits.yaml").read_text())["trainer"]["callbacks"]
    needed = [
        c for c in callbacks if c["class_path"].rsplit(".", 1)[1] in ("SampleWriter", "SampleQuality", "RunReport")
    ]
    fewer = write("fewer.yaml", trainer={"callbacks": needed})
    main(
        [
            "predict",
            "--config=lightning_configs/predict/digits.yaml",
            "--config=lightning_configs/score/plain.yaml",
            f"--config=lightning_configs/sampler/{name}.yaml",
            f"--config={fewer}",
            "--model.init_args.guidance.init_args.schedule.init_args.gamma=0",
            "--data.init_args.num_samples=50",
            "--data.init_args.batch_size=50",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )
    settings = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["init_args"]["sampler"]
    assert settings["class_path"].lower().endswith(name.removesuffix("_sde").replace("_", ""))
    assert settings["init_args"]["clip_denoised"]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["classifier_accuracy"] >= 0.8
