"""The real ComfyUI server as a subprocess, and a client that queues API prompts and waits for them."""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import websocket

from comfyui_agd.agd_core.comfyui.runtime import find_comfyui

ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 180
_TEXT_EVENT = 3
_PREVIEW_EVENTS = (1, 4)  # without and with metadata


class PromptError(Exception):
    """The server refused a prompt or it failed; the message is the server's own."""


class Server:
    """ComfyUI in a folder of its own, with this pack and the toy pack linked into custom_nodes. `flags` are its own.

    `pack`: what is linked, by which name. `missing`: modules that it can't import.
    """

    def __init__(
        self, folder: Path, *flags: str, pack: tuple[str, Path] = ("a-renamed-agd", ROOT), missing: Iterable[str] = ()
    ):
        self.folder, self.flags = folder, flags
        (folder / "custom_nodes").mkdir(parents=True)
        for name, source in (pack, ("agd_toy", ROOT / "examples" / "toy")):
            (folder / "custom_nodes" / name).symlink_to(source, target_is_directory=True)
        # Python runs a file of this name when it starts; None makes importing a module fail.
        (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({list(missing)}))\n")
        self.adapters, self.extra = folder / "models" / "agd", folder / "elsewhere"
        self.extra.mkdir()
        paths = folder / "extra_model_paths.yaml"
        paths.write_text(f"mine:\n  base_path: {self.extra}\n  agd: .\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(folder)]
        command += ["--extra-model-paths-config", str(paths), "--disable-auto-launch", "--disable-api-nodes"]
        command += flags
        self.log = folder / "server.log"
        others = filter(None, [os.environ.get("PYTHONPATH")])
        self.process = subprocess.Popen(
            command,
            cwd=find_comfyui(),
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([str(folder), *others])},
        )
        self._wait()
        self.client = uuid.uuid4().hex
        self.texts: dict[str, str] = {}
        self.previews = 0
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}", timeout=300)

    def _wait(self) -> None:
        for _ in range(_START_SECONDS * 2):
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended at start:\n{self.log.read_text()[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise RuntimeError(f"The server did not answer in {_START_SECONDS} s:\n{self.log.read_text()[-3000:]}")

    def close(self) -> None:
        self.socket.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.folder / "custom_nodes")

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> dict:
        return json.loads(self.read(path))

    def post(self, path: str, data: dict) -> dict:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
                return json.loads(body) if body else {}
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode()) from error

    def queue(self, prompt: dict) -> str:
        return self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"]

    def events(self, prompt_id: str):
        """The websocket's messages about a prompt, until it is over."""
        while True:
            message = self.socket.recv()
            if isinstance(message, bytes):
                self._remember(message)
                continue
            event = json.loads(message)
            data = event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            # The last one, sent when the history is written.
            if event["type"] == "executing" and data.get("node") is None:
                return
            yield event

    def _remember(self, message: bytes) -> None:
        """What the editor shows on a node: event type, then a picture, or length of the node's id, the id, the text."""
        kind, length = struct.unpack(">II", message[:8])
        self.previews += kind in _PREVIEW_EVENTS
        if kind == _TEXT_EVENT:
            # Lines end in two spaces, for the renderer that takes texts for Markdown.
            self.texts[message[8 : 8 + length].decode()] = message[8 + length :].decode().replace("  \n", "\n")

    def run(self, prompt: dict) -> dict:
        """The outputs of a prompt by node. Raises `PromptError`."""
        prompt_id, failed = self.queue(prompt), None
        for event in self.events(prompt_id):
            if event["type"] in ("execution_error", "execution_interrupted"):
                failed = event["data"].get("exception_message", event["type"])
        if failed:
            raise PromptError(failed)
        return self.get(f"/history/{prompt_id}")[prompt_id]["outputs"]

    def image(self, outputs: dict, node: str) -> bytes:
        """The first picture that a SaveImage or PreviewImage node made."""
        found = outputs[node]["images"][0]
        return (self.folder / found["type"] / found["subfolder"] / found["filename"]).read_bytes()


def to_api(workflow: dict, object_info: dict) -> dict:
    """A workflow as ComfyUI's editor saves it, as the API takes it."""
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in object_info:
            continue  # notes
        inputs = {i["name"]: list(links[i["link"]]) for i in node["inputs"] if i.get("link") is not None}
        _fill(inputs, iter(node["widgets_values"]), object_info[node["type"]]["input"])
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


_FIELDS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")


def _fill(inputs: dict, values: Iterator, known: dict, within: str = "") -> None:
    """Gives the fields that aren't linked their values; those of a choice that unfolds come after it."""
    for name, (kind, *options) in {**known.get("required", {}), **known.get("optional", {})}.items():
        shown, name = options[0] if options else {}, within + name
        if not (isinstance(kind, list) or kind in _FIELDS):
            continue
        value = next(values)  # a linked field has one, too
        inputs.setdefault(name, value)
        if kind == "COMFY_DYNAMICCOMBO_V3":
            chosen = next(option for option in shown["options"] if option["key"] == inputs[name])
            _fill(inputs, values, chosen["inputs"], f"{name}.")
        if shown.get("control_after_generate"):
            next(values)
