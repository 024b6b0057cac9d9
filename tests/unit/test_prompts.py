"""Prompts from files, from wildcards and from the built-in lists."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from comfyui_agd.training.prompt_lists import BUILT_IN
from comfyui_agd.training.prompts import PromptError, expand, generate, generate_negatives, prompts_of, read_prompts

# Words that begin with a vowel and sound otherwise, or the other way round.
WRONG_ARTICLE = re.compile(
    r"\ban? an?\b|\ba (?!uni|one-|euro|use)[aeiou]|\ban (?!hour|honest|heir)[^aeiou]", re.IGNORECASE
)
SYNTAX = re.compile(r"[{}|\\]|__|::")
BAD_SPACING = re.compile(r"  | [,.]|,,|^[ ,]|[ ,]$|,\S")


@pytest.fixture(scope="module")
def drawn() -> list[str]:
    return generate(5000, 1)


@pytest.fixture(scope="module")
def negatives() -> list[str]:
    return generate_negatives(2000, 1)


@pytest.fixture
def lists(tmp_path):
    """Writes wildcard lists, given by name, into a folder."""

    def write(**texts: str):
        for name, text in texts.items():
            file = tmp_path / "lists" / f"{name.replace('_in_', '/')}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return tmp_path / "lists"

    return write


# Files.


def test_a_file_holds_one_prompt_per_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffun café, été\r\n\r\n  # not this one\r\n  a fox # 2  \r\n".encode())
    assert read_prompts(file) == read_prompts(str(file)) == ["un café, été", "a fox # 2"]
    assert prompts_of("a\n\n#b\n c ") == ["a", "c"]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_another_encoding_is_refused_with_its_place(tmp_path, start):
    file = tmp_path / "latin.txt"
    file.write_bytes(start + b"a fox\na caf\xe9\n")
    with pytest.raises(PromptError, match=rf"latin.txt is not UTF-8 text \(byte {len(start) + 11}, 0xe9, in line 2\)"):
        read_prompts(file)


def test_what_is_no_file_with_prompts_is_refused(tmp_path):
    with pytest.raises(PromptError, match=r"There is no file .*none.txt"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptError, match="is a folder; give the text file"):
        read_prompts(tmp_path)
    (tmp_path / "empty.txt").write_text("\n# only this\n")
    with pytest.raises(PromptError, match=r"empty.txt holds no prompts; write one per line"):
        read_prompts(tmp_path / "empty.txt")


# Wildcards.


@pytest.mark.parametrize(
    "line",
    [
        "a (red:1.2) fox, ((tall)), [small]",
        "a cat \\(animal\\), embedding:easy__negative__v2",
        "embedding:my_style.pt, __, ____, my__file__name, __init",
        "left | right, 3::4, C:\\prompts, <lora:name:0.8>, two  spaces ,",
    ],
)
def test_what_is_no_wildcard_is_left_alone(line):
    assert expand([line], 5, 0) == [line]


def test_emphasis_may_hold_wildcards():
    assert set(expand(["({red|blue}:1.2) {(fox:0.8)|owl}"], 9, 0)) == {
        "(red:1.2) (fox:0.8)",
        "(red:1.2) owl",
        "(blue:1.2) (fox:0.8)",
        "(blue:1.2) owl",
    }


def test_alternatives_nest_and_all_come():
    assert set(expand(["a {red|dark {green|grey}} fox"], 99, 0)) == {"a red fox", "a dark green fox", "a dark grey fox"}


def test_escaped_braces_and_bars_are_characters():
    assert expand(["a \\{b|c\\}"], 1, 0) == ["a {b|c}"]
    assert set(expand(["{a\\|b|\\{c\\}}"], 9, 0)) == {"a|b", "{c}"}


def test_empty_alternatives_leave_no_gaps():
    assert set(expand(["a {|red} fox, {|old} , quick {|.}"], 99, 0)) == {
        "a fox, quick",
        "a fox, old, quick",
        "a red fox, quick",
        "a red fox, old, quick",
        "a fox, quick.",
        "a fox, old, quick.",
        "a red fox, quick.",
        "a red fox, old, quick.",
    }
    assert expand(["{|fox}"], 9, 0) == ["fox"]


def test_weights_are_how_often():
    numbered = "{" + "|".join(map(str, range(10000))) + "}"
    counts = Counter(
        line.split()[0] for line in expand([f"{{3::red|blue|0::grey|0.5::dark green}} {numbered}"], 1200, 0)
    )
    assert sum(counts.values()) == 1200
    assert 0.6 < counts["red"] / 1200 < 0.75  # 3 of 4.5, fewer as they run out
    assert 1.3 < counts["blue"] / counts["dark"] < 3
    assert counts["grey"] == 0


def test_fixed_lines_come_once_unchanged_and_in_order():
    lines = ["z  fox,", "an owl", "{a|b|c|d} cat", "an owl", "", "(a:1.1) wolf"]
    prompts = expand(lines, 6, 0)
    assert [p for p in prompts if "cat" not in p] == ["z  fox,", "an owl", "(a:1.1) wolf"]
    assert len(set(prompts)) == len(prompts) == 6
    assert prompts[2].endswith("cat")


def test_no_line_is_left_out_for_a_small_count():
    assert len(expand(["a", "b", "{c|d}", "{e|f}"], 1, 0)) == 4


def test_it_ends_when_nothing_new_comes():
    assert len(expand(["{a|b|c} {1|2}", "{a|b} {1|2}", "x"], 10**9, 0)) == 7
    assert expand([], 5, 0) == []


def test_the_same_seed_gives_the_same_prompts():
    lines = ["{a|b|c|d} __animal__", "__color__ {1|2|3}"]
    assert expand(lines, 20, 3) == expand(lines, 20, 3)
    assert expand(lines, 20, 3) != expand(lines, 20, 4)


def test_lists_are_files_in_a_folder_and_its_subfolders(lists):
    folder = lists(animals_in_birds="an owl\n# a comment\na heron", scene="__animals/birds__ {at dawn|at night}")
    drawn = expand(["a photo of __scene__"], 99, 0, folder)
    assert set(drawn) == {
        f"a photo of {bird} at {hour}" for bird in ("an owl", "a heron") for hour in ("dawn", "night")
    }


def test_a_list_may_stand_next_to_letters_that_follow_it(lists):
    folder = lists(a="cat", b="dog")
    assert expand(["__a__s and __b____a__", "{__a__}:__b__"], 2, 0, folder) == ["cats and dogcat", "cat:dog"]


def test_the_users_list_wins_over_the_built_in_one(lists):
    assert len(expand(["__animal__"], 9, 0, lists(other="x"))) == 9
    assert expand(["__animal__"], 9, 0, lists(animal="my own cat")) == ["my own cat"]


@pytest.mark.parametrize(
    ("line", "found", "missing"), [("a {b|c", "{", "}"), ("a b} c", "}", "{"), ("{a|{b}", "{", "}")]
)
def test_a_lone_brace_is_refused(line, found, missing):
    with pytest.raises(PromptError, match=re.escape(f'A {found} has no {missing} in the line "{line}"')):
        expand(["fine", line], 1, 0)


def test_a_lone_brace_in_a_list_is_refused_with_the_list(lists):
    with pytest.raises(PromptError, match=r'in the line "b\{" of the list mine'):
        expand(["{1000::x|__mine__}"], 1, 0, lists(mine="a\nb{"))


def test_choices_that_can_choose_nothing_are_refused():
    with pytest.raises(PromptError, match=r'All weights of a choice are 0 in the line "{0::a\|0.0::b}"'):
        expand(["{0::a|0.0::b}"], 1, 0)


def test_an_unknown_list_is_refused_even_if_it_might_not_be_drawn(lists):
    folder = lists(bird="owl", sea_in_fish="cod")
    unknown = r'no wildcard list brid for the line "{1000::a\|__brid__}".* has bird, sea/fish; built in are a_color, '
    with pytest.raises(PromptError, match=unknown) as error:
        expand(["{1000::a|__brid__}"], 1, 0, folder)
    assert str(folder) in str(error.value)
    with pytest.raises(PromptError, match="No folder with lists was given; built in are"):
        expand(["__brid__"], 1, 0)


def test_no_list_is_read_from_outside_the_folder(lists):
    folder = lists(mine="x")
    (folder.parent / "secret.txt").write_text("secret")
    line = f"__../secret__ __{folder.parent}/secret__"
    assert expand([line], 1, 0, folder) == [line]


@pytest.mark.parametrize(
    ("line", "circle"), [("__a__", "a -> b -> a"), ("__start__", "a -> b -> a"), ("__c__", "c -> c")]
)
def test_lists_that_go_in_circles_are_refused(lists, line, circle):
    folder = lists(a="x\ny {z|__b__}", b="__a__", c="deep __c__\nend", start="{1|__a__}")
    with pytest.raises(PromptError, match=rf"go in circles \({circle}\) in the line "):
        expand([line], 1, 0, folder)


def test_a_list_may_come_by_two_ways(lists):
    folder = lists(a="__c__ __b__", b="__c__", c="x")
    assert expand(["__a__ __b__ __c__"], 1, 0, folder) == ["x x x x"]


def test_a_folder_or_a_list_that_can_not_be_read_is_refused(lists, tmp_path):
    with pytest.raises(PromptError, match=r"There is no folder .*nowhere; give the folder with the wildcard lists"):
        expand(["a"], 1, 0, tmp_path / "nowhere")
    with pytest.raises(PromptError, match=r"mine.txt holds no prompts"):
        expand(["__mine__"], 1, 0, lists(mine="# nothing"))


# The built-in generator.


def test_generated_prompts_are_distinct_and_of_that_count(drawn):
    assert len(drawn) == len(set(drawn)) == 5000
    assert [len(generate(count, 0)) for count in (0, 1, 7)] == [0, 1, 7]


def test_draws_hardly_ever_repeat():
    # Each line is a draw of its own, and a repeated one leaves the result a prompt shorter.
    assert len(expand(["__prompt__"] * 5000, 0, 2)) > 0.99 * 5000
    assert len(expand(["__long_prompt__"] * 2000, 0, 2)) == 2000


def test_generation_depends_on_the_seed_alone(drawn):
    assert generate(20, 1) == drawn[:20]
    assert generate(20, 2) != drawn[:20]
    code = "from comfyui_agd.training.prompts import *; print(generate(5, 1), generate_negatives(8, 1))"
    results = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": hashing}, capture_output=True)
        for hashing in ("1", "2")
    ]
    expected = f"{generate(5, 1)} {generate_negatives(8, 1)}"
    assert [result.stdout.decode().strip() for result in results] == [expected, expected]


def test_generated_prompts_read_well(drawn, negatives):
    prompts = [*drawn, *filter(None, negatives)]
    assert [prompt for prompt in prompts if SYNTAX.search(prompt)] == []
    assert [prompt for prompt in prompts if WRONG_ARTICLE.search(prompt)] == []
    assert [prompt for prompt in prompts if BAD_SPACING.search(prompt)] == []
    tags = [prompt.split(", ") for prompt in prompts]
    assert [found for found in tags if len(set(found)) < len(found)] == []


def test_generated_prompts_vary_in_length_and_kind(drawn):
    words = [len(prompt.split()) for prompt in drawn]
    assert min(words) <= 3
    assert max(words) >= 45
    for low, high in [(1, 6), (7, 14), (15, 24), (25, 99)]:
        assert sum(low <= count <= high for count in words) > 0.05 * len(words)
    assert sum(prompt.endswith(".") for prompt in drawn) > 0.05 * len(drawn)
    assert sum(prompt.count(",") >= 4 for prompt in drawn) > 0.05 * len(drawn)
    for kind in ("photo", "painting", "robot", "bread", "forest", "kitchen", "fox", "woman", "dragon", "cube", "chair"):
        assert any(re.search(rf"\b{kind}", prompt) for prompt in drawn), kind


def test_half_of_the_negatives_are_empty_and_the_others_vary(negatives):
    assert negatives.count("") == 1000
    assert 400 < negatives[:1000].count("") < 600
    assert len(set(negatives)) > 700
    assert any("low quality" in negative for negative in negatives)
    assert generate_negatives(2000, 1) == negatives
    assert generate_negatives(1, 1) == [""]
    assert generate_negatives(0, 1) == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_list_can_be_drawn_from_and_is_used(name):
    drawn = expand([f"__{name}__"], 3, 0)
    assert len(set(drawn)) == 3
    assert all(re.fullmatch(r"[^_{}|]+", prompt) for prompt in drawn)
    everywhere = " ".join(line for lines in BUILT_IN.values() for line in lines)
    assert name in ("prompt", "negative") or f"__{name}__" in everywhere
