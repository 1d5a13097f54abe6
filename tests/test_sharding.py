"""The mesh: every released leaf lies on every slice, and no layout changes the function."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from llava_jax import sharding
from llava_jax.models import llava
from llava_jax.models.attention import attention
from llava_jax.models.llava import Llava
from llava_jax.models.lora import LoraConfig
from llava_jax.models.projector import ProjectorConfig, ResamplerConfig
from llava_jax.models.stack import Compute, Placement
from llava_jax.planner import topology
from llava_jax.sharding import Layout, MeshShape, make_mesh
from tests import tiny

GOLDEN_13B = Path(__file__).parent / "golden" / "sharding_v1.5-13b.txt"
RELEASED = ("v1-7b", "v1-13b", "v1.5-7b", "v1.5-13b")
MESHES = {
    "(8)": MeshShape(fsdp=(8,)),
    "(4,2)": MeshShape(fsdp=(4,), tensor=2),
    "(2,2,2)": MeshShape(data=2, fsdp=(2,), tensor=2),
    "(4x2)": MeshShape(fsdp=(4, 2)),
    "(2x2,2)": MeshShape(fsdp=(2, 2), tensor=2),
}


def shapes_of(config):
    return jax.eval_shape(Llava(config).init, jax.random.key(0))


def without_devices(shape: MeshShape) -> Layout:
    names = ("data", *shape.fsdp_axes, "tensor")
    return Layout(AbstractMesh(shape.sizes, names, axis_types=(AxisType.Auto,) * len(names)))


def everything_else(name: str):
    """The released architecture with the parts it does without: LoRA, row end, a resampler."""
    config = llava.released(name)
    width = config.language.hidden_size
    resampler = ResamplerConfig(32, 768, 3072, num_layers=2, num_heads=12)
    return dataclasses.replace(
        config,
        projector=ProjectorConfig("resampler", 1024, width, resampler),
        language=dataclasses.replace(config.language, lora=LoraConfig(rank=128), added_vocab=3),
        row_end=True,
    )


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("parts", ["released", "everything else"])
def test_every_leaf_lies_on_every_slice(name, parts):
    shapes = shapes_of(llava.released(name) if parts == "released" else everything_else(name))
    for slice_name in topology.names():
        layout = without_devices(topology.topology(slice_name).mesh_shape())
        layout.param_shardings(shapes)  # raises where a leaf has no row, two, or does not divide


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_every_leaf_divides_with_tensor_parallelism(tensor):
    without_devices(MeshShape(fsdp=(16,), tensor=tensor)).param_shardings(
        shapes_of(everything_else("v1-13b"))
    )


def test_the_13b_table_is_the_golden_one():
    shapes = shapes_of(llava.released("v1.5-13b"))
    lines = []
    paths = sharding.leaf_paths(shapes)
    for path, leaf in zip(jax.tree.leaves(paths), jax.tree.leaves(shapes), strict=True):
        cut = ", ".join(c or "·" for c in sharding.row_of(path))
        size = ", ".join(map(str, leaf.shape))
        lines.append(f"{path:<45} {leaf.dtype}[{size}]".ljust(75) + f" ({cut})")
    assert "\n".join(lines) + "\n" == GOLDEN_13B.read_text(), (
        "the 13B table changed. If that was meant, put the new lines into the golden file; "
        "training checkpoints do not depend on it, but every compiled program does."
    )


def test_what_the_table_leaves_whole_is_small():
    for name in RELEASED:
        shapes = shapes_of(llava.released(name))
        sizes = {"whole": 0, "cut": 0}
        for path, leaf in zip(
            jax.tree.leaves(sharding.leaf_paths(shapes)), jax.tree.leaves(shapes), strict=True
        ):
            sizes["cut" if any(sharding.row_of(path)) else "whole"] += leaf.size
        assert sizes["whole"] < 2e-4 * sizes["cut"], sizes


# The same function on every layout.


def logits_loss_and_gradients(layout, params, batch, config=tiny.CONFIG, **compute):
    model = Llava(config, Compute(**compute), layout.placement("float32"))
    param_shardings, batch_shardings = layout.param_shardings(params), layout.batch_shardings(batch)

    def program(params, batch):
        weight = layout.sum_over_batch(jnp.sum(batch.loss_weight_RT))

        def loss(params):
            logits = model.logits(params, batch)
            log_p = jax.nn.log_softmax(logits)
            ce_RT = -jnp.take_along_axis(log_p, batch.target_RT[..., None], axis=-1)[..., 0]
            return jnp.sum(ce_RT * batch.loss_weight_RT) / weight, logits

        (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, layout.sum_over_batch(value), gradients

    ins = (param_shardings, batch_shardings)
    outs = (batch_shardings.token_RT, layout.replicated, param_shardings)
    run = jax.jit(layout.program(program, ins, outs), in_shardings=ins, out_shardings=outs)
    return run(jax.device_put(params, param_shardings), jax.device_put(batch, batch_shardings))


@pytest.fixture(scope="module")
def single_device():
    params, batch = tiny.draw_params(), tiny.draw_batch()
    layout = Layout(make_mesh(MeshShape(), jax.devices()[:1]))
    return params, batch, logits_loss_and_gradients(layout, params, batch)


@pytest.mark.parametrize("form", ["gspmd", "explicit", "by axis", "as it lies"])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_changes_nothing(mesh, form, single_device):
    shape = MESHES[mesh]
    if form == "by axis" and len(shape.fsdp) == 1:
        pytest.skip("one fsdp axis: by axis is all at once")
    if form == "as it lies" and mesh != "(4x2)":
        pytest.skip("a layout in memory: one mesh shows that it changes nothing")
    params, batch, (want_logits, want_loss, want_gradients) = single_device
    layout = Layout(
        make_mesh(shape),
        explicit=form != "gspmd",
        by_axis=form == "by axis",
        row_major=form == "as it lies",
    )
    logits, loss, gradients = logits_loss_and_gradients(layout, params, batch)

    # Measured worst 9e-7 of the largest logit and of the largest gradient, 2.4e-7 of the loss:
    # sums over features and over rows run in another order.
    np.testing.assert_allclose(logits, want_logits, atol=5e-6 * np.abs(want_logits).max())
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(want_gradients))
    for path, got, want in zip(
        jax.tree.leaves(sharding.leaf_paths(gradients)),
        jax.tree.leaves(gradients),
        jax.tree.leaves(want_gradients),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=5e-6 * largest, err_msg=path)

    # Nothing the table cuts is whole on a device: neither weights nor gradients.
    placed = jax.device_put(params, layout.param_shardings(params))
    for tree in (placed, gradients):
        for path, leaf in zip(
            jax.tree.leaves(sharding.leaf_paths(tree)), jax.tree.leaves(tree), strict=True
        ):
            ways = {
                None: 1,
                sharding.FSDP: math.prod(shape.fsdp),
                sharding.LAST: shape.fsdp[-1],
                sharding.TENSOR: shape.tensor,
            }
            parts = math.prod(ways[cut] for cut in sharding.row_of(path))
            assert leaf.sharding.is_fully_replicated == (parts == 1), path
            assert leaf.addressable_shards[0].data.size * parts == leaf.size, path


@pytest.mark.parametrize("form", ["gspmd", "explicit"])
def test_a_mesh_changes_nothing_of_the_rarer_parts(form, rarer_parts):
    """A resampler, the learned row end, tied and added ids, LoRA with dropout."""
    config, params, batch, keys, want = rarer_parts
    layout = Layout(make_mesh(MeshShape(fsdp=(2, 2), tensor=2)), explicit=form == "explicit")
    got = hidden_and_gradients(layout, config, params, batch, keys)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(want))
    for path, g, w in zip(
        jax.tree.leaves(sharding.leaf_paths(want)),
        jax.tree.leaves(got),
        jax.tree.leaves(want),
        strict=True,
    ):
        np.testing.assert_allclose(g, w, atol=5e-6 * largest, err_msg=path)


@pytest.fixture(scope="module")
def rarer_parts():
    resampler = ResamplerConfig(4, 32, 64, num_layers=2, num_heads=4)
    config = dataclasses.replace(
        tiny.with_language(tie_embeddings=True, lora=LoraConfig(rank=8, dropout=0.3)),
        projector=ProjectorConfig("resampler", 32, 64, resampler),
        row_end=True,
    )
    params, batch = tiny.draw_params(config), tiny.draw_batch(config)
    text = np.argwhere((batch.image_index_RT == -1) & (batch.segment_RT > 0))
    batch.image_index_RT[tuple(text[::7].T)] = -2
    keys = jax.random.split(jax.random.key(3), batch.token_RT.shape[0])
    one = Layout(make_mesh(MeshShape(), jax.devices()[:1]))
    return config, params, batch, keys, hidden_and_gradients(one, config, params, batch, keys)


def hidden_and_gradients(layout, config, params, batch, keys):
    model = Llava(config, placement=layout.placement("float32"))
    shardings, rows = layout.param_shardings(params), layout.batch_shardings((batch, keys))

    def program(params, batch_and_keys):
        batch, keys = batch_and_keys

        def loss(params):
            features = model.encode_images(params, batch.pixel_RKHW3)
            x_RTD = model.embed(params, batch.token_RT, features, batch.image_index_RT)
            x_RTD, _ = model.decode(
                params, x_RTD, batch.position_RT, batch.segment_RT, dropout_key_R=keys
            )
            log_p = jax.nn.log_softmax(model.head(params, x_RTD))
            ce_RT = -jnp.take_along_axis(log_p, batch.target_RT[..., None], axis=-1)[..., 0]
            return jnp.sum(ce_RT * batch.loss_weight_RT), x_RTD

        gradients, x_RTD = jax.grad(loss, has_aux=True)(params)
        return x_RTD, gradients

    ins, outs = (shardings, rows), (rows[0].token_RT, shardings)
    run = jax.jit(layout.program(program, ins, outs), in_shardings=ins, out_shardings=outs)
    hidden, gradients = run(jax.device_put(params, shardings), jax.device_put((batch, keys), rows))
    return {"hidden": hidden, "gradients": gradients}


def pallas_input_shapes(jaxpr):
    """The shapes that each Pallas call of a program takes."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield [variable.aval.shape for variable in equation.invars]
        else:
            for inner in jax.tree.leaves(list(equation.params.values())):
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from pallas_input_shapes(inner)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("tensor", [1, 2])
def test_the_splash_kernel_runs_on_shards(tensor, explicit):
    """Pallas calls cannot be partitioned: each device must get its own rows and heads."""
    mesh = make_mesh(MeshShape(fsdp=(2,), tensor=tensor), jax.devices()[: 2 * tensor])
    layout = Layout(mesh, explicit)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, (4, 128, 4, 64)) for key in keys]
    segment_BT = jnp.asarray([[1] * 50 + [2] * 70 + [0] * 8, [1] * 128] * 2)

    def value_and_gradients(backend, placement):
        def value(q, k, v, segment_BT):
            return jnp.sum(
                attention(
                    *(q, k, v, segment_BT),
                    causal=True,
                    backend=backend,
                    block=128,
                    placement=placement,
                )
                ** 2
            )

        return jax.value_and_grad(value, (0, 1, 2))

    want_value, want = jax.jit(value_and_gradients("xla", Placement()))(*inputs, segment_BT)
    step = value_and_gradients("splash_interpret", layout.placement("float32"))

    def program(*inputs):
        value, gradients = step(*inputs)
        return layout.sum_over_batch(value), gradients

    ins = tuple(layout.batch_shardings([*inputs, segment_BT]))
    outs = (layout.replicated, ins[:3])
    got_value, got = jax.jit(layout.program(program, ins, outs))(*inputs, segment_BT)
    # Interpreted, the kernel could be partitioned, or run whole everywhere; on a TPU it cannot.
    shard = (2, 4 // tensor, 128, 64)  # rows, heads, tokens, head dim
    shapes = list(
        pallas_input_shapes(
            jax.make_jaxpr(layout.program(program, ins, outs))(*inputs, segment_BT).jaxpr
        )
    )
    assert len(shapes) == 3  # forward, dq, dkv
    assert all(shard in call for call in shapes), shapes
    np.testing.assert_allclose(got_value, want_value, rtol=1e-5)
    # Measured worst 1.6e-6 of the largest gradient: the kernel's blockwise softmax.
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max())


