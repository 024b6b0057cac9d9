"""The archive that the registry serves, in the real server: in any folder, with ComfyUI's own requirements alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np

from comfyui_agd.agd_core.comfyui.runtime import find_comfyui
from comfyui_agd.tests.support.archive import modules_of, unpack
from comfyui_agd.tests.support.graphs import base_graph, pixels, with_adapter
from comfyui_agd.tests.support.live_server import Server


@contextmanager
def installed(folder: Path, name: str) -> Iterator[Server]:
    """A server that has the archive as the pack of this name, and can import what ComfyUI's requirements bring."""
    _, others = modules_of(find_comfyui() / "requirements.txt")
    # Every environment has the installer.
    missing = {*others, "comfyui_agd"} - {"pip", "setuptools", "pkg_resources", "_distutils_hack"}
    server = Server(folder / "mein ComfyUI 图", pack=(name, unpack(folder / name)), missing=sorted(missing))
    try:
        yield server
    finally:
        server.close()


def test_in_the_registry_s_folder_its_help_pages_and_templates_are_served(tmp_path):
    with installed(tmp_path, "agd-adapters") as server:
        found = {name: info["python_module"] for name, info in server.get("/object_info").items()}
        nodes = [name for name, module in found.items() if module == "custom_nodes.agd-adapters"]
        assert len(nodes) >= 4
        for node in nodes:
            assert server.read(f"/extensions/agd-adapters/docs/{node}.md")
        for name in server.get("/workflow_templates")["agd-adapters"]:
            for ending in ("json", "jpg"):
                assert server.read(f"/api/workflow_templates/agd-adapters/{quote(name)}.{ending}")


def test_in_a_folder_of_any_name_it_loads_and_samples(tmp_path):
    with installed(tmp_path, "AGD für Bilder 包") as server:
        log = server.log.read_text("utf-8")
        assert not any(complaint in log for complaint in ("IMPORT FAILED", "Traceback"))
        plain = server.image(server.run(base_graph()), "save")
        guided = server.image(server.run(with_adapter(base_graph(), "training-free")), "save")
        assert not np.array_equal(pixels(guided), pixels(plain))
