"""``calib-guidance app --config FILE``: a page in the browser on which guidance is tried out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec

from calib_guidance.errors import ConfigurationError

__all__ = ["app"]


def app(argv: Sequence[str]) -> None:
    """Serve the page of a configuration until it is stopped. ``argv`` is that of ``predict``, with ``--host`` and ``--port``."""
    parser = argparse.ArgumentParser(
        prog="calib-guidance app",
        description="A page in the browser: the same noise unguided and guided side by side, with score, scale, temperature, "
        "smoothing, sampler, steps and seed to choose. Takes the options of predict as well. Nothing is written.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", required=True, help="YAML file or name; several are merged")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, help="port to serve at (the first free one from 7860)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    options, rest = parser.parse_known_args(list(argv))
    if find_spec("gradio") is None:
        raise ConfigurationError("the app needs gradio: pip install 'calib-guidance[app]'")
    # After what can be refused at once: importing torch and gradio takes seconds.
    from calib_guidance.app.page import serve
    from calib_guidance.app.session import open_session

    configs = [word for value in options.config for word in ("--config", value)]
    serve(open_session([*configs, *rest]), options.host, options.port, options.open)
