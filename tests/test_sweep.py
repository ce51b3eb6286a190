"""The sweep command: settings, halving, sharing, resuming, its table, and what it refuses before any run."""

import csv
import json
import shutil
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import yaml

from calib_guidance.backend.images import to_uint8
from calib_guidance.cli import main
from calib_guidance.cli.lightning import subclasses_listed_once
from calib_guidance.data import digits
from calib_guidance.errors import ConfigurationError
from calib_guidance.experiments import sweep as module
from calib_guidance.experiments.halving import halve
from calib_guidance.experiments.sweep import Sweeper, read_sweep, table
from calib_guidance.runs import RunFolder
from tests.conftest import ROOT

SCALE = "model.init_args.guidance.init_args.scale"
TAU2 = "model.init_args.guidance.init_args.score.init_args.tau2"
FILE = {
    "configs": ["lightning_configs/predict/digits.yaml"],
    "set": {
        "model.init_args.sampler.init_args.steps": "2",
        "data.init_args.batch_size": 10,
        "trainer.accelerator": "cpu",
    },
    "num_samples": 30,
    "seeds": [0],
    "values": {
        "score": {"overlays": ["score/tempered", "score/js"]},
        "scale": {"key": SCALE, "values": [1, 4.0]},
    },
    "figures": ["frechet_distance", "precision", "recall", "integral_ece"],
}
ONE = {"scale": {"key": SCALE, "values": [1, 4.0]}}
SINGLE = {"scale": {"key": SCALE, "values": [1]}}
HALVING = {"by": "integral_ece", "samples": 10, "factor": 2}


@pytest.fixture(scope="module", autouse=True)
def classes_listed_once():
    """What takes longest in reading a configuration, once for all that are read here."""
    with subclasses_listed_once():
        yield


@pytest.fixture
def quick(in_root, tmp_path):
    """The digits' configuration without figures of each run, and with few measurements."""

    def quick(*callbacks, measured=("TrajectoryCalibration",)):
        content = yaml.safe_load((in_root / FILE["configs"][0]).read_text())
        names = ("SampleWriter", *measured, "RunReport")
        kept = [c for c in content["trainer"]["callbacks"] if c["class_path"].endswith(names)]
        kept[-1]["init_args"] = {"plots": False}
        content["trainer"]["callbacks"] = [*kept, *callbacks]
        path = tmp_path / "quick.yaml"
        path.write_text(yaml.safe_dump(content))
        return [str(path)]

    return quick


