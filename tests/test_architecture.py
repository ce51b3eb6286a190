"""A folder imports only from the folders on lower floors, and only the top ones know Lightning."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import yaml

import calib_guidance

ROOT = Path(calib_guidance.__file__).parent
# Lowest floor first. No two folders share a floor.
FLOORS = """
    diffusion scores backend networks weights denoisers classifiers guidance samplers training metrics runs data plots
    evaluation tasks callbacks report cli experiments app
""".split()  # noqa: SIM905, one name after the other reads best
AT_THE_ROOT = {"__init__", "__main__", "errors"}
KNOW_LIGHTNING = {"tasks", "callbacks", "data", "cli", "experiments"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "calib_guidance":
                yield from (f"calib_guidance.{alias.name}" for alias in node.names if alias.name in FLOORS)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def folders():
    for path in sorted(ROOT.rglob("*.py")):
        folder, *rest = path.relative_to(ROOT).parts
        if rest:
            yield folder, path


def test_the_root_holds_folders():
    assert {path.stem for path in ROOT.glob("*.py")} == AT_THE_ROOT
    assert {folder for folder, _ in folders()} == set(FLOORS)


def test_imports_lead_down():
    wrong = []
    for folder, path in folders():
        for name in imports(path):
            ours, *parts = name.split(".")
            known = ours == "calib_guidance" and parts and parts[0] in FLOORS
            if known and FLOORS.index(parts[0]) > FLOORS.index(folder):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_only_the_top_knows_lightning():
    knowing = {folder for folder, path in folders() if any(name.split(".")[0] == "lightning" for name in imports(path))}
    assert knowing <= KNOW_LIGHTNING


def test_scores_know_no_diffusion():
    for path in (ROOT / "scores").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("calib_guidance")}
        assert all(name.startswith(("calib_guidance.scores", "calib_guidance.errors")) for name in ours)


def test_networks_know_no_files():
    """Architectures know neither weights files nor the names of published models."""
    names = [name for name in yaml.safe_load((ROOT / "weights/cards.yaml").read_text()) if not name.startswith(".")]
    assert "adm_imagenet128" in names
    for path in (ROOT / "networks").glob("*.py"):
        assert not {"safetensors", "pickle", "huggingface_hub", "pathlib", "os"} & {
            n.split(".")[0] for n in imports(path)
        }
        text = path.read_text()
        assert not [name for name in names if name in text]
        assert not re.search(r"imagenet|_xl_|checkpoint_?path|\.(pt|pkl|safetensors)\b", text, re.IGNORECASE)


def test_the_package_is_imported_without_torch():
    """Names at the root cost nothing until they are used."""
    code = "import sys, calib_guidance; calib_guidance.load_pretrained; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _docstring_lines(tree):
    owners = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = [n.body[0] for n in owners if ast.get_docstring(n)]
    return sum(d.end_lineno - d.lineno + 1 for d in docstrings)


def test_samplers_are_small():
    """A sampler is its levels, its coefficients and its step."""
    samplers = ROOT / "samplers"
    for path in samplers.glob("*.py"):
        tree = ast.parse(path.read_text())
        steps = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "step"]
        assert all(n.end_lineno - n.lineno < 30 for n in steps), path
        code = len(path.read_text().splitlines()) - _docstring_lines(tree)
        assert not (steps and path.name != "base.py") or code <= 90, path


def test_no_part_searches_the_callbacks_for_a_sibling():
    """Parts of a run share a context; the command line alone hands things to every callback."""
    for folder in ("tasks", "callbacks", "data"):
        for path in (ROOT / folder).glob("*.py"):
            attributes = [
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            ]
            assert "callbacks" not in attributes, path.name
