"""The script of docs/which_guidance.md, on made-up results of three methods."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from calib_guidance.denoisers import Combination, Denoiser, IndependentCondition, TwoNegatives, Unconditional
from calib_guidance.diffusion import Interval
from calib_guidance.diffusion.schedules import NoiseSchedule, named_betas
from tests.docs_scripts import docs_script
from tests.sketches import in_few_dots

JS = ["score/js"]
PLAIN, INTERVAL, ALONE = "conditional: no guidance", "conditional: interval + js", "conditional: interval"
BEST = {PLAIN: "steps=20", INTERVAL: "weight=1.5", ALONE: "weight=2"}
SEARCH = {
    "configs": ["predict/digits", "digits/measured_only"],
    "set": {"model.sampler.steps": 20},
    "num_samples": 540,
    "seeds": [0],
    "groups": {
        PLAIN: ["guidance/with_labels", "guidance/unguided"],
        INTERVAL: ["digits/classifier_free", "rule/interval", *JS],
        ALONE: ["digits/classifier_free", "rule/interval", "guidance/unguided"],
    },
    "halving": {"by": "fd", "samples": 60, "factor": 3},
    "tune": {
        "candidates": 2,
        "confirm": [100, 101, 102],
        "own": {
            PLAIN: {"steps": {"key": "model.sampler.steps", "values": [20]}},
            INTERVAL: {"weight": {"key": "model.denoiser.rule.weight", "values": [1.5, 2]}},
            ALONE: {"weight": {"key": "model.denoiser.rule.weight", "values": [1.5, 2]}},
        },
    },
    "columns": ["fd", "precision", "recall", "classifier_accuracy"],
}


@pytest.fixture(scope="module")
def page():
    return docs_script("which_guidance")


@pytest.fixture
def found(tmp_path):
    """What tune writes, with numbers that are made up."""
    rng, methods = np.random.default_rng(0), {}
    for method, best in BEST.items():
        confirmed = {key: rng.random(3).tolist() for key in SEARCH["columns"]}
        methods[method] = {"best": best, "confirmed": confirmed, "search": {}, "samples": 1, "tried": []}
    folder = tmp_path / "outputs" / "search"
    folder.mkdir(parents=True)
    written = {"num_samples": 540, "confirmation_seeds": [100, 101, 102], "methods": methods}
    (folder / "tune.json").write_text(json.dumps(written))
    return folder, methods


def test_results_are_kept_and_drawn(page, found, tmp_path, in_root, monkeypatch, capsys):
    folder, methods = found
    config = tmp_path / "search.yaml"
    config.write_text(yaml.safe_dump(SEARCH, sort_keys=False))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", in_few_dots)
    monkeypatch.setattr(page, "find_configuration", lambda name, command: config)
    (tmp_path / "page.md").write_text("Before\n<!-- which_guidance -->\n<!-- /which_guidance -->\nAfter\n")
    files = [f"--page={tmp_path / 'page.md'}", f"--plot={tmp_path / 'plot.png'}", f"--results={tmp_path / 'kept.json'}"]
    page.main([str(folder), *files])
    text = (tmp_path / "page.md").read_text()
    heads, lines = ("| guidance", "|---", "| **"), [line for line in text.splitlines() if line.startswith("|")]
    rows = {line[2:].split(" | ")[0]: line[2:].split(" | ") for line in lines if not line.startswith(heads)}
    assert [line for line in lines if line.startswith("| **")] == ["| **conditional model** |" + " |" * 7]
    assert rows.keys() == {"no guidance", "interval + js", "interval"}
    plain = np.array(methods[PLAIN]["confirmed"]["fd"])
    for method, name in ((PLAIN, "no guidance"), (INTERVAL, "interval + js"), (ALONE, "interval")):
        for cell, key in zip(rows[name][2:6], SEARCH["columns"], strict=True):
            values, digits = methods[method]["confirmed"][key], 2 if key == "fd" else 3
            assert cell == f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"
        apart = np.array(methods[method]["confirmed"]["fd"]) - plain
        expected = f"{apart.mean():+.3f} ± {apart.std(ddof=1) / np.sqrt(3):.3f}" if method != PLAIN else "–"
        assert rows[name][6] == expected
    order = [np.mean(methods[f"conditional: {name}"]["confirmed"]["fd"]) for name in rows]
    assert order == sorted(order)
    assert rows["interval"][1] == "weight = 2"
    # The interval is σ from 0.2 to 2: one more prediction there.
    kept = json.loads((tmp_path / "kept.json").read_text())["methods"]
    assert (kept[PLAIN]["evaluations"], kept[PLAIN]["gradients"]) == (1, 0)
    assert 1 < kept[ALONE]["evaluations"] == kept[INTERVAL]["evaluations"] < 2
    assert (kept[ALONE]["gradients"], kept[INTERVAL]["gradients"]) == (0, 1)
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width / plot.height == pytest.approx(
            6.0 / 3.39, rel=0.02
        )  # a row and the title of the legend below 3 inches
        assert np.asarray(plot.convert("L")).std() > 5  # something is drawn
    # From what is kept alone, the same.
    page.main(files)
    assert (tmp_path / "page.md").read_text() == text
    other = json.loads((folder / "tune.json").read_text()) | {"num_samples": 60}
    (folder / "tune.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="other samples or seeds"):
        page.main([str(folder), *files])
    with pytest.raises(SystemExit, match="name the folders"):
        page.main([*files[:2], f"--results={tmp_path / 'none.json'}"])


class Model(Denoiser):
    image_shape, num_classes = (1, 8, 8), 10

    def __init__(self):
        super().__init__()
        self.schedule = NoiseSchedule(named_betas("linear"))

    def prepare(self, levels, y):
        raise AssertionError("nothing is sampled")


def test_evaluations_are_those_of_the_steps_that_are_guided(page):
    """By hand: of ten levels three lie inside."""
    model = Model()
    levels = model.schedule.at_sigmas([0.01, 0.05, 0.1, 0.3, 1.0, 1.9, 3.0, 10.0, 20.0, 40.0])
    free = Combination(model, interval=Interval(sigma_interval=[0.2, 2.0]))
    assert page.evaluations(model, levels) == 1
    assert page.evaluations(free, levels) == pytest.approx(1.3)
    two = TwoNegatives(Unconditional(), IndependentCondition())
    assert page.evaluations(Combination(model, negative=two), levels) == 3
