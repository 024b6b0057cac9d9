"""The pack as ComfyUI's users meet it: the real server, its API, its files."""

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.tests.support.graphs import base_graph, pixels, train_graph, with_adapter
from comfyui_agd.tests.support.live_server import ROOT, PromptError, Server

PROMPTS = "\n".join(
    f"a {size} {colour} {shape} on a white background"
    for size in ("small", "large")
    for colour in ("red", "blue", "green")
    for shape in ("circle", "star", "ring")
)
NODES = ("AGDAdapterLoader", "AGDApplyAdapter", "AGDEvaluate", "AGDTrain", "AGDTrainSettings")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("comfyui"))
    yield server
    server.close()


def long_graph(name: str, iterations: int, **settings) -> dict:
    """AGD Train with prompts and sizes that make an adapter of some use, and its plot."""
    useful = {"prompts": PROMPTS, "batch": 8, "reuse": 2, "adapter_size": 32, "rank": 4, "learning_rate": 2e-3}
    graph = train_graph(name, iterations, **{**useful, **settings})
    return graph | {"plot": {"class_type": "PreviewImage", "inputs": {"images": ["train", 2]}}}


def evaluate_graph(**settings) -> dict:
    inputs = {
        "model": ["toy", 0],
        "clip": ["toy", 1],
        "vae": ["toy", 2],
        "prompts": "a large red star on a white background\na small blue ring on a white background",
        "negative": "",
        "cfg": 3.0,
        "count": 2,
        "steps": 4,
        "seed": 0,
        "width": 0,
        "height": 0,
        **settings,
    }
    return {
        "toy": {"class_type": "AGDToyLoader", "inputs": {}},
        "evaluate": {"class_type": "AGDEvaluate", "inputs": inputs},
        "picture": {"class_type": "PreviewImage", "inputs": {"images": ["evaluate", 1]}},
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["evaluate", 0]}},
        "closed": {"class_type": "PreviewAny", "inputs": {"source": ["evaluate", 2]}},
    }


@pytest.fixture(scope="module")
def trained(server) -> str:
    """The name of an adapter that AGD Train made through the API."""
    outputs = server.run(long_graph("first", 40, evaluate_every=20, preview_every=20))
    plot = pixels(server.image(outputs, "plot"))
    assert plot.shape == (800, 800, 3)  # loss, and gap closed
    assert len(np.unique(plot.reshape(-1, 3), axis=0)) > 3
    return "first.safetensors"


def test_the_pack_loads_without_complaint(server):
    log = server.log.read_text()
    assert "IMPORT FAILED" not in log
    assert "Traceback" not in log


@pytest.mark.parametrize("node", NODES)
def test_nodes_explain_themselves(server, node):
    info = server.get(f"/object_info/{node}")[node]
    assert info["description"]
    assert info["search_aliases"]
    assert all(info["output_tooltips"])
    for group in info["input"].values():
        without = [name for name, (_, *options) in group.items() if group is not info["input"].get("hidden")
                   and not (options and options[0].get("tooltip"))]  # fmt: skip
        assert without == []
    assert (ROOT / "web" / "docs" / f"{node}.md").exists()


def test_an_adapter_is_trained_where_the_loader_finds_it(server, trained):
    info = server.get("/object_info/AGDAdapterLoader")["AGDAdapterLoader"]
    (kind, options) = info["input"]["required"]["adapter_name"]
    assert trained in (kind if isinstance(kind, list) else options["options"])
    described = adapter_file.load_weights(server.adapters / trained)[0]
    assert described.training["iterations"] == 40
    assert described.omega_range == (1.0, 6.0)


def test_sampling_with_the_adapter_and_without_it_before_and_after(server, trained):
    before = server.image(server.run(base_graph()), "save")
    guided = server.image(server.run(with_adapter(base_graph(), trained)), "save")
    other = server.image(server.run(with_adapter(base_graph(), trained, strength=0.5)), "save")
    unguided = server.image(server.run(base_graph(cfg=1.0)), "save")
    after = server.image(server.run(base_graph(seed=6)), "save"), server.image(server.run(base_graph()), "save")
    assert not np.array_equal(pixels(guided), pixels(unguided))
    assert not np.array_equal(pixels(guided), pixels(other))
    assert np.array_equal(pixels(after[1]), pixels(before))
    assert not np.array_equal(pixels(after[0]), pixels(before))


def test_adapters_of_extra_model_paths_are_found(server, trained):
    (server.extra / "elsewhere.safetensors").write_bytes((server.adapters / trained).read_bytes())
    server.run(with_adapter(base_graph(), "elsewhere.safetensors"))


