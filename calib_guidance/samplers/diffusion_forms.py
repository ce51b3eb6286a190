"""How much noise the reverse SDE of a flow model adds and removes (Ma et al. 2024, arXiv 2401.08740)."""

from typing import Literal

import numpy as np

from calib_guidance.diffusion.paths import PathName, path_coefficients

DiffusionForm = Literal["sigma", "linear", "constant", "decreasing", "sbdm"]


def diffusion(form: DiffusionForm, norm: float, path: PathName, tau: np.ndarray) -> np.ndarray:
    """w at τ: ``sigma`` σ, ``linear`` τ, ``constant`` 1, ``decreasing`` (1 − cos πτ)²/4, ``sbdm`` σ·σ' − σ²·α'/α.

    ``norm`` is a factor of w, in ``decreasing`` that of the cosine. ``sbdm`` is infinite at pure noise.
    """
    c = path_coefficients(path, tau)
    with np.errstate(divide="ignore", invalid="ignore"):
        forms = {
            "sigma": norm * c.sigma,
            "linear": norm * tau,
            "constant": np.full_like(tau, norm),
            "decreasing": (1 - norm * np.cos(np.pi * tau)) ** 2 / 4,
            "sbdm": norm * (c.sigma * c.d_sigma - c.sigma**2 * c.d_alpha / c.alpha),
        }
    return forms[form]
