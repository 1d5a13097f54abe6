"""Sources in a bucket: entries and pictures are read one request each, listings are made once."""

import json
import os
import pickle

import pytest
from etils.epath import backend, gpath

from llava_jax.data import storage
from llava_jax.data.source import open_source
from tests.data.sources import (
    ENTRIES,
    PICTURES,
    everything,
    problems,
    write_json,
    write_pictures,
    write_zip,
)
from tests.fake_bucket import FakeBucket

# Otherwise gcsfs asks by gRPC, over TLS, whether the bucket has folders.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
gcsfs_core = pytest.importorskip(
    "gcsfs.core", reason="gs:// needs gcsfs: pip install 'etils[epath-gcs]'"
)
fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def bucket():
    with pytest.MonkeyPatch.context() as patch, FakeBucket("data").serving() as served:
        patch.setenv("STORAGE_EMULATOR_HOST", served.url)
        # The client may not look for the credentials of whoever runs the tests.
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        fsspec.register_implementation("gcs", gcsfs_core.GCSFileSystem, clobber=True)
        backend.fsspec_backend._get_filesystem.cache_clear()
        # epath prefers TensorFlow, where there is one.
        patch.setattr(gpath, "_is_tf_installed", lambda: False)
        gcsfs_core.GCSFileSystem.clear_instance_cache()
        yield served
        gcsfs_core.GCSFileSystem.clear_instance_cache()
        backend.fsspec_backend._get_filesystem.cache_clear()


def test_json_and_pictures(bucket, tmp_path):
    local = write_json(tmp_path / "chat.json", ENTRIES)
    bucket.put("chat.json", local.read_bytes())
    for name, data in PICTURES.items():
        bucket.put(f"images/{name}", data)
    source = open_source("gs://data/chat.json", images=["gs://data/images"])
    plain = open_source(local, images=[write_pictures(tmp_path / "images")])
    assert source.fingerprint == plain.fingerprint

    found, expected = everything(pickle.loads(pickle.dumps(source))), everything(plain)
    # In a bucket there is no folder to be taken for a picture, and places have other names.
    for here, there in zip(found, expected, strict=True):
        if here[0] not in ("a folder", "no picture there"):
            assert here == there
    assert found[5][2] == [
        ("sub/gone.png", "missing", "no picture sub/gone.png in gs://data/images")
    ]

    bucket.log.clear()
    assert source[3].pictures[1].read() == PICTURES["sub/b.png"]
    assert [call.verb for call in bucket.log] == ["read", "read"]
    assert bucket.log[0].stop - bucket.log[0].start < 1000  # the entry, not the file

    pictures = [picture for index in (0, 3, 4, 5) for picture in source[index].pictures]
    bucket.log.clear()
    assert [p.exists() for p in pictures] == [True, True, True, True, True, False]
    assert source[4].pictures[0].nearest() is None
    assert len(bucket.calls("list")) == len({"", "sub"})


def test_zips_and_science_qa(bucket, tmp_path):
    bucket.put("images.zip", write_zip(tmp_path / "z", {"p1/image.png": b"x" * 9}).read_bytes())
    bucket.put("sqa/problems.json", json.dumps(problems()).encode())
    bucket.put("sqa/pid_splits.json", b'{"train": ["p1"], "val": ["p2"]}')
    source = open_source("gs://data/sqa", images=["gs://data/images.zip"])
    assert source[0].pictures[0].read() == b"x" * 9
    assert source[0].pictures[0].exists()


def test_a_giant_is_not_downloaded(bucket, monkeypatch):
    monkeypatch.setattr(storage, "MAX_PICTURE_BYTES", 100)
    bucket.put("images/large.jpg", bytes(10_000))
    bucket.log.clear()
    with pytest.raises(ValueError, match=r"large\.jpg of .* bytes, expected a picture"):
        storage.read_picture("gs://data/images/large.jpg")
    assert sum(min(call.stop, 10_000) - call.start for call in bucket.calls("read")) <= 101