def test_a_changed_file_is_noticed(server, trained):
    copy = server.adapters / "changing.safetensors"
    copy.write_bytes((server.adapters / trained).read_bytes())
    first = server.image(server.run(with_adapter(base_graph(), copy.name)), "save")
    info, adapter = adapter_file.load(copy)
    for parameter in adapter.parameters():
        parameter.data *= 1.5
    adapter_file.save(copy, adapter, info)
    second = server.image(server.run(with_adapter(base_graph(), copy.name)), "save")
    assert not np.array_equal(pixels(first), pixels(second))


def test_a_damaged_adapter_is_one_clear_error(server, trained):
    (server.adapters / "damaged.safetensors").write_bytes(b"half of a file")
    with pytest.raises(PromptError, match=r"damaged.safetensors .14 bytes. is not a readable safetensors file"):
        server.run(with_adapter(base_graph(), "damaged.safetensors"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("no_such.safetensors", "There is no adapter 'no_such.safetensors' in"), ("", "There are no adapters yet in")],
)
def test_a_missing_adapter_is_refused_before_anything_runs(server, name, message):
    with pytest.raises(PromptError, match=message) as error:
        server.run(with_adapter(base_graph(), name))
    assert str(server.adapters) in str(error.value)
    assert "make one with AGD Train" in str(error.value)


def test_the_loader_tells_what_a_file_was_trained_on(server, trained):
    graph = with_adapter(base_graph(), trained)
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["agd", 1]}}
    (text,) = server.run(graph)["show"]["text"]
    assert "ToyConfig (EPS-prediction, 7 cross-attentions of width 64/128, context 128)" in text
    assert re.search("^guidance scale +1 to 6$", text, re.MULTILINE)
    assert re.search(r"^training: iterations +40$", text, re.MULTILINE)


def test_an_adapter_straight_from_training_gives_what_its_file_gives(server, trained):
    graph = {**base_graph(), **long_graph("first", 40)}
    use = {"strength": 1.0, "guidance_scale": 0.0, "start_percent": 0.0, "end_percent": 1.0}
    inputs = {"model": ["toy", 0], "adapter": ["train", 3], **use}
    graph["apply"] = {"class_type": "AGDApplyAdapter", "inputs": inputs}
    graph["sampler"]["inputs"]["model"] = ["apply", 0]
    direct = server.image(server.run(graph), "save")
    assert np.array_equal(pixels(direct), pixels(server.image(server.run(with_adapter(base_graph(), trained)), "save")))


def test_what_the_user_should_know_is_on_the_node_and_in_the_log_once(server, trained):
    # A range of its own, so that no other test's loader is reused.
    def graph(seed: int, sampler: str) -> dict:
        graph = with_adapter(base_graph(cfg=30.0, seed=seed), trained, end_percent=0.999)
        graph["sampler"]["inputs"]["sampler_name"] = sampler
        return graph

    server.run(graph(1, "euler"))
    assert server.texts["agd"] == "Guidance scale 30 is outside the adapter's range, 1 to 6."
    server.run(graph(3, "euler_cfg_pp"))
    assert server.texts["agd"].startswith("No speed-up: the sampler euler_cfg_pp needs both predictions.")
    server.run(graph(4, "euler_cfg_pp"))
    log = server.log.read_text()
    assert log.count("AGD: No speed-up: the sampler euler_cfg_pp needs both predictions") == 1
    assert log.count("AGD: Guidance scale 30 is outside") == 1


def test_training_shows_what_it_does_and_reports_at_the_end(server, trained):
    folder = server.adapters / "first.run"
    assert {path.name for path in (folder / "previews").iterdir()} == {"step-000020.png", "step-000040.png"}
    assert re.match(r"Gap closed -?\d+%, first\.safetensors\.\n", server.texts["train"])
    assert "Gap closed on prompts that were not trained with (3)" in server.texts["train"]
    assert server.previews > 0
    log = server.log.read_text()
    for begun in (
        "Counting what a step takes: 0/",
        "Encoding prompts: 0/",
        "Training: 0/40",
        "Measuring the adapter: 0/",
    ):
        assert f"AGD: {begun}" in log
    assert re.search(r"AGD: Needs [\d.]+ [MG]B, about [\d.]+( to [\d.]+)? s on this machine\.", log)
    assert "AGD: Gap closed " in log


def without(server, name: str, unwanted: str) -> np.ndarray:
    graph = with_adapter(base_graph(prompt="a large star on a white background"), name)
    graph["negative"]["inputs"]["text"] = unwanted
    return pixels(server.image(server.run(graph), "save"))


def test_the_negative_prompt_is_heard_with_a_trained_adapter_and_without_training(server, trained):
    ways = (trained, "training-free", "attention-guidance")
    pictures = [without(server, name, "") for name in ways]
    for name, picture in zip(ways, pictures, strict=True):
        assert not np.array_equal(picture, without(server, name, "red"))
    assert not any(np.array_equal(*pair) for pair in itertools.combinations(pictures, 2))


