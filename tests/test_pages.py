"""The rendered pages: all there, nothing broken, every link and picture resolves, nothing from another host."""

import re
from functools import cache
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup, Comment

from tests import rendered

page = pytest.mark.parametrize("page", rendered.pages())
OWN = {"index", "genindex", "search", "prf-prf"}  # made by Sphinx, beside the pages of the table of contents


@cache
def soup(path):
    return BeautifulSoup(path.read_text(), "html.parser")


def article(html, page):
    found = soup(html / f"{page}.html").select("article")
    assert len(found) == 1
    return found[0]


def plain(text):
    """Words only: what is left of a heading when its markup is gone."""
    return re.findall(r"[A-Za-z]{2,}", re.sub(r"\$[^$]*\$|\{[a-z:]+\}`[^`]*`|\\[()][^\\]*\\[()]", " ", text))


def prose(element):
    """The visible text outside code and formulas."""
    copy = BeautifulSoup(str(element), "html.parser")
    for inner in copy.select("pre, code, script, style, .math"):
        inner.decompose()
    return copy.get_text(" ")


def test_there_are_as_many_pages_as_the_table_of_contents_lists(html):
    found = {path.relative_to(html).with_suffix("").as_posix() for path in html.rglob("*.html")}
    found = {name for name in found if not name.startswith("_static/")}
    assert found - OWN == set(rendered.pages())


@page
def test_it_shows_its_title_and_its_headings(html, page):
    sources = [re.sub(r"```.*?```", "", text, flags=re.S) for kind, text in rendered.cells(page) if kind == "markdown"]
    wanted = [plain(line) for text in sources for line in re.findall(r"^#{1,3} (.*)", text, re.M)]
    shown = [plain(heading.get_text(" ").replace("#", "")) for heading in article(html, page).select("h1, h2, h3")]
    assert wanted and shown[0] == wanted[0]
    assert not [heading for heading in wanted if heading not in shown]


@page
def test_nothing_on_it_is_broken(html, page):
    found = article(html, page)
    assert not found.select(".problematic, .system-message, .error")
    assert not [x for x in found.select(".xref") if not x.find_parent("a")], "unresolved references"
    text = prose(found)
    assert not re.search(r"\{(cite|ref|eq|numref|doc|prf|download|math|code)[:a-z]*\}|\[\?\]|\?\?|%s", text)
    assert not re.search(r"^\s*(:::|```)", text, re.M), "a directive was not closed or not known"
    comments = found.find_all(string=lambda text: isinstance(text, Comment))
    assert not [comment for comment in comments if "tilt:" in comment]
    assert "<!-- tilt:" not in found.get_text()


@page
def test_its_links_anchors_and_pictures_resolve(html, page):
    path = html / f"{page}.html"
    broken = []
    for element in soup(path).select("[href], [src]"):
        address = element.get("href", element.get("src"))
        parts = urlsplit(address)
        if parts.scheme or address.startswith("//"):
            continue  # elsewhere: the next test
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
        if not target.is_file() or html.resolve() not in target.parents:
            broken.append(address)
        elif parts.fragment and target.suffix == ".html":
            anchors = {x.get("id") or x.get("name") for x in soup(target).select("[id], a[name]")}
            if unquote(parts.fragment) not in anchors:
                broken.append(address)
    assert not broken


@page
def test_it_loads_nothing_from_another_host(html, page):
    loads = soup(html / f"{page}.html").select("[src], link[href], [srcset], object[data], use")
    addresses = {
        x.get("src") or x.get("srcset") or x.get("data") or x.get("href") or ""
        for x in loads
        if x.name != "link" or set(x.get("rel", [])) - {"canonical", "search", "next", "prev", "license", "author"}
    }
    assert not [a for a in addresses if re.match(r"(?:[a-z]+:)?//", a)]
    inline = " ".join(style.get_text() for style in soup(html / f"{page}.html").select("style"))
    assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", inline)


def test_no_style_sheet_loads_from_another_host(html):
    sheets = list(html.rglob("*.css"))
    assert sheets
    far = re.compile(r"(url\(|@import)\s*['\"]?(https?:)?//")
    assert not [sheet.name for sheet in sheets if far.search(sheet.read_text())]


@page
def test_its_pictures_are_described_as_in_the_source(html, page):
    pictures = article(html, page).select("img")
    assert all((picture.get("alt") or "").strip() for picture in pictures)
    assert not [p["alt"] for p in pictures if re.search(r"\.(png|svg)$|^_images", p["alt"])]
    if (rendered.HOME / f"{page}.ipynb").exists():
        assert pictures
        assert len(article(html, page).select(".cell_output")) > 2


def sources():
    return yaml.safe_load((rendered.HOME / "book" / "statements.yml").read_text())


def test_the_ledger_lists_every_statement_and_where_it_is_checked(html):
    rows = {}
    for row in article(html, "book/ledger").select("tbody tr"):
        columns = [cell.get_text(" ").strip() for cell in row.select("td")]
        rows.setdefault(columns[0], []).append((columns, [a["href"] for a in row.select("a")]))
    assert set(rows) == {f"{key}:{id}" for key, source in sources().items() for id in source["ids"]}
    checked = {id for id, made in rows.items() if made[0][1]}
    assert checked
    entries = {f"{key}:{id}": entry for key, source in sources().items() for id, entry in source["ids"].items()}
    for id in set(rows) - checked:
        assert plain(rows[id][0][0][2]) == plain(entries[id].get("reason", "not yet"))
    for id in checked:
        for columns, links in rows[id]:
            assert links and columns[5].startswith("rejected:") and "/" in columns[4]
    assert all(len(made) == 1 and made[0][0][3:] == [""] * 3 for id, made in rows.items() if id not in checked)


def test_the_errata_show_both_sides_of_each(html):
    text = article(html, "book/errata").get_text(" ")
    wrong = [id for source in sources().values() for id, entry in source["ids"].items() if "printed" in entry]
    assert wrong and text.count("Printed.") == text.count("Should be.") == len(wrong)
    headings = [h.get_text() for h in article(html, "book/errata").select("h3")]
    assert [h.split(":")[0] for h in headings] == wrong


def test_the_status_page_has_a_row_for_each_chapter(html):
    rows = article(html, "book/status").select("table")[0].select("tbody tr")
    chapters = [p.split("/")[-1] for p in rendered.pages() if (rendered.HOME / f"{p}.ipynb").exists()]
    columns = [[cell.get_text().strip() for cell in row.select("td")] for row in rows]
    assert [c[0] for c in columns] == chapters
    assert all(int(c[1]) > 0 and re.fullmatch(r"\d{4}-\d\d-\d\d", c[2]) and float(c[3]) > 0 for c in columns)
