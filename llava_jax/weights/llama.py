"""LLaMA's and Vicuna's keys, and their config.json both ways; PEFT's LoRA factors."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from llava_jax.models.llama import LlamaConfig, RopeConfig
from llava_jax.models.lora import LoraConfig
from llava_jax.weights.keys import ADDED, ORIGINAL, TRANSPOSED, Row, table
from llava_jax.weights.settings import Settings

# Names as inside LlamaModel.
_DECODER = (
    Row("embed/table", "embed_tokens.weight", rows=ORIGINAL),
    Row("embed/added", "embed_tokens.weight", rows=ADDED),
    Row("decoder/layers/{}/attention_norm/scale", "layers.{}.input_layernorm.weight"),
    Row("decoder/layers/{}/q/kernel", "layers.{}.self_attn.q_proj.weight", TRANSPOSED),
    Row("decoder/layers/{}/k/kernel", "layers.{}.self_attn.k_proj.weight", TRANSPOSED),
    Row("decoder/layers/{}/v/kernel", "layers.{}.self_attn.v_proj.weight", TRANSPOSED),
    Row("decoder/layers/{}/o/kernel", "layers.{}.self_attn.o_proj.weight"),
    Row("decoder/layers/{}/mlp_norm/scale", "layers.{}.post_attention_layernorm.weight"),
    Row("decoder/layers/{}/gate/kernel", "layers.{}.mlp.gate_proj.weight", TRANSPOSED),
    Row("decoder/layers/{}/up/kernel", "layers.{}.mlp.up_proj.weight", TRANSPOSED),
    Row("decoder/layers/{}/down/kernel", "layers.{}.mlp.down_proj.weight"),
    Row("decoder/norm/scale", "norm.weight"),
)
_HEAD = (
    Row("head/kernel", "weight", TRANSPOSED, rows=ORIGINAL),
    Row("head/added", "weight", TRANSPOSED, rows=ADDED),
)
_PEFT_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

_FACTOR_OF = re.compile(r".*\.(\w+)\.lora_[AB]\.weight")

# Buffers of older checkpoints, computed from the config: rotary frequencies.
DERIVED = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def rows(decoder: str, head: str, config: LlamaConfig) -> tuple[Row, ...]:
    """The keys behind the prefixes of the decoder and of the head."""
    ours = {"ours": "language/", "layers": config.num_layers}
    tied = () if config.tie_embeddings else table(_HEAD, theirs=head, **ours)
    return table(_DECODER, theirs=decoder, **ours) + tied


def lora_rows(prefix: str, config: LlamaConfig) -> tuple[Row, ...]:
    """PEFT's A is [rank, in] and B [out, rank]; ours are [in, rank] and [out, rank]."""
    pairs = [
        row
        for name in config.lora.targets
        for row in (
            Row(
                f"decoder/layers/{{}}/{name}/lora_a",
                f"layers.{{}}.{_PEFT_MODULES[name]}.lora_A.weight",
                TRANSPOSED,
            ),
            Row(
                f"decoder/layers/{{}}/{name}/lora_b",
                f"layers.{{}}.{_PEFT_MODULES[name]}.lora_B.weight",
            ),
        )
    ]
    return table(pairs, ours="language/", theirs=prefix, layers=config.num_layers)


