"""How much arithmetic a training step asks for and how much chips can do: what MFU is made of.

A weight takes part in 2 FLOPs of a token forward, in 2 more where a gradient passes through it, and
in 2 more where it learns. Attention's scores are those of tokens that are seen: half of a causal
square. Not counted is what recomputation adds, which is no work for the model's sake, and what is
no matrix: norms, softmax, biases, the lookup of embeddings.

>>> of = costs(released("v1.5-7b"), (r"projector/.*",))
>>> mfu = of.step(tokens=tokens, pairs=pairs_of(lengths), images=n) / seconds / devices / peak(chip)
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from llava_jax.models.clip_vit import ClipConfig
from llava_jax.models.llava import Llava, LlavaConfig
from llava_jax.models.projector import ProjectorConfig
from llava_jax.sharding import leaf_paths

# bf16 with dense matrices, FLOP/s of a chip.
# TPUs: "System architecture" of each generation, https://cloud.google.com/tpu/docs/v4 (v2, v3,
# v5e, v5p, v6e beside it); v2: 180 TFLOPS for a board of 4 chips.
# GPUs: NVIDIA's data sheets, where figures marked "with sparsity" are twice these.
PEAK: Mapping[str, float] = MappingProxyType(
    {
        "v2": 45e12,
        "v3": 123e12,
        "v4": 275e12,
        "v5e": 197e12,
        "v5p": 459e12,
        "v6e": 918e12,
        "A100": 312e12,  # SXM and PCIe alike
        "H100": 989.4e12,  # SXM; H200 has the same chip
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,  # the data sheets of H100 NVL and H200 NVL
    }
)
# By what JAX calls them. On v2 and v3 each of a chip's two cores is a device.
_TPUS = {
    "TPU v2": PEAK["v2"] / 2,
    "TPU v3": PEAK["v3"] / 2,
    "TPU v4": PEAK["v4"],
    "TPU v5 lite": PEAK["v5e"],
    "TPU v5e": PEAK["v5e"],
    "TPU v5": PEAK["v5p"],
    "TPU v5p": PEAK["v5p"],
    "TPU v6 lite": PEAK["v6e"],
    "TPU v6e": PEAK["v6e"],
}
# The first that fits; a part of a GPU (MIG) is none of them.
_GPUS = (
    (r"NVIDIA A100\b(?!.*MIG).*", PEAK["A100"]),
    (r"NVIDIA H100 PCIe", PEAK["H100 PCIe"]),
    (r"NVIDIA (H100|H200) NVL", PEAK["H100 NVL"]),
    (r"NVIDIA H100( 80GB HBM3)?", PEAK["H100"]),
    (r"NVIDIA H200", PEAK["H100"]),
)


def peak(device: Any) -> float | None:
    """FLOP/s of a device of JAX's in bf16; None of what is not in the table, as a CPU."""
    kind = device.device_kind
    if kind in _TPUS:
        return _TPUS[kind]
    return next((flops for pattern, flops in _GPUS if re.fullmatch(pattern, kind)), None)


class Costs(NamedTuple):
    """FLOPs of training for a token, for a pair of a token and one it sees, and for an image."""

    token: float
    pair: float
    image: float

    def step(self, *, tokens: float, pairs: float, images: float) -> float:
        """With real tokens, pairs and images, of what was learned from; with all, of the work."""
        return self.token * tokens + self.pair * pairs + self.image * images


def pairs_of(lengths: Iterable[int]) -> int:
    """Tokens and what they see, themselves too, in segments of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


# A gradient passes through a part if something trains in it or in what feeds it.
_FED_BY = {
    "vision": ("vision/",),
    "projector": ("vision/", "projector/"),
    "decoder": ("vision/", "projector/", "row_end", "language/embed/", "language/decoder/"),
    "head": ("",),
}
_MATRIX = r".*/(kernel|patch_kernel|lora_a|lora_b)|language/head/added"
_TIED = r"|language/embed/(table|added)"  # where they are the head's too


def costs(config: LlavaConfig, trainable: Sequence[str]) -> Costs:
    """trainable: patterns of whole paths as in optim.py, or the paths themselves."""
    shapes = jax.eval_shape(Llava(config).init, jax.random.key(0))
    paths, leaves = jax.tree.leaves(leaf_paths(shapes)), jax.tree.leaves(shapes)
    learns = {path for path in paths if any(re.fullmatch(p, path) for p in trainable)}

    passes = {part: any(path.startswith(fed) for path in learns) for part, fed in _FED_BY.items()}

    matrix = re.compile(_MATRIX + (_TIED if config.language.tie_embeddings else ""))
    token = image = 0
    for path, leaf in zip(paths, leaves, strict=True):
        if not matrix.fullmatch(path):
            continue
        flops = 2 * math.prod(leaf.shape)
        if path.startswith("language/"):
            part = "decoder" if path.startswith("language/decoder/") else "head"
            token += flops * (1 + passes[part] + (path in learns))
        else:
            part = path.split("/")[0]
            image += flops * (1 + passes[part] + (path in learns)) * _columns(path, config)
    # Both sides of a score have gradients, so that a pass back is twice one forward.
    scores = {part: 1 + 2 * passes[part] for part in passes}
    language = config.language
    pair = 4 * language.num_layers * language.num_heads * language.size_of_head
    image += scores["vision"] * _scores_of_tower(config.vision)
    image += scores["projector"] * _scores_of_projector(config.projector, config.vision)
    return Costs(float(token), float(scores["decoder"] * pair), float(image))


def _columns(path: str, config: LlavaConfig) -> int:
    """How many vectors of an image a matrix is applied to."""
    if path == "vision/patch_kernel":
        return config.vision.grid**2
    if path.startswith("vision/"):
        return config.vision.grid**2 + 1
    of_features = not config.projector.resampler or re.search(r"/cross_[kv]/", path)
    return config.vision.num_features if of_features else config.tokens_per_image


def _scores_of_tower(vision: ClipConfig) -> int:
    return 4 * vision.num_blocks * vision.hidden_size * (vision.grid**2 + 1) ** 2


def _scores_of_projector(projector: ProjectorConfig, vision: ClipConfig) -> int:
    of = projector.resampler
    if of is None:
        return 0
    return (
        4 * of.num_layers * of.hidden_size * of.num_queries * (of.num_queries + vision.num_features)
    )