def test_a_scale_adapter_is_where_training_may_begin(server):
    server.run(long_graph("scale", 5, kind="scale"))
    assert adapter_file.read_info(server.adapters / "scale.safetensors").config.kind.name == "scale"
    server.run(long_graph("begun", 2, start="scale.safetensors", learning_rate=1e-5))
    begun, scale = (
        adapter_file.load_weights(server.adapters / f"{name}.safetensors")[1] for name in ("begun", "scale")
    )
    found, start = begun["kind.scale.to_scale.weight"], scale["kind.to_scale.weight"]
    assert np.allclose(found.numpy(), start.numpy(), atol=1e-4)


def test_an_adapter_that_does_not_hear_the_negative_prompt_says_so(server):
    server.run(long_graph("deaf", 2, kind="offset"))
    without(server, "deaf.safetensors", "a large blue ring")
    assert "The adapter ignores the negative prompt" in server.texts["agd"]


@pytest.mark.parametrize(
    ("node", "field"),
    [
        ("AGDTrain", "prompts"),
        ("AGDTrainSettings", "negative"),
        ("AGDEvaluate", "prompts"),
        ("AGDEvaluate", "negative"),
    ],
)
def test_the_browser_leaves_wildcards_and_comments_in_prompts_to_the_node(server, node, field):
    fields = server.get(f"/object_info/{node}")[node]["input"]["required"]
    assert not fields[field][1].get("dynamicPrompts")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": "fine\na {red star"}, "A { has no } in line 2 of prompts"),
        ({"negative": "fine\nlow {quality"}, "A { has no } in line 2 of negative"),
        ({"prompts": "fine\na \ud83d star"}, r"U.D83D can't be part of a prompt, but is in line 2 of prompts"),
        ({"adapter_name": "../../escape"}, "No adapter can be called '../../escape'"),
        ({"card": "8 GB", "width": 8192, "height": 8192}, "which has 7.5 GB for it; it would fit with"),
    ],
)
def test_bad_training_input_is_one_clear_sentence(server, settings, message):
    with pytest.raises(PromptError, match=message):
        server.run(long_graph("bad", 5, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 10**30}, "Value 10{30} bigger than max of 4096.*batch"),
        ({"learning_rate": 0.0}, "Value 0.0 smaller than min of 1e-05.*learning_rate"),
        ({"quality": "perfect"}, "'perfect' not in .*quick.*normal.*best"),
        ({"guidance_scale_up_to": 1.0}, "Value 1.0 smaller than min of 1.1.*guidance_scale_up_to"),
        ({"prompts": "a {\x1b[2J\u202e<b>"}, r"in line 1 of prompts .*\[2J\\u202e"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name_and_nothing_is_written(server, settings, message):
    before = sorted(server.adapters.rglob("*"))
    with pytest.raises(PromptError, match=message) as refused:
        server.run(long_graph("refused", 5, **settings))
    assert not re.search("[\x1b\u202e]", str(refused.value))
    assert sorted(server.adapters.rglob("*")) == before


def test_quality_is_how_long_is_trained_and_numbers_may_be_linked(server):
    graph = train_graph("by_quality", kind="scale", quality="quick", reuse=8)
    del graph["settings"]["inputs"]["length.iterations"]
    graph["batch"] = {"class_type": "PrimitiveInt", "inputs": {"value": 1}}
    graph["settings"]["inputs"] |= {"length": "as quality says", "batch": ["batch", 0]}
    server.run(graph)
    found = adapter_file.read_info(server.adapters / "by_quality.safetensors").training["config"]
    assert (found["iterations"], found["batch"]) == (50, 1)


SCRIPT = "<script>alert(1)</script>"
EVIL = f"{SCRIPT}\x1b[2J\x9b31m\u202e\u2028\nFAKE: a line of ours"


def test_text_of_a_hostile_file_is_read_and_does_nothing(server, trained):
    info, adapter = adapter_file.load(server.adapters / trained)
    base, training = replace(info.base, fingerprint=EVIL), {**info.training, "note": EVIL}
    hostile = replace(info, base=base, unconditional=EVIL, training=training)
    name = "<img src=x onerror=alert(2)>\u202e.safetensors"
    adapter_file.save(server.adapters / name, adapter, hostile)
    foreign = replace(hostile, base=replace(base, family=EVIL))
    adapter_file.save(server.adapters / "foreign.safetensors", adapter, foreign)
    graph = with_adapter(base_graph(cfg=30.0, seed=9), name)
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["agd", 1]}}
    said = []
    for each in (graph, evaluate_graph(adapter_name=name), with_adapter(base_graph(), "foreign.safetensors")):
        try:
            said.append(json.dumps(server.run(each), ensure_ascii=False))
        except PromptError as error:  # a file may be refused for what it says
            said.append(str(error))
    shown = [server.texts.get("agd", ""), server.texts.get("evaluate", "")]
    log = server.log.read_text()
    for text in (*said, *shown, log):
        assert not re.search("\x1b\\[2J|\x9b|\u202e|\u2028", text)
        assert not re.search("^FAKE", text, re.MULTILINE)
    assert not re.search("<script|<img", "".join(shown))


