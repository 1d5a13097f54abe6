"""Stage 2, the chatbot: projector and language model learn from conversations about pictures.

python launch/train.py --config configs/stage2.py:v1.5-7b

Before, `prepare_data.py` with the same --config reports on the data; `inspect_data.py` shows it.
Variants: v1-7b, v1-13b (default, the paper), v1-lightning-7b, v1-lightning-13b, v1.5-7b, v1.5-13b,
tiny (the picture world, on a laptop). Data in data/: LLaVA-Instruct-150K over COCO's train2017 for
v1, llava_v1_5_mix665k.json for v1.5, with coco/, gqa/, ocr_vqa/, textvqa/ and vg/ beside it.
"""

from llava_jax import config as c

INSTRUCT = c.Source(
    "data/LLaVA-Instruct-150K/llava_instruct_150k.json", images=("data/coco/train2017",)
)
INSTRUCT_80K = c.Source(
    "data/LLaVA-Instruct-150K/llava_instruct_80k.json", images=("data/coco/train2017",)
)
MIX_665K = c.Source("data/llava_v1_5_mix665k.json", images=("data",))
WORLD = c.Source("data/picture_world/llava_instruct.json", images=("data/picture_world",))

# v1: image tokens between start and end, where the file has them; 224 pixels, cropped.
V1 = {
    "template": "v0",
    "start_end_tokens": True,
    "text_restarts": False,
    "image_at": "as_written",
    "image_mode": "crop",
    "image_size": 224,
}
LIGHTNING = {"template": "v1", "image_mode": "crop", "image_size": 224}
V1_5 = {"template": "v1", "image_mode": "pad", "image_size": 336}
TINY = {"template": "v1", "image_mode": "pad", "image_size": 48, "patch_size": 8}

# source, its rendering, epochs, conversations of a step, tokens and images of a row: as many images
# as its tokens could hold, so that none waits for a slot.
RECIPES = {
    "v1": ("instruct_158k", INSTRUCT, V1, 3, 32, 4096, 15),
    "v1-lightning": ("instruct_80k", INSTRUCT_80K, LIGHTNING, 1, 128, 4096, 15),
    "v1.5": ("mix_665k", MIX_665K, V1_5, 1, 128, 4096, 7),
    "tiny": ("picture_world", WORLD, TINY, 1, 32, 512, 8),
}
VARIANTS = {
    f"{name}-{size}": recipe
    for name, recipe in RECIPES.items()
    for size in ("7b", "13b")
    if name != "tiny"
} | {"tiny": RECIPES["tiny"]}


def get_config(variant: str = "v1-13b"):
    name, source, rendering, epochs, conversations, tokens, images = c.variants(VARIANTS, variant)
    config = c.defaults()
    config.name = f"stage2-{variant}"
    config.epochs = epochs
    config.data.sources = c.sources(**{name: source})
    config.data.tokenizer = f"models/start-{variant}"
    config.data.update(rendering)
    config.data.conversation_tokens = min(2048, tokens)
    config.batch.conversations = conversations
    config.batch.tokens = tokens
    config.batch.images = images
    return config
