"""`calib-guidance tune`: on a toy whose optimum is known, what it spends, and what it refuses."""

import json
import math

import numpy as np
import pytest
import yaml

from calib_guidance.cli import main
from calib_guidance.cli.configs import find_configuration
from calib_guidance.errors import ConfigurationError
from calib_guidance.experiments import experiment, tune
from calib_guidance.experiments.experiment import halve
from calib_guidance.experiments.objectives import parse_objective
from calib_guidance.experiments.schema import read_experiment
from calib_guidance.experiments.settings import candidates, make_plan
from calib_guidance.plots.fronts import front
from tests.conftest import ROOT
from tests.runs import refused

SCALE, TAU2 = "model.guidance.scale", "model.guidance.score.tau2"
FILE = {
    "configs": ["predict/digits"],
    "num_samples": 90,
    "seeds": [0, 1],
    "groups": {"plain": ["score/plain"], "tempered": ["score/tempered"]},
    "halving": {"by": "fd", "samples": 10, "factor": 3},
    "tune": {
        "candidates": 9,
        "confirm": [7, 8, 9],
        "parameters": {"scale": {"key": SCALE, "low": 0.25, "high": 4, "log": True}},
        "own": {"tempered": {"tau2": {"key": TAU2, "low": 0.2, "high": 1.0}}},
    },
    "columns": ["fd", "precision", "recall", "classifier_accuracy"],
}


@pytest.fixture
def write(in_root, tmp_path):
    def write(**changes):
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(FILE | changes, sort_keys=False))
        return path

    return write


def settings_of(run):
    """Scale, τ2 and which method a run asks for."""
    found = {}
    for word in run.commands[0]:
        if "\n" in word:
            found |= yaml.safe_load(word)
    return found[SCALE], found.get(TAU2)


def toy(made):
    """In place of sampling: Fréchet distance with a known least, and noise of the seed that is common to all settings."""

    def do_runs(todo, *_):
        for run in todo:
            scale, tau2 = settings_of(run)
            rng = np.random.default_rng([run.seed, run.num_samples])
            common, own = rng.normal(size=2) / math.sqrt(run.num_samples)
            distance = math.log(scale / 2) ** 2 if tau2 is None else 0.3 + math.log(scale) ** 2 + (tau2 - 0.6) ** 2
            values = {"fd": 1 + distance + common + 0.01 * own, "precision": 1 - 0.2 / scale, "recall": 1 / (1 + scale)}
            values["classifier_accuracy"] = scale / (1 + scale)
            run.folder.mkdir(parents=True)
            (run.folder / "metrics.json").write_text(json.dumps(values))
            (run.folder / "done").touch()
            made.append((run.setting, run.seed, run.num_samples))
        return []

    return do_runs


def test_the_known_optimum_of_a_toy_is_found_and_confirmed(write, tmp_path, monkeypatch, capsys):
    made, path = [], write(tune=FILE["tune"] | {"candidates": 5})
    plan = make_plan(path, "tune")  # once: reading takes longest
    monkeypatch.setattr(tune, "make_plan", lambda *_: plan)
    monkeypatch.setattr(experiment, "do_runs", toy(made))
    argv = ["tune", f"--config={path}", f"--output={tmp_path / 'out'}", "--workers=1", "--devices="]
    main(argv)
    found = json.loads((tmp_path / "out/toy/tune.json").read_text())
    plain, tempered = (found["methods"][name] for name in ("plain", "tempered"))
    assert plain["best"] == "scale=2"  # one of five from 0.25 to 4, of the least at 2
    # Of two parameters the candidate that is nearest to the least, by the toy's own distance.
    scales = [dict(part.split("=") for part in each["setting"].split(", ")) for each in tempered["tried"]]
    distances = [math.log(float(s["scale"])) ** 2 + (float(s["tau2"]) - 0.6) ** 2 for s in scales]
    assert tempered["best"] == tempered["tried"][int(np.argmin(distances))]["setting"]
    assert plain["samples"] == tempered["samples"] == 2 * (4 * 10 + 90)  # an equal budget
    rungs = [list(each["metrics"]) for each in plain["tried"]]
    assert sorted(rungs) == [["10"]] * 4 + [["10", "30", "90"]]  # what each setting had on every rung that it reached
    winner = next(each for each in plain["tried"] if each["setting"] == "scale=2")
    assert winner["metrics"]["90"]["precision"] == 0.9
    assert winner["samples"] == 90
    assert {seed for _, seed, count in made if count < 90} == {0, 1}
    confirmed = {(setting, seed) for setting, seed, count in made if count == 90 and seed > 1}
    assert len(confirmed) == 2 * 3  # of the best alone, on fresh seeds
    assert len(plain["confirmed"]["fd"]) == 3
    table = (tmp_path / "out/toy/tune.md").read_text()
    assert table.index("| plain | scale=2 |") < table.index("| tempered |")
    assert "3 seeds that the search did not see" in table
    for name in ("precision-recall-10", "fd-classifier_accuracy-10", "fd-classifier_accuracy-90"):
        assert (tmp_path / f"out/toy/plots/{name}.png").is_file()
    count = len(made)
    main(argv)  # all is done
    assert len(made) == count
    assert json.loads((tmp_path / "out/toy/tune.json").read_text()) == found
    assert "is a search (tune). Run calib-guidance tune --config" in refused(capsys, "experiment", *argv[1:])


