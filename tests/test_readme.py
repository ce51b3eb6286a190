"""What the README says can be done."""

import re

import pytest
import torch


@pytest.fixture(scope="module")
def readme():
    from tests.conftest import ROOT

    return (ROOT / "README.md").read_text()


def test_the_python_example_runs(readme, in_root):
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names = {}
    exec(code, names)
    images = names["images"]
    assert images.shape == (10, 1, 8, 8)
    with torch.no_grad():
        predicted = names["classifier"](images).argmax(1)
    assert (predicted == torch.arange(10)).sum() >= 8


def test_every_file_that_it_names_is_there(readme, in_root):
    named = set(re.findall(r"(?:lightning_configs|docs|checkpoints|tests)/[\w./-]*\w", readme))
    assert len(named) > 10
    missing = [n for n in named if not (in_root / n).exists() and not n.endswith("_diffusion.pt")]
    assert not missing


def test_every_make_target_that_it_names_is_there(readme, in_root):
    makefile = (in_root / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([\w-]+)`?", readme)) - {"and"}
    assert {"demo", "test", "compare", "checkpoints"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
