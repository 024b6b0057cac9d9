"""ComfyUI's own editor in a headless Chromium, for tests to use as a person does."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from playwright.sync_api import ConsoleMessage, Locator, Page, Playwright, TimeoutError

from comfyui_agd.tests.support.live_server import Server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# How nodes are drawn: by LiteGraph on one canvas, or as HTML.
RENDERERS = ("classic", "vue")
PATIENCE_S = 90  # a step of the toy takes seconds where others work on the same cores

_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
# Of any pack: a help page of the language is asked for first, and a node that failed is looked up in the registry.
_EXPECTED = re.compile(r"/docs/\w+/\w+(-\w+)?\.md|api\.comfy\.org")
_READY = """() => window.app?.extensionManager && window.LiteGraph?.registered_node_types.AGDTrain
    && document.querySelector('#graph-canvas')"""
_NODE = "const node = app.graph._nodes.find(node => node.type === type);"
_ON_PAGE = """const onPage = ([x, y]) => {
    const at = app.canvas.ds.convertOffsetToCanvas([x, y]), canvas = app.canvas.canvas.getBoundingClientRect();
    return [at[0] + canvas.x, at[1] + canvas.y];
};"""


@contextmanager
def chromium(playwright: Playwright) -> Iterator:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
    yield browser
    browser.close()


class Editor:
    """A page with the editor. `problems`: what its console says against this pack."""

    def __init__(self, page: Page, server: Server, renderer: str, language: str = "en"):
        self.page, self.server, self.renderer = page, server, renderer
        self.problems: list[str] = []
        page.set_default_timeout(PATIENCE_S * 1000)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._listen)
        settings = {
            "Comfy.Locale": language,
            "Comfy.TutorialCompleted": True,
            "Comfy.VueNodes.Enabled": renderer == "vue",
            "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # texts are drawn at every zoom
        }
        server.post("/settings", settings)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_function(_READY)
        self.wait_until(self.node_types)  # the workflow that a new user is shown
        assert page.evaluate("LiteGraph.vueNodesMode") is (renderer == "vue")

    def _listen(self, message: ConsoleMessage) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if message.type in ("error", "warning") and "agd" in text.lower() and not _EXPECTED.search(text):
            self.problems.append(text)

    def clear(self) -> None:
        """An empty workflow in an editor as it was opened."""
        for _ in range(2):  # what is typed in, then the dialog that it is in
            self.page.keyboard.press("Escape")
        if (panel := self.page.get_by_test_id("properties-panel")).is_visible():
            panel.locator("button").first.click()
        if (error := self.page.get_by_test_id("error-overlay-dismiss")).is_visible():
            error.click()
        self.page.evaluate(
            """async () => {
                const empty = {nodes: [], links: [], version: 0.4};
                await app.loadGraphData(empty, true, true, app.extensionManager.workflow.activeWorkflow);
                app.nodeOutputs = {};
                app.nodePreviewImages = {};
            }"""
        )
        self.look_at(0, 0)

    def refresh(self) -> None:
        """The nodes' lists of files are read again, by the editor's own key."""
        with self.page.expect_response("**/object_info*"):
            self.page.keyboard.press("r")
        self.page.wait_for_timeout(500)  # to be taken in

    def look_at(self, x: float, y: float, scale: float = 1.0) -> None:
        """That place of the graph comes to where nothing lies over the canvas, 120 pixels below its upper left."""
        self.page.evaluate(
            """([x, y, scale]) => {
                app.canvas.ds.scale = scale;
                app.canvas.ds.offset = [120 / scale - x, 120 / scale - y];
                app.canvas.setDirty(true, true);
            }""",
            [x, y, scale],
        )

    # What is in the graph

    def search(self, words: str) -> list[str]:
        """The names that the search box lists, best first. The box stays open."""
        box = self.page.get_by_role("combobox", name="Add a node...")
        if not box.is_visible():
            self._until_seen(box, lambda: self.page.mouse.dblclick(700, 700))
        box.fill(words)
        self.page.wait_for_timeout(300)  # the list is made a moment after the last key
        return [text.partition("\n")[0] for text in self.page.get_by_role("option").all_inner_texts()]

    def place(self, x: float, y: float) -> None:
        """The first one that the search box lists, by a click at that place of the page."""
        before = len(self.node_types())
        self.page.keyboard.press("Enter")
        self.wait_until(lambda: len(self.node_types()) > before)
        self.page.mouse.move(x, y, steps=4)
        self.page.wait_for_timeout(200)  # the node follows the mouse
        self.page.mouse.click(x, y)

    def add(self, type: str, x: float = 0, y: float = 0, **values) -> None:
        """A node with these values in its fields."""
        self.page.evaluate(
            """([type, x, y, values]) => {
                const node = LiteGraph.createNode(type);
                app.graph.add(node);
                node.pos = [x, y];
                for (const [name, value] of Object.entries(values)) {
                    const widget = node.widgets.find(widget => widget.name === name);
                    widget.value = value;
                    widget.callback?.(value);
                }
            }""",
            [type, x, y, values],
        )

    def resize(self, type: str, width: float, height: float) -> None:
        self.page.evaluate(f"([type, size]) => {{{_NODE} node.setSize(size)}}", [type, [width, height]])

    def connect(self, source: str, output: str, target: str, input: str) -> None:
        self.page.evaluate(
            """([source, output, target, input]) => {
                const find = type => app.graph._nodes.find(node => node.type === type);
                const [from, to] = [find(source), find(target)];
                from.connect(from.findOutputSlot(output), to, to.findInputSlot(input));
            }""",
            [source, output, target, input],
        )

    def load(self, prompt: dict) -> None:
        """A prompt as the API takes it, laid out by the editor."""
        self.page.evaluate("prompt => app.loadApiJson(prompt, 'test')", prompt)

    def node_types(self) -> list[str]:
        return self.page.evaluate("app.graph._nodes.map(node => node.type)")

    def links(self) -> set[tuple[str, str]]:
        """The types of the nodes that are linked."""
        found = """[...app.graph.links.values()].map(link =>
            [link.origin_id, link.target_id].map(id => app.graph.getNodeById(id).type))"""
        return set(map(tuple, self.page.evaluate(found)))

    def look_at_node(self, type: str, scale: float = 1.0) -> None:
        x, y = self.page.evaluate(f"type => {{{_NODE} return [...node.pos]}}", type)
        self.look_at(x, y - 30, scale)

    # The mouse

    def slot(self, type: str, name: str) -> tuple[float, float]:
        """Where on the page an input or output of a node is."""
        script = f"""([type, name]) => {{
            {_NODE} {_ON_PAGE}
            const output = node.findOutputSlot(name);
            return onPage(output >= 0 ? node.getOutputPos(output) : node.getInputPos(node.findInputSlot(name)));
        }}"""
        return tuple(self.page.evaluate(script, [type, name]))

    def drag(self, source: tuple[str, str], target: tuple[str, str]) -> None:
        """A link, from an output of a node to an input of another, each given by type and name."""
        (x, y), (to_x, to_y) = self.slot(*source), self.slot(*target)
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move((x + to_x) / 2, (y + to_y) / 2, steps=4)
        self.page.mouse.move(to_x, to_y, steps=4)
        self.page.mouse.up()

    def select(self, type: str) -> None:
        """By a click on its title, which shows the buttons above it."""
        at = f"type => {{{_NODE} {_ON_PAGE} return onPage([node.pos[0] + 90, node.pos[1] - 15])}}"
        button = self.page.get_by_test_id("info-button")
        self._until_seen(button, lambda: self.page.mouse.click(*self.page.evaluate(at, type)))

    def _until_seen(self, wanted: Locator, click: Callable[[], None]) -> None:
        """Clicks again where a click had no effect: a busy page may miss one."""
        for _ in range(5):
            click()
            with suppress(TimeoutError):
                wanted.wait_for(timeout=5000)
                return
        raise AssertionError(f"{wanted} is not there after five clicks.")

    def open_template(self, name: str) -> None:
        """From the list of templates, under the folder's name as the server knows it."""
        self.page.get_by_role("button", name="Templates").first.click()
        self.page.get_by_text("a-renamed-agd", exact=True).last.click()
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        self.page.get_by_test_id(f"template-workflow-{name}").wait_for(state="detached")
        self.wait_until(self.node_types)

    # Running

    def run(self) -> None:
        self.page.get_by_test_id("queue-button").click()

    def run_to_the_end(self) -> None:
        before = len(self.server.get("/history"))
        self.run()
        self.wait_until(lambda: len(self.server.get("/history")) > before)

    def stop(self) -> None:
        self.page.get_by_role("button", name="Cancel current run").first.click()

    def wait_until(self, holds) -> None:
        """While the page goes on."""
        end = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < end, f"Not so after {PATIENCE_S} s."
            self.page.wait_for_timeout(100)

    # What is read

    def text_on(self, type: str) -> Locator:
        """The text that a node shows of its work, as a box that may scroll."""
        if self.renderer == "classic":
            return self.page.locator(".dom-widget .overflow-y-auto")
        node = self.page.evaluate(f"type => {{{_NODE} return node.id}}", type)
        return self.page.locator(f'[data-node-id="{node}"] .comfy-markdown-content')

    def pictures_on(self, type: str) -> int:
        if self.renderer == "classic":
            return self.page.evaluate(f"type => {{{_NODE} return node.imgs?.length ?? 0}}", type)
        node = self.page.evaluate(f"type => {{{_NODE} return node.id}}", type)
        return self.page.locator(f'[data-node-id="{node}"] img').count()

    def error_details(self) -> Locator:
        """Where an error is explained, opened by the buttons that its notice and its explanation have."""
        self.page.get_by_test_id("error-overlay-see-errors").click()
        panel = self.page.get_by_test_id("properties-panel")
        panel.get_by_text("detected").wait_for()
        for more in panel.get_by_role("button", name="Info for").all():
            more.click()
        return panel

    def count(self, test_id: str | re.Pattern) -> int:
        return self.page.get_by_test_id(test_id).count()

    def help(self) -> Locator:
        """Of the selected node, by the button above it."""
        self.page.get_by_test_id("info-button").click()
        return self.page.get_by_test_id("properties-panel")

    def picture(self, file: Path, left: int, top: int, width: int, height: int, scale: float = 1.0) -> None:
        """So many pixels of the graph from that place on, without the name of the folder that the pack is in."""
        settings = "app.extensionManager.setting"
        self.page.evaluate(f"{settings}.set('Comfy.NodeBadge.NodeSourceBadgeMode', 'None')")
        self.page.evaluate(f"{settings}.set('Comfy.Minimap.Visible', false)")
        self.page.mouse.move(0, 0)  # or a tooltip is shown
        self.look_at(left, top, scale)
        self.page.wait_for_timeout(1000)
        canvas = self.page.locator("#graph-canvas").bounding_box()
        at = {"x": canvas["x"] + 120, "y": canvas["y"] + 120}
        how = {"quality": 85} if file.suffix == ".jpg" else {}
        self.page.screenshot(path=file, clip={**at, "width": width, "height": height}, **how)


def read_without_scrolling(box: Locator) -> str:
    """The part of an element's text that is seen, because it lies inside of all that would cut it off."""
    return box.evaluate(
        """box => {
            const boxesOf = node => {
                const found = [];
                for (let at = node.parentElement; at && box.contains(at); at = at.parentElement)
                    if (getComputedStyle(at).overflowY !== 'visible') found.push(at.getBoundingClientRect());
                return found;
            };
            const texts = document.createTreeWalker(box, NodeFilter.SHOW_TEXT), range = document.createRange();
            let seen = '';
            for (let text = texts.nextNode(); text; text = texts.nextNode()) {
                const boxes = boxesOf(text);
                for (let i = 0; i < text.length; i++) {
                    range.setStart(text, i);
                    range.setEnd(text, i + 1);
                    const {top, bottom, right} = range.getBoundingClientRect();
                    if (boxes.every(in_ => top >= in_.top - 1 && bottom <= in_.bottom + 1 && right <= in_.right + 1))
                        seen += text.data[i];
                }
            }
            return seen;
        }"""
    )
