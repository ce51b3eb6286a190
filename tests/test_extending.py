"""Parts of a user's own module run from YAML, without registration anywhere."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from calib_guidance.cli import main
from calib_guidance.diffusion import SampleStreams
from calib_guidance.samplers import DDIM
from tests.digits import digits_denoiser

OWN = {
    "score": """
from calib_guidance.scores import Score


class Margin(Score):
    \"""f_y minus the largest other logit.\"""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(self, logits, y, time):
        others = logits.scatter(1, y[:, None], float("-inf"))
        return self.weight * (logits.gather(1, y[:, None])[:, 0] - others.logsumexp(1))
""",
    "sampler": """
import numpy as np

from calib_guidance.samplers import Sampler, Transition


class Euler(Sampler):
    \"""Euler's method on dX/dσ = (X − x̂0)/σ.\"""

    def __init__(self, steps: int = 10):
        self.steps = steps

    def levels(self, denoiser):
        return denoiser.schedule.respace(self.steps).levels

    def coefficients(self, levels):
        alpha = np.sqrt(levels.alphas_cumprod)
        ratio = np.append(0.0, levels.sigmas[:-1]) / levels.sigmas
        return {"alpha": alpha, "alpha_next": np.append(1.0, alpha[:-1]), "ratio": ratio}

    def step(self, x, i, evaluate, c):
        x0 = evaluate(x, i).prediction.x0
        return Transition(c.alpha_next[i] * (x0 + c.ratio[i] * (x / c.alpha[i] - x0)))
""",
    "rule": """
from calib_guidance.denoisers import Rule


class Momentum(Rule):
    \"""Classifier-free guidance along a running mean of the difference.\"""

    def __init__(self, weight: float = 1.5, decay: float = 0.5):
        super().__init__()
        self.weight, self.decay = weight, decay

    def forward(self, x0_cond, x0_uncond, level, state):
        mean = x0_cond - x0_uncond
        if "mean" in state:
            mean = self.decay * state["mean"] + (1 - self.decay) * mean
        state["mean"] = mean
        return x0_uncond + self.weight * mean
""",
    "negative": """
import torch

from calib_guidance.denoisers import Negative


class NextClass(Negative):
    \"""The prediction for the next class.\"""

    def nfe(self, denoiser):
        return 2 * denoiser.nfe

    def prepare(self, denoiser, levels, y):
        own, other = denoiser.prepare(levels, y), denoiser.prepare(levels, (y + 1) % denoiser.num_classes)
        return lambda x_t, i: (own(x_t, i), other(x_t, i))
""",
    "backbone": """
import torch


class Convolutions(torch.nn.Module):
    \"""Two convolutions; label 10 means no class.\"""

    def __init__(self, width: int = 8):
        super().__init__()
        self.label = torch.nn.Embedding(11, width)
        self.first = torch.nn.Conv2d(1, width, 3, padding=1)
        self.last = torch.nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x_t, t, y):
        return self.last((self.first(x_t) + self.label(y)[:, :, None, None]).relu())
""",
    "classifier": """
import torch

from calib_guidance.classifiers import Classifier


class Linear(Classifier):
    \"""Logits of one linear layer.\"""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(64, 10)

    def forward(self, x, t=None):
        return self.temper(self.network(x.flatten(1)), t)
""",
    "metric": """
from calib_guidance.evaluation import MetricSpec


def feature_std(samples):
    return samples.mean(samples.features.std(1), "samples")


FEATURE_STD = MetricSpec("feature_std", "feature std", needs=("features",), compute=feature_std)
""",
}
GAMMA_0 = {"schedule": {"gamma": 0.0}}
BACKBONE = {"network": {"class_path": "own_backbone.Convolutions"}, "image_shape": [1, 8, 8], "prediction": "v"}
BACKBONE |= {"noise_schedule": "cosine", "num_classes": 10, "null_label": 10}
CHANGES = {  # of the model
    "sampler": {"guidance": GAMMA_0},
    "score": {"guidance": GAMMA_0 | {"score": {"class_path": "own_score.Margin", "init_args": {"weight": 0.5}}}},
    "rule": {
        "guidance": GAMMA_0,
        "denoiser": {"rule": {"class_path": "own_rule.Momentum", "init_args": {"weight": 2.0}}},
    },
    "negative": {"guidance": GAMMA_0, "denoiser": {"negative": {"class_path": "own_negative.NextClass"}}},
    "backbone": {
        "guidance": GAMMA_0,
        "denoiser": {"denoiser": {"class_path": "ModuleDenoiser", "init_args": BACKBONE}},
    },
    "classifier": {"guidance": GAMMA_0 | {"classifier": {"class_path": "own_classifier.Linear"}}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Metrics of a run with the sampler and the metric alone, and of one with each other part as well."""
    folder, results = tmp_path_factory.mktemp("own"), {}
    callbacks = yaml.safe_load(Path("lightning_configs/predict/digits.yaml").read_text())["trainer"]["callbacks"]
    writer, quality, report = (callbacks[i] for i in (0, 1, -1))
    quality["init_args"]["metrics"] = ["classifier", "own_metric.FEATURE_STD"]
    report["init_args"] = {"plots": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for part, text in OWN.items():
            (folder / f"own_{part}.py").write_text(text)
        for name, model in CHANGES.items():
            model = {"sampler": {"class_path": "own_sampler.Euler", "init_args": {"steps": 4}}} | model
            trainer = {"callbacks": [writer, quality, report], "default_root_dir": str(folder / name)}
            data = {"num_samples": 20, "shard_size": 20, "batch_size": 20}
            overlay = {"trainer": trainer | {"enable_progress_bar": False}, "model": model, "data": data}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(overlay))
            configs = ("digits", "digits/classifier_free", str(folder / f"{name}.yaml"))
            main(["predict", *(f"--config={config}" for config in configs)])
            results[name] = json.loads((folder / name / "metrics.json").read_text())
    for part in OWN:
        sys.modules.pop(f"own_{part}", None)
    return results


def test_every_part_takes_less_than_40_lines():
    assert all(len(text.strip().splitlines()) < 40 for text in OWN.values())


def test_parts_of_a_users_module_run_from_yaml(found):
    assert all(results["nfe"] == 8 for results in found.values())
    assert all(0 < results["feature_std"] < 10 for results in found.values())
    # Each part changes the samples.
    assert len({results["feature_std"] for results in found.values()}) == len(CHANGES)


def test_eulers_method_is_ddim(found):
    """The sampler of the user's module takes the same steps as DDIM without noise."""
    denoiser = digits_denoiser()
    noise = SampleStreams([0] * 5, range(5), denoiser.image_shape)
    namespace = {}
    exec(OWN["sampler"], namespace)
    euler = namespace["Euler"](8)
    euler.clip_denoised = True
    images = euler(denoiser, noise, torch.arange(5))
    again = SampleStreams([0] * 5, range(5), denoiser.image_shape)
    torch.testing.assert_close(images, DDIM(8)(denoiser, again, torch.arange(5)), atol=1e-4, rtol=1e-4)
