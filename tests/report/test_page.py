"""The page: no network, nothing unescaped, and in a browser its charts, its buttons and its fit on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from steplm.config import load_config
from steplm.planner.plan import plan
from steplm.report.charts import facts
from steplm.report.page import WITHOUT_PLOTLY, write_page
from steplm.report.summary import Suite, read_suite

MakeSuite = Callable[..., Path]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    names = ("vanilla", "step_2", "step_3", "no_master")
    folder = tmp_path_factory.mktemp("page") / "suite"
    return read_suite(make_suite(folder, names, (0, 1), {("no_master", 1): "diverged"}))


class _Tags(HTMLParser):
    """Every element with its attributes, and the text of those that are shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text.append(data)


def test_the_page_names_no_address_and_forbids_every_request(suite: Suite, tmp_path: Path) -> None:
    text = write_page(suite, tmp_path / "index.html", {}).read_text()
    tags = _Tags(text).found
    addresses = [a[name] or "" for _, a in tags for name in ("src", "href", "srcset", "action", "data") if name in a]
    assert addresses
    assert [address for address in addresses if not address.startswith(("#", "data:"))] == []
    policy = next(a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "connect-src" not in policy


def test_a_label_cannot_become_markup_or_end_a_script(suite: Suite, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>&amp;"
    entries = tuple(replace(entry, label=evil) for entry in suite.record.entries)
    changed = Suite(replace(suite.record, name=evil, entries=entries), suite.runs)
    page = _Tags(write_page(changed, tmp_path / "index.html", {}).read_text())
    assert not [attributes for tag, attributes in page.found if tag == "img"]
    assert evil in "".join(page.text)


def test_every_control_and_region_has_a_name(suite: Suite, tmp_path: Path) -> None:
    tags = _Tags(write_page(suite, tmp_path / "index.html", {}).read_text()).found
    named = [(tag, a) for tag, a in tags if a.get("role") in ("img", "region", "group") or tag in ("table", "fieldset")]
    assert len(named) > 8
    assert [tag for tag, attributes in named if not attributes.get("aria-label")] == []
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_table_has_a_visible_title_and_every_cell_its_column(suite: Suite, tmp_path: Path) -> None:
    html = write_page(suite, tmp_path / "index.html", {}).read_text()
    tags = _Tags(html).found
    titles = [a["aria-label"] for tag, a in tags if tag == "table"]
    headings = re.findall(r"<(?:h2|h3)[^>]*>(.+?)</", html)
    assert len(titles) == 3  # the question, its further numbers, the learning rates
    assert [title for title in titles if title not in headings and not str(title).endswith("further numbers")] == []
    assert [tag for tag, a in tags if tag == "td" and not a.get("data-label")] == []
    assert "wikitext2 perplexity" in re.findall(r'data-label="(.+?)"', html)


def test_without_plotly_the_page_shows_pictures_and_says_how_to_get_it(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"a picture")
    page = _Tags(write_page(suite, tmp_path / "index.html", {"q1_loss_tokens": picture}).read_text())
    (image,) = [attributes for tag, attributes in page.found if tag == "img"]
    assert image["src"] == "data:image/png;base64,YSBwaWN0dXJl"
    assert WITHOUT_PLOTLY in "".join(page.text)
    assert not [attributes for tag, attributes in page.found if tag == "button" and "data-entry" in attributes]


def test_the_page_shows_the_lengths_of_the_documents_if_a_run_has_them(make_suite: MakeSuite, tmp_path: Path) -> None:
    folder = make_suite(tmp_path / "suite", ("step_3",), (0,)) / "runs/step_3/lr0.002-seed0"
    without = write_page(read_suite(folder), tmp_path / "without.html", {}).read_text()
    log = folder / "metrics.jsonl"
    event = {"event": "data", "tokens_seen": 0, "documents_by_length": [0, 0, 3, 9]}
    log.write_text(json.dumps(event) + "\n" + log.read_text())
    page = write_page(read_suite(folder), tmp_path / "index.html", {}).read_text()
    assert "Document lengths" in page
    assert "Document lengths" not in without
    chart = json.loads(re.search(r'id="data">(.+?)</script>', page)[1])["charts"][-1]
    assert (chart["x_title"], chart["traces"][0]["y"]) == ("document length, tokens", [25, 75])


# --- in a browser -----------------------------------------------------------------------------------------

# Runs in the page once its charts are drawn, uses it as a reader would, and hands what it sees to the frame around it.
VISIT = """
<script>
const text = (nodes) => [...nodes].map((node) => node.textContent.trim());
const settled = () => new Promise((done) => setTimeout(done, 600));
async function visit() {
  const seen = { errors: window.problems };
  seen.charts = Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) =>
    [chart.id, chart.querySelectorAll("svg.main-svg .trace").length]));
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  seen.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const column = (index) => text(document.querySelectorAll(`#q1 tbody tr > :nth-child(${index})`)).slice(0, 4);
  document.querySelectorAll("#q1 thead button")[2].click();
  seen.ascending = column(3);
  document.querySelectorAll("#q1 thead button")[2].click();
  seen.descending = column(3);
  const isBeside = (cell) => cell.getBoundingClientRect().right > innerWidth;
  seen.beside = [...document.querySelectorAll("#q1 td")].filter(isBeside).length;
  if (document.querySelector(".chips")) await useControls(seen);
  parent.postMessage(JSON.stringify(seen), "*");
}
async function useControls(seen) {
  const before = document.querySelectorAll("#q1-loss .trace").length;
  document.querySelector('#q1 .chips [data-entry="step_2"]').click();
  await settled();
  seen.fewer = before - document.querySelectorAll("#q1-loss .trace").length;
  const title = () => document.querySelector("#q1-loss .xtitle").textContent;
  seen.titles = [title()];
  for (const axis of ["flops", "seconds"]) {
    document.querySelector(`#q1 input[value="${axis}"]`).click();
    await settled();
    seen.titles.push(title());
  }
}
(function wait() {
  if (document.documentElement.dataset.drawn === "yes") 
    visit().catch((error) => parent.postMessage(JSON.stringify({ errors: [String(error)] }), "*"));
  else setTimeout(wait, 50);
})();
</script>
"""
WATCH = """
<script>
window.problems = [];
window.addEventListener("error", (event) => window.problems.push(String(event.message)));
document.addEventListener("securitypolicyviolation", (event) => window.problems.push("blocked: " + event.blockedURI));
const complain = console.error;
console.error = (...words) => { window.problems.push(words.join(" ")); complain(...words); };
</script>
"""


@pytest.fixture(scope="session")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    return found


def visit(browser: str, page: Path, width: int, folder: Path) -> dict[str, Any]:
    """What ``VISIT`` saw in a frame of this width."""
    html = page.read_text().replace("</title>", "</title>" + WATCH, 1).replace("</body>", VISIT + "</body>", 1)
    (folder / "watched.html").write_text(html)
    (folder / "frame.html").write_text(
        f'<body><iframe src="watched.html" width="{width}" height="900" style="border:0"></iframe>'
        '<pre id="seen"></pre><script>addEventListener("message", (event) => {'
        'document.getElementById("seen").textContent = event.data; });</script></body>'
    )
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder / 'u'}",
        "--virtual-time-budget=30000", "--dump-dom", (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
    found = re.search(r'<pre id="seen">(.+?)</pre>', output, re.DOTALL)
    assert found, f"the page did not finish its charts:\n{output[-2000:]}"
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_works_in_a_browser(suite: Suite, tmp_path: Path, browser: str, width: int) -> None:
    seen = visit(browser, write_page(suite, tmp_path / "index.html", {}), width, tmp_path)
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["overflow"] <= 0
    assert seen["beside"] == 0 or width > 640  # on a phone every number is on the screen
    assert set(seen["charts"]) == {"q1-loss", "q1-tradeoff", "q1-memory", "q1-growth", "rates"}
    assert all(count >= 4 for count in seen["charts"].values())
    perplexities = [float(text.split()[0]) for text in seen["ascending"]]
    assert perplexities == sorted(perplexities)
    assert seen["descending"] == seen["ascending"][::-1]
    assert seen["fewer"] == 3  # its band, its line, its growth
    assert seen["titles"] == ["tokens", "training FLOPs", "wall time, minutes"]


def test_the_page_of_one_run_works_in_a_browser(make_suite: MakeSuite, tmp_path: Path, browser: str) -> None:
    make_suite(tmp_path / "suite", ("step_3",), (0,))
    alone = read_suite(tmp_path / "suite/runs/step_3/lr0.002-seed0")
    page = write_page(alone, tmp_path / "index.html", {})
    html = page.read_text()
    assert "Stages of step_3" in html
    data = json.loads(re.search(r'id="data">(.+?)</script>', html)[1])
    assert [chart["id"] for chart in data["charts"]] == ["q1-loss", "q1-memory", "q1-growth"]
    roles = {trace["role"] for chart in data["charts"] for trace in chart["traces"]}
    assert roles == {"faint", "line", "growth", "area", "planned"}
    seen = visit(browser, page, 390, tmp_path)
    assert (seen["errors"], seen["requests"]) == ([], [])
    assert seen["overflow"] <= 0
    assert all(count >= 3 for count in seen["charts"].values())


def test_the_head_tells_the_range_of_tokens_where_runs_differ(suite: Suite) -> None:
    same = dict(facts(suite))["Tokens"]
    assert " to " not in same
    first, *others = suite.runs
    assert first.record is not None
    longer = plan(load_config("quickstart", ["plan.total_tokens=900M"]))
    longest = replace(first, record=replace(first.record, plan=longer))
    told = dict(facts(replace(suite, runs=(longest, *others))))["Tokens"]
    assert told.startswith(f"{same.split()[0]} to 900M a run, ")
