"""Prompts from files, from wildcards and from the built-in lists."""

import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest

from comfyui_agd.training import prompts as prompt_sources
from comfyui_agd.training.prompt_lists import BUILT_IN
from comfyui_agd.training.prompts import (
    PromptError,
    draw_each,
    expand_negatives,
    generate,
    generate_negatives,
    numbered,
    prompts_of,
    read_prompts,
    read_verbatim,
)

# Words that begin with a vowel and sound otherwise, or the other way round.
WRONG_ARTICLE = re.compile(
    r"\ban? an?\b|\ba (?!uni|one-|euro|use)[aeiou]|\ban (?!hour|honest|heir)[^aeiou]", re.IGNORECASE
)
SYNTAX = re.compile(r"[{}|\\]|__|::")
BAD_SPACING = re.compile(r"  | [,.]|,,|^[ ,]|[ ,]$|,\S")


def expand(texts, count=99, seed=0, folder=None) -> list[str]:
    return prompt_sources.expand(numbered(texts, "mine.txt"), count, seed, folder)


def refused(line: str, folder=None) -> str:
    """Why the line is refused; it is the second one, and nothing before it is wrong."""
    with pytest.raises(PromptError) as error:
        expand(["fine", line], folder=folder)
    assert "line 2 of mine.txt" in str(error.value)
    return str(error.value)


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


# Files and fields.


def texts(lines) -> list[str]:
    return [line.text for line in lines]


def test_a_file_holds_one_prompt_per_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffun café, été\r\n\r\n  # not this one\r\n// nor this\r  a fox # 2  \r\n".encode())
    lines = read_prompts(file)
    assert lines == read_prompts(str(file))
    assert [(line.text, line.number) for line in lines] == [("un café, été", 1), ("a fox # 2", 5)]
    assert str(lines[1]) == f'line 5 of {file} ("a fox # 2")'


def test_comments_are_those_of_comfyuis_text_fields():
    given = "a // the first\n//b\n#c\n .hack//sign, https://a.b/c // end\nd"
    assert [(line.text, line.number) for line in prompts_of(given, "prompts")] == [
        ("a", 1),
        (".hack//sign, https://a.b/c", 4),
        ("d", 5),
    ]


