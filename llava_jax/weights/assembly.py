"""One model from one or several sources.

The first source says what is wanted; bases give the parts it lacks: a tower, a language model.
A language model over another one is a delta and is added to it. What no source has is an error,
but for the projector of a stage-1 start, which is drawn.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from llava_jax import model_folder
from llava_jax.image import Mode
from llava_jax.model_folder import About, StoredModel, Tokens
from llava_jax.models.clip_vit import ClipConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.lora import LoraConfig
from llava_jax.models.projector import ProjectorConfig
from llava_jax.weights import llama
from llava_jax.weights.deltas import (
    merged,
    seems_a_delta,
    with_fresh_start_end,
    with_new_rows,
    without_deltas,
)
from llava_jax.weights.keys import Row, to_ours, to_theirs
from llava_jax.weights.llava import HUB
from llava_jax.weights.memory import stored_shapes
from llava_jax.weights.sources import Hints, Source, open_source
from llava_jax.weights.tensor import Tensor, in_memory

# A part is whole in one source; where several have it, the first one's counts.
_PARTS = {
    "vision tower": (HUB.vision,),
    "projector": (HUB.projector, HUB.row_end),
    "language model": (HUB.decoder, HUB.head),
}
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_MOST_PROBLEMS = 20
_FACTOR = re.compile(r".*\.lora_[AB]\.weight")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What no file can say. projector: of a fresh start; start_end_tokens: it gets v1's two words
    for a picture's ends. keep_lora: factors stay factors."""

    allow_pickle: bool = False
    template: str | None = None
    projector: str = "mlp2x_gelu"
    seed: int = 0
    keep_lora: bool = False
    start_end_tokens: bool = False


def open_model(
    src: epath.Path, bases: Sequence[epath.Path] = (), choices: Choices = Choices()
) -> StoredModel:
    """The whole model at `src`, of whatever kind, its tensors unread."""
    if model_folder.is_model_folder(src):
        if len(bases) > 1:
            raise ValueError(f"got {len(bases)} bases for a model folder, expected one at most")
        stored = model_folder.read(src, bases[0] if bases else None)
        return _told(stored, choices)
    sources = [_open(place, choices) for place in (src, *bases)]
    sources = with_new_rows(without_deltas(sources))
    if choices.start_end_tokens:
        sources = with_fresh_start_end(sources)
    tensors, givers = _parts_of(sources)
    language_source = givers.get("language model")
    if language_source is None or language_source.language is None:
        raise ValueError(
            f"{src} ({sources[0].kind}) holds no language model; expected --base with the folder "
            "of one"
        )
    vision = _vision(sources, givers.get("vision tower"))
    language = language_source.language
    notes = [note for source in sources for note in source.notes]
    if "projector" not in givers:
        if any(source.kind not in ("LLaMA", "CLIP", "model folder") for source in sources):
            raise ValueError(f"{src} ({sources[0].kind}) holds no projector; expected one")
        tensors |= _fresh_projector(choices, vision, language.hidden_size)
        notes.append(f"no projector given: {choices.projector} drawn with seed {choices.seed}")
    projector, tensors = _projector(tensors, sources, vision, language.hidden_size)

    lora = next((source.lora for source in sources if source.lora is not None), None)
    if language.tie_embeddings:
        tensors, is_tied = _without_tied_head(tensors)
        language = dataclasses.replace(language, tie_embeddings=is_tied)
    config = LlavaConfig(vision, projector, language, row_end=HUB.row_end in tensors)
    if lora is not None:
        language = dataclasses.replace(language, lora=lora)
        config = dataclasses.replace(config, language=language)
    leaves = _leaves(config, tensors)
    own = {row.ours for row in _rows(config) if row.theirs in sources[0].tensors}
    if lora is not None and not choices.keep_lora:
        leaves = merged(lora, leaves)
        language = dataclasses.replace(language, lora=LoraConfig())
        config = dataclasses.replace(config, language=language)

    if sources[0].kind != "LoRA" and seems_a_delta(language_source):
        notes.append(
            f"the final norm of {language_source.where} is near 0, as a delta's is: if it is one, "
            "give --base with what it stands on"
        )
    about, said = _about(config, language_source, _hints(sources), choices)
    return StoredModel(
        about,
        leaves,
        language_source.tokenizer,
        language_source.added_tokens,
        kind=sources[0].kind if len(sources) == 1 else "several",
        own=frozenset(own & leaves.keys()),
        notes=(*notes, *said),
    )


def _told(stored: StoredModel, choices: Choices) -> StoredModel:
    """A folder that describes itself, but for what the user says of it."""
    if choices.template is None:
        return stored
    about = dataclasses.replace(stored.about, template=choices.template)
    return dataclasses.replace(stored, about=about)


