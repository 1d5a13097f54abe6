"""Weights that only mean something on top of others: deltas, LoRA factors, rows for new ids."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from llava_jax.models.lora import OUTPUT_FIRST, LoraConfig
from llava_jax.weights.llava import HUB
from llava_jax.weights.sources import Source
from llava_jax.weights.tensor import Tensor

_EMBEDDING, _HEAD = f"{HUB.decoder}embed_tokens.weight", f"{HUB.head}weight"
_START_END = ("<im_start>", "<im_end>")


def without_deltas(sources: list[Source]) -> list[Source]:
    """The first source's language model added to the base's, where both have one and the first
    has nothing else that a base could be for."""
    first, bases = sources[0], sources[1:]
    under = next((base for base in bases if base.holds(HUB.decoder)), None)
    if not first.holds(f"{HUB.decoder}layers.") or first.kind == "LoRA" or under is None:
        return sources
    if under.kind != "LLaMA":
        raise ValueError(
            f"got a {first.kind} over a base with a language model of its own ({under.where}); "
            "expected a LLaMA folder, if the first is a delta on it, or no such base"
        )
    if (ratio := _norm(first) / _norm(under)) > 0.5:
        raise ValueError(
            f"got {first.where} over {under.where}, both with a language model; a delta's final "
            f"norm is near 0, and the first's is {ratio:.2f} times the base's: it is whole, leave "
            "this base out"
        )
    added = {
        key: _added(tensor, under.tensors[key]) if key in under.tensors else tensor
        for key, tensor in first.tensors.items()
    }
    notes = [f"{first.where} was taken for a delta and added to {under.where}"]
    hints = first.hints
    if hints.template is None:
        hints = dataclasses.replace(hints, template="v0", text_restarts=False)
        notes.append("deltas came with LLaVA's first models: template 'v0' assumed (--template)")
    whole = dataclasses.replace(first, tensors=added, hints=hints, notes=(*first.notes, *notes))
    return [whole, *(base for base in bases if base is not under)]


def seems_a_delta(source: Source) -> bool:
    """A final norm scales by about 1; the difference of two is near 0."""
    return _norm(source) < 0.02


def _norm(source: Source) -> float:
    """The final norm's scale, on average."""
    tensor = source.tensors.get(f"{HUB.decoder}norm.weight")
    if tensor is None:
        return 1.0
    return float(np.sqrt(np.mean(np.square(tensor.read().astype(np.float64)))))


def _added(delta: Tensor, base: Tensor) -> Tensor:
    """Their sum in the delta's dtype; rows the delta has beyond the base's are its own."""
    if delta.shape[1:] != base.shape[1:] or delta.shape[:1] < base.shape[:1]:
        raise ValueError(f"{delta.origin}: got shape {delta.shape} on {base.shape} of the base")

    def read() -> np.ndarray:
        whole, under = np.array(delta.read()), base.read()
        whole[: len(under)] += under.astype(whole.dtype)
        return whole

    return Tensor(delta.shape, delta.dtype, read, delta.origin)


def with_new_rows(sources: list[Source]) -> list[Source]:
    """A stage 1 with <im_start> and <im_end> trains their two rows of the embedding, and saves it
    beside the projector, whole or these rows alone; they go to the language model's end. Rows of
    the head never trained: they are the mean of the others, as when the ids were added."""
    first = sources[0]
    rows = first.tensors.get(_EMBEDDING)
    under = next((source for source in sources[1:] if source.holds(HUB.decoder)), None)
    if first.kind != "projector" or rows is None or under is None or under.language is None:
        return sources
    known = under.tensors[_EMBEDDING]
    if rows.shape[0] not in (2, known.shape[0] + 2) or rows.shape[1:] != known.shape[1:]:
        raise ValueError(
            f"{rows.origin}: got shape {rows.shape} for a language model of {known.shape}; "
            "expected two more rows, or the two alone"
        )
    longer = _with_start_end(under, lambda _: rows.read()[-2:])
    own = {key: tensor for key, tensor in first.tensors.items() if key != _EMBEDDING}
    hints = dataclasses.replace(first.hints, start_end_tokens=True)
    alone = dataclasses.replace(first, tensors=own, hints=hints)
    return [alone, *(longer if source is under else source for source in sources[1:])]


def with_fresh_start_end(sources: list[Source]) -> list[Source]:
    """What v1's stage 1 starts from: <im_start> and <im_end>, whose rows are the mean of the
    others until they train."""

    def longer(source: Source) -> Source:
        if not source.holds(HUB.decoder) or source.language is None:
            return source
        if source.tokens.image_start is not None:
            raise ValueError(f"{source.where} has {_START_END[0]} already: leave them out")
        hints = dataclasses.replace(source.hints, start_end_tokens=True)
        added = _with_start_end(source, lambda known: np.stack([mean_row(known)] * 2))
        return dataclasses.replace(added, hints=hints)

    return [longer(source) for source in sources]


def _with_start_end(under: Source, rows: Callable[[np.ndarray], np.ndarray]) -> Source:
    """The language model with two more ids. rows: of the embedding, made of the others."""
    assert under.language is not None
    tensors = dict(under.tensors)
    tensors[_EMBEDDING] = _longer(tensors[_EMBEDDING], rows)
    if _HEAD in tensors:
        tensors[_HEAD] = _longer(tensors[_HEAD], lambda head: np.stack([mean_row(head)] * 2))
    start = under.language.num_ids
    return dataclasses.replace(
        under,
        tensors=tensors,
        language=dataclasses.replace(
            under.language, added_vocab=under.language.added_vocab + len(_START_END)
        ),
        tokens=dataclasses.replace(under.tokens, image_start=start, image_end=start + 1),
        added_tokens={**under.added_tokens, _START_END[0]: start, _START_END[1]: start + 1},
    )


def _longer(tensor: Tensor, more: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    def read() -> np.ndarray:
        known = tensor.read()
        return np.concatenate([known, more(known).astype(known.dtype)])

    return Tensor((tensor.shape[0] + 2, *tensor.shape[1:]), tensor.dtype, read, tensor.origin)


def mean_row(rows: np.ndarray) -> np.ndarray:
    """In f32, a few thousand rows at a time."""
    pieces = range(0, len(rows), 4096)
    total = sum(rows[i : i + 4096].sum(0, dtype=np.float32) for i in pieces)
    return np.asarray(total) / np.float32(len(rows))


def merged(lora: LoraConfig, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The deltas added into their kernels, in f32 and rounded once."""
    merged = {path: t for path, t in leaves.items() if not path.endswith(("lora_a", "lora_b"))}
    for path in leaves:
        parent, _, name = path.rpartition("/")
        if name == "lora_a":
            kernel = leaves[f"{parent}/kernel"]
            merged[f"{parent}/kernel"] = dataclasses.replace(
                kernel, read=_merging(lora, parent, leaves), part=None
            )
    return merged


def _merging(
    lora: LoraConfig, parent: str, leaves: Mapping[str, Tensor]
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        kernel = leaves[f"{parent}/kernel"].read()
        a_IR, b_OR = (leaves[f"{parent}/{name}"].read() for name in ("lora_a", "lora_b"))
        delta_IO = a_IR.astype(np.float32) @ b_OR.astype(np.float32).T
        output_first = parent.rpartition("/")[2] in OUTPUT_FIRST
        delta = np.float32(lora.scale) * (delta_IO.T if output_first else delta_IO)
        return (kernel.astype(np.float32) + delta).astype(kernel.dtype)

    return read