def test_verbatim_is_every_line_as_it_is(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# a {\n\n __b // c \n")
    assert read_verbatim(file) == ["# a {", "", " __b // c "]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_another_encoding_is_refused_with_its_place(tmp_path, start):
    file = tmp_path / "latin.txt"
    file.write_bytes(start + b"a fox\na caf\xe9\n")
    with pytest.raises(PromptError, match=rf"latin.txt is not UTF-8 text \(byte {len(start) + 11}, 0xe9, in line 2\)"):
        read_prompts(file)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_needs_its_byte_order_mark(tmp_path, encoding):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffun été\nthe end".encode(encoding))
    assert texts(read_prompts(file)) == ["un été", "the end"]
    file.write_bytes("a fox\nthe end".encode(encoding))
    with pytest.raises(PromptError, match=r"U\+0000 can't be part of a prompt, but is in line 1 of .*save it as UTF-8"):
        read_prompts(file)
    file.write_bytes("\ufeffa fox\nthe end".encode(encoding)[:-1])
    with pytest.raises(PromptError, match=r"is not UTF-16 text .* in line 2"):
        read_prompts(file)


def test_what_no_prompt_holds_is_taken_out():
    given = "a\ufeff \tfox\x1b\na\u2028b\x0bc\x85d\x1ce\u2029f"
    assert texts(prompts_of(given, "prompts")) == ["a  fox", "a b c d e f"]
    assert texts(numbered(["a\nb\rc"], "--negative")) == ["a b c"]


@pytest.mark.parametrize("code", [0xD83D, 0xDCE9, 0])
def test_what_no_encoding_has_is_refused_with_its_line(code):
    with pytest.raises(PromptError, match=rf"U\+{code:04X} can't be .* line 2 of prompts \(") as error:
        prompts_of(f"fine\na {chr(code)} fox", "prompts")
    assert str(error.value).encode("utf-8")


def test_what_is_no_file_with_prompts_is_refused(tmp_path):
    with pytest.raises(PromptError, match=r"There is no file .*none.txt"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptError, match="is a folder; give the text file"):
        read_verbatim(tmp_path)
    (tmp_path / "empty.txt").write_text("\n# only this\n")
    with pytest.raises(PromptError, match=r"empty.txt holds no prompts; write one per line"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(PromptError, match=r"empty.txt holds no prompts; write one per line"):
        read_verbatim(tmp_path / "empty.txt")


# Alternatives.


@pytest.mark.parametrize(
    "line",
    [
        "a (red:1.2) fox, ((tall)), [small]",
        "a cat \\(animal\\), embedding:easy__negative__v2",
        "embedding:my_style.pt, <lora:sub/my__file__name:0.8>, _init_, a_b_",
        "left | right, three::4, [from::0.5], C:\\prompts, two  spaces ,",
        "$5 or $9, 100%, @home, wow!, a ~ b, #1, ¯\\_(ツ)_/¯, ^_^, .hack//sign",
    ],
)
def test_what_is_no_wildcard_is_left_alone(line):
    assert expand([line], 5, 0) == [line]


@pytest.mark.parametrize(
    ("written", "character"),
    [
        (r"my\__style\__v2", "my__style__v2"),
        (r"\____", "____"),
        (r"\{a\|b\}", "{a|b}"),
        (r"{a\|b|a\|b}", "a|b"),
        (r"\${a}", "$" + "a"),
        (r"\$\{v\}", "${v}"),
        (r"3\::a", "3::a"),
        (r"{3\::a}", "3::a"),
        (r"{5\$$}, \$$$", "5$$, $$$"),
        (r"{\@_@}", "@_@"),
        (r"3\#__one__", "3#1"),
        (r"\{%", "{%"),
        (r"\/* a \*/", "/* a */"),
        (r"\// a", "// a"),
    ],
)
def test_a_backslash_makes_an_ordinary_character(lists, written, character):
    assert expand([written], 9, 0, lists(one="1")) == [character]


def test_emphasis_may_hold_wildcards():
    assert set(expand(["({red|blue}:1.2) {(fox:0.8)|owl}"], 9, 0)) == {
        "(red:1.2) (fox:0.8)",
        "(red:1.2) owl",
        "(blue:1.2) (fox:0.8)",
        "(blue:1.2) owl",
    }


def test_alternatives_nest_and_all_come():
    assert set(expand(["a {red|dark {green|grey}} fox"], 99, 0)) == {"a red fox", "a dark green fox", "a dark grey fox"}


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


@pytest.mark.parametrize(
    ("written", "drawn"),
    [
        ("{2$$a|b|c}", {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{2$$ | $$a|b}", {"a | b", "b | a"}),
        ("{2$$$$a|b}", {"ab", "ba"}),
        ("{1-2$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{ 1 - 2 $$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{-1$$a|b}", {"a", "b"}),
        ("{2-$$a|b}", {"a, b", "b, a"}),
        ("x{0$$a|b}", {"x"}),
        ("{0-1$$a|b} x", {"x", "a x", "b x"}),
        ("{9$$a|b}", {"a, b", "b, a"}),
        ("{2$$a|0::b|c}", {"a, c", "c, a"}),
        ("{2$${a|b}|c}", {"a, c", "c, a", "b, c", "c, b"}),
        ("{2$$__n__}", {"1, 2", "2, 1", "1, 3", "3, 1", "2, 3", "3, 2"}),
        ("{2$$__n__|4::x}", {f"{n}, x" for n in "123"} | {f"x, {n}" for n in "123"}),
        ("{$5|$10}", {"$5", "$10"}),
    ],
)
def test_a_count_is_of_different_alternatives(lists, written, drawn):
    assert set(expand([written], folder=lists(n="1\n2\n3"))) == drawn


def test_what_has_more_weight_is_chosen_sooner():
    many = "{" + "|".join(map(str, range(10000))) + "}"
    firsts = Counter(prompt.split(",")[0] for prompt in expand([f"{{2$$8::a|b|c}}, {many}"], 1000))
    assert 0.75 < firsts["a"] / 1000 < 0.85


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
    "name", ["動物", "mein tier", "v1.5", "été", "a-b_c", "собака", "under_in_my animals", "_mine", "a+b,c (d)"]
)
def test_lists_have_names_of_any_script(lists, name):
    folder = lists(**{name: "owl"})
    written = name.replace("_in_", "/")
    assert expand([f"(__{written}__:1.2)", f"的__{written}__在", f"an__{written}__s"], folder=folder) == [
        "(owl:1.2)",
        "的owl在",
        "anowls",
    ]
    decomposed = unicodedata.normalize("NFD", written)
    assert expand([f"__{decomposed}__"], folder=folder) == ["owl"]


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("birds/*", {"owl", "heron", "swan"}),
        ("b*", {"owl", "heron", "swan"}),
        ("*/deep/?", {"heron"}),
        ("*/deep/*", {"heron", "swan"}),
        ("*", {"owl", "heron", "swan", "cat", "tern"}),
        ("swans", {"swan"}),
        ("s[1]", {"tern"}),
    ],
)
def test_patterns_and_names_in_subfolders_are_all_lists_that_fit(lists, name, drawn):
    birds = {"birds_in_a": "owl", "birds_in_deep_in_b": "heron", "birds_in_deep_in_swans": "swan"}
    folder = lists(**birds, cat="cat", **{"terns_in_s[1]": "tern"})
    assert set(expand([f"__{name}__"], folder=folder)) == drawn


def test_patterns_are_of_built_in_lists_where_no_own_list_fits(lists):
    both = {*BUILT_IN["warm_color"], *BUILT_IN["cool_color"]}
    assert set(expand(["__?*m_color__", "__c*l_color__"], folder=lists(red="my red"))) <= both
    assert expand(["__c*l_color__"], folder=lists(cool_color="my blue")) == ["my blue"]


@pytest.mark.parametrize("written", ["__mine__", "__m*__", "{1$$__mine__}"])
def test_lines_of_a_list_have_weights(lists, written):
    folder = lists(mine=" 3 ::red\nblue\n0::grey\n0.5::dark green\nratio::x", n="\n".join(map(str, range(10000))))
    counts = Counter(prompt.split()[0] for prompt in expand([f"{written} __n__"], 1200, 0, folder))
    assert set(counts) == {"red", "blue", "dark", "ratio::x"}
    assert 2 < counts["red"] / counts["blue"] < 4.5
    assert 1.3 < counts["blue"] / counts["dark"] < 3


def test_lists_are_no_others_than_text_files(lists):
    folder = lists(bird="owl")
    (folder / "my_own.yaml").write_text("- cat")
    unknown = refused("__my_own__", folder)
    assert "Lists in YAML and JSON aren't read (my_own); write each as a text file" in unknown


# Variables.


@pytest.mark.parametrize(
    ("written", "drawn"),
    [
        ("${v={a|b}}${v}${v}", {"aa", "ab", "ba", "bb"}),
        ("${v=!{a|b}}${v}${v}", {"aa", "bb"}),
        ("${ v = a } ${v} [${ v }]", {"a [a]"}),
        ("${v:c}", {"c"}),
        ("${v:{c|d}}", {"c", "d"}),
        ("${v:}x", {"x"}),
        ("${v=a}${v:c}", {"a"}),
        ("${v=a}${v?=b}${v}", {"a"}),
        ("${v?=b}${v}", {"b"}),
        ("${v=a}${v=${v}b}${v}", {"ab"}),
        ("${v=a}${w=${v}}${v=b}${w}${v}", {"ab"}),
        ("${größe-2=a}{${größe-2}|x}", {"a", "x"}),
        ("${v=a}__uses__", {"a wing", "no wing"}),
        ("__sets__ ${v:outside}", {"inside outside"}),
        ("${v=!__uses_default__}${v}${v}", {"99"}),
    ],
)
def test_variables(lists, written, drawn):
    folder = lists(uses="${v} wing\nno wing", sets="${v=inside}${v}", uses_default="${n:9}")
    assert set(expand([written], folder=folder)) == drawn


@pytest.mark.parametrize("written", ["${v}", "{a|b${v}}", "${v}${v=a}", "${v=${v}}", "${w:${v}}", "{2$$${v}|a}"])
def test_a_variable_without_a_value_is_refused(written):
    assert "The variable v has no value in line 2 of mine.txt" in refused(written)


def test_a_variable_that_a_list_needs_is_refused_with_the_line_of_the_list(lists):
    folder = lists(uses="x\n${v} wing", over="__uses__")
    with pytest.raises(PromptError, match=r'variable v has no value in line 2 of .*uses.txt \("\${v} wing"\); set it'):
        expand(["{1000::x|__over__}"], folder=folder)
    assert expand(["${v=a}__over__"], folder=folder)


# What is refused.


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("a {b|c", r"A { has no } in line 2 of mine.txt ("),
        ("a b} c", "A } has no {"),
        ("{a|{b}", "A { has no }"),
        ("{0::a|0.0::b}", "All weights of a choice are 0"),
        ("{" + "9" * 400 + "::a|b}", "weights of a choice are far too large"),
        ("{-1::a|b}", "A :: is not after a weight"),
        ("{::a|b}", "A :: is not after a weight"),
        ("{50%::a|b}", "A :: is not after a weight"),
        ("{__animal__::a|b}", "A :: is not after a weight"),
        ("3::a", "A weight stands before a prompt"),
        ("{3-1$$a|b}", "A count goes from 3 to 1"),
        ("{-0$$a|b}", "A count goes from 1 to 0"),
        ("2$$a|b", "A $$ that isn't after a count"),
        ("{x$$a|b}", "A $$ that isn't after a count"),
        ("{2$$a|b$$c}", "A $$ that isn't after a count"),
        ("{2$$__animal__$$a|b}", "A $$ that isn't after a count"),
        ("{99999999999999999999$$a|b}", "A $$ that isn't after a count"),
        ("{~a|b}", "A sampler"),
        ("{ @a|b}", "A sampler"),
        ("__!animal__", "A sampler"),
        ("3#__animal__", "A list with a number of times"),
        ("__animal(v=a)__", "A list with values for variables"),
        ("{% if a %}", "A Jinja template"),
        ("a /* b */", "A comment between /* and */"),
        ("${v=a|b}", "A | stands in a variable"),
        ("{a|${v=b}}", "A variable is set inside of braces"),
        ("${=b}", "A ${ that doesn't begin a variable"),
        ("${5|10}", "A ${ that doesn't begin a variable"),
        ("${v=3::a}", "A :: is not after a weight"),
        ("__", "Two underscores that don't make a list"),
        ("a ____ b", "Two underscores that don't make a list"),
        ("__animal_", "Two underscores that don't make a list"),
        ("the __ and the __", "Two underscores with a space after them"),
        ("__brid__", "There is no wildcard list brid"),
        ("my__style__v2", "There is no wildcard list style"),
        ("__brids/*__", "There is no wildcard list brids/*"),
        ("__/etc/passwd__", "There is no wildcard list /etc/passwd"),
    ],
)
def test_what_can_not_be_understood_is_refused_by_line(written, why):
    assert why in refused(written)


