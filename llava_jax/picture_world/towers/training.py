"""A pre-training run: batches from another thread, the package's own step, a loss in words.

The towers are trained as LLaVA is: `step.make_step`, AdamW, warm-up and cosine. Their losses are
functions of the same form as step.token_sums. All on one device.
"""

import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llava_jax import optim, step
from llava_jax.cli import Progress
from llava_jax.optim import AdamW, Params
from llava_jax.sharding import Layout, MeshShape, make_mesh

_AHEAD = 4
_TOLD = 20  # lines of a run


def train(
    loss: step.Loss,
    params: Params,
    batches: Iterator[Any],
    *,
    label: str,
    steps: int,
    lr: float,
    seed: int,
    terms: Sequence[str],
    look: Callable[[Params], str] = lambda params: "",
) -> Params:
    """params after so many steps; all of them train. terms: names of the loss's
    sources. look: what else is told of the parameters now and then."""
    layout = Layout(make_mesh(MeshShape(), jax.devices()[:1]))
    adamw = AdamW(b2=0.98, weight_decay=0.01)
    lies = step.shardings(params, adamw, layout)
    state = jax.jit(functools.partial(step.init, adamw=adamw), out_shardings=lies)(params)
    schedule = optim.schedule(lr, steps=steps, warmup_ratio=0.03)
    do = jax.jit(
        step.make_step(loss, adamw, schedule, layout),
        out_shardings=(lies, layout.replicated),
        donate_argnums=0,
    )
    key = jax.random.key(seed)
    lost, weight = np.zeros(len(terms)), np.zeros(len(terms))
    start = time.monotonic()
    with Progress(steps, label, "steps") as progress:
        for number, batch in enumerate(itertools.islice(ahead(batches), steps), 1):
            state, metrics = do(state, {}, batch, key)
            if metrics.skipped:
                raise ValueError(f"got a loss that is not finite at step {number}: lower the lr")
            lost, weight = lost + metrics.loss_S, weight + metrics.weight_S
            if number % max(1, steps // _TOLD) == 0 or number == steps:
                told = [
                    f"{name} {value:.3f}" for name, value in zip(terms, lost / weight, strict=True)
                ]
                told.append(look(state.trainable))
                passed = time.monotonic() - start
                print(f"step {number:>6}  {passed:5.0f} s  {'  '.join(told)}", flush=True)
                lost, weight = np.zeros(len(terms)), np.zeros(len(terms))
            progress.advance()
    return jax.device_get(state.trainable)


def ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, made by another thread while a step runs."""
    ready: queue.Queue[Any] = queue.Queue(_AHEAD)
    done = threading.Event()

    def make() -> None:
        for batch in batches:
            while not done.is_set():
                try:
                    ready.put(batch, timeout=0.5)
                    break
                except queue.Full:
                    continue
            if done.is_set():
                return

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            yield ready.get()
    finally:
        done.set()
        thread.join()
