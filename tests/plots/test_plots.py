"""Each plot shows the numbers that it was given, with names, in both formats."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from calib_guidance.diffusion.schedules import NoiseSchedule, named_betas
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation import METRICS
from calib_guidance.guidance import GuidanceSchedule
from calib_guidance.plots import (
    COLORS,
    Contours,
    Series,
    ablation,
    animation,
    curves,
    direction_field,
    guidance_grid,
    guidance_schedule,
    precision_recall,
    real_of_classes,
    reliability,
    sample_grid,
    side_by_side,
    strength,
    strips,
)
from calib_guidance.plots.fronts import fronts
from calib_guidance.plots.style import panel, save

LEVELS = NoiseSchedule(named_betas("linear")).respace("100").levels
T = [0, 250, 500, 999]


def lines(axis, at_least=2):
    return [line for line in axis.get_lines() if len(line.get_xdata()) >= at_least]


def images(n, classes=10, size=8, channels=1, first=0):
    """Samples of a run: every pixel of image i is i."""
    index = np.arange(first, first + n)
    pixels = np.broadcast_to(index[:, None, None, None], (n, channels, size, size)).astype(np.uint8)
    return {"image": pixels, "index": index, "label": index % classes, "seed": np.zeros(n, np.int64)}


def shown(axis):
    """Value and place (column, row) of each image of one value."""
    found = {}
    for image in axis.get_images():
        left, _, _, top = image.get_extent()
        found[int(left), top] = int(np.unique(image.get_array()).item())
    return found


# Curves


def test_a_curve_with_its_band_and_mean(drawn, tmp_path):
    figure = drawn(curves, [Series("", T, [1.0, 2, 3, 4], [0.5, 3, 1, 1])], tmp_path / "a.png", "norm", averages=True)
    (axis,) = figure.axes
    curve, average = lines(axis)
    assert curve.get_xydata().tolist() == [[0, 1], [250, 2], [500, 3], [999, 4]]
    assert list(average.get_ydata()) == [2.5, 2.5]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["mean 2.500"]
    band = axis.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == 5
    assert band[:, 1].min() == 0  # 2 − 3 is less than the quantity can be
    assert axis.get_ylabel() == "norm"
    left, right = axis.get_xlim()
    assert left > 999 > 0 > right  # noise on the left
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.pdf"}


def test_many_curves_can_be_told_apart_without_color(drawn, tmp_path):
    names = [f"score {k}" for k in range(9)]
    series = [(name, T, [k, k + 1, k + 2, k + 3], None) for k, name in enumerate(names)]
    figure = drawn(curves, series, tmp_path / "many", "ECE$_t$", averages=True)
    found = lines(figure.axes[0])
    assert [line.get_ydata()[0] for line in found] == list(range(9))
    assert len({(line.get_color(), line.get_linestyle()) for line in found}) == 9
    assert len({line.get_linestyle() for line in found}) == 4
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [f"{name} (mean {k + 1.5:.3f})" for k, name in enumerate(names)]


def test_points_without_neighbors_are_seen(drawn, tmp_path):
    figure = drawn(curves, [Series("", T, [1.0, None, 3.0, 4.0])], tmp_path / "a", "norm")
    (alone,) = [line for line in lines(figure.axes[0], 1) if line.get_marker() == "o"]
    assert alone.get_xydata().tolist() == [[0, 1]]
    figure = drawn(curves, [Series("", [7], [2.0], [1.0])], tmp_path / "one", "norm")
    assert [line.get_marker() for line in lines(figure.axes[0], 1)][-1] == "o"
    with pytest.raises(ConfigurationError, match="not been measured"):
        curves([Series("", T, [math.nan] * 4)], tmp_path / "none", "norm")


# Reliability


def test_reliability_bars_are_accuracy_and_gap(drawn, tmp_path):
    bins = np.zeros((3, 4, 3))
    bins[0, 3] = 10, 9, 8  # ten samples of confidence 0.9, eight right
    bins[2, 1], bins[2, 2] = (4, 1.6, 3), (12, 6.6, 6)
    figure = drawn(reliability, bins, ["t = 0–9", "empty", "t = 20–29"], tmp_path / "r")
    first, first_share, second, second_share = figure.axes
    assert [axis.get_title() for axis in (first, second)] == ["t = 0–9\nECE 0.100", "t = 20–29\nECE 0.125"]
    accuracy, gap = first.containers
    styles = [bar.get_linestyle() for bar in second.containers[0]]
    assert styles == [":", "solid"]  # of four samples, and of twelve
    assert second.containers[1][0].get_hatch() == ""
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == ["accuracy", "gap to confidence", "below 10 samples"]
    assert [(bar.get_x(), bar.get_height()) for bar in accuracy] == [(0.75, 0.8)]
    assert [(bar.get_y(), bar.get_height()) for bar in gap] == [(0.8, pytest.approx(0.1))]
    assert [bar.get_height() for bar in second_share.containers[0]] == [0, 0.25, 0.75, 0]
    assert [bar.get_height() for bar in second.containers[0]] == [0.75, 0.5]
    assert first_share.get_xlabel() == "confidence"
    assert (first.get_ylabel(), first_share.get_ylabel()) == ("accuracy", "fraction")
    figure = drawn(reliability, np.tile(bins[2], (5, 1, 1)), [f"t = {k}" for k in range(5)], tmp_path / "five")
    *panels, sixth = figure.axes
    assert len(panels) == 10
    assert not figure.legends
    assert len(sixth.get_legend().get_texts()) == 3  # in the cell that has no panel
    with pytest.raises(ConfigurationError, match="seen no samples"):
        reliability(bins[1:2], ["empty"], tmp_path / "none")


# Grids


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_has_a_class_in_each_row(drawn, tmp_path, channels):
    samples = images(40, channels=channels)
    batches = [{name: column[part] for name, column in samples.items()} for part in (slice(0, 25), slice(25, 40))]
    figure = drawn(sample_grid, batches, tmp_path / "grid", rows=4, columns=3)
    expected = {(c, float(r)): 10 * c + r for r in range(4) for c in range(3)}
    assert shown(figure.axes[0]) == expected
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "1", "2", "3"]
    with pytest.raises(ConfigurationError, match="no samples"):
        sample_grid([], tmp_path / "none")


def test_grid_names_its_classes(drawn, tmp_path):
    names = {0: "red fox", 2: "a class of many words that is broken"}
    names |= dict.fromkeys(range(3, 10), "tall grand piano of long name")
    figure = drawn(sample_grid, [images(100)], tmp_path / "named", names=names)
    found = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert found[:3] == ["red fox", "1", "a class of\nmany words …"]
    assert len(found) == 10  # of classes of one name too


@pytest.mark.parametrize("width", [3.3, 7])
def test_long_class_names_are_drawn_in_full(tmp_path, width):
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    dark = np.zeros((10, 3, 16, 16), np.uint8)
    paths = side_by_side({"unguided": dark, "calibrated": dark}, names, tmp_path / "side", width)
    batch = {"label": np.repeat(np.arange(10), 10), "image": np.repeat(dark, 10, axis=0)}
    paths += sample_grid([batch], tmp_path / "grid", names=dict(enumerate(names)))
    for path in paths:
        if path.suffix == ".png":
            pixels = np.asarray(Image.open(path).convert("L"))
            for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
                assert edge.min() == 255, path.name


def test_side_by_side_has_a_run_in_each_row_and_the_same_sample_in_each_column(drawn, tmp_path):
    a = images(4)["image"]
    runs = {"plain": a, "tempered, Softplus, scale 2": a + 100}
    ten = {name: images(10)["image"] for name in runs}
    drawn(side_by_side, ten, ["a class of many words"] * 10, tmp_path / "ten")
    figure = drawn(side_by_side, runs, ["3", "4", "fox", "a class of many words"], tmp_path / "side")
    assert shown(figure.axes[0]) == {(c, float(r)): c + 100 * r for c in range(4) for r in range(2)}
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["3", "4", "fox", "a class of…"]
    for wrong, classes in (({"a": a, "b": images(4, size=16)["image"]}, ["0"] * 4), ({"a": a[:0]}, []), ({}, ["0"])):
        with pytest.raises(ConfigurationError, match="samples of one size"):
            side_by_side(wrong, classes, tmp_path / "none")


# Strips


def test_strips_show_one_scale_for_each_sample(drawn, tmp_path):
    x0 = np.broadcast_to(np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1), (2, 3, 3, 4, 4))
    gradient = np.ones((2, 3, 2, 4, 4)) * np.array([0.5, 0.25, np.nan]).reshape(1, 3, 1, 1, 1)
    gradient[1] *= -4
    figure = drawn(strips, x0, gradient, [999, 500, 0], ["class 3", "class 5"], tmp_path / "s")
    (axis,) = figure.axes
    pictures = [im for im in axis.get_images() if im.get_array().ndim == 3]
    maps = [im for im in axis.get_images() if im.get_array().ndim == 2]
    assert [int(np.unique(im.get_array()).item()) for im in pictures] == list(range(6))
    assert [float(np.unique(im.get_array()).item()) for im in maps] == [
        0.5,
        0.25,
        -2,
        -1,
    ]  # none where no classifier ran
    assert [im.get_clim() for im in maps] == [(-0.5, 0.5)] * 2 + [(-2, 2)] * 2
    assert [text.get_text() for text in axis.texts] == ["±0.5", "±2"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["999", "500", "0"]
    assert {im.get_interpolation() for im in axis.get_images()} == {"nearest"}
    figure = drawn(strips, x0, gradient * np.nan, [999, 500, 0], ["3", "5"], tmp_path / "unguided")
    assert len(figure.axes[0].get_images()) == 6
    with pytest.raises(ConfigurationError, match="no trajectory"):
        strips(x0[:0], gradient[:0], [999, 500, 0], [], tmp_path / "none")


def real_images():
    """Two of class 3 and one of class 5, of one gray level each."""
    image = np.stack([np.full((3, 4, 4), level, np.uint8) for level in (30, 31, 50)])
    return {"label": np.array([3, 3, 5]), "image": image}


def test_a_real_image_for_each_sample_while_there_are_some():
    found = real_of_classes([5, 3, 3, 3, 7], (3, 4, 4), real_images())
    assert [None if image is None else int(image.flat[0]) for image in found] == [50, 30, 31, None, None]
    assert real_of_classes([3], (3, 8, 8), real_images()) == [None]  # of another size
    assert real_of_classes([3], (3, 4, 4), None) == [None]


def test_strips_have_real_images_beside_them(drawn, tmp_path):
    x0 = np.zeros((2, 3, 3, 4, 4), np.uint8)
    gradient, t, names = np.ones((2, 3, 3, 4, 4)), [999, 500, 0], ["red fox", "class 7"]
    real = real_of_classes([3, 7], (3, 4, 4), real_images())
    (axis,) = drawn(strips, x0, gradient, t, names, tmp_path / "s", real=real).axes
    pictures = [im for im in axis.get_images() if im.get_array().ndim == 3]
    assert [int(im.get_array().max()) for im in pictures] == [0, 0, 0, 30, 0, 0, 0]  # of class 7 there is none
    assert pictures[3].get_extent()[0] > pictures[2].get_extent()[1]
    assert pictures[3].get_extent()[2:] == pictures[2].get_extent()[2:]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["999", "500", "0", "real"]


def test_grid_of_scores_and_scales(drawn, tmp_path):
    levels = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1)
    cells = np.broadcast_to(levels, (2, 3, 1, 4, 4))
    (axis,) = drawn(guidance_grid, cells, ["plain", "forward KL"], [0, 0.5, 12.5], tmp_path / "g", title="red fox").axes
    assert shown(axis) == {(c, float(r)): 3 * r + c for r in range(2) for c in range(3)}
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "0.5", "12.5"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["plain", "forward KL"]
    assert axis.get_xlabel() == "scale $s$  (red fox)"
    with pytest.raises(ConfigurationError, match="an image for each"):
        guidance_grid(cells, ["plain"], [0, 0.5, 12.5], tmp_path / "none")


@pytest.mark.parametrize("channels", [1, 3])
def test_animation_has_a_frame_for_each_step(tmp_path, channels):
    levels = np.array([[0, 100, 200], [250, 150, 50]], np.uint8)
    x0 = np.broadcast_to(levels[:, :, None, None, None], (2, 3, channels, 8, 8))
    real = [np.full((channels, 8, 8), 77, np.uint8), None]
    names = ["red fox", "a class of very many words"]
    (path,) = animation(x0, [999.0, 500.0, 0.0], names, tmp_path / "moving", real)
    assert path == tmp_path / "moving.gif"
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"]) == (3, 0)
        shown = []
        for frame in range(3):
            image.seek(frame)
            pixels = np.asarray(image.convert("RGB")).astype(int)
            shown.append([pixels[68, 56].mean(), pixels[68, 160].mean()])
            assert abs(pixels[68 + 96 + 28, 56].mean() - 77) < 4  # the real image, below
            assert pixels[68 + 96 + 28, 160].min() > 250  # there is none
        durations = [image.seek(frame) or image.info["duration"] for frame in range(3)]
    assert np.abs(np.array(shown).T - levels).max() < 4  # a palette of 256 colors
    assert durations[0] == durations[1] < durations[2]
    (path,) = animation(x0, [999.0, 500.0, 0.0], names, tmp_path / "alone.gif")
    with Image.open(path) as image:
        assert image.height < 200
    large = np.zeros((1, 2, channels, 400, 200), np.uint8)
    with Image.open(animation(large, [1, 0], ["a"], tmp_path / "large")[0]) as image:
        assert image.width < 110  # reduced
    with pytest.raises(ConfigurationError, match="no trajectory"):
        animation(x0[:0], [], [], tmp_path / "none")


# Ablations

LABELS = {key: spec.title for key, spec in METRICS.items()}
POINTS = [
    (0.5, {"fd": (5.27, 0.1), "precision": (0.80, None), "recall": (0.60, 0.01)}),
    (0.0, {"fd": (6.0, 0.2), "precision": (0.83, 0.02), "recall": (0.55, 0.02)}),
    (1.0, {"fd": (None, None), "precision": (0.78, 0.01), "recall": (0.62, 0.01)}),
]


def test_ablation_has_a_panel_for_each_metric_with_error_bars(drawn, tmp_path):
    figure = drawn(ablation, POINTS, r"$\tau_2$", tmp_path / "a", labels=LABELS)
    distance, precision, recall = figure.axes
    values = [axis.containers[0][0].get_xydata() for axis in figure.axes]
    np.testing.assert_array_equal(values[0], [[0, 6.0], [0.5, 5.27], [1, np.nan]])
    np.testing.assert_array_equal(values[1], [[0, 0.83], [0.5, 0.80], [1, 0.78]])
    bars = [segment[:, 1] for segment in distance.containers[0][2][0].get_segments() if len(segment)]
    np.testing.assert_allclose(bars[:2], [[5.8, 6.2], [5.17, 5.37]])
    spreads = [np.diff(segment[:, 1]) for segment in precision.containers[0][2][0].get_segments() if len(segment)]
    assert np.isnan(spreads[1]).all() or len(spreads) == 2  # of 0.5 no std is known
    assert [axis.get_ylabel() for axis in figure.axes] == ["Fréchet distance ↓", "precision ↑", "recall ↑"]
    assert recall.get_xlabel() == r"$\tau_2$"
    bars = [segment[:, 1] for segment in recall.containers[0][2][0].get_segments()]
    np.testing.assert_allclose(bars, [[0.53, 0.57], [0.59, 0.61], [0.61, 0.63]])


def test_ablation_of_words_and_of_one_value(drawn, tmp_path):
    names = ["plain", "tempered", "entropy", "reverse KL", "forward KL", "Jensen–Shannon"]
    points = [(name, {"recall": (0.5 + k / 100, 0.01)}) for k, name in enumerate(names)]
    figure = drawn(ablation, points, "score", tmp_path / "words", held="scale = 2")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == names
    assert figure.axes[0].containers[0][0].get_linestyle() == "None"  # nothing lies between two words
    assert figure.axes[0].get_title(loc="left") == "scale = 2"
    figure = drawn(ablation, [(1, {"my_metric": (2.0, None)})], "scale", tmp_path / "one")
    assert figure.axes[0].get_ylabel() == "my metric"
    for points, words in (([], "no value"), ([(1, {"recall": (None, None)})], "no metric")):
        with pytest.raises(ConfigurationError, match=words):
            ablation(points, "α", tmp_path / "none")


def test_precision_over_recall_names_each_value(drawn, tmp_path):
    figure = drawn(precision_recall, POINTS, r"$\tau_2$", tmp_path / "pr")
    (axis,) = figure.axes
    assert axis.containers[0][0].get_xydata().tolist() == [[0.55, 0.83], [0.60, 0.80], [0.62, 0.78]]
    assert [text.get_text() for text in axis.texts] == ["0", "0.5", "1"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("recall ↑", "precision ↑")
    assert axis.containers[0][0].get_linestyle() == "-"
    words = [(name, measured) for name, (_, measured) in zip("abc", POINTS, strict=True)]
    (axis,) = drawn(precision_recall, words, "score", tmp_path / "words", held="scale = 2").axes
    assert axis.containers[0][0].get_linestyle() == "None"
    assert axis.get_title(loc="left") == "score (at scale = 2)"
    # Of points that nearly coincide the texts still do not.
    near = [(k / 10, {"precision": (0.8 + k / 1e4, None), "recall": (0.6, None)}) for k in range(5)]
    spread = [(2.0, {"precision": (0.5, None), "recall": (0.3, None)})]
    drawn(precision_recall, near + spread, "γ", tmp_path / "near")
    with pytest.raises(ConfigurationError, match="both"):
        precision_recall([(1, {"precision": (0.5, None)})], "γ", tmp_path / "none")


# Schedule


def test_strength_follows_the_papers(drawn, tmp_path):
    alphas = LEVELS.alphas_cumprod
    betas = np.append(1 - alphas[0], 1 - alphas[1:] / alphas[:-1])
    progress = np.arange(100) / 100
    largest = [betas[k:].max() for k in range(100)]
    expected = 2 * (betas + 0.3 * np.sin(np.pi * progress) * largest) / betas.max()
    np.testing.assert_allclose(strength(GuidanceSchedule(0.3), LEVELS, scale=2.0), expected)
    np.testing.assert_allclose(strength(GuidanceSchedule(), LEVELS, "noise"), np.sqrt(1 - alphas))
    np.testing.assert_allclose(
        strength(GuidanceSchedule(0.5), LEVELS, "difference"), 1 + 0.5 * np.sin(np.pi * progress)
    )
    shift = strength(GuidanceSchedule(), LEVELS, "shift")
    assert (shift[-1], shift[0]) == (1, pytest.approx(2 / 101))
    off = strength(GuidanceSchedule(interval=[200, 600]), LEVELS, "difference")
    assert ((off > 0) == ((LEVELS.times >= 200) & (LEVELS.times <= 600))).all()
    with pytest.raises(ValueError, match="unknown 'x'"):
        strength(GuidanceSchedule(), LEVELS, "x")
    curves = {"without": shift, "with": off}
    figure = drawn(guidance_schedule, LEVELS.times, curves, tmp_path / "g", "difference")
    found = lines(figure.axes[0])
    np.testing.assert_array_equal([line.get_ydata() for line in found], [shift, off])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(curves)
    assert figure.axes[0].get_ylim()[0] == 0


# Directions


def test_arrows_that_lead_away_from_the_mode_have_another_color(drawn, tmp_path):
    v = np.linspace(-1, 1, 5)
    points = np.stack(np.meshgrid(v, v), -1).reshape(-1, 2)
    mode = np.array([0.0, 0.0])
    gradients = {"joint": -points, "conditional": np.stack([np.ones(25), np.full(25, 0.0)], 1)}
    gradients["conditional"][3] = np.nan
    own = Contours(v, v, np.exp(-(points**2).sum(1)).reshape(5, 5), [0.5, 0.9])
    figure = drawn(direction_field, points, gradients, mode, tmp_path / "f", own, [own], {"k": (0.5, 0.5)})
    joint, conditional = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["joint", "conditional"]
    arrows = [next(c for c in axis.collections if hasattr(c, "U")) for axis in figure.axes]
    assert len(arrows[0].U) == 24  # none at the mode itself
    assert len(arrows[1].U) == 24  # none where there is no number
    assert (arrows[0].get_facecolor() == to_rgba(COLORS[0])).all()
    right = arrows[1].get_offsets()[:, 0] > 0
    away = (arrows[1].get_facecolor() == to_rgba(COLORS[1])).all(1)
    assert (right == away).all()
    np.testing.assert_allclose(np.hypot(arrows[0].U, arrows[0].V) ** 2, np.linalg.norm(arrows[0].get_offsets(), axis=1))
    assert (conditional.get_xlabel(), joint.get_ylabel()) == ("$x_1$", "$x_2$")


def test_files_depend_on_nothing_but_what_is_drawn(tmp_path):
    series = [Series("", T, [1, 2, 3, 4])]
    one, two = (curves(series, tmp_path / name / "x.y", "norm") for name in ("a", "b"))
    assert [path.name for path in one] == ["x.y.png", "x.y.pdf"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_a_plot_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    figure, _ = panel(1.0)
    paths = save(figure, tmp_path / "plots/a")
    before = [path.read_bytes() for path in paths]

    def half(figure, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(type(figure), "savefig", half)
    with pytest.raises(OSError, match="no space"):
        save(figure, tmp_path / "plots/a")
    assert [path.read_bytes() for path in paths] == before
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths)


@pytest.mark.parametrize("count", [3, 10, 20])
def test_fronts_name_every_method(drawn, tmp_path, count):
    """No two look the same, and the legend of many covers no points."""
    points = {f"method {k} of the search": [(k / 20, 0.5), (0.1, k / 20)] for k in range(count)}
    figure = drawn(fronts, points, ("recall", "precision"), (-1, -1), tmp_path / "front")
    axis = figure.axes[0]
    named = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in named] == list(points)
    assert len({(line.get_color(), line.get_marker()) for line in named}) == count
    legend = axis.get_legend() or figure.legends[0]
    assert len(legend.get_texts()) == count
    if count > 4:
        assert not legend.get_window_extent().overlaps(axis.get_window_extent())
