"""Comments, docstrings, messages, names and pages use the terms of the field, in American spelling."""

import ast
import io
import re
import tokenize

import pytest

from tests.conftest import ROOT

# What is not written, and what is written instead.
WORDS = {
    r"(?<![.=\"])\bfigures?\b(?! \d)": "metric or value; plot",
    r"\bjudg(e|es|ed|ing)\b": "evaluation classifier",
    r"\banew\b": "again",
    r"\bwhole\b": "complete; integer",
    r"\bgiven again\b|\bgo(es)? on\b": "re-run; continue",
    r"\bin hand\b|\btaken over\b|\bbur(y|ied)\b|\bgraves?\b": "current; reclaimed; tombstone",
    r"\bspread\b": "standard deviation; range",
    r"\bshares? of\b|\b(the|a|an|same|its) shares?\b": "fraction",
    r"\bsds?\b(?!-)": "std",
    r"\bby heart\b": "memorized",
    r"\bbegun\b|\bunseen\b|\bkick(s|ed)?\b": "started; new; split_increment",
    r"\bwhoever\b|\bhonest(ly)?\b": "name who; correct",
    r"\bclass[-_ ]wise\b|\bNoMemoryError\b|\blandmarks?\b": "classwise; OutOfMemoryError; signature_shapes",
    r"\bsame command again\b": "re-run",
    r"(?<!there )(?<!There )\b(is|are) no (?!longer\b)\w+": "is not a …; has no …",
    r"\bof which\b": "two sentences",
    r"\bso that\b[^.:]*\bso that\b": "two sentences",
    r"\bnetwork evaluations\b|\bevaluations of (the|a) network\b": "NFE",
    r"\bleft out\b": "skipped; omitted",
    r"\bmake room\b": "free disk space",
    r"\btold of\b": "a warning is printed",
    r"\bwhilst\b|\bamongst\b|\blearnt\b": "while; among; learned",
    r"\bcolour\w*": "color",
    r"\bgrey\w*": "gray",
    r"\b(behaviour|neighbour|favour|honour)\w*": "-or-",
    r"\b(centre|metre|litre)\w*": "-er",
    r"\b(un)?(labell|modell|cancell|signall|travell)\w*": "-l-",
    r"\blicences?\b": "license",
    r"\b\w+(al|ar|ri|im|mor|cogn|tr|er|it|et|hron|gan|ten)is(e|es|ed|ing|ation|ations)\b": "-ize",
}
# Exceptions: where, what, why.
ALLOWED = [
    (r"tests/test_words\.py", r".*", "the list itself"),
    (r".*", r"plt\.figure|Figure\b|figure\.(png|pdf)|\bfigure: matplotlib", "matplotlib's class and module"),
    (r".*", r"\bcancellation", "its American spelling"),
    (r".*\.py", r"\b(un)?labelled", "an attribute of image sources"),
    (r"tests/.*", r"<figure|figure\[|\.figures figure|kid_whole", "HTML; a key of the golden data"),
    (r".*", r"\b(otherwise|likewise|precise\w*|raise\w*|noise\w*|promise\w*|exercise\w*|comprise\w*)\b", "not -ize"),
]
NAMES = re.compile(
    r"judge|anew|\bwhole|_whole|landmark|nomemory|revisable|relabelled|\bnoising\b|\bkick|class_wise|guidance_term|\benters\b"
    r"|(?-i:^(Noisy|Denoised|Clean|Shared|Begun|Processes)$)",
    re.IGNORECASE,
)
FOLDERS = ("calib_guidance", "tests", "benchmarks", "docs", "lightning_configs", "checkpoints", ".github")


def files():
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    found += [*ROOT.glob("*.md"), *ROOT.glob("*.yml"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    return sorted(
        path for path in found if path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".ipynb", "")
    )


def prose(path):
    """Line numbers and texts: of Python files comments and strings, of others everything."""
    text = path.read_text()
    if path.suffix != ".py":
        yield 1, text
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], token.string


def names(path):
    """Line numbers and names that a Python file defines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def found_words(path):
    """What a file should not say, a line each."""
    where = path.relative_to(ROOT).as_posix()
    allowed = [re.compile(phrase) for place, phrase, _ in ALLOWED if re.fullmatch(place, where)]
    for start, text in prose(path):
        for pattern, instead in WORDS.items():
            for match in re.finditer(pattern, text, re.IGNORECASE):
                around = text[max(0, match.start() - 15) : match.end() + 15]
                if not any(phrase.search(around) for phrase in allowed):
                    line = start + text.count("\n", 0, match.start())
                    yield f"{where}:{line}: {' '.join(match[0].split())!r}, write: {instead}"
    if path.suffix == ".py" and where != "tests/test_words.py":
        for line, name in names(path):
            spelled = name.replace("_", " ") if len(name.split("_")) > 2 else ""  # the name of a test is a sentence
            if NAMES.search(name) or any(re.search(pattern, spelled, re.IGNORECASE) for pattern in WORDS):
                yield f"{where}:{line}: the name {name}"


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words(path):
    assert not list(found_words(path))


@pytest.mark.parametrize(
    "text", ["These figures rise.", "the whole run", "normalised colour", "is no device", "of which", "class-wise"]
)
def test_the_list_finds(text, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_words.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(text)
    assert list(found_words(page))


@pytest.mark.parametrize("text", ["Figure 7 of [1]", "there is no file", "otherwise, the noise rises", "sd-vae-ft-ema"])
def test_the_list_leaves(text, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_words.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(text)
    assert not list(found_words(page))
