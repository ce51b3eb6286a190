"""The script of the tuned table of docs/results.md, on made-up results of three methods."""

import json

import pytest
from PIL import Image

from tests.docs_scripts import docs_script

METHODS = {"plain, Softplus": [0.5, 0.7, 0.6], "js, Softplus": [0.4, 0.5, 0.6], "unguided": [1.0, 2.0, 3.0]}
PAGE = "before\n\n<!-- kept -->\n<!-- /kept -->\n\nafter\n"


@pytest.fixture(scope="module")
def page():
    return docs_script("tuned_scores")


@pytest.fixture
def argv(tmp_path):
    methods = {}
    for method, fd in METHODS.items():
        confirmed = {
            "fd": fd,
            "precision": [0.8, 0.9, 0.7],
            "recall": [0.5, 0.5, 0.5],
            "classifier_accuracy": [1, 1, 1],
        }
        confirmed["integral_ece"] = [None] * 3 if method == "unguided" else [0.1, 0.2, 0.3]
        metrics = {"60": {"precision": 0.5, "recall": 0.6}, "180": {"precision": 0.7, "recall": 0.8}}
        tried = [{"setting": "scale=2", "samples": 180, "metrics": metrics}]
        methods[method] = {"best": "scale=2", "samples": 540, "search": {}, "confirmed": confirmed, "tried": tried}
    folder = tmp_path / "digits"
    folder.mkdir()
    found = {"num_samples": 180, "confirmation_seeds": [7, 8, 9], "methods": methods}
    (folder / "tune.json").write_text(json.dumps(found))
    for name in ("results.md", "README.md"):
        (tmp_path / name).write_text(PAGE)
    places = {"results": "kept.json", "page": "results.md", "readme": "README.md", "images": ""}
    return [str(folder), *(f"--{option}={tmp_path / name}" for option, name in places.items())]


def test_tables_and_plot(page, argv, tmp_path, capsys):
    page.main(argv)
    rows = (tmp_path / "results.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows if row.startswith("| ")] == [
        "| guidance", "| unguided", "| js, Softplus", "| plain, Softplus",
    ]  # fmt: skip
    js = next(row for row in rows if row.startswith("| js"))
    # Of differences −0.1, −0.2, 0: their mean, and 0.1/√3.
    assert js == (
        "| js, Softplus | scale = 2 | 0.50 ± 0.10 | 0.800 ± 0.100 | 0.500 ± 0.000 | 1.000 ± 0.000 | 0.200 ± 0.100 "
        "| -0.100 ± 0.058 |"
    )
    unguided = next(row for row in rows if row.startswith("| unguided"))
    assert unguided.split(" | ")[1] == "–"
    assert unguided.split(" | ")[6] == "–"
    short = (tmp_path / "README.md").read_text()
    assert "| js, Softplus | 0.50 ± 0.10 | 0.800 ± 0.100 |" in short
    assert "scale" not in short
    assert short.startswith("before")
    assert short.endswith("after\n")
    with Image.open(tmp_path / "kept.png") as picture:
        picture.load()
    assert not (tmp_path / "kept.pdf").exists()
    # What is kept is enough to make them again.
    (tmp_path / "README.md").write_text(PAGE)
    page.main(argv[1:])
    assert (tmp_path / "README.md").read_text() == short


def test_candidates_by_accuracy(page, argv, tmp_path):
    """The lowest FD of those that guide at least so strongly, and how many they are."""
    found = json.loads((tmp_path / "digits/tune.json").read_text())
    for method, pairs in {"plain, Softplus": [(0.55, 3.0), (0.75, 1.0)], "js, Softplus": [(0.65, 2.0)]}.items():
        metrics = [{"classifier_accuracy": a, "fd": fd, "precision": 0.5, "recall": 0.5} for a, fd in pairs]
        tried = [
            {"setting": "s", "samples": 60, "metrics": {"60": each, "180": dict.fromkeys(each, 0.0)}}
            for each in metrics
        ]
        found["methods"][method]["tried"] = tried
    del found["methods"]["unguided"]
    (tmp_path / "digits/tune.json").write_text(json.dumps(found))
    (tmp_path / "results.md").write_text(f"{PAGE}<!-- kept_strength -->\n<!-- /kept_strength -->\n")
    page.main(argv)
    rows = (tmp_path / "results.md").read_text().splitlines()
    assert "| lowest FD with an accuracy of at least | 0.5 | 0.6 | 0.7 |" in rows
    assert "| plain, Softplus | 1.00 (2) | 1.00 (1) | 1.00 (1) |" in rows
    assert "| js, Softplus | 2.00 (1) | 2.00 (1) | – |" in rows


def test_nothing_was_measured(page, argv):
    with pytest.raises(SystemExit, match="name the folder"):
        page.main(argv[1:])


def test_cost_of_a_number(tmp_path):
    """Deviations, and samples after the formula: 2·(1.96 + 0.84)²·(std/(0.05·value))²·N."""
    module = docs_script("cost_of_a_number")
    values = {
        "js, Softplus": [1.0, 2.0, 3.0],
        "tempered, Softplus": [1.1, 2.0, 2.9],  # differs by −0.1, 0, 0.1: a tenth of the deviation of each
        "plain, ReLU": [3.0, 2.0, 1.0],
    }
    methods = {method: {"confirmed": dict.fromkeys(module.METRICS, some)} for method, some in values.items()}
    (tmp_path / "kept.json").write_text(json.dumps({"num_samples": 100, "methods": methods}))
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- cifar_{name} -->\n<!-- /cifar_{name} -->\n" for name in ("samples", "gain")))
    module.main([f"--results={tmp_path / 'kept.json'}", f"--page={page}", "--prefix=cifar_"])
    rows = [row.strip("| ").split(" | ") for row in page.read_text().splitlines() if row.startswith("| Fréchet")]
    own = 2 * (1.96 + 0.84) ** 2 * (1 / 0.1) ** 2 * 100
    assert rows[0][1:3] == ["2.000", "1.000"]
    counts = [float(cell.replace(",", "")) for cell in rows[0][3:]]
    assert counts == pytest.approx([own, own * 0.1**2 / 2, own * 2], rel=0.05)
    # √(1 + 0.9²)/0.1 and, against the opposite, √(1 + 1)/2 and √(0.9² + 1)/1.9
    assert rows[1][1:] == ["3", "0.7", "0.7", "13.5"]