def _open(place: epath.Path, choices: Choices) -> Source:
    if not model_folder.is_model_folder(place):
        return open_source(place, allow_pickle=choices.allow_pickle)
    stored = model_folder.read(place)
    about = stored.about
    return Source(
        kind="model folder",
        where=str(place),
        tensors=to_theirs(HUB.rows(about.config), stored.leaves),
        vision=about.config.vision,
        language=about.config.language,
        hints=Hints(
            select_layers=about.config.vision.select_layers,
            select=about.config.vision.select,
            image_mode=about.image_mode,
            start_end_tokens=about.start_end_tokens,
            text_restarts=about.text_restarts,
            template=about.template,
            tower=about.tower,
            image_token=about.tokens.image,
        ),
        tokens=about.tokens,
        context=about.context,
        tokenizer=stored.tokenizer,
    )


# Parts.


def _parts_of(sources: Sequence[Source]) -> tuple[dict[str, Tensor], dict[str, Source]]:
    """All tensors, each part from the first source that has it, and who gave which part."""
    tensors: dict[str, Tensor] = {}
    givers: dict[str, Source] = {}
    for source in sources:
        own = dict(source.tensors)
        gave = False
        for part, prefixes in _PARTS.items():
            held = {key: own.pop(key) for key in list(own) if key.startswith(prefixes)}
            factors = {key: held.pop(key) for key in list(held) if _FACTOR.fullmatch(key)}
            tensors |= factors
            gave |= bool(factors)
            if held and part not in givers:
                tensors |= held
                givers[part] = source
                gave = True
        tensors |= own  # of no part: named later as unused
        if not gave:
            raise ValueError(
                f"{source.where} ({source.kind}) gives nothing the others lack; leave it out"
            )
    return tensors, givers


def _vision(sources: Sequence[Source], giver: Source | None) -> ClipConfig:
    hints = _hints(sources)
    if giver is None or giver.vision is None:
        named = f" (its config names {hints.tower!r})" if hints.tower else ""
        raise ValueError(
            f"{sources[0].where} ({sources[0].kind}) holds no vision tower{named}; expected "
            "--base with that CLIP's folder"
        )
    changes: dict[str, Any] = {}
    if hints.select_layers is not None:
        changes["select_layers"] = hints.select_layers
    if hints.select is not None:
        changes["select"] = hints.select
    return dataclasses.replace(giver.vision, **changes)


def _projector(
    tensors: dict[str, Tensor], sources: Sequence[Source], vision: ClipConfig, width: int
) -> tuple[ProjectorConfig, dict[str, Tensor]]:
    """Its kind, by its tensors; and all tensors, without the identity that Hugging Face puts
    behind a linear one."""
    numbers = {
        int(found[1])
        for key in tensors
        if (found := re.fullmatch(rf"{re.escape(HUB.projector)}linear_(\d+)\.(weight|bias)", key))
    }
    depth = max(numbers, default=1)
    act = sources[0].projector_act
    if act in ("linear", None) and depth == 2:
        second = [f"{HUB.projector}linear_2.{leaf}" for leaf in ("weight", "bias")]
        identity = (np.eye(width), np.zeros(width))
        is_identity = all(
            key in tensors and np.array_equal(tensors[key].read(), values)
            for key, values in zip(second, identity, strict=True)
        )
        if act == "linear" and not is_identity:
            raise ValueError(
                f"{sources[0].where}: a projector of two matrices without an activation between "
                "them; expected gelu, or an identity as the second"
            )
        if is_identity:
            tensors = {key: tensor for key, tensor in tensors.items() if key not in second}
            depth = 1
    if act not in ("gelu", None) and depth > 1:
        raise ValueError(
            f"{sources[0].where}/config.json: 'projector_hidden_act' is {act!r}, expected 'gelu' "
            "or 'linear'"
        )
    kind = "linear" if depth == 1 else f"mlp{depth}x_gelu"
    hints = _hints(sources)
    for name, told, found in (
        ("mm_projector_type", hints.projector, kind),
        ("mm_hidden_size", hints.projector_inputs, vision.feature_size),
    ):
        if told is not None and told != found:
            raise ValueError(
                f"{sources[0].where}: config.json says {name} {told!r}, and the tensors are of "
                f"{found!r}"
            )
    return ProjectorConfig(kind, vision.feature_size, width), tensors


def _fresh_projector(choices: Choices, vision: ClipConfig, width: int) -> dict[str, Tensor]:
    """As torch draws a Linear: uniform within 1/√inputs."""
    depth = ProjectorConfig(choices.projector, vision.feature_size, width).depth
    if depth == 0:
        raise ValueError(f"got projector {choices.projector!r}, expected 'linear' or 'mlpNx_gelu'")
    if choices.seed < 0:
        raise ValueError(f"got seed {choices.seed}, expected 0 or more")
    rng = np.random.default_rng(choices.seed)
    drawn, inputs = {}, vision.feature_size
    for i in range(depth):
        for leaf, shape in (("weight", (width, inputs)), ("bias", (width,))):
            values = rng.uniform(-(inputs**-0.5), inputs**-0.5, shape).astype(np.float32)
            drawn[f"{HUB.projector}linear_{i + 1}.{leaf}"] = in_memory(
                values, "the fresh projector"
            )
        inputs = width
    return drawn


