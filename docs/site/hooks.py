"""What MkDocs builds beside the pages of docs/: pages made of other files of the repository, of the code, and of the notebook."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import configuration_keys  # noqa: E402
import diagrams  # noqa: E402
import notebook  # noqa: E402
import reference  # noqa: E402

# Pages that the repository keeps elsewhere, and what they are called here.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "checkpoints/README.md": "weights.md",
    "lightning_configs/README.md": "reproduce.md",
    "docs/README.md": "pages.md",
    "docs/notebooks/quickstart.ipynb": "quickstart.md",
}
_LINK = re.compile(r"(!?\[(?:[^\[\]]|!?\[[^\]]*\]\([^)]*\))*\])\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
_FILE_NAME = re.compile(r"\[[\w./-]+\.md\]")  # as a label: on the site the title of the page
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_COPIED: dict[str, Path] = {}  # linked files of the repository, to be copied


def _on_site(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path.startswith("docs/") and not path.endswith((".py", ".json", ".ipynb")):
        return path.removeprefix("docs/")
    if not (ROOT / path).is_file():
        return f"missing/{path}"  # the strict build names it
    name = f"files/{path}{'' if '.' in Path(path).name else '.txt'}"
    _COPIED[name] = ROOT / path
    return name


def with_links(text: str, source: str, page: str) -> str:
    """Markdown of the repository's file ``source`` with its links as they are on the site's ``page``."""

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        # A picture within a link.
        label = _LINK.sub(moved, match[1]) if match[1].count("](") else match[1]
        if _FILE_NAME.fullmatch(label) and (ROOT / target).is_file():
            label = f"[{re.search('^# (.*)', (ROOT / target).read_text(), re.MULTILINE)[1]}]"
        return f"{label}({posixpath.relpath(_on_site(target), posixpath.dirname(page) or '.')}{match[3] or ''})"

    text = re.sub(r"\[(\d+)\](?=\s+\[)", r"\\[\1\\]", text)  # [2] [arXiv …](…) must not become a reference
    blocks = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(block if block.startswith("```") else _LINK.sub(moved, block) for block in blocks)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages of the API into the navigation, at ``API: []``."""
    for section in (part for group in config.nav for part in group.values()):
        for entry in section:
            if isinstance(entry, dict) and "API" in entry:
                entry["API"] = ["api/index.md", *(f"api/{folder}.md" for folder in reference.FOLDERS)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    def add(name: str, content: str | bytes) -> None:
        files.append(File.generated(config, name, content=content))

    for source, page in ELSEWHERE.items():
        if source.endswith(".md"):
            add(page, with_links((ROOT / source).read_text(), source, page))
    for name, text in (reference.pages() | {"configuration_keys.md": configuration_keys.page()}).items():
        add(name, text)
    add("configurations.md", reference.configurations(ROOT / "lightning_configs"))
    source = "docs/notebooks/quickstart.ipynb"
    text, pictures = notebook.run(ROOT / source, ROOT)
    add("quickstart.md", with_links(text, source, "quickstart.md"))
    for name, content in pictures.items():
        add(name, content)
    for page in [file for file in files.documentation_pages() if file.abs_src_path]:
        with_links(
            Path(page.abs_src_path).read_text(), f"docs/{page.src_uri}", page.src_uri
        )  # finds what is to be copied
    for name, path in _COPIED.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if not page.file.generated_by:
        markdown = with_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Diagrams, and formulas as MathML, which browsers draw themselves."""

    def drawn(match: re.Match[str]) -> str:
        latex = match[3].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return convert(latex, display="inline" if match[2] == "(" else "block")

    for name, draw in diagrams.DRAWN.items():
        html = html.replace(f"<!-- {name} -->", draw() if f"<!-- {name} -->" in html else "")
    return _MATH.sub(drawn, html)
