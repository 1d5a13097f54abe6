"""Text to ids and back; conversations to ids and their loss mask, emitted together, piece by piece.

>>> tokenizer = load("folder")
>>> ids, mask = render(tokenizer, conversation.pieces(turns, template))
>>> token_T, mask_T, image_index_T = expand(ids, mask, tokens_per_image=576)
"""

from llava_jax.tokenizer.folder import load
from llava_jax.tokenizer.ids import After, Tokenizer
from llava_jax.tokenizer.rendering import IMAGE, Fitted, TooLong, expand, fit, render, splice

__all__ = [
    "IMAGE",
    "After",
    "Fitted",
    "Tokenizer",
    "TooLong",
    "expand",
    "fit",
    "load",
    "render",
    "splice",
]
