"""The texts of every node in every language of locales/: all of them, no others, and such as the editor can show."""

import re

import pytest

from comfyui_agd.tools.locales import FOLDER, LANGUAGES, differences, english, flat, read

TRANSLATED = LANGUAGES[1:]
# What stays in any language: values in quotes, files and folders, the nodes' names, numbers.
KEPT = re.compile(r"'[\w -]+'|models/agd|docs/\w+\.md|AGD [A-Z]\w+(?: [A-Z]\w+)*|\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def texts() -> dict:
    return english()


def test_english_is_what_the_schemas_say(texts):
    assert read("en") == texts


def test_the_folders_are_the_languages():
    assert sorted(folder.name for folder in FOLDER.iterdir()) == sorted(LANGUAGES)


def test_every_input_output_option_and_tooltip_of_every_node_has_a_text(texts):
    trained = texts["AGDTrain"]
    assert set(trained["inputs"]["quality"]) == {"name", "tooltip", "options"}
    assert texts["AGDTrainSettings"]["inputs"]["kind_adapter_size"]["name"] == "adapter size"  # an input of a choice
    assert trained["outputs"]["2"] == {"name": "plot", "tooltip": trained["outputs"]["2"]["tooltip"]}
    assert [path for path, text in flat(texts).items() if not text] == []


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_language_has_every_text_and_no_other(texts, language):
    assert differences(read(language), texts) == []


@pytest.mark.parametrize("language", TRANSLATED)
def test_tooltips_and_descriptions_are_translated(texts, language):
    own = flat(read(language))
    sentences = [(path, text) for path, text in flat(texts).items() if path[-1] in ("tooltip", "description")]
    assert [path for path, text in sentences if own[path] == text] == []


@pytest.mark.parametrize("language", TRANSLATED)
def test_values_files_names_of_nodes_and_numbers_are_as_they_are(texts, language):
    own = flat(read(language))
    for path, text in flat(texts).items():
        if path[-1] in ("tooltip", "description", "display_name"):
            assert [kept for kept in KEPT.findall(text) if kept not in own[path]] == [], path


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_has_what_the_editor_takes_for_syntax(language):
    """It reads names and descriptions as vue-i18n's messages, and before its release 1.45 tooltips as well.

    One of them with a brace, and it shows no node; escaped, later releases show the escapes in tooltips.
    """
    assert [path for path, text in flat(read(language)).items() if re.search(r"[{}@|]", text)] == []
