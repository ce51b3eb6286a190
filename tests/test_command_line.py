"""Help, versions and what a command says before it runs anything."""

import contextlib
import inspect
import os
import pkgutil
import re
import socket
import sys
from importlib.metadata import version

import pytest
import torch
import yaml
from lightning.pytorch.accelerators import MPSAccelerator

from calib_guidance.cli import configs, main
from calib_guidance.cli.configs import configuration_names
from calib_guidance.cli.docstrings import plain
from calib_guidance.cli.parsed import read_configuration
from calib_guidance.data.base import SourceOptions
from calib_guidance.data.source import source_kind
from calib_guidance.errors import ConfigurationError
from tests.conftest import ROOT

MARKS = re.compile(r"``|:\w+:`|`~|::")


@pytest.fixture
def printed(capsys):
    def printed(*argv):
        with contextlib.suppress(SystemExit):  # argparse's, after --help
            main(argv)
        captured = capsys.readouterr()
        assert "error" not in captured.err
        return captured.out

    return printed


def test_version(printed):
    text = printed("--version")
    assert text.startswith(f"calib-guidance {version('calib_guidance')} (torch {version('torch')}, ")


class TestHelp:
    @pytest.mark.parametrize(
        ("docstring", "text"),
        [
            ("A :class:`~a.b.Name`, see :func:`a.f`.", "A Name, see a.f."),
            ("``x0`` or ``x_t``::\n\n    code", "x0 or x_t:\n\n    code"),
            ("`Page <https://example.org>`_", "Page (https://example.org)"),
            ("broken ``over\n lines``", "broken over\n lines"),
            ("a::b and `name`", "a::b and `name`"),
            (None, None),
        ],
    )
    def test_marks_of_restructuredtext_become_text(self, docstring, text):
        assert plain(docstring) == text

    @pytest.mark.parametrize(
        "argv",
        [
            ("predict", "--help"),
            ("predict", "--model.help", "GuidedSampling"),
            ("predict", "--config=digits", "--model.guidance.help", "ClassifierGuidance"),
            ("fit", "--trainer.callbacks.help", "ExportClassifier"),
            *((name, "--help") for name in ("configs", "doctor", "evaluate", "experiment", "export")),
            *((name, "--help") for name in ("reference", "report", "status")),
        ],
    )
    def test_help_is_plain_text(self, printed, argv):
        text = printed(*argv)
        assert len(text) > 200
        assert not MARKS.findall(text)

    def test_a_configuration_with_comments(self, printed):
        plain_yaml = printed("predict", "--config=digits", "--print_config")
        commented = printed("predict", "--config=digits", "--print_config=comments")
        assert yaml.safe_load(commented) == yaml.safe_load(plain_yaml)
        assert "# s; 0 switches guidance off" in commented
        assert not MARKS.findall(commented)


