"""gs:// end to end: epath's client and TensorStore's against a bucket in memory."""

import os

import jax
import numpy as np
import pytest
from etils.epath import backend, gpath

from llava_jax import files, metrics, model_folder
from llava_jax.sharding import Layout, MeshShape, make_mesh
from llava_jax.weights.io import read_weights, write_safetensors
from llava_jax.weights.memory import params_in_memory, stored_shapes
from llava_jax.weights.tensor import Tensor, in_memory
from tests import tiny
from tests.fake_bucket import FakeBucket

# Otherwise gcsfs asks by gRPC, over TLS, whether the bucket has folders.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
gcsfs_core = pytest.importorskip(
    "gcsfs.core", reason="gs:// needs gcsfs: pip install 'etils[epath-gcs]'"
)
fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def server():
    """One for all tests: TensorStore may ask for the address once."""
    with pytest.MonkeyPatch.context() as patch, FakeBucket().serving() as served:
        patch.setenv("STORAGE_EMULATOR_HOST", served.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", served.url)
        # Neither client may look for the credentials of whoever runs the tests.
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        fsspec.register_implementation("gcs", gcsfs_core.GCSFileSystem, clobber=True)
        backend.fsspec_backend._get_filesystem.cache_clear()
        # epath prefers TensorFlow, where there is one.
        patch.setattr(gpath, "_is_tf_installed", lambda: False)
        yield served
        backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def bucket(server):
    server.reset()
    backend.fsspec_backend.fs("gs://bucket").invalidate_cache()
    return server


def at(name):
    return files.path(f"gs://bucket/{name}")


def arrived(bucket, name):
    """Names of a folder's files, in the order in which they got them."""
    prefix = f"{name}/"
    return [
        call.target.removeprefix(prefix)
        for call in bucket.calls("move", "copy")
        if call.target.startswith(prefix)
    ]


# Files.


def test_a_file_appears_whole(bucket):
    files.write_json(at("a.json"), {"b": 1, "a": "é"})
    files.write_json(at("a.json"), {"second": True})
    assert {name: stored.data for name, stored in bucket.objects.items()} == {
        "a.json": b'{\n  "second": true\n}\n'
    }
    # Only a move gave it its name.
    assert "a.json" not in {call.name for call in bucket.calls("write")}


def test_a_small_file_takes_few_requests(bucket):
    files.write_text(at("a"), "x")
    # Is it a folder? (get, list, get); start, upload, move.
    assert len(bucket.log) <= 6


def test_a_large_file_in_parts(bucket):
    data = np.random.default_rng(0).bytes(11 << 20)
    with files.new_file(at("large")) as file:
        for begin in range(0, len(data), 1 << 20):
            file.write(data[begin : begin + (1 << 20)])
        assert not bucket.objects
    assert bucket.objects["large"].data == data
    assert list(bucket.objects) == ["large"]


def test_a_failure_keeps_the_old_file(bucket):
    files.write_text(at("a"), "old")
    with pytest.raises(RuntimeError, match="broke"), files.new_file(at("a")) as file:
        file.write(b"x" * (6 << 20))
        raise RuntimeError("broke")
    assert {name: stored.data for name, stored in bucket.objects.items()} == {"a": b"old"}


def test_a_folder_appears_in_order(bucket):
    with files.fresh_folder(at("m"), last="about.json") as inside:
        for name in ("about.json", "tokenizer.model", "params/deep/er", "params/a"):
            files.write_text(inside / name, name)
        assert not any(name.startswith("m/") for name in bucket.objects)
    order = arrived(bucket, "m")
    assert set(order[:2]) == {"params/deep/er", "params/a"}
    assert order[2:] == ["tokenizer.model", "about.json"]
    assert {name: stored.data.decode() for name, stored in bucket.objects.items()} == {
        f"m/{name}": name for name in order
    }


def test_a_folder_of_more_files_than_a_page(bucket):
    bucket.page = 3
    with files.fresh_folder(at("m")) as inside:
        for i in range(10):
            (inside / f"{i}").write_text("x")
    assert sorted(bucket.objects) == [f"m/{i}" for i in range(10)]


def test_what_other_clients_put_into_a_folder_comes_along(bucket):
    with files.fresh_folder(at("m")) as inside:
        (inside / "params" / "a").write_text("x")
        assert [entry.name for entry in (inside / "params").iterdir()] == ["a"]
        bucket.put(f"{inside.name}/params/b", b"as Orbax does")
    assert sorted(bucket.objects) == ["m/params/a", "m/params/b"]


def test_a_move_that_fails_leaves_nothing(bucket):
    files.write_text(at("other"), "")
    bucket.refuse = lambda call: 403 if call.target == "m/b" else None
    with pytest.raises(OSError, match="Forbidden"):
        with files.fresh_folder(at("m"), last="b") as inside:
            (inside / "a").write_text("x")
            (inside / "b").write_text("x")
    assert arrived(bucket, "m")[0] == "a"
    assert list(bucket.objects) == ["other"]


def test_an_error_while_cleaning_up_hides_nothing(bucket):
    bucket.refuse = lambda call: 400 if call.verb == "delete" else None
    with pytest.raises(RuntimeError, match="broke"), files.fresh_folder(at("m")) as inside:
        (inside / "a").write_text("x")
        raise RuntimeError("broke")
    with pytest.raises(RuntimeError, match="broke"), files.new_file(at("a")):
        raise RuntimeError("broke")


def test_a_folder_that_holds_something_is_refused(bucket):
    bucket.put("other", b"")
    assert [entry.name for entry in at("").iterdir()] == ["other"]
    bucket.put("m/old", b"mine")
    assert not at("m").exists()  # epath's client believes for ever what it has seen
    with pytest.raises(ValueError, match=r"gs://bucket/m, a folder that holds 'old'"):
        with files.fresh_folder(at("m")):
            pytest.fail("the work was started")
    assert list(bucket.objects) == ["other", "m/old"]


def test_what_came_meanwhile_is_not_overwritten(bucket):
    with pytest.raises(OSError, match=r"^cannot write gs://bucket/m: directory not empty"):
        with files.fresh_folder(at("m")) as inside:
            (inside / "a").write_text("ours")
            assert len(list(at("").iterdir())) == 1
            bucket.put("m/a", b"theirs")
    assert {name: stored.data for name, stored in bucket.objects.items()} == {"m/a": b"theirs"}


# Weights.


def test_a_run_tells_its_numbers_every_minute(bucket, monkeypatch, capsys):
    """An object cannot grow: it is written whole, and a bucket that fails is tried again."""
    now = 0.0
    told_at = []

    def told() -> int:
        return len(metrics.read(at("run")).steps)

    with metrics.Log(at("run"), resume_at=0, tensorboard=True, clock=lambda: now) as log:
        for number in range(10):
            now += 20
            if number == 7:
                monkeypatch.setattr(bucket, "refuse", lambda call: 403)
            log.step(number, {"loss": number / 8})
            if number == 7:
                monkeypatch.undo()
            told_at.append(told())
        log.event(9, "saved")
        log.flush()
        assert told() == 10
    assert told_at == [0, 0, 0, 4, 4, 4, 4, 4, 4, 4]
    notes = capsys.readouterr().err
    assert "note: gs://bucket/run/metrics.jsonl is not up to date, and tried again later" in notes
    with metrics.Log(at("run"), resume_at=5, tensorboard=True) as log:
        log.step(5, {"loss": -1.0})
    history = metrics.read(at("run"))
    assert [step["loss"] for step in history.steps] == [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, -1]
    assert [event["kind"] for event in history.events] == []
    names = [name for name in bucket.objects if name.startswith("run/tensorboard/events.out")]
    assert len(names) == 2
    assert "off" not in notes
    assert not [name for name in bucket.objects if "unfinished" in name]


def test_safetensors_are_read_in_ranges(bucket):
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.standard_normal((64, 1024)).astype(np.float32) for i in range(40)}
    with files.fresh_folder(at("hf")) as inside:
        write_safetensors(inside, {key: in_memory(array, key) for key, array in arrays.items()})
    size = len(bucket.objects["hf/model.safetensors"].data)

    bucket.log.clear()
    tensors = read_weights(at("hf"))
    assert tensors.keys() == arrays.keys()
    # gcsfs reads 5 MiB at least; the file is twice that.
    assert sum(call.stop - call.start for call in bucket.calls("read")) < size // 2 + (1 << 20)

    bucket.log.clear()
    np.testing.assert_array_equal(tensors["t39"].read(), arrays["t39"], strict=True)
    tail = size - arrays["t39"].nbytes
    assert [(call.start, call.stop) for call in bucket.calls("read")] == [(tail, size)]
    for key, array in arrays.items():
        np.testing.assert_array_equal(tensors[key].read(), array, strict=True)


