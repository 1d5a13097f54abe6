"""Stage 2 by LoRA: factors beside the language model's matrices, and the projector in full.

python launch/train.py --config configs/lora.py:v1.5-7b --workdir runs/lora-v1.5-7b

As configs/stage2.py, with less memory: the language model is frozen, and lies in bf16. Variants:
v1.5-7b, v1.5-13b (rank 128), v1-lightning-7b, v1-lightning-13b (rank 64), tiny.
--config.export=peft writes the factors for PEFT as well, --config.export=hf the merged model for
transformers.

Reported for v1.5-7b with LoRA: 79.1 on VQAv2, 63.0 on GQA, 86.4 on POPE; v1.5-13b 80.0, 63.3, 86.7.
"""

from pathlib import Path

from llava_jax import config as c

# rank, alpha, dropout, learning rate, that of the projector (0: the same)
V1_5 = (128, 256.0, 0.05, 2e-4, 2e-5)
LIGHTNING = (64, 16.0, 0.05, 2e-5, 0.0)
VARIANTS = {
    "v1-lightning-7b": LIGHTNING,
    "v1-lightning-13b": LIGHTNING,
    "v1.5-7b": V1_5,
    "v1.5-13b": V1_5,
    "tiny": (8, 16.0, 0.0, 3e-3, 1.5e-3),
}


def get_config(variant: str = "v1.5-7b"):
    rank, alpha, dropout, lr, projector_lr = c.variants(VARIANTS, variant)
    config = c.start_from(f"{Path(__file__).with_name('stage2.py')}:{variant}")
    config.name = f"lora-{variant}"
    config.model.lora.update(rank=rank, alpha=alpha, dropout=dropout)
    config.optim.trains = c.LORA
    config.optim.lr = lr
    config.optim.projector_lr = projector_lr
    return config
