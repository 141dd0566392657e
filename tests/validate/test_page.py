"""The HTML report, opened in a real browser: what is drawn, where, and whether anything went wrong."""

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kimi_deploy.validate.faults.catalogue import FAULTS
from kimi_deploy.validate.faults.graph import Graph
from kimi_deploy.validate.html import page
from kimi_deploy.validate.run import Settings, validate_export
from tests.browser import FLAGS
from tests.capabilities import CHROMIUM, needs_chromium
from tests.graph.conftest import no_progress

ARTEFACTS = Path(__file__).resolve().parents[2] / "build" / "test-artefacts"
GREEDY = 24
DRAWING = ["--hide-scrollbars", "--window-size=1280,1600", "--enable-logging=stderr"]
MEASURE = """
<script>
const svgs = [...document.querySelectorAll("svg")].map(svg => {
  const frame = svg.getBoundingClientRect();
  const inside = e => { const b = e.getBoundingClientRect(); return b.width > 0 && b.left >= frame.left - 1 &&
    b.right <= frame.right + 1 && b.top >= frame.top - 1 && b.bottom <= frame.bottom + 1; };
  const all = s => [...svg.querySelectorAll(s)];
  return { id: svg.id, width: frame.width, height: frame.height,
    marks: all("circle, polyline").filter(inside).length, all: all("circle, polyline").length,
    wrong: all("circle.wrong").length, texts: all("text").filter(inside).length, all_texts: all("text").length,
    colour: getComputedStyle(svg.querySelector("circle, polyline")).fill };
});
const table = document.querySelector(".wide");
document.body.dataset.seen = JSON.stringify({ svgs, verdict: document.querySelector("h1 span").textContent,
  verdicts: Math.max(...[...table.querySelectorAll(".pass, .fail")].map(e => e.getBoundingClientRect().right)),
  overflow: table.scrollWidth - table.clientWidth, page: document.body.scrollWidth - innerWidth });
</script>
"""


@pytest.fixture(scope="module")
def right(model: Path, exported: Path) -> str:
    settings = Settings(max_tokens=24, long_tokens=70, greedy_tokens=GREEDY, threads=1)
    return page(validate_export(model, exported, settings, no_progress).to_dict())


@pytest.fixture(scope="module")
def wrong(model: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    graph = Graph(exported)
    next(f for f in FAULTS if f.name == "swapped state").plant(graph)
    folder = tmp_path_factory.mktemp("page") / "wrong"
    graph.save(folder)
    settings = Settings(max_tokens=24, long_tokens=70, greedy_tokens=GREEDY, threads=1)
    return page(validate_export(model, folder, settings, no_progress).to_dict())


def browse(folder: Path, html: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "page.html").write_text(html, encoding="utf-8")
    command = [
        str(CHROMIUM),
        *FLAGS,
        *DRAWING,
        f"--user-data-dir={folder / 'profile'}",
        *arguments,
        f"file://{folder}/page.html",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def measured(folder: Path, html: str, *arguments: str) -> dict:
    """What the browser laid out. The page forbids scripts: the copy that is measured does not."""
    open_page = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", f"{MEASURE}</body>")
    dom = browse(folder, open_page, *arguments, "--dump-dom").stdout
    found: dict = json.loads(re.search(r'data-seen="([^"]*)"', dom)[1].replace("&quot;", '"'))
    return found


@needs_chromium
@pytest.mark.parametrize("name", ["right", "wrong"])
def test_every_plot_is_drawn_inside_its_frame(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    seen = measured(tmp_path, request.getfixturevalue(name))
    assert [s["id"] for s in seen["svgs"]] == ["error-by-tensor", "scatter", "drift"]
    tensors, scatter, drift = seen["svgs"]
    for svg in seen["svgs"]:
        assert svg["width"] > 250
        assert svg["height"] > 200
        assert (svg["marks"], svg["texts"]) == (svg["all"], svg["all_texts"]), f"{svg['id']} is drawn over its edge"
    # a tensor of each of the five states and the logits, by several checks
    assert tensors["marks"] >= 6 * 4
    assert scatter["marks"] > 300
    assert drift["marks"] == 2
    assert tensors["colour"] == "rgb(37, 99, 168)"
    assert (tensors["wrong"] > 0) == (name == "wrong")
    assert seen["verdict"] == ("pass" if name == "right" else "FAIL")
    assert seen["overflow"] == 0
    assert seen["page"] <= 0


@needs_chromium
def test_a_narrow_window_shows_the_verdicts_and_legible_plots(wrong: str, tmp_path: Path) -> None:
    seen = measured(tmp_path, wrong, "--window-size=500,2600")
    # tables and plots scroll inside the page, which does not
    assert seen["page"] <= 0
    assert seen["verdicts"] < 500
    assert min(s["width"] for s in seen["svgs"] if s["id"] != "scatter") >= 500


@needs_chromium
@pytest.mark.parametrize("name", ["right", "wrong"])
def test_the_browser_has_nothing_to_complain_about(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    picture = ARTEFACTS / f"validation-{name}.png"
    picture.unlink(missing_ok=True)
    log = browse(tmp_path, request.getfixturevalue(name), f"--screenshot={picture}").stderr
    assert not [line for line in log.splitlines() if "CONSOLE" in line]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000  # a blank page of this size has 8 kB


@needs_chromium
def test_a_complaint_would_be_seen(right: str, tmp_path: Path) -> None:
    """The page's own rule blocks what is added to it, and the browser says so where the test above looks."""
    added = right.replace("</body>", "<script>alert(1)</script><img src='https://example.org/x.png'></body>")
    log = browse(tmp_path, added, "--dump-dom").stderr
    assert len([line for line in log.splitlines() if "CONSOLE" in line and "Content Security Policy" in line]) >= 2


class Links(HTMLParser):
    """Collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {n}" for n, _ in attributes if n in ("src", "href", "xlink:href", "onload", "onclick")]
        if tag in ("script", "link", "iframe", "img"):
            self.found.append(tag)


def test_the_page_holds_everything_it_shows(right: str) -> None:
    links = Links()
    links.feed(right)
    assert links.found == []
    assert "url(" not in right
    assert "@import" not in right


def test_the_failure_names_tensor_place_and_command(wrong: str) -> None:
    assert "<strong>1.recurrent_state</strong> (key and value axes are swapped)" in wrong
    assert "--only prefill --prompt-index" in wrong
    # in the table too, beside the check, not whatever was wrong first of all
    assert "<td>1.recurrent_state: key and value axes are swapped</td>" in wrong


def test_names_from_the_user_are_text_not_markup(model: Path, exported: Path) -> None:
    report = validate_export(
        model, exported, Settings(max_tokens=4, long_tokens=4, greedy_tokens=2, threads=1), no_progress
    ).to_dict()
    report["prompts"][0]["name"] = "<img src=x onerror=alert(1)>"
    report["name"] = "</title><script>"
    links = Links()
    links.feed(page(report))
    assert links.found == []
