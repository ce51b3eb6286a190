"""The experiment command: settings, halving, sharing, resuming, its tables, and what it refuses before any run."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from calib_guidance.backend.images import to_uint8
from calib_guidance.cli import main
from calib_guidance.cli.lightning import run_lightning
from calib_guidance.cli.parsed import ParsedCLI
from calib_guidance.data import digits
from calib_guidance.errors import ConfigurationError, FailedSamplesError
from calib_guidance.experiments import experiment as module
from calib_guidance.experiments import runner
from calib_guidance.experiments.experiment import Experimenter, halve, read_value
from calib_guidance.experiments.runner import Run
from calib_guidance.experiments.schema import Column, read_experiment
from calib_guidance.experiments.settings import make_plan
from calib_guidance.runs import RunFolder
from tests import processes
from tests.conftest import ROOT

SCALE = "model.guidance.scale"
TAU2 = "model.guidance.score.tau2"
FILE = {
    "configs": ["lightning_configs/predict/digits.yaml"],
    "set": {
        "model.sampler.steps": "2",
        "data.batch_size": 10,
        "trainer.accelerator": "cpu",
    },
    "num_samples": 30,
    "seeds": [0],
    "axes": {
        "score": {"configs": ["score/tempered", "score/js"]},
        "scale": {"key": SCALE, "values": [1, 4.0]},
    },
    "columns": ["fd", "precision", "recall", "integral_ece"],
}
ONE = {"scale": {"key": SCALE, "values": [1, 4.0]}}
SINGLE = {"scale": {"key": SCALE, "values": [1]}}
HALVING = {"by": "integral_ece", "samples": 10, "factor": 2}


@pytest.fixture
def quick(in_root, tmp_path):
    """The digits' configuration without plots of each run, and with few measurements."""

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


def command(path, output):
    return ["experiment", f"--config={path}", f"--output={output}", "--workers=1", "--devices="]


def experiment(path, output, *more):
    main([*command(path, output), *more])


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
def test_a_grid_is_run_once_and_shared(write, quick, tmp_path, capsys, plots_in_full):
    """Two by two settings; a second file with the same resolved settings, written otherwise, samples nothing."""
    configs = quick(measured=("SampleQuality", "TrajectoryCalibration"))
    experiment(write(configs=configs), tmp_path / "out")
    assert "4 runs in" in capsys.readouterr().out
    found = rows(tmp_path / "out/small")
    assert [(r["score"], r["scale"]) for r in found] == [("tempered", "1"), ("tempered", "4"), ("js", "1"), ("js", "4")]
    for row in found:
        metrics = json.loads(Path(row["folder"], "metrics.json").read_text())
        assert metrics["num_samples"] == 30
        assert all(float(row[key]) == metrics[key] for key in FILE["columns"])
        config = yaml.safe_load(Path(row["folder"], "config.yaml").read_text())
        guidance = config["model"]["init_args"]["guidance"]["init_args"]
        assert guidance["scale"] == float(row["scale"])
        assert guidance["score"]["class_path"].endswith(
            "TemperedLogProb" if row["score"] == "tempered" else "Regularized"
        )
    assert len({row["fd"] for row in found}) == 4
    lines = (tmp_path / "out/small/table.md").read_text().splitlines()
    assert lines[0] == "| score | scale | Fréchet distance ↓ | precision ↑ | recall ↑ | integral ECE ↓ |"
    assert lines[2].startswith(f"| tempered | 1 | {float(found[0]['fd']):.3f} |")
    for stem in ("score", "scale", "scale-precision-recall"):
        assert (tmp_path / f"out/small/plots/{stem}.png").stat().st_size > 1000

    before = records(tmp_path / "out")
    base = [*configs, "lightning_configs/score/tempered.yaml"]
    again = write("again", configs=base, axes=ONE, set=FILE["set"] | {TAU2: 0.8})  # as score/tempered says
    experiment(again, tmp_path / "out")
    assert "\n0 runs in" in capsys.readouterr().out
    assert records(tmp_path / "out") == before
    assert rows(tmp_path / "out/again")[1]["fd"] == found[1]["fd"]


