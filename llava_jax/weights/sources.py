"""Whose weights are these? Told by what a folder holds, never by what it is called.

Every kind is opened as a `Source`: some parts of a LLaVA, their tensors under the hub's names
(llava.HUB) and unread, with what its config says of them. assembly.py makes a model of one or
several.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from llava_jax import tokenizer as tokenizers
from llava_jax.image import Mode
from llava_jax.model_folder import Tokens, tokenizer_folder
from llava_jax.models.clip_vit import ClipConfig
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.lora import LoraConfig
from llava_jax.weights import clip, io, llama
from llava_jax.weights.llava import (
    HUB,
    ORIGINAL,
    PROJECTOR_MODULES,
    Layout,
    layout_of,
    renamed,
    unwrapped,
    unwrapped_adapter,
)
from llava_jax.weights.settings import Settings
from llava_jax.weights.tensor import Tensor
from llava_jax.weights.tower import (
    VIT_L_336,
    check_layers,
    complete,
    image_mode_of,
    read_tower,
    tower_inside,
)

Tensors = Mapping[str, Tensor]

_PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE_ADAPTER = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_DERIVED = re.compile(rf".*(?:{clip.DERIVED}|{llama.DERIVED})")
# A whole CLIP also reads texts.
_CLIP_TEXT_SIDE = re.compile(r"text_model\.|(text|visual)_projection\.|logit_scale$")


@dataclasses.dataclass(frozen=True)
class Hints:
    """What a LLaVA's own files say beyond shapes; None where they say nothing."""

    select_layers: tuple[int, ...] | None = None
    select: str | None = None
    image_mode: Mode | None = None
    start_end_tokens: bool | None = None
    text_restarts: bool | None = None
    template: str | None = None
    image_token: int | None = None
    tower: str | None = None
    projector: str | None = None
    projector_inputs: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """vision, language: their shapes, if the source says. projector_act: between its matrices, None
    if no file says. tokens, context, tokenizer: of the language model."""

    kind: str
    where: str
    tensors: Tensors
    vision: ClipConfig | None = None
    language: LlamaConfig | None = None
    projector_act: str | None = "gelu"
    lora: LoraConfig | None = None
    hints: Hints = Hints()
    tokens: Tokens = Tokens()
    context: int = 2048
    tokenizer: epath.Path | None = None
    added_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def holds(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.tensors)


def open_source(place: epath.Path, *, allow_pickle: bool = False) -> Source:
    """Opens a folder, or a projector's file. Ours are opened by model_folder."""
    if not place.exists():
        raise ValueError(
            f"got {place}, which does not exist; expected a folder of weights (nothing is "
            "downloaded by name)"
        )
    if not place.is_dir():
        return _projector(place, allow_pickle)
    names = {entry.name for entry in place.iterdir()}
    if "adapter_config.json" in names:
        return _adapter(place, allow_pickle)
    if names & {*_ADAPTER_FILES}:
        raise ValueError(f"{place} holds a LoRA's factors and no adapter_config.json")
    own = [n for n in names if re.fullmatch(r"(model.*\.safetensors|pytorch_model.*\.bin)", n)]
    if not own and (file := _first(place, _PROJECTOR_FILES)):
        return _projector(file, allow_pickle)
    return _model(place, io.read_weights(place, allow_pickle=allow_pickle))


def _model(folder: epath.Path, read: Tensors) -> Source:
    tensors = {key: tensor for key, tensor in read.items() if not _DERIVED.fullmatch(key)}
    notes = [f"{len(read) - len(tensors)} buffers that are computed were left out"]
    notes = notes if len(tensors) < len(read) else []
    settings = Settings.read(folder / "config.json")
    settings.only("quantization_config", None, None)
    layout = layout_of(tensors)
    if layout is not None:
        source = _original if layout is ORIGINAL else _hugging_face
        return _noted(source(folder, settings, layout, tensors), notes)
    if any(key.startswith(("model.layers.", "layers.")) for key in tensors):
        return _noted(_llama(folder, settings, tensors), notes)
    if any(key.removeprefix("vision_model.").startswith("encoder.layers.") for key in tensors):
        return _noted(_clip(folder, settings, tensors), notes)
    shown = ", ".join(sorted(tensors)[:3])
    raise ValueError(
        f"{folder}: unknown architecture ({settings.values.get('architectures')}, keys {shown}, …);"
        " expected a llava-hf or original LLaVA, a CLIP, a LLaMA or Vicuna, a projector or a LoRA"
    )


