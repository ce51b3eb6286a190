"""The ImageNet configuration: the published architecture, and a shrunken twin through the command line."""

import json

import torch
import yaml

from calib_guidance.cli import main
from calib_guidance.networks import UNet

CONFIG = "lightning_configs/predict/imagenet128_resnet101_js.yaml"


def test_the_network_is_the_published_one(in_root):
    arguments = yaml.safe_load((in_root / CONFIG).read_text())["model"]["init_args"]["denoiser"]["init_args"][
        "network"
    ]["init_args"]
    with torch.device("meta"):
        network = UNet(**arguments)
    assert sum(p.numel() for p in network.parameters()) == 421_529_606
    names = network.state_dict().keys()
    for name in (
        "label_emb.weight",
        "input_blocks.8.1.qkv.weight",
        "middle_block.1.proj_out.bias",
        "output_blocks.2.2.in_layers.0.weight",
    ):
        assert name in names
    network.check_image((3, 128, 128))


def test_a_shrunken_twin_samples(in_root, tmp_path):
    network = {"image_size": 32, "model_channels": 32, "num_res_blocks": 1, "dtype": "bfloat16"}
    guidance = {"classifier": {"init_args": {"network": "torchvision/resnet18", "weights": None}}}
    model = {"denoiser": {"init_args": {"network": {"init_args": network}, "checkpoint": None}}}
    model |= {"guidance": {"init_args": guidance}, "sampler": {"init_args": {"steps": "3"}}}
    overlay = tmp_path / "twin.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"init_args": model}}))
    main(
        [
            "predict",
            f"--config={CONFIG}",
            f"--config={overlay}",
            "--data.init_args.num_samples=4",
            "--data.init_args.batch_size=2",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_samples"] == 4
    assert 0 <= metrics["integral_ece"] <= 1
    assert len(list((tmp_path / "samples").glob("*.parquet"))) == 2
