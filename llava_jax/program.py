"""From a config to the programs of its run: what train.py runs, and what can be planned with.

Everything here is made of shapes; no weight is read.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from llava_jax import optim, step
from llava_jax.config import Compute, Config
from llava_jax.models import stack
from llava_jax.models.llava import Llava, LlavaConfig
from llava_jax.optim import AdamW, Params
from llava_jax.sharding import Layout, MeshShape, leaf_paths, make_mesh
from llava_jax.step import State

# By what JAX calls the chip: what makes this program faster on it; docs/log.md has what was tried.
# The compiler's own 16 MiB of VMEM leave the large products at three quarters of their speed. A
# SparseCore gathers and reduces beside the matrix units.
_VMEM = "xla_tpu_scoped_vmem_limit_kib"
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
_SPARSE_CORE = {
    **{f"{_OFFLOAD}{kind}": "true" for kind in ("all_gather", "reduce_scatter", "all_reduce")},
    "xla_tpu_use_tc_device_shape_on_sc": "true",
}
_V5P = {
    _VMEM: str(48 << 10),
    **_SPARSE_CORE,
    f"{_OFFLOAD}3d_all_gather": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}
COMPILER: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "TPU v5 lite": {_VMEM: str(48 << 10)},
        "TPU v5": _V5P,
        "TPU v5p": _V5P,
        "TPU v6 lite": {
            _VMEM: str(96 << 10),
            **_SPARSE_CORE,
            f"{_OFFLOAD}2d_all_gather": "true",
        },
    }
)
# All axes at once, but where the compiler would reduce gradients whole and then cut them.
GATHER: Mapping[str, str] = MappingProxyType({"TPU v5 lite": "explicit by axis"})


class Program(NamedTuple):
    """step and measure are jitted: arguments and results lie as `layout` says. like: a state's
    shapes, where each lies; frozen_like: of what does not train. options: the compiler's."""

    layout: Layout
    model: Llava
    adamw: AdamW
    like: State
    frozen_like: Params
    init: Any
    step: Any
    measure: Any
    options: Mapping[str, str]


def layout_of(compute: Compute, devices: list[Any]) -> Layout:
    """The mesh over these devices. An axis of 0 gets the devices that the others leave."""
    for name in ("parts", "loss_pieces"):
        if getattr(compute, name) < 1:
            raise ValueError(
                f"got config.compute.{name} = {getattr(compute, name)}, expected 1 or more"
            )
    torus = torus_of(devices)
    if compute.fsdp == (0,) and compute.tensor == 1 and torus and compute.data in (1, torus.data):
        shape = torus
    else:
        shape = MeshShape.filled(compute.data, compute.fsdp, compute.tensor, devices=len(devices))
    gather = gather_of(compute, devices[0])
    return Layout(
        make_mesh(shape, devices),
        explicit=gather != "gspmd",
        by_axis=gather == "explicit by axis",
        row_major=compute.tensor == 1 and uses_row_major(devices),
    )


def uses_row_major(devices: list[Any]) -> bool:
    """On v6e products that see heads take half as long with weights that lie so. And where nothing
    is gathered, the compiler would copy whole stacks of layers into a layout that it likes: 4 GiB
    of a 7B. Elsewhere it chooses well (docs/log.md)."""
    alone = len(devices) == 1 and devices[0].platform == "tpu"
    return alone or devices[0].device_kind == "TPU v6 lite"


def gather_of(compute: Compute, device: Any) -> str:
    automatic = GATHER.get(device.device_kind, "explicit")
    return automatic if compute.gather == "auto" else compute.gather


def torus_of(devices: list[Any]) -> MeshShape | None:
    """An axis along each dimension of a TPU slice, longest first, and one of its slices; None of
    other devices. Gathered axis by axis, the last comes first: short, it has less to give."""
    if devices[0].platform != "tpu":
        return None
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = [
        len(set(places)) for places in zip(*(device.coords for device in devices), strict=True)
    ]
    if math.prod(sizes) * slices != len(devices):
        return None  # two cores of a chip, or a part of a slice
    longest_first = sorted((size for size in sizes if size > 1), reverse=True)
    return MeshShape(slices, tuple(longest_first) or (1,))


