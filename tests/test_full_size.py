"""The published system at full size: random weights, two real steps."""

import pytest
import yaml

from tests import processes
from tests.runs import QUICK, metrics, read_samples


@pytest.mark.slow
def test_adm128_guided_by_resnet101_with_js(in_root, tmp_path):
    """422 million parameters on this CPU: every shape of the published networks is run, forward and to the image's gradient.

    In a process of its own, which gives back 2.5 GB. In the type that is fast here: bfloat16 takes many CPUs two minutes.
    """
    model = {
        "denoiser": {"init_args": {"checkpoint": None, "dtype": "auto"}},
        "sampler": {"init_args": {"steps": "2"}},
        "guidance": {"init_args": {"classifier": {"init_args": {"weights": None}}}},
    }
    overlay = tmp_path / "two_steps.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"init_args": model}}))
    processes.succeed(
        "predict",
        "--config=lightning_configs/predict/imagenet128/resnet101_js.yaml",
        f"--config={overlay}",
        "--data.init_args.num_samples=1",
        "--data.init_args.batch_size=1",
        f"--trainer.default_root_dir={tmp_path}",
        *QUICK,
    )
    (samples,) = read_samples(tmp_path / "samples")
    assert samples["image"].shape == (1, 3, 128, 128)
    found = metrics(tmp_path)
    assert found["nfe"] == 2
    assert len(found["gradient_norm_t"]["mean"]) == 2
    assert all(norm > 0 for norm in found["gradient_norm_t"]["mean"])
