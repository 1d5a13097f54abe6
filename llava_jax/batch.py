"""The Batch contract: what the data pipeline promises and the model reads. NumPy only.

Every row is packed: one or more conversations (segments) end to end, padding behind them. All
index arithmetic of splicing images into text is done here on the host, so the device only embeds,
gathers and selects, whatever the number of images.

Dims: R rows, T tokens, K image slots of a row, H height, W width, P features of an image.
"""

from typing import NamedTuple

import numpy as np

TEXT = -1  # image_index of an ordinary token
ROW_END = -2  # image_index of anyres' learned end-of-row embedding
PADDING = 0  # segment of the tokens behind the last conversation


class Batch(NamedTuple):
    """One step's input. A NamedTuple, so that JAX takes it as a pytree and this file needs none.

    token_RT         int32    input ids; at an image's features any valid id, by habit 0
    target_RT        int32    the id that should follow, already shifted; read where weight > 0
    segment_RT       int32    1, 2, … by conversation, 0 = padding; tokens see only their own
    position_RT      int32    rotary position, counted from 0 in each segment
    source_RT        int32    which data source a token came from, for the loss per source
    loss_weight_RT   float32  0 = not supervised
    pixel_RKHW3      uint8    image slots, normalised on the device; unused slots: anything
    image_index_RT   int32    −1 text, −2 learned row end, else slot · P + feature of this row
    """

    token_RT: np.ndarray
    target_RT: np.ndarray
    segment_RT: np.ndarray
    position_RT: np.ndarray
    source_RT: np.ndarray
    loss_weight_RT: np.ndarray
    pixel_RKHW3: np.ndarray
    image_index_RT: np.ndarray


_DTYPES = (*["int32"] * 5, "float32", "uint8", "int32")  # in the order of the fields


def validate(
    batch: Batch, *, tokens_per_image: int, image_size: int, vocab_size: int, row_end: bool = False
) -> None:
    """Raises ValueError, with got and expected, at the first promise the batch breaks.

    vocab_size: ids the model knows. row_end: whether the model has the learned row end.
    """
    _check_arrays(batch, image_size)
    _check_ids(batch, vocab_size)
    for row in range(batch.token_RT.shape[0]):
        _check_segments(batch, row)
        _check_images(batch, row, tokens_per_image, row_end)


def _check_arrays(batch: Batch, image_size: int) -> None:
    shape = batch.token_RT.shape
    if len(shape) != 2:
        raise ValueError(f"token_RT: got shape {shape}, expected [rows, tokens]")
    slots = batch.pixel_RKHW3.shape[1] if batch.pixel_RKHW3.ndim == 5 else "slots"
    pixels = (shape[0], slots, image_size, image_size, 3)
    for name, array, dtype in zip(Batch._fields, batch, _DTYPES, strict=True):
        expected = pixels if name == "pixel_RKHW3" else shape
        if array.shape != expected:
            raise ValueError(f"{name}: got shape {array.shape}, expected {expected}")
        if array.dtype != dtype:
            raise ValueError(f"{name}: got dtype {array.dtype}, expected {dtype}")


def _check_ids(batch: Batch, vocab_size: int) -> None:
    weight = batch.loss_weight_RT
    if not np.all(np.isfinite(weight) & (weight >= 0)):
        row, t = np.argwhere(~(np.isfinite(weight) & (weight >= 0)))[0]
        raise ValueError(
            f"row {row}, token {t}: got loss weight {weight[row, t]}, expected a finite one ≥ 0"
        )
    if (batch.source_RT < 0).any():
        raise ValueError(f"got source {batch.source_RT.min()}, expected numbers from 0")
    for name, ids, read in (
        ("token", batch.token_RT, np.ones_like(weight, bool)),
        ("target", batch.target_RT, weight > 0),
    ):
        wrong = read & ((ids < 0) | (ids >= vocab_size))
        if wrong.any():
            row, t = np.argwhere(wrong)[0]
            raise ValueError(
                f"row {row}, token {t}: got {name} id {ids[row, t]}, expected 0 to {vocab_size - 1}"
            )


