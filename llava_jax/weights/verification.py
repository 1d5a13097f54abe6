"""What was written, read again and compared with where it came from.

Dims: R rows (one), T tokens, K picture slots (one), P features of a picture.
"""

import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from llava_jax import model_folder
from llava_jax.batch import TEXT, Batch
from llava_jax.model_folder import About, Report, StoredModel
from llava_jax.models.llava import Llava
from llava_jax.weights import exporting, io, llama
from llava_jax.weights.adapter import ADAPTER_FORMATS, without_lora
from llava_jax.weights.keys import to_ours
from llava_jax.weights.llava import HUB, IN_MEMORY_PLAIN_TOWER, ORIGINAL
from llava_jax.weights.memory import params_in_memory
from llava_jax.weights.sources import open_source
from llava_jax.weights.tensor import Tensor

# Relative to the largest logit, in f32; measured worst 7e-6 on tiny models, and sums grow with
# the width.
_TOLERANCE = 1e-4


def of_import(
    src: epath.Path, stored: StoredModel, report: Report, dst: epath.Path
) -> Iterator[str]:
    """Yields what was found to hold; raises ValueError with all that does not."""
    again = model_folder.read(dst)
    written = {path: again.leaves[path] for path in report.digests}
    yield _same_tensors(written, stored.leaves, report.digests)
    # What transformers itself reads is the better witness; the rest goes by our own tables.
    theirs = src if stored.kind == HUB.name and not stored.about.config.language.lora.rank else None
    yield from _same_logits(again, report, theirs)


def of_export(stored: StoredModel, report: Report, dst: epath.Path, format: str) -> Iterator[str]:
    if format in ADAPTER_FORMATS:
        yield from _of_adapter(stored, report, dst)
        return
    stored = without_lora(stored)
    written = io.read_weights(dst)
    yield _same_tensors(written, {}, report.digests)
    layout = HUB if format == "hf" else ORIGINAL
    config = stored.about.config
    ours = to_ours(layout.rows(config), written, config.language.vocab_size)
    # An export may hold more rows than the model, for ids that are never said.
    back = {
        path: tensor
        for path, tensor in ours.items()
        if path in stored.leaves and tensor.shape == stored.leaves[path].shape
    }
    if stored.digests:
        # What a run trained, or a merge changed, has none yet.
        digests = {
            path: stored.digests.get(path) or io.sha256(stored.leaves[path].read()) for path in back
        }
        yield _same_tensors(back, stored.leaves, digests) + ", mapped back"
    yield from _same_logits(stored, report, dst if format == "hf" else None)


def _of_adapter(stored: StoredModel, report: Report, dst: epath.Path) -> Iterator[str]:
    source = open_source(dst, allow_pickle=True)  # just written
    config = stored.about.config
    rows = HUB.rows(config) + llama.lora_rows(HUB.decoder, config.language)
    back = to_ours(rows, source.tensors, config.language.vocab_size)
    digests = {path: io.sha256(stored.leaves[path].read()) for path in back}
    if source.lora != config.language.lora or len(back) != len(report.digests):
        raise ValueError(f"{dst} reads as {source.lora} and {len(back)} tensors of the model")
    yield _same_tensors(back, stored.leaves, digests) + ", mapped back"
    yield from _same_logits(stored, report, None)


def _same_tensors(
    written: Mapping[str, Tensor], source: Mapping[str, Tensor], digests: Mapping[str, str]
) -> str:
    problems = [f"{name}: not found again" for name in digests.keys() - written]
    problems += [f"{name}: not meant to be there" for name in written.keys() - digests]
    for name in sorted(digests.keys() & written):
        got, expected = written[name], source.get(name, written[name])
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            problems.append(
                f"{name}: got {got.dtype} {got.shape}, expected {expected.dtype} {expected.shape}"
            )
        elif (digest := io.sha256(got.read())) != digests[name]:
            problems.append(f"{name}: got SHA-256 {digest[:12]}…, expected {digests[name][:12]}…")
    if problems:
        raise ValueError(
            f"{len(problems)} tensors differ from what was converted:\n  " + "\n  ".join(problems)
        )
    return f"{len(digests)} tensors by name, shape, dtype and SHA-256"