def test_a_tree_is_born_in_shards():
    layout = Layout(make_mesh(MeshShape(fsdp=(8,))))
    config = tiny.with_language(num_layers=1)
    model, key = Llava(config), jax.random.key(7)
    shapes = shapes_of(config)
    shardings = layout.param_shardings(shapes)
    init = jax.jit(model.init, out_shardings=shardings).lower(key).compile()
    params = init(key)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    # What a device holds while it draws: its shards, and less than the largest whole leaf.
    largest = max(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    memory = init.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < largest
    # The same numbers as on one device.
    jax.tree.map(np.testing.assert_array_equal, params, jax.jit(model.init)(key))


def test_matrices_travel_in_the_compute_dtype_and_norms_stay_f32():
    layout = Layout(make_mesh(MeshShape(fsdp=(8,))))
    params = tiny.draw_params()
    hook = layout.placement("bfloat16").gather
    one_layer = jax.tree.map(lambda leaf: leaf[0], params["language"]["decoder"]["layers"])
    used = jax.jit(lambda p: hook(p, "language/decoder/layers"))(one_layer)
    assert used["q"]["kernel"].dtype == jnp.bfloat16
    assert used["attention_norm"]["scale"].dtype == jnp.float32
    assert jax.tree.map(jnp.shape, used) == jax.tree.map(jnp.shape, one_layer)


def test_refusals():
    with pytest.raises(ValueError, match=r"'language/decoder/bias' matches 0 rows .* exactly one"):
        sharding.row_of("language/decoder/bias")
    with pytest.raises(ValueError, match=r"got 8 devices for a mesh of 1×3×1 .*expected 3"):
        make_mesh(MeshShape(fsdp=(3,)))
    with pytest.raises(ValueError, match=r"got fsdp=8: expected a tuple, as in fsdp=\(8,\)"):
        MeshShape(fsdp=8)  # pyright: ignore
    with pytest.raises(ValueError, match=r"fsdp=\(2, 2, 2, 2\).* one to three fsdp axes"):
        MeshShape(fsdp=(2, 2, 2, 2))
    layout = without_devices(MeshShape(fsdp=(7,)))
    with pytest.raises(ValueError, match=r"cannot be cut 7 ways \(fsdp\) along a dim of 64"):
        layout.param_shardings(shapes_of(tiny.CONFIG))
    with pytest.raises(ValueError, match="cannot be cut 7 ways"):
        layout.batch_shardings(tiny.draw_batch())
    with pytest.raises(ValueError, match="expects 2 dims"):
        layout.param_shardings({"language": {"embed": {"table": jnp.zeros(7)}}})


def test_more_tensor_devices_than_key_heads_are_refused():
    layout = Layout(make_mesh(MeshShape(fsdp=(2,), tensor=4)))
    model = Llava(tiny.CONFIG, placement=layout.placement("float32"))
    with pytest.raises(ValueError, match=r"cannot be cut 4 ways \(tensor\) along a dim of 2"):
        jax.eval_shape(model.logits, tiny.draw_params(), tiny.draw_batch())
    with pytest.raises(ValueError, match=r"the cache .*cannot be cut 4 ways"):
        layout.cache_shardings(model.empty_cache(2, 8))


def test_two_rows_for_one_leaf_are_an_error(monkeypatch):
    monkeypatch.setattr(sharding, "TABLE", (*sharding.TABLE, (r"language/.*", (None,))))
    with pytest.raises(ValueError, match="'language/head/kernel' matches 2 rows"):
        sharding.row_of("language/head/kernel")
