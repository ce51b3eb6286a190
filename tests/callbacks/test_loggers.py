"""Every Lightning logger gets metrics, plots and hyper-parameters; a resumed run continues its logs."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from calib_guidance.cli import main
from tests.tasks.test_calibrate_classifier import fit


class Images(Logger):
    """A logger with the interface of WandbLogger, which writes what it is given to a file."""

    name, version = "images", "0"

    def __init__(self, save_dir: str):
        super().__init__()
        self.path = Path(save_dir, "log.jsonl")

    def _write(self, *line):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(line, default=float) + "\n")

    def log_metrics(self, metrics, step=None):
        self._write("metrics", metrics, step)

    def log_hyperparams(self, params, *args, **kwargs):
        self._write("hyper-parameters", params)

    def log_image(self, key, images, step=None, **kwargs):
        assert all(Path(image).read_bytes().startswith(b"\x89PNG") for image in images)
        self._write("image", key, step)

    def log_video(self, key, videos, step=None, format=None):
        assert format == ["gif"]
        assert all(Path(video).read_bytes().startswith(b"GIF") for video in videos)
        self._write("video", key, step)


def loggers(folder):
    names = ("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger", f"{__name__}.Images")
    return [{"class_path": name, "init_args": {"save_dir": str(folder / name.rpartition(".")[2])}} for name in names]


class Logged:
    """What three loggers were given."""

    def __init__(self, folder):
        (metrics,) = (folder / "CSVLogger").rglob("metrics.csv")
        self.rows = list(csv.DictReader(metrics.read_text().splitlines()))
        self.files = {path.name for path in metrics.parent.iterdir()}
        self.hparams = yaml.safe_load((metrics.parent / "hparams.yaml").read_text())
        (events,) = (folder / "TensorBoardLogger").glob("*/version_*")
        self.board = EventAccumulator(str(events), {"images": 0, "scalars": 0}).Reload()
        assert yaml.safe_load((events / "hparams.yaml").read_text()) == self.hparams
        lines = [json.loads(line) for line in (folder / "Images/log.jsonl").read_text().splitlines()]
        self.images = {tuple(rest) for kind, *rest in lines if kind == "image"}
        self.videos = [rest for kind, *rest in lines if kind == "video"]
        self.metrics = {key: value for kind, *rest in lines if kind == "metrics" for key, value in rest[0].items()}
        assert next(rest[0] for kind, *rest in lines if kind == "hyper-parameters") == self.hparams


def test_fit(in_root, tmp_path):
    fit(tmp_path, trainer={"logger": loggers(tmp_path)}, plots=True)
    found = Logged(tmp_path)
    assert found.hparams["model"]["init_args"]["num_levels"] == 5
    assert found.hparams["data"]["init_args"]["batch_size"] == 125
    assert float(next(row["val/nll"] for row in found.rows if row["val/nll"])) == found.metrics["val/nll"]
    assert found.board.Scalars("val/nll")[0].value == pytest.approx(found.metrics["val/nll"])
    assert ("val/reliability", 8) in found.images
    assert [image.step for image in found.board.Images("val/reliability")] == [8]
    assert "val_reliability-step00000008.png" in found.files


def test_predict(in_root, tmp_path):
    folder = tmp_path / "run"
    main(
        [
            "predict",
            "--config=lightning_configs/predict/digits.yaml",
            "--config=run/guidance_grid",
            "--model.init_args.sampler.init_args.steps=3",
            "--data.init_args.num_samples=20",
            "--data.init_args.batch_size=10",
            f"--trainer.default_root_dir={folder}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            f"--trainer.logger={json.dumps(loggers(tmp_path))}",
        ]
    )
    found, expected = Logged(tmp_path), json.loads((folder / "metrics.json").read_text())
    assert found.hparams["model"]["init_args"]["sampler"]["init_args"]["steps"] == "3"
    (row,) = found.rows
    assert int(row["step"]) == 20
    for name in ("integral_ece", "classifier_accuracy", "seconds_per_image", "nfe"):
        assert float(row[name]) == pytest.approx(expected[name])
        assert found.metrics[name] == pytest.approx(expected[name])
        assert found.board.Scalars(name)[0].value == pytest.approx(expected[name], rel=1e-6)
    drawn = {"samples", "reliability", "ece_t", "gradient_norm", "trajectory", "guidance_grid"}
    assert {f"plots/{name}" for name in drawn} <= {name for name, _ in found.images}
    assert {f"plots/{name}" for name in drawn} <= set(found.board.Tags()["images"])
    assert {f"plots_{name}-step00000020.png" for name in drawn} <= found.files
    assert found.videos == [["plots/animation", 20]]
    assert "plots_animation-step00000020.gif" in found.files
    (moving,) = found.board.Images("plots/animation")
    assert moving.encoded_image_string == (folder / "plots/animation.gif").read_bytes()


@pytest.mark.parametrize("resumed", [8, 12])
def test_a_resumed_run_continues_its_logs(in_root, tmp_path, resumed):
    """Stopped in and after an epoch; what was logged after the checkpoint is there once."""

    def run(folder, epochs, *arguments):
        checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": resumed, "save_top_k": -1}}
        trainer = {"logger": loggers(folder)[:2], "log_every_n_steps": 1, "max_epochs": epochs}
        fit(folder, *arguments, trainer=trainer, callbacks=[checkpoint])

    def logged(folder):
        (metrics,) = folder.rglob("metrics.csv")
        rows = [
            (int(r["step"]), r["train/loss"], r["val/nll"]) for r in csv.DictReader(metrics.read_text().splitlines())
        ]
        (events,) = {path.parent for path in folder.rglob("events.out*")}
        board = EventAccumulator(str(events)).Reload()
        scalars = {tag: {e.step: e.value for e in board.Scalars(tag)} for tag in ("train/loss", "val/nll")}
        return rows, scalars, {path.name: path.read_text() for path in folder.glob("calibration/*.json")}

    run(tmp_path / "complete", 3)
    run(tmp_path / "run", 2)
    path = next((tmp_path / "run/checkpoints").glob(f"*step={resumed}.ckpt"))
    run(tmp_path / "run", 3, f"--ckpt_path={path}")
    found, expected = logged(tmp_path / "run"), logged(tmp_path / "complete")
    assert found == expected
