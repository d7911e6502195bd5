"""The page of a report in a real browser: it loads without a network or an error, and its controls do what they say."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from energyreg import plots
from energyreg.reports import page as report
from energyreg.reports.page import Drawing, Gallery, GalleryItem, Section, SectionedReport, Table

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(BINARY is None, reason="needs chromium, chromium-browser or google-chrome on the PATH"),
    pytest.mark.skipif(sys.platform == "win32", reason="drives the browser over inherited pipes"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]
SECONDS = 60


class Browser:
    """Chromium, driven over a pair of pipes by its DevTools protocol, which needs no other package."""

    def __init__(self, profile):
        to_read, self._commands = os.pipe()
        self._answers, to_write = os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to 4.
        script = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, BINARY, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._session, self.events = b"", 0, None, []
        pages = [target for target in self.send("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        self._session = self.send("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "CSS"):
            self.send(f"{domain}.enable")

    def _receive(self, until):
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError(f"The browser said nothing for {SECONDS} s.")
            part = os.read(self._answers, 2**20)
            if not part:
                raise RuntimeError(f"The browser has ended with status {self._process.wait(10)}.")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method, **parameters):
        """Run a command and return its result; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while (answer := self._receive(until)).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def show(self, path, *, width=1280, dark=False, script=True):
        """Load a page anew, in a window of that width."""
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        until = time.monotonic() + SECONDS
        while not self.of("Page.loadEventFired"):
            self.events.append(self._receive(until))
        return self

    def of(self, *methods):
        """Parameters of the events with these names since the page was loaded."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def run(self, expression):
        """Value of a JavaScript expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            text = {"Enter": "\r", " ": " "}.get(key, "")
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def close(self):
        self._process.terminate()
        self._process.wait(SECONDS)
        os.close(self._commands)
        os.close(self._answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driven = Browser(tmp_path_factory.mktemp("profile"))
    yield driven
    driven.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A page with every kind of part: a filtered and sortable table, a wide one, figures, a gallery."""

    def drawing(name):
        return Drawing(lambda: plots.pit_histogram([0.2, 0.4, 0.9]), f"Histogram of {name}, in words.", name, "A note.")

    numbers = [("ten", 10.0, "a"), ("two", 2.0, "b"), ("thirty", 30.0, "a"), ("minus", -1.5, "b")]
    lines = [[name, {"text": f"{n:g} m", "sort": n}, name[0]] for name, n, _ in numbers]
    table = Table(
        "Numbers", ["Name", "Length", "Letter"], lines, sortable=True, filters={"Part": [p for *_, p in numbers]}
    )
    wide = Table("Wide", ["Key", *[f"Heading {i}" for i in range(12)]], [["row", *["0.12345 to 6.789"] * 12]])
    items = [
        GalleryItem(
            f"row-{i}", drawing(f"Row {i}"), ["Odd"] if i % 2 else ["Even"], {"input": str(i), "b" * 60: "c" * 200}
        )
        for i in range(1, 6)
    ]
    links = Table("Links", ["Row", "Text"], [[{"text": "Row 4", "href": "#row-4"}, "t"]])
    long = Table("Long", [f"Heading {i}" for i in range(6)], [["row", *["1,514,600 (−1,514,600 to −1,480,000)"] * 5]])
    page = SectionedReport(
        "Lengths of things", ["The question, and the answer."],
        [
            Section("numbers", "Numbers", ["Text."], [table, wide], {"Term": "Meaning."}, facts={"Path": "/x" * 80}),
            Section("figures", "Figures", drawings=[drawing("one"), drawing("two")]),
            Section("rows", "Row by row", gallery=Gallery("Rows", items)),
            Section("links", "Links", tables=[links, long]),
        ],
        ["The end."],
    )  # fmt: skip
    return report.write(page, tmp_path_factory.mktemp("page") / "report.html")


VISIBLE = "[...document.querySelectorAll('.item')].filter(e => e.checkVisibility()).map(e => e.id)"
NAMES = (
    "[...document.querySelectorAll('#numbers-table-0 tbody tr')].filter(e => e.checkVisibility())"
    ".map(e => e.cells[0].textContent)"
)
STATUS = "document.querySelector('.gallery [role=status]').textContent"


def choose(browser, selector, value):
    """Choose an option, as a hand would: the value changes, and the page is told."""
    browser.run(
        f"(() => {{ const s = document.querySelector({selector!r}); s.value = {value!r}; "
        "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def click(browser, selector):
    browser.run(f"document.querySelector({selector!r}).click()")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_loads_offline_without_errors_or_requests(browser, path, width, dark):
    browser.show(path, width=width, dark=dark)
    assert browser.run("document.readyState") == "complete"
    requests = [event["request"]["url"] for event in browser.of("Network.requestWillBeSent")]
    assert requests == [path.as_uri()]
    assert browser.of("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
    assert browser.run("performance.getEntriesByType('resource').length") == 0


def test_errors_and_requests_would_be_seen(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<!DOCTYPE html><script>console.error('x'); undefined_name()</script><img src='missing.png'>")
    browser.show(bad)
    assert len(browser.of("Network.requestWillBeSent")) == 2
    assert browser.of("Runtime.exceptionThrown") and browser.of("Runtime.consoleAPICalled")


def test_the_page_itself_forbids_requests(browser, path):
    browser.show(path)
    blocked = browser.run(
        "new Promise(done => { document.addEventListener('securitypolicyviolation', e => done(e.violatedDirective)); "
        "const i = new Image(); i.src = 'file:///nothing.png'; document.body.append(i); setTimeout(done, 5000, '') })"
    )
    assert blocked == "img-src"


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
OUTSIDE = """(() => {
    const right = document.documentElement.clientWidth + 1;
    const wide = [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1);
    const outside = [...document.querySelectorAll('main *')].filter(e => {
        const box = e.getBoundingClientRect();
        return box.width > 1 && !e.closest('svg') && (box.right > right || box.left < -1);
    });
    return [...wide, ...outside].map(e => `${e.tagName} ${e.className} ${e.textContent.trim().slice(0, 40)}`);
})()"""
"""Elements that are wider than the page, and boxes that would have to be scrolled sideways."""


@pytest.mark.parametrize("width", [320, 360, 420, 768, 1024, 1280])
@pytest.mark.parametrize("script", [True, False])
def test_nothing_is_wider_than_the_page(browser, path, width, script):
    browser.show(path, width=width, script=script)
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.run("window.innerWidth") == width
    assert browser.run(OVERFLOW) == 0 and browser.run(OUTSIDE) == []
    # A table that were too wide all the same would scroll in its own box, which the keyboard can reach.
    assert browser.run("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0)")
    browser.run("document.querySelector('td').style = 'white-space: nowrap; display: block; width: 3000px'")
    assert browser.run(OUTSIDE) != []  # so it would have been seen
    browser.run("document.querySelector('h1').style.width = '3000px'")
    assert browser.run(OVERFLOW) > 1000


def test_nothing_is_wider_than_paper(browser, path):
    browser.show(path, width=718)  # A4, less margins of a centimetre, at 96 pixels to the inch
    browser.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.run(OVERFLOW) == 0 and browser.run(OUTSIDE) == []
        assert browser.run("getComputedStyle(document.querySelector('td')).display") == "table-cell"
    finally:
        browser.send("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_tables_stay_tables_for_screen_readers(browser, path, width):
    browser.show(path, width=width)
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in nodes if not node.get("ignored")]
    shown = 2 + 1 + 1 + 1  # rows of the table of numbers that pass its filter, and of the others
    assert roles.count("table") == 4 and roles.count("row") == shown + 4
    assert roles.count("columnheader") == 3 + 13 + 2 + 6 and roles.count("rowheader") == shown
    assert roles.count("cell") == 2 * 2 + 12 + 1 + 5
    # A value has its heading beside it where the headings are not above.
    label = "getComputedStyle(document.querySelectorAll('td')[1], '::before').content"
    assert ("Letter" in browser.run(label)) is (width < 640)
    # Whatever sorts can still be reached.
    assert browser.run("[...document.querySelectorAll('th button')].every(e => e.getBoundingClientRect().width > 10)")


def test_colours_follow_the_scheme(browser, path):
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('svg text') ?? document.querySelector('svg')).fill"
    light = browser.show(path).run(f"[{ground}, {ink}]")
    dark = browser.show(path, dark=True).run(f"[{ground}, {ink}]")
    assert light[0] == "rgb(251, 251, 250)" and dark[0] == "rgb(19, 21, 24)"
    assert light[1] != dark[1]
    browser.send(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.run(ground) == "rgb(255, 255, 255)"
    assert browser.run("[...document.querySelectorAll('.controls')].some(e => e.checkVisibility())") is False


def test_gallery_shows_one_row_and_moves(browser, path):
    browser.show(path)
    assert browser.run(VISIBLE) == ["row-1"] and browser.run(STATUS) == "1 of 5"
    click(browser, ".gallery button:last-of-type")
    assert browser.run(VISIBLE) == ["row-2"] and browser.run(STATUS) == "2 of 5"
    click(browser, ".gallery button")
    click(browser, ".gallery button")
    assert browser.run(VISIBLE) == ["row-5"]
    choose(browser, ".gallery label:nth-of-type(2) select", "row-3")
    assert browser.run(VISIBLE) == ["row-3"]
    choose(browser, ".gallery label select", "1")
    assert browser.run(VISIBLE) == ["row-2"] and browser.run(STATUS) == "1 of 2"
    assert browser.run(
        "[...document.querySelectorAll('.gallery label:nth-of-type(2) option')].map(o => o.textContent)"
    ) == [
        "Row 2",
        "Row 4",
    ]


def test_a_link_leads_to_its_row(browser, path):
    browser.show(path)
    for _ in range(2):  # also where the address names the row already
        choose(browser, ".gallery label select", "0")
        click(browser, "#links-table-0 a")
        browser.run("new Promise(done => setTimeout(done, 50))")
        assert browser.run(VISIBLE) == ["row-4"] and browser.run(STATUS) == "4 of 5"
        assert browser.run("document.activeElement.id") == "row-4"


def test_filter_and_order_of_a_table(browser, path):
    browser.show(path)
    assert browser.run(NAMES) == ["ten", "thirty"]
    choose(browser, ".controls[data-filters] select", "")
    assert browser.run(NAMES) == ["ten", "two", "thirty", "minus"]
    assert browser.run("document.querySelector('.controls[data-filters] [role=status]').textContent") == "4 of 4"
    click(browser, "#numbers-table-0 th:nth-child(2) button")
    assert browser.run(NAMES) == ["thirty", "ten", "two", "minus"]
    assert browser.run("document.querySelector('#numbers-table-0 th:nth-child(2)').ariaSort") == "descending"
    click(browser, "#numbers-table-0 th:nth-child(2) button")
    assert browser.run(NAMES) == ["minus", "two", "ten", "thirty"]
    click(browser, "#numbers-table-0 th button")
    assert browser.run(NAMES) == ["minus", "ten", "thirty", "two"]
    assert browser.run("document.querySelectorAll('#numbers-table-0 [aria-sort]').length") == 1


def test_the_keyboard_reaches_and_operates_everything(browser, path):
    browser.show(path)
    reached = []
    for _ in range(60):
        browser.press("Tab", 9)
        reached.append(
            browser.run(
                "(e => [e.tagName, e.getAttribute('aria-label') ?? e.textContent.trim().slice(0, 12), "
                "getComputedStyle(e).outlineStyle !== 'none'])(document.activeElement)"
            )
        )
        if reached[-1][0] == "BODY":
            break
    inside = [entry for entry in reached if entry[0] != "BODY"]
    tags = [tag for tag, *_ in inside]
    assert tags.count("SELECT") == 3 and tags.count("BUTTON") == 5 and tags.count("A") == 5
    assert {"Numbers", "Wide", "Links"} <= {name for _, name, _ in inside}
    assert all(seen for *_, seen in inside), "an element with the focus has no outline"
    browser.run("document.querySelector('.gallery button:last-of-type').focus()")
    browser.press("Enter", 13)
    browser.press(" ", 32)
    assert browser.run(VISIBLE) == ["row-3"]


def test_every_control_and_figure_has_a_name(browser, path):
    browser.show(path)
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in nodes:
        if not node.get("ignored"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role, count in {"combobox": 3, "button": 5, "link": 5, "image": 3, "region": 3, "columnheader": 18}.items():
        assert len(named.get(role, [])) >= count and all(named[role]), (role, named.get(role))
    assert named["rowheader"] and named["navigation"] == ["Sections"]


def test_without_scripts_all_of_it_is_shown(browser, path):
    browser.show(path, script=False)
    # The page runs nothing; what is asked here comes from outside.
    document = browser.send("DOM.getDocument")["root"]["nodeId"]
    found = browser.send("DOM.querySelectorAll", nodeId=document, selector=".item")["nodeIds"]
    assert len(found) == 5
    for node in found:
        assert browser.send("DOM.getBoxModel", nodeId=node)["model"]["height"] > 100
    controls = browser.send("DOM.querySelectorAll", nodeId=document, selector=".controls")["nodeIds"]
    assert len(controls) == 2
    for node in controls:
        styles = {
            s["name"]: s["value"] for s in browser.send("CSS.getComputedStyleForNode", nodeId=node)["computedStyle"]
        }
        assert styles["display"] == "none"
    browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_prints_on_few_pages(browser, path):
    browser.show(path)
    pdf = base64.b64decode(browser.send("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
    assert pdf.startswith(b"%PDF")
    assert 1 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 4
