"""The README.md of an exported folder: what is known of the model, and what its maker must add."""

from llava_jax.model_folder import About, Report, StoredModel

_CARD = """\
---
library_name: {library}
pipeline_tag: image-text-to-text
tags:
- llava
- jax
# To fill in: license, base_model (language model and vision tower), datasets, language.
---

# A LLaVA, exported from llava_jax

| | |
|---|---|
| architecture | {variant} |
| weights | {count:,} in {dtypes} |
| conversation | template `{template}`{start_end} |
| pictures | {side}×{side}, made square by {mode}, {tokens} tokens each |
| base fingerprint | `{fingerprint}` |

## Use
{use}

## To fill in before this is published
- **Data and licences**: what it was trained on, and the terms of that data, of the language model
  and of the vision tower.
- **Evaluation**: benchmark, its version, the judge if there is one.
- **Limits**: what it must not be used for.
"""

_ADAPTER_CARD = """\
---
library_name: peft
# To fill in: license, base_model, datasets, language.
---

# A LoRA of a LLaVA, exported from llava_jax

| | |
|---|---|
| architecture | {variant} |
| factors | rank {rank}, alpha {alpha:g}, on {targets}; the projector whole |
| conversation | template `{template}`{start_end} |
| stands on | {base} |

## Use
{use}

## To fill in before this is published
- **Data and licences**, **evaluation** and **limits**, as for a whole model.
"""

_ADAPTER_USE = {
    "peft": """\
```python
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

base = LlavaForConditionalGeneration.from_pretrained("that model, exported with --format hf")
model = PeftModel.from_pretrained(base, "this folder")
```
What cannot load `modules_to_save` takes the merged model, `--format hf` of the source.""",
    "original-peft": "The layout is haotian-liu/LLaVA's, which wants `--model-base`, and `llava` "
    "and `lora` in the folder's name.",
}

_USE = {
    "hf": """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("this folder")
model = AutoModelForImageTextToText.from_pretrained("this folder")
```
The chat template is the one the model was trained with: use `processor.apply_chat_template`.""",
    "original": "The layout is haotian-liu/LLaVA's, with the vision tower inside.",
}

_START_END = ", pictures between `<im_start>` and `<im_end>`"
_MODES = {
    "pad": "padding",
    "crop": "cropping the centre",
    "anyres": "cutting into tiles",
}


def adapter_card(stored: StoredModel, format: str) -> str:
    about, lora = stored.about, stored.about.config.language.lora
    base = "a model its source did not name"
    if stored.base is not None:
        base = f"the llava_jax model folder of fingerprint `{stored.base.fingerprint}`"
    return _ADAPTER_CARD.format(
        variant=_variant(about),
        rank=lora.rank,
        alpha=lora.alpha,
        targets=", ".join(lora.targets),
        template=about.template,
        start_end=_START_END * about.start_end_tokens,
        base=base,
        use=_ADAPTER_USE[format],
    )


def _variant(about: About) -> str:
    return f"LLaVA {about.variant}" if about.variant else "not a released LLaVA's"


def model_card(stored: StoredModel, format: str, report: Report) -> str:
    about = stored.about
    dtypes = sorted({tensor.dtype.name for tensor in stored.leaves.values()})
    return _CARD.format(
        library="transformers" if format == "hf" else "llava",
        variant=_variant(about),
        count=sum(tensor.nbytes // tensor.dtype.itemsize for tensor in stored.leaves.values()),
        dtypes=" and ".join(dtypes),
        template=about.template,
        start_end=_START_END * about.start_end_tokens,
        side=about.config.vision.image_size,
        mode=_MODES[about.image_mode],
        tokens=about.config.tokens_per_image,
        fingerprint=report.fingerprint,
        use=_USE[format],
    )
