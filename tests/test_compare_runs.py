"""`calib-guidance compare-runs`: two runs of the same noise, and what is said of their difference."""

import json

import numpy as np
import pytest
import torch

from calib_guidance.cli import main
from calib_guidance.metrics import frechet_distance, jackknife_std, mean_and_covariance
from tests.image_files import Projection, pictures, write
from tests.runs import QUICK, refused

FEATURES = ("--features", "tests.image_files:Projection", "--device=cpu")
RUN = {"data.init_args.seed": 0, "data.init_args.labels": "balanced"}


def features(pixels):
    with torch.no_grad():
        return Projection()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).pool


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two run folders whose images differ a little, a third that differs much, and a reference."""
    folder = tmp_path_factory.mktemp("runs")
    images, labels = pictures(120)
    changed = images.copy()
    changed[:, :2, :2] = np.random.default_rng(5).integers(0, 256, (120, 2, 2, 3))
    darker = (images * 0.7).astype(np.uint8)
    paths = {
        name: write(folder / name, "run folder", each, labels, **RUN)
        for name, each in (("a", images), ("b", changed), ("dark", darker))
    }
    return paths | {"reference": write(folder / "reference", "npz", *pictures(130, seed=1))}, (images, changed)


def compare(folder, *arguments):
    main(["compare-runs", *map(str, arguments), *FEATURES, "--output", str(folder)])
    return json.loads((folder / "comparison.json").read_text())


def test_difference_and_error_are_those_of_the_blocks(runs, tmp_path, capsys):
    paths, sets = runs
    options = ("--reference", paths["reference"], "--metrics=fid,pr,kid", "--blocks=6")
    found = compare(tmp_path, paths["a"], paths["b"], *options)
    reference = mean_and_covariance(features(pictures(130, seed=1)[0]))
    pools = [features(images) for images in sets]
    # 40 samples of each of three classes in order: dealt out in turn, every block has them in proportion.
    block = torch.arange(120) % 6

    def distance(pool):
        return frechet_distance(*reference, *mean_and_covariance(pool))

    without = torch.stack([distance(pools[0][block != g]) - distance(pools[1][block != g]) for g in range(6)])
    complete = float(distance(pools[0]) - distance(pools[1]))
    row = found["metrics"]["fd"]
    assert (row["a"], row["b"]) == pytest.approx(tuple(float(distance(pool)) for pool in pools))
    assert row["difference"]["value"] == pytest.approx(6 * complete - 5 * float(without.mean()), rel=1e-6)
    assert row["difference"]["std"] == pytest.approx(float(jackknife_std(without)), rel=1e-6)
    assert {"fd", "precision", "recall", "kd"} == found["metrics"].keys()  # nothing that draws subsets
    printed = capsys.readouterr().out
    assert "| Fréchet distance |" in printed
    assert "times shorter" in printed
    assert "bias of few samples is removed" in (tmp_path / "comparison.md").read_text()


def test_verdicts(runs, tmp_path):
    paths, _ = runs
    options = ("--reference", paths["reference"], "--metrics=fid", "--blocks=10")
    assert compare(tmp_path / "1", paths["a"], paths["dark"], *options)["metrics"]["fd"]["verdict"] == "A better"
    same = compare(tmp_path / "2", paths["a"], paths["a"], *options)["metrics"]["fd"]
    assert (same["verdict"], same["difference"]["value"]) == ("indistinguishable", 0)
    # As an experiment links its runs: two rows with the same seeds.
    for row, first, second in (("one", "a", "dark"), ("two", "dark", "a")):
        (tmp_path / row).mkdir()
        for seed, name in enumerate((first, second)):
            (tmp_path / row / f"seed{seed}").symlink_to(paths[name])
    several = compare(tmp_path / "3", tmp_path / "one", tmp_path / "two", *options)["metrics"]["fd"]
    assert several["differences"][0] == pytest.approx(-several["differences"][1])
    assert several["sign_test"] == 1
    assert several["difference"]["value"] == pytest.approx(0, abs=1e-9)


def test_runs_of_predict_are_paired_by_their_seed(in_root, tmp_path, capsys):
    alone = '--trainer.callbacks=[{"class_path": "SampleWriter"}]'
    few = ["--data.num_samples=20", "--data.batch_size=20", "--model.sampler.steps=2", alone, *QUICK]
    for name, seed, tau2 in (("a", 3, 1.0), ("b", 3, 0.5), ("other", 4, 1.0)):
        varied = [f"--data.seed={seed}", "--config=score/tempered", f"--model.guidance.score.tau2={tau2}"]
        main(["predict", "--config=digits", *varied, *few, f"--trainer.default_root_dir={tmp_path / name}"])
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    reference = ("--reference", write(tmp_path / "reference", "npz", noise, np.arange(40) % 3))
    (tmp_path / "eval.yaml").write_text(
        "class_path: OffTheShelfClassifier\n"
        "init_args:\n"
        "  network: {class_path: SmallResNet, init_args: {widths: [48, 96, 48], blocks: 2}}\n"
        f"  weights: {in_root / 'checkpoints/digits/eval_classifier.safetensors'}\n"
    )
    words = (*reference, f"--features=classifier:{tmp_path / 'eval.yaml'}", "--metrics=fid", "--allow-few")
    words = (*words, "--device=cpu", "--output", tmp_path / "out")
    text = refused(capsys, "compare-runs", tmp_path / "a", tmp_path / "other", *words)
    assert "was sampled with data.seed 3" in text
    assert "with 4" in text
    main(["evaluate", *map(str, (tmp_path / "a", *words))])
    assert "; seed 3, one set of samples" in capsys.readouterr().out


def test_what_is_not_paired_is_refused(runs, tmp_path, capsys):
    paths, _ = runs
    images, labels = pictures(120)
    other = write(tmp_path / "other", "run folder", images, labels, **RUN | {"data.init_args.seed": 1})
    words = ("--reference", paths["reference"], *FEATURES, "--output", tmp_path / "out")
    text = refused(capsys, "compare-runs", paths["a"], other, *words)
    assert "was sampled with data.seed 0" in text
    assert "needs the same noise and labels" in text
    fewer = write(tmp_path / "fewer", "run folder", images[:90], labels[:90], **RUN)
    assert "has 120 samples" in refused(capsys, "compare-runs", paths["a"], fewer, *words)
    other_labels = write(tmp_path / "labels", "npz", images, labels[::-1].copy())
    assert "different label" in refused(capsys, "compare-runs", paths["a"], other_labels, *words)
    (tmp_path / "row").mkdir()
    (tmp_path / "row/seed4").symlink_to(paths["a"])
    (tmp_path / "rest").mkdir()
    (tmp_path / "rest/seed5").symlink_to(paths["b"])
    assert "rest has seed5: pairs need the same seeds" in refused(
        capsys, "compare-runs", tmp_path / "row", tmp_path / "rest", *words
    )
    assert "--blocks: blocks must be" in refused(capsys, "compare-runs", paths["a"], paths["b"], *words, "--blocks=121")
