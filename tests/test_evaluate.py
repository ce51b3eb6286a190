"""`calib-guidance evaluate`: anybody's samples against anybody's reference, and what is said of them."""

import errno
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from calib_guidance.backend.images import to_uint8
from calib_guidance.classifiers.clip import CLIPClassifier, build_clip
from calib_guidance.cli import main
from calib_guidance.data import digits
from calib_guidance.metrics import (
    CalibrationError,
    density_coverage,
    extrapolated_frechet_distance,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_and_covariance,
    precision_recall,
)
from calib_guidance.networks import SmallResNet
from calib_guidance.weights.io import save_weights
from tests import processes
from tests.image_files import Projection, pictures, write
from tests.runs import metrics, refused
from tests.test_durable_sampling import predict

PROJECTION = ("--features", "tests.image_files:Projection")


def evaluate(*arguments):
    main(["evaluate", *map(str, arguments), "--device=cpu"])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Samples in class folders, a reference as an npz, and what the extractor gives of both."""
    folder = tmp_path_factory.mktemp("sets")
    samples, real = pictures(120), pictures(130, seed=1)
    paths = write(folder / "samples", "class folders", *samples), write(folder / "reference", "npz", *real)
    with torch.no_grad():
        found = [Projection()(torch.from_numpy(pixels).permute(0, 3, 1, 2)) for pixels, _ in (samples, real)]
    return paths, found


def eval_classifier(folder, channels=3):
    torch.manual_seed(0)
    network = SmallResNet(3, channels).eval()
    save_weights(network, folder / "eval_classifier.safetensors")
    small = {"class_path": "calib_guidance.networks.SmallResNet"}
    small["init_args"] = {"num_classes": 3, "in_channels": channels}
    content = {"class_path": "calib_guidance.classifiers.OffTheShelfClassifier"}
    content["init_args"] = {"network": small, "num_classes": 3, "weights": str(folder / "eval_classifier.safetensors")}
    (folder / "eval_classifier.yaml").write_text(yaml.safe_dump(content))
    return network


def test_metrics_are_the_functions_of_the_features(sets, tmp_path, capsys):
    (samples, reference), (generated, real) = sets
    network = eval_classifier(tmp_path)
    words = [samples, "--reference", reference, *PROJECTION, "--output", tmp_path / "out", "--extrapolate"]
    evaluate(*words, "--eval-classifier", tmp_path / "eval_classifier.yaml")
    found, printed = metrics(tmp_path / "out"), capsys.readouterr().out
    statistics = mean_and_covariance(real.pool)
    pixels, labels = (torch.from_numpy(value) for value in pictures(120))
    logits = network(pixels.permute(0, 3, 1, 2) / 127.5 - 1).detach()
    expected = {
        "fd": frechet_distance(*statistics, *mean_and_covariance(generated.pool)),
        "fd_infinite": extrapolated_frechet_distance(statistics, generated.pool, 80).value,
        "sfd": frechet_distance(*mean_and_covariance(real.spatial), *mean_and_covariance(generated.spatial)),
        "inception_score": inception_score(generated.logits).mean(),
        "kd": kernel_distance(real.pool, generated.pool),
        **dict(zip(("precision", "recall"), precision_recall(real.pool, generated.pool), strict=True)),
        **dict(zip(("density", "coverage"), density_coverage(real.pool, generated.pool), strict=True)),
        "classifier_accuracy": (logits.argmax(1) == labels).double().mean(),
        "classifier_ece": CalibrationError().of(logits, labels),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-6), name
        spread = found["uncertainty"][name]
        assert spread["low"] <= found[name] <= spread["high"], name
        assert spread["std"] > 0, name
    of_class = precision_recall(real.pool[torch.from_numpy(pictures(130)[1]) == 1], generated.pool[labels == 1])
    assert [found["by_class"]["1"][name] for name in ("precision", "recall")] == pytest.approx(
        list(map(float, of_class))
    )
    said = found["provenance"]
    assert (said["samples"]["num_images"], said["reference"]["images"]["num_images"]) == (120, 130)
    for words in (
        said["features"]["weights_sha256"][:12],
        said["eval_classifier"]["weights_sha256"][:12],
        "random projection",
    ):
        assert words in printed
    assert said["samples"]["sha256"][:12] in printed
    assert "note       Fréchet distance: 120 samples: biased upwards" in printed
    assert {"torch", "calib_guidance", "Pillow"} <= said["versions"].keys()
    table = (tmp_path / "out/metrics.md").read_text()
    assert f"| precision | {found['precision']:.3f} | {found['uncertainty']['precision']['std']:.3f} |" in table
    with np.load(tmp_path / "out/predictions.npz") as file:
        assert np.array_equal(file["predicted"], logits.argmax(1))


def test_several_sets_give_mean_and_deviation(sets, tmp_path, capsys):
    (samples, reference), _ = sets
    other = write(tmp_path / "samples", "class folders", *pictures(120, seed=5))
    evaluate(samples, other, "--reference", reference, *PROJECTION, "--metrics=fid,pr", "--output", tmp_path / "out")
    complete = metrics(tmp_path / "out")
    names = [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert sorted(names) == sorted(complete["runs"])
    assert all(name.endswith("samples-images") for name in names)
    runs = [metrics(tmp_path / "out" / name) for name in names]
    for key in ("fd", "precision", "recall"):
        values = [run[key] for run in runs]
        assert complete[key] == pytest.approx(np.mean(values))
        assert complete["uncertainty"][key]["std"] == pytest.approx(np.std(values, ddof=1))
        assert complete["uncertainty"][key]["of"] == "2 runs"
        std = complete["uncertainty"][key]["std"]
        assert (
            f"{complete[key]:.3f} ± {std:.3f}" in capsys.readouterr().out if key == "recall" else values[0] != values[1]
        )


def test_statistics_of_others_measure_what_they_can(sets, tmp_path):
    (samples, _), (generated, real) = sets
    pool = real.pool.double().numpy()
    np.savez(tmp_path / "others.npz", mu=pool.mean(0), sigma=np.cov(pool, rowvar=False))
    evaluate(samples, "--reference", tmp_path / "others.npz", *PROJECTION, "--output", tmp_path / "out")
    found = metrics(tmp_path / "out")
    expected = frechet_distance(*mean_and_covariance(real.pool), *mean_and_covariance(generated.pool))
    assert found["fd"] == pytest.approx(float(expected), rel=1e-6)
    assert found.keys().isdisjoint({"precision", "kd", "sfd"})
    assert any(
        note.startswith("kid, pr, dc and classwise skipped: the reference holds no features") for note in found["notes"]
    )
    assert found["provenance"]["reference"]["sha256"]


def test_clip_score_is_the_mean_cosine_to_the_prompts(sets, tmp_path):
    (samples, reference), _ = sets
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    save_file(build_clip(architecture).state_dict(), tmp_path / "clip.safetensors")
    arguments = {
        "prompts": ["a fox", "a car", "two cats"],
        "model": architecture,
        "weights": str(tmp_path / "clip.safetensors"),
    }
    content = {"class_path": "calib_guidance.classifiers.CLIPClassifier", "init_args": arguments}
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(content))
    words = ["--reference", reference, *PROJECTION, "--metrics=clip", "--clip", tmp_path / "clip.yaml"]
    evaluate(samples, *words, "--output", tmp_path / "out")
    pixels, labels = (torch.from_numpy(value) for value in pictures(120))
    cosine = CLIPClassifier(**arguments).freeze().similarity(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
    expected = cosine.gather(1, labels[:, None])
    found = metrics(tmp_path / "out")
    assert found["clip_score"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found["uncertainty"]["clip_score"]["std"] == pytest.approx(float(expected.std() / 120**0.5), rel=0.2)


@pytest.mark.slow
def test_inception_gives_torch_fidelitys_metrics_from_files_on(tmp_path):
    """Random weights in its file format; 2,048 features of 12 and 8 images; one distance takes it ten seconds."""
    torch.manual_seed(0)
    network = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda *arguments: None)
        torch.save({}, tmp_path / "inception.pth")
        network.__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path=tmp_path / "inception.pth")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # as initialized, what comes out at the end is 1e-8
            nn.init.kaiming_normal_(module.weight)
    network.fc.weight.data *= 0.3 / network.fc.weight.std()
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    contrast = np.concatenate([np.linspace(0.05, 1, 12), np.linspace(0.05, 0.25, 8)])[:, None, None, None]
    pixels = (pictures(20, size=32)[0] * contrast).astype(np.uint8)
    samples = write(tmp_path / "samples", "image folder", pixels[:12], np.zeros(12, int))
    reference = write(tmp_path / "reference", "image folder", pixels[12:], np.zeros(8, int))
    words = ["--features", f"inception:{tmp_path / 'inception.pth'}", "--metrics=fid,is,kid,pr", "--allow-few"]
    evaluate(samples, "--reference", reference, *words, "--output", tmp_path / "out")
    found = metrics(tmp_path / "out")
    theirs = {
        "cuda": False,
        "verbose": False,
        "feature_extractor": "inception-v3-compat",
        "feature_extractor_weights_path": str(tmp_path / "inception.pth"),
        "save_cpu_ram": True,
        "cache_root": str(tmp_path / "cache"),
    }
    named = [{"path": str(path), "name": path.parent.name} for path in (samples, reference)]
    kid = {"kid": True, "kid_subsets": 100, "kid_subset_size": 4}  # it draws those of the first set first
    expected = {}
    for (first, second), asked in ((named, {"fid": True, "isc": True, "prc": True}), (named[::-1], kid)):
        inputs = {
            f"input{number}{key}": value
            for number, one in ((1, first), (2, second))
            for key, value in (("", one["path"]), ("_cache_name", one["name"]))
        }
        expected |= calculate_metrics(**theirs, **inputs, **asked)
    assert expected["frechet_inception_distance"] > 1e-3
    assert expected["inception_score_mean"] > 1.001
    assert 0 < expected["precision"] < 1
    for ours, name in (
        ("fid", "frechet_inception_distance"),
        ("kid_mean", "kernel_inception_distance_mean"),
        ("inception_score", "inception_score_mean"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert found[ours] == pytest.approx(expected[name], rel=1e-5), ours
    assert found["uncertainty"]["kid"]["std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-5)
    assert found["provenance"]["features"]["resize"]["size"] == 299
    assert "covariance without full rank" in found["notes"][0]


def test_a_run_sampled_in_pieces_measures_as_one_sampled_at_once(in_root, tmp_path):
    images, labels = digits("heldout")
    np.savez(tmp_path / "heldout.npz", to_uint8(images).permute(0, 2, 3, 1).numpy(), labels.numpy())
    for samples in (10, 20, 30):
        predict(tmp_path / "pieces", samples=samples)
    predict(tmp_path / "complete", samples=30)
    content = yaml.safe_load((in_root / "lightning_configs/predict/digits.yaml").read_text())["trainer"]["callbacks"]
    (quality,) = [c["init_args"] for c in content if c["class_path"].endswith("SampleQuality")]
    (tmp_path / "eval_classifier.yaml").write_text(yaml.safe_dump(quality["features"]["init_args"]["classifier"]))
    words = [
        "--reference",
        tmp_path / "heldout.npz",
        "--features",
        f"classifier:{tmp_path / 'eval_classifier.yaml'}",
        "--allow-few",
    ]
    evaluate(tmp_path / "pieces", *words)
    alone = metrics(tmp_path / "pieces/evaluation")
    evaluate(tmp_path / "pieces", tmp_path / "complete", *words, "--output", tmp_path / "both")
    pieces, complete = (metrics(tmp_path / name / "evaluation") for name in ("pieces", "complete"))
    assert pieces == alone  # with each run, where report finds it, and not with the mean
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["metrics.json", "metrics.md"]
    assert metrics(tmp_path / "both")["runs"] == {"pieces": pieces, "complete": complete}
    assert "weights" in (tmp_path / "both/metrics.md").read_text()
    during = metrics(tmp_path / "complete")
    for name in (
        "fd",
        "kd",
        "precision",
        "recall",
        "coverage",
        "classifier_accuracy",
        "classifier_ece",
    ):
        assert pieces[name] == complete[name] == pytest.approx(during.get(name, complete[name]), rel=1e-6), name
    assert pieces["uncertainty"] == complete["uncertainty"]
    assert pieces["provenance"]["samples"]["sha256"] == complete["provenance"]["samples"]["sha256"]
    evaluate(tmp_path / "pieces", *words, "--metrics=pr")
    assert (tmp_path / "complete/evaluation/predictions.npz").exists()
    assert not (tmp_path / "pieces/evaluation/predictions.npz").exists()  # of metrics that are no longer there


def test_two_processes_give_the_metrics_of_one(sets, tmp_path):
    (samples, reference), _ = sets
    eval_classifier(tmp_path)
    words = ["evaluate", str(samples), "--reference", str(reference), *PROJECTION, "--device=cpu"]
    words += ["--eval-classifier", str(tmp_path / "eval_classifier.yaml")]
    commands = [
        [ranks, [*words, f"--batch-size={batch}", "--output", str(tmp_path / name)]]
        for name, ranks, batch in (("one", 1, 50), ("shared", 2, 50), ("idle", 2, 200))
    ]
    for ranks, command in commands:
        processes.succeed(*command, ranks=ranks)
    one = metrics(tmp_path / "one")
    for name_of_several in ("shared", "idle"):  # in the second there is no batch for the second process
        several = metrics(tmp_path / name_of_several)
        assert several["provenance"] == one["provenance"]
        assert several["notes"] == one["notes"]
        numbers = {name: value for name, value in one.items() if isinstance(value, float)}
        assert len(numbers) == 11
        for name, value in numbers.items():
            assert several[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
            if name in one["uncertainty"]:
                assert several["uncertainty"][name]["std"] == pytest.approx(one["uncertainty"][name]["std"], rel=1e-6)
        with (
            np.load(tmp_path / "one/predictions.npz") as a,
            np.load(tmp_path / name_of_several / "predictions.npz") as b,
        ):
            assert all(np.array_equal(a[name], b[name]) for name in ("index", "label", "predicted"))


def test_what_cannot_be_measured_is_refused_before_it_is(sets, tmp_path, capsys):
    (samples, reference), _ = sets
    eval_classifier(tmp_path, channels=1)
    few = write(tmp_path / "few", "class folders", *pictures(9))
    large = write(tmp_path / "large", "npz", *pictures(30, size=16))
    gray = write(tmp_path / "gray", "npz", *pictures(30, channels=1))
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "wide.npz", mu=np.zeros(20), sigma=np.eye(20))
    np.savez(tmp_path / "mu.npz", mu=np.zeros(16), sigma=np.eye(16))
    unlabelled = write(tmp_path / "unlabelled", "image folder", *pictures(40))
    against = ["--reference", reference, *PROJECTION, "--output", tmp_path / "out"]
    cases = (
        (
            [few, *against],
            "fid cannot be taken of .*few.*: needs 17 samples and 17 reference .* got 9 and 130; --allow-few",
        ),
        ([few, *against, "--metrics=is"], "is cannot be taken of .*: needs 10 samples and 0"),
        ([samples, *against, "--metrics=fid,fdd"], "metrics: unknown fdd; known: fid, sfid"),
        (
            [samples, *against, "--metrics=classifier"],
            "classifier cannot be taken of .*--eval-classifier CLASSIFIER.yaml",
        ),
        ([samples, *against, "--metrics=clip"], "--clip CLIP.yaml"),
        ([unlabelled, *against, "--metrics=classwise"], "the samples' classes are not known"),
        ([samples, *against, "--reference", large], "8×8 RGB, the reference .* 16×16 RGB.*--size N"),
        (
            [samples, *against, "--reference", gray],
            "8×8 RGB, the reference .* 8×8 gray: they cannot be compared.*--mode",
        ),
        (
            [samples, *against, "--reference", tmp_path / "wide.npz"],
            "statistics of 20 features, random projection gives 16",
        ),
        ([samples, *against, "--reference", tmp_path / "mu.npz", "--metrics=pr"], "reference --keep-features"),
        (
            [samples, *against, "--reference", tmp_path / "mu.npz", "--label-column=class"],
            "--label-column class is of the reference, but .*mu.npz is a file of statistics.* --samples-label-column",
        ),
        ([large, *against, "--reference", large], "the features cannot be taken of images 3×16×16"),
        (
            [samples, *against, "--eval-classifier", tmp_path / "eval_classifier.yaml"],
            "the evaluation classifier cannot be taken of images 3×8×8",
        ),
        ([samples, *against, "--clip", tmp_path / "eval_classifier.yaml"], "OffTheShelfClassifier, not CLIPClassifier"),
        (
            [samples, *against, "--output", tmp_path / "mu.npz" / "out"],
            "mu.npz/out cannot be written: .*Not a directory",
        ),
        ([samples, samples, *against], "the same samples are named twice"),
        ([tmp_path / "empty", *against], "empty"),
        ([samples, *against, "--reference", tmp_path / "nothing.npz"], "nothing.npz"),
    )
    for arguments, message in cases:
        error = refused(capsys, "evaluate", "--device=cpu", *arguments)
        assert re.search(message, error.replace("\n", " ")), (message, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("40 requested and 0 written")]
)
def test_a_full_disk_loses_no_value(sets, tmp_path, capsys, monkeypatch, error):
    (samples, reference), _ = sets

    def full(descriptor):
        raise error

    monkeypatch.setattr("calib_guidance.backend.atomic.os.fsync", full)
    with pytest.raises(SystemExit) as stop:
        evaluate(samples, "--reference", reference, *PROJECTION, "--metrics=fid", "--output", tmp_path / "out")
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert re.search(r"Fréchet distance +\d+\.\d{3} ", printed.out)
    assert (
        f"{tmp_path / 'out'} cannot be written: {error.strerror or error}. The values above are complete" in printed.err
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_damage_is_named_and_counted(tmp_path, capsys):
    samples = write(tmp_path / "samples", "image folder", *pictures(60))
    reference = write(tmp_path / "reference", "npz", *pictures(60, seed=1))
    (samples / "000007.png").write_bytes((samples / "000007.png").read_bytes()[:60])
    words = [samples, "--reference", reference, *PROJECTION, "--output", tmp_path / "out", "--max-corrupt=0.1"]
    evaluate(*words)
    found = metrics(tmp_path / "out")
    assert (found["num_samples"], found["provenance"]["samples"]["num_skipped"]) == (59, 1)
    assert "1 skipped: " in (printed := capsys.readouterr().out)
    assert "000007.png" in printed
    shutil.rmtree(tmp_path / "out")
    assert "000007.png" in refused(capsys, "evaluate", "--device=cpu", *words[:-1], "--max-corrupt=0")
    assert not (tmp_path / "out").exists()
