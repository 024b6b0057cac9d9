"""The command line as far as it gets without ComfyUI: flags, config files, and what is refused before the long work."""

import dataclasses
import io
import re
import signal
import sys
from pathlib import Path

import pytest

from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.training import cli
from comfyui_agd.training.arguments import parse
from comfyui_agd.training.assess import AssessConfig
from comfyui_agd.training.config import TrainConfig, settings_of_kind
from comfyui_agd.training.job import to_toml
from comfyui_agd.training.presets import check_chosen
from comfyui_agd.training.progress import PHASES, Progress

EVALUATE = ("evaluate", "a.safetensors", "--loader", "some.module:load")
BASE = ("train", "--loader", "some.module:load", "--output", "a.safetensors")
WITH_LORA = ("train", "--checkpoint", "c.safetensors", "--output", "a.safetensors", "--lora")
INTERVAL = ("--teacher", "interval", "--interval-sigma-min", "3", "--interval-sigma-max", "2")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("f", dataclasses.fields(TrainConfig), ids=lambda f: f.name)
def test_every_setting_has_a_flag_and_a_key_in_a_config_file(folder, f):
    value = not f.default if isinstance(f.default, bool) else f.default
    (folder / "c.toml").write_text(to_toml({f.name: value}))
    assert cli._chosen(parse([*BASE, "--config", "c.toml"])) == {f.name: value}


def test_flags_win_over_the_config_file(folder):
    (folder / "c.toml").write_text('iterations = 7\nbatch = 2\nloader = "other:load"\n')
    args = parse([*BASE, "--config", "c.toml", "--iterations", "9"])
    assert cli._chosen(args) == {"iterations": 9, "batch": 2}
    assert args.loader == "some.module:load"


def test_quality_is_a_flag_and_a_line_of_a_config_file(tmp_path):
    (tmp_path / "c.toml").write_text('quality = "best"\n')
    assert parse([*BASE]).quality == "normal"
    assert parse([*BASE, "--quality", "quick"]).quality == "quick"
    assert parse([*BASE, "--config", f"{tmp_path / 'c.toml'}"]).quality == "best"


def test_a_card_is_its_memory_unless_memory_is_given():
    assert cli._chosen(parse([*BASE, "--card", "12 GB"])) == {"memory": 11.5}
    assert cli._chosen(parse([*BASE, "--card", "12 GB", "--memory", "5"])) == {"memory": 5.0}


def test_help_names_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--iterations N optimiser steps [1500; scale: 150]" in text
    assert "--solvers NAME [NAME ...]" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iterations = = 3", "can't be read"),
        ("iteratons = 3", "unknown settings: iteratons"),
        ('iterations = "many"', "c.toml can't be used: iterations is 'many', but must be a whole number"),
        ("iterations = [3]", "must be one value"),
        ('schedulers = "karras"', "must be a list"),
        ("iterations = 5.0", "iterations is 5.0, but must be a whole number"),
        ("iterations = true", "iterations is true, but must be a whole number"),
        ("iterations = 1000000000000000000000000000000", "iterations is 10{30}, but must be from 1 to 1000000"),
        ("iterations = 2026-01-31", r"iterations is datetime.date\(2026, 1, 31\), but must be a whole number"),
        ("learning_rate = inf", "learning_rate is inf, but must be from"),
        ("learning_rate = nan", "learning_rate is nan, but must be from"),
        ("learning-rate = 1e400", "learning_rate is inf, but must be from"),
        ("[batch]\nsize = 4", "batch is an object of 1, but must be a whole number"),
        ("gain = 1", "gain is 1, but must be true or false"),
        ("dry_run = 1", "dry_run is 1, but must be true or false"),
        ("lora = [3]", "lora is 3, but must be a text"),
        ("schedulers = [3]", "schedulers is 3, but must be a text"),
        ("aspect_ratios = [['1:1']]", r"aspect_ratios is a list of 1, but must be a text"),
        ("output = 3", "output is 3, but must be a text"),
        ("prompt_count = 0", "prompt_count is 0, but must be from 1 to"),
        ("prompt_count = 2.5", "prompt_count is 2.5, but must be a whole number"),
        ('card = "99 GB"', "card is '99 GB', but must be one of 8 GB, 12 GB, 16 GB, 24 GB, 32 GB"),
        ('base_dtype = "fp4"', "base_dtype is 'fp4', but must be one of"),
        ("seed = -1\nbatch = 0", "batch is 0, .*; seed is -1, but must be from 0 to 18446744073709551615"),
    ],
)
def test_a_bad_config_file_is_one_sentence(folder, capsys, text, message):
    (folder / "c.toml").write_text(text)
    assert cli.main([*BASE, "--config", "c.toml"]) == 1
    assert re.search(message, refused(capsys))


