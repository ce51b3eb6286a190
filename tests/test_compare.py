"""The comparison command and the table that it makes."""

import csv

import pytest
import yaml

from calib_guidance.cli import main
from calib_guidance.errors import FailedSamplesError
from calib_guidance.experiments import runner
from calib_guidance.experiments.compare import Column, Table, markdown_table, read_comparison
from calib_guidance.experiments.runner import Run
from tests.conftest import ROOT

FILE = {
    "stages": {
        "sample": {
            "command": "predict",
            "configs": ["lightning_configs/predict/digits.yaml"],
            "arguments": [
                "--data.init_args.num_samples=20",
                "--data.init_args.batch_size=10",
                "--data.init_args.seed={seed}",
                "--model.init_args.sampler.init_args.steps=2",
                "--trainer.accelerator=cpu",
                "--trainer.default_root_dir={folder}",
            ],
        }
    },
    "seeds": [0, 1],
    "tables": {
        "comparison": {
            "title": "guidance",
            "columns": [
                {"title": "Fréchet ↓", "file": "metrics.json", "key": "frechet_distance", "digits": 2},
                {"title": "recall ↑", "file": "metrics.json", "key": "recall"},
                {"title": "integral ECE ↓", "file": "metrics.json", "key": "integral_ece"},
            ],
        }
    },
    "groups": {"unconditional": [], "conditional": ["digits/conditional"]},
    "rows": [
        {"name": "unguided", "overlays": ["digits/unguided"], "groups": ["conditional"]},
        {"name": "js", "overlays": ["score/js"], "groups": ["unconditional"]},
    ],
}


@pytest.fixture
def file(in_root, tmp_path):
    def write(**changes):
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump(FILE | changes, sort_keys=False))
        return path

    return write


def test_the_readmes_comparison_has_every_row_that_it_promises(in_root, tmp_path):
    comparison = read_comparison(in_root / "lightning_configs/compare/digits.yaml", tmp_path)
    rows, runs = comparison.rows, comparison.runs
    assert len(runs) == 3 * len(rows)
    for group in ("unconditional", "class-conditional"):
        names = " ".join(name for g, name in rows if g.startswith(group))
        for word in (
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
        ):
            assert word in names
        assert names.count("ReLU") == 8
        assert "on x_t instead of x̂0" in names
        assert "switched" in names
    assert "classifier-free + js" in names
    assert len({run.fingerprint for run in runs}) == len(runs)


