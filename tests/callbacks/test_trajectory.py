"""What is measured along the trajectory."""

import json

import numpy as np
import pytest
import torch
import yaml

from calib_guidance.cli import main
from calib_guidance.diffusion.schedules import NoiseSchedule, named_betas
from calib_guidance.metrics import bootstrap_sums, calibration_error_from_bins, jackknife_std
from calib_guidance.metrics.moments import StepMoments
from calib_guidance.runs import RunFolder
from tests.test_faults import QUICK, configuration


def test_moments_of_each_step_over_batches():
    values = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)) + 3
    metric = StepMoments(3)
    for batch in values.split([4, 3], dim=1):
        metric.update(2, batch[1])
        metric.update(0, batch[0])
    mean, deviation = metric.compute()
    expected_mean, expected_deviation = values.double().mean(1), values.double().std(1, correction=0)
    torch.testing.assert_close(mean[[0, 2]], expected_mean)
    torch.testing.assert_close(deviation[[0, 2]], expected_deviation)
    assert mean[1].isnan()


def test_a_trajectory_of_one_step_keeps_its_axis(in_root, tmp_path):
    """torchmetrics squeezes single numbers, and what draws them needs a list."""
    metric = StepMoments(1)
    metric.update(0, torch.tensor([1.0, 3.0]))
    mean, deviation = metric.compute()
    assert (mean.tolist(), deviation.tolist()) == ([2.0], [1.0])
    path = configuration(tmp_path / "run")
    config = yaml.safe_load(path.read_text())
    config["trainer"]["callbacks"][-1]["init_args"]["plots"] = True
    model = config["model"]["init_args"]
    model["guidance"]["init_args"]["schedule"] = {"gamma": 0.0}
    model["sampler"] = {"class_path": "calib_guidance.samplers.DPMSolver", "init_args": {"steps": 1}}
    path.write_text(yaml.safe_dump(config))
    main(["predict", "--config", str(path), *QUICK])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["gradient_norm_t"]["mean"]) == len(metrics["ece_t"]["ece"]) == 1


def test_reliability_by_range_of_t_and_the_schedule_are_saved(in_root, tmp_path):
    path = configuration(tmp_path / "run")
    config = yaml.safe_load(path.read_text())
    guidance = config["model"]["init_args"]["guidance"]["init_args"]
    guidance["schedule"] = {"gamma": 0.3, "interval": [100, 700]}
    guidance["scale"] = 2.0
    config["model"]["init_args"]["sampler"] = {"class_path": "DDPM", "init_args": {"steps": "4"}}
    path.write_text(yaml.safe_dump(config))
    main(["predict", "--config", str(path), *QUICK])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    levels, bins = metrics["reliability"]["levels"], np.array(metrics["reliability"]["bins"])
    assert levels == ["t = 0–199", "t = 200–399", "t = 400–599", "t = 600–799", "t = 800–999"]
    assert bins.shape == (5, 15, 3)
    assert bins[..., 0].sum(1).tolist() == [0, 20, 0, 20, 0]  # guidance is on at 333 and 666 of 0, 333, 666, 999
    # A range with one step has the ECE of that step.
    gaps = np.abs(bins[..., 1] - bins[..., 2]).sum(1) / 20
    np.testing.assert_allclose(gaps[[1, 3]], metrics["ece_t"]["ece"][1:3])
    schedule = metrics["guidance_schedule"]
    assert schedule["t"] == [0, 333, 666, 999]
    assert schedule["unit"] == "variance"
    betas = NoiseSchedule(named_betas("cosine")).respace("4").betas
    expected = 2 * betas * [0, 1, 1, 0] / betas.max()
    np.testing.assert_allclose(schedule["strength"]["without sine factor"], expected)
    sine = 2 * 0.3 * np.sin(np.pi * np.arange(4) / 4) * [0, 1, 1, 0]
    (with_sine,) = [values for name, values in schedule["strength"].items() if "0.3" in name]
    np.testing.assert_allclose(with_sine, expected + sine)


