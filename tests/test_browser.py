"""Headless Chromium opens every page of the served book: no error, no other host, formulas, pictures, phone, dark mode.

One browser for all pages; a page is loaded once, measured in each mode, and the tests look at what was measured.
"""

import functools
import http.server
import io
import json
import re
import shutil
import tempfile
import threading
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests import rendered
from tests.test_figures import DARK_PAGE, contrast
from tiltlib import figures

page = pytest.mark.parametrize("page", rendered.pages())
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run --disable-quic --hide-scrollbars --disable-dev-shm-usage "
    # a request to any other host fails, and so leaves an error
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
)
PHONE, DESKTOP = 390, 1280

# In the page: what is to be seen. Text is measured against the nearest background that is not transparent.
MEASURE = """
const done = arguments[arguments.length - 1];
const article = document.querySelector("article");
const visible = (x) => x.checkVisibility({visibilityProperty: true, opacityProperty: true});
const rgba = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const over = (top, under) => {
  const a = top.length > 3 ? top[3] : 1;
  return [0, 1, 2].map((k) => a * top[k] + (1 - a) * under[k]);
};
const paper = (x) => {
  const stack = [];
  for (; x; x = x.parentElement) stack.push(rgba(getComputedStyle(x).backgroundColor));
  return stack.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
};
const texts = {};
const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const x = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !visible(x) || x.closest("mjx-container, script, style, svg")) continue;
  const under = paper(x), ink = over(rgba(getComputedStyle(x).color), under);
  texts[JSON.stringify([ink.map(Math.round), under.map(Math.round)])] = walker.currentNode.data.trim().slice(0, 60);
}
const pictures = [...article.querySelectorAll("img")].filter(visible).map((x) => ({
  natural: x.naturalWidth, width: x.getBoundingClientRect().width, source: x.src.slice(0, 80),
  svg: x.src.startsWith("data:image/svg") || x.src.startsWith("blob:"),
}));
const scrolls = (x) =>
  x && x !== document.body && (getComputedStyle(x).overflowX !== "visible" || scrolls(x.parentElement));
const beyond = (x) =>
  x.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && visible(x) && !scrolls(x.parentElement);
const wide = [...document.querySelectorAll("body *")].filter(beyond).slice(0, 5).map((x) => x.outerHTML.slice(0, 120));
done({
  math: article.querySelectorAll(".math").length,
  rendered: article.querySelectorAll("mjx-container").length,
  wrong: [...article.querySelectorAll("mjx-merror")].map((x) => x.textContent),
  text: article.innerText,
  scroll: document.documentElement.scrollWidth, wide: wide,
  background: getComputedStyle(document.body).backgroundColor,
  texts: texts, pictures: pictures,
});
"""
READY = """
const done = arguments[0];
Promise.all([
  new Promise((ok) => document.readyState === "complete" ? ok() : addEventListener("load", ok)),
  document.querySelector("article .math") && window.MathJax && MathJax.startup ? MathJax.startup.promise : null,
  document.fonts.ready,
]).then(() => done(true));
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def address(html):
    """The book, served on this machine."""
    handler = functools.partial(Quiet, directory=html)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser(address):
    programs = [shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")]
    if not all(programs):
        pytest.skip("no chromium with chromedriver on this machine (Debian: apt install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in FLAGS.split(" --"):
        options.add_argument("--" + flag.removeprefix("--"))
    profile = tempfile.mkdtemp()
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.set_script_timeout(30)
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()
    shutil.rmtree(profile, ignore_errors=True)


def look(browser, width: int, mode: str) -> dict:
    """What is to be seen at a width in CSS pixels and in light or dark mode."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_script(
        "for (const a of ['theme', 'mode']) document.documentElement.dataset[a] = arguments[0]", mode
    )
    still = "document.head.insertAdjacentHTML('beforeend', '<style>* {transition: none !important}</style>')"
    browser.execute_script(still)
    return browser.execute_async_script(MEASURE)


