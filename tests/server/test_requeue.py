"""Prompt after prompt in one real server: nothing runs twice, nothing mixes, nothing piles up, bad files stay out."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.tests.support.graphs import base_graph, pixels, with_adapter
from comfyui_agd.tests.support.live_server import PromptError, Server
from comfyui_agd.tests.support.requeue import load_base, write_adapter

pytestmark = pytest.mark.slow
MEGABYTE = 2**20
FIRST, SECOND = "adapter_0.safetensors", "adapter_1.safetensors"
SAMPLED = {"sampler", "decode", "save"}  # what any change of the model or of cfg runs again


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> dict[str, Server]:
    """Servers that keep results in each of ComfyUI's ways, with the same two adapters."""
    stored, toy = tmp_path_factory.mktemp("adapters"), load_base("toy")
    for seed in range(2):
        write_adapter(stored, toy, seed, hidden=32)

    def start(flags: str) -> Server:
        server = Server(tmp_path_factory.mktemp("comfyui") / "base", *flags.split())
        shutil.copytree(stored, server.adapters, dirs_exist_ok=True)
        return server

    flags = ("", "--cache-none", "--cache-lru 3")
    with ThreadPoolExecutor() as pool:
        servers = dict(zip(flags, pool.map(start, flags), strict=True))
    yield servers
    for server in servers.values():
        server.close()


@pytest.fixture(scope="module")
def server(servers) -> Server:
    """As ComfyUI is started by default."""
    return servers[""]


def picture(server: Server, graph: dict) -> np.ndarray:
    return pixels(server.image(server.run(graph), "save"))


def events_of(server: Server, graph: dict) -> list[dict]:
    return list(server.events(server.queue(graph)))


def executed(events: list[dict]) -> set[str]:
    return {event["data"]["node"] for event in events if event["type"] == "executing"}


def variants() -> list[dict]:
    """Ten prompts that differ in adapter, cfg, strength, text, and in whether there is a loader at all."""
    short = partial(base_graph, steps=3)
    return [
        short(),
        with_adapter(short(), FIRST),
        with_adapter(short(), SECOND),
        with_adapter(short(cfg=6.0), FIRST),
        with_adapter(short(), FIRST, strength=0.5),
        short(cfg=1.0),
        with_adapter(short(cfg=1.0), FIRST, guidance_scale=3.0),
        with_adapter(short(prompt="a small blue ring on a white background"), SECOND),
        with_adapter(short(), FIRST, strength=0.0),
        with_adapter(short(), SECOND, start_percent=0.3, end_percent=0.8),
    ]


@pytest.fixture(scope="module")
def expected(servers) -> list[np.ndarray]:
    """Each variant alone, where nothing of the one before is kept."""
    return [picture(servers["--cache-none"], graph) for graph in variants()]


def test_queueing_the_same_again_runs_nothing(server):
    graph = with_adapter(base_graph(seed=100), FIRST)
    assert executed(events_of(server, graph)) >= SAMPLED | {"agd"}
    loads = server.log.read_text().count("Requested to load")
    events = events_of(server, graph)
    (cached,) = (event["data"]["nodes"] for event in events if event["type"] == "execution_cached")
    assert set(cached) == set(graph)
    assert executed(events) == set()
    assert server.log.read_text().count("Requested to load") == loads


@pytest.mark.parametrize(
    ("changed", "runs"),
    [
        (with_adapter(base_graph(seed=101, cfg=4.0), FIRST), SAMPLED),
        (with_adapter(base_graph(seed=102), FIRST), SAMPLED),
        (with_adapter(base_graph(seed=101, prompt="a large blue ring"), FIRST), SAMPLED | {"positive"}),
        (with_adapter(base_graph(seed=101), FIRST, strength=0.7), SAMPLED | {"agd"}),
        (with_adapter(base_graph(seed=101), SECOND, strength=0.7), SAMPLED | {"agd"}),
        (base_graph(seed=101), SAMPLED),
    ],
    ids=["cfg", "seed", "prompt", "strength", "adapter", "bypass"],
)
def test_a_change_runs_what_depends_on_it(server, changed, runs):
    server.run(with_adapter(base_graph(seed=101), FIRST))
    assert executed(events_of(server, changed)) == runs


