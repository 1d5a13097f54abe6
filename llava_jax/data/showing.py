"""Rows of a batch, as pages and terminals show them."""

from llava_jax.data.dataset import Dataset
from llava_jax.data.pipeline import Read
from llava_jax.pages import rows


def readable(dataset: Dataset, read: Read, place: int, number: int) -> rows.Row:
    """A row of a batch as pages and terminals show it. number: of the row in the run."""
    names = [(s, name) for s in read.segments[place] for name in s.pictures]
    pictures = [
        rows.Picture(f"{name} (replaced: {s.skipped})" if s.skipped else name, (slot,))
        for slot, (s, name) in enumerate(names)
    ]
    segments = [
        rows.Segment(
            s.source,
            s.id,
            (*s.notes, *([f"nothing is learned: {s.skipped}"] if s.skipped else [])),
        )
        for s in read.segments[place]
    ]
    tokenizer = dataset.renderer.tokenizer
    return rows.of_batch(
        read.batch,
        place,
        number=number,
        piece_T=[tokenizer.piece(int(id)) for id in read.batch.token_RT[place]],
        tokens_per_image=dataset.renderer.tokens_per_image,
        pictures=pictures,
        segments=segments,
        special_ids=tokenizer.specials.values(),
    )
