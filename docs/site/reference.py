"""The pages of the API reference, and the list of configurations."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import calib_guidance

PACKAGE = Path(calib_guidance.__file__).parent
# In the order of a reader, not of imports.
FOLDERS = """
    scores guidance denoisers classifiers samplers diffusion training metrics networks evaluation data tasks callbacks plots
""".split()  # noqa: SIM905

# Public names that a package does not import, because what they need takes long to import.
BESIDE = {"evaluation": ["calib_guidance.evaluation.hub_model.HubModel"]}


def public(folder: str) -> dict[str, str]:
    """Names that a package exports, and the modules that define them: ``from module import X as X``, or those in ``__all__``."""
    tree = ast.parse((PACKAGE / folder / "__init__.py").read_text())
    imports = [(alias, node.module) for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    exported = {alias.name for alias, _ in imports if alias.asname == alias.name}
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            exported |= set(ast.literal_eval(node.value))
    return {alias.name: module for alias, module in imports if alias.name in exported}


def about(folder: str) -> str:
    """First line of a package's docstring."""
    return ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())).splitlines()[0]


def pages() -> dict[str, str]:
    """``api/FOLDER.md`` with a section for each public name, and ``api/index.md``."""
    found, listed = {}, []
    for folder in FOLDERS:
        names = []
        for name, module in public(folder).items():
            is_module = (PACKAGE / folder / f"{name}.py").exists()  # of the same name as what it defines
            names.append(f"{module if is_module else f'calib_guidance.{folder}'}.{name}")
        names += BESIDE.get(folder, [])
        sections = "\n".join(f"::: {name}\n" for name in names)
        options = "{members: false, show_root_heading: false, show_root_toc_entry: false}"
        package = f"::: calib_guidance.{folder}\n    options: {options}\n"
        found[f"api/{folder}.md"] = f"# calib_guidance.{folder}\n\n{package}\n{sections}"
        listed.append(f"| [`{folder}`]({folder}.md) | {about(folder)} | {len(names)} |")
    table = "\n".join(["| package | holds | names |", "|---|---|---:|", *listed])
    load = "## Published models\n\n::: calib_guidance.load_pretrained\n    options: {heading_level: 3}\n"
    intro = "Every public name, by package. [How it works](../how_it_works.md) says how they fit together."
    found["api/index.md"] = f"# API reference\n\n{intro}\n\n{table}\n\n{load}"
    return found


def configurations(root: Path) -> str:
    """A table of every named configuration, by folder, with its first comment and base; then the files."""
    folders: dict[str, list[str]] = {}
    files: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.yaml")):
        text = path.read_text()
        comments = re.match(r"(?:#.*\n)*", text)[0]
        sentences = " ".join(line.lstrip("# ") for line in comments.splitlines())
        about = re.split(r"(?<=[.]) (?=[A-Z])", sentences)[0].replace("|", "\\|")
        based = re.search(r"^base: *\[?([^\]\n]*)\]?", text, re.MULTILINE)
        base = ", ".join(f"`{each.strip().removesuffix('.yaml')}`" for each in based[1].split(",")) if based else ""
        name = path.relative_to(root).with_suffix("")
        shown = "\n".join(f"    {line}".rstrip() for line in f"```yaml\n{text.rstrip()}\n```".splitlines())
        files.setdefault(name.parts[0], []).append(f'??? abstract "{name.as_posix()}"\n\n{shown}\n')
        folders.setdefault(name.parts[0], []).append(
            f"| `{name.as_posix()}` | {about} | {base} |".replace("{", "&#123;")
        )
    parts = [
        "# All configurations\n\n`calib-guidance configs` prints this list. `--config` and `base:` take each name; "
        "[Reproduce the papers](reproduce.md) says which row of the papers is which name.\n"
    ]
    for folder, rows in folders.items():
        parts += [
            f"## {folder}\n",
            "| name | what it is | based on |\n|---|---|---|",
            "\n".join(rows) + "\n",
            *files[folder],
        ]
    return "\n".join(parts)
