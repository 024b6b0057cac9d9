"""The texts of the nodes in the languages of locales/: writes the English ones, and tells what the others lack.

    python tools/locales.py

English is what the nodes' own schemas say; the other languages are written by hand, with the same keys. ComfyUI serves
the files, its editor looks them up by node and input: https://docs.comfy.org/custom-nodes/i18n
"""

import asyncio
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "locales"
LANGUAGES = ("en", "zh", "zh-TW", "ja", "ko")
_DYNAMIC = "COMFY_DYNAMICCOMBO_V3"


def file_of(language: str) -> Path:
    return FOLDER / language / "nodeDefs.json"


def read(language: str) -> dict:
    return json.loads(file_of(language).read_text("utf-8"))


def _specs(info: dict) -> Iterator[tuple[str, list]]:
    """Every input of a node, or of a choice, as /object_info has it; those of a choice are called choice.input."""
    for name, spec in (info.get("required", {}) | info.get("optional", {})).items():
        yield name, spec
        for option in spec[1]["options"] if spec[0] == _DYNAMIC else ():
            yield from ((f"{name}.{inner}", inner_spec) for inner, inner_spec in _specs(option["inputs"]))


def _choices(spec: list) -> Iterable[str]:
    if spec[0] == _DYNAMIC:
        return [option["key"] for option in spec[1]["options"]]
    return spec[1].get("options", ()) if spec[0] == "COMBO" else ()


def _input_texts(name: str, spec: list, files: set[str]) -> dict[str, Any]:
    """`files`: names among the choices that aren't words of ours."""
    # Of an input of a choice the editor shows the id, unless a text here has words for it.
    own = name.rpartition(".")[2].replace("_", " ") if "." in name else name
    texts = {"name": spec[1].get("display_name", own), "tooltip": spec[1].get("tooltip")}
    if options := {choice: choice for choice in _choices(spec) if choice not in files}:
        texts["options"] = options
    return texts


def _output_texts(name: str, kind: str, tooltip: str) -> dict[str, str]:
    # The editor has names of its own for outputs that are called as their type.
    return ({"name": name} if name != kind else {}) | {"tooltip": tooltip}


def texts_of(info: dict, files: set[str]) -> dict[str, Any]:
    """A node's entry, from its entry in /object_info."""
    outputs = zip(info["output_name"], info["output"], info["output_tooltips"], strict=True)
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        # The editor writes _ for a dot in a name.
        "inputs": {name.replace(".", "_"): _input_texts(name, spec, files) for name, spec in _specs(info["input"])},
        "outputs": {str(place): _output_texts(*output) for place, output in enumerate(outputs)},
    }


def english() -> dict[str, Any]:
    """Every node's entry, from its schema."""
    from comfyui_agd.agd_core.comfyui.runtime import use_comfyui

    use_comfyui(cpu=True)
    from comfyui_agd.agd_core.comfyui import folders
    from comfyui_agd.nodes import AGDExtension

    folders.register()
    nodes = asyncio.run(AGDExtension().get_node_list())
    files = set(folders.adapters())
    return {node.GET_SCHEMA().node_id: texts_of(node.GET_NODE_INFO_V1(), files) for node in nodes}


def flat(texts: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Every text by its path of keys."""
    found: dict[tuple[str, ...], str] = {}
    for key, value in texts.items():
        found |= flat(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


def differences(texts: dict, english: dict) -> list[str]:
    """What a language's `texts` lack, and what they have too much of."""
    own, expected = flat(texts), flat(english)
    lacking = [f"lacks {' > '.join(path)}: {expected[path]}" for path in expected if not own.get(path)]
    return lacking + [f"has {' > '.join(path)}, which is no text any more" for path in own if path not in expected]


def main() -> int:
    texts = english()
    before = flat(read("en")) if file_of("en").exists() else {}
    file_of("en").parent.mkdir(parents=True, exist_ok=True)
    file_of("en").write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for path, text in flat(texts).items():
        if before.get(path, text) != text:
            print(f"changed, to be translated again: {' > '.join(path)}: {text}")
    found = [f"{language} {line}" for language in LANGUAGES[1:] for line in differences(read(language), texts)]
    print("\n".join(found) or "Every language has every text.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