@pytest.mark.parametrize("path", sorted((ROOT / "lightning_configs/compare").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_comparison_can_be_run(in_root, tmp_path, path):
    comparison = read_comparison(path, tmp_path)
    assert len(comparison.rows) >= 3
    assert {run.seed for run in comparison.runs} >= {0, 1, 2}
    assert len({run.fingerprint for run in comparison.runs}) == len(comparison.runs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {}\nseeds: [0]\ntables: {}\n", "missing keys ['groups', 'rows']"),
        ("rows: [", "is no YAML"),
        ("- a", "must be a mapping, got ['a']"),
        ("", "must be a mapping, got None"),
    ],
)
def test_a_file_that_is_no_comparison_says_so(tmp_path, capsys, text, message):
    path = tmp_path / "compare.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(path), "--output", str(tmp_path / "runs")])
    assert message in capsys.readouterr().err


def test_a_run_that_leaves_samples_out_is_done_and_says_so(tmp_path, monkeypatch):
    def lose(words):
        raise FailedSamplesError("1 samples could not be made")

    monkeypatch.setattr(runner, "run_lightning", lose)
    run = Run(0, 0, (("predict",),), tmp_path / "run", "fingerprint")
    assert runner.work(run, 1) == ["1 samples could not be made"]
    assert run.done()


@pytest.mark.slow
def test_runs_are_made_once_and_put_into_a_table(file, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- comparison -->\nold\n<!-- /comparison -->\nafter\n")
    command = [
        "compare",
        "--config",
        str(file()),
        "--output",
        str(tmp_path / "runs"),
        "--workers",
        "1",
        "--into",
        str(readme),
    ]
    main(command)
    assert "4 runs in" in capsys.readouterr().out
    table = (tmp_path / "runs/comparison.md").read_text()
    assert "**unconditional**" in table.splitlines()[2]
    assert table.count("±") == 5  # the unguided row has no classifier to calibrate
    assert "old" not in readme.read_text()
    assert readme.read_text() == f"before\n<!-- comparison -->\n{table}<!-- /comparison -->\nafter\n"
    with open(tmp_path / "runs/runner.csv") as runs:
        assert [(row["group"], row["name"], row["seed"]) for row in csv.DictReader(runs)] == [
            ("unconditional", "js", "0"),
            ("unconditional", "js", "1"),
            ("conditional", "unguided", "0"),
            ("conditional", "unguided", "1"),
        ]
    main(command)
    assert "0 runs in" in capsys.readouterr().out
    assert (tmp_path / "runs/comparison.md").read_text() == table


def test_a_cell_is_mean_and_standard_deviation_over_seeds():
    table = Table("m", "what", (Column("a", "f.json", "a", 2), Column("b", "f.json", "b"), Column("c", "f.json", "c")))
    lines = markdown_table(table, [("g", "row")], [[[1.0, 0.5, None], [2.0, 0.5, None]]]).splitlines()
    assert lines[0] == "| what | a | b | c |"
    assert lines[-1] == "| row | 1.50 ± 0.71 | 0.500 ± 0.000 | – |"


def test_a_column_reads_into_mappings_and_lists(tmp_path):
    (tmp_path / "m.json").write_text('{"ece": {"by_level": [0.1, null, 0.3]}}')
    read = {
        key: Column("", "m.json", key).read(tmp_path) for key in ("ece.by_level.2", "ece.by_level.1", "nll.overall")
    }
    assert read == {"ece.by_level.2": 0.3, "ece.by_level.1": None, "nll.overall": None}
    assert Column("", "other.json", "ece").read(tmp_path) is None


def test_stages_get_their_own_overlays_and_arguments(file, tmp_path):
    stages = FILE["stages"] | {"again": {"command": "predict", "configs": ["lightning_configs/predict/digits.yaml"]}}
    rows = [{"name": "js", "overlays": {"again": ["score/js"]}, "arguments": {"sample": ["--x={folder}/a"]}}]
    comparison = read_comparison(file(stages=stages, rows=rows, groups={"g": ["digits/conditional"]}), tmp_path)
    first, second = comparison.runs[1].commands
    folder = tmp_path / "g/js/seed1"
    assert "lightning_configs/digits/conditional.yaml" in first
    assert "lightning_configs/digits/conditional.yaml" in second
    assert "lightning_configs/score/js.yaml" not in first
    assert "lightning_configs/score/js.yaml" in second
    assert f"--x={folder}/a" in first
    assert "--data.init_args.seed=1" in first
    assert not any(word.startswith("--x") for word in second)


def test_rows_that_need_others_come_after_them(file, tmp_path):
    rows = [
        {"name": "js", "overlays": ["score/js"]},
        {"name": "again", "needs": "js", "commands": {"sample": "validate"}, "arguments": ["--x={needed}/a.yaml"]},
    ]
    runs = read_comparison(file(rows=rows, groups={"g": []}), tmp_path).runs
    assert [run.needs for run in runs] == [None, None, runs[0].folder, runs[1].folder]
    (words,) = runs[3].commands
    assert words[0] == "validate"
    assert f"--x={tmp_path / 'g/js/seed1'}/a.yaml" in words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{"name": "a", "overlays": ["score/kl"]}]}, "no such files: lightning_configs/score/kl.yaml"),
        ({"rows": [{"name": "a", "overlay": []}]}, "unknown keys ['overlay']"),
        ({"row": []}, "unknown keys ['row']"),
        ({"rows": [{"name": "a", "needs": "b"}]}, "needs 'b', which no row above is"),
        ({"stages": {"s": {"comand": "fit"}}}, "stage 's': unknown keys ['comand']"),
        ({"rows": [{"name": "a"}, {"name": "A"}]}, "same name"),
        ({"rows": [{"nam": "a"}]}, "row 1: unknown keys ['nam']"),
        ({"rows": [{"overlays": []}]}, "row 1: name must be a text"),
        ({"rows": [{"name": "a", "overlays": "score/js"}]}, "overlays must be a list, got 'score/js'"),
        ({"rows": [{"name": "a", "arguments": "--foo"}]}, "arguments must be a list"),
        (
            {"rows": [{"name": "a", "arguments": ["--x={foldr}"]}]},
            "unknown {foldr} in '--x={foldr}'; known: {seed}, {folder}",
        ),
        ({"seeds": 3}, "seeds must be a list, got 3"),
        ({"seeds": ["a"]}, "a seed must be a whole number, got 'a'"),
        ({"groups": ["g"]}, "groups must be a mapping"),
        ({"stages": {"s": {"command": "predcit"}}}, "unknown command 'predcit'; known: fit"),
        (
            {"tables": {"t": {"title": "x", "columns": [{"title": "a", "file": "f", "key": "k", "digits": "two"}]}}},
            "digits",
        ),
    ],
)
def test_files_that_cannot_run_say_why(file, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(file(**changes)), "--output", str(tmp_path / "runs")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