def test_a_line_of_a_list_is_refused_with_the_file_and_its_number(lists):
    with pytest.raises(PromptError, match=r'A { has no } in line 3 of .*mine.txt \("b\{"\)'):
        expand(["{1000::x|__mine__}"], 1, 0, lists(mine="a\n# comment\nb{"))


@pytest.mark.parametrize(("text", "total"), [("0::a\n0::b", "0"), ("9" * 400 + "::a", "inf")])
def test_weights_of_a_list_that_can_choose_nothing_are_refused(lists, text, total):
    with pytest.raises(PromptError, match=r"weight.* (is far too large|of the list mine are 0 together)"):
        expand(["__mine__"], folder=lists(mine=text))


def test_an_unknown_list_is_refused_even_if_it_might_not_be_drawn(lists):
    folder = lists(bird="owl", sea_in_fish="cod")
    unknown = refused("{1000::a|__brid__}", folder)
    assert "no wildcard list brid for line 2 of mine.txt" in unknown
    assert f"{folder} has bird, sea/fish; built in are a_color, " in unknown
    assert "No folder with lists was given; built in are" in refused("__brid__")


@pytest.mark.parametrize("name", ["../secret", "{}/secret", "lists/../../secret", "..", "./mine"])
def test_no_list_is_read_from_outside_the_folder(lists, name):
    folder = lists(mine="x")
    (folder.parent / "secret.txt").write_text("secret")
    assert "There is no wildcard list" in refused(f"__{name.format(folder.parent)}__", folder)


