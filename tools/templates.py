"""Writes the workflow templates of example_workflows/ by what a real ComfyUI server says of each node.

    python tools/templates.py

The editor's files give a node's values by their places: run it again when a node's inputs have changed, and after it
tools/thumbnails.py.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from comfyui_agd.tests.support.live_server import Server
from comfyui_agd.tools.editor_workflow import ModelFile, Node, Out, editor_workflow, note

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
_HUB = "https://huggingface.co"
_Z_IMAGE = f"{_HUB}/Comfy-Org/z_image/resolve/main/split_files"
_Z_IMAGE_TURBO = f"{_HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files"
_SDXL = f"{_HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main"

SDXL = ModelFile("sd_xl_base_1.0.safetensors", "checkpoints", f"{_SDXL}/sd_xl_base_1.0.safetensors")
OFFSET_LORA = ModelFile(
    "sd_xl_offset_example-lora_1.0.safetensors", "loras", f"{_SDXL}/sd_xl_offset_example-lora_1.0.safetensors"
)
CANNY = ModelFile(
    "diffusers_xl_canny_mid.safetensors",
    "controlnet",
    f"{_HUB}/lllyasviel/sd_control_collection/resolve/main/diffusers_xl_canny_mid.safetensors",
)
Z_IMAGE = ModelFile(
    "z_image_bf16.safetensors", "diffusion_models", f"{_Z_IMAGE}/diffusion_models/z_image_bf16.safetensors"
)
QWEN_3 = ModelFile("qwen_3_4b.safetensors", "text_encoders", f"{_Z_IMAGE_TURBO}/text_encoders/qwen_3_4b.safetensors")
FLUX_VAE = ModelFile("ae.safetensors", "vae", f"{_Z_IMAGE_TURBO}/vae/ae.safetensors")

Graph = dict[str, Node]
CHECKPOINT = Out("checkpoint", "MODEL")
CLIP = Out("checkpoint", "CLIP")
VAE = Out("checkpoint", "VAE")
NEGATIVE = "blurry, low quality, deformed, text, watermark"


def _checkpoint(at: tuple[int, int]) -> Graph:
    return {"checkpoint": Node("CheckpointLoaderSimple", at, (320, 110), {"ckpt_name": SDXL})}


def _text(at: tuple[int, int], text: str, title: str, clip: Out = CLIP) -> Node:
    return Node("CLIPTextEncode", at, (360, 150), {"clip": clip, "text": text}, title)


def _prompts(x: int, y: int, prompt: str, clip: Out = CLIP) -> Graph:
    return {
        "positive": _text((x, y), prompt, "Prompt", clip),
        "negative": _text((x, y + 200), NEGATIVE, "Negative prompt", clip),
    }


def _size(at: tuple[int, int], kind: str = "EmptyLatentImage") -> Graph:
    return {"size": Node(kind, at, (320, 120), {"width": 1024, "height": 1024})}


def _sampler(at: tuple[int, int], model: Out, title: str = "", **inputs: Any) -> Node:
    conditions = {"positive": Out("positive", "CONDITIONING"), "negative": Out("negative", "CONDITIONING")}
    usual = {"seed": 1, "steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
    linked = {"model": model, **conditions, "latent_image": Out("size", "LATENT")}
    return Node("KSampler", at, (300, 280), {**linked, **usual, **inputs}, title)


def _picture(x: int, y: int, sampler: str, prefix: str, vae: Out = VAE, title: str = "") -> Graph:
    """Decoded and saved, right of its sampler."""
    decoded = f"{sampler}_decoded"
    return {
        decoded: Node("VAEDecode", (x, y), (200, 60), {"samples": Out(sampler, "LATENT"), "vae": vae}),
        f"{sampler}_saved": Node(
            "SaveImage", (x + 240, y), (380, 420), {"images": Out(decoded, "IMAGE"), "filename_prefix": prefix}, title
        ),
    }


def _training_free(at: tuple[int, int], model: Out = CHECKPOINT) -> Graph:
    return {"agd": Node("AGDAdapterLoader", at, (340, 190), {"model": model, "adapter_name": "training-free"})}


def faster() -> Graph:
    text = (
        "## Faster sampling, nothing to train\n\n"
        "1. Choose your checkpoint, of any model that runs with cfg above 1, or download the one that is named here.\n"
        "2. Queue. Above cfg 1 a sampler evaluates the model twice per step. With **training-free**, "
        "**AGD Adapter Loader** forecasts some of the steps, so that 20 steps take 1 to 1.4 evaluations each. cfg and "
        "the prompts stay as they are.\n"
        "3. To compare, bypass the loader (Ctrl-B): at 20 steps, and at 10, which costs about the same."
    )
    prompt = (
        "photo of a red fox standing in fresh snow at the edge of a pine forest, early morning light, sharp fur, "
        "shallow depth of field"
    )
    return {
        "note": note((0, -290), (700, 230), text),
        **_checkpoint((0, 0)),
        **_training_free((360, 0)),
        **_prompts(360, 250, prompt),
        **_size((0, 250)),
        "sampler": _sampler((760, 0), Out("agd", "MODEL")),
        **_picture(1100, 0, "sampler", "AGD/faster"),
    }


def compare() -> Graph:
    text = (
        "## CFG and AGD side by side\n\n"
        "The same prompt and seed three times: CFG, CFG with half the steps, and **training-free**. If you have an "
        "adapter, choose it in **AGD Adapter Loader** and in **AGD Evaluate**.\n\n"
        "**Seconds**: AGD Evaluate measures CFG and one evaluation per step, which is what an adapter takes, on your "
        "card. **attention-guidance** stands in for an adapter there: look at its seconds, not at how well it guides. "
        "**training-free** takes 1 to 1.4 evaluations per step at 20 steps, CFG takes 2."
    )
    prompt = (
        "a lighthouse on a rocky coast in a storm, waves breaking over the rocks, dark clouds, warm light in the "
        "windows, dramatic photograph"
    )
    evaluated = {
        "model": CHECKPOINT,
        "clip": CLIP,
        "vae": VAE,
        "prompts": prompt,
        "negative": NEGATIVE,
        "count": 2,
        "adapter_name": "attention-guidance",
    }
    return {
        "note": note((0, -290), (700, 230), text),
        **_checkpoint((0, 0)),
        **_training_free((0, 180)),
        **_prompts(380, 0, prompt),
        **_size((380, 400)),
        "cfg": _sampler((780, 0), CHECKPOINT, "CFG, 20 steps"),
        **_picture(1120, 0, "cfg", "AGD/cfg-20", title="CFG: 40 evaluations"),
        "half": _sampler((780, 480), CHECKPOINT, "CFG, 10 steps", steps=10),
        **_picture(1120, 480, "half", "AGD/cfg-10", title="CFG: 20 evaluations"),
        "free": _sampler((780, 960), Out("agd", "MODEL"), "AGD, 20 steps"),
        **_picture(1120, 960, "free", "AGD/training-free", title="AGD training-free: 20 to 28 evaluations"),
        "evaluate": Node("AGDEvaluate", (1800, 0), (400, 560), evaluated, "Seconds: CFG and one evaluation per step"),
        "report": Node("PreviewAny", (1800, 640), (560, 500), {"source": Out("evaluate", "report")}, "Seconds"),
    }


def train() -> Graph:
    text = (
        "## Train an adapter and use it\n\n"
        "1. Choose your checkpoint and your card's memory. Write prompts of the kind that you will use, one per line, "
        "short ones too; {in snow|on a beach} chooses one, \\_\\_animal\\_\\_ draws from a list. No images are "
        "needed.\n"
        "2. Queue. Before it starts, the node says what it needs and how long each **quality** takes. Interrupted, it "
        "goes on from there when queued again.\n"
        "3. The adapter is saved in **models/agd**. Next time use the first template and choose it in "
        "**AGD Adapter Loader**."
    )
    prompts = (
        "a photo of a __animal__ {in the snow|on a beach|in a meadow}\n"
        "a portrait of an old fisherman, soft window light\n"
        "a lighthouse on a cliff at sunset, oil painting\n"
        "a glass teapot on a wooden table, studio photograph\n"
        "a red fox"
    )
    inputs = {"model": CHECKPOINT, "clip": CLIP, "vae": VAE, "prompts": prompts, "adapter_name": "my_adapter"}
    loader = {"model": CHECKPOINT, "adapter_name": Out("train", "adapter_name")}
    prompt = "photo of a barn owl on a fence post in falling snow, soft evening light, detailed feathers"
    return {
        "note": note((0, -290), (760, 230), text),
        **_checkpoint((0, 0)),
        "train": Node("AGDTrain", (360, 0), (420, 420), inputs),
        "plot": Node("PreviewImage", (360, 520), (420, 420), {"images": Out("train", "plot")}, "Loss and gap closed"),
        "report": Node("PreviewAny", (820, 520), (480, 420), {"source": Out("train", "report")}, "What was trained"),
        "agd": Node("AGDAdapterLoader", (820, 0), (340, 190), loader),
        **_prompts(1200, 0, prompt),
        **_size((820, 260)),
        "sampler": _sampler((1600, 0), Out("agd", "MODEL")),
        **_picture(1940, 0, "sampler", "AGD/trained"),
    }


def lora_and_controlnet() -> Graph:
    text = (
        "## LoRA and ControlNet on top\n\n"
        "LoRAs, ControlNets and AGD go together: put **AGD Adapter Loader** last before the sampler. A ControlNet is "
        "evaluated less often, too.\n\n"
        "The first sampler makes a picture, Canny takes its outlines, the second sampler puts another scene into "
        "them, with the LoRA. Choose an adapter in place of **training-free** if you have one."
    )
    first = "photo of an old stone bridge over a mountain river, autumn trees, overcast light"
    second = (
        "an old stone bridge over a frozen river at night, deep snow, lanterns on the bridge, stars, fantasy "
        "illustration, rich dark colours"
    )
    lora = {"model": CHECKPOINT, "clip": CLIP, "lora_name": OFFSET_LORA, "strength_model": 0.7, "strength_clip": 0.7}
    with_lora = Out("lora", "CLIP")
    control = {
        "positive": Out("second", "CONDITIONING"),
        "negative": Out("second_negative", "CONDITIONING"),
        "control_net": Out("controlnet", "CONTROL_NET"),
        "image": Out("outlines", "IMAGE"),
        "strength": 0.7,
        "end_percent": 0.8,
        "vae": VAE,
    }
    controlled = {"positive": Out("control", "positive"), "negative": Out("control", "negative")}
    return {
        "note": note((0, -290), (700, 230), text),
        **_checkpoint((0, 0)),
        "first_agd": Node("AGDAdapterLoader", (360, 0), (340, 190), {"model": CHECKPOINT}),
        **_prompts(360, 250, first),
        **_size((0, 250)),
        "first": _sampler((760, 0), Out("first_agd", "MODEL")),
        **_picture(1100, 0, "first", "AGD/before", title="The first picture"),
        "outlines": Node("Canny", (1760, 0), (300, 110), {"image": Out("first_decoded", "IMAGE")}),
        "controlnet": Node("ControlNetLoader", (1760, 160), (320, 80), {"control_net_name": CANNY}),
        "lora": Node("LoraLoader", (0, 700), (320, 150), lora),
        **_training_free((360, 700), Out("lora", "MODEL")),
        "second": _text((760, 700), second, "Prompt", with_lora),
        "second_negative": _text((760, 900), NEGATIVE, "Negative prompt", with_lora),
        "control": Node("ControlNetApplyAdvanced", (1160, 700), (320, 230), control),
        "sampler": _sampler((1520, 700), Out("agd", "MODEL"), seed=2, **controlled),
        **_picture(1860, 700, "sampler", "AGD/lora-controlnet", title="Another scene in its outlines"),
    }


def evaluate() -> Graph:
    text = (
        "## Evaluate an adapter\n\n"
        "Choose a checkpoint, and under **adapter_name** an adapter of it or of another checkpoint of its family; "
        "**attention-guidance** is there until you have one. Give the model as it is, without AGD Adapter Loader.\n\n"
        "The report says how much of the guidance the adapter gives here, how many seconds a picture takes beside "
        "CFG, and whether an adapter of another checkpoint fits this one. The picture has a row per prompt: unguided, "
        "CFG, AGD, and how the last two differ."
    )
    prompts = (
        "a photo of an owl in the snow\n"
        "a portrait of an old fisherman, soft window light\n"
        "a lighthouse on a cliff at sunset, oil painting\n"
        "a glass teapot on a wooden table, studio photograph"
    )
    inputs = {
        "model": CHECKPOINT,
        "clip": CLIP,
        "vae": VAE,
        "prompts": prompts,
        "negative": NEGATIVE,
        "adapter_name": "attention-guidance",
    }
    picture = {"images": Out("evaluate", "picture"), "filename_prefix": "AGD/evaluate"}
    return {
        "note": note((0, -290), (760, 230), text),
        **_checkpoint((0, 0)),
        "evaluate": Node("AGDEvaluate", (360, 0), (420, 620), inputs),
        "sheet": Node("SaveImage", (820, 0), (660, 560), picture, "Unguided, CFG, AGD, difference"),
        "report": Node("PreviewAny", (820, 620), (660, 420), {"source": Out("evaluate", "report")}, "The report"),
    }


def transformer() -> Graph:
    text = (
        "## A transformer: Z-Image\n\n"
        "**training-free** runs on any model with cfg above 1, here on Z-Image. Its diffusion model, text encoder and "
        "VAE are separate files. Models that run at cfg 1, such as Z-Image-Turbo, have nothing to save.\n\n"
        "For an adapter of it, put **AGD Train** of the third template in place of the loader: it takes the model and "
        "the text encoder from the same nodes."
    )
    prompt = (
        "A small wooden boat lies on a calm mountain lake at dawn. Thin fog hangs over the water, the first sunlight "
        "touches the snow on the peaks, and a heron stands in the reeds at the left. Realistic photograph."
    )
    clip, vae = Out("text_encoder", "CLIP"), Out("vae", "VAE")
    shifted = {"model": Out("diffusion_model", "MODEL"), "shift": 3.0}
    settings = {"steps": 25, "cfg": 4.0, "sampler_name": "res_multistep", "scheduler": "simple"}
    return {
        "note": note((0, -290), (700, 230), text),
        "diffusion_model": Node("UNETLoader", (0, 0), (320, 100), {"unet_name": Z_IMAGE}),
        "text_encoder": Node("CLIPLoader", (0, 160), (320, 130), {"clip_name": QWEN_3, "type": "lumina2"}),
        "vae": Node("VAELoader", (0, 350), (320, 80), {"vae_name": FLUX_VAE}),
        "shifted": Node("ModelSamplingAuraFlow", (360, 0), (340, 80), shifted),
        **_training_free((360, 130), Out("shifted", "MODEL")),
        **_prompts(360, 390, prompt, clip),
        **_size((0, 500), "EmptySD3LatentImage"),
        "sampler": _sampler((760, 0), Out("agd", "MODEL"), **settings),
        **_picture(1100, 0, "sampler", "AGD/z-image", vae),
    }


def train_with_settings() -> Graph:
    text = (
        "## Train with settings of your own\n\n"
        "**AGD Train Settings** has what few people change: here a longer training, for cfg up to 10. Without the node "
        "AGD Train takes what suits the model.\n\n"
        "**AGD Apply Adapter** takes the adapter straight from AGD Train, here at a lower strength. It can also put it "
        "on another checkpoint of the same family."
    )
    prompts = (
        "a watercolour of a __animal__ {in a garden|by the sea}\n"
        "a watercolour of an old town, narrow street, evening light\n"
        "ink drawing of a sailing ship in a storm\n"
        "a watercolour of a bowl of lemons"
    )
    settings = {"length": "this many iterations", "length.iterations": 3000, "guidance_scale_up_to": 10.0}
    inputs = {"model": CHECKPOINT, "clip": CLIP, "vae": VAE, "settings": Out("settings", "settings")}
    trained = {**inputs, "prompts": prompts, "adapter_name": "my_watercolours"}
    applied = {"model": CHECKPOINT, "adapter": Out("train", "adapter"), "strength": 0.9}
    prompt = "a watercolour of a heron by a river, morning fog, soft colours, visible paper"
    return {
        "note": note((0, -290), (760, 230), text),
        **_checkpoint((0, 0)),
        "settings": Node("AGDTrainSettings", (0, 180), (340, 640), settings),
        "train": Node("AGDTrain", (380, 0), (420, 420), trained),
        "report": Node("PreviewAny", (380, 520), (420, 420), {"source": Out("train", "report")}, "What was trained"),
        "agd": Node("AGDApplyAdapter", (840, 0), (340, 190), applied),
        **_prompts(1220, 0, prompt),
        **_size((840, 260)),
        "sampler": _sampler((1620, 0), Out("agd", "MODEL")),
        **_picture(1960, 0, "sampler", "AGD/settings"),
    }


# By their titles, which are their files' names; ComfyUI lists them in this order.
TEMPLATES = {
    "1 Faster sampling, nothing to train": faster,
    "2 Compare CFG and AGD side by side": compare,
    "3 Train an adapter and use it": train,
    "4 LoRA and ControlNet on top": lora_and_controlnet,
    "5 Evaluate an adapter": evaluate,
    "6 A transformer": transformer,
    "7 Train with settings of your own": train_with_settings,
}


def workflows(object_info: dict) -> dict[str, dict]:
    """Every template's file by its title."""
    return {title: editor_workflow(title, graph(), object_info) for title, graph in TEMPLATES.items()}


def place_model_files(folder: Path) -> None:
    """Empty files by the names that the templates have: a server in `folder` takes the models to be there."""
    nodes = [node for graph in TEMPLATES.values() for node in graph().values()]
    for model in [value for node in nodes for value in node.inputs.values() if isinstance(value, ModelFile)]:
        path = folder / "models" / model.directory / model.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "comfyui")
        try:
            found = workflows(server.get("/object_info"))
        finally:
            server.close()
    for title, workflow in found.items():
        (FOLDER / f"{title}.json").write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
