"""One style for every picture of the book: paper, text, and one colour per method.

Pictures are drawn on white paper, so they read anywhere a notebook is opened; in the dark mode of the rendered book a
style sheet turns lightness around and keeps the hue. Text is 12 pt on 6.4 inches, which is 9 px on a phone.
"""

import base64
import gzip
import hashlib
import html
import io
import json

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

WIDTH = 6.4  # inches; the width of the text column
POINTS = 12  # with WIDTH: at least 9 px where the column is 350 px wide
INK = "#222222"

# name -> (colour, label). One entry per method or role, the same in every chapter. Every colour has a contrast of at
# least 3:1 on white (WCAG, graphical objects); tests hold that, also after the dark mode's inversion.
METHODS = {
    "reference": ("#6b6b6b", "reference"),
    "base": ("#6b6b6b", "base model"),
    "reward": ("#b8860b", "reward"),
    "tilted": ("#111111", "tilted law"),
    "soft_best_of_n": ("#0072b2", "soft best-of-N"),
    "hard_best_of_n": ("#c44601", "best-of-N"),
    "iterated_best_of_n": ("#00805c", "iterated best-of-N"),
    "richardson": ("#9350a8", "Richardson"),
    "rhee_glynn": ("#b5427f", "Rhee-Glynn"),
    "rejection": ("#8c5a2b", "rejection sampling"),
    "rl_free": ("#2a7f9e", "weighted likelihood"),
    "supervised": ("#7a7a29", "supervised"),
    "reinforce": ("#cc3344", "REINFORCE + KL"),
    "dpo": ("#6a51a3", "DPO"),
    "power": ("#00805c", "power of the sequence law"),
    "temperature": ("#c44601", "token temperature"),
    "rlhf": ("#0072b2", "RLHF"),
    "rlif": ("#00805c", "RLIF"),
    "forward_kl": ("#0072b2", "forward KL"),
    "reverse_kl": ("#cc3344", "reverse KL"),
    "bound": ("#6b6b6b", "bound"),
    "expansion": ("#cc3344", "expansion"),
    "gold": ("#8a6d00", "gold reward"),
    "proxy": ("#6a51a3", "proxy reward"),
    "wrong": ("#cc3344", "wrong on purpose"),
    # guided samplers, and what a state is worth
    "guided_ode": ("#00805c", "guided ODE"),
    "guided_sde": ("#9350a8", "guided SDE"),
    "soft_value": ("#111111", "soft value"),
    "hard_value": ("#b5561d", "hard value"),
    "posterior_mean": ("#2f6fb0", "posterior mean"),
    "learned_value": ("#7a4fa0", "learned value"),
    "soft_bellman": ("#1e7d4f", "soft Bellman"),
    # ways through the noise of a flow model
    "flow_ode": ("#5f6b1c", "flow ODE"),
    "linear_sde": ("#0b6fa4", "linear SDE"),
    "vp_sde": ("#a3348f", "VP SDE"),
    "vp_even": ("#a8443a", "VP SDE, even steps"),
    "memoryless": ("#b35900", "memoryless SDE"),
    # rows of the particle loop, and the searches beside it
    "importance": ("#0072b2", "importance weights"),
    "svdd": ("#4c7d0c", "SVDD"),
    "svdd_greedy": ("#8f6d00", "SVDD, greedy"),
    "smc": ("#7b3fb5", "SMC"),
    "fk_max": ("#6b6b1e", "FK, max"),
    "fk_sum": ("#96587a", "FK, sum"),
    "nested": ("#4059ad", "nested SMC"),
    "beam": ("#b3435c", "beam"),
    "tds": ("#c2257a", "TDS"),
    "das": ("#007d7d", "DAS"),
    "guided": ("#1f3fa8", "Gaussian value and drift"),
    "guided_quasi": ("#b02a1d", "the same, ordered, quasi-random"),
    "gradient_guidance": ("#c0392b", "gradient guidance"),
    "rescaled_gradient": ("#00756a", "gradient / prediction"),
    "classifier_guidance": ("#a8480f", "guidance, tilted start"),
    "rollover_budget": ("#1e7d4f", "rollover budget"),
    "code": ("#5b5b9a", "CoDe"),
    "tree_search": ("#7a4e2d", "tree search"),
    "refine": ("#d1480b", "refinement"),
}

_STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": 130,  # 832 pixels: as wide as the text column; a chapter stays below 1 MB
    "savefig.dpi": 130,
    "savefig.pad_inches": 0.04,  # notebooks crop to what is drawn and pad: with this back to the width, not beyond
    "figure.constrained_layout.use": True,
    "font.size": POINTS,
    "axes.titlesize": POINTS,
    "axes.labelsize": POINTS,
    "legend.fontsize": POINTS,
    "xtick.labelsize": POINTS,
    "ytick.labelsize": POINTS,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "tilt",
}


def axes(rows: int = 1, columns: int = 1, height: float | None = None, **subplots):
    """A figure of the book's width and its axes, as `plt.subplots(rows, columns)` returns them.

    height: inches; by default 3.4 a row. Further keywords (sharex, sharey, width_ratios ...) go to `plt.subplots`.
    Raises ValueError for a figsize, which would make text too small to read on a phone.
    """
    if "figsize" in subplots:
        raise ValueError("the width is fixed so that text stays readable; pass height=")
    matplotlib.rcParams.update(_STYLE)
    figure, panels = plt.subplots(rows, columns, figsize=(WIDTH, height or 3.4 * rows), **subplots)
    _small(figure)
    return figure, panels


def _small(figure):
    """Give the PNGs of a figure a palette of 256 colours: main colours stay exact, at a third of the size."""
    draw = figure.canvas.print_png

    def print_png(out, *, metadata=None, pil_kwargs=None, **known):
        full = io.BytesIO()
        draw(full, metadata=metadata, pil_kwargs=pil_kwargs)
        Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)

    figure.canvas.print_png = print_png


def colour(name: str) -> str:
    """The colour of a method or role. Raises KeyError naming the known ones."""
    return _known(name)[0]


def label(name: str) -> str:
    """The label of a method or role in legends. Raises KeyError naming the known ones."""
    return _known(name)[1]


