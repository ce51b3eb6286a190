"""FDr-6 of FD-loss (arXiv 2604.28190): small twins of its six encoders, each against timm and closed forms by hand."""

import json

import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from calib_guidance.cli import main
from calib_guidance.evaluation import EncoderFeatures, FeatureExtractor, Features, features, features_from_name, named

TWINS = {
    "inception": ("", 299, "head", 1.68),
    "convnext": ("test_convnext", 48, "mean", 56.87),
    "dinov2": ("test_vit", 40, "token", 14.19),  # patches of 16: padded to 48
    "mae": ("test_vit2", 32, "token", 0.04),
    "siglip2": ("test_vit3", 32, "head", 0.60),
    "clip": ("test_vit", 40, "token", 5.60),
}
COUNT = 6


class Colors(FeatureExtractor):
    """In place of Inception: mean and extreme of each color."""

    name, kind, width = "colors", "inception", 6

    def __init__(self, weights=None):
        super().__init__()

    def forward(self, images):
        x = images.float().flatten(2) / 255
        return Features(torch.cat([x.mean(2), x.amax(2)], 1))


def random_network(model, **options):
    torch.manual_seed(0)
    network = timm.create_model(model, **options)
    return network.requires_grad_(False).eval()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Folder of the twins' weights, which are known in place of the encoders."""
    monkeypatch.setattr(features, "ENCODERS", {})
    for name, (model, *others) in TWINS.items():
        features.ENCODERS[name] = features.Encoder(model, *others)
        (tmp_path / "weights").mkdir(exist_ok=True)
        state = random_network(model).state_dict() if model else {"unused": torch.zeros(1)}
        safetensors.torch.save_file(state, tmp_path / "weights" / f"{name}.safetensors")
    for module in ("evaluation.fdr6", "evaluation.metrics"):
        monkeypatch.setattr(f"calib_guidance.{module}.ENCODERS", features.ENCODERS)
    monkeypatch.setattr(named, "InceptionFeatures", Colors)
    return tmp_path / "weights"


def images(folder, seed, blur=False):
    """Fields of random colors of 48×48 pixels as PNGs."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for k in range(COUNT):
        small = torch.rand(1, 3, 3 if blur else 6, 3 if blur else 6, generator=generator)
        image = F.interpolate(small, (48, 48), mode="nearest")[0].mul(255).byte()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
    return folder


def by_hand(name, folder):
    """Features as the paper's evaluation computes them."""
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.iterdir())])
    x = pixels.permute(0, 3, 1, 2)
    if name == "inception":
        return Colors()(x).pool.numpy()
    model, size, pooling, _ = TWINS[name]
    network = random_network(model)
    settings = network.pretrained_cfg
    x = F.interpolate(x.float() / 255, (size, size), mode="bicubic", antialias=True, align_corners=False)
    x = (x - torch.tensor(settings["mean"])[:, None, None]) / torch.tensor(settings["std"])[:, None, None]
    if model != "test_convnext":
        side = -(-size // 16) * 16
        x = F.pad(x, (0, side - size, 0, side - size))
        sized = random_network(model, img_size=side)
        sized.load_state_dict({k: v for k, v in network.state_dict().items() if k != "pos_embed"}, strict=False)
        prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        sized.pos_embed = torch.nn.Parameter(
            timm.layers.resample_abs_pos_embed(network.pos_embed, (side // 16, side // 16), num_prefix_tokens=prefix)
        )
        network = sized.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = network.forward_features(x)
        pools = {"token": lambda x: x[:, 0], "mean": lambda x: x.mean((2, 3)), "head": lambda x: network.attn_pool(x)}
        return pools[pooling](tokens).float().numpy()


def distance(a, b):
    root = scipy.linalg.sqrtm(np.cov(a.T.astype(np.float64)) @ np.cov(b.T.astype(np.float64)))
    covariances = np.cov(a.T) + np.cov(b.T) - 2 * np.real(root)
    return ((a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)) ** 2).sum() + np.trace(covariances)


@pytest.mark.parametrize("name", [name for name in TWINS if name != "inception"])
def test_features_are_those_of_the_evaluation_of_fd_loss(name, weights, tmp_path):
    folder = images(tmp_path / "images", 0)
    pixels = np.stack([np.array(Image.open(path)) for path in sorted(folder.iterdir())])
    extractor = features_from_name(f"fdr:{name}:{weights / f'{name}.safetensors'}")
    found = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2)).pool.numpy()
    expected = by_hand(name, folder)
    assert found.shape == (COUNT, extractor.width) == expected.shape
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()  # bfloat16
    assert "overshoot kept" in extractor.provenance()["resize"]["how"]


def test_the_published_encoders_are_known_to_timm():
    widths = {"convnext": 1024, "dinov2": 1024, "mae": 1024, "siglip2": 1152, "clip": 1024}
    for name, width in widths.items():
        with torch.device("meta"):
            extractor = EncoderFeatures(name, weights=None)
        assert extractor.width == width
        assert features.ENCODERS[name].model in timm.list_pretrained()