def _same_logits(
    stored: StoredModel, report: Report, hub_folder: epath.Path | None
) -> Iterator[str]:
    """hub_folder: where PyTorch's model is to be loaded from; None makes it of the same tensors."""
    if report.not_finite:
        yield "no logits: with weights that are NaN or infinite they would be NaN"
        return
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        yield "no logits: torch and transformers are not installed (pip install 'llava-jax[hf]')"
        return
    stored = without_lora(stored)
    about = stored.about
    problem = exporting.not_expressible(about, "hf")
    if problem:
        yield f"no logits: PyTorch's LLaVA cannot express {problem}"
        return
    params = params_in_memory(about.config, stored.leaves)
    ours = {name: _our_logits(about, params, batch) for name, batch in _prompts(about).items()}
    del params
    theirs = _torch_logits(stored, hub_folder)
    for name, logits_TV in ours.items():
        apart = float(np.abs(logits_TV - theirs[name]).max() / np.abs(theirs[name]).max())
        if not apart <= _TOLERANCE:
            raise ValueError(
                f"logits of a {name} prompt differ from PyTorch's by {apart:.1e} of the largest, "
                f"expected at most {_TOLERANCE:.0e}"
            )
        yield f"logits of a {name} prompt equal PyTorch's within {apart:.1e} of the largest"


def _prompts(about: About) -> dict[str, Batch]:
    """A few ids, and the same with a picture among them."""
    P, side = about.config.tokens_per_image, about.config.vision.image_size
    rng = np.random.default_rng(0)
    some = rng.integers(3, about.config.language.vocab_size, 12)

    def batch(image_index: np.ndarray, images: int) -> Batch:
        T = len(image_index)
        token_RT = np.zeros((1, T), np.int32)
        token_RT[0, image_index == TEXT] = some
        zeros_RT = np.zeros((1, T), np.int32)
        return Batch(
            token_RT=token_RT,
            target_RT=zeros_RT,
            segment_RT=zeros_RT + 1,
            position_RT=np.arange(T, dtype=np.int32)[None],
            source_RT=zeros_RT,
            loss_weight_RT=zeros_RT.astype(np.float32),
            pixel_RKHW3=rng.integers(0, 256, (1, images, side, side, 3), np.uint8),
            image_index_RT=image_index.astype(np.int32)[None],
        )

    text = np.full(12, TEXT)
    return {
        "text": batch(text, 0),
        "picture": batch(np.concatenate([text[:5], np.arange(P), text[5:]]), 1),
    }


@functools.partial(jax.jit, static_argnums=0)
def _run(model: Llava, params: Any, batch: Batch) -> jax.Array:
    return model.logits(params, batch)


def _our_logits(about: About, params: Any, batch: Batch) -> np.ndarray:
    return np.asarray(_run(Llava(about.config), params, batch)[0])


def _torch_logits(stored: StoredModel, hub_folder: epath.Path | None) -> dict[str, np.ndarray]:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    if hub_folder is not None:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            str(hub_folder), dtype=torch.float32, output_loading_info=True
        )
        model, found = loaded
        odd = {kind: sorted(map(str, keys)) for kind, keys in found.items() if keys}
        if odd:
            raise ValueError(f"transformers loads {hub_folder} with {odd}")
    else:
        tensors, texts = exporting.hugging_face(stored)
        # In f32 throughout: the config's own dtype would make parts of the model half.
        model = LlavaForConditionalGeneration(LlavaConfig(**json.loads(texts["config.json"])))
        model.float()
        with torch.no_grad():
            for key, tensor in tensors.items():
                values = torch.from_numpy(np.asarray(tensor.read(), np.float32))
                model.get_parameter(_name_in_memory(key)).copy_(values)
    model.eval()
    return {
        name: _run_torch(model, stored.about, batch)
        for name, batch in _prompts(stored.about).items()
    }


def _name_in_memory(key: str) -> str:
    for hub, inside in (
        (HUB.vision, IN_MEMORY_PLAIN_TOWER.vision),
        (HUB.projector, IN_MEMORY_PLAIN_TOWER.projector),
        (HUB.decoder, IN_MEMORY_PLAIN_TOWER.decoder),
        (HUB.head, IN_MEMORY_PLAIN_TOWER.head),
    ):
        if key.startswith(hub):
            return inside + key.removeprefix(hub)
    return key


def _run_torch(model: Any, about: About, batch: Batch) -> np.ndarray:
    import torch

    vision = about.config.vision
    is_image = batch.image_index_RT != TEXT
    ids_RT = np.where(is_image, model.config.image_token_id, batch.token_RT).astype(np.int64)
    inputs = {"input_ids": torch.from_numpy(ids_RT)}
    if batch.pixel_RKHW3.shape[1]:
        mean, std = (np.array(x, np.float32) for x in (vision.image_mean, vision.image_std))
        pixel_KHW3 = (batch.pixel_RKHW3[0].astype(np.float32) / np.float32(255) - mean) / std
        inputs["pixel_values"] = torch.from_numpy(pixel_KHW3.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        logits_TV = model(**inputs).logits[0].numpy()
    return logits_TV[:, : about.config.language.num_ids]