def _known(name):
    if name not in METHODS:
        raise KeyError(f"no colour for {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def line(ax, x, y, name: str, low=None, high=None, **plot):
    """Draw y over x in the colour of `name`, with a band from low to high where given; returns the line.

    x, y, low, high: (n,). `label=None` in `plot` hides the legend entry; other keywords go to `Axes.plot`.
    """
    plot = {"color": colour(name), "label": label(name)} | plot
    (drawn,) = ax.plot(x, y, **plot)
    if low is not None or high is not None:
        low, high = y if low is None else low, y if high is None else high
        ax.fill_between(x, low, high, color=plot["color"], alpha=0.2, linewidth=0)
    return drawn


def slope(ax, x, y0: float, exponent: float, text: str) -> None:
    """A dotted line y0 (x/x[0])^exponent over x (n,), named at its right end: the rate to compare a curve with."""
    x = np.asarray(x, dtype=float)
    y = y0 * (x / x[0]) ** exponent
    ax.plot(x, y, ":", color=INK, linewidth=1.2)
    ax.annotate(text, (x[-1], y[-1]), xytext=(3, 0), textcoords="offset points", va="center")


# One colour per letter of an RNA drawing, light enough apart in grey too.
LETTERS = {"A": "#2f6fb0", "C": "#c46a00", "G": "#1e7d4f", "U": "#b5427f"}


def layout(structure: str):
    """Places (n, 2) of the letters of a secondary structure in dots and brackets: neighbours and pairs at distance one.

    Every loop is a regular polygon, two stacked pairs a square, and what lies outside all pairs a straight line; so the
    path turns at a letter by pi less the angles of the loops that it belongs to. Long stems may run across each other.
    Raises ValueError for brackets that do not match.
    """
    partner, opened = {}, []
    for k, mark in enumerate(structure):
        if mark == "(":
            opened.append(k)
        elif mark == ")" and opened:
            partner[k] = opened.pop()
            partner[partner[k]] = k
        elif mark != ".":
            raise ValueError(f"the brackets of {structure!r} do not match at letter {k}")
    if opened:
        raise ValueError(f"a bracket of {structure!r} is not closed")
    angle = np.zeros(len(structure))

    def walk(k, end):
        """Letters of one loop, from k up to end, jumping over what its pairs enclose."""
        while k < end:
            yield k
            if partner.get(k, -1) > k:
                yield partner[k]
                k = partner[k]
            k += 1

    for k in walk(0, len(structure)):
        angle[k] += np.pi
    for i, j in partner.items():
        if i < j:
            loop = [i, *walk(i + 1, j), j]
            angle[loop] += np.pi * (1 - 2 / len(loop))
    heading = np.cumsum(angle - np.pi)  # the way on from each letter
    steps = np.stack([np.cos(heading), np.sin(heading)], 1)
    return np.concatenate([np.zeros((1, 2)), np.cumsum(steps[:-1], 0)])


def molecule(ax, text: str, structure: str) -> None:
    """Draw an RNA string folded into a structure in dots and brackets: a dot per letter, a bar per pair.

    Raises ValueError where the two differ in length, or the brackets do not match.
    """
    if len(text) != len(structure):
        raise ValueError(f"{len(text)} letters do not fit a structure of {len(structure)}")
    places, opened = layout(structure), []
    centred = places - places.mean(0)
    places = centred @ np.linalg.svd(centred, full_matrices=False)[2].T[:, ::-1]  # the long side upright
    ax.plot(*places.T, color=INK, linewidth=0.8, zorder=1)
    for k, mark in enumerate(structure):
        if mark == "(":
            opened.append(k)
        elif mark == ")":
            ax.plot(*places[[opened.pop(), k]].T, color=INK, linewidth=1.6, zorder=1)
    ax.scatter(*places.T, s=16, c=[LETTERS[letter] for letter in text], zorder=2)
    ax.annotate("5'", places[0], xytext=(4, -3), textcoords="offset points")
    ax.set_aspect("equal")
    ax.axis("off")


def slider(frames, values, label: str, alt: str):
    """Figures behind a range input, as HTML that works in a static page without any library.

    frames: matplotlib figures, closed here; values: what the input shows at each frame; label: its name with units.
    Returns an IPython HTML object. Raises ValueError when frames and values differ in number or there are none.
    """
    from IPython.display import HTML

    if not frames or len(frames) != len(values):
        raise ValueError(f"as many values as frames, at least one: got {len(frames)} frames, {len(values)} values")
    drawn = [_svg(frame) for frame in frames]
    packed = [base64.b64encode(gzip.compress(svg, mtime=0)).decode() for svg in drawn]  # a tenth of the size
    shown = [value if isinstance(value, str) else f"{value:.3g}" for value in values]
    start = len(frames) // 2
    key = "tilt-" + hashlib.sha256(b"".join(drawn)).hexdigest()[:10]
    alts = [f"{alt}; {label} = {value}" for value in shown]
    return HTML(f"""<div class="tilt-slider" id="{key}">
<img src="data:image/svg+xml;base64,{base64.b64encode(drawn[start]).decode()}" alt="{html.escape(alts[start])}"
 style="width:100%">
<label>{html.escape(label)} = <output>{html.escape(shown[start])}</output>
<input type="range" min="0" max="{len(frames) - 1}" value="{start}" aria-label="{html.escape(label)}"></label>
<script>(() => {{
  const box = document.getElementById("{key}"), packed = {_script(packed)};
  const values = {_script(shown)}, alts = {_script(alts)};
  const unpack = async (text) => {{
    const bytes = new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]);
    const svg = await new Response(bytes.stream().pipeThrough(new DecompressionStream("gzip"))).blob();
    return URL.createObjectURL(new Blob([svg], {{type: "image/svg+xml"}}));
  }};
  const frames = packed.map(unpack);
  box.querySelector("input").addEventListener("input", async (event) => {{
    const at = Number(event.target.value), image = box.querySelector("img");
    image.alt = alts[at]; box.querySelector("output").textContent = values[at];
    const source = await frames[at];
    if (Number(event.target.value) === at) image.src = source;
  }});
}})();</script></div>""")


def _script(values) -> str:
    """A literal for a script element, which a text holding "</script>" would end."""
    return json.dumps(values).replace("<", "\\u003c")


def _svg(figure) -> bytes:
    with io.BytesIO() as out:
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
        return out.getvalue()
