"""The published system at full size: random weights, two real steps."""

import json

import pytest
import yaml

from calib_guidance.cli import main
from tests.samples import read_samples


@pytest.mark.slow
def test_adm128_guided_by_resnet101_with_js(in_root, tmp_path):
    """422 million parameters on this CPU: every shape of the published networks is run, forward and to the image's gradient."""
    model = {
        "denoiser": {"init_args": {"checkpoint": None, "dtype": "float32"}},
        "sampler": {"init_args": {"steps": "2"}},
        "guidance": {"init_args": {"classifier": {"init_args": {"weights": None}}}},
    }
    overlay = tmp_path / "two_steps.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"init_args": model}}))
    main(
        [
            "predict",
            "--config=lightning_configs/predict/imagenet128/resnet101_js.yaml",
            f"--config={overlay}",
            "--data.init_args.num_samples=1",
            "--data.init_args.batch_size=1",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )
    (samples,) = read_samples(tmp_path / "samples")
    assert samples["image"].shape == (1, 3, 128, 128)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["nfe"] == 2
    assert len(metrics["gradient_norm_t"]["mean"]) == 2
    assert all(norm > 0 for norm in metrics["gradient_norm_t"]["mean"])