def program(
    config: Config, architecture: LlavaConfig, layout: Layout, *, steps: int, rows: int
) -> Program:
    """steps: of the whole run, for the schedule. rows: of a step, empty ones counted."""
    compute, settings = config.compute, config.optim
    if rows % (layout.batch_parts * compute.parts):
        raise ValueError(
            f"got {rows} rows a step for {layout.batch_parts} devices that rows are cut over, in "
            f"{compute.parts} parts each (config.compute.parts), expected a multiple of "
            f"{layout.batch_parts * compute.parts}"
        )
    if rows % config.batch.loss_groups:
        raise ValueError(
            f"got {rows} rows a step for config.batch.loss_groups = {config.batch.loss_groups}, "
            "expected a multiple of them"
        )
    model = model_of(compute, architecture, layout)
    adamw = AdamW(
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip=settings.clip or None,
        lr_of=(("projector/.*", settings.projector_lr / settings.lr),)
        if settings.projector_lr
        else (),
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    trainable, frozen = (
        _with_dtypes(part, config) for part in optim.split(shapes, settings.trains)
    )
    lies = step.shardings(trainable, adamw, layout)
    init = jax.jit(lambda trainable: step.init(trainable, adamw), out_shardings=lies)
    sources, pieces = len(config.data.sources), compute.loss_pieces
    training = step.make_step(
        step.token_sums(model, sources, pieces),
        adamw,
        optim.schedule(settings.lr, steps=steps, warmup_ratio=settings.warmup_ratio),
        layout,
        parts=compute.parts,
        groups=config.batch.loss_groups,
    )
    measuring = step.make_eval(
        step.token_sums(model, max(1, len(config.held_out.sources)), pieces, dropout=False), layout
    )
    return Program(
        layout=layout,
        model=model,
        adamw=adamw,
        like=_placed(jax.eval_shape(init, trainable), lies),
        frozen_like=_placed(frozen, layout.param_shardings(frozen)),
        init=init,
        step=jax.jit(training, out_shardings=(lies, layout.replicated), donate_argnums=0),
        measure=jax.jit(measuring, out_shardings=layout.replicated),
        options=compiler_options(compute, layout.devices[0]),
    )


def compiler_options(compute: Compute, device: Any) -> Mapping[str, str]:
    if compute.compiler == "auto":
        return COMPILER.get(device.device_kind, {})
    pairs = [pair.partition("=") for pair in compute.compiler.split(",") if pair]
    if wrong := [name for name, equals, value in pairs if not (name and equals and value)]:
        raise ValueError(
            f"got config.compute.compiler = {compute.compiler!r}, expected 'auto', or NAME=VALUE "
            f"with commas between; {wrong[0]!r} is none"
        )
    return {name: value for name, _, value in pairs}


def model_of(compute: Compute, architecture: LlavaConfig, layout: Layout) -> Llava:
    automatic = "splash" if layout.devices[0].platform == "tpu" else "xla"
    return Llava(
        architecture,
        stack.Compute(
            dtype=compute.dtype,
            attention=automatic if compute.attention == "auto" else compute.attention,
            remat=compute.remat,
            scan=compute.scan,
        ),
        layout.placement(compute.dtype),
    )


def dtype_of(config: Config, path: str) -> str:
    """In memory: f32 what trains; what does not, as the config says, but for vectors, whose halves
    would save nothing."""
    if optim.trains(path, config.optim.trains) or path.rsplit("/", 1)[-1] in ("scale", "bias"):
        return "float32"
    return config.model.frozen_dtype


def _with_dtypes(shapes: Params, config: Config) -> Params:
    return jax.tree.map(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, dtype_of(config, path)),
        leaf_paths(shapes),
        shapes,
    )


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
        shapes,
        shardings,
    )