def test_one_command_measures_all_six(weights, tmp_path, capsys):
    train, held, samples = (images(tmp_path / name, k) for k, name in enumerate(("train", "held", "samples")))
    options = ["--features", f"fdr6:{weights}"]
    main(["reference", str(train), "--output", str(tmp_path / "reference"), *options])
    assert sorted(path.stem for path in (tmp_path / "reference").iterdir()) == sorted(TWINS)
    (tmp_path / "reference/mae.npz").unlink()
    main(["reference", str(train), "--output", str(tmp_path / "reference"), *options])  # what is missing alone
    assert capsys.readouterr().out.count("is there already: kept") == 5
    with pytest.raises(SystemExit):
        main(["reference", str(held), "--output", str(tmp_path / "reference"), *options])
    assert "inception.npz is there already, of other images (source" in capsys.readouterr().err
    more = [*options, "--allow-few", "--validation", str(held), "--output", str(tmp_path / "out")]
    main(["evaluate", str(samples), "--reference", str(tmp_path / "reference"), *more])
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "out/fdr6.json").read_text())
    ratios, published = [], []
    for name, (*_, unit) in TWINS.items():
        real, validation, made = (by_hand(name, folder) for folder in (train, held, samples))
        ratios.append(distance(made, real) / distance(validation, real))
        published.append(distance(made, real) / unit)
        each = found["encoders"][name]
        assert each["fdr"] == pytest.approx(ratios[-1], rel=0.03)
        assert each["fdr_published"] == pytest.approx(published[-1], rel=0.03)
        assert f"| {name} | {each['fd']:.4g}" in printed
    assert found["fdr6"] == pytest.approx(np.mean(ratios), rel=0.03)
    assert found["fdr6_published"] == pytest.approx(np.mean(published), rel=0.03)
    assert f"**{found['fdr6']:.3f}**" in (tmp_path / "out/fdr6.md").read_text()
    # Images as reference give the same; validation images themselves are at 1; several sets have a mean.
    main(["evaluate", str(samples), str(held), "--reference", str(train), *more[:-1], str(tmp_path / "both")])
    both = json.loads((tmp_path / "both/fdr6.json").read_text())
    assert both["runs"]["held"]["fdr6"] == pytest.approx(1.0, abs=1e-9)
    assert both["runs"]["samples"]["fdr6"] == pytest.approx(found["fdr6"], rel=1e-9)
    assert both["fdr6"]["mean"] == pytest.approx((1 + found["fdr6"]) / 2, rel=1e-9)


def test_without_validation_images_the_published_units_remain(weights, tmp_path):
    train, samples = (images(tmp_path / name, k) for k, name in enumerate(("train", "samples")))
    out = ["--output", str(tmp_path / "out")]
    main(["evaluate", str(samples), "--reference", str(train), "--features", f"fdr6:{weights}", "--allow-few", *out])
    found = json.loads((tmp_path / "out/fdr6.json").read_text())
    assert "fdr6" not in found
    assert any("ImageNet at 256 alone" in note for note in found["notes"])
    assert found["fdr6_published"] == pytest.approx(
        np.mean([each["fd"] / TWINS[name][3] for name, each in found["encoders"].items()])
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--metrics", "kid"], "--metrics: --features fdr6 measures Fréchet distances alone"),
        (["--validation", "partial"], "no clip.npz; re-run calib-guidance reference --features fdr6"),
        (["--reference", "one.npz"], "one.npz: statistics of one extractor. FDr-6 needs images, or the folder"),
        (
            ["--features", "fdr6:empty"],
            "no weights empty/inception.safetensors; expected a file of each of inception, convn",
        ),
        (
            ["--features", "fdr:resnet"],
            "--features fdr:resnet: encoder: expected one of convnext, dinov2, mae, siglip2, clip",
        ),
    ],
)
def test_what_cannot_be_is_said_before_a_network_runs(weights, tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    samples = images(tmp_path / "samples", 0)
    (tmp_path / "partial").mkdir()
    moments = {"mu": np.zeros(6), "sigma": np.eye(6)}
    for name in [*TWINS][:-1]:
        np.savez(tmp_path / f"partial/{name}.npz", **moments)
    np.savez(tmp_path / "one.npz", **moments)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(samples), "--reference", "samples", "--features", f"fdr6:{weights}", *argv])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_reference_is_a_folder_and_runs_are_not_compared(weights, tmp_path, capsys):
    samples, other = images(tmp_path / "samples", 0), images(tmp_path / "other", 1)
    for argv, said in (
        (["reference", samples, "--output", tmp_path / "r.npz"], "--output is a folder, of a file for each encoder"),
        (["reference", samples, "--check", tmp_path / "r"], "--output is a folder, of a file for each encoder"),
        (
            ["compare-runs", samples, other, "--reference", samples],
            "FDr-6 is of evaluate and reference; name one encoder",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, argv), "--features", f"fdr6:{weights}"])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
