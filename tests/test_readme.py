"""What the README and that of the configurations say can be done."""

import re
import shlex

import pytest
import torch

from calib_guidance.cli.lightning import run_lightning
from calib_guidance.cli.parsed import ParsedCLI, read_configuration
from tests.conftest import ROOT

PAGES = ("README.md", "lightning_configs/README.md")
COMMAND = re.compile(r"^calib-guidance +(predict|fit|validate|doctor) +((?:.*\\\n)*.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def readme():
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


def commands():
    """The commands of both pages, each once, without options that name files which earlier commands make."""
    found = {}
    for page in PAGES:
        for command, text in COMMAND.findall((ROOT / page).read_text()):
            argv = shlex.split(text.replace("\\\n", " "), comments=True)
            made = [i for i, word in enumerate(argv) if word.startswith("outputs/") and word.endswith(".yaml")]
            argv = [word for i, word in enumerate(argv) if i not in made and i + 1 not in made]
            found[" ".join([command, *argv])] = (command, argv)
    return found


def test_every_command_has_a_configuration_that_can_be_read(in_root):
    found = commands()
    assert len(found) > 10
    for text, (command, argv) in found.items():
        cli = read_configuration(argv) if command == "doctor" else run_lightning([command, *argv], ParsedCLI)
        assert cli.options.model is not None, text