def refused(capsys) -> str:
    """The one sentence on standard error."""
    text = capsys.readouterr().err
    assert text.startswith("agd: ")
    assert "Traceback" not in text
    return text


def fails(capsys, message: str, *args: str) -> None:
    assert cli.main([*args]) == 1
    assert message in refused(capsys)


NUMBERS = [f for f in dataclasses.fields(TrainConfig) if f.type in (int, float)]


@pytest.mark.parametrize("f", NUMBERS, ids=lambda f: f.name)
def test_a_number_that_no_run_could_have_is_refused_by_its_name(folder, capsys, f):
    wrong = ("inf", "nan", "1e400", "-inf") if f.type is float else (f"1{'0' * 30}", f"-1{'0' * 30}")
    for value in wrong:
        fails(capsys, f"{f.name} is ", *BASE, f"--{f.name.replace('_', '-')}={value}")
    assert list(folder.iterdir()) == []


def test_the_other_numbers_of_commands_are_refused_by_their_names(folder, capsys):
    record = ("record", "--loader", "some.module:load", "--output", "recording")
    export = ("export", "a.safetensors", "b.safetensors")
    fails(capsys, "prompt_count is 0, but must be from 1 to", *BASE, "--prompt-count", "0")
    fails(capsys, "batches is -1, but must be from 0 to", *record, "--batches", "-1")
    fails(capsys, "omega is inf, but must be from 0.01 to", *export, "--omega", "inf")
    fails(capsys, "omega is nan, but must be from 1.01 to", "evaluate", "a.safetensors", "--omega", "2", "nan")
    fails(capsys, "The strength of the LoRA a.safetensors is inf", *WITH_LORA, "a.safetensors:inf")
    fails(capsys, "The strength of the LoRA a.safetensors is nan", *WITH_LORA, "b.safetensors:1", "a.safetensors:nan")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_does_not_have_is_refused_before_anything_is_loaded(folder, capsys, kind):
    flags = {"hidden": "--hidden=64", "rank": "--rank=4", "shared_encoder": "--shared-encoder", "vector": "--vector=9"}
    for name in flags.keys() - set(settings_of_kind(kind)):
        fails(capsys, f"An adapter of kind {kind} has no {name}", *BASE, "--kind", kind, flags[name])
        (folder / "c.toml").write_text(to_toml({"kind": kind, name: getattr(TrainConfig, name)}))
        fails(capsys, f"An adapter of kind {kind} has no {name}", *BASE, "--config", "c.toml")


