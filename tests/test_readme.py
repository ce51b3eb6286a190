"""What README and documentation say can be done."""

import re
import shlex

import pytest
import torch

from calib_guidance.cli import main
from calib_guidance.cli.lightning import run_lightning
from calib_guidance.cli.parsed import ParsedCLI, read_configuration
from tests.conftest import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", "lightning_configs/README.md", "checkpoints/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
COMMAND = re.compile(r"^calib-guidance +(predict|fit|validate|doctor) +((?:.*\\\n)*.*)$", re.MULTILINE)


def text(page):
    return (ROOT / page).read_text()


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_the_python_blocks_of_a_page_run_one_after_the_other(page, in_root):
    names = {}
    for code in python_blocks(page):
        exec(compile(code, page, "exec"), names)
    assert names["images"].abs().max() < 1.001
    assert names["images"].shape == (4, *names["denoiser"].image_shape)


def test_the_first_python_example_gives_the_digits_that_it_asks_for(in_root):
    names = {}
    exec(python_blocks("README.md")[0], names)
    assert names["images"].shape == (10, 1, 8, 8)
    with torch.no_grad():
        predicted = names["classifier"](names["images"]).argmax(1)
    assert (predicted == torch.arange(10)).sum() >= 8


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text(page))
    assert not [target for target in targets if not (folder / target).exists()]


def test_every_file_that_the_readme_names_is_there(in_root):
    named = set(re.findall(r"(?:lightning_configs|docs|checkpoints|tests)/[\w./-]*\w", text("README.md")))
    assert len(named) > 10
    assert not [n for n in named if not (in_root / n).exists() and not n.endswith("_diffusion.pt")]


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_a_page_names_is_there(page):
    for target in set(re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", text(page), re.MULTILINE)):
        name = target[0] or target[1]
        assert re.search(rf"^{name}:", text("Makefile"), re.MULTILINE), name


def test_the_readme_is_short_and_its_results_are_those_of_the_results_page():
    lines = text("README.md").splitlines()
    assert len(lines) <= 180
    results = text("docs/results.md").splitlines()
    rows = [line.split(" | ") for line in lines if re.match(r"\| [^|]+ \| \d\.\d\d ± ", line)]
    assert len(rows) > 5
    # There also with the settings, and with the difference from another row.
    cells = [line.split(" | ") for line in results if line.startswith("| ")]
    tuned = [[each[0], *each[2:6], f"{each[6]} |"] for each in cells if len(each) == 8]
    assert not [row for row in rows if len(row) == 6 and row not in tuned]
    # Those of CIFAR-10 have other names, and no deviations but that of FD.
    shown = [row[1:] for row in rows if len(row) == 5]
    assert len(shown) == 6
    cells = [line.split(" | ") for line in text("docs/cifar10.md").splitlines() if line.startswith("| ")]
    known = [
        [row[k], *(cell.split(" ± ")[0] for cell in row[k + 1 : k + 4])]
        for row in cells
        for k in (1, 2)
        if len(row) > 5
    ]
    assert not [row for row in shown if [*row[:-1], row[-1].rstrip(" |")] not in known]


def commands():
    """The commands of all pages, each once, without options whose values others make."""
    found = {}
    for page in PAGES:
        for command, options in COMMAND.findall(text(page)):
            argv = shlex.split(options.replace("\\\n", " "), comments=True)
            own = re.findall(r"^# (\w+\.yaml)$", text(page), re.MULTILINE)  # tests/test_docs.py runs these
            if {"mine.yaml", "RUN.yaml", "…", *own} & set(argv):
                continue
            made = [i for i, word in enumerate(argv) if word.startswith("outputs/") and word.endswith(".yaml")]
            argv = [word for i, word in enumerate(argv) if i not in made and i + 1 not in made]
            found[" ".join([command, *argv])] = (command, argv)
    return found


@pytest.mark.parametrize("call", commands())
def test_every_command_has_a_configuration_that_can_be_read(call, in_root):
    command, argv = commands()[call]
    cli = read_configuration(argv) if command == "doctor" else run_lightning([command, *argv], ParsedCLI)
    assert cli.options.model is not None


OTHERS = r"evaluate|reference|report|status|export|compare-runs|ema|experiment|tune|app|configs"


def calls(pattern):
    """Options of the commands of all pages, by command."""
    found = {}
    for page in PAGES:
        for command, options in re.findall(rf"^{pattern} +((?:.*\\\n)*.*)$", text(page), re.MULTILINE):
            words = shlex.split(options.replace("\\\n", " "), comments=True)
            found.setdefault(command, []).append(words)
    return found


@pytest.mark.parametrize("command", sorted(calls(rf"calib-guidance +({OTHERS})")))
def test_every_option_of_the_other_commands_is_one_of_the_command(command, capsys, in_root):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    known = re.findall(r"--[\w-]+", capsys.readouterr().out)
    for words in calls(rf"calib-guidance +({OTHERS})")[command]:
        assert {word for word in words if word.startswith("--")} <= {*known}
        if command in ("experiment", "tune"):
            folder = "tune" if command == "tune" else "experiments"
            assert (ROOT / f"lightning_configs/{folder}/{words[words.index('--config') + 1]}.yaml").is_file()


def test_every_option_of_a_script_is_one_of_the_script():
    found = {use for page in PAGES for use in re.findall(r"python ((?:docs|benchmarks)/\w+\.py)([^`#\n]*)", text(page))}
    assert len(found) > 10
    for script, options in found:
        code = text(script) + text("benchmarks/timing.py")
        assert all(f'"{option}"' in code for option in re.findall(r"--[\w-]+", options)), script
