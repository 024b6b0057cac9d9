"""What every error of ours has in common."""

from .text import one_line

_SHOWN_MODULE = "agd"


class AGDError(Exception):
    """The base of the errors that users read; each has a built-in one, such as `ValueError`, as its second base.

    The message begins with what is wrong and what to do, in the user's words; paths and figures follow. It is one
    line, whatever the names of files, prompts and texts of files in it hold.
    """

    __module__ = _SHOWN_MODULE

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # ComfyUI shows module and name of an exception's class; ours would begin with the pack's folder.
        cls.__module__ = _SHOWN_MODULE

    def __str__(self) -> str:
        return one_line(super().__str__())