def test_halving_spends_samples_on_the_best_and_reuses_them(write, quick, tmp_path, capsys):
    shipped = yaml.safe_load((ROOT / "lightning_configs/experiments/digits_halving.yaml").read_text())
    path = write(
        configs=quick(measured=("SampleQuality", "TrajectoryCalibration")),
        axes=ONE,
        halving=shipped["halving"] | {"samples": 10},
        columns=["fd", "integral_ece"],
    )
    experiment(path, tmp_path / "out")
    found, scales = {(r["scale"], r["num_samples"]): r for r in rows(tmp_path / "out/small")}, ("1", "4")
    ece = {scale: float(found[scale, "10"]["integral_ece"]) for scale in scales}
    best = min(ece, key=ece.get)
    assert found.keys() == {*((scale, "10") for scale in scales), (best, "30")}
    assert [int(r["num_samples"]) for r in rows(tmp_path / "out/small", "settings.csv")] == [
        30 if scale == best else 10 for scale in scales
    ]
    lines = (tmp_path / "out/small/table.md").read_text().splitlines()
    assert lines[0] == "| scale | samples | Fréchet distance ↓ | integral ECE ↓ |"
    assert lines[2].startswith(f"| {best} | 30 | {float(found[best, '30']['fd']):.3f} |")
    small, large = (RunFolder.open(found[best, count]["folder"]) for count in ("10", "30"))
    assert large.num_requests == 30
    first = small.shards()[0]
    assert small.record(first)["worker"] == large.record(first)["worker"]  # not sampled again
    assert small.file(first, "parquet").read_bytes() == large.file(first, "parquet").read_bytes()
    assert len(large.shards()) == 3

    # Fewer samples of what has more: nothing is sampled, and the metrics are those of fewer.
    capsys.readouterr()
    shutil.rmtree(found[best, "10"]["folder"])
    experiment(path, tmp_path / "out")
    assert "\n1 runs in" in capsys.readouterr().out
    again = {(r["scale"], r["num_samples"]): r for r in rows(tmp_path / "out/small")}
    assert again == found
    assert RunFolder.open(found[best, "10"]["folder"]).record(first)["worker"] == large.record(first)["worker"]


def test_a_killed_run_resumes(write, quick, tmp_path, capsys):
    """SIGKILL after two of three shards, by a process of its own; the same command makes the third, and evaluates all."""
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
    metrics = ["fd", "integral_ece"]
    path = write(configs=quick(kill), axes=SINGLE, columns=metrics, evaluate=evaluate | {"allow-few": True})
    done = processes.run(*command(path, tmp_path / "out"))
    assert done.statuses == [-9], done.output
    before = records(tmp_path / "out")
    assert len(before) == 2
    experiment(path, tmp_path / "out")
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
    assert float(row["fd"]) == evaluated["fd"]


def test_halving_promotes_the_best_of_each_rung():
    """Nine settings, a third of them at each of three rungs; who is best changes from rung to rung."""
    asked = []
    values = {10: [5, 1, 9, 2, 8, 3, 7, 6, 4], 30: [0, 3, 0, 1, 0, 2, 0, 0, 0], 90: [0, 0, 0, 7, 0, 0, 0, 0, 0]}

    def measure(settings, num_samples):
        asked.append((num_samples, list(settings)))
        return [values[num_samples][number] for number in settings]

    samples = halve(range(9), [10, 30, 90], 3, measure)
    assert asked == [(10, list(range(9))), (30, [1, 3, 5]), (90, [3])]
    assert [samples[number] for number in range(9)] == [10, 30, 10, 90, 10, 30, 10, 10, 10]


def measured(plan, output, found):
    """Runs that are done, with what they measured, by setting, seed and number of samples."""
    runs = {(run.setting, run.seed, n): run for s, _, n in found for run in plan.runs([s], n, output)}
    for key, metrics in found.items():
        runs[key].folder.mkdir(parents=True, exist_ok=True)
        (runs[key].folder / "metrics.json").write_text(json.dumps(metrics))
    return runs