class TestForeignCode:
    """A configuration that names a class from outside the libraries is listed before its module is imported."""

    @pytest.fixture(autouse=True)
    def module(self, tmp_path, monkeypatch):
        monkeypatch.setattr(configs, "_listed", set())
        text = "import sys\nprint('imported', file=sys.stderr)\nfrom calib_guidance.samplers import DDIM\n"
        (tmp_path / "foreign_part.py").write_text(text + "class Own(DDIM):\n    '''A sampler.'''\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield
        sys.modules.pop("foreign_part", None)

    @pytest.mark.parametrize("place", ["file", "base", "option"])
    def test_it_is_listed_first(self, tmp_path, capsys, place):
        own = {"model": {"sampler": {"class_path": "foreign_part.Own", "init_args": {"steps": "2"}}}}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
        (tmp_path / "row.yaml").write_text(yaml.safe_dump({"base": ["digits", "own.yaml"], "seed_everything": 1}))
        words = {
            "file": ["--config=digits", f"--config={tmp_path / 'own.yaml'}"],
            "base": [f"--config={tmp_path / 'row.yaml'}"],
            "option": ["--config=digits", "--model.sampler=foreign_part.Own"],
        }[place]
        read_configuration(words)
        err = capsys.readouterr().err
        assert err.count("runs code from outside calib_guidance, torch") == 1
        assert err.index("foreign_part.Own") < err.index("imported")

    def test_a_classifier_file_that_evaluate_reads(self, tmp_path, capsys):
        (tmp_path / "classifier.yaml").write_text("class_path: foreign_part.Own\ninit_args: {}\n")
        words = ["nothing.npz", "--reference", "nothing.npz", "--eval-classifier", str(tmp_path / "classifier.yaml")]
        with pytest.raises(SystemExit):
            main(["evaluate", *words])
        assert "foreign_part.Own" in capsys.readouterr().err.splitlines()[0]

    def test_names_in_lists_and_mappings(self):
        node = {"metrics": ["fid", "foreign_part.NEAREST"], "file": "classes.txt", "weights": "a/b.safetensors"}
        node["network"] = {"class_path": "foreign_part.Own", "init_args": {"head": {"class_path": "torch.nn.Linear"}}}
        assert list(configs.foreign_names(node)) == ["foreign_part.NEAREST", "foreign_part.Own"]

    def test_no_configuration_of_this_package_is_listed(self):
        for name in configuration_names():
            node = yaml.safe_load((ROOT / f"lightning_configs/{name}.yaml").read_text())
            assert not list(configs.foreign_names(node)), name


class TestOptimizers:
    """Options that jsonargparse hands from one class to another are those that were stated."""

    def optimizer(self, tmp_path, content):
        model = {"class_path": "TrainDiffusion", "init_args": {"network": "SmallResNet", "optimizer": content}}
        (tmp_path / "fit.yaml").write_text(yaml.safe_dump({"model": model, "data": "Digits"}))
        chosen = read_configuration([f"--config={tmp_path}/fit.yaml"]).options.model.init_args.optimizer
        return chosen.class_path, chosen.init_args

    @pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop", "AdamW"])
    def test_a_named_optimizer_has_its_own_defaults(self, tmp_path, name):
        path, options = self.optimizer(tmp_path, {"class_path": name, "init_args": {"lr": 0.05}})
        own = inspect.signature(getattr(torch.optim, name)).parameters
        assert pkgutil.resolve_name(path) is getattr(torch.optim, name)
        for option, value in options.items():
            expected = 0.05 if option == "lr" else own[option].default
            assert (tuple(value) if isinstance(value, list) else value) == expected, option

    def test_options_without_a_class_are_those_of_the_default(self, tmp_path):
        path, options = self.optimizer(tmp_path, {"lr": 2.0e-5})
        assert pkgutil.resolve_name(path) is torch.optim.AdamW
        assert (options.lr, options.weight_decay) == (2.0e-5, 0.01)

    def test_stated_options_go_to_the_class_of_an_overlay(self, tmp_path):
        (tmp_path / "over.yaml").write_text(yaml.safe_dump({"model": {"optimizer": {"class_path": "Adam"}}}))
        self.optimizer(tmp_path, {"class_path": "AdamW", "init_args": {"lr": 0.3, "weight_decay": 0.2}})
        files = (f"--config={tmp_path}/{name}.yaml" for name in ("fit", "over"))
        options = read_configuration([*files]).options.model.init_args.optimizer.init_args
        assert (options.lr, options.weight_decay) == (0.3, 0.2)


class TestPlatforms:
    def test_windows_is_refused(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "platform", "win32")
        with pytest.raises(SystemExit) as stop:
            main(["status", "outputs/digits"])
        assert stop.value.code == 2
        assert "Windows is not supported" in capsys.readouterr().err

    def test_apples_gpus_have_no_float64(self, monkeypatch):
        monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
        assert read_configuration(["--config=digits"]).options.trainer.accelerator == "cpu"
        assert read_configuration(["--config=digits_classifier"]).options.trainer.accelerator == "cpu"
        with pytest.raises(
            ConfigurationError, match="trainer.accelerator: mps is MPS here, which has no float64: set it"
        ):
            read_configuration(["--config=digits", "--trainer.accelerator=mps"])

    def test_nothing_needs_linuxs_affinity(self, in_root, tmp_path, monkeypatch, capsys):
        """macOS has no os.sched_getaffinity: sampling, writing and measuring do without."""
        monkeypatch.delattr(os, "sched_getaffinity")
        words = [
            "--data.num_samples=10",
            "--data.batch_size=10",
            "--model.sampler.steps=2",
            "--trainer.accelerator=cpu",
        ]
        main(["predict", "--config=digits", *words, f"--trainer.default_root_dir={tmp_path}"])
        assert (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    "callback", ["SampleWriter.uint8_rule", "ExportClassifier.mode", "ExportClassifier.temperature"]
)
def test_options_with_a_fixed_set_of_values_list_them(callback):
    name, _, option = callback.partition(".")
    with pytest.raises(ConfigurationError, match=rf"trainer.callbacks.{option}: unknown 'x'; known: \w+, \w+"):
        read_configuration(["--config=digits", f"--trainer.callbacks+={name}", f"--trainer.callbacks.{option}=x"])


@pytest.mark.parametrize(("wrong", "near"), [("outputs/digist", " (did you mean 'digits'?)"), ("outputs/other", "")])
def test_a_misspelt_run_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch, capsys, wrong, near):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/digits").mkdir(parents=True)
    (tmp_path / "outputs/digits/run.json").write_text("{}")
    (tmp_path / "reference.npz").touch()
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("asked the network"))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("asked the network"))
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", wrong, "--reference", "reference.npz"])
    assert stop.value.code == 2
    assert f"there is no {wrong.rpartition('/')[2]} in outputs{near}" in capsys.readouterr().err


def test_a_hub_id_beside_a_folder_of_its_owner_stays_one(tmp_path, monkeypatch):
    """ImageNet's archive unpacks into a folder named as its owner."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ILSVRC/Data").mkdir(parents=True)
    assert source_kind(SourceOptions("ILSVRC/imagenet-1k")) == "hub"
