"""Stage 2 for ScienceQA: a lecture and a solution, then the answer (QCM-LEPA), 12 epochs.

python launch/train.py --config configs/scienceqa.py

Before, `prepare_data.py` with the same --config reports on the data; `inspect_data.py` shows it.
The data is ScienceQA's own folder, data/ScienceQA, with problems.json, pid_splits.json and images/.
Variants: v1-13b (default, the paper), v1-7b, tiny (the picture world, on a laptop). The paper's
ablation, the answer before its reasons: --config.data.sources.science_qa.prompt=QCM-ALE; the answer
alone: QCM-A.
"""

from llava_jax import config as c

# Without start and end tokens, as the released ScienceQA weights are.
V1 = {
    "template": "v0",
    "text_restarts": False,
    "image_at": "as_written",
    "image_mode": "crop",
    "image_size": 224,
}
TINY = {"template": "v0", "image_mode": "pad", "image_size": 48, "patch_size": 8}

# the folder, its rendering, tokens and images of a row.
VARIANTS = {
    "v1-7b": ("data/ScienceQA", V1, 4096, 15),
    "v1-13b": ("data/ScienceQA", V1, 4096, 15),
    "tiny": ("data/picture_world/science_qa", TINY, 512, 8),
}


def get_config(variant: str = "v1-13b"):
    folder, rendering, tokens, images = c.variants(VARIANTS, variant)
    config = c.defaults()
    config.name = f"scienceqa-{variant}"
    config.epochs = 12
    config.data.sources = c.sources(science_qa=c.Source(folder, builder="science_qa"))
    config.data.tokenizer = f"models/start-{variant}"
    config.data.update(rendering)
    config.data.conversation_tokens = min(2048, tokens)
    config.batch.conversations = 32
    config.batch.tokens = tokens
    config.batch.images = images
    return config
