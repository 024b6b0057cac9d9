"""The paper authors' own adapters: what they add is what their formulas say, at their layers, in sampling and training.

The formulas are in tests/support/authors.py, hung on the base's attentions as plain functions.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import folder_paths
import pytest
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.comfyui import folders
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.settings import GuidanceSettings
from comfyui_agd.agd_core.kinds.paper_attention import PromptTooLong
from comfyui_agd.tests.support.analytic import CONFIG as ANALYTIC
from comfyui_agd.tests.support.analytic import PROMPTS
from comfyui_agd.tests.support.architectures import UNETS
from comfyui_agd.tests.support.authors import (
    FORMULAS,
    SD21,
    SDXL,
    Authors,
    at_work,
    places,
    random_adapter,
    shapes,
    write_run,
)
from comfyui_agd.tests.support.checkpoints import on_meta
from comfyui_agd.tests.support.runtime import (
    CFG,
    STEPS,
    TinyUNet,
    TinyXL,
    in_dtype,
    is_from,
    ksampler,
    latent,
    random_prompts,
    rows_of,
    tiny,
)
from comfyui_agd.training import authors, cli
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.trainer import train

ARCHS = pytest.mark.parametrize("arch", ["attention", "additive"])
KNOWLEDGE = pytest.mark.parametrize(
    "knows",
    [{}, {"use_timestep": False}, {"use_prompt": False}, {"use_timestep": False, "use_prompt": False}],
    ids=lambda off: " and ".join(off) or "all",
)
BASES = {"TinyUNet": TinyUNet, "TinyXL": TinyXL}


@pytest.fixture(autouse=True)
def tiny_bases(monkeypatch):
    """The tiny networks are bases of theirs, too."""
    for name in BASES:
        shape = authors.UNetShape(name, "EPS", 8, 128, (32, 32), (1, 1), 1, res_blocks=1, time_channels=128)
        monkeypatch.setitem(authors.BASES, name, shape)


@pytest.fixture
def run(tmp_path):
    """A function: of a MODEL and their settings, the checkpoint that they would have written, and its modules."""

    def of(model, settings: Authors):
        settings = replace(settings, base_model=type(model.model.model_config).__name__)
        modules = random_adapter(settings, model.model.diffusion_model, model.model.model_config.unet_config)
        return write_run(tmp_path / "run", settings, modules), modules

    return of


def applied(model, checkpoint, **settings):
    return apply_adapter(model, *authors.load(checkpoint), GuidanceSettings(**settings), source="theirs")


def by_formula(modules, settings: Authors, model, omega: float):
    config, network = model.model.model_config.unet_config, model.model.diffusion_model
    return at_work(modules, settings, network, config, torch.tensor([omega]))


@ARCHS
@KNOWLEDGE
@pytest.mark.parametrize("base", BASES)
def test_sampling_with_their_file_is_sampling_with_their_formulas(run, arch, knows, base):
    model, settings = tiny(BASES[base]()), Authors(arch, **knows)
    checkpoint, modules = run(model, settings)
    prompts = random_prompts(pooled=1280)
    at = latent(2, channels=model.model.latent_format.latent_channels)
    with by_formula(modules, settings, model, CFG):
        expected = ksampler(model, prompts, at=at, cfg=1.0)
    found = ksampler(applied(model, checkpoint), prompts, at=at)
    assert (expected - ksampler(model, prompts, at=at, cfg=1.0)).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@ARCHS
def test_it_acts_at_cfg_1_and_strength_0_is_the_base_to_the_bit(run, arch):
    model, prompts, settings = tiny(TinyUNet()), random_prompts(), Authors(arch)
    checkpoint, modules = run(model, settings)
    with by_formula(modules, settings, model, 1.0):
        expected = ksampler(model, prompts, cfg=1.0)
    for of_cfg in (
        ksampler(applied(model, checkpoint), prompts, cfg=1.0),
        ksampler(applied(model, checkpoint, guidance_scale=1.0), prompts, cfg=CFG),
    ):
        torch.testing.assert_close(of_cfg, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, ksampler(model, prompts, cfg=1.0), atol=0.1)
    assert torch.equal(ksampler(applied(model, checkpoint, strength=0.0), prompts), ksampler(model, prompts))
    assert rows_of(applied(model, checkpoint), ksampler, prompts) == [1] * STEPS


@ARCHS
def test_the_student_of_training_is_their_formulas_for_each_rows_omega(run, toy, arch):
    base, settings = tiny(TinyUNet()), Authors(arch)
    checkpoint, modules = run(base, settings)
    info, weights = authors.load(checkpoint)
    adapter = Adapter(info.config)
    adapter.load_state_dict(weights)
    model = ComfyModel(base, toy.clip)
    prompts = model.text_encoder.encode(PROMPTS[:2])
    x, sigma, omega = torch.randn(2, 12, 8, 8), torch.tensor([5.0, 0.7]), torch.tensor([1.0, 7.5])
    with model.denoiser.session(), torch.no_grad():
        found = model.denoiser.student(adapter, x, sigma, prompts, prompts, omega)
        with at_work(modules, settings, base.model.diffusion_model, TinyUNet.unet_config, omega):
            expected = model.denoiser.denoise(x, sigma, prompts)
        unguided = model.denoiser.denoise(x, sigma, prompts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert ((found - unguided).flatten(1).abs().amax(dim=1) > 0.05).all()


@pytest.mark.parametrize("kind", ["paper_attention", "paper_additive"])
def test_an_adapter_is_trained_for_their_layers_alone_and_its_file_samples_as_it_was_trained(toy, tmp_path, kind):
    base = tiny(TinyUNet())
    config = replace(ANALYTIC, kind=kind, iterations=3, held_out=0)
    trained = train(ComfyModel(base, toy.clip), PROMPTS, config)
    paths = {layer.path for layer in trained.info.config.layers}
    assert {f"{path}.attn2" for path in paths} == set(places(TinyUNet.unet_config).values())
    assert len(trained.info.base.layers) - len(paths) == 2  # one for each level on the way up
    file = adapter_file.save(tmp_path / "new.safetensors", trained.adapter, trained.info)
    info, loaded = adapter_file.load(file)
    assert info.config == trained.info.config
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in trained.adapter.state_dict().items())
    assert "at cfg 1" in adapter_file.describe(info, file)


@ARCHS
def test_in_half_precision_omega_is_as_exact_as_in_fp32(run, arch):
    """A thousand times omega, rounded, would be another angle."""
    base, settings = tiny(TinyUNet()), Authors(arch, use_prompt=False, use_timestep=False)
    checkpoint, modules = run(base, settings)
    (patcher,) = applied(in_dtype(base, TinyUNet, torch.bfloat16), checkpoint).get_nested_additional_models()
    adapter, paths = patcher.model, {ours: theirs for theirs, ours in places(TinyUNet.unet_config).items()}
    omega, h, P = torch.tensor([7.3]), torch.randn(1, 9, 32), torch.randn(1, 16, 128)
    prepared = adapter.prepare(omega, torch.tensor([500.0]), P.bfloat16(), dtype=torch.bfloat16)
    for layer in adapter.config.layers:
        given = torch.zeros(h.shape).bfloat16(), h.bfloat16()
        found = adapter.add_after_attention(layer.name, *given, prepared.context, prepared)
        expected = FORMULAS[arch](modules[paths[f"{layer.path}.attn2"]], h, P, omega, h).expand_as(h)
        assert (found - expected).norm() < 0.03 * expected.norm()


@ARCHS
def test_beside_an_adapter_of_all_layers_each_adds_at_its_own(run, save_adapter, arch):
    """Whichever comes first."""
    base, prompts = tiny(TinyUNet()), random_prompts()
    checkpoint, _ = run(base, Authors(arch))
    theirs, ours = authors.load(checkpoint), adapter_file.load_weights(save_adapter(base, kind="delta"))

    def both(first, second):
        model = apply_adapter(base, *first, source="first")
        return ksampler(apply_adapter(model, *second, source="second"), prompts)

    torch.testing.assert_close(both(theirs, ours), both(ours, theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        both(theirs, ours), ksampler(apply_adapter(base, *theirs, source="a"), prompts), atol=0.01
    )


def test_blocks_that_do_not_say_which_they_are_are_told_by_their_order(run):
    """Those of other packs may not; the adapter has nothing for some of them."""
    base, prompts = tiny(TinyUNet()), random_prompts()
    model = applied(base, run(base, Authors())[0])
    silent = model.clone()

    def forget(n, context, value, extra_options):
        del extra_options["block"], extra_options["block_index"]
        return n, context, value

    silent.set_model_attn2_patch(forget)
    assert torch.equal(ksampler(silent, prompts), ksampler(model, prompts))


def test_a_long_prompt_is_read_in_chunks_and_what_has_no_position_is_refused(run):
    base = tiny(TinyUNet())
    model = applied(base, run(base, Authors())[0])
    ksampler(model, random_prompts(lengths=(5 * 77, 77)))
    with pytest.raises(PromptTooLong, match=r"shorten it.* it has 252 tokens in a row, .* has 250 positions"):
        ksampler(model, random_prompts(lengths=(250, 77)))


COUNTED = {
    (SD21, "attention", 320): 29.50,
    (SD21, "additive", 320): 24.94,
    (SD21, "attention", 128): 8.61,
    (SD21, "additive", 128): 7.11,
    (SDXL, "attention", 320): 165.6,
    (SDXL, "additive", 320): 137.8,
    (SDXL, "attention", 128): 52.0,
    (SDXL, "additive", 128): 42.3,
}
REAL = {SD21: "SD 2.1", SDXL: "SDXL"}


@pytest.mark.parametrize(("base", "arch", "hidden"), COUNTED)
def test_at_true_size_it_has_as_many_parameters_as_theirs(base, arch, hidden):
    described = describe_base(on_meta(REAL[base]))
    config = TrainConfig(kind=f"paper_{arch}", hidden=hidden).adapter_config(described, 77)
    with torch.device("meta"):
        count = Adapter(config).parameter_count()
    expected = COUNTED[base, arch, hidden]
    assert count / 1e6 == pytest.approx(expected, abs=0.006 if expected < 30 else 0.06)


@pytest.mark.parametrize("base", REAL)
def test_their_modules_are_our_layers(base):
    """By ComfyUI's own table of names."""
    described, shape = describe_base(on_meta(REAL[base])), authors.BASES[base]
    assert shape.base().sibling_of(described)
    assert shape.base().time_channels == described.time_channels
    assert [layer.linears for layer in shape.base().layers] == [layer.linears for layer in described.layers]
    chosen = authors.AuthorsConfig(base, "attention", 8, 0.0, True, True, False).adapter_config().layers
    assert len(chosen) == {SD21: 13, SDXL: 58}[base]
    ours = {module: f"{layer.path}.attn2" for module, layer in shape.modules().items() if layer in chosen}
    assert ours == places(UNETS[REAL[base]].arguments)


