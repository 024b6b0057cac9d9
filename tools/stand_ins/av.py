"""Stands in for PyAV, which is too large to bring along: ComfyUI imports it, and uses it for files of videos alone."""

import importlib.abc
import importlib.machinery
import sys

__path__ = []  # a package, so that its submodules are looked for


def _placeholder(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any that is asked for, with any name in it."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("av.") else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__getattr__ = _placeholder


__getattr__ = _placeholder
sys.meta_path.append(_Submodules())