def test_ranking_follows_the_direction_of_the_metric(write, tmp_path):
    plan = make_plan(write(axes=ONE, halving=HALVING | {"by": ["integral_ece", "precision"]}))
    assert plan.experiment.halving.rungs(30) == [10, 20, 30]
    experimenter = Experimenter(plan, tmp_path)
    found = {}
    for number, (ece, precision) in enumerate([(0.3, 0.9), (0.2, 0.8)]):
        found |= {(number, 0, count): {"integral_ece": ece, "precision": precision} for count in (10, 20, 30)}
    experimenter.runs = measured(plan, tmp_path, found)
    assert experimenter.rank([0, 1], 10) == [0.3, 0.2]
    assert experimenter.rank([0, 1], 20) == experimenter.rank([0, 1], 30) == [-0.9, -0.8]
    measured(plan, tmp_path, {(1, 0, 10): {"integral_ece": None}})
    with pytest.raises(ConfigurationError, match="scale=4: settings cannot be ranked by integral_ece"):
        experimenter.rank([0, 1], 10)


def test_the_table_has_mean_and_deviation_over_seeds(write, tmp_path):
    plan = make_plan(write(axes=ONE, seeds=[0, 1], columns=["fd", "precision"]))
    found = {(0, 0): (1.0, 0.5), (0, 1): (2.0, 0.5), (1, 0): (3.0, None), (1, 1): (3.0, None)}
    metrics = {(*key, 30): dict(zip(("fd", "precision"), pair, strict=True)) for key, pair in found.items()}
    experimenter = Experimenter(plan, tmp_path)
    experimenter.samples, experimenter.runs = {0: 30, 1: 30}, measured(plan, tmp_path, metrics)
    lines = experimenter.markdown("table").splitlines()
    assert lines[2:] == ["| 1 | 1.500 ± 0.707 | 0.500 ± 0.000 |", "| 4 | 3.000 ± 0.000 | – |"]