def write_real(folder, settings: Authors, **config):
    """A run of theirs for a base at its true size; all weights are 0.5."""
    shape, modules = authors.BASES[settings.base_model], {}
    for module, layer in shape.modules().items():
        if not layer.name.startswith(("output_2_", "output_5_", "output_8_", "output_11_")):
            own = shapes(settings, layer.width, layer.context_dim, 1280)
            modules[module] = {name: torch.full(size, 0.5) for name, size in own.items()}
            if settings.arch == "attention":
                modules[module]["pos_enc.pe"] = torch.zeros(250, settings.hidden_dim)
    return write_run(folder, settings, modules, **config), modules


@ARCHS
def test_of_a_run_the_checkpoint_of_the_most_steps_is_read(tmp_path, arch):
    last, _ = write_real(tmp_path, Authors(arch))
    write_run(tmp_path, Authors(arch), {}, step=500)
    info, weights = authors.load(tmp_path)
    assert info.training["imported from"].endswith("checkpoints/0005000.pt")
    assert (info.base.family, info.base.prediction, info.config.kind.name) == ("SD20", "V_PREDICTION", f"paper_{arch}")
    assert info == authors.load(last)[0]
    with torch.device("meta"):
        expected = Adapter(info.config).state_dict()
    assert {key: value.shape for key, value in weights.items()} == {key: v.shape for key, v in expected.items()}