def test_std_of_calibration_is_that_of_leaving_out_shards(in_root, tmp_path, capsys):
    path = configuration(tmp_path / "run", num_samples=100, batch_size=5)
    main(["predict", "--config", str(path), *QUICK])
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    run = RunFolder.open(tmp_path / "run")
    sums = []
    for shard in run.shards():
        (steps,) = [v for k, v in run.read_sums(shard).items() if k.startswith("TrajectoryCalibration-")]
        sums.append(steps)
    sums = np.stack(sums)
    assert len(sums) == 20

    def ece_t(bins):
        return np.abs(bins[..., 1] - bins[..., 2]).sum(-1) / bins[..., 0].sum(-1)

    complete = ece_t(sums.sum(0))
    assert metrics["integral_ece"] == pytest.approx(np.nanmean(complete))
    without = np.stack([ece_t(sums.sum(0) - one) for one in sums])
    std = [np.sqrt(19 / 20 * np.square(v - v.mean(0)).sum(0)) for v in (without, np.nanmean(without, 1))]
    np.testing.assert_allclose(metrics["ece_t"]["std"], std[0])
    found = metrics["uncertainty"]["integral_ece"]
    assert found["std"] == pytest.approx(std[1])
    assert found["of"] == metrics["ece_t"]["of"] == "jackknife over 20 blocks of samples"
    assert found["low"] < metrics["integral_ece"] < found["high"]
    assert f"integral ECE          {metrics['integral_ece']:.3f}  ± {std[1]:.3f}" in printed
    assert "±          integral ECE: jackknife over 20 blocks of samples" in printed


def test_quality_may_be_added_after_the_report(in_root, tmp_path, capsys):
    """As lightning_configs/quality does; what it and the trajectory find stands in one metrics.json."""
    callbacks = yaml.safe_load((in_root / "lightning_configs/predict/digits.yaml").read_text())["trainer"]["callbacks"]
    (quality,) = [c for c in callbacks if c["class_path"].endswith("SampleQuality")]
    (tmp_path / "quality.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [quality]}}))
    path = configuration(tmp_path / "run", batch_size=4)
    main(["predict", "--config", str(path), "--config", str(tmp_path / "quality.yaml"), *QUICK])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["uncertainty"].keys() >= {"integral_ece", "precision", "classifier_accuracy"}
    assert metrics["fd"] > 0
    printed = capsys.readouterr().out
    assert (
        f"wrote to {tmp_path / 'run'}: samples, metrics.json, predictions.npz, trajectory.npz, config.yaml" in printed
    )
    assert "±          integral ECE: jackknife over 5 blocks of samples" in printed


def test_jackknife_over_blocks_is_what_sample_std_and_their_bootstrap_says():
    """Of 4 steps that one sample passes with like confidence; 60 draws of 400 samples in 20 blocks."""
    generator, steps, bins = torch.Generator().manual_seed(0), 4, 15
    found = []
    for _ in range(60):
        confidence = 0.2 + 0.7 * torch.rand(400, generator=generator, dtype=torch.float64)
        correct = (torch.rand(400, generator=generator) < confidence - 0.15).double()
        cells = torch.zeros(400, steps, bins, 3, dtype=torch.float64)
        for step in range(steps):
            seen = (confidence + 0.02 * step).clamp(max=1)
            cells[torch.arange(400), step, (seen * bins).long().clamp(max=bins - 1)] = torch.stack(
                [torch.ones(400, dtype=torch.float64), seen, correct], 1
            )
        blocks = cells.view(20, 20, steps, bins, 3).sum(1)
        integral = calibration_error_from_bins(cells.sum(0)).mean()
        jackknife = jackknife_std(calibration_error_from_bins(cells.sum(0) - blocks).mean(1))
        drawn = bootstrap_sums(cells.flatten(1), 100).view(-1, steps, bins, 3)
        found.append(torch.stack([integral, jackknife, calibration_error_from_bins(drawn).mean(1).std()]))
    integral, jackknife, bootstrapped = torch.stack(found).T
    assert float(jackknife.square().mean().sqrt()) == pytest.approx(float(integral.std()), rel=0.25)
    assert float(jackknife.mean()) == pytest.approx(float(bootstrapped.mean()), rel=0.25)
