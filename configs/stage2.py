"""Stage 2, the chatbot: projector and language model learn from conversations about pictures.

python launch/train.py --config configs/stage2.py:v1.5-7b --workdir runs/stage2-v1.5-7b

It starts as stage 1 did, with the projector of runs/stage1-VARIANT/model (config.model.projector).
Run without weights or data at hand it says what to fetch and how. Variants: v1-7b, v1-13b (default,
the paper), v1-lightning-7b, v1-lightning-13b, v1.5-7b, v1.5-13b; each with -large behind it for a
pod: eight times the batch, the rate times √8, no recipe of the paper's; tiny (the picture world, on
a laptop). Data in data/: LLaVA-Instruct-150K over COCO's train2017 for v1, llava_v1_5_mix665k.json
for v1.5, with coco/, gqa/, ocr_vqa/, textvqa/ and vg/ beside it.

The planner expects v1.5-7b to take 3.4 h on v5e-16, 2.3 h on v5p-16 and 0.8 h on v6e-16, v1.5-13b
3.2 h on v5e-32 and 1.6 h on v6e-16 (docs/results.md has the settings). The reference took 10 h for
v1-13b, 10 h (7B) and 20 h (13B) for v1.5, on eight A100. Reported:
v1-13b 85.1 % of GPT-4's score on LLaVA-Bench (COCO); v1.5-7b 78.5 on VQAv2, 62.0 on GQA, 85.9 on
POPE; v1.5-13b 80.0, 63.3, 85.9.
Ablations: --config.model.select_layer=-1 reads the tower's last layer; --config.model.projector=
starts without stage 1; --config.data.sources.instruct_158k.path=… takes another composition, such
as conversation_58k.json alone; --config.fidelity=paper has one conversation a row, and the loss as
eight devices average it.
"""

from pathlib import Path

from llava_jax import config as c

COCO = "mkdir -p data/coco && wget -P data/coco http://images.cocodataset.org/zips/train2017.zip \
&& unzip -d data/coco data/coco/train2017.zip"
FETCH = "hf download liuhaotian/LLaVA-Instruct-150K --repo-type dataset --local-dir "
INSTRUCT = c.Source(
    "data/LLaVA-Instruct-150K/llava_instruct_150k.json",
    images=("data/coco/train2017",),
    size=157_712,
    how=f"{FETCH}data/LLaVA-Instruct-150K\n{COCO}",
)
INSTRUCT_80K = c.Source(
    "data/LLaVA-Instruct-150K/llava_instruct_80k.json",
    images=("data/coco/train2017",),
    size=80_000,
    how=INSTRUCT.how,
)
MIX_665K = c.Source(
    "data/llava_v1_5_mix665k.json",
    images=("data",),
    size=665_298,
    how=f"""{FETCH}data --include llava_v1_5_mix665k.json
        {COCO}
        data/gqa/images: https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip
        data/textvqa/train_images: https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip
        data/ocr_vqa/images: as https://ocr-vqa.github.io says
        data/vg/VG_100K, VG_100K_2: https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip, \
images2.zip""",
)
WORLD = c.Source(
    "data/picture_world/llava_instruct.json",
    images=("data/picture_world",),
    how="python -m llava_jax.picture_world --out data/picture_world --scenes 2000",
)

WORLD_DEV = c.Source(
    "data/picture_world/llava_instruct_dev.json",
    images=("data/picture_world",),
    take="fraction:0.15",
    how=WORLD.how,
)

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

# source, its rendering, epochs, conversations of a step, clip (DeepSpeed's settings have none for
# v1.5 and Lightning), images of a row of 4,096 tokens: as many as its tokens could hold, so that
# none waits for a slot. Steps hold conversations of like length where the reference groups them.
RECIPES = {
    "v1": ("instruct_158k", INSTRUCT, V1, 3, 32, 1.0, 15, False),
    "v1-lightning": ("instruct_80k", INSTRUCT_80K, LIGHTNING, 1, 128, 0.0, 15, False),
    "v1.5": ("mix_665k", MIX_665K, V1_5, 1, 128, 0.0, 7, True),
}
VARIANTS = {
    f"{name}-{size}{large}": recipe
    for name, recipe in RECIPES.items()
    for size in ("7b", "13b")
    for large in ("", "-large")
} | {"tiny": None}


def get_config(variant: str = "v1-13b"):
    recipe = c.variants(VARIANTS, variant)
    config = c.start_from(f"{Path(__file__).with_name('stage1.py')}:{variant}")
    config.name = f"stage2-{variant}"
    config.model.projector = f"runs/stage1-{variant}/model"
    config.model.projector_how = (
        f"python launch/train.py --config configs/stage1.py:{variant} "
        f"--workdir runs/stage1-{variant}"
    )
    config.optim.trains = c.STAGE_2
    return tiny(config) if recipe is None else full(config, variant, *recipe)


def full(config, variant, name, source, rendering, epochs, conversations, clip, images, by_length):
    larger = 8 if variant.endswith("-large") else 1
    config.epochs = epochs
    config.data.sources = c.sources(**{name: source})
    config.data.update(rendering)
    config.batch.conversations = larger * conversations
    config.batch.tokens, config.batch.images = 4096, images
    config.batch.by_length = by_length
    config.optim.lr = 2e-5 * larger**0.5
    config.optim.clip = clip
    return config


def tiny(config):
    config.data.sources = c.sources(picture_world=WORLD)
    config.held_out.sources = c.sources(conversations=WORLD_DEV)
    config.data.template = "v1"
    config.data.conversation_tokens = config.batch.tokens = 320
    config.batch.conversations, config.batch.images = 16, 4
    config.optim.lr = 1.5e-3
    return config