# Model folders.


@pytest.fixture(scope="module")
def leaves():
    """Random tensors of a tiny model, in the two dtypes that are most often mixed."""
    rng = np.random.default_rng(0)
    drawn = {}
    for i, (path, shape) in enumerate(stored_shapes(tiny.CONFIG).items()):
        dtype = "bfloat16" if i % 2 else "float32"
        drawn[path] = in_memory(rng.standard_normal(shape).astype(dtype), path)
    return drawn


@pytest.fixture(scope="module")
def model(leaves):
    return model_folder.StoredModel(model_folder.About(tiny.CONFIG), leaves)


def assert_equal(leaves, expected):
    assert leaves.keys() == expected.keys()
    for path, tensor in leaves.items():
        got, wanted = tensor.read(), expected[path].read()
        assert got.dtype == wanted.dtype, path
        assert got.tobytes() == wanted.tobytes(), path


def test_model_folder_there_and_back(bucket, model):
    # A page of a real list is longer than this folder's.
    bucket.page = 3
    report = model_folder.save(model, at("model"))
    order = arrived(bucket, "model")
    assert order[-1] == model_folder.DESCRIPTION
    assert sorted(bucket.objects) == sorted(f"model/{name}" for name in order)

    found = model_folder.read(at("model"))
    assert found.about == model.about
    assert found.digests == report.digests
    assert_equal(found.leaves, model.leaves)


