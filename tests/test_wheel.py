"""The wheel, installed outside the repository, runs what the README shows."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from calib_guidance.cli import main
from calib_guidance.cli.configs import expand_bases
from tests.conftest import ROOT

SOURCES = ("pyproject.toml", "setup.py", "README.md", "calib_guidance", "lightning_configs", "checkpoints")
FEW = ["--data.num_samples=20", "--data.batch_size=10", "--model.sampler.steps=3", "--trainer.accelerator=cpu"]
FEW += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def run(*command, cwd):
    """Output of a command that finds neither the working tree nor packages of the user."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CALIB_GUIDANCE"))}
    environment = kept | {"PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment that holds the wheel; what it depends on is that of the tests, nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources)
    pip = (sys.executable, "-m", "pip")
    offline = ("--no-deps", "--no-index")
    run(*pip, "wheel", "--no-build-isolation", *offline, "--wheel-dir", folder, sources, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(sources)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env/bin/python"
    run(*pip, "--python", python, "install", *offline, wheel, cwd=folder)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # Folders that a .pth file names are searched, but their own .pth files, such as an editable install's, are not read.
    others = {str(Path(torch.__file__).parents[1]), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(others)))
    return folder / "env"


@pytest.mark.slow
def test_an_installed_wheel_samples_by_name_from_an_empty_folder(environment, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    command = environment / "bin/calib-guidance"
    where = run(environment / "bin/python", "-c", "import calib_guidance; print(calib_guidance.__file__)", cwd=empty)
    assert Path(where.strip()).is_relative_to(environment)
    for folder in ("checkpoints/digits", "checkpoints/cifar10"):
        shipped = {path.name for path in (ROOT / folder).iterdir()}
        assert shipped == {path.name for path in (Path(where.strip()).parent / folder).iterdir()}
    listed = run(command, "configs", cwd=empty)
    assert str(environment) in listed
    assert "\npredict/imagenet128/resnet101_js " in listed
    run(command, "predict", "--config", "digits", *FEW, cwd=empty)
    assert "20 of 20" in run(command, "status", "outputs/digits", cwd=empty)
    assert {path.name for path in (empty / "outputs/digits").iterdir()} >= {"samples", "metrics.json", "config.yaml"}
    # In the repository the name, the path and `make demo` are the same, and so are the samples.
    monkeypatch.chdir(ROOT)
    (tmp_path / "samples_alone.yaml").write_text("trainer: {callbacks: [{class_path: SampleWriter}]}")
    alone = ("--config", str(tmp_path / "samples_alone.yaml"), f"--trainer.default_root_dir={tmp_path / 'here'}")
    main(["predict", "--config", "digits", *alone, *FEW])
    names = sorted(path.name for path in (tmp_path / "here/samples").iterdir())
    assert len(names) == 2
    for name in names:
        found = (empty / "outputs/digits/samples" / name).read_bytes()
        assert found == (tmp_path / "here/samples" / name).read_bytes(), name


def test_the_name_the_path_and_make_demo_are_the_same(in_root):
    by_name, by_path = (
        expand_bases(["predict", "--config", value]) for value in ("digits", "lightning_configs/predict/digits.yaml")
    )
    assert Path(by_name[2]).samefile(by_path[2])
    # As from a shell, also where the tests themselves run under make.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "demo"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert printed.splitlines()[-1].endswith("/calib-guidance predict --config digits")