def test_a_link_that_leads_out_of_the_folder_is_refused(lists):
    folder = lists(mine="x")
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    with pytest.raises(PromptError, match=r"link.txt leads out of the folder of wildcard lists"):
        expand(["__link__"], folder=folder)


@pytest.mark.parametrize(
    ("line", "circle"),
    [("__a__", "a -> b -> a"), ("__start__", "a -> b -> a"), ("__c__", "c -> c"), ("__d__", "d -> d")],
)
def test_lists_that_go_in_circles_are_refused(lists, line, circle):
    folder = lists(a="x\ny {z|__b__}", b="__a__", c="deep __c__\nend", start="{1|__a__}", d="${v=__*d__}x")
    with pytest.raises(PromptError, match=rf"go in circles \({circle}\) in line "):
        expand([line], 1, 0, folder)


def test_a_list_may_come_by_two_ways(lists):
    folder = lists(a="__c__ __b__", b="__c__", c="x")
    assert expand(["__a__ __b__ __c__"], 1, 0, folder) == ["x x x x"]


def test_a_folder_or_a_list_that_can_not_be_read_is_refused(lists, tmp_path):
    with pytest.raises(PromptError, match=r"There is no folder .*nowhere; give the folder with the wildcard lists"):
        expand(["a"], 1, 0, tmp_path / "nowhere")
    with pytest.raises(PromptError, match=r"mine.txt holds no prompts"):
        expand(["__mine__"], 1, 0, lists(mine="# nothing"))


