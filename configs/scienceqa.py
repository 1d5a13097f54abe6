"""Stage 2 for ScienceQA: a lecture and a solution, then the answer (QCM-LEPA), 12 epochs.

python launch/train.py --config configs/scienceqa.py --workdir runs/scienceqa-v1-13b

It starts from a projector that was trained without start and end tokens, as the released weights
are. Run without weights or data at hand it says what to fetch and how. The data is ScienceQA's own
folder, data/ScienceQA, with problems.json, pid_splits.json and images/. Variants: v1-13b (default,
the paper), v1-7b, tiny (the picture world, on a laptop).

The reference took 4 h for v1-13b on eight A100. Reported, v1-13b: 90.92 % of test; 92.53 % with
GPT-4 as the judge.
Ablations: --config.data.sources.science_qa.prompt=QCM-ALE puts the answer before its reasons,
QCM-A has the answer alone; --config.model.select_layer=-1 reads the tower's last layer;
--config.model.projector= starts without stage 1; :v1-7b is the smaller model.
"""

from pathlib import Path

from llava_jax import config as c

FETCH = """git clone https://github.com/lupantech/ScienceQA weights/ScienceQA
    mkdir -p data/ScienceQA && cp weights/ScienceQA/data/scienceqa/*.json data/ScienceQA
    for split in train val test; do wget -P data/ScienceQA \
https://scienceqa.s3.us-west-1.amazonaws.com/images/$split.zip; \
unzip -d data/ScienceQA/images data/ScienceQA/$split.zip; done"""
WORLD = "python -m llava_jax.picture_world --out data/picture_world --scenes 2000"

# Without start and end tokens, as the released ScienceQA weights are.
V1 = {
    "template": "v0",
    "start_end_tokens": False,
    "text_restarts": False,
    "image_at": "as_written",
    "image_mode": "crop",
    "image_size": 224,
}
TINY = {"template": "v0", "image_mode": "pad", "image_size": 48, "patch_size": 8}

# the folder, how to fetch it, its rendering, the projector's run, what its command says beyond the
# config, learning rate, tokens and images of a row.
PLAIN = " --config.data.start_end_tokens=false --config.optim.trains='projector/.*'"
VARIANTS = {
    "v1-7b": ("data/ScienceQA", FETCH, V1, "stage1-v1-7b-plain", PLAIN, 2e-5, 4096, 15),
    "v1-13b": ("data/ScienceQA", FETCH, V1, "stage1-v1-13b-plain", PLAIN, 2e-5, 4096, 15),
    "tiny": ("data/picture_world/science_qa", WORLD, TINY, "stage1-tiny", "", 1.5e-3, 512, 8),
}


def get_config(variant: str = "v1-13b"):
    folder, how, rendering, run, more, lr, tokens, images = c.variants(VARIANTS, variant)
    config = c.start_from(f"{Path(__file__).with_name('stage1.py')}:{variant}")
    config.name = f"scienceqa-{variant}"
    config.epochs = 12
    config.data.sources = c.sources(
        science_qa=c.Source(folder, builder="science_qa", size=12_726, how=how)
    )
    config.held_out.sources = c.sources(
        science_qa=c.Source(folder, split="val", take="random:256", builder="science_qa", how=how)
    )
    config.data.update(rendering)
    config.batch.conversations = 32
    config.batch.tokens, config.batch.images = tokens, images
    config.model.projector = f"runs/{run}/model"
    config.model.projector_how = (
        f"python launch/train.py --config configs/stage1.py:{variant}{more} --workdir runs/{run}"
    )
    config.optim.trains = c.STAGE_2
    config.optim.lr = lr
    config.optim.clip = 1.0
    return config