def read_config(settings: Settings, vocab_rows: int, vocab_size: int) -> LlamaConfig:
    """From a LlamaConfig's JSON. vocab_rows: of the embedding; vocab_size: ids of the original
    vocabulary among them."""
    model_type = settings.get("model_type", str, "llama")
    if model_type not in ("llama", "vicuna", "llava", "llava_llama"):
        raise ValueError(
            f"{settings.where}: the language model is a {model_type!r}, expected a 'llama'"
        )
    for name, default in (("attention_bias", False), ("mlp_bias", False)):
        settings.only(name, False, default)
    hidden_size = settings.size("hidden_size", 4096)
    num_heads = settings.size("num_attention_heads", 32)
    head_dim = settings.get("head_dim", int, None)
    # Written out by some and left out by others, the usual one is the same architecture.
    usual = num_heads > 0 and head_dim == hidden_size // num_heads
    return LlamaConfig(
        vocab_size=vocab_size,
        added_vocab=vocab_rows - vocab_size,
        hidden_size=hidden_size,
        intermediate_size=settings.size("intermediate_size", 11008),
        num_layers=settings.size("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=settings.size("num_key_value_heads", num_heads),
        head_dim=None if usual else head_dim,
        rms_norm_eps=settings.get("rms_norm_eps", float, 1e-6),
        rope=_read_rope(settings),
        hidden_act=settings.get("hidden_act", str, "silu"),
        tie_embeddings=settings.get("tie_word_embeddings", bool, False),
    )


def read_context(settings: Settings) -> int:
    return settings.size("max_position_embeddings", 2048)


def _read_rope(settings: Settings) -> RopeConfig:
    # transformers 5 has one object; earlier ones a number and, maybe, an object beside it.
    rope = settings.inner("rope_parameters" if "rope_parameters" in settings else "rope_scaling")
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    default = RopeConfig()
    return RopeConfig(
        theta=rope.get("rope_theta", float, settings.get("rope_theta", float, default.theta)),
        kind=kind,
        factor=rope.get("factor", float, default.factor),
        low_freq_factor=rope.get("low_freq_factor", float, default.low_freq_factor),
        high_freq_factor=rope.get("high_freq_factor", float, default.high_freq_factor),
        original_max_position=rope.get(
            "original_max_position_embeddings", int, default.original_max_position
        ),
    )


def write_config(config: LlamaConfig, *, vocab_rows: int, context: int) -> dict[str, Any]:
    """In full: LlamaConfig's own defaults are not Vicuna's."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_rows,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.size_of_head,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": context,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _write_rope_scaling(config.rope),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }


def _write_rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    # "type" is what transformers before 4.43 read.
    scaling: dict[str, Any] = {"rope_type": rope.kind, "type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    return scaling


def peft_names(lora: LoraConfig) -> list[str]:
    """PEFT's short names of the matrices that have factors."""
    return [_PEFT_MODULES[name].rpartition(".")[2] for name in lora.targets]


def write_adapter(
    lora: LoraConfig, *, target_modules: str | list[str], modules_to_save: list[str] | None
) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": target_modules,
        "modules_to_save": modules_to_save,
    }


def read_adapter(
    settings: Settings, keys: Iterable[str], saved_whole: Sequence[str] = ()
) -> LoraConfig:
    """From PEFT's adapter_config.json; variants of LoRA with another function are refused. keys: of
    the factors. saved_whole: modules that PEFT may keep whole beside them."""
    peft_type = settings.get("peft_type", str)
    if peft_type != "LORA":
        raise ValueError(f"{settings.where}: 'peft_type' is {peft_type!r}, expected 'LORA'")
    for name, supported in (
        ("bias", "none"),
        ("use_rslora", False),
        ("use_dora", False),
        ("fan_in_fan_out", False),
        ("rank_pattern", {}),
        ("alpha_pattern", {}),
        ("layers_to_transform", None),
        ("loftq_config", {}),
    ):
        settings.only(name, supported, supported)
    if not set(whole := settings.get("modules_to_save", list, [])) <= {*saved_whole}:
        raise ValueError(
            f"{settings.where}: 'modules_to_save' is {whole}, expected none but {[*saved_whole]}"
        )
    modules = settings.get("target_modules", (list, str))
    if isinstance(modules, str):  # a pattern of whole names: the keys say what it fitted
        modules = [found[1] for key in keys if (found := _FACTOR_OF.fullmatch(key))]
    ours = {theirs.rpartition(".")[2]: name for name, theirs in _PEFT_MODULES.items()}
    unknown = sorted({m for m in modules if str(m).rpartition(".")[2] not in ours})
    if unknown:
        raise ValueError(
            f"{settings.where}: 'target_modules' has {unknown}, expected names among {sorted(ours)}"
        )
    targets = {ours[m.rpartition(".")[2]] for m in modules}
    return LoraConfig(
        rank=settings.size("r"),
        alpha=float(settings.get("lora_alpha", float)),
        dropout=float(settings.get("lora_dropout", float, 0.0)),
        targets=tuple(name for name in _PEFT_MODULES if name in targets),
    )
