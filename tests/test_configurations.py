"""Named configurations, files that are based on others, short names of classes and keys."""

import importlib
import json
from pathlib import Path

import lightning as L
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from calib_guidance.backend.shipped import find_file
from calib_guidance.cli import main
from calib_guidance.cli.configs import configuration_names, expand_bases, find_configuration
from calib_guidance.cli.lightning import CalibGuidanceCLI, run_lightning
from calib_guidance.cli.parsed import read_configuration
from calib_guidance.errors import ConfigurationError
from calib_guidance.samplers import DDIM
from tests.conftest import ROOT
from tests.runs import QUICK


class Own(DDIM):
    """A sampler that is not of this package."""


@pytest.fixture
def write(tmp_path):
    def write(name, **content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def configs(argv):
    assert argv[::2] == ["--config"] * (len(argv) // 2)
    return argv[1::2]


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
    argv = ["predict", f"--config={other}", "--data.seed", "7", "--config"]
    assert expand_bases(argv) == ["predict", "--config", other, "--data.seed", "7", "--config"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"base": "row.yaml"}, "based on itself"),
        ({"base": "nowhere.yaml"}, "row.yaml, base: 'nowhere.yaml' is neither a file in .* nor the name"),
        ({"base": {"a": 1}}, "base must be a configuration file or name"),
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
            "--model.sampler.steps=2",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.accelerator=cpu",
            '--trainer.callbacks=[{"class_path": "SampleWriter"}]',
            "--trainer.enable_progress_bar=false",
        ]
    )
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert "base" not in saved
    assert (
        saved["data"]["init_args"] | {"seed": 5, "num_samples": 10, "labels": "balanced"} == saved["data"]["init_args"]
    )


class TestNames:
    @pytest.mark.parametrize(
        ("name", "command", "path"),
        [
            ("digits", "predict", "predict/digits"),
            ("digits", "experiment", "experiments/digits"),
            ("imagenet128/resnet101_js", "predict", "predict/imagenet128/resnet101_js"),
            ("resnet101_js.yaml", "predict", "predict/imagenet128/resnet101_js"),
            ("imagenet64/edm18_resnet101", "doctor", "predict/imagenet64/edm18_resnet101"),
            ("digits_classifier", "validate", "fit/digits_classifier"),
            ("sampler/ddim", "predict", "sampler/ddim"),
            ("lightning_configs/score/js.yaml", "predict", "score/js"),
        ],
    )
    def test_a_name_is_found_from_any_folder(self, tmp_path, monkeypatch, name, command, path):
        monkeypatch.chdir(tmp_path)
        found = (ROOT / f"lightning_configs/{path}.yaml").resolve()
        assert find_configuration(name, command).resolve() == found

    def test_an_existing_path_wins(self, tmp_path, monkeypatch, write):
        write("digits", seed=1)
        monkeypatch.chdir(tmp_path)
        assert find_configuration("digits", "predict") == Path("digits")

    def test_a_base_may_be_a_name(self, write):
        row = write("row.yaml", base=["digits", "sampler/ddim"], seed_everything=3)
        files = configs(expand_bases(["predict", "--config", row])[1:])
        assert [Path(f).name for f in files[:2]] == ["digits.yaml", "ddim.yaml"]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "digist",
                r"neither a file nor the name of a configuration \(did you mean predict/digits\?\); `calib-guidance",
            ),
            (
                "nothing/like_it",
                "neither a file nor the name of a configuration; `calib-guidance configs` lists the names",
            ),
            ("entropy", "several configurations are named 'entropy': give one of predict/.*/entropy, score/entropy"),
        ],
    )
    def test_what_no_configuration_is_named(self, name, message):
        with pytest.raises(ConfigurationError, match=message):
            expand_bases(["predict", "--config", name])

    def test_text_stays_text(self):
        for text in ("{seed_everything: 1}", "a: 1", "a: 1\nb: 2"):
            assert expand_bases(["predict", f"--config={text}"]) == ["predict", "--config", text]

    def test_the_command_lists_them(self, capsys):
        main(["configs"])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[2:]] == configuration_names()
        main(["configs", "edm18"])
        assert "predict/imagenet64/edm18_resnet101  EDM-64 guided by" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main(["configs", "nothing"])
        assert "no configuration has 'nothing' in its name" in capsys.readouterr().err

    def test_every_configuration_says_first_what_it_is(self):
        for name in configuration_names():
            assert (ROOT / f"lightning_configs/{name}.yaml").read_text().startswith("# "), name

    def test_shipped_weights_are_found_from_any_folder(self, tmp_path, monkeypatch):
        weights = "checkpoints/digits/diffusion.safetensors"
        monkeypatch.chdir(tmp_path)
        assert find_file(weights).samefile(ROOT / weights)
        assert find_file("checkpoints/nothing.safetensors") == Path("checkpoints/nothing.safetensors")
        assert find_file("README.md") == Path("README.md")
        (tmp_path / "checkpoints/digits").mkdir(parents=True)
        (tmp_path / weights).write_bytes(b"mine")
        assert find_file(weights) == Path(weights)