def test_ten_prompts_queued_at_once_give_what_each_gives_alone(server, expected):
    assert len({image.tobytes() for image in expected}) == 8  # two are the base itself, two the same omega
    queued = [server.queue(graph) for graph in variants()]
    for prompt_id, alone in zip(queued, expected, strict=True):
        list(server.events(prompt_id))
        outputs = server.get(f"/history/{prompt_id}")[prompt_id]["outputs"]
        assert np.array_equal(pixels(server.image(outputs, "save")), alone)


@pytest.mark.parametrize("flags", ["--cache-none", "--cache-lru 3"])
def test_fifty_changes_keep_memory_flat_and_pictures_as_they_were(servers, expected, flags):
    server = servers[flags]
    process, memory = psutil.Process(server.process.pid), []
    for i in range(50):
        image = picture(server, variants()[i % 10])
        assert np.array_equal(image, expected[i % 10])
        memory.append(process.memory_info().rss / MEGABYTE)
    assert memory[49] - memory[14] < 8, memory
    assert "memory leak" not in server.log.read_text()


# Files


def test_a_file_deleted_between_two_prompts_is_a_clear_error_until_it_is_back(server):
    file = server.adapters / "deleted.safetensors"
    shutil.copy(server.adapters / FIRST, file)
    graph = with_adapter(base_graph(seed=200), file.name)
    before = picture(server, graph)
    file.unlink()
    with pytest.raises(PromptError, match=r"There is no adapter 'deleted\.safetensors'") as error:
        server.run(graph)
    assert str(server.adapters) in str(error.value)
    shutil.copy(server.adapters / FIRST, file)
    assert np.array_equal(picture(server, graph), before)


def test_a_file_deleted_while_its_prompt_waits_in_the_queue_is_the_same_error(server):
    file = server.adapters / "waiting.safetensors"
    shutil.copy(server.adapters / FIRST, file)
    long = server.queue(base_graph(seed=201, steps=60))
    waiting = server.queue(with_adapter(base_graph(seed=201), file.name))
    file.unlink()
    list(server.events(long))
    events = list(server.events(waiting))
    (failed,) = (event["data"] for event in events if event["type"] == "execution_error")
    assert "There is no adapter 'waiting.safetensors'" in failed["exception_message"]
    assert str(server.adapters) in failed["exception_message"]
    assert not executed(events) & SAMPLED


def with_nan(file: Path) -> None:
    info, adapter = adapter_file.load(file)
    with torch.no_grad():
        next(adapter.parameters()).view(-1)[0] = torch.nan
    adapter_file.save(file, adapter, info)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def without_a_weight(file: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    state.popitem()
    save_file(state, file, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_nan, "holds NaN or infinity"),
        (truncated, "is not a readable safetensors file"),
        (without_a_weight, "missing"),
    ],
)
def test_a_file_damaged_since_its_last_use_never_reaches_the_sampler(server, damage, message):
    file = server.adapters / f"{damage.__name__}.safetensors"
    shutil.copy(server.adapters / FIRST, file)
    graph = with_adapter(base_graph(seed=202), file.name)
    before = picture(server, graph)
    damage(file)
    events = events_of(server, graph)
    (failed,) = (event["data"] for event in events if event["type"] == "execution_error")
    assert failed["node_id"] == "agd"
    assert file.name in failed["exception_message"]
    assert message in failed["exception_message"]
    assert not executed(events) & SAMPLED
    shutil.copy(server.adapters / FIRST, file)
    assert np.array_equal(picture(server, graph), before)