def test_evaluation_is_of_all_samples_and_of_what_the_ranking_needs(write, tmp_path):
    reference = tmp_path / "reference.npz"
    reference.write_bytes(b"statistics")
    asked = {"axes": SINGLE, "evaluate": {"reference": str(reference), "features": "inception"}}
    by_ece = make_plan(write(**asked, halving=HALVING))
    commands = {count: by_ece.runs([0], count, tmp_path)[0].commands for count in (10, 20, 30)}
    assert [len(commands[count]) for count in (10, 20, 30)] == [1, 1, 2]
    folder = by_ece.runs([0], 30, tmp_path)[0].folder
    assert commands[30][1] == ("evaluate", str(folder), "--reference", str(reference), "--features", "inception")
    by_distance = make_plan(write(**asked, halving=HALVING | {"by": ["integral_ece", "fd"]}))
    assert [len(by_distance.runs([0], count, tmp_path)[0].commands) for count in (10, 20, 30)] == [1, 2, 2]
    (folder / "evaluation").mkdir(parents=True)
    (folder / "metrics.json").write_text('{"integral_ece": 0.1, "fd": 9}')
    (folder / "evaluation/metrics.json").write_text('{"fd": 2, "precision": 0.5}')
    run = by_ece.runs([0], 30, tmp_path)[0]
    read = {column.key: read_value(column, run.folder) for column in by_ece.columns}
    assert read == {"fd": 2, "precision": 0.5, "recall": None, "integral_ece": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valeus": {}}, "allowed: seeds, configs, set, stages, num_samples, rows, axes"),
        ({"columns": None}, "expected columns (of one table), or tables"),
        ({"seeds": 3}, "seeds: expected a list, got 3"),
        ({"columns": ["fdd"]}, "there is no metric 'fdd' (did you mean 'fd'?)"),
        ({"columns": ["clip_score"]}, "clip_score would not be measured with"),
        (
            {"axes": {"s": {"key": f"{SCALE}s", "values": [1]}}},
            "ClassifierGuidance has no option 'scales' (did you mean 'scale'?)",
        ),
        ({"axes": {"s": {"key": SCALE, "values": ["much"]}}}, "s=much: "),
        ({"axes": {"τ2": {"key": TAU2, "values": [0.5, -1.0]}}}, "τ2=-1: "),
        ({"axes": {"s": {"key": SCALE, "values": [1, 1]}}}, "two settings have the same name, s=1"),
        ({"axes": {"s": {"configs": ["score/kl"]}}}, "'score/kl' is neither a file nor the name of a configuration"),
        (
            {"axes": {"n": {"key": "data.init_args.num_samples", "values": [1]}}},
            "an experiment sets data.init_args.num_samples itself: use num_samples",
        ),
        ({"halving": {"samples": 10}}, "halving: missing key 'by'"),
        (
            {"halving": HALVING | {"by": "recal"}},
            "by must name columns (fd, precision, recall, integral_ece), got 'recal'",
        ),
        ({"halving": HALVING | {"samples": 30}}, "samples must be from 1 to 29, got 30"),
        (
            {"halving": HALVING, "axes": {"g": {"configs": ["score/js", "guidance/unguided"]}}},
            "integral_ece would not be measured with g=unguided",
        ),
        (
            {"configs": ["lightning_configs/fit/digits_classifier.yaml"]},
            "predict cannot run lightning_configs/fit/digits_classifier.yaml: its model is for training",
        ),
        ({"evaluate": {"reference": "nowhere.npz"}}, "reference nowhere.npz does not exist"),
        ({"evaluate": {"reference": "a/b", "features": "classifier:no.yaml"}}, "features no.yaml does not exist"),
        ({"evaluate": {"reference": "a/b", "featurs": "inception"}}, "evaluate: unrecognized arguments: --featurs"),
        (
            {"evaluate": {"reference": "a/b", "batch-size": "many"}},
            "argument --batch-size: must be an integer of at least 1, got 'many'",
        ),
        ({"evaluate": {"reference": "a/b", "output": "o"}}, "kept with each run: remove output"),
        (
            {"set": {"model.denoiser.checkpoint": "nowhere.safetensors"}},
            "nowhere.safetensors: no such file",
        ),
    ],
)
def test_what_cannot_run_is_said_before_any_run(write, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as stop:
        experiment(write(**({"axes": SINGLE} | changes)), tmp_path / "out")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_is_named_by_what_its_results_depend_on(write, tmp_path):
    """As a run folder is: files by content, wherever they are, and nothing of how samples are batched."""

    def folder(**values):
        return make_plan(write(axes=SINGLE, set=FILE["set"] | values)).runs([0], 30, tmp_path)[0].folder

    first, copy = folder(), tmp_path / "elsewhere.safetensors"
    shutil.copy(ROOT / "checkpoints/digits/diffusion.safetensors", copy)
    assert folder(**{"data.batch_size": 5}) == first
    assert folder(**{"model.denoiser.checkpoint": str(copy)}) == first
    assert folder(**{"model.sampler.steps": "3"}) != first
    with open(copy, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    assert folder(**{"model.denoiser.checkpoint": str(copy)}) != first


def test_devices_are_what_is_asked_for_or_seen(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert module.devices_of("3,1") == ["3", "1"]
    assert module.devices_of(None) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert module.devices_of(None) == ["5", "7"]


FILES = sorted((ROOT / "lightning_configs/experiments").glob("*.yaml"), key=lambda path: path.name)


def test_halving_of_digits_is_of_their_grid():
    halving, grid = (read_experiment(FILES[0].parent / f"digits_{name}.yaml") for name in ("halving", "grid"))
    assert dataclasses.replace(halving, halving=None) == grid
    shard = grid.set["data.batch_size"]
    assert halving.halving.samples % shard == grid.num_samples % shard == 0


# digits_grid.yaml has the settings of digits_halving.yaml.
@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "digits_grid"], ids=lambda path: path.stem)
def test_every_experiment_can_be_run(path, in_root, tmp_path):
    """All rows, and the ends of all axes, resolve and can be built, and no two are the same."""
    content = yaml.safe_load(path.read_text())
    for axis in content.get("axes", {}).values():
        axis |= {key: [axis[key][0], axis[key][-1]] for key in ("values", "configs") if len(axis.get(key, ())) > 2}
    ends = tmp_path / path.name
    ends.write_text(yaml.safe_dump(content, sort_keys=False))
    plan = make_plan(ends)
    runs = plan.runs(range(len(plan.settings)), plan.experiment.num_samples, tmp_path)
    assert len(plan.settings) >= 2
    assert len({run.folder for run in runs}) == len(runs) == len(plan.settings) * len(plan.experiment.seeds)
    assert len({(setting.group, setting.name) for setting in plan.settings}) == len(plan.settings)
    if path.stem.startswith("imagenet"):
        assert plan.experiment.num_samples == 10_000
        assert plan.experiment.evaluate["features"] == "inception"
    else:
        # Of networks, one trains for half an hour.
        assert len(set(plan.experiment.seeds)) >= (1 if path.stem == "cifar10_networks" else 3)
    if path.stem == "digits":
        check_the_comparison_of_the_readme(plan)


def check_the_comparison_of_the_readme(plan):
    for group in ("unconditional", "class-conditional"):
        names = " ".join(setting.name for setting in plan.settings if setting.group.startswith(group))
        for word in [
            "unguided",
            "plain",
            "tempered",
            "entropy",
            "rkl",
            "fkl",
            "js",
            "hellinger",
            "tilted",
            "noise-aware",
        ]:
            assert word in names
        assert names.count("ReLU") == 8
        assert "on x_t instead of x̂0" in names
        assert "switched" in names
    assert "classifier-free + js" in names


ROWS = {
    "axes": None,
    "columns": None,
    "num_samples": 20,
    "seeds": [0, 1],
    "tables": {"comparison": {"title": "guidance", "columns": ["fd", "recall", "integral_ece"]}},
    "groups": {"unconditional": [], "conditional": ["guidance/with_labels"]},
    "rows": [
        {"name": "unguided", "configs": ["guidance/unguided"], "groups": ["conditional"]},
        {"name": "js", "configs": ["score/js"], "groups": ["unconditional"]},
    ],
}


@pytest.mark.slow
def test_rows_are_run_once_and_put_into_a_table(write, quick, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- comparison -->\nold\n<!-- /comparison -->\nafter\n")
    path = write("rows", configs=quick(measured=("SampleQuality", "TrajectoryCalibration")), **ROWS)
    experiment(path, tmp_path / "out", f"--into={readme}")
    assert "4 runs in" in capsys.readouterr().out
    table = (tmp_path / "out/rows/comparison.md").read_text()
    assert "**unconditional**" in table.splitlines()[2]
    assert table.count("±") == 5  # the unguided row has no classifier to calibrate
    assert "old" not in readme.read_text()
    assert readme.read_text() == f"before\n<!-- comparison -->\n{table}<!-- /comparison -->\nafter\n"
    found = rows(tmp_path / "out/rows")
    assert [(row["group"], row["name"], row["seed"]) for row in found] == [
        ("unconditional", "js", "0"),
        ("unconditional", "js", "1"),
        ("conditional", "unguided", "0"),
        ("conditional", "unguided", "1"),
    ]
    link = tmp_path / "out/rows/runs/conditional/unguided/seed1"
    assert link.resolve() == Path(found[3]["folder"]).resolve()
    experiment(path, tmp_path / "out")
    assert "\n0 runs in" in capsys.readouterr().out
    assert (tmp_path / "out/rows/comparison.md").read_text() == table
    experiment(path, tmp_path / "out", "--row=JS")
    out = capsys.readouterr().out
    assert "\n0 runs in" in out
    assert "| js |" in out
    assert "unguided" not in out
    assert (tmp_path / "out/rows/comparison.md").read_text() == table


def test_a_dry_run_prints_the_commands_of_a_row(write, tmp_path, capsys):
    experiment(write(axes=ONE), tmp_path / "out", "--row", "scale=4", "--dry-run")
    printed = capsys.readouterr().out
    assert printed.startswith(
        "# scale=4, seed 0\ncalib-guidance predict --config lightning_configs/predict/digits.yaml"
    )
    assert f"{SCALE}: 4.0" in printed
    assert "scale=1" not in printed
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        experiment(write(axes=ONE), tmp_path / "out", "--row", "scale=5")
    assert "no row 'scale=5'; rows: 'scale=1', 'scale=4'" in capsys.readouterr().err


def test_a_run_with_failed_samples_is_done_and_says_so(tmp_path, monkeypatch):
    def lose(words):
        raise FailedSamplesError("1 samples could not be made")

    monkeypatch.setattr(runner, "run_lightning", lose)
    run = Run(0, 0, (("predict",),), tmp_path / "run")
    assert runner.work(run, 1) == ["1 samples could not be made"]
    assert run.done()


def test_a_column_reads_into_mappings_and_lists(tmp_path):
    (tmp_path / "m.json").write_text('{"ece": {"by_level": [0.1, null, 0.3]}}')
    keys = ("ece.by_level.2", "ece.by_level.1", "nll.overall")
    read = {key: read_value(Column(key, "", "m.json"), tmp_path) for key in keys}
    assert read == {"ece.by_level.2": 0.3, "ece.by_level.1": None, "nll.overall": None}
    assert read_value(Column("ece", "", "other.json"), tmp_path) is None


def test_stages_get_their_own_configs_and_values(write, tmp_path):
    stages = {"sample": {}, "again": {"configs": ["score/plain"]}}
    row = {
        "name": "js",
        "configs": {"again": ["score/js"]},
        "set": {"sample": {"model.guidance.classifier": "{folder}/a"}},
    }
    changes = ROWS | {"rows": [row], "groups": {"g": ["guidance/with_labels"]}, "stages": stages}
    with pytest.raises(
        ConfigurationError, match="column fd needs file, .* one of sample/metrics.json, again/metrics.json"
    ):
        make_plan(write(**changes))
    columns = [{"key": "fd", "file": "again/metrics.json"}]
    plan = make_plan(write(**changes | {"tables": {"t": {"columns": columns}}}))
    run = plan.runs([0], 20, tmp_path)[1]
    first, second = run.commands
    assert "guidance/with_labels" in first
    assert "guidance/with_labels" in second
    assert "score/js" not in first
    assert "score/js" in second
    assert f"model.guidance.classifier: {run.folder}/a\n" in first
    assert "data.seed: 1\n" in "".join(first)
    assert "guidance.classifier" not in "".join(second)
    assert f"--trainer.default_root_dir={run.folder}/again" in second


def test_a_metric_is_that_of_the_stage_that_predicts(write):
    """Also where another stage follows; and it has to be measured there."""
    stages = {"sample": {}, "test": {"command": "test", "configs": ["fit/digits_calibration"]}}
    row = {"name": "js", "configs": {"sample": ["score/js"]}}
    changes = ROWS | {"configs": None, "set": None, "rows": [row], "groups": None}
    stages["sample"]["configs"] = FILE["configs"]
    plan = make_plan(write(**changes, stages=stages))
    assert [column.file for column in plan.columns] == ["sample/metrics.json"] * 3
    stages["sample"]["set"] = {"trainer.callbacks": ["SampleWriter"]}
    with pytest.raises(
        ConfigurationError, match="fd would not be measured with js: add calib_guidance.callbacks.Sample"
    ):
        make_plan(write(**changes, stages=stages))
    with pytest.raises(ConfigurationError, match="column fd needs file, which a run writes: no stage predicts"):
        make_plan(write(**changes, stages={"test": stages["test"]}))


def test_rows_that_need_others_come_after_them(write, tmp_path):
    rows = [
        {"name": "js", "configs": ["score/js"]},
        {"name": "again", "needs": "js", "set": {"model.guidance.classifier": "{needed}/a.yaml"}},
    ]
    plan = make_plan(write(**(ROWS | {"rows": rows, "groups": {"g": []}})))
    runs = plan.runs([1], 20, tmp_path)
    assert [run.setting for run in runs] == [0, 0, 1, 1]
    assert [run.needs for run in runs] == [None, None, runs[0].folder, runs[1].folder]
    assert f"model.guidance.classifier: {runs[1].folder}/a.yaml" in "".join(runs[3].commands[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": [{"name": "a", "configs": ["score/kl"]}]},
            "'score/kl' is neither a file nor the name of a configuration",
        ),
        ({"rows": [{"name": "a", "config": []}]}, "rows[0]: unknown key 'config' (did you mean 'configs'?)"),
        ({"row": []}, "unknown key 'row' (did you mean 'rows'?)"),
        ({"rows": [{"name": "a", "needs": "b"}]}, "needs 'b', which is not a row above"),
        ({"rows": [{"name": "a", "groups": ["b"]}]}, "no group 'b'; groups: unconditional, conditional"),
        ({"stages": {"s": {"comand": "fit"}}}, "stages[s]: unknown key 'comand' (did you mean 'command'?)"),
        ({"rows": [{"name": "a"}, {"name": "A"}]}, "same name"),
        ({"rows": [{"nam": "a"}]}, "rows[0]: unknown key 'nam'"),
        ({"rows": [{"configs": []}]}, "rows[0]: missing key 'name'"),
        ({"rows": None}, "expected rows, axes or both"),
        (
            {"rows": [{"name": "a", "configs": "score/js"}]},
            "rows[0], configs: expected a list or a mapping, got 'score/js'",
        ),
        ({"rows": [{"name": "a", "set": "--foo"}]}, "rows[0], set: expected a mapping, got '--foo'"),
        (
            {"rows": [{"name": "a", "set": {"model.x": "{foldr}"}}]},
            "unknown {foldr} in a value; known: {seed}, {folder}",
        ),
        (
            {"rows": [{"name": "a", "set": {"model.denoiser": {"checkpoint": "{folder}/x"}}}]},
            "{folder} stands within the mapping or list of model.denoiser",
        ),
        ({"seeds": ["a"]}, "seeds[0]: expected an integer, got 'a'"),
        ({"seeds": [1, 1]}, "seeds must be different integers"),
        ({"groups": ["g"]}, "groups: expected a mapping, got ['g']"),
        (
            {"stages": {"s": {"command": "predcit"}}},
            "stages[s], command: expected one of fit, validate, test, predict, got 'predcit'",
        ),
        (
            {"tables": {"t": {"columns": [{"key": "k", "title": "x", "digits": "two"}]}}},
            "tables[t], columns[0], digits: expected an integer or null, got 'two'",
        ),
        ({"tables": {"t": {"columns": [{"key": "k"}]}}}, "there is no metric 'k'"),
    ],
)
def test_files_that_cannot_run_say_why(write, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit):
        experiment(write(**(ROWS | changes)), tmp_path / "out")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {}\ntables: {}\n", "missing key 'seeds'"),
        ("rows: [", "is not valid YAML"),
        ("- a", "expected a mapping, got ['a']"),
        ("", "expected a mapping, got None"),
    ],
)
def test_a_file_of_another_kind_says_so(tmp_path, capsys, text, message):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        experiment(path, tmp_path / "out")
    assert message in capsys.readouterr().err


