"""The pages of docs/ that promise more than single commands: a complete example, and messages that the program prints."""

import ast
import io
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from calib_guidance.cli import main
from tests.conftest import ROOT

# The example of docs/own_images.md in small: the same keys, fewer channels, steps and samples.
SMALL = ["--trainer.accelerator=cpu", "--data.batch_size=4"]
TRAINED = [*SMALL, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.check_val_every_n_epoch=1"]
TRAINED += ["--data.num_workers=0", "--trainer.logger=false"]


@pytest.fixture
def images(tmp_path, monkeypatch):
    """``images/`` as the page lays it out, and its configuration files, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:04}.png")
    page = (ROOT / "docs/own_images.md").read_text()
    for name, text in re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(text.replace("model_channels: 64", "model_channels: 32"))
    return tmp_path


def test_the_example_of_own_images_goes_from_a_folder_to_guided_samples(images):
    main(["fit", "--config=diffusion.yaml", *TRAINED])
    main(["fit", "--config=classifier.yaml", *TRAINED, "--model.input_transform.init_args.steps=5"])
    main(["predict", "--config=sample.yaml", *SMALL, "--data.num_samples=4", "--model.sampler.init_args.steps=3"])
    table = pq.read_table(next((images / "outputs/rgb32/samples/samples").glob("*.parquet")))
    assert table["label"].to_pylist() == [0, 1, 0, 1]
    for row in table["image"].to_pylist():
        assert Image.open(io.BytesIO(row["bytes"])).size == (32, 32)


def texts(path):
    """The strings of a source file, with ``…`` for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_message_of_the_faq_is_one_of_the_program():
    said = [" ".join(text.split()) for path in (ROOT / "calib_guidance").rglob("*.py") for text in texts(path)]
    messages = re.findall(
        r"^\| `([^`]+)` \|", (ROOT / "docs/faq.md").read_text().partition("## Messages")[2], re.MULTILINE
    )
    assert len(messages) > 15
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        assert any(pattern.search(text) for text in said), message
