"""A diffusion model guided by text prompts, through the command line."""

import json

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import save_file

from calib_guidance.backend.images import from_uint8
from calib_guidance.classifiers import CLIPClassifier
from calib_guidance.cli import main
from tests.runs import read_samples

PROMPTS = ["a photo of a red fox", "a blue car"]
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 24},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def part(name, **arguments):
    return {"class_path": f"calib_guidance.{name}", "init_args": arguments}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = open_clip.CLIP(**ARCHITECTURE)
    for parameter in model.parameters():  # as initialized, embeddings of all images are much alike
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("weights") / "clip.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


def sample(folder, clip, guidance, every=1, num_classes=2):
    network = {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1}
    network |= {"attention_resolutions": [2], "channel_mult": [1, 2], "num_classes": 10, "num_head_channels": 32}
    denoiser = part("denoisers.ADMDenoiser", network=part("networks.UNet", **network))
    writer = part("callbacks.SampleWriter")
    score = part("callbacks.TrajectoryCLIPScore", clip=clip, every=every)
    configuration = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "callbacks": [writer, score, part("callbacks.TrajectoryCalibration"), part("callbacks.RunReport")],
        },
        "model": part(
            "tasks.GuidedSampling",
            denoiser=part("denoisers.RemapClasses", denoiser=denoiser, classes=[7, 2][:num_classes]),
            sampler=part("samplers.DDPM", steps="3"),
            guidance=guidance,
        ),
        "data": part("data.SampleRequests", num_samples=4, num_classes=num_classes, batch_size=2),
    }
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration))
    main(["predict", f"--config={folder / 'run.yaml'}"])
    return json.loads((folder / "metrics.json").read_text())


def clip(weights, prompts=PROMPTS, **options):
    return part("classifiers.CLIPClassifier", prompts=prompts, model=ARCHITECTURE, weights=weights, **options)


def guided(classifier, scale=20.0, tau2=0.5):
    return part(
        "guidance.ClassifierGuidance",
        classifier=classifier,
        score=part("scores.TemperedLogProb", tau1=1.0, tau2=tau2),
        scale=scale,
        schedule=part("guidance.GuidanceSchedule", gamma=0.3),
    )


def test_prompts_guide_and_the_score_says_how_far(weights, tmp_path, plots_in_full):
    plain = sample(tmp_path / "plain", clip(weights), None)
    ensemble = part("classifiers.Ensemble", classifiers=[clip(weights, cutouts=2), clip(weights)])
    steered = sample(tmp_path / "steered", clip(weights), guided(ensemble), every=2)
    assert steered["clip_score"] > plain["clip_score"] + 0.05
    assert 0 <= steered["integral_ece"] <= 1
    assert len(plain["clip_score_t"]["mean"]) == 3
    assert steered["clip_score_t"]["t"] == plain["clip_score_t"]["t"][::2] == [0, 999]
    assert (tmp_path / "plain" / "plots" / "clip_score.png").stat().st_size > 5000

    # The images as they were written, by hand.
    images, labels = [], []
    for batch in read_samples(tmp_path / "steered" / "samples"):
        images.append(batch["image"])
        labels += batch["label"].tolist()
    model = CLIPClassifier(PROMPTS, ARCHITECTURE, weights).freeze()
    cosines = model.similarity(from_uint8(torch.cat(images)))[range(4), labels]
    assert float(cosines.mean()) == pytest.approx(steered["clip_score"], abs=2e-3)  # gray levels are rounded
    spread = steered["uncertainty"]["clip_score"]
    assert spread["std"] == pytest.approx(float(cosines.std(correction=0)) / 2, abs=2e-3)
    assert spread["low"] < steered["clip_score"] < spread["high"]


def test_one_prompt_needs_a_score_that_climbs_the_cosine(weights, tmp_path, capsys):
    one = clip(weights, ["a blue car"])
    with pytest.raises(SystemExit):
        sample(tmp_path / "plain", one, guided(one, tau2=1.0), num_classes=1)
    assert "set the score to TemperedLogProb with tau2: 0" in capsys.readouterr().err
    metrics = sample(tmp_path / "cosine", one, guided(one, tau2=0.0), num_classes=1)
    assert -1 <= metrics["clip_score"] <= 1


def test_prompts_must_be_as_many_as_classes(weights, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sample(tmp_path / "run", clip(weights, ["a blue car"]), None)
    assert "2 classes, the CLIP score 1 prompts" in capsys.readouterr().err