class TestShortNames:
    """The same configuration, however its classes and keys are written."""

    @pytest.fixture
    def read(self):
        return lambda *options: read_configuration(["--config=digits", *options]).options.as_dict()

    def test_keys(self, read):
        long = "--model.init_args.guidance.init_args.schedule.init_args.gamma=0.2", "--data.init_args.seed=3"
        short = read("--model.guidance.schedule.gamma=0.2", "--data.seed=3")
        assert short["data"]["init_args"]["seed"] == 3
        assert short == read(*long)

    def test_classes(self, read, write):
        long = "--model.init_args.sampler=calib_guidance.samplers.DDIM", "--model.init_args.sampler.init_args.steps=7"
        file = write("short.yaml", model={"sampler": {"class_path": "DDIM", "init_args": {"steps": "7"}}})
        short = read("--model.sampler=DDIM", "--model.sampler.steps=7")
        assert short["model"]["init_args"]["sampler"]["class_path"] == "calib_guidance.samplers.DDIM"
        assert short == read(*long)
        assert short["model"] == read(f"--config={file}")["model"]

    def test_classes_of_ones_own_keep_their_module(self, read, write):
        sampler = read("--model.sampler=tests.test_configurations.Own", "--model.sampler.steps=4")["model"][
            "init_args"
        ]["sampler"]
        assert sampler["class_path"] == "tests.test_configurations.Own"
        assert sampler["init_args"]["steps"] == "4"

    def test_a_name_that_libraries_share_is_ours_or_refused(self, read, write):
        importlib.import_module("timm")  # has a ResNet too
        network = {"class_path": "GroupNorm", "init_args": {"channels": 32}}
        file = write("ours.yaml", model={"guidance": {"classifier": {"network": network}}})
        found = read(f"--config={file}")["model"]["init_args"]["guidance"]["init_args"]["classifier"]["init_args"][
            "network"
        ]
        assert found["class_path"] == "calib_guidance.networks.adm.GroupNorm"
        file = write("shared.yaml", model={"guidance": {"classifier": {"network": {"class_path": "ResNet"}}}})
        with pytest.raises(
            ConfigurationError,
            match=r"classifier.network: several classes are named ResNet: give one of .*timm.models.ResNet",
        ):
            read(f"--config={file}")

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--model.sampler=DDIMM", "model.sampler: there is no DDIMM (did you mean 'DDIM'?)"),
            ("--model.sampler=Tilted", "model.sampler: calib_guidance.scores.Tilted cannot be used here"),
            (
                "--model.sampler.guidance_scaling=big",
                "sampler.guidance_scaling: unknown 'big'; known:",
            ),
            ("--model.guidance.apply_to=x", "guidance.apply_to: unknown 'x'; known: score, cfg_residual, sample"),
            ("--model.denoiser.prediction=score", "denoiser.prediction: unknown 'score'; known: epsilon, v, x0"),
            ("--trainer.callbacks+=SampleWritr", "there is no SampleWritr (did you mean 'SampleWriter'?)"),
        ],
    )
    def test_a_misspelled_class_or_choice(self, read, option, message):
        with pytest.raises(ConfigurationError) as refused:
            read(option)
        assert message in str(refused.value)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver", "dpm_solver_sde", "unipc"])
def test_overlays_of_samplers_make_digits(in_root, write, tmp_path, name):
    """25 evaluations each; the evaluation classifier names most of what was asked for."""
    callbacks = yaml.safe_load(Path("lightning_configs/predict/digits.yaml").read_text())["trainer"]["callbacks"]
    needed = [c for c in callbacks if c["class_path"] in ("SampleWriter", "SampleQuality", "RunReport")]
    fewer = write("fewer.yaml", trainer={"callbacks": needed})
    main(
        [
            "predict",
            "--config=digits",
            "--config=score/plain",
            f"--config=sampler/{name}",
            f"--config={fewer}",
            "--data.num_samples=20",
            "--data.batch_size=20",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )
    settings = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["init_args"]["sampler"]
    assert settings["class_path"].lower().endswith(name.removesuffix("_sde").replace("_", ""))
    assert settings["init_args"]["clip_denoised"]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["classifier_accuracy"] >= 0.8


class Saves(L.LightningModule):
    def __init__(self, width: int = 3):
        super().__init__()
        self.save_hyperparameters()


class Built(CalibGuidanceCLI):
    def _run_subcommand(self, subcommand):
        """All parts are made, and nothing is run."""


def test_a_users_module_may_save_its_hyperparameters(in_root):
    """Checkpoints know what to build then; for the modules of this package nothing is dumped, which takes as long as parsing."""
    words = ["fit", "--model=tests.test_configurations.Saves", "--model.width=5", "--data=Digits", *QUICK]
    found = run_lightning(words, Built).model.hparams
    assert (found["width"], found["_class_path"]) == (5, "tests.test_configurations.Saves")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LightningCLI, "_dump_config", lambda self: pytest.fail("the configuration was dumped"))
        run_lightning(["predict", "--config=digits", *QUICK], Built)
