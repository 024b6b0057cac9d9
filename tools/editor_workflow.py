"""A graph by the names of its nodes and inputs, as ComfyUI's editor saves it: there, values go by their places."""

import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a choice whose options have fields of their own
# Types whose inputs are fields of the node, unless they are linked.
FIELDS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC)
_NOTE = "MarkdownNote"  # the editor's own node, which the server doesn't know
_NOTE_INFO = {"input": {"required": {"text": ["STRING"]}}, "output": [], "output_name": []}


class Out(NamedTuple):
    """The output of a node, both by name, as the value of another's input."""

    node: str
    output: str


class ModelFile(NamedTuple):
    """A value that the editor offers to download where it is missing, into a folder of `models`."""

    name: str
    directory: str
    url: str


@dataclass(frozen=True)
class Node:
    """`inputs`: links, and values that differ from the node's own; fields of a choice are called choice.field."""

    type: str
    at: tuple[int, int]
    size: tuple[int, int]
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str = ""


def note(at: tuple[int, int], size: tuple[int, int], text: str) -> Node:
    return Node(_NOTE, at, size, {"text": text})


def field_type(spec: list) -> str:
    """The type of the field of an input in /object_info, or the input's own type where it has none."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    # Of an input that may be linked to several types, that of its own field.
    return "COMBO" if isinstance(kind, list) else options.get("widgetType", kind)


def inputs_of(info: dict) -> dict[str, list]:
    return specs_of(info["input"])


def specs_of(inputs: dict) -> dict[str, list]:
    """Of a node, or of an option of a choice."""
    return {**inputs.get("required", {}), **inputs.get("optional", {})}


def choices_of(spec: list) -> list:
    if spec[0] == DYNAMIC:
        return [option["key"] for option in spec[1]["options"]]
    return spec[0] if isinstance(spec[0], list) else spec[1]["options"]


def fields_of(spec: list, choice: str) -> dict[str, list]:
    """The inputs that come after a choice when it is `choice`."""
    options = spec[1]["options"] if spec[0] == DYNAMIC else ()
    return next((specs_of(option["inputs"]) for option in options if option["key"] == choice), {})


def _default(spec: list) -> Any:
    options = spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    return choices_of(spec)[0] if field_type(spec) in ("COMBO", DYNAMIC) else ""


def _values(inputs: dict[str, Any], specs: dict[str, list], within: str = "") -> list:
    values = []
    for name, spec in specs.items():
        if not _is_field(spec):
            continue
        value = inputs.get(within + name)
        # A linked field keeps a value, which is not used.
        value = _default(spec) if value is None or isinstance(value, Out) else value
        values.append(value.name if isinstance(value, ModelFile) else value)
        values += _values(inputs, fields_of(spec, value), f"{within}{name}.")
        if len(spec) > 1 and spec[1].get("control_after_generate"):
            values.append("fixed")
    return values


def _sockets(node: Node, info: dict) -> list[dict]:
    """All inputs that can only be linked, then the fields that are."""
    specs = inputs_of(info)
    own = [{"name": name, "type": spec[0], "link": None} for name, spec in specs.items() if not _is_field(spec)]
    linked = [name for name, spec in specs.items() if _is_field(spec) and isinstance(node.inputs.get(name), Out)]
    fields = [{"name": n, "type": field_type(specs[n]), "widget": {"name": n}, "link": None} for n in linked]
    return own + fields


def _is_field(spec: list) -> bool:
    return field_type(spec) in FIELDS


def _properties(node: Node) -> dict:
    if node.type == _NOTE:
        return {}
    files = [value._asdict() for value in node.inputs.values() if isinstance(value, ModelFile)]
    return {"Node name for S&R": node.type} | ({"models": files} if files else {})


def _saved_node(number: int, node: Node, info: dict) -> dict:
    outputs = zip(info["output_name"], info["output"], strict=True)
    return {
        "id": number,
        "type": node.type,
        "pos": list(node.at),
        "size": list(node.size),
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": _sockets(node, info),
        "outputs": [{"name": name, "type": kind, "links": []} for name, kind in outputs],
        "properties": _properties(node),
        "widgets_values": _values(node.inputs, inputs_of(info)),
        **({"title": node.title} if node.title else {}),
        **({"color": "#432", "bgcolor": "#653"} if node.type == _NOTE else {}),
    }


def _link(saved: dict[str, dict], graph: dict[str, Node]) -> list[list]:
    """Every link as [its number, from node, from output, to node, to input, type]; both ends are told of it."""
    links: list[list] = []
    for name, node in graph.items():
        for place, socket in enumerate(saved[name]["inputs"]):
            if not isinstance(source := node.inputs.get(socket["name"]), Out):
                continue
            begin, socket["link"] = saved[source.node], len(links) + 1
            slot = [output["name"] for output in begin["outputs"]].index(source.output)
            begin["outputs"][slot]["links"].append(socket["link"])
            kind = begin["outputs"][slot]["type"]
            links.append([socket["link"], begin["id"], slot, saved[name]["id"], place, kind])
    return links


def editor_workflow(title: str, graph: dict[str, Node], object_info: dict) -> dict:
    """`graph`, nodes by names of its own, as the editor's JSON. `object_info` is the server's."""
    infos = {name: object_info[node.type] if node.type != _NOTE else _NOTE_INFO for name, node in graph.items()}
    for name, node in graph.items():
        if unknown := {given.partition(".")[0] for given in node.inputs} - set(inputs_of(infos[name])):
            raise ValueError(f"{title}: {name}, of type {node.type}, has no {', '.join(sorted(unknown))}.")
    numbered = enumerate(graph.items(), start=1)
    saved = {name: _saved_node(number, node, infos[name]) for number, (name, node) in numbered}
    links = _link(saved, graph)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, title)),
        "revision": 0,
        "last_node_id": len(saved),
        "last_link_id": len(links),
        "nodes": list(saved.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }
