"""The README.md of an exported folder: what is known of the model, and what its maker must add."""

from llava_jax.model_folder import Report, StoredModel

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

_MODES = {
    "pad": "padding",
    "crop": "cropping the centre",
    "anyres": "cutting into tiles",
}


def model_card(stored: StoredModel, format: str, report: Report) -> str:
    about = stored.about
    dtypes = sorted({tensor.dtype.name for tensor in stored.leaves.values()})
    return _CARD.format(
        library="transformers" if format == "hf" else "llava",
        variant=f"LLaVA {about.variant}" if about.variant else "not a released LLaVA's",
        count=sum(tensor.nbytes // tensor.dtype.itemsize for tensor in stored.leaves.values()),
        dtypes=" and ".join(dtypes),
        template=about.template,
        start_end=", pictures between `<im_start>` and `<im_end>`" * about.start_end_tokens,
        side=about.config.vision.image_size,
        mode=_MODES[about.image_mode],
        tokens=about.config.tokens_per_image,
        fingerprint=report.fingerprint,
        use=_USE[format],
    )
