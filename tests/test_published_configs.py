"""One configuration per published row: each composes, has its full-size architecture, and runs shrunken through main()."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from calib_guidance.cli import main
from calib_guidance.cli.parsed import ModulesMadeOnce, read_configuration
from calib_guidance.experiments.settings import make_plan
from calib_guidance.networks import DiT, EDM2UNet, EncoderUNet, UNet
from calib_guidance.networks.lightningdit import LatentTransformer
from calib_guidance.weights.cards import by_file
from tests.conftest import ROOT
from tests.runs import QUICK, metrics, read_samples

PREDICT = ROOT / "lightning_configs" / "predict"
EXPERIMENTS = ROOT / "lightning_configs" / "experiments"
FILES = sorted(
    str(path.relative_to(PREDICT)) for folder in PREDICT.glob("imagenet*/") for path in folder.rglob("*.yaml")
)
# Published numbers that differ from each other in one value are rows of experiments. Axis and values of each:
ABLATIONS = {
    "imagenet128_recurrence": ("recurrence", (2, 3)),  # 1 is ablation/resnet50.yaml
    "imagenet128_softplus": ("beta", (8, 5, 4, 3)),  # null, ReLU, is ablation/resnet50.yaml
    "imagenet128_tau2": ("tau2", (1, 0.8, 0.7, 0.5, 0.3)),
    "imagenet128_gamma": ("gamma", (0, 0.1, 0.2, 0.3, 0.4)),
}
EXPERIMENT_ROWS = [f"{name} --row {axis}={v}" for name, (axis, values) in ABLATIONS.items() for v in values]
ROWS = sorted([*FILES, *EXPERIMENT_ROWS])
# Parameters of the published networks, by what the rows name them.
PARAMETERS = {
    "adm_imagenet64": 295_904_454,
    "adm_imagenet128": 421_529_606,
    "adm_imagenet256": 553_838_086,
    "adm_imagenet256_uncond": 552_814_086,
    "adm_imagenet512": 558_997_638,
    "edm_imagenet64": 295_899_267,
    "dit_xl_2_256": 675_129_632,
    "sit_xl_2_256": 675_129_632,
    "repa_xl_2_256": 675_111_184,
    "lightningdit_xl_1_256": 675_293_600,
    "lightningdit_xl_1_256_64ep": 675_293_600,
    "lightningdit_ig_xl_1_256": 677_988_160,
    "sit_ig_xl_2_256": 677_786_144,
    "rae_ditdh_xl_256": 838_778_196,
    "rae_ditdh_s_256": 196_554_068,
    "rae_ditdh_xl_512": 839_970_132,
    "rae_ditdh_s_512": 197_143_892,
    "repae_xl_1_256": 675_148_064,
    "repae_sdvae_xl_2_256": 675_111_184,
    "repae_invae_xl_1_256": 675_148_064,
    "repae_vavae_xl_1_256": 675_148_064,
    "edm2_img64_xs": 124_711_461,
    "edm2_img64_s": 280_210_021,
    "edm2_img64_m": 497_803_941,
    "edm2_img64_l": 777_493_221,
    "edm2_img64_xl": 1_119_277_861,
    "edm2_img512_xs": 124_713_765,
    "edm2_img512_s": 280_213_477,
    "edm2_img512_m": 497_808_549,
    "edm2_img512_l": 777_498_981,
    "edm2_img512_xl": 1_119_284_773,
    "edm2_img512_xxl": 1_523_165_925,
    "edm2_img512_xs_uncond": 124_201_765,
    "edm2_img512_s_uncond": 279_445_477,
    "adm_classifier64": 65_438_568,
    "adm_classifier128": 42_568_040,
    "adm_classifier256": 54_096_360,
    "adm_classifier512": 54_448_360,
}
NETWORKS = (UNet, EncoderUNet, DiT, EDM2UNet, LatentTransformer)
# Rows of the newer models differ by a size or a weight alone. These are built and sampled here.
NEWER = re.compile(r"/edm2/|/(sit|repa|repae|lightningdit|internal_guidance|rae)(_|\.)")
SAMPLED = {
    *("imagenet64/edm2/s_autoguided.yaml", "imagenet64/edm2/s_resnet101_js.yaml"),
    *("imagenet512/edm2/xxl_interval.yaml", "imagenet512/edm2/s_uncond_autoguided.yaml"),
    *("imagenet256/sit.yaml", "imagenet256/repa_resnet101_js.yaml", "imagenet256/internal_guidance.yaml"),
    "imagenet256/rae_autoguided.yaml",
}


def objects(node):
    """Every ``{class_path, init_args}`` below a node."""
    if isinstance(node, dict):
        if "class_path" in node:
            yield node
        for value in node.values():
            yield from objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from objects(value)


def name_of(node):
    return node["class_path"].rpartition(".")[2]


def part(name, **arguments):
    return {"class_path": f"calib_guidance.{name}", "init_args": arguments}


ADM = {"image_size": 16, "in_channels": 3, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2]}
ADM |= {"attention_resolutions": [2], "num_head_channels": 32, "use_scale_shift_norm": True, "resblock_updown": True}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


DRAWN = (
    "imagenet64/unguided.yaml",
    "imagenet128/resnet101_js.yaml",
    "imagenet256/clip.yaml",
    "imagenet256/dit_resnet101.yaml",
)


def shrink(node, vae):
    """A small network without weights in place of a published one; everything else of the row stays."""
    arguments, kind = node.get("init_args") or {}, name_of(node)
    if kind == "ADMDenoiser":
        classes = None if arguments["network"].endswith("uncond") else 1000
        network = part("networks.UNet", **ADM, out_channels=6, num_classes=classes)
        arguments |= {"network": network, "checkpoint": None, "dtype": None}
    elif kind == "EDMDenoiser":
        network = part("networks.UNet", **ADM, out_channels=3, num_classes=1000, min_group_channels=4)
        arguments |= {"network": network, "checkpoint": None, "dtype": None}
    elif kind == "DiTDenoiser":
        network = part("networks.DiT", sample_size=4, hidden_size=32, depth=1, num_heads=2)
        arguments |= {"network": network, "checkpoint": None, "vae": vae}
    elif kind == "EDM2Denoiser":
        name = arguments["network"]
        small = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
        small |= {"image_size": 4, "in_channels": 4} if "512" in name else {"image_size": 16, "in_channels": 3}
        network = part("networks.EDM2UNet", **small, num_classes=None if name.endswith("uncond") else 1000)
        arguments |= {"network": network, "checkpoint": None, "dtype": None}
        arguments["vae"] = vae if arguments.get("vae") else None
    elif kind == "FlowDenoiser":
        name, small = arguments["network"], {"sample_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2}
        if name.startswith(("lightningdit", "sit_ig")):
            network = part("networks.LightningDiT", **small, in_channels=4)
            network["init_args"] |= {"mid_depth": 1, "internal_guidance": 1.4} if "_ig_" in name else {}
        elif name.startswith("rae"):
            heads = {"hidden_size": [16, 32], "depth": [1, 1], "num_heads": [2, 2]}
            network = part("networks.DiTDH", **small | heads, in_channels=4)
        else:
            network = part("networks.DiT", **small, out_channels=8 if name.startswith("sit") else 4)
        direction = "noise_to_data" if name.startswith(("sit_xl", "lightningdit")) else "data_to_noise"
        decoder = vae if arguments.get("vae") else None
        arguments |= {"network": network, "checkpoint": None, "vae": decoder, "time_direction": direction}
        arguments["latent_stats"] = None
    elif kind == "NoiseAwareClassifier":
        network = part("networks.EncoderUNet", **ADM, out_channels=1000)
        arguments |= {"network": network, "checkpoint": None, "dtype": None}
    elif kind == "OffTheShelfClassifier":
        network = part("networks.SmallResNet", num_classes=1000, in_channels=3, widths=[8, 16])
        arguments |= {"network": network, "weights": None}
    elif kind == "CLIPClassifier":
        arguments |= {"model": CLIP, "weights": None}
    elif kind in ("DDPM", "DDIM"):
        arguments["steps"] = "3"
    elif kind in ("Heun", "FlowODE", "FlowSDE"):
        arguments["num_steps"] = 3


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny autoencoder in diffusers' folder format: four latent channels, an eighth of the side."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    model = AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=4, layers_per_block=1, **blocks)
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return str(path)


def test_the_table_names_every_row_once():
    text = (ROOT / "lightning_configs" / "README.md").read_text()
    named = re.findall(r"^\|.*\| `(imagenet[\w/.]+(?:\.yaml| --row \w+=[\d.]+))` \|$", text, re.MULTILINE)
    assert sorted(named) == ROWS
    assert len(ROWS) == 139


ADM_METRICS = ["fid", "sfid", "is", "is_adm", "pr", "pr_adm"]


@pytest.mark.parametrize(
    ("row", "overlay", "reference", "metrics"),
    [
        ("imagenet64/unguided", "imagenet64", "VIRTUAL_imagenet64_labeled.npz", ADM_METRICS),
        ("imagenet64/edm36_resnet101", "edm64", "imagenet-64x64.npz", ["fid", "is"]),  # only mu and sigma
        ("imagenet128/resnet101_js", "imagenet128", "VIRTUAL_imagenet128_labeled.npz", ADM_METRICS),
        ("imagenet256/dit", "imagenet256", "VIRTUAL_imagenet256_labeled.npz", ADM_METRICS),
        ("imagenet512/adm_noise_aware", "imagenet512", "VIRTUAL_imagenet512.npz", ADM_METRICS),
        ("imagenet512/edm2/s", "edm2_512", "img512.pkl", ["fid", "is"]),
    ],
)
def test_quality_is_one_overlay_more(row, overlay, reference, metrics, in_root):
    plain, more = (resolved(row, *overlays) for overlays in ((), (f"quality/{overlay}",)))
    *others, quality = more["trainer"].pop("callbacks")
    assert others == plain["trainer"].pop("callbacks")
    assert all(more[part] == plain[part] for part in ("model", "data", "trainer"))
    assert name_of(quality) == "SampleQuality"
    assert name_of(quality["init_args"]["features"]) == "InceptionFeatures"
    assert quality["init_args"]["reference"] == f"checkpoints/{reference}"
    assert quality["init_args"]["metrics"] == metrics
    assert reference in (ROOT / "checkpoints/README.md").read_text()


def resolved(row, *overlays):
    files = [f"{PREDICT / row}.yaml", *(f"lightning_configs/{overlay}.yaml" for overlay in overlays)]
    return read_configuration([f"--config={file}" for file in files]).options.as_dict()


@pytest.mark.parametrize(
    ("row", "scale"),  # --classifier_scale of guided-diffusion's README
    [
        ("imagenet64/adm_noise_aware", 1),
        ("imagenet128/noise_aware", 0.5),
        ("imagenet128/regularized/noise_aware", 0.5),
        ("imagenet256/adm_noise_aware", 1),
        ("imagenet256/adm_unconditional_noise_aware", 10),
        ("imagenet512/adm_noise_aware", 4),
    ],
)
def test_noise_aware_rows_have_the_scale_of_their_publishers(row, scale, in_root):
    guidance = resolved(row)["model"]["init_args"]["guidance"]["init_args"]
    assert (guidance["scale"], guidance["classifier_input"]) == (scale, "x_t")


def test_published_values_of_one_run_name_one_run(in_root):
    """5.34, 5.19 and 5.24 are one setting, which the first two rows also sample into one folder."""
    baseline, calibrated = resolved("imagenet128/regularized/resnet50"), resolved("imagenet128/ablation/calibrated")
    assert calibrated == baseline
    gamma = read_configuration(arguments("imagenet128_gamma --row gamma=0.3")).options.as_dict()
    assert gamma["model"] == baseline["model"]
    assert gamma["data"] == baseline["data"]


def test_smooth_ece_has_one_weight(in_root):
    """The noise-aware fit has that of the objective, before and after the overlay."""
    fits = [
        read_configuration([f"--config={name}" for name in ("fit/imagenet128_adm_noise_aware", *overlay)])
        for overlay in ((), ("objective/smooth_ece",))
    ]
    first, second = (cli.options.as_dict()["model"] for cli in fits)
    assert first == second
    assert first["init_args"]["smooth_ece_weight"] == 1


BUILT, MADE = {}, ModulesMadeOnce()


def full_size(cli, config):
    """Weights of each published network of a row, counted without memory; rows of the same networks build them once."""
    key = json.dumps(
        [node for node in objects(config["model"]) if "network" in (node.get("init_args") or {})], default=str
    )
    if key not in BUILT:
        networks = [m for m in cli.build_on_meta(MADE).modules() if isinstance(m, NETWORKS)]
        BUILT[key] = sorted(sum(value.numel() for value in network.state_dict().values()) for network in networks)
    return BUILT[key]


@functools.cache
def plan_of(path):
    return make_plan(path)


def arguments(row):
    """Arguments of ``predict`` for a row of the table."""
    file, _, name = row.partition(" --row ")
    if not name:
        return [f"--config={PREDICT / row}"]
    plan = plan_of(EXPERIMENTS / f"{file}.yaml")
    (number,) = plan.select([name])
    (run,) = plan.runs([number], plan.experiment.num_samples, Path("outputs"))
    assert run.commands[1][0] == "evaluate"
    command, *argv = run.commands[0]
    assert command == "predict"
    return argv


def alike(node):
    """A configuration with the sign of each number in its place. 0 and 1 stay: they switch things off."""
    if isinstance(node, dict):
        return {key: alike(value) for key, value in node.items()}
    if isinstance(node, list):
        return [alike(value) for value in node]
    if type(node) in (int, float) and node not in (0, 1):
        return f"{type(node).__name__} {node > 0}"
    return node


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Metrics and samples of a configuration.

    Rows that differ in the size of their networks alone shrink to one, and those that differ in other numbers alone run the same
    code: the first of them is sampled.
    """
    made = {}

    def sample(config):
        key = json.dumps(alike(config), sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("twin")
            (folder / "twin.yaml").write_text(yaml.safe_dump(config))
            main(["predict", f"--config={folder / 'twin.yaml'}", f"--trainer.default_root_dir={folder}", *QUICK])
            (samples,) = read_samples(folder / "samples")
            made[key] = metrics(folder), samples
        return made[key]

    return sample


OWN_WEIGHTS = "checkpoints/128x128_label_dropout.pt"  # of Ho & Salimans 2022, who published none


@pytest.mark.parametrize("row", ROWS)
def test_row(row, vae, sample, in_root):
    """The full architecture without memory for its weights, then three steps of the same row with small networks."""
    cli = read_configuration(arguments(row))
    config = cli.options.as_dict()
    if "--row" in row:
        assert config["data"]["init_args"]["num_samples"] == 10_000
        assert config["trainer"]["default_root_dir"].startswith("outputs/runs/")
    else:
        folder = row.removesuffix(".yaml").replace("ablation/calibrated", "regularized/resnet50")  # the same run
        assert config["trainer"]["default_root_dir"] == f"outputs/{folder}"
    named = [(node.get("init_args") or {}).get("network") for node in objects(config["model"])]
    named = [name for name in named if isinstance(name, str)]
    assert any(name in PARAMETERS for name in named)
    for node in objects(config["model"]):
        given = node.get("init_args") or {}
        own = str(given.get("checkpoint")) == OWN_WEIGHTS or str(given.get("checkpoint")).startswith("outputs/")
        if given.get("checkpoint") and isinstance(given.get("network"), str) and not own:  # the file is of the network
            assert by_file(given["checkpoint"]).name == given["network"]
    if NEWER.search(row) and row not in SAMPLED:
        return
    assert full_size(cli, config) == sorted(PARAMETERS[name] for name in named if name in PARAMETERS)

    for node in objects(config):
        shrink(node, vae)
    del config["trainer"]["default_root_dir"]
    config["trainer"]["callbacks"][-1]["init_args"]["plots"] = row in DRAWN
    config["data"]["init_args"] |= {"num_samples": 8, "batch_size": 8}
    found, samples = sample({key: config[key] for key in ("seed_everything", "trainer", "model", "data")})
    assert found["num_samples"] == 8
    assert samples["index"].tolist() == list(range(8))
    assert samples["image"].shape == (
        8,
        3,
        *((32, 32) if re.search("/(dit|sit|rep|lightning|internal|rae)|512/edm2", row) else (16, 16)),
    )
    assert samples["image"].float().std() > 1
    guided = config["model"]["init_args"]["guidance"] is not None
    assert ("gradient_norm_t" in found) == guided
    if guided:
        assert all(norm > 0 for norm in found["gradient_norm_t"]["mean"])
    assert ("clip_score" in found) == ("clip" in row)