def test_model_folder_into_shards(bucket, model):
    model_folder.save(model, at("model"))
    found = model_folder.read(at("model"))
    layout = Layout(make_mesh(MeshShape(fsdp=(4,), tensor=2)))
    params = params_in_memory(tiny.CONFIG, found.leaves, layout)
    expected = params_in_memory(tiny.CONFIG, model.leaves)
    assert any(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("when", ["reading", "describing", "moving"])
def test_nothing_of_a_model_folder_that_fails(bucket, model, when):
    leaves = dict(model.leaves)
    if when == "reading":
        path = list(leaves)[-1]

        def broken():
            raise OSError("source broke")

        leaves[path] = Tensor(leaves[path].shape, leaves[path].dtype, broken, path)
    elif when == "describing":
        name = model_folder.DESCRIPTION
        bucket.refuse = lambda call: 403 if call.verb == "upload" and name in call.name else None
    else:
        bucket.refuse = lambda call: 403 if call.target.endswith("_METADATA") else None
    stored = model_folder.StoredModel(model.about, leaves)
    with pytest.raises(OSError, match=r"source broke|Forbidden"):
        model_folder.save(stored, at("model"))
    assert not bucket.objects


def test_thin_folder_beside_its_base(bucket, model):
    model_folder.save(model, at("base"))
    own = {path: tensor for path, tensor in model.leaves.items() if path.startswith("projector/")}
    changed = {path: in_memory(tensor.read() + 1, path) for path, tensor in own.items()}
    tuned = model_folder.StoredModel(
        model.about, {**model.leaves, **changed}, own=frozenset(changed)
    )
    thin, base = model_folder.thin(tuned, at("base"), at("thin"))
    model_folder.save(thin, at("thin"), base=base)
    bytes_of = {
        folder: sum(
            len(stored.data)
            for name, stored in bucket.objects.items()
            if name.startswith(f"{folder}/")
        )
        for folder in ("base", "thin")
    }
    assert bytes_of["thin"] < bytes_of["base"] / 4

    assert_equal(model_folder.read(at("thin")).leaves, tuned.leaves)
