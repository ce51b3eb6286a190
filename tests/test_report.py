"""What ``calib-guidance report`` says of runs, and how a browser shows it."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from calib_guidance.cli import main
from calib_guidance.report import pictures
from calib_guidance.runs import RunFolder
from tests.browser import Browser, find_browser
from tests.test_status_and_export import table

VOID = {"br", "img", "link", "meta", "wbr"}
CONFIG = {
    "trainer": {"devices": 1, "callbacks": [{"class_path": "x.RunReport", "init_args": {"plots": True}}]},
    "model": {
        "class_path": "calib_guidance.tasks.GuidedSampling",
        "init_args": {"sampler": {"class_path": "calib_guidance.samplers.DDPM", "init_args": {"steps": "50"}}},
    },
    "data": {"class_path": "calib_guidance.data.SampleRequests", "init_args": {"seed": 0, "num_samples": 12}},
}
METRICS = {
    "num_samples": 12,
    "fd": 0.44667752825020557,
    "precision": 0.92,
    "clip_score": None,
    "uncertainty": {"fd": {"std": 0.0125, "low": 0.4221, "high": 0.4712, "of": "bootstrap, 200 draws"}},
    "notes": ["biased upwards <12 samples>"],
    "provenance": {"features": {"extractor": "pixels", "weights_sha256": "feed" * 16, "resize": {"size": None}}},
    "by_class": {
        "0": {"num_samples": 4, "precision": 0.75, "std": {"precision": 0.21}, "skipped": {}},
        "1": {"num_samples": 4, "skipped": {"precision": "too few"}, "std": {}},
    },
    "ece_t": {"t": [0.0, 500.0, 999.0], "ece": [0.01, None, 0.3]},
    "gradient_norm_t": {"t": [0.0, 500.0, 999.0], "mean": [0.5, 1.0, 3.0], "std": [0.1, 0.2, 0.5]},
    "guidance_schedule": {"t": [0.0, 999.0], "unit": "variance", "strength": {"without sine factor": [0.0, 1.0]}},
    "reliability": {"levels": ["t = 0–499", "t = 500–999"], "bins": [[[4, 3.0, 2]], [[0, 0.0, 0]]]},
}


def make(folder, metrics=METRICS, changes=None, seed=0, num_samples=12, shift=0, shards=None, predictions=True):
    """A run of 4×4 images as predict leaves it; ``changes`` are settings of its sampler."""
    run = RunFolder(folder, 4, num_samples)
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["model"]["init_args"]["sampler"]["init_args"].update(changes or {})
    config["trainer"]["default_root_dir"] = str(folder)
    settings = config["model"]["init_args"]["sampler"]["init_args"].items()
    run.begin({f"model.init_args.sampler.init_args.{key}": value for key, value in settings} | {"seed": seed}, {})
    for number, shard in enumerate(run.shards()):
        if shards is None or number in shards:
            assert run.claims.acquire(shard)
            rows = table(shard).to_pydict()
            rows["seed"] = [seed] * len(shard)
            for image, index in zip(rows["image"], shard, strict=True):
                image["bytes"] = png(pixels(index) + np.uint8(shift * (index == 5)))
            run.write(shard, type(table(shard)).from_pydict(rows), failed=[], seconds=1.0, device="cpu")
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if predictions:
        index = np.arange(num_samples)
        confidence = np.linspace(0.05, 0.95, num_samples).astype(np.float32)
        predicted = np.where(index == 0, 2, index % 3)
        np.savez(folder / "predictions.npz", index=index, label=index % 3, predicted=predicted, confidence=confidence)
    return folder


def pixels(index):
    return np.random.default_rng(index).integers(0, 200, (4, 4, 3), dtype=np.uint8)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


class Page(HTMLParser):
    """The elements of a page: ``[tag, attributes, text, inside]`` each, ``text`` with that of the elements in it."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.elements, self._open = [], []
        self.feed(self.source)
        self.close()
        assert not self._open, "elements are left open"

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), "", [*self._open]])
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e[0] == tag and all(e[1].get(k) == v for k, v in attributes.items())]

    def cells(self, metric):
        """Values of the cells of a metric, as they are stored."""
        inside = (e for e in self.all("data") if any(o[1].get("data-metric") == metric for o in e[3]))
        return [float(e[1]["value"]) for e in inside]

    @property
    def text(self):
        return self.all("body")[0][2]


