import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image


def check_readable(figure, patch):
    """No text covers another one or leaves the page, and none is small."""
    seen = []

    def note(text, renderer):
        if text.get_visible() and text.get_text().strip():
            seen.append((text, text.get_window_extent(renderer)))

    with patch.context() as context:
        context.setattr(Text, "draw", note)  # ticks out of view are not asked to draw
        FigureCanvasAgg(figure).draw()
    assert seen
    for number, (text, box) in enumerate(seen):
        assert text.get_fontsize() >= 5, text
        assert min(box.x0, box.y0) >= -1, text
        assert max(box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1) <= 1, text
        for other, earlier in seen[:number]:
            if text.get_rotation() % 90 and other.get_rotation() % 90:
                continue  # side by side, where only their boxes meet
            assert not box.padded(-0.5).overlaps(earlier.padded(-0.5)), (text, other)


@pytest.fixture(autouse=True)
def _in_full(plots_in_full):
    pass


@pytest.fixture
def drawn(monkeypatch):
    """Calls a function that draws; gives its plot, which was written in both formats and can be read."""
    written = []
    savefig = Figure.savefig

    def keep(figure, path, **kwargs):
        written.append(figure)
        savefig(figure, path, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def call(draw, *args, **kwargs):
        written.clear()
        png, pdf = draw(*args, **kwargs)
        assert (png.suffix, pdf.suffix) == (".png", ".pdf")
        assert pdf.read_bytes().startswith(b"%PDF")
        figure = written[0]
        assert figure.get_figwidth() <= 3.3
        assert Image.open(png).width == pytest.approx(300 * figure.get_figwidth(), abs=1)
        check_readable(figure, monkeypatch)
        return figure

    return call
