"""Cross entropy without the logits of a whole batch ever existing.

Dims: R rows, T tokens, D width, V the padded vocabulary, C pieces of a row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cross_entropy(head: Callable, x_RTD, target_RT, chunks: int = 1):
    """f32 [R, T]. head: hidden states to f32 logits; those of no id are far below all others."""
    R, T, D = x_RTD.shape
    if T % chunks:
        raise ValueError(f"got {T} tokens a row for {chunks} pieces, expected a multiple of them")

    def piece(x_RTD, target_RT):
        logits_RTV = head(x_RTD)
        # Not a gather: along a vocabulary that is cut over devices it would move the logits.
        id_11V = jnp.arange(logits_RTV.shape[-1])[None, None]
        is_target_RTV = id_11V == target_RT[..., None]
        picked_RT = jnp.sum(jnp.where(is_target_RTV, logits_RTV, 0.0), axis=-1)
        return jax.nn.logsumexp(logits_RTV, axis=-1) - picked_RT

    if chunks == 1:
        return piece(x_RTD, target_RT)
    x_CRTD = x_RTD.reshape(R, chunks, T // chunks, D).swapaxes(0, 1)
    target_CRT = target_RT.reshape(R, chunks, T // chunks).swapaxes(0, 1)
    # Inside a scan nothing is merged across the barrier anyway.
    again = jax.checkpoint(piece, prevent_cse=False)
    _, loss_CRT = jax.lax.scan(lambda _, pair: (None, again(*pair)), None, (x_CRTD, target_CRT))
    return loss_CRT.swapaxes(0, 1).reshape(R, T)
