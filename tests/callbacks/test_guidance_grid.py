"""One noise under several scores and scales."""

import pytest
import torch

from calib_guidance import classifiers, networks, samplers, scores
from calib_guidance.backend.images import to_uint8
from calib_guidance.callbacks import GuidanceGrid
from calib_guidance.callbacks.guidance_grid import sample_grid_of
from calib_guidance.callbacks.measurement import title_of
from calib_guidance.diffusion import SampleStreams
from calib_guidance.guidance import ClassifierGuidance
from tests.digits import digits_denoiser
from tests.runs import refused


def test_each_cell_is_the_sample_of_that_score_and_scale(in_root):
    denoiser, weights = digits_denoiser(), "checkpoints/digits/classifier.safetensors"
    classifier = classifiers.OffTheShelfClassifier(networks.SmallResNet(), 10, weights, softplus_beta=3.0)
    rows = [scores.TemperedLogProb(), scores.Tilted(group_size=4), scores.DivergenceRegularized("fkl", tau2=0.8)]
    guide, sampler = ClassifierGuidance(classifier, rows[2], scale=1.5), samplers.DDIM(steps=4)
    found = sample_grid_of(denoiser, sampler, guide, rows, [0.0, 2.0], 5, lambda i: (3 * i) % 10, 1)
    assert found.shape == (3, 2, 1, 8, 8)
    assert guide.score is rows[2]
    assert guide.scale == 1.5
    for r, score in enumerate(rows):
        for c, scale in enumerate((0.0, 2.0)):
            indices = range(4, 8)  # the group of sample 5
            noise = SampleStreams([1] * 4, indices, denoiser.image_shape)
            y = torch.tensor([(3 * i) % 10 for i in indices])
            alone = ClassifierGuidance(classifier, score, scale=scale) if scale else None
            expected = to_uint8(sampler(denoiser, noise, y, alone))[1].int()
            assert (found[r, c].int() - expected).abs().max() <= 1  # rounding of another batch size
    assert (found[:, 0].int() - found[0, 0].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config=guidance/unguided"], "ClassifierGuidance, got none"),
        (["--data.num_samples=3", "--trainer.callbacks.index=7"], "samples up to 7"),
    ],
)
def test_what_it_cannot_vary_is_refused(in_root, tmp_path, capsys, options, words):
    folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
    assert words in refused(capsys, "predict", "--config=digits", "--config=run/guidance_grid", *options, folder)


@pytest.mark.parametrize("settings", [{"scales": []}, {"index": -1}, {"scales": [float("nan")]}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=r"scales|index|scale"):
        GuidanceGrid(**settings)


def test_plots_name_classes():
    assert title_of(3, None) == title_of(3, ["0", "1", "2", "3"]) == "class 3"
    assert title_of(1, ["cat", "$5 dog"]) == r"\$5 dog"
