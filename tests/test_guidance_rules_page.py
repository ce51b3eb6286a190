"""The script of docs/guidance_rules.md, on few samples and steps."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from calib_guidance.denoisers import Combination, TwoNegatives
from calib_guidance.samplers import DDIM, DDPM
from tests.conftest import ROOT
from tests.docs_scripts import docs_script
from tests.sketches import in_few_dots


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    return docs_script("guidance_rules")


def test_every_row_of_the_page_is_one_of_the_script(page):
    """And every setting is a row, in the same order."""
    text = (ROOT / "docs/guidance_rules.md").read_text()
    table = text.partition("<!-- guidance_rules -->")[2].partition("<!-- /guidance_rules -->")[0]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table.splitlines() if line.startswith("|")]
    settings = [(s.name, "–" if s.weight is None else f"{s.weight:g}") for s in page.settings()]
    assert rows[2:] == [("none", "1"), *settings]


def test_the_script_measures_and_draws(page, tmp_path, monkeypatch):
    chosen = [s for s in page.settings() if s.weight == 2 and s.name.startswith(("classifier-free", "half"))]
    assert any(isinstance(s.negative, TwoNegatives) for s in chosen)
    chosen += [s for s in page.settings() if s.name == "CFG++, λ = 0.05"]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", in_few_dots)
    monkeypatch.setattr(page, "settings", lambda: chosen)
    monkeypatch.setattr(page, "SAMPLERS", (DDIM("20"), DDPM("20")))
    (tmp_path / "images").mkdir()
    (tmp_path / "guidance_rules.md").write_text("<!-- guidance_rules -->\n<!-- /guidance_rules -->\n")
    page.main([f"--output={tmp_path}", "-n=300"])
    lines = (tmp_path / "guidance_rules.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]
    rows = {name: found for name, *found in cells}
    assert rows.keys() == {"none", *(s.name for s in chosen)}
    assert float(rows["none"][1]) < 0.05 < float(rows["classifier-free"][1])  # w = 1 samples p(x | y), w = 2 does not
    assert rows["CFG++, λ = 0.05"][5:] == ["–"] * 4  # DDPM cannot renoise with another prediction
    with Image.open(tmp_path / "images/guidance_rules.png") as plot:
        assert np.asarray(plot.convert("L")).std() > 5  # something is drawn


def test_the_tempered_density_is_the_posterior_to_the_power_of_the_weight(page):
    """At w = 1 the density of the class; at w = 2 p(x | y)²/p(x), normalized."""
    joint = page.CONDITIONAL.log_joint(page.page.grid())
    own, marginal = joint[:, page.Y].softmax(0), joint.logsumexp(1).softmax(0)
    torch.testing.assert_close(page.tempered(1.0), own)
    torch.testing.assert_close(page.tempered(2.0), (own**2 / marginal) / (own**2 / marginal).sum())
    assert isinstance(page.settings()[0].denoiser(), Combination)