def damaged(modules: dict) -> dict:
    """What is wrong with each, all of it to be in one error."""
    names = list(modules)
    del modules[names[0]]["q_proj.weight"]
    modules[names[1]]["more"] = torch.zeros(1)
    modules[names[2]]["k_proj.weight"] = torch.zeros(3, 8)
    modules[names[3]]["k_proj.weight"] = torch.full((8, 8), float("nan"))
    modules[names[4]]["k_proj.weight"] = torch.zeros(8, 8, dtype=torch.int32)
    modules[names[5]]["k_proj.weight"] = "text"
    modules["else\x1bwhere"] = {"q_proj.weight": torch.zeros(1)}
    return modules


def test_all_that_is_wrong_with_the_weights_is_in_one_error(tmp_path):
    checkpoint, modules = write_real(tmp_path, Authors())
    torch.save({"model": damaged(modules)}, checkpoint)
    with pytest.raises(AdapterFileError, match=r"does not hold the adapter that its config.yaml says") as refused:
        authors.load(checkpoint)
    for expected in (
        "q_proj.weight: missing",
        "more: unknown",
        r"k_proj.weight: shape (3, 8) instead of (8, 8)",
        "k_proj.weight: holds NaN or infinity",
        "k_proj.weight: torch.int32 numbers instead of torch.float32",
        "k_proj.weight: str instead of numbers",
        r"else\x1bwhere q_proj.weight: unknown",
    ):
        assert expected in str(refused.value)