def _hugging_face(folder, settings: Settings, layout: Layout, tensors: Tensors) -> Source:
    settings.only("multimodal_projector_bias", True, True)
    settings.only("model_type", "llava", "llava")
    text, vision = settings.inner("text_config"), settings.inner("vision_config")
    # A config without a tower means the class's own default: ViT-L/14-336.
    default = {} if "vision_config" in settings else VIT_L_336
    vision = Settings({**default, **vision.values}, vision.where)
    # The language model's own settings count; some are only written above them.
    above = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    shared = {name: settings.values[name] for name in above if name in settings}
    text = Settings({**shared, **text.values}, text.where)
    layers = settings.get("vision_feature_layer", (int, list), -2)
    strategy = settings.get("vision_feature_select_strategy", str, "default")
    if strategy not in ("default", "full"):
        raise ValueError(
            f"{settings.where}: 'vision_feature_select_strategy' is {strategy!r}, expected "
            "'default' or 'full'"
        )
    image = settings.get("image_token_index", int, settings.get("image_token_id", int, 32000))
    hub = renamed(tensors, layout)
    return Source(
        kind=layout.name,
        where=str(folder),
        tensors=hub,
        vision=read_tower(vision, hub, folder),
        projector_act=settings.get("projector_hidden_act", str, "gelu"),
        hints=Hints(
            select_layers=tuple(layers) if isinstance(layers, list) else (layers,),
            select="patch" if strategy == "default" else "cls_patch",
            image_mode=image_mode_of(folder),
            template=_template(folder),
            image_token=image,
        ),
        **_language(folder, text, hub, image=image),
    )


def _original(folder, settings: Settings, layout: Layout, tensors: Tensors) -> Source:
    if "text_config" in settings:
        raise ValueError(
            f"{folder}: config.json is of a llava-hf and the keys are the original LLaVA's; "
            "expected both of one kind"
        )
    hub = renamed(tensors, layout)
    return Source(
        kind=layout.name,
        where=str(folder),
        tensors=hub,
        vision=tower_inside(settings, hub),
        hints=_original_hints(settings),
        **_language(folder, settings, hub),
    )


def _original_hints(settings: Settings) -> Hints:
    """Of an original LLaVA's config.json; of another's, nothing."""
    if not any(name.startswith("mm_") for name in settings.values):
        return Hints()
    select = settings.get("mm_vision_select_feature", str, "patch")
    mode = settings.get("image_aspect_ratio", str, "square")
    modes: dict[str, Mode] = {"square": "crop", "pad": "pad", "anyres": "anyres"}
    if mode not in modes:
        raise ValueError(
            f"{settings.where}: 'image_aspect_ratio' is {mode!r}, expected one of {sorted(modes)}"
        )
    return Hints(
        select_layers=(settings.get("mm_vision_select_layer", int, -2),),
        select=select,
        image_mode=modes[mode],
        start_end_tokens=settings.get("mm_use_im_start_end", bool, False),
        tower=settings.get("mm_vision_tower", str, None),
        projector=settings.get("mm_projector_type", str, None),
        projector_inputs=settings.get("mm_hidden_size", int, None),
    )


def _llama(folder, settings: Settings, tensors: Tensors) -> Source:
    # LlamaModel saved alone lacks the prefix of LlamaForCausalLM.
    prefix = "model." if any(key.startswith("model.layers.") for key in tensors) else ""
    hub = renamed(tensors, dataclasses.replace(ORIGINAL, decoder=prefix))
    return Source(
        kind="LLaMA",
        where=str(folder),
        tensors=hub,
        hints=Hints(template=_template(folder)),
        **_language(folder, settings, hub),
    )


def _clip(folder, settings: Settings, tensors: Tensors) -> Source:
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in tensors) else ""
    seeing = {key: x for key, x in tensors.items() if not _CLIP_TEXT_SIDE.match(key)}
    described = settings.inner("vision_config") if "vision_config" in settings else settings
    left = len(tensors) - len(seeing)
    hub = renamed(seeing, dataclasses.replace(HUB, vision=prefix))
    return Source(
        kind="CLIP",
        where=str(folder),
        tensors=hub,
        vision=read_tower(described, hub, folder),
        notes=(f"{left} tensors of CLIP's text side were left out",) if left else (),
    )