def requested(browser) -> list[str]:
    """The addresses that were asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="session")
def visit(browser, address):
    """page -> what was measured on it, each page being loaded once."""

    @functools.cache
    def go(page):
        browser.get_log("browser"), requested(browser)
        browser.get(f"{address}/{page}.html")
        assert browser.execute_async_script(READY)
        seen = {"wide": look(browser, DESKTOP, "light"), "phone": look(browser, PHONE, "light")}
        seen["dark"] = look(browser, DESKTOP, "dark")
        shots = browser.find_elements("css selector", ".cell_output img")
        seen["dark picture"] = next((shot.screenshot_as_png for shot in shots if shot.is_displayed()), None)
        seen |= {"console": browser.get_log("browser"), "requests": requested(browser)}
        return seen

    return go


@page
def test_it_opens_without_an_error_and_asks_no_other_host(visit, address, page):
    seen = visit(page)
    assert not [entry["message"] for entry in seen["console"] if entry["level"] in ("SEVERE", "WARNING")]
    hosts = {urlsplit(url).netloc for url in seen["requests"] if re.match("(https?|wss?|ftp):", url)}
    assert hosts == {urlsplit(address).netloc}


@page
def test_its_formulas_are_rendered(visit, page):
    seen = visit(page)["wide"]
    assert seen["rendered"] >= seen["math"] and not seen["wrong"]
    assert not [raw for raw in ("\\(", "\\[", "$$", "\\begin{") if raw in seen["text"].split("```")[0]]
    has_math = any("$" in text for kind, text in rendered.cells(page) if kind == "markdown")
    assert not has_math or seen["rendered"] > 0


@page
def test_its_pictures_are_seen_and_their_text_can_be_read_on_a_phone(visit, page):
    seen = visit(page)
    for mode in ("wide", "phone", "dark"):
        pictures = seen[mode]["pictures"]
        assert all(p["natural"] > 0 and p["width"] > 100 for p in pictures), pictures
    for picture in seen["phone"]["pictures"]:
        inches = figures.WIDTH if picture["svg"] else picture["natural"] / 160
        text = figures.POINTS / 72 * picture["width"] / inches
        assert text >= 9, f"text of {text:.1f} px in {picture}"
    if (rendered.HOME / f"{page}.ipynb").exists():
        assert seen["wide"]["pictures"]


@page
def test_it_does_not_scroll_sideways(visit, page):
    for mode, width in (("phone", PHONE), ("wide", DESKTOP)):
        seen = visit(page)[mode]
        assert seen["scroll"] <= width, seen["wide"]


@page
@pytest.mark.parametrize("mode", ["wide", "dark"])
def test_its_text_stands_out(visit, page, mode):
    faint = {}
    for pair, text in visit(page)[mode]["texts"].items():
        ink, paper = ([channel / 255 for channel in colour] for colour in json.loads(pair))
        if contrast(ink, paper) < 4.5:
            faint[text] = f"{contrast(ink, paper):.1f} {pair}"
    assert not faint


@page
def test_in_dark_mode_its_page_and_its_first_picture_are_dark(visit, page):
    seen = visit(page)
    background = [int(c) / 255 for c in seen["dark"]["background"].removeprefix("rgb(").rstrip(")").split(", ")]
    assert contrast(background, DARK_PAGE) < 1.02
    if seen["dark picture"]:
        image = Image.open(io.BytesIO(seen["dark picture"])).convert("RGB")
        counted = sorted(image.getcolors(image.width * image.height), reverse=True)
        paper = [channel / 255 for channel in counted[0][1]]
        assert contrast(paper, DARK_PAGE) < 1.2, "the paper of a picture is dark"
        ink = sum(n for n, colour in counted if contrast([channel / 255 for channel in colour], paper) >= 4.5)
        assert ink > 0.002 * image.width * image.height, "and its text is light"


def test_the_slider_shows_another_frame(browser, visit, address):
    sliders = [
        p for p in rendered.pages() if any("slider(" in text for kind, text in rendered.cells(p) if kind == "code")
    ]
    if not sliders:
        pytest.skip("no chapter has a slider")
    state = """
        const box = document.querySelector(".tilt-slider"), image = box.querySelector("img");
        return [image.src, image.alt, box.querySelector("output").textContent, box.querySelector("input").max,
                image.complete && image.naturalWidth > 0 && image.getBoundingClientRect().width > 100]"""
    for name in sliders:
        browser.get(f"{address}/{name}.html")
        browser.get_log("browser")
        before = browser.execute_script(state)
        for value in ("0", before[3]):
            moved = """
                const done = arguments[1], box = document.querySelector(".tilt-slider");
                const image = box.querySelector("img"), input = box.querySelector("input"), old = image.src;
                input.value = arguments[0];
                input.dispatchEvent(new Event("input"));
                const check = () => image.src !== old && image.complete ? done(true) : setTimeout(check, 20);
                check();"""
            assert browser.execute_async_script(moved, value)
            after = browser.execute_script(state)
            assert after[4] and all(old != new for old, new in zip(before[:3], after[:3], strict=True))
            before = after
        assert not [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]


@pytest.mark.parametrize(("query", "found"), [("tilted law", True), ("zyxwvut", False)])
def test_search_finds_what_there_is(browser, address, query, found):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{address}/search.html?q={query.replace(' ', '+')}")
    browser.get_log("browser")
    summary = "return (document.querySelector('#search-results .search-summary') || {}).innerText || ''"
    WebDriverWait(browser, 20).until(
        lambda b: (
            "earch" in b.execute_script(summary)
            and "..." not in b.execute_script("return document.querySelector('#search-results h2').innerText")
        )
    )
    results = browser.find_elements("css selector", "#search-results ul.search li")
    assert bool(results) == found
    if found:
        assert all(result.find_elements("tag name", "a") for result in results)
        WebDriverWait(browser, 10).until(lambda b: b.find_elements("css selector", "#search-results p.context"))
    assert not [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
