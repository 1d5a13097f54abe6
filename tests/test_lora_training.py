"""The same LoRA as PEFT's: its losses, its factors, its projector, and nothing else."""

from typing import Any

import jax
import numpy as np
import pytest

from llava_jax import optim
from llava_jax.config import LORA
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.lora import LoraConfig
from tests.conftest import import_peft, import_torch
from tests.models import test_llava, torch_weights
from tests.test_step import LR, Run, check_frozen, compare, one_device, overwrite, train_both

BLOCK = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
PROJECTOR = ("projector/.*", 0.1)  # 2e-5 beside 2e-4, as the reference's finetune_lora.sh

# Ranks of the reference's proportion: alpha is twice the rank.
CASES = {
    "all": (LoraConfig(rank=4, alpha=8.0), ()),
    "q and v, the projector slower": (
        LoraConfig(rank=4, alpha=8.0, targets=("q", "v")),
        (PROJECTOR,),
    ),
}


def their_lora(model: Any, lora: LoraConfig) -> Any:
    """PEFT around a transformers model, its projector trained in full.

    Both factors are drawn: of a B of zeros the first gradients of A are rounding alone, which Adam
    makes as large as any other.
    """
    import_torch().manual_seed(0)
    names = "|".join(f"{name}_proj" for name in lora.targets)
    config = import_peft().LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        lora_dropout=0.0,
        init_lora_weights=False,
        target_modules=rf".*language_model.*\.(?:{names})",
    )
    wrapped = import_peft().get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    return wrapped


def our_params(config: LlavaConfig, wrapped: Any) -> Any:
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): values
        for name, values in torch_weights.state_of(wrapped).items()
    }
    params = test_llava.our_params(config, state)
    layers = params["language"]["decoder"]["layers"]
    for name in config.language.lora.targets:
        block = f"{BLOCK.get(name, 'mlp')}.{name}_proj"
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            each = [
                state[f"model.language_model.layers.{i}.{block}.{theirs}.default.weight"]
                for i in range(config.language.num_layers)
            ]
            layers[name][ours] = np.stack([x.T if ours == "lora_a" else x for x in each])
    return jax.tree.map(np.array, params)  # not PyTorch's own memory, which it trains in


@pytest.mark.parametrize("case", CASES)
def test_the_same_training_as_peft(case):
    import_peft()
    lora, lr_of = CASES[case]
    config = test_llava.llava_config(num_kv_heads=2, lora=lora)
    wrapped = their_lora(test_llava.their_model(config), lora)
    before = our_params(config, wrapped)
    run = Run(config, before, LORA, one_device(), lr_of=lr_of)
    learning = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    projector = [p for n, p in learning.items() if "multi_modal_projector" in n]
    factors = [p for n, p in learning.items() if "lora_" in n]
    assert len(projector) + len(factors) == len(learning)
    assert len(factors) == 2 * 2 * len(lora.targets)
    factor = dict(lr_of).get(PROJECTOR[0], 1.0)
    groups = [{"params": factors}, {"params": projector, "lr": LR * factor}]
    largest = train_both(run, wrapped, config, groups)
    after = our_params(config, wrapped)
    overwrite(wrapped, largest)
    steep = our_params(config, wrapped)
    check_frozen(run.params, before, LORA)
    check_frozen(after, before, LORA)
    trained = [optim.split(x, LORA)[0] for x in (run.params, after, before, steep)]
    flat, _ = compare(trained)
    assert flat == 0
