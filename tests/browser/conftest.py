"""One server and one browser for all tests; a page for each renderer."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from playwright.sync_api import sync_playwright

from comfyui_agd.tests.support.editor import CHROMIUM, RENDERERS, Editor, chromium
from comfyui_agd.tests.support.live_server import ROOT, Server


def pytest_addoption(parser) -> None:
    parser.addoption("--screenshots", action="store_true", help="renew the pictures of docs/ that the tests take")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: install chromium, or Google Chrome, for the tests of the editor")
    server = Server(tmp_path_factory.mktemp("comfyui"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser(server):
    with sync_playwright() as playwright, chromium(playwright) as browser:
        yield browser


@pytest.fixture(scope="module", params=RENDERERS)
def page(request, server, browser) -> Iterator[Editor]:
    opened = browser.new_page(viewport={"width": 1500, "height": 1000})
    yield Editor(opened, server, request.param)
    opened.close()


@pytest.fixture
def editor(page) -> Iterator[Editor]:
    page.clear()
    yield page
    assert page.problems == []


@dataclass(frozen=True)
class Pictures:
    """`wanted`: whether docs/NAME.png is to be renewed, and worth a longer run than a test needs."""

    editor: Editor
    wanted: bool

    def take(self, name: str, left: int, top: int, width: int, height: int) -> None:
        """Of that part of the graph."""
        if self.wanted:
            self.editor.picture(ROOT / "docs" / f"{name}.png", left, top, width, height)


@pytest.fixture
def pictures(request, editor) -> Pictures:
    return Pictures(editor, request.config.getoption("--screenshots", default=False) and editor.renderer == "vue")
