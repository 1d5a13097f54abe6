"""What a run starts from: a folder, another run's projector, fresh factors, another layer."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from llava_jax import config as configs
from llava_jax import model_folder, starting
from llava_jax.config import LORA, STAGE_1, STAGE_1_START_END, STAGE_2, Config, Data
from llava_jax.weights.tensor import in_memory
from tests import training

ADDED = "language/embed/added"


def config(folder: Path, **model) -> Config:
    return Config(
        name="a run",
        data=Data(
            sources={"mine": configs.Source("nowhere.json", how="fetch mine")},
            image_size=28,
            patch_size=14,
        ),
        model=configs.Model(start=str(folder / "start"), **model),
        optim=configs.Optim(trains=STAGE_2),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """start/, and stage1/: a thin folder over it, with a projector and rows of its own."""
    root = tmp_path_factory.mktemp("starting")
    start = training.start_model()
    model_folder.save(start, epath.Path(root / "start"))
    taught = training.start_model(seed=1)
    own = frozenset(path for path in taught.leaves if path.startswith("projector/")) | {ADDED}
    other = dataclasses.replace(
        taught, leaves={**start.leaves, **{path: taught.leaves[path] for path in own}}, own=own
    )
    thin, base = model_folder.thin(other, epath.Path(root / "start"), epath.Path(root / "stage1"))
    model_folder.save(thin, epath.Path(root / "stage1"), base=base)
    return root


def opened(folder: Path, run: Config) -> starting.Start:
    return starting.open_start(run, epath.Path(folder / "run"))


def test_a_start_is_its_folder(folder):
    start = opened(folder, config(folder))
    assert start.base.fingerprint == model_folder.fingerprint(epath.Path(folder / "start"))
    expected = training.start_model().leaves
    assert start.leaves.keys() == expected.keys()
    np.testing.assert_array_equal(start.leaves[ADDED].read(), expected[ADDED].read())


def test_stage_1_gives_its_projector_and_its_rows(folder):
    start = opened(folder, config(folder, projector=str(folder / "stage1")))
    taught, before = training.start_model(seed=1).leaves, training.start_model().leaves
    for path, leaf in start.leaves.items():
        is_taught = path.startswith("projector/") or path == ADDED
        np.testing.assert_array_equal(leaf.read(), (taught if is_taught else before)[path].read())


def test_a_whole_model_gives_its_projector_too(folder):
    model_folder.save(training.start_model(seed=1), epath.Path(folder / "whole"))
    run = config(folder, projector=str(folder / "whole"))
    start, taught = opened(folder, run), training.start_model(seed=1).leaves
    for path in (path for path in taught if path.startswith("projector/")):
        np.testing.assert_array_equal(start.leaves[path].read(), taught[path].read())


@pytest.mark.parametrize("trains", [STAGE_1, LORA])
def test_rows_that_would_be_in_no_checkpoint_are_refused(folder, trains):
    run = config(folder, projector=str(folder / "stage1"))
    run = dataclasses.replace(run, optim=configs.Optim(trains=trains))
    with pytest.raises(ValueError, match=r"brings rows for <im_start> and <im_end>"):
        opened(folder, run)
    allowed = dataclasses.replace(run, optim=configs.Optim(trains=STAGE_1_START_END))
    assert opened(folder, allowed).leaves[ADDED].shape == (2, 64)


def test_lora_factors_are_new_and_change_nothing(folder):
    run = config(folder, lora=configs.Lora(rank=4, targets=("q", "v")))
    start = opened(folder, run)
    new = start.leaves.keys() - training.start_model().leaves.keys()
    assert {path.split("/")[-2] for path in new} == {"q", "v"}
    assert not any(start.leaves[path].read().any() for path in new if path.endswith("lora_b"))
    assert start.about.config.language.lora.rank == 4


def test_the_last_layer_is_one_field(folder):
    assert opened(folder, config(folder)).about.config.vision.select_layers == (-2,)
    last = opened(folder, config(folder, select_layer=-1))
    assert last.about.config.vision.select_layers == (-1,)


def test_a_model_speaks_as_its_data_does_but_for_captions(folder):
    run = config(folder)
    spoken = dataclasses.replace(run, data=dataclasses.replace(run.data, template="v0"))
    assert opened(folder, spoken).about.template == "v0"
    captions = dataclasses.replace(run, data=dataclasses.replace(run.data, template="plain"))
    assert opened(folder, captions).about.template == "v1"


def test_pictures_that_the_tower_does_not_read_are_refused(folder):
    run = config(folder)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, image_size=56))
    with pytest.raises(ValueError, match=r"got pictures of 56 pixels in patches of 14"):
        opened(folder, run)


def test_all_that_is_missing_is_told_with_what_fetches_it(folder, tmp_path):
    run = config(tmp_path, projector=str(tmp_path / "stage1"), how="import it", projector_how="run")
    with pytest.raises(ValueError, match="a run needs what is not here") as refused:
        starting.check_present(run)
    said = str(refused.value)
    for expected in (
        "a run needs",
        "import it",
        "run\n",
        "projector=",
        "nowhere.json",
        "fetch mine",
    ):
        assert expected in said
    # What one command fetches is listed above it, once.
    both = {name: configs.Source(f"{name}.json", how="fetch both") for name in ("one", "other")}
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, sources=both))
    with pytest.raises(ValueError, match=r"one\)\nother\.json +\(source other\)\n +fetch both$"):
        starting.check_present(run)
    with pytest.raises(ValueError, match=r"got no config\.model\.start"):
        starting.check_present(Config())


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "start").mkdir()
    with pytest.raises(ValueError, match=r"launch/convert\.py import"):
        opened(tmp_path, config(tmp_path))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder):
    run = config(folder)
    start = opened(folder, run)
    starting.check_vocabulary(start, run, 514)
    with pytest.raises(ValueError, match="got 515 ids of the tokenizer"):
        starting.check_vocabulary(start, run, 515)


def test_a_leaf_is_read_only_when_it_is_needed(folder, monkeypatch):
    """13B of them are named before any is read."""
    monkeypatch.setattr(in_memory(np.zeros(1), "x").__class__, "read_part", None)
    assert len(opened(folder, config(folder)).leaves) > 50
