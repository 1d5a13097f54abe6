"""How the model lies over a mesh: the only file that knows PartitionSpecs.

Mesh axes: `data` (whole copies; across slices), `fsdp` (parameters, optimizer and batch, cut
along the model's width; one axis, or several laid along the torus as fsdp_x, fsdp_y, fsdp_z) and
`tensor` (heads and MLP width). The batch is cut over data and fsdp together.

TABLE gives every parameter leaf its layout by path. `Layout` turns it into shardings for one
mesh, and into the `Placement` the models call. The layer gather comes in two forms:

    gspmd     casts, then pins the layer's weights whole along fsdp; the partitioner inserts the
              collectives, and the gradient is pinned back to shards
    explicit  the program runs under shard_map over data and fsdp; the hook calls all_gather, so
              its transpose is the reduce-scatter of the gradients

dim = array dimension, axis = mesh axis.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.models.llama import Cache
from llava_jax.models.stack import Placement, as_stored

FSDP, LAST, TENSOR, BATCH = "fsdp", "last fsdp axis", "tensor", "batch"

# Path pattern (whole path) → what cuts each dim. Stacked leaves have the layer dim in front.
# Kernels hold the model's width first (models/layers.py), and that is what fsdp cuts. The vision
# tower, the projector and LoRA factors are narrow: cut over 256 chips, a shard of the tower would
# be 4 rows, less than a tile, and the TPU compiler gathers such shards by an all-reduce of zeros;
# along the last fsdp axis alone they stay whole tiles, at 40 to 300 MB a chip. Norms, biases and
# positions are whole everywhere: together they are 0.01 % of the weights.
TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"vision/patch_kernel", (LAST, None)),
    (r"vision/class_token", (None,)),
    (r"vision/position", (None, None)),
    (r"vision/pre_norm/(scale|bias)", (None,)),
    (r"vision/layers/(q|k|v|o|fc1|fc2)/kernel", (None, LAST, TENSOR)),
    (r"vision/layers/(q|k|v|o|fc1|fc2)/bias", (None, None)),
    (r"vision/layers/(attention|mlp)_norm/(scale|bias)", (None, None)),
    (r"projector/linear_\d+/kernel", (LAST, TENSOR)),
    (r"projector/linear_\d+/bias", (None,)),
    (r"projector/query", (None, None)),
    (r"projector/query_norm/(scale|bias)", (None,)),
    (r"projector/layers/(fc1|fc2|(self|cross)_(q|k|v|o))/kernel", (None, LAST, TENSOR)),
    (r"projector/layers/(fc1|fc2|(self|cross)_(q|k|v|o))/bias", (None, None)),
    (r"projector/layers/(self|cross|mlp)_norm/(scale|bias)", (None, None)),
    (r"row_end", (None,)),
    (r"language/embed/table", (TENSOR, FSDP)),
    (r"language/embed/added", (None, FSDP)),
    (r"language/decoder/layers/(q|k|v|o|gate|up|down)/kernel", (None, FSDP, TENSOR)),
    (r"language/decoder/layers/(q|k|v|o|gate|up|down)/lora_[ab]", (None, LAST, None)),
    (r"language/decoder/layers/(attention|mlp)_norm/scale", (None, None)),
    (r"language/decoder/norm/scale", (None,)),
    (r"language/head/kernel", (FSDP, TENSOR)),
    (r"language/head/added", (FSDP, None)),
)

# Logical dims of activations and batches → what cuts them.
ACTIVATION_DIMS = {"batch": BATCH, "heads": TENSOR}


def row_of(path: str) -> tuple[str | None, ...]:
    """The table's row for a leaf; every leaf must match exactly one."""
    rows = [(pattern, dims) for pattern, dims in TABLE if re.fullmatch(pattern, path)]
    if len(rows) != 1:
        raise ValueError(
            f"parameter {path!r} matches {len(rows)} rows of sharding.TABLE "
            f"({[pattern for pattern, _ in rows]}), expected exactly one"
        )
    return rows[0][1]