@pytest.mark.parametrize(("kind", "rank"), [("low_rank", 16), ("delta", 4), ("scale", None)])
def test_a_config_file_of_before_kinds_had_their_own_settings_goes_on(folder, kind, rank):
    (folder / "c.toml").write_text(to_toml(dataclasses.asdict(TrainConfig(kind=kind, hidden=16, rank=4))))
    chosen = check_chosen(cli._chosen(parse([*BASE, "--config", "c.toml"])))
    assert getattr(chosen.kind_config(), "rank", None) == rank
    assert chosen.own_settings().keys() >= set(settings_of_kind(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_runs_own_config_file_gives_its_settings_again(folder, kind):
    config = TrainConfig(kind=kind, rank=9, hidden=12, aspect_ratios=("3:2",), memory=7.5)
    (folder / "c.toml").write_text(to_toml(config.own_settings()))
    again = check_chosen(cli._chosen(parse([*BASE, "--config", "c.toml"])))
    assert again.own_settings() == config.own_settings()


@pytest.mark.parametrize("name", ["loader", "comfyui"])
def test_code_that_a_config_file_names_is_not_run_unless_the_command_line_names_it_too(folder, capsys, name):
    (folder / "c.toml").write_text(f'{name} = "some where; rm x\\u001b"\n')
    base = ("train", "--output", "a.safetensors", "--config", "c.toml")
    message = f"c.toml names code to run: if you trust it, say so on the command line, with --{name} 'some where; rm x"
    fails(capsys, message, *base)
    assert str(getattr(parse([*base, f"--{name}", "mine"]), name)) == "mine"


def test_bad_settings_are_refused_before_anything_is_loaded(capsys):
    fails(capsys, "omega_min is -2.0, but must be from 0.01 to 1000", *BASE, "--omega-min", "-2")
    fails(
        capsys,
        "the guidance scale goes from 8.0 (omega_min) to 4.0 (omega_max)",
        *BASE,
        "--omega-min",
        "8",
        "--omega-max",
        "4",
    )
    fails(capsys, "solvers is 'plms', but must be one of", *BASE, "--solvers", "euler", "plms")
    fails(capsys, "aspect ratio 'wide' is not like 3:2", *BASE, "--aspect-ratios", "wide")
    fails(capsys, "rescale_phi is 2.0, but must be from 0 to 1", *BASE, "--teacher", "rescale", "--rescale-phi", "2")
    fails(capsys, "goes from noise level 3.0 to 2.0, but must rise", *BASE, *INTERVAL)
    fails(capsys, "choose high noise or low noise under noise levels", *BASE, "--other-expert", "low.safetensors")
    fails(capsys, "must be a file that ends in .safetensors", *BASE[:-1], "a.ckpt")
    fails(capsys, "Give the adapter file to write", *BASE[:-2])
    fails(capsys, "--negative or --negatives, not both", *BASE, "--negative", "blurry", "--negatives", "built-in")


@pytest.mark.parametrize("command", ["train", "calibrate", "export"])
@pytest.mark.parametrize(
    "name", [".safetensors", "..safetensors", "   .safetensors", "mine .safetensors", "mine..safetensors",
             "nul.safetensors", "a\nb.safetensors", "a\\b.safetensors"]
)  # fmt: skip
def test_a_name_that_no_loader_could_list_is_refused_before_anything_is_loaded(folder, capsys, command, name):
    given = ("a.safetensors", name, "--omega", "3") if command == "export" else ("--loader", "a:b", "--output", name)
    fails(capsys, "No adapter can be called", command, *given)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("output", ["", ".", "..", "   ", "mine", "mine.ckpt", "sdxl/"])
def test_an_output_that_is_no_adapter_file_is_refused_before_anything_is_loaded(folder, capsys, output):
    fails(capsys, "must be a file that ends in .safetensors", *BASE[:-1], output)
    assert list(folder.iterdir()) == []


def test_bad_settings_of_an_evaluation_are_refused_before_anything_is_loaded(folder, capsys):
    prompts = (*EVALUATE, "--prompts", "a red star")
    fails(capsys, "Give prompts to evaluate with", *EVALUATE)
    fails(capsys, "There is no file gone.txt", *EVALUATE, "--prompts", "gone.txt")
    fails(capsys, "has no } in line 1 of --prompts (", *EVALUATE, "--prompts", "a {red star")
    fails(capsys, "omega is 1.0, but must be from 1.01 to 100", *prompts, "--omega", "1", "3")
    fails(capsys, "steps is 0, but must be from 1 to 1000", *prompts, "--steps", "0")
    fails(capsys, "must end in .json, in a folder that exists", *prompts, "--json", "elsewhere/a.json")
    fails(capsys, "must end in .png or .jpg or .webp", *prompts, "--picture", "a.safetensors")
    fails(capsys, "There is no adapter file a.safetensors", *prompts)


def test_prompts_to_evaluate_with_are_a_file_or_texts(folder):
    (folder / "many").write_text("a red star\n# no\na blue ring\n")
    config = AssessConfig(count=2)
    assert cli._given(["many"], config) == ["a red star", "a blue ring"]
    assert cli._given(["a green cross"], config) == ["a green cross"]
    assert len(set(cli._given(["a {red|green|blue} cross"], config))) == 2
    assert cli._given(["x" * 300, "a red star"], config) == ["x" * 300, "a red star"]
    assert cli._given(["x" * 300], config) == ["x" * 300]  # too long for a file's name


def test_negative_prompts_are_drawn_by_the_rules_of_prompts(folder, capsys):
    def drawn(*given: str) -> list[str]:
        return cli._negatives(parse([*BASE, *given]), 0, 9)

    (folder / "negatives.txt").write_text("# no\n{low|worst} quality\nblurry\n")
    assert sorted(drawn("--negative", "", "{low|worst} quality")) == ["", "low quality", "worst quality"]
    assert sorted(drawn("--negatives", "negatives.txt")) == ["blurry", "low quality", "worst quality"]
    assert drawn() == []
    fails(capsys, "has no } in line 2 of --negative (", *BASE, "--negative", "fine", "low {quality")
    fails(capsys, "has no } in line 1 of --negative (", *EVALUATE, "--prompts", "a star", "--negative", "low {quality")


def test_verbatim_leaves_negative_prompts_alone_too(folder):
    (folder / "negatives.txt").write_text("# a {\nb b\n")
    for given in (["--negative", "# a {", "b b"], ["--negatives", "negatives.txt"]):
        assert cli._negatives(parse([*BASE, "--verbatim", *given]), 0, 9) == ["# a {", "b b"]


def test_bad_prompt_files_are_refused_before_anything_is_loaded(folder, capsys):
    (folder / "empty.txt").write_text("\n# nothing\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "open.txt").write_text("a {red|blue star\n")
    fails(capsys, "holds no prompts", *BASE, "--prompts", "empty.txt")
    fails(capsys, "UTF-8", *BASE, "--prompts", "latin.txt")
    fails(capsys, "has no } in line 1 of open.txt (", *BASE, "--prompts", "open.txt")
    fails(capsys, "There is no file gone.txt", *BASE, "--prompts", "gone.txt")


def test_a_folder_that_is_no_recording_is_refused(folder, capsys):
    fails(capsys, "is no recording", *BASE, "--recording", str(folder))


def test_what_is_no_adapter_is_not_inspected(folder, capsys):
    (folder / "lora.safetensors").write_bytes(b"nothing")
    fails(capsys, "is not a readable safetensors file", "inspect", "lora.safetensors")


class Terminal(io.StringIO):
    """Standard error that someone watches."""

    def isatty(self) -> bool:
        return True


def show_a_run(bar: cli.ProgressBar) -> None:
    for phase, total in (("encode", 3), ("train", 2), ("rollout", 5)):
        bar(Progress(phase, 0, total))
    bar(Progress("rollout", 5, 5, seconds_left=0.0))
    bar(Progress("train", 1, 2, loss=0.5, gap_closed=0.25, seconds_left=150.0))


def test_a_terminal_has_a_bar_for_each_phase_and_that_of_training_stays(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = cli.ProgressBar()
    show_a_run(bar)
    assert list(bar.bars) == ["train"]
    bar(Progress("measure", 0, 7))
    assert list(bar.bars) == ["train", "measure"]
    bar.close()
    painted = sys.stderr.getvalue()
    for phase in ("encode", "train", "rollout", "measure"):
        assert f"{PHASES[phase]}:   0%" in painted
    last = painted.rsplit("Training: ", 1)[1]
    assert re.match(r" 50%.* 1/2 .*2 min left, gap closed 25%, loss 0.5000", last)


def test_where_nobody_watches_there_are_lines(capsys):
    show_a_run(cli.ProgressBar())
    assert capsys.readouterr().err.splitlines() == [
        "Encoding prompts: 0/3",
        "Training: 0/2",
        "Sampling with guidance, to learn from: 0/5",
    ]


def test_a_quiet_bar_of_a_further_process_says_nothing(capsys):
    show_a_run(cli.ProgressBar(quiet=True))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_ends_any_phase_at_its_next_report(phase, sent):
    bar = cli.ProgressBar()
    with bar.stopped_by_signals():
        bar(Progress(phase, 0, 2))
        signal.raise_signal(sent)
        with pytest.raises(KeyboardInterrupt):
            bar(Progress(phase, 1, 2))


def test_ctrl_c_before_a_run_begins_is_no_traceback(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "train", interrupted)
    fails(capsys, "agd: Stopped.", *BASE)


def test_calibrate_trains_a_scale_adapter_and_no_other(capsys, tmp_path):
    (tmp_path / "c.toml").write_text('kind = "delta"')
    for given in (("--kind", "delta"), ("--config", str(tmp_path / "c.toml"))):
        fails(capsys, "agd calibrate trains kind scale: for kind delta there is `agd train`.", "calibrate", *given)