@pytest.fixture
def write(in_root, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # runs take all cores, and forked ones hang where there were threads

    def write(name="small", **changes):
        path = tmp_path / f"{name}.yaml"
        content = {key: value for key, value in (FILE | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def sweep(path, output):
    main(["sweep", f"--config={path}", f"--output={output}", "--workers=1", "--devices="])


def rows(folder, name="runs.csv"):
    with open(folder / name) as file:
        return list(csv.DictReader(file))


def records(folder):
    """Who made each shard of each run, and when."""
    return {
        (run.name, path.name): json.loads(path.read_bytes())["worker"]
        for run in sorted((folder / "runs").iterdir())
        for path in sorted((run / "shards").glob("*.json"))
    }


@pytest.mark.slow
def test_a_grid_is_run_once_and_shared(write, quick, tmp_path, capsys):
    """Two by two settings; a second sweep with the same resolved settings, written otherwise, samples nothing."""
    configs = quick(measured=("SampleQuality", "TrajectoryCalibration"))
    sweep(write(configs=configs), tmp_path / "out")
    assert "4 runs in" in capsys.readouterr().out
    found = rows(tmp_path / "out/small")
    assert [(r["score"], r["scale"]) for r in found] == [("tempered", "1"), ("tempered", "4"), ("js", "1"), ("js", "4")]
    for row in found:
        metrics = json.loads(Path(row["folder"], "metrics.json").read_text())
        assert metrics["num_samples"] == 30
        assert all(float(row[key]) == metrics[key] for key in FILE["figures"])
        config = yaml.safe_load(Path(row["folder"], "config.yaml").read_text())
        guidance = config["model"]["init_args"]["guidance"]["init_args"]
        assert guidance["scale"] == float(row["scale"])
        assert guidance["score"]["class_path"].endswith(
            "TemperedLogProb" if row["score"] == "tempered" else "Regularized"
        )
    assert len({row["frechet_distance"] for row in found}) == 4
    lines = (tmp_path / "out/small/table.md").read_text().splitlines()
    assert lines[0] == "| score | scale | Fréchet ↓ | precision ↑ | recall ↑ | integral ECE ↓ |"
    assert lines[2].startswith(f"| tempered | 1 | {float(found[0]['frechet_distance']):.2f} |")
    for stem in ("score", "scale", "scale-precision-recall"):
        assert (tmp_path / f"out/small/figures/{stem}.png").stat().st_size > 1000

    before = records(tmp_path / "out")
    base = [*configs, "lightning_configs/score/tempered.yaml"]
    again = write("again", configs=base, values=ONE, set=FILE["set"] | {TAU2: 0.8})  # as score/tempered says
    sweep(again, tmp_path / "out")
    assert "\n0 runs in" in capsys.readouterr().out
    assert records(tmp_path / "out") == before
    assert rows(tmp_path / "out/again")[1]["frechet_distance"] == found[1]["frechet_distance"]


def test_halving_spends_samples_on_the_best_and_reuses_them(write, quick, tmp_path, capsys):
    shipped = yaml.safe_load((ROOT / "lightning_configs/sweep/digits_halving.yaml").read_text())
    path = write(
        configs=quick(measured=("SampleQuality", "TrajectoryCalibration")),
        values=ONE,
        halving=shipped["halving"] | {"samples": 10},
        figures=["frechet_distance", "integral_ece"],
    )
    sweep(path, tmp_path / "out")
    found, scales = {(r["scale"], r["num_samples"]): r for r in rows(tmp_path / "out/small")}, ("1", "4")
    ece = {scale: float(found[scale, "10"]["integral_ece"]) for scale in scales}
    best = min(ece, key=ece.get)
    assert found.keys() == {*((scale, "10") for scale in scales), (best, "30")}
    assert [int(r["num_samples"]) for r in rows(tmp_path / "out/small", "settings.csv")] == [
        30 if scale == best else 10 for scale in scales
    ]
    lines = (tmp_path / "out/small/table.md").read_text().splitlines()
    assert lines[0] == "| scale | samples | Fréchet ↓ | integral ECE ↓ |"
    assert lines[2].startswith(f"| {best} | 30 | {float(found[best, '30']['frechet_distance']):.2f} |")
    small, large = (RunFolder.open(found[best, count]["folder"]) for count in ("10", "30"))
    assert large.num_requests == 30
    first = small.shards()[0]
    assert small.record(first)["worker"] == large.record(first)["worker"]  # not sampled anew
    assert small.table_path(first).read_bytes() == large.table_path(first).read_bytes()
    assert len(large.shards()) == 3

    # Fewer samples of what has more: nothing is sampled, and the figures are those of fewer.
    capsys.readouterr()
    shutil.rmtree(found[best, "10"]["folder"])
    sweep(path, tmp_path / "out")
    assert "\n1 runs in" in capsys.readouterr().out
    again = {(r["scale"], r["num_samples"]): r for r in rows(tmp_path / "out/small")}
    assert again == found
    assert RunFolder.open(found[best, "10"]["folder"]).record(first)["worker"] == large.record(first)["worker"]


def test_a_killed_run_goes_on(write, quick, tmp_path, capsys):
    """SIGKILL after two of three shards, by a sweep of its own process; the same command makes the third, and evaluates all."""
    images, labels = digits("heldout")
    np.savez(tmp_path / "heldout.npz", to_uint8(images).permute(0, 2, 3, 1).numpy(), labels.numpy())
    callbacks = yaml.safe_load((ROOT / FILE["configs"][0]).read_text())["trainer"]["callbacks"]
    (features,) = [c["init_args"]["features"] for c in callbacks if c["class_path"].endswith("SampleQuality")]
    (tmp_path / "eval_classifier.yaml").write_text(yaml.safe_dump(features["init_args"]["classifier"]))
    evaluate = {
        "reference": str(tmp_path / "heldout.npz"),
        "features": f"classifier:{tmp_path / 'eval_classifier.yaml'}",
    }
    marker = str(tmp_path / "killed")
    kill = {"class_path": "tests.interruptions.KillOnce", "init_args": {"batches": 2, "marker": marker}}
    figures = ["frechet_distance", "integral_ece"]
    path = write(configs=quick(kill), values=SINGLE, figures=figures, evaluate=evaluate | {"allow-few": True})
    process = get_context("spawn").Process(target=sweep, args=(path, tmp_path / "out"))
    process.start()
    process.join()
    assert process.exitcode == -9
    before = records(tmp_path / "out")
    assert len(before) == 2
    sweep(path, tmp_path / "out")
    assert "\n1 runs in" in capsys.readouterr().out
    after = records(tmp_path / "out")
    assert len(after) == 3
    assert {key: after[key] for key in before} == before
    (row,) = rows(tmp_path / "out/small")
    measured, evaluated = (
        json.loads(Path(row["folder"], name).read_text()) for name in ("metrics.json", "evaluation/metrics.json")
    )
    assert measured["num_samples"] == evaluated["num_samples"] == 30
    assert float(row["integral_ece"]) == measured["integral_ece"]
    assert float(row["frechet_distance"]) == evaluated["frechet_distance"]


def test_halving_promotes_the_best_of_each_rung():
    """Nine settings, a third of them at each of three rungs; who is best changes from rung to rung."""
    asked = []
    values = {10: [5, 1, 9, 2, 8, 3, 7, 6, 4], 30: [0, 3, 0, 1, 0, 2, 0, 0, 0], 90: [0, 0, 0, 7, 0, 0, 0, 0, 0]}

    def measure(settings, num_samples):
        asked.append((num_samples, list(settings)))
        return [values[num_samples][number] for number in settings]

    names = [{"a": str(n // 3), "b": str(n % 3)} for n in range(9)]
    samples, study = halve(names, [10, 30, 90], 3, measure)
    assert asked == [(10, list(range(9))), (30, [1, 3, 5]), (90, [3])]
    assert samples == [10, 30, 10, 90, 10, 30, 10, 10, 10]
    assert [trial.params for trial in study.trials] == names
    assert study.best_trial.number == 3
    assert study.trials[5].intermediate_values == {10: 3, 30: 2}
    assert study.trials[5].state.name == "PRUNED"


def test_ranking_follows_the_direction_of_the_figure(write, tmp_path):
    halving = HALVING | {"by": ["integral_ece", "precision"]}
    sweeper = Sweeper(read_sweep(write(values=ONE, halving=halving)), tmp_path)
    for number, (ece, precision) in enumerate([(0.3, 0.9), (0.2, 0.8)]):
        for count in (10, 20, 30):
            sweeper.results[number, 0, count] = {"integral_ece": ece, "precision": precision}
    assert sweeper.sweep.halving.rungs == (10, 20, 30)
    assert sweeper.rank([0, 1], 10) == [0.3, 0.2]
    assert sweeper.rank([0, 1], 20) == sweeper.rank([0, 1], 30) == [-0.9, -0.8]
    sweeper.results[1, 0, 10]["integral_ece"] = None
    with pytest.raises(ConfigurationError, match="scale = 4: settings cannot be ranked by integral_ece"):
        sweeper.rank([0, 1], 10)


def test_the_table_has_mean_and_deviation_over_seeds(write, tmp_path):
    sweeper = Sweeper(read_sweep(write(values=ONE, seeds=[0, 1], figures=["frechet_distance", "precision"])), tmp_path)
    found = {(0, 0): (1.0, 0.5), (0, 1): (2.0, 0.5), (1, 0): (3.0, None), (1, 1): (3.0, None)}
    for (number, seed), (distance, precision) in found.items():
        sweeper.results[number, seed, 30] = {"frechet_distance": distance, "precision": precision}
    lines = table(sweeper, [30, 30]).splitlines()
    assert lines[2:] == ["| 1 | 1.50 ± 0.71 | 0.500 ± 0.000 |", "| 4 | 3.00 ± 0.00 | – |"]


def test_evaluation_is_of_all_samples_and_of_what_the_ranking_needs(write, tmp_path):
    reference = tmp_path / "reference.npz"
    reference.write_bytes(b"statistics")
    asked = {"values": SINGLE, "evaluate": {"reference": str(reference), "features": "inception"}}
    by_ece = read_sweep(write(**asked, halving=HALVING))
    commands = {count: by_ece.runs([0], count, tmp_path)[0].commands for count in by_ece.halving.rungs}
    assert [len(commands[count]) for count in (10, 20, 30)] == [1, 1, 2]
    folder = by_ece.runs([0], 30, tmp_path)[0].folder
    assert commands[30][1] == ("evaluate", str(folder), "--reference", str(reference), "--features", "inception")
    by_distance = read_sweep(write(**asked, halving=HALVING | {"by": ["integral_ece", "frechet_distance"]}))
    assert [len(by_distance.runs([0], count, tmp_path)[0].commands) for count in (10, 20, 30)] == [1, 2, 2]
    (folder / "evaluation").mkdir(parents=True)
    (folder / "metrics.json").write_text('{"integral_ece": 0.1, "frechet_distance": 9}')
    (folder / "evaluation/metrics.json").write_text('{"frechet_distance": 2, "precision": 0.5}')
    read = by_ece.read(by_ece.runs([0], 30, tmp_path)[0])
    assert read == {"frechet_distance": 2, "precision": 0.5, "recall": None, "integral_ece": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valeus": {}}, "unknown keys ['valeus']"),
        ({"figures": None}, "figures is not there"),
        ({"seeds": 3}, "seeds must be a list, got 3"),
        ({"figures": ["frechet"]}, "there is no figure 'frechet' (did you mean 'frechet_distance'?)"),
        ({"figures": ["clip_score"]}, "clip_score would not be measured with"),
        ({"values": {"s": {"key": f"{SCALE}s", "values": [1]}}}, f"has no key {SCALE}s; the closest is {SCALE}"),
        ({"values": {"s": {"key": SCALE, "values": ["much"]}}}, "s = much: "),
        ({"values": {"τ2": {"key": TAU2, "values": [0.5, -1.0]}}}, "τ2 = -1: "),
        ({"values": {"s": {"key": SCALE, "values": [1, 1]}}}, "two settings would have the same name, s = 1"),
        ({"values": {"s": {"overlays": ["score/kl"]}}}, "no such files: lightning_configs/score/kl.yaml"),
        ({"values": {"n": {"key": "data.init_args.num_samples", "values": [1]}}}, "a sweep says"),
        ({"halving": {"samples": 10}}, "by says by which figure settings are ranked"),
        ({"halving": HALVING | {"by": "recal"}}, "ranked by 'recal', which is not among the figures"),
        ({"halving": HALVING | {"samples": 30}}, "samples must be a number from 1 to 29, got 30"),
        (
            {"halving": HALVING, "values": {"g": {"overlays": ["score/js", "digits/unguided"]}}},
            "integral_ece would not be measured with g = unguided",
        ),
        ({"configs": ["lightning_configs/fit/digits_classifier.yaml"]}, "sweeps sample"),
        ({"evaluate": {"reference": "nowhere.npz"}}, "reference nowhere.npz is not there"),
        ({"evaluate": {"reference": "a/b", "features": "classifier:no.yaml"}}, "features no.yaml is not there"),
        ({"evaluate": {"reference": "a/b", "featurs": "inception"}}, "evaluate: unrecognized arguments: --featurs"),
        ({"evaluate": {"reference": "a/b", "batch-size": "many"}}, "argument --batch-size: invalid int value: 'many'"),
        ({"evaluate": {"reference": "a/b", "output": "o"}}, "kept with each run: take output out"),
        (
            {"set": {"model.init_args.denoiser.init_args.checkpoint": "nowhere.safetensors"}},
            "nowhere.safetensors: no such file",
        ),
    ],
)
def test_what_cannot_run_is_said_before_any_run(write, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as stop:
        sweep(write(**({"values": SINGLE} | changes)), tmp_path / "out")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_halving_without_optuna_names_the_extra(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "calib_guidance.experiments.halving")
    with pytest.raises(SystemExit):
        sweep(write(values=SINGLE, halving=HALVING), tmp_path / "out")
    assert "pip install 'calib_guidance[sweep]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_devices_are_what_is_asked_for_or_seen(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert module._devices("3,1") == ["3", "1"]
    assert module._devices(None) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert module._devices(None) == ["5", "7"]


SWEEPS = {p.name: yaml.safe_load(p.read_text()) for p in sorted((ROOT / "lightning_configs/sweep").glob("*.yaml"))}


def test_halving_of_digits_is_of_their_grid():
    content = SWEEPS["digits_halving.yaml"]
    assert {key: value for key, value in content.items() if key != "halving"} == SWEEPS["digits.yaml"]
    shard = content["set"]["data.init_args.batch_size"]
    assert content["halving"]["samples"] % shard == content["num_samples"] % shard == 0


# digits.yaml has the settings of digits_halving.yaml.
@pytest.mark.parametrize("path", [name for name in SWEEPS if name != "digits.yaml"])
def test_every_sweep_composes(path, in_root):
    """All settings resolve and can be built, and no two are the same."""
    found = read_sweep(in_root / "lightning_configs/sweep" / path)
    assert len({setting.digest for setting in found.settings}) == len(found.settings) > 3
    assert len({setting.name for setting in found.settings}) == len(found.settings)
    if path.startswith("imagenet"):
        assert found.num_samples == 10_000
        assert found.evaluate["features"] == "inception"
