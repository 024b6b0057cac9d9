"""The one rule for an adapter's name."""

import pytest

from comfyui_agd.agd_core.adapter_name import AdapterNameError, file_name, why_invalid

REFUSED = {
    "": "it is empty",
    "   ": "it is empty",
    ".safetensors": "it is empty",
    " .safetensors": "it is empty",
    ".": "begins with a dot",
    "..": "begins with a dot",
    "...": "begins with a dot",
    "..safetensors": "begins with a dot",
    ".hidden": "begins with a dot",
    ".git/mine": "begins with a dot",
    "../mine": "begins with a dot",
    "sdxl/../mine": "begins with a dot",
    "mine.": "ends with a dot",
    "mine..safetensors": "ends with a dot",
    "sdxl./mine": "ends with a dot",
    "mine ": "ends with a space",
    " mine": "begins or ends with a space",
    "mine .safetensors": "ends with a space",
    "sdxl /mine": "ends with a space",
    "/tmp/mine": "begins with a slash",
    "/": "begins with a slash",
    "sdxl//mine": "nothing between two slashes",
    "sdxl/": "nothing between two slashes",
    "sdxl/.safetensors": "nothing between two slashes",
    "C:\\mine": "holds one of",
    "C:mine": "holds one of",
    "sdxl\\mine": "holds one of",
    "what?": "holds one of",
    "a*": "holds one of",
    'say "a"': "holds one of",
    "<a>": "holds one of",
    "a|b": "holds one of",
    "a\nb": "can't be seen",
    "a\tb": "can't be seen",
    "a\0b": "can't be seen",
    "a\x7fb": "can't be seen",
    "a\u200bb": "can't be seen",
    "a\u202eb": "can't be seen",
    "a\ud800b": "can't be seen",
    "nul": "Windows keeps NUL",
    "Con.safetensors": "Windows keeps CON",
    "aux.v2": "Windows keeps AUX",
    "lpt1/mine": "Windows keeps LPT1",
    "COM¹": "Windows keeps COM",
    "mine.run/best": "folders that end in .run",
    "a" * 201: "longer than 200 bytes",
    "雪" * 80: "longer than 200 bytes",
}
TAKEN = {
    "my_adapter": "my_adapter.safetensors",
    "my_adapter.safetensors": "my_adapter.safetensors",
    "My Adapter (v1.5).SafeTensors": "My Adapter (v1.5).safetensors",
    "sdxl/mine": "sdxl/mine.safetensors",
    "a/b/c": "a/b/c.safetensors",
    "v1.5": "v1.5.safetensors",
    "雪の画風": "雪の画風.safetensors",
    "été": "été.safetensors",
    "console": "console.safetensors",
    "mine.run": "mine.run.safetensors",
    "a" * 180: "a" * 180 + ".safetensors",
}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=map(ascii, REFUSED))
def test_a_name_that_cannot_be_a_file_everywhere_is_refused_with_the_reason(name, reason):
    assert reason in why_invalid(name)
    assert "Choose a name such as 'my_adapter'" in why_invalid(name)
    assert why_invalid(name).isprintable()
    with pytest.raises(AdapterNameError, match="No adapter can be called"):
        file_name(name)


@pytest.mark.parametrize(("name", "file"), TAKEN.items(), ids=map(ascii, TAKEN))
def test_other_names_are_taken_with_the_suffix_or_without(name, file):
    assert why_invalid(name) is None
    assert file_name(name) == file
    assert file_name(file) == file