def leaf_paths(tree: Any, prefix: str = "") -> Any:
    """The tree with each leaf replaced by its path, 'language/decoder/layers/q/kernel'."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: "/".join(filter(None, [prefix, *(str(key.key) for key in keys)])), tree
    )


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis. fsdp: one number, or one for each torus dimension."""

    data: int = 1
    fsdp: tuple[int, ...] = (1,)
    tensor: int = 1

    def __post_init__(self):
        if not isinstance(self.fsdp, tuple):
            raise ValueError(f"got fsdp={self.fsdp}: expected a tuple, as in fsdp=(8,)")
        if not 1 <= len(self.fsdp) <= 3 or min(self.data, self.tensor, *self.fsdp) < 1:
            raise ValueError(
                f"got mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}: expected "
                "positive numbers and one to three fsdp axes"
            )

    @classmethod
    def filled(cls, data: int, fsdp: tuple[int, ...], tensor: int, *, devices: int) -> "MeshShape":
        """The shape in which one axis may be 0: as many devices as the others leave."""
        sizes = [data, *fsdp, tensor]
        known = math.prod(size for size in sizes if size != 0)
        if sizes.count(0) > 1 or known < 1 or devices % known:
            raise ValueError(
                f"got a mesh of {'×'.join(map(str, sizes))} (data, fsdp, tensor) for {devices} "
                "devices, expected at most one axis of 0 (those that are left), and the others to "
                "divide the devices"
            )
        data, *fsdp_sizes, tensor = (size or devices // known for size in sizes)
        return cls(data, tuple(fsdp_sizes), tensor)

    @property
    def fsdp_axes(self) -> tuple[str, ...]:
        torus = ("fsdp_x", "fsdp_y", "fsdp_z")
        return (FSDP,) if len(self.fsdp) == 1 else torus[: len(self.fsdp)]

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.data, *self.fsdp, self.tensor)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh whose fsdp axes follow the torus; over several slices, `data` counts the slices."""
    devices = list(jax.devices() if devices is None else devices)
    if math.prod(shape.sizes) != len(devices):
        raise ValueError(
            f"got {len(devices)} devices for a mesh of {'×'.join(map(str, shape.sizes))} "
            f"(data, fsdp, tensor): expected {math.prod(shape.sizes)}"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        grid = np.asarray(devices, dtype=object).reshape(shape.sizes)
    elif slices > 1:
        if shape.data % slices:
            raise ValueError(
                f"got {slices} slices and data={shape.data}: expected data to be a multiple, so "
                "that only whole copies talk across slices"
            )
        inner = (shape.data // slices, *shape.sizes[1:])
        outer = (slices, *[1] * (len(inner) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices)
    else:
        grid = mesh_utils.create_device_mesh(shape.sizes, devices=devices)
    names = ("data", *shape.fsdp_axes, "tensor")
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


@dataclasses.dataclass(frozen=True)
class Layout:
    """One mesh, and which form the layer gather takes on it.

    explicit: shard_map and all_gather instead of the partitioner's choice. by_axis: gather over
    several fsdp axes one after another instead of all at once. row_major: what is gathered is used
    as it lies in memory, whatever layout the compiler likes (both of the explicit form only).
    """

    mesh: Mesh | AbstractMesh
    explicit: bool = False
    by_axis: bool = False
    row_major: bool = False

    @property
    def fsdp_axes(self) -> tuple[str, ...]:
        return tuple(name for name in self.mesh.axis_names if name.startswith(FSDP))

    @property
    def batch_axes(self) -> tuple[str, ...]:
        return ("data", *self.fsdp_axes)

    # Shardings of whole trees.

    def param_shardings(self, params: Any) -> Any:
        """A NamedSharding for every leaf of a tree of arrays or shapes; refuses what cannot lie."""

        def sharding(path: str, leaf) -> NamedSharding:
            dims = row_of(path)
            if len(dims) != len(leaf.shape):
                raise ValueError(
                    f"parameter {path!r} has shape {leaf.shape}: its row of sharding.TABLE, "
                    f"{dims}, expects {len(dims)} dims"
                )
            self._check_divides(path, leaf.shape, dims)
            return NamedSharding(self.mesh, self._spec(dims))

        return jax.tree.map(sharding, leaf_paths(params), params)

    def batch_shardings(self, batch: Any) -> Any:
        """Rows cut over data and fsdp; everything else of a batch whole."""

        def sharding(leaf) -> NamedSharding:
            dims = (BATCH, *[None] * (len(leaf.shape) - 1))
            self._check_divides("the batch", leaf.shape, dims)
            return NamedSharding(self.mesh, self._spec(dims))

        return jax.tree.map(sharding, batch)

    @property
    def devices(self) -> list[Any]:
        assert isinstance(self.mesh, Mesh)
        return list(self.mesh.devices.flat)

    @property
    def batch_parts(self) -> int:
        """How many parts a batch's rows are cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    def local_rows(self, rows: int) -> list[int]:
        """Which of a step's rows this host's devices hold."""
        sharding = self.batch_shardings(jax.ShapeDtypeStruct((rows,), np.int32))
        found = sharding.addressable_devices_indices_map((rows,)).values()
        return sorted({row for (span,) in found for row in range(*span.indices(rows))})

    def placed(self, batch: Any, local: Sequence[int], rows: int) -> Any:
        """A step's batch of `rows` rows on the devices, of this host's rows as `local` names them.

        Nothing travels: each device is given its own.
        """
        place = {row: number for number, row in enumerate(local)}

        def put(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                first, *rest = index
                wanted = [place[row] for row in range(*first.indices(rows))]
                return leaf[wanted][:, *rest] if rest else leaf[wanted]

            return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, part)

        whole = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), batch
        )
        return jax.tree.map(put, batch, self.batch_shardings(whole))

    def cache_shardings(self, cache: Cache) -> Cache:
        """Rows cut as a batch's, key heads over tensor. cache: arrays or shapes."""
        by_head = (None, BATCH, None, TENSOR, None)
        self._check_divides("the cache", cache.k_LBSKH.shape, by_head)
        slots = NamedSharding(self.mesh, self._spec(by_head))
        return Cache(slots, slots, NamedSharding(self.mesh, self._spec((BATCH,))))  # pyright: ignore

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    # What runs under them.

    def placement(self, dtype: str) -> Placement:
        """The hooks a model calls on this mesh; matrices are cast to `dtype` before they travel."""
        return Placement(
            gather=lambda params, path: self._gather(params, path, jnp.dtype(dtype)),
            constrain=self._constrain,
            per_shard=self._per_shard,
            dtype=dtype,
        )

    def program(self, fn: Callable, in_shardings: Any, out_shardings: Any) -> Callable:
        """fn as it must be written to run on this layout: itself (gspmd), or manual over the data
        and fsdp axes, seeing its own rows and shards only (explicit)."""
        if not self.explicit:
            return fn

        # Pallas kernels want every axis manual; a tensor axis of one device costs nothing.
        axes = (*self.batch_axes, *([] if self._tensor_is_open else [TENSOR]))

        def manual(tree):
            return jax.tree.map(lambda s: self._only(s.spec, axes), tree)

        return jax.shard_map(
            fn,
            mesh=self.mesh,
            in_specs=manual(in_shardings),
            out_specs=manual(out_shardings),
            axis_names=set(axes),
            # The hook says where gradients are summed; the checker cannot see into Pallas calls.
            check_vma=False,
        )

    def sum_over_batch(self, x: jax.Array) -> jax.Array:
        """A per-row sum made global: itself (gspmd) or summed over all shards (explicit). Not to
        be differentiated through: in the explicit form gradients are summed by the hook."""
        return jax.lax.psum(x, self.batch_axes) if self.explicit else x

    # Details.

    @property
    def _tensor_is_open(self) -> bool:
        """In the explicit form, whether the partitioner still has the tensor axis to itself."""
        return self.mesh.shape[TENSOR] > 1

    def _axes(self, cut: str | None) -> tuple[str, ...]:
        fsdp = self.fsdp_axes
        return {None: (), FSDP: fsdp, LAST: fsdp[-1:], TENSOR: (TENSOR,), BATCH: self.batch_axes}[
            cut
        ]

    def _spec(self, dims: tuple[str | None, ...]) -> P:
        return P(*(self._axes(cut) or None for cut in dims))

    @staticmethod
    def _only(spec: P, axes: Sequence[str]) -> P:
        """The spec with all other axes left out."""
        kept = (tuple(a for a in _as_tuple(entry) if a in axes) or None for entry in spec)
        return P(*kept)

    def _check_divides(self, what: str, shape: tuple[int, ...], dims) -> None:
        for size, cut in zip(shape, dims, strict=True):
            parts = math.prod(self.mesh.shape[axis] for axis in self._axes(cut))
            if size % parts:
                raise ValueError(
                    f"{what} of shape {tuple(shape)} cannot be cut {parts} ways ({cut}) along a "
                    f"dim of {size}: expected a multiple; choose another mesh"
                )

    def _gather(self, params: Any, path: str, dtype) -> Any:
        # A scanned layer arrives without its layer dim, which the table's rows count.
        in_stack = path.endswith("/layers")

        def gather_leaf(leaf_path: str, leaf: jax.Array) -> jax.Array:
            dims = row_of(leaf_path)
            dims = dims[1:] if in_stack else dims
            leaf = leaf.astype(dtype) if leaf.ndim >= 2 else leaf  # norms and biases stay f32
            if self.explicit:
                return self._gather_explicit(leaf, dims)
            return self._gather_gspmd(leaf, dims)

        return jax.tree.map(gather_leaf, leaf_paths(params, path), params)

    def _gather_gspmd(self, leaf: jax.Array, dims) -> jax.Array:
        if not {FSDP, LAST} & set(dims):
            return leaf
        stored = NamedSharding(self.mesh, self._spec(dims))
        whole = NamedSharding(self.mesh, self._only(stored.spec, (TENSOR,)))

        @jax.custom_vjp
        def gather(leaf):
            return jax.lax.with_sharding_constraint(leaf, whole)

        # Left to itself the constraint's transpose pins the gradient whole on every device;
        # pinned to shards, it is free to become a reduce-scatter.
        gather.defvjp(
            lambda leaf: (gather(leaf), None),
            lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, stored),),
        )
        return gather(leaf)

    def _gather_explicit(self, leaf: jax.Array, dims) -> jax.Array:
        cut = next((cut for cut in dims if cut in (FSDP, LAST)), None)
        axes = self._axes(cut)
        # The gather's transpose sums over `axes`; over the rest of the batch it is done here.
        whole_along = [a for a in self.batch_axes if a not in axes and self.mesh.shape[a] > 1]
        leaf = _sum_gradient(leaf, tuple(whole_along)) if whole_along else leaf
        if cut is None:
            return leaf
        for group in [(axis,) for axis in reversed(axes)] if self.by_axis else [axes]:
            leaf = jax.lax.all_gather(leaf, group, axis=dims.index(cut), tiled=True)
        return as_stored(leaf) if self.row_major else leaf

    def _constrain(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        dims = tuple(ACTIVATION_DIMS[name] if name else None for name in names)
        # Rows may be padded to the mesh; heads cut unevenly would be shuffled in every layer.
        self._check_divides("an activation", x.shape, [d if d == TENSOR else None for d in dims])
        spec = self._spec(dims)
        if not self.explicit:
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
        if not self._tensor_is_open:
            return x
        return jax.lax.with_sharding_constraint(x, self._only(spec, (TENSOR,)))

    def _per_shard(self, fn: Callable, in_names: tuple, out_names: tuple) -> Callable:
        def spec(names):
            return self._spec(tuple(ACTIVATION_DIMS[name] if name else None for name in names))

        in_specs, out_specs = tuple(map(spec, in_names)), spec(out_names)
        if not self.explicit:
            return jax.shard_map(
                fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
        if not self._tensor_is_open:
            return fn
        return jax.shard_map(  # inside the program's own shard_map, over what it left open
            fn,
            in_specs=tuple(self._only(s, (TENSOR,)) for s in in_specs),
            out_specs=self._only(out_specs, (TENSOR,)),
            axis_names={TENSOR},
            check_vma=False,
        )


def _as_tuple(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _sum_gradient(leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Itself; its gradient summed over the axes on which the leaf is whole and the batch is cut."""

    @jax.custom_vjp
    def identity(leaf):
        return leaf

    identity.defvjp(lambda leaf: (leaf, None), lambda _, gradient: (jax.lax.psum(gradient, axes),))
    return identity(leaf)
