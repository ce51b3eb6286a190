"""Ratios to validation images, sliced and CLIP distances, and what `evaluate` says of how samples were drawn."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from calib_guidance.cli import main
from calib_guidance.data.preprocess import crop
from calib_guidance.evaluation import CLIPFeatures
from calib_guidance.evaluation.metrics import METRICS
from calib_guidance.evaluation.spec import Measures, SampleSet
from calib_guidance.evaluation.statistics import ReferenceStatistics
from calib_guidance.metrics import clip_mmd, frechet_distance, mean_and_covariance, mind, samples_to_resolve
from tests.image_files import Projection, pictures, write
from tests.runs import metrics, refused

FEATURES = ("--features", "tests.image_files:Projection", "--device=cpu")


def features(images):
    with torch.no_grad():
        return Projection()(torch.from_numpy(images).permute(0, 3, 1, 2)).pool


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    made = {name: pictures(120 + 10 * seed, seed=seed) for seed, name in enumerate(("samples", "reference", "held"))}
    runs = {seed: {"data.init_args.seed": seed, "data.init_args.labels": "balanced"} for seed in (3, 4)}
    paths = {
        f"run{seed}": write(folder / f"run{seed}", "run folder", *made["samples"], **run) for seed, run in runs.items()
    }
    return paths | {name: write(folder / name, "npz", *made[name]) for name in ("reference", "held")}, made


def test_the_distance_in_units_of_that_of_validation_images(sets, tmp_path, capsys):
    paths, made = sets
    options = ["--reference", paths["reference"], "--validation", paths["held"], "--metrics=fid,fdr,mind", *FEATURES]
    main([str(word) for word in ("evaluate", paths["run3"], *options, "--output", tmp_path)])
    found, printed = metrics(tmp_path), capsys.readouterr().out
    reference, samples, held = (features(made[name][0]) for name in ("reference", "samples", "held"))
    statistics = mean_and_covariance(reference)
    distances = [frechet_distance(*statistics, *mean_and_covariance(each)) for each in (samples, held)]
    assert found["fd_ratio"] == pytest.approx(float(distances[0] / distances[1]), rel=1e-6)
    ratio, plain = (found["uncertainty"][key]["std"] for key in ("fd_ratio", "fd"))
    assert ratio == pytest.approx(plain / float(distances[1]), rel=1e-6)
    assert f"FDr: divided by {float(distances[1]):.4g}, the distance of 140 validation images" in printed
    needed = samples_to_resolve(found["fd"], plain, 120)
    assert f"need about {float(f'{needed:.2g}'):,.0f} samples each to tell a difference of 5 % from noise" in printed
    assert found["sliced"] == pytest.approx(float(mind(reference, samples)), rel=1e-6)
    assert "MIND: 120 images of both sets; biased upwards" in printed
    assert "protocol   labels balanced (40 of each of 3 classes); seed 3, one set of samples" in printed


def test_another_reference_than_the_published_one_is_named(sets, tmp_path):
    paths, _ = sets
    run = write(tmp_path / "run", "run folder", *pictures(120), **{"data.init_args.seed": 0})
    quality = {"class_path": "SampleQuality", "init_args": {"reference": "checkpoints/VIRTUAL_imagenet128_labeled.npz"}}
    (run / "config.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "SampleWriter"}, quality]}})
    )
    words = [
        "evaluate",
        run,
        "--reference",
        paths["reference"],
        "--metrics=fid",
        *FEATURES,
        "--output",
        tmp_path / "out",
    ]
    main([str(word) for word in words])
    (note,) = (note for note in metrics(tmp_path / "out")["notes"] if "published" in note)
    assert note.startswith("the run's configuration names the reference VIRTUAL_imagenet128_labeled.npz")


def test_the_best_of_several_seeds_is_named_as_such(sets, tmp_path, capsys):
    paths, _ = sets
    runs = [paths["run3"], paths["run4"]]
    options = ["--reference", paths["reference"], "--metrics=fid", *FEATURES, "--output", tmp_path]
    main([str(word) for word in ("evaluate", *runs, *options)])
    found = metrics(tmp_path)
    assert found["best"]["fd"] == min(each["fd"] for each in found["runs"].values())
    assert (
        "best of 2 seeds (the convention of EDM and EDM2, with three, which lies below a mean)"
        in capsys.readouterr().out
    )


def test_clip_features_are_those_of_cmmd():
    tower = {"image_size": 20, "layers": 1, "width": 32, "head_width": 16, "patch_size": 10}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    extractor = CLIPFeatures(None, {"embed_dim": 12, "vision_cfg": tower, "text_cfg": text})
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    shown = F.interpolate(images / 255, (20, 20), mode="bicubic", align_corners=False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    torch.testing.assert_close(extractor.shown(images), (shown - mean) / std)
    found = extractor(images).pool
    torch.testing.assert_close(found, extractor.network((shown - mean) / std))
    assert (found.shape, extractor.width, extractor.kind) == ((5, 12), 12, "")  # not the network of published numbers
    reference = ReferenceStatistics(None, None, features=found[:3])
    samples = SampleSet(Measures(extractor), reference, {"index": torch.arange(2), "features": found[3:]})
    assert float(METRICS["cmmd"].compute(samples).value) == pytest.approx(float(clip_mmd(found[:3], found[3:])))
    assert METRICS["cmmd"].extractor == METRICS["fd_clip"].extractor == "clip"


def recompressed(images, quality):
    def once(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    return np.stack([once(pixels) for pixels in images])


def test_statistics_are_checked_against_the_images(tmp_path, capsys):
    images, labels = pictures(120)
    source = write(tmp_path, "npz", images, labels)

    def check(pixels, *options):
        mean, covariance = (value.numpy() for value in mean_and_covariance(features(pixels)))
        np.savez(tmp_path / "known.npz", mu=mean, sigma=covariance)
        words = ["reference", source, "--check", tmp_path / "known.npz", *FEATURES, *options]
        main([str(word) for word in words])
        return capsys.readouterr().out

    assert "known.npz has the statistics of these images\n" in check(images)
    assert "known.npz has the statistics of these images after JPEG of quality 75" in check(recompressed(images, 75))
    other = check(pictures(120, seed=9)[0])
    assert (
        "known.npz has the statistics of other images, or of another preprocessing. The closest: these images" in other
    )
    lines = [line for line in other.splitlines() if "of tr" in line]
    distance = frechet_distance(
        *mean_and_covariance(features(pictures(120, seed=9)[0])), *mean_and_covariance(features(images))
    )
    assert float(lines[0].split()[0]) == pytest.approx(float(distance), rel=1e-5)
    wide = np.random.default_rng(0).integers(0, 256, (120, 16, 20, 3), dtype=np.uint8)
    source = write(tmp_path / "wide", "npz", wide, labels)
    made = np.stack([np.asarray(crop(Image.fromarray(pixels), 8, "lanczos")[0]) for pixels in wide])
    assert "statistics of these images, --resize lanczos" in check(made, "--size=8")
    assert "--output FILE.npz to write, or --check FILE" in refused(capsys, "reference", source, *FEATURES)
