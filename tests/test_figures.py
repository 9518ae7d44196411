"""The style of the pictures: readable on a phone and in both modes, one name one colour, a slider without a library.

Contrast is that of WCAG 2.1: (L1 + 0.05) / (L2 + 0.05) of relative luminances. The dark mode's filter is taken from
the book's style sheet and computed by the matrices of the Filter Effects specification, on sRGB values, clamped.
"""

import base64
import gzip
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from tiltlib import figures
from tiltlib.files import ROOT

DARK_PAGE = "#121212"  # the theme's background in dark mode; the browser test reads it off the page
PHONE = 350  # px: the column of text on a phone


def luminance(colour) -> float:
    channels = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], channels))


def contrast(one, other) -> float:
    dim, bright = sorted([luminance(one), luminance(other)])
    return (bright + 0.05) / (dim + 0.05)


def hue_rotate(degrees: float) -> np.ndarray:
    """The matrix of feColorMatrix type hueRotate."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    grey = np.tile([0.213, 0.715, 0.072], (3, 1))
    by_sin = [[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]]
    return grey + cos * (np.eye(3) - grey) + sin * np.array(by_sin)


def dark(colour) -> tuple:
    """A colour of a picture as the dark mode shows it."""
    style = (ROOT / "book" / "_static" / "tilt.css").read_text()
    filters = re.findall(r"filter: invert\(([\d.]+)\) hue-rotate\(([\d.]+)deg\)", style)
    assert len(filters) == 1, "the style sheet has one filter for dark pictures"
    amount, degrees = map(float, filters[0])
    inverted = np.array(to_rgb(colour)) * (1 - 2 * amount) + amount
    return tuple(np.clip(hue_rotate(degrees) @ inverted, 0, 1))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_the_measures_of_contrast_are_right():
    assert contrast("black", "white") == pytest.approx(21)
    assert contrast("#767676", "white") == pytest.approx(4.54, abs=0.01)  # the well-known lightest grey of level AA
    np.testing.assert_allclose(hue_rotate(0), np.eye(3), atol=1e-12)
    np.testing.assert_allclose(hue_rotate(180) @ hue_rotate(180), np.eye(3), atol=2e-3)  # coefficients of 3 digits
    np.testing.assert_allclose(hue_rotate(77) @ np.ones(3), np.ones(3), atol=2e-3)  # grey stays grey
    assert luminance(dark("white")) < 0.02 and luminance(dark("black")) > 0.7


@pytest.mark.parametrize("name", figures.METHODS)
def test_every_colour_stands_out_from_its_paper_in_both_modes(name):
    colour = figures.colour(name)
    assert contrast(colour, "white") >= 3
    assert contrast(dark(colour), dark("white")) >= 3
    assert contrast(dark(colour), DARK_PAGE) >= 3


def drawn():
    """A figure with everything that carries text: titles, labels, ticks, a legend, an annotation."""
    fig, panels = figures.axes(2, 2, sharex=True, height=6)
    for ax in panels.ravel():
        x = np.arange(1.0, 40)
        figures.line(ax, x, 1 / x, "soft_best_of_n", low=0.5 / x, high=2 / x)
        figures.slope(ax, x, 2.0, -1, "1/N")
        ax.set(xscale="log", yscale="log", xlabel="N (count)", ylabel="nats", title="panel")
        ax.legend()
    fig.suptitle("all")
    fig.canvas.draw()
    return fig


def test_all_text_is_dark_on_white_and_large_enough_on_a_phone():
    fig = drawn()
    texts = [text for text in fig.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert len(texts) > 30
    assert fig.get_figwidth() == figures.WIDTH
    for text in texts:
        size = text.get_fontsize() / 72 / figures.WIDTH * PHONE
        assert size >= 9, f"{text.get_text()!r} is {size:.1f} px high on a phone"
        assert contrast(text.get_color(), "white") >= 4.5
        assert contrast(dark(text.get_color()), dark("white")) >= 4.5
        assert contrast(dark(text.get_color()), DARK_PAGE) >= 4.5
    assert to_rgb(fig.get_facecolor()) == to_rgb("white")
    assert all(to_rgb(ax.get_facecolor()) == to_rgb("white") for ax in fig.axes)


def test_the_width_cannot_be_changed():
    with pytest.raises(ValueError, match="height="):
        figures.axes(figsize=(12, 4))
    assert figures.axes(3)[0].get_figheight() == pytest.approx(3 * 3.4)
    assert figures.axes(height=2.5)[0].get_figheight() == 2.5


@pytest.mark.parametrize("ask", [figures.colour, figures.label])
def test_an_unknown_name_is_answered_with_the_known_ones(ask):
    with pytest.raises(KeyError) as error:
        ask("best_of_m")
    assert "best_of_m" in str(error.value)
    assert all(name in str(error.value) for name in figures.METHODS)


def test_every_name_has_a_colour_and_a_label():
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) and label for colour, label in figures.METHODS.values())
    assert figures.colour("soft_best_of_n") != figures.colour("hard_best_of_n")


def test_a_line_has_its_colour_its_label_and_its_band():
    _, ax = figures.axes()
    x, y = np.arange(4.0), np.array([1.0, 3.0, 2.0, 5.0])
    drawn = figures.line(ax, x, y, "richardson", low=y - 1, high=y + 0.5)
    np.testing.assert_array_equal(drawn.get_xydata(), np.column_stack([x, y]))
    assert drawn.get_color() == figures.colour("richardson") and drawn.get_label() == figures.label("richardson")
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].min() == 0.0 and corners[:, 1].max() == 5.5
    assert figures.line(ax, x, y, "reward", label="own", color="#123456").get_label() == "own"
    assert len(ax.collections) == 1
    figures.line(ax, x, y, "reward", low=np.zeros(4))
    lower = ax.collections[1].get_paths()[0].vertices
    assert lower[:, 1].min() == 0 and lower[:, 1].max() == 5.0


def test_a_reference_slope_is_a_power_law_through_its_first_point():
    _, ax = figures.axes()
    figures.slope(ax, [2, 4, 8], 12.0, -2, "rate")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [12, 3, 0.75])
    assert ax.texts[0].get_text() == "rate"


# ---- the slider ----------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Elements with their attributes, and the text of the scripts."""

    def __init__(self, text):
        super().__init__()
        self.found, self.script = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script":
            self.script.append(data)