def test_an_interrupted_training_keeps_its_state_and_goes_on(server):
    graph = long_graph("interrupted", 61, seed=3)
    prompt_id, types, seen = server.queue(graph), [], 0
    for event in server.events(prompt_id):
        types.append(event["type"])
        if event["type"] == "progress" and event["data"]["max"] == 61 and seen < 10:  # of iterations
            seen = event["data"]["value"]  # some are left out where steps are fast
            if seen >= 10:
                server.post("/interrupt", {})
    assert types[-1] == "execution_interrupted"
    file, folder = server.adapters / "interrupted.safetensors", server.adapters / "interrupted.run"
    assert not file.exists()
    assert len(list(folder.glob("state-*.pt"))) == 1

    prompt_id, first = server.queue(graph), None
    for event in server.events(prompt_id):
        if event["type"] == "progress" and event["data"]["max"] == 61 and first is None:
            first = event["data"]["value"]
        assert event["type"] != "execution_error", event["data"]["exception_message"]
    assert first >= seen >= 10
    assert not list(folder.glob("state-*.pt"))
    assert file.exists()


def test_an_adapter_is_evaluated_and_shown_beside_cfg(server, trained):
    outputs = server.run(evaluate_graph(adapter_name=trained))
    (report,), (closed,) = (outputs[node]["text"] for node in ("report", "closed"))
    assert server.texts["evaluate"] == report
    assert f"Adapter {trained} on ToyConfig" in report
    assert "the checkpoint that it was trained on" in report
    assert "CFG: " in report
    assert "2.00 model evaluations per step" in report
    assert f"cfg 3: gap closed {float(closed):.3f} ±" in report
    assert 0.01 < float(closed) < 1
    picture = pixels(server.image(outputs, "picture"))
    unguided, cfg, agd, difference = (picture[56:312, 264 * i : 264 * i + 256].astype(int) for i in range(4))
    assert not np.array_equal(unguided, cfg)
    assert not np.array_equal(agd, cfg)
    # Each is enlarged by itself.
    assert abs(difference - (agd - cfg + 128).clip(0, 255)).mean() < 1


def test_an_adapter_straight_from_training_is_evaluated(server, trained):
    graph = {**evaluate_graph(adapter=["train", 3]), **long_graph("second", 3)}
    (report,) = server.run(graph)["report"]["text"]
    assert "Adapter of AGD Train, second.safetensors on ToyConfig" in report


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "There are no adapters yet in"),
        ({"adapter_name": "gone.safetensors"}, "There is no adapter 'gone.safetensors'"),
        ({"adapter_name": "first.safetensors", "prompts": " "}, "There are no prompts to evaluate with"),
        ({"adapter_name": "first.safetensors", "negative": "low {quality"}, "A { has no } in line 1 of negative"),
        ({"adapter_name": "first.safetensors", "width": 32}, "width is 32, but must be 64 or more"),
        ({"adapter_name": "first.safetensors", "model": ["agd", 0]}, "This model has an AGD adapter already"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_sentence(server, trained, settings, message):
    graph = evaluate_graph(**settings)
    graph["agd"] = with_adapter(base_graph(), trained)["agd"]
    with pytest.raises(PromptError, match=message):
        server.run(graph)


def test_an_interrupt_ends_an_evaluation(server, trained):
    prompt_id, types = server.queue(evaluate_graph(adapter_name=trained, count=500)), []
    for event in server.events(prompt_id):
        types.append(event["type"])
        if event["type"] == "progress" and types.count("progress") == 3:
            server.post("/interrupt", {})
    assert types[-1] == "execution_interrupted"
    assert types.count("progress") < 500


def test_an_adapter_of_other_weights_is_said_to_be_one(server, trained):
    info, adapter = adapter_file.load(server.adapters / trained)
    sibling = replace(info, base=replace(info.base, fingerprint="another"))
    adapter_file.save(server.adapters / "sibling.safetensors", adapter, sibling)
    server.run(with_adapter(base_graph(), "sibling.safetensors"))
    assert server.texts["agd"].startswith("Trained on other weights: see how it fits with AGD Evaluate.")
    server.run(evaluate_graph(adapter_name="sibling.safetensors"))
    assert "other weights than those of its training" in server.texts["evaluate"]
