"""Takes the pictures beside the workflow templates of example_workflows/, from ComfyUI's own editor.

python tools/thumbnails.py
"""

import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from comfyui_agd.tests.support.editor import Editor, chromium
from comfyui_agd.tests.support.live_server import Server
from comfyui_agd.tools.templates import FOLDER, place_model_files

SIDE = 640  # pixels of a picture
# What of the graph is seen, by the template's title: a square's left, its top, its side.
SQUARES = {
    "1 Faster sampling, nothing to train": (-30, -330, 1120),
    "2 Compare CFG and AGD side by side": (740, -60, 1460),
    "3 Train an adapter and use it": (-30, -330, 1320),
    "4 LoRA and ControlNet on top": (-30, -60, 1540),
    "5 Evaluate an adapter": (-30, -330, 1520),
    "6 A transformer": (-30, -330, 1120),
    "7 Train with settings of your own": (-30, -330, 1240),
}


def _take(editor: Editor, title: str) -> None:
    left, top, side = SQUARES[title]
    editor.clear()
    editor.open_template(title)
    editor.page.wait_for_timeout(2000)  # the editor goes to the middle of what it has loaded
    editor.picture(FOLDER / f"{title}.jpg", left, top, SIDE, SIDE, scale=SIDE / side)


def main() -> None:
    with tempfile.TemporaryDirectory() as at, sync_playwright() as playwright, chromium(playwright) as browser:
        folder = Path(at) / "comfyui"
        place_model_files(folder)  # without them the editor marks the nodes that load them
        server = Server(folder)
        try:
            editor = Editor(browser.new_page(viewport={"width": 1300, "height": 1000}), server, "vue")
            for title in SQUARES:
                _take(editor, title)
        finally:
            server.close()


if __name__ == "__main__":
    main()
