"""Stage 1: the projector learns to say captions; the vision tower and the language model stay.

python launch/train.py --config configs/stage1.py:v1.5-7b

Before, `prepare_data.py` with the same --config reports on the data; `inspect_data.py` shows it.
Variants: v1-7b, v1-13b (default, the paper), v1-lightning-7b, v1-lightning-13b, v1.5-7b, v1.5-13b,
tiny (the picture world, on a laptop). Data: LLaVA-CC3M-Pretrain-595K for v1, LLaVA-Pretrain (558K)
for the others, in data/; `images` may stay zipped.
"""

from llava_jax import config as c

CC3M = c.Source(
    "data/LLaVA-CC3M-Pretrain-595K/chat.json",
    images=("data/LLaVA-CC3M-Pretrain-595K/images.zip",),
    builder="llava_pretrain",
)
LCS = c.Source(
    "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    images=("data/LLaVA-Pretrain/images.zip",),
    builder="llava_pretrain",
)
WORLD = c.Source(
    "data/picture_world/llava_pretrain.json",
    images=("data/picture_world",),
    builder="llava_pretrain",
)

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
TINY = {"template": "plain", "image_mode": "pad", "image_size": 48, "patch_size": 8}

# source, its rendering, conversations of a step, tokens and images of a row: as many conversations
# as fit a row of captions with little left over.
RECIPES = {
    "v1": ("cc3m_595k", CC3M, V1, 128, 2048, 7),
    "v1-lightning": ("lcs_558k", LCS, LIGHTNING, 128, 2048, 7),
    "v1.5": ("lcs_558k", LCS, V1_5, 256, 3072, 5),
    "tiny": ("picture_world", WORLD, TINY, 64, 512, 8),
}
VARIANTS = {
    f"{name}-{size}": recipe
    for name, recipe in RECIPES.items()
    for size in ("7b", "13b")
    if name != "tiny"
} | {"tiny": RECIPES["tiny"]}


def get_config(variant: str = "v1-13b"):
    name, source, rendering, conversations, tokens, images = c.variants(VARIANTS, variant)
    config = c.defaults()
    config.name = f"stage1-{variant}"
    config.data.sources = c.sources(**{name: source})
    config.data.tokenizer = f"models/start-{variant}"
    config.data.update(rendering)
    config.data.conversation_tokens = min(2048, tokens)
    config.batch.conversations = conversations
    config.batch.tokens = tokens
    config.batch.images = images
    return config