def _check_segments(batch: Batch, row: int) -> None:
    segment_T, position_T = batch.segment_RT[row], batch.position_RT[row]
    weight_T, tokens = batch.loss_weight_RT[row], batch.segment_RT.shape[1]
    if tokens == 0:
        return
    # Allowed: 1 … 1 2 … 2 … 0 … 0, that is, steps of 0 or +1 until padding begins for good.
    real = int(np.count_nonzero(segment_T != PADDING))
    steps = np.diff(segment_T[:real])
    if (
        (segment_T[:real] <= 0).any()
        or (real and segment_T[0] != 1)
        or not np.isin(steps, (0, 1)).all()
    ):
        raise ValueError(
            f"row {row}: got segments {_runs(segment_T)}, expected 1, 2, … in order and all "
            "padding (0) behind them"
        )
    starts = np.flatnonzero(np.diff(segment_T, prepend=-1))
    start_of_T = np.repeat(starts, np.diff(np.append(starts, tokens)))
    expected_T = np.arange(tokens) - start_of_T
    wrong = np.flatnonzero((position_T != expected_T)[:real])
    if wrong.size:
        t = wrong[0]
        raise ValueError(
            f"row {row}, token {t}: got position {position_T[t]} in segment {segment_T[t]}, "
            f"expected {expected_T[t]} (positions restart in each segment)"
        )
    # A segment's last token has nothing to predict; padding has nothing at all.
    last_T = np.append(segment_T[1:] != segment_T[:-1], True) | (segment_T == PADDING)
    wrong = np.flatnonzero(last_T & (weight_T > 0))
    if wrong.size:
        t = wrong[0]
        what = "padding" if segment_T[t] == PADDING else f"the last of segment {segment_T[t]}"
        raise ValueError(
            f"row {row}, token {t}: got loss weight {weight_T[t]} on {what}, expected 0"
        )
    inner = np.flatnonzero(weight_T > 0)
    wrong = inner[batch.target_RT[row, inner] != batch.token_RT[row, inner + 1]]
    if wrong.size:
        t = wrong[0]
        raise ValueError(
            f"row {row}, token {t}: got target {batch.target_RT[row, t]}, expected the next token, "
            f"{batch.token_RT[row, t + 1]} (targets are already shifted)"
        )


def _check_images(batch: Batch, row: int, tokens_per_image: int, row_end: bool) -> None:
    index_T, segment_T = batch.image_index_RT[row], batch.segment_RT[row]
    features = batch.pixel_RKHW3.shape[1] * tokens_per_image
    allowed = (index_T >= 0) & (index_T < features) | (index_T == TEXT)
    if row_end:
        allowed |= index_T == ROW_END
    if not allowed.all():
        t = np.flatnonzero(~allowed)[0]
        ends = f", {ROW_END} (row end)" if row_end else ""
        raise ValueError(
            f"row {row}, token {t}: got image_index {index_T[t]}, expected {TEXT} (text){ends} or "
            f"0 to {features - 1} ({batch.pixel_RKHW3.shape[1]} slots of {tokens_per_image})"
        )
    at = np.flatnonzero(index_T >= 0)
    if (segment_T[index_T != TEXT] == PADDING).any():
        raise ValueError(f"row {row}: got an image in padding, expected text there")
    slot = index_T[at] // tokens_per_image
    tiles_lose_features = (index_T == ROW_END).any()  # anyres cuts tiles' padding away
    for k in np.unique(slot):
        mine = at[slot == k]
        if not tiles_lose_features and mine.size != tokens_per_image:
            raise ValueError(
                f"row {row}, image slot {k}: got {mine.size} placeholders for {tokens_per_image} "
                "features, expected as many"
            )
        if (np.diff(index_T[mine]) <= 0).any():
            raise ValueError(
                f"row {row}, image slot {k}: got its features out of order or twice, expected "
                "each once, in rising order"
            )
        if (index_T[mine[0] : mine[-1]] == TEXT).any():
            raise ValueError(
                f"row {row}, image slot {k}: got text between its features, expected none"
            )
        if np.unique(segment_T[mine]).size != 1:
            raise ValueError(
                f"row {row}, image slot {k}: got placeholders in segments "
                f"{np.unique(segment_T[mine]).tolist()}, expected one segment to own an image"
            )
    before_image_T = np.append(index_T[1:] != TEXT, False)
    wrong = np.flatnonzero(before_image_T & (batch.loss_weight_RT[row] > 0))
    if wrong.size:
        raise ValueError(
            f"row {row}, token {wrong[0]}: got a loss weight where an image's feature comes next, "
            "expected 0 (images are not predicted)"
        )