def test_positions_that_differ_between_layers_are_refused(tmp_path):
    checkpoint, modules = write_real(tmp_path, Authors())
    modules[list(modules)[3]]["pos_enc.pe"] = torch.ones(250, 8)
    torch.save({"model": modules}, checkpoint)
    with pytest.raises(AdapterFileError, match=r"pos_enc.pe: differs from the first module's"):
        authors.load(checkpoint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"arch": "mlp_gate"}, "its arch is mlp_gate, and what can be used is attention or additive"),
        ({"arch": "learned_pos_emb"}, "its arch is learned_pos_emb"),
        (
            {"base_model": "stabilityai/stable-diffusion-3-medium-diffusers"},
            "its base_model is stabilityai/stable-diff",
        ),
        ({"hidden_dim": "320"}, "config.hidden_dim is '320', but must be a whole number"),
        ({"hidden_dim": 9}, "hidden_dim is 9, but must be a multiple of 2"),
        ({"use_prompt": 1}, "use_prompt is 1, but must be true or false"),
        ({"arch": "a\x1b[31m" * 9}, r"arch is 'a\\x1b"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, config, message):
    checkpoint = write_run(tmp_path, Authors(), {}, **config)
    with pytest.raises(AdapterFileError, match=rf"^This adapter of the paper authors' code can't be used: .*{message}"):
        authors.load(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfg_mult: 1000\nuse_class_label: true", "it is for DiT-XL/2"),
        ("hidden_dim: 8", r"missing fields \['arch', 'base_model'"),
        ("- 1", "its config.yaml is no list of settings"),
        ("a: [", "its config.yaml can't be read"),
        ("!!python/object/apply:os.getcwd []", "its config.yaml can't be read"),
        ("[" * 5000, "its config.yaml can't be read"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, text, message):
    checkpoint = write_run(tmp_path, Authors(), {})
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(AdapterFileError, match=message):
        authors.load(checkpoint)


class Code:
    def __reduce__(self):
        return (print, ("run",))

    def __repr__(self):
        return "code"


@pytest.mark.parametrize("data", [Code(), {"model": Code()}, {"model": [1]}, {"model": {"a": 1}}, [1], {}], ids=str)
def test_a_checkpoint_of_something_else_is_refused_and_runs_nothing(tmp_path, capsys, data):
    checkpoint = write_run(tmp_path, Authors(), {})
    torch.save(data, checkpoint)
    with pytest.raises(AdapterFileError, match="of the paper authors' code"):
        authors.load(checkpoint)
    assert "run" not in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(AdapterFileError, match=r"There is no checkpoint .* give the folder that has checkpoints/"):
        authors.load(tmp_path)
    checkpoint = write_run(tmp_path, Authors(), {})
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(AdapterFileError, match=r"there is no config.yaml.* copy the folder of the whole run"):
        authors.load(checkpoint)


def agd(capsys, *arguments) -> tuple[int, str]:
    status = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


@ARCHS
def test_agd_import_writes_an_adapter_file_of_what_agd_inspect_says_it_is(tmp_path, capsys, arch):
    checkpoint, _ = write_real(tmp_path / "run", Authors(arch, base_model=SDXL))
    output = tmp_path / "imported.safetensors"
    status, shown = agd(capsys, "inspect", checkpoint)
    assert status == 0
    assert f"agd import {checkpoint} OUTPUT.safetensors" in shown.splitlines()[0]
    for part in (f"paper_{arch}, hidden 8, from omega, t, the prompt", "SDXL (EPS", "0005000.pt", "acts"):
        assert part in shown
    assert agd(capsys, "import", tmp_path / "run", output) == (
        0,
        f"Wrote {output}: paper_{arch}, hidden 8, from omega, t, the prompt, for SDXL.\n",
    )
    info, weights = authors.load(checkpoint)
    again, written = adapter_file.load_weights(output)
    assert again == info
    assert all(torch.equal(value, written[key]) for key, value in weights.items())


def test_where_only_an_adapter_file_will_do_it_is_said_how_to_get_one(tmp_path, capsys):
    checkpoint, _ = write_real(tmp_path, Authors())
    status, said = agd(capsys, "export", checkpoint, tmp_path / "lora.safetensors", "--omega", 5)
    assert status == 1
    assert f"import it first, with `agd import {checkpoint} OUTPUT.safetensors`" in said


@pytest.mark.skipif(not is_from("0.30.0"), reason="older ones let only their own main import nodes")
def test_the_loader_lists_and_reads_a_run_of_theirs_in_models_agd(run, tmp_path, monkeypatch):
    from comfyui_agd.nodes import common

    base, prompts = tiny(TinyUNet()), random_prompts()
    checkpoint, _ = run(base, Authors())
    shutil.move(tmp_path / "run", tmp_path / "models" / "agd" / "theirs")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.KEY, ([], set()))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folders.register()
    (name,) = folders.adapters()
    assert Path(name) == Path("theirs/checkpoints") / checkpoint.name
    adapter = common.named_adapter(name, base)
    model = apply_adapter(base, adapter.info, adapter.weights, source=adapter.source)
    assert rows_of(model, ksampler, prompts) == [1] * STEPS