def test_prompts_that_are_all_empty_are_refused():
    assert expand(["{}", "a"]) == ["a"]
    with pytest.raises(PromptError, match=r'Every prompt .* is empty, from line 1 of mine.txt \("{\|}"\) on'):
        expand(["{|}", "{0$$a}"])


@pytest.mark.parametrize("depth", [51, 5000])
@pytest.mark.parametrize(("left", "right"), [("{", "}"), ("${v:", "}"), ("{a|", "|b}")])
def test_braces_may_be_nested_but_not_without_end(depth, left, right):
    assert expand([left * 50 + "x" + right * 50])
    assert "There are braces in braces, more than 50 deep" in refused(left * depth + "x" + right * depth)
    assert "more than 50 deep" in refused(left * depth)


def test_lists_may_lead_to_lists_but_not_without_end(lists):
    folder = lists(l0="x", **{f"l{n}": f"${{v=!__l{n - 1}__}}${{v}}" for n in range(1, 51)})
    assert expand(["__l49__"], 1, folder=folder) == ["x"]
    with pytest.raises(PromptError, match=r"Lists lead to lists, more than 50 deep, in line 1 of .*l1.txt"):
        expand(["__l50__"], folder=folder)
    folder = lists(**{f"l{n}": "{" * 50 + f"__l{n - 1}__" + "}" * 50 for n in range(1, 50)})
    assert expand(["__l49__"], 1, folder=folder) == ["x"]


@pytest.mark.parametrize("last", ["x", "{|}", "${v:}"])
def test_a_prompt_that_grows_without_measure_is_refused(lists, last):
    folder = lists(l0=last, **{f"l{n}": f"__l{n - 1}____l{n - 1}__" for n in range(1, 45)})
    assert "takes more than 20000 characters and choices" in refused("{2-$$__l44__|__l44__}", folder)
    assert "takes more than 20000" in refused("${v=xx}" + "${v=${v}${v}}" * 40 + "${v}")
    assert "takes more than 20000" in refused("x" * 20_001)


def test_broken_syntax_is_refused_or_drawn_whole_and_nothing_else(lists):
    """Random strings of syntax: what is drawn has none of it left, whatever can't be understood is a PromptError."""
    folder = lists(a="owl\n3::{fox|cat}", b_in_c="__a__ ${v:x}\n{2$$y|z}", d="${v}")
    syntax = ["{", "{", "}", "}", "|", "|", "::", "3::", "0::", "$$", "2$$", "1-2$$", "-", "__", "__a__", "__b/*__"]
    syntax += ["__d__", "${v=", "${v=!", "${v:", "${v}", "}", "*", "~", "#", "@", "%", "(w:1.2)", "a", "é", " "]
    syntax += ["{a|", "|b}", "{2$$", "{3::a|", "{__a__|b}", "${v={a|b}}", "{1-2$$__a__}", "\\::"]
    rng, counts = random.Random(0), Counter()
    for _ in range(3000):
        line = "".join(rng.choices(syntax, k=rng.randint(1, 7)))
        try:
            prompts = expand([line, "fine"], 3, 0, folder)
        except PromptError as error:
            counts["refused"] += 1
            counts["without a line"] += not re.search(r"line [12] of (mine|.*/d)\.txt", str(error))
        else:
            counts["drawn"] += 1
            assert not [prompt for prompt in prompts if re.search(r"[{}]|__|\$[{$]", prompt)], line
    assert counts["without a line"] == 0
    assert min(counts["drawn"], counts["refused"]) > 300


# Negative prompts.


def test_empty_negative_prompts_stay():
    lines = numbered(["", "bad", "", "{low|worst} quality"], "--negative")
    assert sorted(expand_negatives(lines, 9, 0)) == ["", "", "bad", "low quality", "worst quality"]
    assert expand_negatives(numbered([""], "--negative"), 9, 0) == [""]
    assert expand_negatives([], 9, 0) == []


def test_each_line_may_be_drawn_once_in_order():
    drawn = draw_each(numbered(["a", "{b|c}", "", "a"], "negative"), 0)
    assert drawn in (["a", "b", "", "a"], ["a", "c", "", "a"])
    with pytest.raises(PromptError, match=r"A { has no } in line 1 of negative"):
        draw_each(numbered(["{a"], "negative"), 0)


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
