"""Settings as earlier versions kept them: those of all kinds of adapters at once, with low_rank's rank as `hidden`."""

from typing import Any

from .config import KINDS, foreign_settings

# No kind has all of these, so settings that hold them are such a record.
_OF_SEVERAL_KINDS = {"hidden", "rank", "shared_encoder"}


def without_other_kinds(settings: dict[str, Any]) -> dict[str, Any]:
    """A record of all kinds' settings with those of its own kind only; other settings as they are."""
    kind = settings.get("kind")
    if kind not in KINDS or not settings.keys() >= _OF_SEVERAL_KINDS:
        return settings
    foreign = foreign_settings(kind, settings)
    own = {name: value for name, value in settings.items() if name not in foreign}
    return own | ({"rank": settings["hidden"]} if kind == "low_rank" else {})