def _runs(values: np.ndarray) -> str:
    """'1×5 2×3 0×8': how a row's segments are laid out, short enough for an error message."""
    starts = np.flatnonzero(np.diff(values, prepend=values[0] - 1))
    lengths = np.diff(np.append(starts, values.size))
    text = " ".join(f"{values[s]}×{n}" for s, n in zip(starts[:8], lengths[:8], strict=True))
    return text + (" …" if starts.size > 8 else "")


def fake_batch(
    *,
    rows: int,
    tokens: int,
    images: int,
    tokens_per_image: int,
    image_size: int,
    vocab_size: int,
    segments: int = 2,
    seed: int = 0,
) -> Batch:
    """A valid batch of random ids and noise: for tests and debug runs.

    Each row holds `segments` conversations of nearly equal length and a little padding; its
    `images` go to them in turn, at the front of a segment, behind its text, or between.
    """
    rng = np.random.default_rng(seed)
    pixels = (rows, images, image_size, image_size, 3)
    batch = Batch(
        token_RT=np.zeros((rows, tokens), np.int32),
        target_RT=np.zeros((rows, tokens), np.int32),
        segment_RT=np.zeros((rows, tokens), np.int32),
        position_RT=np.zeros((rows, tokens), np.int32),
        source_RT=np.zeros((rows, tokens), np.int32),
        loss_weight_RT=np.zeros((rows, tokens), np.float32),
        pixel_RKHW3=rng.integers(0, 256, pixels, dtype=np.uint8),
        image_index_RT=np.full((rows, tokens), TEXT, np.int32),
    )
    used = tokens - tokens // 16
    if used // segments < 2 + -(-images // segments) * tokens_per_image:
        raise ValueError(
            f"got {tokens} tokens a row for {segments} segments and {images} images of "
            f"{tokens_per_image} tokens: expected room for the images and 2 tokens a segment"
        )
    for row in range(rows):
        bounds = np.linspace(0, used, segments + 1).astype(int)
        for s in range(segments):
            start, stop = bounds[s], bounds[s + 1]
            mine = [k for k in range(images) if k % segments == s]
            text = stop - start - len(mine) * tokens_per_image
            # Where each image stands, counted in text tokens before it: 0 and `text` included.
            before = np.sort(rng.integers(0, text + 1, len(mine)))
            if row % 3 < 2 and mine:
                before[0] = 0 if row % 3 == 0 else before[0]
                before[-1] = text if row % 3 == 1 else before[-1]
            index = np.full(text, TEXT, np.int32)
            for k, b in reversed(list(zip(mine, before, strict=True))):
                features = np.arange(k * tokens_per_image, (k + 1) * tokens_per_image)
                index = np.insert(index, b, features)
            ids = np.where(index == TEXT, rng.integers(1, vocab_size, stop - start), 0)
            batch.image_index_RT[row, start:stop] = index
            batch.token_RT[row, start:stop] = ids
            batch.segment_RT[row, start:stop] = s + 1
            batch.position_RT[row, start:stop] = np.arange(stop - start)
            batch.source_RT[row, start:stop] = s % 2
            batch.target_RT[row, start : stop - 1] = ids[1:]
            supervised = (index[1:] == TEXT) & (rng.random(stop - start - 1) < 0.7)
            batch.loss_weight_RT[row, start : stop - 1] = supervised
    return batch


def shape_batch(*, rows: int, tokens: int, images: int, image_size: int) -> Batch:
    """Zeros of a batch's shapes and dtypes that occupy no memory, for tracing and planning."""
    pixels = (rows, images, image_size, image_size, 3)
    return Batch._make(
        np.broadcast_to(np.zeros((), dtype), pixels if dtype == "uint8" else (rows, tokens))
        for dtype in _DTYPES
    )
