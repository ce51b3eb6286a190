"""What docs/overconfidence.md says, on a few runs: calibration falls into place, and the guidance gradient with it."""

import math
import re

import pytest
import torch

from calib_guidance.training import binned_smooth_ece, smooth_ece
from tests.conftest import ROOT
from tests.docs_scripts import docs_script


@pytest.fixture(scope="module")
def page():
    return docs_script("overconfidence")


@pytest.fixture(scope="module")
def exact(page):
    mixture = page.two_classes()
    return page.measure(page.GaussianMixtureClassifier(mixture), mixture, 80)


@pytest.fixture(scope="module")
def runs(page):
    return {(seed, 900): page.run(seed, 900, n=80) for seed in (0, 1)}


def test_the_exact_posterior_is_calibrated_and_its_norms_are_those_of_its_formula(page, exact):
    assert exact.ece < 0.01
    mixture = page.two_classes()
    centre = (mixture.log_weights.exp()[:, None] * mixture.means).sum(0)  # x̂0 of pure noise
    p = mixture.log_joint(centre[None, :, None, None]).softmax(1)[0]
    for y in (page.LIKELY, page.OTHER):  # (1 − p)·‖μ1 − μ0‖ at unit variance
        assert float(exact.norms[y, 0]) == pytest.approx(2 * (1 - float(p[y])), rel=0.05)


def test_ece_falls_and_early_norms_go_to_the_exact_ones(page, exact, runs):
    """To the class that the classifier is sure of the norm rises, to the other it falls."""
    for run in runs.values():
        before = run[page.START, 0]
        assert before.ece > 0.12
        for objective in page.OBJECTIVES:
            after = run[objective.name, page.BUDGETS[-1]]
            assert after.ece < before.ece / 4
            was, now, right = (
                [page.early(m.norms[y]) for y in (page.LIKELY, page.OTHER)] for m in (before, after, exact)
            )
            assert now[page.LIKELY] > 1.3 * was[page.LIKELY]
            assert now[page.OTHER] < was[page.OTHER] / 2
            for y in (page.LIKELY, page.OTHER):
                assert abs(math.log(now[y] / right[y])) < abs(math.log(was[y] / right[y]))


def test_per_sample_with_small_beta_ends_above_cross_entropy(page, runs):
    plain, sharp = (objective.name for objective in page.OBJECTIVES[:2])
    assert all(run[sharp, page.BUDGETS[-1]].ece > run[plain, page.BUDGETS[-1]].ece + 0.005 for run in runs.values())


@pytest.mark.parametrize(("loss", "n"), [(smooth_ece, 1), (binned_smooth_ece, 1), (binned_smooth_ece, 5)])
def test_confidence_of_least_loss_is_that_of_the_loss(page, loss, n):
    """The mean of the loss over all ways in which n predictions can be right, by their chances, is least there."""
    q, beta = 0.7, 0.01

    def expected(p):
        logits = torch.tensor([math.log(p / (1 - p)), 0.0], dtype=torch.float64).expand(n, 2)
        values = [float(loss(logits, (torch.arange(n) >= right).long(), beta)) for right in range(n + 1)]
        return sum(math.comb(n, k) * q**k * (1 - q) ** (n - k) * v for k, v in enumerate(values))

    found = float(page.least_loss(torch.tensor([q]), beta, n)[0])
    assert expected(found) < min(expected(found - 2e-3), expected(found + 2e-3))


def test_page_and_plots_are_written(page, exact, runs, tmp_path):
    text = page.report(runs, exact, page.two_classes())
    page.draw_plot(runs, exact, tmp_path / "overconfidence.png")
    page.draw_minimizers(tmp_path / "overconfidence_beta.png")
    assert set(re.findall(r"images/(\w+\.png)", text)) == {path.name for path in tmp_path.iterdir()}
    assert "nan" not in text
    assert (ROOT / "docs" / "overconfidence.md").read_text().splitlines()[0] == text.splitlines()[0]
    assert "{" not in text