def report(*arguments):
    """The page of a command that names where it goes last."""
    main(["report", *map(str, arguments)])
    return Page(arguments[-1])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The page of two runs that differ in one setting and one sample."""
    root = tmp_path_factory.mktemp("two")
    first = make(root / "first <b>$x$")
    far = METRICS | {"fd": 0.6, "notes": []}
    far["uncertainty"] = {"fd": {"std": 0.01, "low": 0.58, "high": 0.62, "of": "bootstrap, 200 draws"}}
    second = make(root / "second", far, {"steps": "100"}, shift=40)
    rng = np.random.default_rng(0)
    kept = {"x0": rng.integers(0, 256, (2, 3, 3, 4, 4), dtype=np.uint8), "gradient": rng.normal(size=(2, 3, 3, 4, 4))}
    np.savez(second / "trajectory.npz", index=[0, 1], label=[0, 1], t=[999.0, 500.0, 0.0], **kept)
    (first / "evaluation").mkdir()
    evaluated = {"inception_score": 3.25, "num_measured": 12, "kd": 1.25e-7}
    (first / "evaluation/metrics.json").write_text(json.dumps(evaluated))
    page = report(first, second, "--plots", root / "plots", "--output", root / "page.html")
    page.path, page.runs = root / "page.html", (first, second)
    return page


def test_the_page_needs_nothing_from_anywhere(two):
    for tag, attributes, *_ in two.elements:
        assert tag not in {"script", "iframe", "object", "embed", "video", "audio", "form"}
        assert not {name for name in attributes if name.startswith("on")} | (attributes.keys() & {"srcset", "style"})
        for name in ("src", "href"):
            value = attributes.get(name, "")
            assert value.startswith("data:") or (tag == "a" and value.startswith("#")) or not value, (tag, value)
    assert not re.search(r"@import|url\(", two.source)
    ids = {e[1]["id"] for e in two.elements if "id" in e[1]}
    assert {e[1]["href"][1:] for e in two.all("a")} <= ids
    (policy,) = two.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy[1]["content"].startswith("default-src 'none'")


def test_every_picture_is_one_and_is_described(two):
    images = two.all("img")
    # Two grids, side by side, ECE_t, gradient norm, schedule, two reliability diagrams, strips; the sample that differs of
    # both runs; the evaluation classifier's best and worst.
    assert len(images) == 9 + 2 + 2 * 12
    for _, attributes, *_ in images:
        assert attributes["alt"]
        data = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).size == (int(attributes["width"]), int(attributes["height"]))


def test_its_plots_are_kept_as_png_and_pdf(two):
    kept = {path.name: path.read_bytes() for path in (two.path.parent / "plots").iterdir()}
    names = {Path(name).stem for name in kept}
    assert {"ece_t", "gradient_norm", "side_by_side", "trajectory_second", "samples_first_b_x_"} <= names
    assert kept.keys() == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    on_page = two.path.read_text()
    for name in names:
        assert kept[f"{name}.pdf"].startswith(b"%PDF")
        assert base64.b64encode(kept[f"{name}.png"]).decode() in on_page


def test_samples_come_first_and_settings_are_folded(two):
    assert [e[2].split("<")[0] for e in two.all("h2")] == [
        "Samples",
        "Measurements",
        "Along the trajectory",
        "The evaluation classifier's best and worst",
        "Runs and settings",
    ]
    for element in two.elements:
        if element[0] == "pre" or element[1].get("class") in ("key", "part"):
            assert any(outer[0] == "details" for outer in element[3])
    assert f"calib-guidance report {two.runs[0]} {two.runs[1]}" in two.all("footer")[0][2]


def test_a_plot_is_enlarged_and_closed_by_links(two):
    """Its own address is the target that the style enlarges; there is no script and no second copy of the picture."""
    figures = [e for e in two.all("figure") if "id" in e[1]]
    assert len(figures) == 9
    for figure in figures:
        inside = [e for e in two.elements if figure in e[3]]
        enlarge, close = (e[1]["href"] for e in inside if e[0] == "a")
        assert enlarge == f"#{figure[1]['id']}"
        assert close in ("#samples", "#trajectory")
    assert ".figures figure:target { position: fixed;" in two.source


def test_numbers_are_those_that_were_measured(two):
    first, second = (json.loads((run / "metrics.json").read_text()) for run in two.runs)
    for name in ("fd", "precision", "num_samples"):
        assert two.cells(name) == [first[name], second[name]]
    assert two.cells("inception_score") == [3.25]
    assert two.cells("clip_score") == []
    assert two.all("td", **{"data-metric": "kd"})[0][2] == "1.25e-07"  # and not 0.0000
    cells = [e[2] for e in two.all("td", **{"data-metric": "fd"})]
    assert [" ".join(cell.split()) for cell in cells] == ["0.447 ± 0.0130.422 to 0.471", "0.600 ± 0.0100.580 to 0.620"]
    # Their intervals lie apart, those of precision are not known.
    marked = [e[2] for e in two.all("mark")]
    assert "0.600 ± 0.010" in marked
    assert "0.920" not in marked
    assert "Fréchet distance: bootstrap, 200 draws" in two.text
    assert "first <b>$x$: biased upwards <12 samples>" in two.text
    assert "feed" * 16 in two.text
    assert sorted(two.cells("by_class")) == [0.75, 0.75, 4, 4, 4, 4]


def test_settings_that_differ_are_told_apart(two):
    rows = {e[2] for e in two.all("th", scope="row")}
    assert "model.init_args.sampler.init_args.steps" in rows
    assert {"50", "100"} <= {e[2] for e in two.all("td", **{"class": "setting"})}
    assert "100" in {e[2] for e in two.all("mark")}
    assert "trainer.default_root_dir" not in rows
    for header in two.all("th"):
        assert header[1]["scope"] in ("row", "col")


def test_the_same_noise_side_by_side(two):
    assert "12 samples have the same index, seed and label" in two.text
    (card,) = [e for e in two.all("li") if e[2].startswith("5: class 2, seed 0")]
    # 40 gray levels more in every channel of sample 5, nothing else.
    assert "distance 40.0" in card[2]
    shown = {attributes["src"] for _, attributes, *_ in two.all("img", **{"class": "sample small"})}
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2])))) for src in shown]
    for expected in (pixels(5), pixels(5) + np.uint8(40)):
        assert any(np.array_equal(image, expected) for image in decoded)


def test_the_eval_classifier_shows_its_best_and_worst(two):
    worst, best = (e[2] for e in two.all("ul", **{"class": "samples"})[:2])
    assert re.findall(r"sample (\d+)", worst) == ["0", "1", "2", "3", "4", "5"]
    assert re.findall(r"sample (\d+)", best) == ["11", "10", "9", "8", "7", "6"]
    assert re.findall(r"0\.\d+", worst)[0] == "0.050"
    assert "seen as 2" in worst
    assert "seen as" not in best


def test_one_run_by_itself_and_names_of_runs(tmp_path, capsys):
    metrics = {"fd": 0.5, "fd_note": "few", "seconds_per_image": 0.1}  # without any new key
    make(tmp_path / "x/run", metrics, predictions=False)
    main(["report", str(tmp_path / "x/run")])
    page = Page(tmp_path / "x/run/report.html")
    assert page.cells("fd") == [0.5]
    assert "few" in page.text
    assert "steps = 50" in page.text
    assert "No evaluation classifier has looked at the samples of this run" in page.text
    assert "report.html" in capsys.readouterr().out
    assert report(tmp_path / "x/run", "--output", tmp_path / "again.html").source == page.source
    folder = make(tmp_path / "y/run", None, predictions=False, seed=3)
    (folder / "evaluation").mkdir()
    (folder / "evaluation/metrics.json").write_text('{"precision": 0.7, "by_class": {"0": 3}}')
    page = report(tmp_path / "x/run", tmp_path / "y/run", "--output", tmp_path / "both.html")
    assert page.all("title")[0][2] == "Guided samples: x/run, y/run"
    assert "y/run has other seeds (3) than x/run (0)" in page.text
    assert "What evaluate measured cannot be shown" in page.text
    assert page.cells("precision") == []


def test_real_images_beside_samples_and_names_of_classes(tmp_path):
    folder = make(tmp_path / "run")
    label = np.array([0, 0, 1, 7])
    image = np.stack([pixels(100 + k).transpose(2, 0, 1) for k in range(4)])
    np.savez(folder / "reference_images.npz", label=label, name=np.array(["fox", "fox", "", "owl"]), image=image)
    page = report(folder, "--output", tmp_path / "page.html")
    first, second = page.all("img")[:2]
    assert first[1]["alt"].endswith(
        "the first samples by index of each class, not chosen, a row for each of the classes fox, 1, 2."
    )
    assert "real images of the same classes, from the reference" in second[1]["alt"]
    assert "class fox" in page.text
    (tmp_path / "names.txt").write_text("red fox\ncar\ntwo cats\n")
    page = report(folder, "--names", tmp_path / "names.txt", "--output", tmp_path / "page.html")
    assert "class red fox" in page.text
    assert "seen as two cats" in page.text


def test_an_evaluation_of_other_samples_is_not_shown(tmp_path):
    """Measured; then a shard is written again with other pixels, and then the run is extended."""
    folder = make(tmp_path / "run", METRICS | {"provenance": {"samples": {"shards_sha256": "0" * 64}}})
    (folder / "evaluation").mkdir()
    said = {"shards_sha256": RunFolder.open(folder).samples_sha256()}
    measured = {"inception_score": 3.25, "num_measured": 12, "provenance": {"samples": said}}
    (folder / "evaluation/metrics.json").write_text(json.dumps(measured))
    page = report(folder, "--output", tmp_path / "page.html")
    assert page.cells("inception_score") == [3.25]
    assert page.cells("fd") == []
    assert (
        "metrics.json is not shown: it is of other samples than those that are there now. Re-run predict." in page.text
    )
    assert "No evaluation classifier has looked" in page.text  # nor its predictions
    make(tmp_path / "other", shift=40)
    for name in ("samples/00000004.parquet", "shards/00000004.json"):
        (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    page = report(folder, "--output", tmp_path / "page.html")
    assert page.cells("inception_score") == []
    assert "evaluation/metrics.json is not shown: it is of other samples than those that are there now." in page.text
    assert f"calib-guidance evaluate {folder} measures them" in page.text
    (folder / "evaluation/metrics.json").write_text('{"inception_score": 3.25, "num_measured": 11, "provenance": 3}')
    page = report(folder, "--output", tmp_path / "page.html")
    assert "evaluation/metrics.json is not shown: it is of 11 samples, and there are 12 now" in page.text


def test_a_run_that_is_not_complete_and_damaged(tmp_path):
    folder = make(tmp_path / "run", None, num_samples=20, shards=(0, 1, 2, 3))
    data = bytearray((folder / "samples/00000004.parquet").read_bytes())
    data[40] ^= 255  # found only by its checksum
    (folder / "samples/00000004.parquet").write_bytes(data)
    (folder / "samples/00000008.parquet").write_bytes(b"short")
    data = (folder / "samples/00000012.parquet").read_bytes()
    (folder / "samples/00000012.parquet").write_bytes(data[:8] + bytes(len(data) - 16) + data[-8:])
    (folder / "config.yaml").write_text("a: [")
    (folder / "metrics.json").write_text('{"precision": 0.5, "ece_t": {"t": [1]}, "gradient_norm_t": 3}')
    (folder / "predictions.npz").write_bytes(b"PK no archive")
    (folder / "trajectory.npz").write_bytes(b"PK no archive")
    page = report(folder, "--output", tmp_path / "page.html")
    for remark in (
        "Not complete: 12 of 20 samples are made",
        "samples 4 to 7 are not shown on this page",
        "samples 8 to 11 are not shown on this page (00000008.parquet has 5 bytes",
        "samples 12 to 15 are not shown on this page (00000012.parquet is not a table of samples",
        "config.yaml is damaged",
        "ECE_t cannot be shown, what is kept of it is damaged: there is no 'ece'.",
        "The gradient norm cannot be shown",
        "predictions.npz is damaged (not a valid npz file",
        "The strips over the trajectory cannot be shown",
    ):
        assert page.text.count(remark) == 1, remark
    assert page.cells("precision") == [0.5]
    (grid,) = page.all("img")
    assert grid[1]["alt"].endswith("not chosen, a row for each of the classes 0, 1, 2.")


def test_a_run_that_has_just_started(tmp_path):
    first, second = (make(tmp_path / name, None, shards=(), predictions=False) for name in "ab")
    page = report(first, second, "--output", tmp_path / "page.html")
    assert "Not complete: 0 of 12 samples are made" in page.text
    assert "There are no samples yet" in page.text
    assert "Nothing has been measured yet" in page.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "missing: no such folder"),
        (["empty"], "empty holds no run: there is no run.json in it"),
        (["run", "empty/../run"], "empty/../run is given twice"),
        (["run", "--output", "empty"], "--output: empty is a folder"),
        (["run", "--output", "run/run.json/page.html"], "--output: run/run.json cannot be written"),
        (["run", "--plots", "run/run.json"], "--plots: run/run.json cannot be written"),
        (["broken"], "broken/run.json is corrupted"),
    ],
)
def test_what_is_refused(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "run", None, shards=())
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken/run.json").write_text("{")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main(["report", *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("there is no chromium here (Debian: apt-get install chromium)")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(two, browser, width):
    browser.open(two.path, width)
    browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.messages == []
    assert browser.requests == [two.path.as_uri()]
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    # Nothing hangs over the edge but what scrolls in a box of its own.
    over = "[...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
    assert browser.evaluate(f"{over} && !e.closest('.box, pre')).map(e => e.tagName + ' ' + e.className)") == []
    assert browser.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
    sizes = "[...document.querySelectorAll('p, td, th, li, figcaption, code')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert browser.evaluate(f"Math.min(...{sizes})") >= 10.5


def test_the_browser_would_complain(browser, tmp_path):
    """What the test above asserts on is seen where it is there."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<meta name=viewport content='width=device-width'><div style='width: 2000px'>wide</div>"
        "<img src='http://127.0.0.1:9/none.png'><script>console.error('oh')</script>"
    )
    browser.open(path, 390)
    assert "oh" in browser.messages
    assert "http://127.0.0.1:9/none.png" in browser.requests
    assert browser.evaluate("document.documentElement.scrollWidth") > 390


def test_large_samples_are_reduced_and_small_ones_kept():
    picture = pictures.sample(np.full((1, 320, 240), 7, np.uint8), "a sample")
    assert (picture.width, picture.height, picture.alt) == (120, 160, "a sample")
    image = Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2])))
    assert np.array_equal(image, np.full((160, 120), 7))
    assert pictures.sample(np.zeros((3, 8, 12), np.uint8), "")[1:3] == (12, 8)
