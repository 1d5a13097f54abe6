"""Stage 1: the projector learns to say captions; the vision tower and the language model stay.

python launch/train.py --config configs/stage1.py:v1.5-7b --workdir runs/stage1-v1.5-7b

Run without weights or data at hand it says what to fetch and how. Variants: v1-7b, v1-13b (default,
the paper), v1-lightning-7b, v1-lightning-13b, v1.5-7b, v1.5-13b; each with -large behind it for a
pod: eight times the batch, the rate times √8, no recipe of the paper's; tiny (the picture world, on
a laptop). Data: LLaVA-CC3M-Pretrain-595K for v1, LLaVA-Pretrain (558K) for the others, in data/;
`images` may stay zipped.

The planner expects v1.5-7b to take 2.7 h on v5e-8 (docs/results.md has the settings).
The reference took 2 h (7B) and 4 h (13B) for v1, 3.5 h and 5.5 h for v1.5, on eight A100. The paper
reports no number of its own for this stage: stage 2 starts from its projector.
Ablations: --config.model.select_layer=-1 reads the tower's last layer; --config.fidelity=paper has
one conversation a row, and the loss as eight devices average it.
"""

from llava_jax import config as c

CC3M = c.Source(
    "data/LLaVA-CC3M-Pretrain-595K/chat.json",
    images=("data/LLaVA-CC3M-Pretrain-595K/images.zip",),
    builder="llava_pretrain",
    size=595_375,
    how="hf download liuhaotian/LLaVA-CC3M-Pretrain-595K --repo-type dataset "
    "--local-dir data/LLaVA-CC3M-Pretrain-595K",
)
LCS = c.Source(
    "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    images=("data/LLaVA-Pretrain/images.zip",),
    builder="llava_pretrain",
    size=558_128,
    how="hf download liuhaotian/LLaVA-Pretrain --repo-type dataset --local-dir data/LLaVA-Pretrain",
)
WORLD = c.Source(
    "data/picture_world/llava_pretrain.json",
    images=("data/picture_world",),
    take="fraction:0.2",  # a caption a picture
    builder="llava_pretrain",
    how="python -m llava_jax.picture_world --out data/picture_world --scenes 2000",
)
WORLD_DEV = c.Source(
    "data/picture_world/llava_pretrain_dev.json",
    images=("data/picture_world",),
    take="fraction:0.05",
    how=WORLD.how,
)

TINY_START = """python launch/convert.py import llava_jax/picture_world/towers/llama \
models/start-tiny --base llava_jax/picture_world/towers/clip"""

CLIP_224, CLIP_336 = "clip-vit-large-patch14", "clip-vit-large-patch14-336"


def fetch(*repositories: str) -> str:
    return "\n".join(
        f"hf download {name} --local-dir weights/{name.split('/')[-1]}" for name in repositories
    )


def start_of(variant: str) -> str:
    """The commands that make the model folder a stage 1 starts from."""
    name, _, size = variant.removesuffix("-large").rpartition("-")
    if name == "v1":
        return f"""{
            fetch(f"lmsys/vicuna-{size}-delta-v0", f"huggyllama/llama-{size}", f"openai/{CLIP_224}")
        }
            python launch/convert.py import weights/vicuna-{size}-delta-v0 models/start-v1-{size} \
--base weights/llama-{size} --base weights/{CLIP_224} --projector linear --template v0 \
--start_end_tokens --allow-pickle"""
    if name == "v1-lightning":
        return f"""{fetch(f"lmsys/vicuna-{size}-v1.3", f"openai/{CLIP_224}")}
            python launch/convert.py import weights/vicuna-{size}-v1.3 \
models/start-v1-lightning-{size} --base weights/{CLIP_224} --projector linear --allow-pickle"""
    return f"""{fetch(f"lmsys/vicuna-{size}-v1.5", f"openai/{CLIP_336}")}
        python launch/convert.py import weights/vicuna-{size}-v1.5 models/start-v1.5-{size} \
--base weights/{CLIP_336} --allow-pickle"""


# v1: the words of v0 around the caption, image tokens between start and end, 224 pixels, cropped.
V1 = {
    "template": "v0",
    "start_end_tokens": True,
    "text_restarts": False,
    "image_at": "as_written",
    "image_mode": "crop",
    "image_size": 224,
}
LIGHTNING = {"template": "plain", "image_mode": "crop", "image_size": 224}
V1_5 = {"template": "plain", "image_mode": "pad", "image_size": 336}

# source, its rendering, what trains, conversations of a step, learning rate, clip (DeepSpeed's
# settings have none for v1.5 and Lightning), tokens and images of a row: as many conversations as
# fit a row of captions with little left over.
RECIPES = {
    "v1": ("cc3m_595k", CC3M, V1, c.STAGE_1_START_END, 128, 2e-3, 1.0, 2048, 7),
    "v1-lightning": ("lcs_558k", LCS, LIGHTNING, c.STAGE_1, 128, 2e-3, 0.0, 2048, 7),
    "v1.5": ("lcs_558k", LCS, V1_5, c.STAGE_1, 256, 1e-3, 0.0, 3072, 5),
}
VARIANTS = {
    f"{name}-{size}{large}": recipe
    for name, recipe in RECIPES.items()
    for size in ("7b", "13b")
    for large in ("", "-large")
} | {"tiny": None}


def get_config(variant: str = "v1-13b"):
    recipe = c.variants(VARIANTS, variant)
    config = c.defaults()
    config.name = f"stage1-{variant}"
    return tiny(config) if recipe is None else full(config, variant, *recipe)


def full(config, variant, name, source, rendering, trains, conversations, lr, clip, tokens, images):
    base = variant.removesuffix("-large")
    larger = 8 if variant != base else 1
    config.data.sources = c.sources(**{name: source})
    config.data.tokenizer = config.model.start = f"models/start-{base}"
    config.model.how = start_of(variant)
    config.model.architecture = base
    config.data.update(rendering)
    config.data.conversation_tokens = 2048
    config.batch.conversations = larger * conversations
    config.batch.tokens, config.batch.images = tokens, images
    config.optim.trains = trains
    config.optim.lr = lr * larger**0.5
    config.optim.clip = clip
    config.compute.loss_pieces = 8
    return config


def tiny(config):
    config.data.sources = c.sources(picture_world=WORLD)
    config.held_out.sources = c.sources(captions=WORLD_DEV)
    config.data.tokenizer = config.model.start = "models/start-tiny"
    config.model.how = TINY_START
    config.data.update(template="plain", image_mode="pad", image_size=48, patch_size=8)
    config.data.conversation_tokens = config.batch.tokens = 256
    config.batch.conversations, config.batch.images = 32, 6
    config.optim.trains = c.STAGE_1
    config.optim.lr = 3e-3
    config.model.frozen_dtype = config.compute.dtype = "float32"
    config.compute.update(scan=False, remat="none")
    config.checkpoints.every, config.held_out.every = 250, 50
    return config