def test_methods_compete_with_themselves_only():
    """Equal budgets, however bad a method is; settings 0 to 5 are of the better one."""
    samples = halve(range(12), [10, 30], 3, lambda settings, _: [float(s) for s in settings], lambda s: "ab"[s >= 6])
    assert [samples[s] for s in range(12)] == [30, 30, 10, 10, 10, 10] * 2


def test_candidates_lie_between_the_bounds(write):
    rows = candidates(read_experiment(write()))
    plain, tempered = ([row for row in rows if row.groups == [name]] for name in ("plain", "tempered"))
    assert len(plain) == len(tempered) == 9
    assert [row.set[SCALE] for row in plain] == pytest.approx(np.geomspace(0.25, 4, 9), rel=5e-3)
    tau2 = np.array([row.set[TAU2] for row in tempered])
    assert 0.2 <= tau2.min() < 0.4 < 0.8 < tau2.max() <= 1  # all of the range, by a Sobol sequence
    assert rows == candidates(read_experiment(write()))
    own = {"candidates": 4, "confirm": [5], "parameters": {"scale": {"key": SCALE, "values": [1, 2]}}}
    assert [row.name for row in candidates(read_experiment(write(tune=own)))] == ["scale=1", "scale=2"] * 2


def test_objectives():
    values = {"fd": 0.5, "precision": 0.8, "recall": 0.5, "classifier_accuracy": 0.9}
    assert parse_objective("fd", "").of(values) == 0.5
    assert parse_objective("precision", "").of(values) == -0.8
    assert parse_objective("pr_area", "").of(values) == pytest.approx(-0.4)
    at = parse_objective("classifier_accuracy @ recall >= 0.6", "")
    assert at.keys == ("classifier_accuracy", "recall")
    reached = at.of(values | {"recall": 0.6})
    assert reached == -0.9
    assert reached < at.of(values | {"recall": 0.59}) < at.of(values) < at.of(values | {"classifier_accuracy": 0.1})
    with pytest.raises(ConfigurationError, match="by: expected METRIC, pr_area or METRIC@METRIC>=NUMBER, got 'fd@0.5'"):
        parse_objective("fd@0.5", "file")


def test_the_front_is_what_no_other_point_beats():
    points = np.random.default_rng(0).random((40, 2)).tolist()
    found = front([tuple(p) for p in points], (-1, 1))
    beaten = [any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in points) for p in points]
    assert found == sorted(tuple(p) for p, by in zip(points, beaten, strict=True) if not by)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"confirm": [1, 2]}, r"confirm must be seeds that the search does not see, got \[1, 2\]"),
        ({"candidates": 1}, "candidates must be at least 2, got 1"),
        ({"own": {"nope": {}}}, "no group 'nope'; groups: plain, tempered"),
        ({"parameters": {}}, "plain has nothing to vary: add parameters"),
        ({"parameters": {"s": {"key": SCALE, "low": 0, "high": 1, "log": True}}}, "above 0 with log"),
    ],
)
def test_searches_that_cannot_be_made_are_refused(write, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        read_experiment(write(tune=FILE["tune"] | changes))


def test_a_search_whose_runs_write_no_metrics_is_refused(write, tmp_path):
    """Before its hundreds of runs."""
    callbacks = yaml.safe_load((ROOT / "lightning_configs/digits/measured_only.yaml").read_text())["trainer"][
        "callbacks"
    ]
    assert callbacks.pop()["class_path"] == "RunReport"
    (tmp_path / "unreported.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    path = write(configs=["predict/digits", str(tmp_path / "unreported.yaml")], groups={"plain": ["score/plain"]}, tune={
        "candidates": 2, "confirm": [7], "parameters": FILE["tune"]["parameters"],
    })  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"add calib_guidance\.callbacks\.RunReport to trainer\.callbacks"):
        make_plan(path, "tune")


def test_the_search_of_digits_costs_half_of_its_grid():
    """Twelve of a third of the digits, four of all: (12 + 4·2)/3 of twelve."""
    found = read_experiment(ROOT / "lightning_configs/tune/digits_scores.yaml")
    rungs, factor = found.halving.rungs(found.num_samples), found.halving.factor
    samples = halve(range(found.tune.candidates), rungs, factor, lambda s, _: list(s))
    assert sum(samples.values()) * 9 == 5 * found.num_samples * found.tune.candidates
    assert found.halving.samples % found.set["data.batch_size"] == 0
    for config in (config for configs in found.groups.values() for config in configs):
        assert find_configuration(config).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "lightning_configs/tune").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_searches_can_be_made(path, in_root, tmp_path):
    """All are read; every sixth method is resolved and built, with two candidates."""
    searched, content = read_experiment(path), yaml.safe_load(path.read_text())
    assert len(searched.tune.confirm) >= 10
    for configs in searched.groups.values():
        assert all(find_configuration(name, "predict") for name in configs)
    content["groups"] = dict(list(content["groups"].items())[::6])
    own = content["tune"].get("own", {})
    content["tune"] |= {"candidates": 2, "own": {name: own[name] for name in content["groups"] if name in own}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    plan = make_plan(tmp_path / "few.yaml", "tune")
    # A method that has nothing to search is one setting.
    counts = [[len(each.get("values", (0, 1))) for each in own.get(name, {}).values()] for name in content["groups"]]
    assert len(plan.settings) == sum(1 if set(count) == {1} else 2 for count in counts)