def test_an_experiment_is_based_on_another(tmp_path):
    """Keys of the file replace those of its base; everything else is kept."""
    (tmp_path / "own.yaml").write_text(
        "base: digits_scale\nseeds: [5]\naxes: {b: {key: data.batch_size, values: [1]}}\n"
    )
    own, base = (
        read_experiment(tmp_path / "own.yaml"),
        read_experiment(ROOT / "lightning_configs/experiments/digits_scale.yaml"),
    )
    assert own.seeds == [5]
    assert list(own.axes) == ["b"]
    assert (own.configs, own.set, own.num_samples, own.tables) == (
        base.configs,
        base.set,
        base.num_samples,
        base.tables,
    )
    (tmp_path / "own.yaml").write_text("base: own.yaml\n")
    with pytest.raises(ConfigurationError, match="based on itself"):
        read_experiment(tmp_path / "own.yaml")


@pytest.mark.parametrize("order", [1, -1])
def test_a_row_may_name_a_part_and_an_option_of_it(write, order):
    values = {"model.guidance.score": {"class_path": "TemperedLogProb"}, "model.guidance.score.tau2": 0.3}
    row = {"name": "a", "set": dict(list(values.items())[::order])}
    (setting,) = make_plan(write(**(ROWS | {"groups": {}, "rows": [row]}))).settings
    score = run_lightning(setting.commands[0].argv(0, 20), ParsedCLI).options.model.init_args.guidance.init_args.score
    assert score.class_path.endswith("TemperedLogProb")
    assert score.init_args.tau2 == 0.3