def slider(values=(1, 2.5, "all"), label="beta (nats)", alt="a line that rises"):
    frames = []
    for k in range(len(values)):
        fig, ax = figures.axes()
        figures.line(ax, np.arange(5), np.arange(5) * k, "tilted")
        frames.append(fig)
    return figures.slider(frames, list(values), label, alt).data


def literal(script: str, name: str):
    """The JSON literal that a script assigns to a name."""
    return json.JSONDecoder().raw_decode(script, script.index(f"{name} = ") + len(name) + 3)[0]


def unpacked(script: str) -> list[str]:
    """The SVG of each frame."""
    return [gzip.decompress(base64.b64decode(text)).decode() for text in literal(script, "packed")]


def test_the_slider_holds_as_many_frames_as_values_and_starts_in_the_middle():
    page = Elements(slider())
    assert {"img", "label", "output", "input", "script"} <= {tag for tag, _ in page.found}
    by_tag, script = dict(page.found), "".join(page.script)
    frames, values, alts = unpacked(script), literal(script, "values"), literal(script, "alts")
    assert len(frames) == len(set(frames)) == 3 and values == ["1", "2.5", "all"]
    assert by_tag["input"]["max"] == "2" and by_tag["input"]["value"] == "1" and by_tag["input"]["type"] == "range"
    assert base64.b64decode(by_tag["img"]["src"].split(",", 1)[1]).decode() == frames[1]
    assert by_tag["img"]["alt"] == alts[1] == "a line that rises; beta (nats) = 2.5"
    assert by_tag["div"]["id"] in script
    assert len(slider(range(1, 21))) < 200_000  # twenty frames fit easily into a notebook


def test_the_slider_needs_nothing_from_anywhere():
    text = slider()
    page = Elements(text)
    links = [v for _, attributes in page.found for k, v in attributes.items() if k in ("src", "href", "data", "action")]
    assert len(links) == 1 and links[0].startswith("data:image/svg+xml;base64,")
    assert "http:" not in text and "https:" not in text and "url(" not in text and "import" not in "".join(page.script)
    for svg in unpacked("".join(page.script)):
        tree = ElementTree.fromstring(svg)
        assert tree.tag.endswith("svg") and float(tree.get("width").removesuffix("pt")) == 72 * figures.WIDTH
        references = re.findall(r'href="([^"]*)"', svg) + re.findall(r"url\(([^)]*)\)", svg)
        assert all(reference.startswith("#") for reference in references)
        assert not re.search(r"@import|@font-face|file:|/(work|home|root|tmp|usr)/", svg)


def test_the_slider_is_the_same_each_time_and_closes_its_figures():
    assert slider() == slider()
    assert plt.get_fignums() == []


def test_text_cannot_break_out_of_the_slider():
    text = slider(values=("a</script><b>", "<i>"), label='"<u>"', alt='"><script>alert(1)</script>')
    tags = [tag for tag, _ in Elements(text).found]
    assert tags.count("script") == 1 and text.count("</script>") == 1
    assert not {"b", "i", "u"} & set(tags)
    assert literal("".join(Elements(text).script), "values") == ["a</script><b>", "<i>"]


@pytest.mark.parametrize(("frames", "values"), [(0, []), (2, [1]), (1, [1, 2])])
def test_as_many_values_as_frames(frames, values):
    with pytest.raises(ValueError, match="as many values as frames"):
        figures.slider([figures.axes()[0] for _ in range(frames)], values, "beta", "nothing")
