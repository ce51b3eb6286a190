"""The metric table: one entry for each metric, and metrics of a user's own module from YAML and the command line."""

import json
import re
import sys

import jsonargparse
import lightning as L
import pytest
import torch
import yaml

from calib_guidance.backend.choices import METRIC_OPTIONS
from calib_guidance.callbacks import SampleQuality
from calib_guidance.cli import main
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation import METRICS, InceptionFeatures, MetricSpec, TimmFeatures
from calib_guidance.evaluation.metrics import select
from calib_guidance.evaluation.spec import Measures, SampleSet
from calib_guidance.evaluation.statistics import ReferenceStatistics
from calib_guidance.metrics import density_coverage, frechet_distance, mean_and_covariance, precision_recall
from calib_guidance.report.tables import table
from tests.callbacks.test_quality import run_and_trainer
from tests.image_files import Projection, pictures, write

OWN = '''
"""Mean distance from each sample to the nearest reference image."""

import torch

from calib_guidance.evaluation import Estimate, MetricSpec


def nearest(samples):
    distances = torch.cdist(samples.features, samples.reference_features).amin(1)
    samples.notes.append(f"nearest: of {samples.num_samples} samples")
    return samples.mean(distances, "samples")


NEAREST = MetricSpec(
    "nearest_distance",
    "nearest distance",
    "{:.2f}",
    higher_is_better=True,
    needs=("features", "reference_features"),
    compute=nearest,
)


def widest():
    return MetricSpec("widest", "widest feature", compute=lambda samples: Estimate(samples.features.std(0).amax()))


TAKEN = MetricSpec("precision", "mine", compute=nearest)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_metrics", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def nearest(samples, reference):
    with torch.no_grad():
        features = [Projection()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).pool for pixels in (samples, reference)]
    return torch.cdist(*features).amin(1).double()


def test_a_metric_of_your_own_from_the_command_line(own, capsys):
    (pixels, labels), (real, real_labels) = pictures(40), pictures(50, seed=1)
    samples = [write(own / name, "class folders", pixels, labels) for name in ("a", "b")]
    reference = write(own / "reference", "npz", real, real_labels)
    words = ["--reference", str(reference), "--features=tests.image_files:Projection", "--device=cpu"]
    words.append("--metrics=own_metrics.NEAREST,pr,own_metrics.widest")
    main(["evaluate", str(samples[0]), *words, "--output", str(own / "out")])
    found, expected = json.loads((own / "out/metrics.json").read_text()), nearest(pixels, real)
    assert found["nearest_distance"] == pytest.approx(float(expected.mean()))
    assert found["uncertainty"]["nearest_distance"]["std"] == pytest.approx(float(expected.std() / 40**0.5), rel=0.2)
    assert found["widest"] > 0
    assert found["own_metrics"]["nearest_distance"] == {
        "label": "nearest distance",
        "format": "{:.2f}",
        "higher_is_better": True,
    }
    printed = capsys.readouterr().out
    assert re.search(rf"\n  nearest distance +{expected.mean():.2f}  ± \d", printed)
    assert "note       nearest: of 40 samples" in printed
    # The report has its label, format and direction, and several sets their mean.
    run = type("Run", (), {"name": "a"})
    row = {row["name"]: row for row in table([run], [found])["rows"]}["nearest_distance"]
    assert (row["label"], row["better"], row["cells"][0]["text"]) == (
        "nearest distance",
        "higher",
        f"{expected.mean():.2f}",
    )
    main(["evaluate", *map(str, samples), *words, "--output", str(own / "both")])
    assert "| nearest distance |" in (own / "both/metrics.md").read_text()


def test_a_metric_of_your_own_from_yaml(own):
    (_, _, trainer), real = run_and_trainer(own), pictures(40, channels=1, seed=1)
    write(own / "reference", "npz", *real)
    content = yaml.safe_load(f"""
    class_path: SampleQuality
    init_args:
      features: {{class_path: tests.callbacks.test_quality.Pixels}}
      reference: {own}/reference/images.npz
      metrics: [pr, own_metrics.NEAREST]
    """)
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--callback", type=L.Callback)
    quality = parser.instantiate_classes(parser.parse_object({"callback": content})).callback
    assert isinstance(quality, SampleQuality)
    quality.setup(trainer, trainer.lightning_module, "predict")
    found = quality.results(trainer)
    assert found["nearest_distance"] > 0
    assert found.keys() >= {"precision", "recall"}


def test_bad_names_of_metrics_are_refused(own):
    for name, message in (
        (
            "fdd",
            "unknown fdd; known: fid, sfid, is, is_adm, kid, fdr, mind, cmmd, pr, pr_adm, dc, classwise, classifier, clip",
        ),
        ("own_metrics.MISSING", "has no attribute 'MISSING'; expected the dotted path of a MetricSpec"),
        ("no_such_module.SPEC", "No module named 'no_such_module'"),
        ("own_metrics.nearest.x", "own_metrics"),
        ("own_metrics.TAKEN", "has the key 'precision', which a built-in metric has"),
        ("own_metrics.torch", "expected a MetricSpec"),
        ("own_metrics.nearest", "missing 1 required positional argument"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            select([name], Projection())
    with pytest.raises(ValueError, match="unknown needs colors; known: features"):
        MetricSpec("colors", "colors", needs=("colors",))


def test_every_metric_is_described_once():
    assert tuple(METRIC_OPTIONS) == (
        "fid",
        "sfid",
        "is",
        "is_adm",
        "kid",
        "fdr",
        "mind",
        "cmmd",
        "pr",
        "pr_adm",
        "dc",
        "classwise",
        "classifier",
        "clip",
    )
    for key, spec in METRICS.items():
        assert spec.key == key
        assert spec.format.format(0.5)
        assert spec.title.endswith("↑" if spec.higher_is_better else "" if spec.higher_is_better is None else "↓")
    assert {spec.option for spec in METRICS.values() if spec.compute} == METRIC_OPTIONS.keys()
    assert METRICS["kid"].text(-1e-9) == "0.0000"


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("inception", ["fid", "fid_infinite", "sfid", "kid", "kid_mean", "precision", "recall"]),
        ("dinov2", ["fd_dinov2", "fd_dinov2_infinite", "kd_dinov2", "kd_dinov2_mean", "precision", "recall"]),
        ("", ["fd", "fd_infinite", "sfd", "kd", "kd_mean", "precision", "recall"]),
    ],
)
def test_distances_have_the_fields_names_with_its_features_only(kind, keys):
    extractor = Projection()
    extractor.kind = kind
    assert [spec.key for spec in select(["pr", "kid", "fid", "sfid"], extractor)] == keys
    assert (InceptionFeatures.kind, TimmFeatures.kind, Projection.kind) == ("inception", "", "")


def of_classes(reference, real_labels, generated, labels):
    rows = {"index": torch.arange(len(labels)), "label": labels, "features": generated}
    statistics = ReferenceStatistics(*mean_and_covariance(reference), features=reference, labels=real_labels)
    samples = SampleSet(Measures(Projection()), statistics, rows)
    return METRICS["by_class"].compute(samples), samples.notes


def test_classwise_distances_are_those_of_each_class():
    generator = torch.Generator().manual_seed(2)
    labels, real_labels = torch.arange(130) % 3, torch.arange(140) % 3
    labels[90:] = real_labels[120:] = 0
    generated = torch.randn(130, 4, generator=generator) + labels[:, None]
    reference = torch.randn(140, 4, generator=generator) + real_labels[:, None]
    real_labels[:35][real_labels[:35] == 2] = 1
    found, notes = of_classes(reference, real_labels, generated, labels)
    assert list(found) == ["0", "1", "2"]
    for label, values in found.items():
        real, made = reference[real_labels == int(label)], generated[labels == int(label)]
        assert (values["num_samples"], values["num_reference"]) == (len(made), len(real))
        expected = frechet_distance(*mean_and_covariance(real), *mean_and_covariance(made))
        assert values["fd"] == pytest.approx(float(expected))
        if label != "2":
            assert [values["precision"], values["recall"]] == pytest.approx(
                [float(v) for v in precision_recall(real, made)]
            )
            assert values["skipped"].keys() == ({"density", "coverage"} if label == "1" else set())
        if label == "0":
            assert [values["density"], values["coverage"]] == pytest.approx(
                [float(v) for v in density_coverage(real, made)]
            )
            recall = values["recall"]
            assert values["std"]["recall"] == pytest.approx((recall * (1 - recall) / len(real)) ** 0.5)
    assert "precision" not in found["2"]
    assert found["2"]["skipped"]["recall"] == "29 images in the smaller set; 30 are needed for k = 3"
    assert (
        "precision and recall by class skipped for classes 2 of 3: 30 images in both sets are needed for k = 3" in notes
    )
    five = torch.cat([reference] * 5, 1), real_labels, torch.cat([generated] * 5, 1), labels
    wide, notes = of_classes(*five)
    assert (
        "Fréchet distance by class skipped for classes 1, 2 of 3: 41 images in both sets are needed for 20 features"
        in notes
    )
    assert (
        wide["1"]["skipped"]
        | {
            "fd": "30 images in the smaller set; 41 are needed for 20 features",
            "density": "30 images in the smaller set; 50 are needed for k = 5",
        }
        == wide["1"]["skipped"]
    )