# From their tensors to our leaves.


def _rows(config: LlavaConfig) -> tuple[Row, ...]:
    factors = config.language.lora.rank > 0
    return HUB.rows(config) + (llama.lora_rows(HUB.decoder, config.language) if factors else ())


def _without_tied_head(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Some files repeat the tied embedding under the head's name, and in some the head there is
    another one, which then counts."""
    head = tensors.get(f"{HUB.head}weight")
    if head is None:
        return tensors, True
    table = tensors.get(f"{HUB.decoder}embed_tokens.weight")
    if table is None or not np.array_equal(head.read(), table.read(), equal_nan=True):
        return tensors, False
    return {key: t for key, t in tensors.items() if t is not head}, True


def _leaves(config: LlavaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our leaves; every unused, missing or misshapen tensor is named in one error."""
    rows = _rows(config)

    def expected_tensor(shape: tuple[int, ...]) -> Tensor:
        return Tensor(shape, np.dtype(np.bool_), lambda: np.zeros(shape, np.bool_), "")

    shapes = stored_shapes(config)
    expected = to_theirs(rows, {path: expected_tensor(shape) for path, shape in shapes.items()})
    problems = [
        f"{tensors[key].origin}: got shape {tensors[key].shape}, expected {expected[key].shape}"
        for key in tensors
        if key in expected and tensors[key].shape != expected[key].shape
    ]
    problems += [
        f"{key}: missing, expected shape {expected[key].shape}"
        for key in expected
        if key not in tensors
    ]
    problems += [f"{tensors[key].origin}: unused" for key in tensors if key not in expected]
    problems += [
        f"{tensor.origin}: got {tensor.dtype.name}, expected one of {_DTYPES}"
        for tensor in tensors.values()
        if tensor.dtype.name not in _DTYPES
    ]
    if problems:
        shown = problems[:_MOST_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown)} more")
        raise ValueError(
            f"{len(problems)} of the tensors do not fit the config:\n  " + "\n  ".join(shown)
        )
    return to_ours(rows, tensors, config.language.vocab_size)


# What the model is, beyond its weights.


def _hints(sources: Sequence[Source]) -> Hints:
    """Field by field, the first source that says something."""
    said = {
        field.name: next(
            (
                value
                for source in sources
                if (value := getattr(source.hints, field.name)) is not None
            ),
            None,
        )
        for field in dataclasses.fields(Hints)
    }
    return Hints(**said)


def _about(
    config: LlavaConfig,
    language: Source,
    hints: Hints,
    choices: Choices,
) -> tuple[About, list[str]]:
    notes = []
    template = choices.template or hints.template
    if template is None:
        template = "v1"
        notes.append("no file names a conversation template: 'v1' assumed (--template)")
    trained: Mode = "crop" if config.projector.kind == "linear" else "pad"
    mode = hints.image_mode or trained
    if mode != trained and config.vision.image_size == 336:
        notes.append(
            f"its files say that pictures are made square by {mode!r}; LLaVA-1.5 was trained with "
            f"{trained!r} (image_mode in llava.json)"
        )
    tokens = dataclasses.replace(language.tokens, image=hints.image_token)
    _check_tokens(tokens, config, bool(hints.start_end_tokens), language)
    about = About(
        config=config,
        template=template,
        image_mode=mode,
        start_end_tokens=bool(hints.start_end_tokens),
        text_restarts=hints.text_restarts is not False,
        tower=hints.tower,
        context=language.context,
        tokens=tokens,
    )
    return about, notes


def _check_tokens(tokens: Tokens, config: LlavaConfig, start_end: bool, language: Source) -> None:
    """Ids the system will use must exist; without a tokenizer nobody can say which those are."""
    used = {"<image>": tokens.image}
    if start_end and language.tokenizer is not None:
        used |= {"<im_start>": tokens.image_start, "<im_end>": tokens.image_end}
        missing = [name for name, id in used.items() if id is None and name != "<image>"]
        if missing:
            raise ValueError(
                f"{language.where}: its config wants {' and '.join(missing)} around a picture, and "
                "its tokenizer has no such token"
            )
    for name, id in used.items():
        if id is not None and not 0 <= id < config.language.num_ids:
            raise ValueError(
                f"{language.where}: {name} is id {id}, expected 0 to {config.language.num_ids - 1}"
            )