def _projector(file: epath.Path, allow_pickle: bool) -> Source:
    tensors = io.read_file(file, allow_pickle=allow_pickle)
    settings = Settings.read_if_there(file.parent / "config.json")
    hub = unwrapped(tensors)
    if not any(key.startswith(HUB.projector) for key in hub):
        raise ValueError(
            f"{file}: holds {', '.join(sorted(tensors)[:3])}; expected a projector's "
            "(model.mm_projector.…)"
        )
    hints = _original_hints(settings)
    return Source(kind="projector", where=str(file), tensors=hub, hints=hints)


def _adapter(folder: epath.Path, allow_pickle: bool) -> Source:
    """PEFT's factors, and beside them what was trained whole: the projector."""
    file = _first(folder, _ADAPTER_FILES)
    if file is None:
        raise ValueError(f"{folder} has adapter_config.json and none of {_ADAPTER_FILES}")
    factors = unwrapped_adapter(io.read_file(file, allow_pickle=allow_pickle))
    beside = _first(folder, _BESIDE_ADAPTER)
    whole = {} if beside is None else unwrapped(io.read_file(beside, allow_pickle=allow_pickle))
    settings = Settings.read_if_there(folder / "config.json")
    tensors = {**factors, **whole}
    has_projector = any(key.startswith(HUB.projector) for key in tensors)
    notes = () if has_projector else (f"{folder}: no {_BESIDE_ADAPTER[1]}, so no projector",)
    return Source(
        kind="LoRA",
        where=str(folder),
        tensors=tensors,
        lora=llama.read_adapter(
            Settings.read(folder / "adapter_config.json"), factors, PROJECTOR_MODULES
        ),
        projector_act=None,
        hints=_original_hints(settings),
        notes=notes,
    )


# What several kinds share.


def _language(
    folder: epath.Path, settings: Settings, hub: Tensors, image: int | None = None
) -> dict[str, Any]:
    """The Source fields of a folder that holds a language model."""
    table = hub.get(f"{HUB.decoder}embed_tokens.weight")
    if table is None:
        raise ValueError(f"{folder}: holds no embed_tokens.weight; expected the language model's")
    vocab_rows = table.shape[0]
    told = settings.get("vocab_size", int, 32000)
    if told != vocab_rows:
        raise ValueError(
            f"{settings.where}: 'vocab_size' is {told}, and {table.origin} has {vocab_rows} rows"
        )
    has_tokenizer = tokenizer_folder(folder)
    added, vocab_size = {}, vocab_rows
    if has_tokenizer is not None:
        loaded = tokenizers.load(folder)
        added, vocab_size = loaded.added, min(loaded.vocab_size, vocab_rows)
    check_layers(settings, hub, f"{HUB.decoder}layers.", 32)
    generation = Settings.read_if_there(folder / "generation_config.json")

    def id_of(name: str) -> int | None:
        # Of several ends the first is taken: the template's stop strings do the rest.
        for each in (settings, generation):
            value = each.get(name, (int, list), None)
            if value is not None:
                return value[0] if isinstance(value, list) else value
        return None

    return {
        "language": complete(lambda: llama.read_config(settings, vocab_rows, vocab_size), settings),
        "context": llama.read_context(settings),
        "tokenizer": has_tokenizer,
        "tokens": Tokens(
            bos=1 if (bos := id_of("bos_token_id")) is None else bos,
            eos=2 if (eos := id_of("eos_token_id")) is None else eos,
            pad=id_of("pad_token_id"),
            image=image,
            image_start=added.get("<im_start>"),
            image_end=added.get("<im_end>"),
            image_patch=added.get("<im_patch>"),
        ),
        "notes": ()
        if has_tokenizer
        else (f"{folder}: no tokenizer, so ids only, and no added ids are told apart",),
    }


def _template(folder: epath.Path) -> str | None:
    """Which of our templates the folder's own chat template speaks."""
    text = ""
    for name in _CHAT_TEMPLATES:
        if (folder / name).exists():
            whole = (folder / name).read_text()
            is_json = name.endswith(".json")
            text = Settings.read(folder / name).values.get("chat_template") if is_json else whole
            break
    for mark, template in (("[INST]", "llava_llama_2"), ("###", "v0"), ("USER:", "v1")):
        if mark in str(text):
            return template
    return None


def _first(folder: epath.Path, names: tuple[str, ...]) -> epath.Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _noted(source: Source, notes: list[str]) -> Source:
    return dataclasses.replace(source, notes=(*source.notes, *notes))
