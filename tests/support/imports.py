"""What a file of this repository imports, read from its source."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "comfyui_agd"
STANDARD = set(sys.stdlib_module_names)
COMFYUI = {"comfy", "comfy_kitchen", "comfyui_version", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server"}
COMFYUI |= {"utils"}


def relative_imports(node: ast.ImportFrom, file: Path) -> set[str]:
    folder = file.parents[node.level - 1].relative_to(ROOT)
    return {f"./{(folder / (node.module or alias.name).replace('.', '/')).as_posix()}" for alias in node.names}


def absolute_import(name: str) -> str:
    """A module outside by its first name, one of this repository as a path "./..." from its root."""
    first, _, rest = name.partition(".")
    return f"./{rest.replace('.', '/')}" if first == PACKAGE else first


def imports(file: Path) -> set[str]:
    """What a file imports: outside modules by first name, this repository's own as paths "./..." from its root."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {absolute_import(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= relative_imports(node, file)
        elif isinstance(node, ast.ImportFrom):
            found |= {absolute_import(f"{node.module}.{alias.name}") for alias in node.names}
    return found


def outside(file: Path) -> set[str]:
    return {name for name in imports(file) if not name.startswith("./")} - STANDARD


def top_folders(file: Path) -> set[str]:
    """The top folders of this repository that a file imports from."""
    return {name.split("/")[1] for name in imports(file) if name.startswith("./")}
