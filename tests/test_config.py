"""The schema of a run: what a config file may say, and what the command line may change."""

import argparse
import dataclasses
import re
import runpy

import pytest

from llava_jax import config as c
from llava_jax.data.dataset import check_settings
from tests.conftest import CHECKOUT

FILE = """
from llava_jax import config as c

def get_config(variant="small"):
    config = c.defaults()
    config.batch.conversations = c.variants({"small": 4, "large": 64}, variant)
    config.data.sources = c.sources(mine=c.Source("mine.json", images=("photos",)))
    return config
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "run.py").write_text(FILE)
    return str(tmp_path / "run.py")


def test_a_file_and_its_variants(file):
    config = c.load(file)
    assert config.batch.conversations == 4
    assert config.data.sources == {"mine": c.Source("mine.json", images=("photos",))}
    assert c.load(f"{file}:large").batch.conversations == 64
    assert dataclasses.replace(config, batch=c.Batch(), data=c.Data()) == c.Config()


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("seed=7", lambda config: config.seed == 7),
        ("batch.pack=false", lambda config: config.batch.pack is False),
        ("batch.pack=True", lambda config: config.batch.pack is True),
        ("data.max_bad_fraction=0", lambda config: config.data.max_bad_fraction == 0.0),
        ("data.tokenizer=7", lambda config: config.data.tokenizer == "7"),
        ("data.sources.mine.path=a=b.json", lambda c: c.data.sources["mine"].path == "a=b.json"),
        ("data.sources.mine.images=a,b.zip", lambda c: c.data.sources["mine"].images[1] == "b.zip"),
        ("data.sources.mine.images=('a',)", lambda c: c.data.sources["mine"].images == ("a",)),
        ("data.sources.mine.images=", lambda c: c.data.sources["mine"].images == ()),
    ],
)
def test_the_command_line_changes_fields(file, change, value):
    assert value(c.load(file, c.parse_overrides([f"--config.{change}"])))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("sed=7", "unknown field config.sed; did you mean seed?"),
        ("batch.pak=1", r"config.batch.pak; did you mean pack\?"),
        ("data.sources.min.path=x", r"config.data.sources.min; did you mean mine\?"),
        ("data.sources.mine.xyz=x", r"config.data.sources.mine.xyz; expected one of .*path"),
        ("seed.x=7", "config.seed.x; config.seed has none"),
        ("batch=7", "config.batch=7, expected a field of it: it is a section"),
        ("seed=1.5", "config.seed = 1.5, expected a whole number"),
        ("seed=many", "config.seed = 'many', expected a whole number"),
        ("batch.pack=1", "config.batch.pack = 1, expected true or false"),
        ("data.max_bad_fraction=few", "config.data.max_bad_fraction = 'few', expected a number"),
        ("data.image_mode=stretch", "config.data.image_mode = 'stretch', expected one of 'crop'"),
        ("data.sources.mine.images=(1,)", "images = 1, expected a text"),
        ("data.sources.mine.images=[", "images = '\\[', expected a list"),
    ],
)
def test_what_is_misspelt_or_of_another_type(file, change, says):
    with pytest.raises(ValueError, match=says):
        c.load(file, c.parse_overrides([f"--config.{change}"]))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def other(): pass", "without get_config"),
        (
            "def get_config():\n  x = c.defaults(); x.sed = 1; return x",
            r"sed; did you mean seed\?$",
        ),
        (
            "def get_config():\n  x = c.defaults(); return x.data.sorces",
            "field sorces; did you mean",
        ),
        ("def get_config():\n  return {}['zzz']", "run.py: KeyError: 'zzz'"),
        ("def get_config(:", "run.py: SyntaxError"),
        ("import no_such_module", "run.py: ModuleNotFoundError: .*no_such_module"),
        (
            "def get_config(): return c.sources(**{'a.b': c.Source('x')})",
            "name 'a.b', expected lett",
        ),
        ("def get_config():\n  x = c.defaults(); x.seed = 'a'; return x", "seed"),
        ("def get_config():\n  return {'seed': 1, 'sed': 1}", "config.sed; did you mean seed"),
        ("def get_config():\n  return {'data': {'sources': {'a': {}}}}", "sources.a without path"),
        ("def get_config():\n  return {'data': 3}", "config.data = 3, expected a section"),
    ],
)
def test_files_that_are_refused(tmp_path, body, says):
    (tmp_path / "run.py").write_text(f"from llava_jax import config as c\n{body}\n")
    with pytest.raises(ValueError, match=says):
        c.load(str(tmp_path / "run.py"))


def test_a_whole_number_where_any_will_do(tmp_path):
    (tmp_path / "run.py").write_text("def get_config(): return {'data': {'max_bad_fraction': 0}}")
    fraction = c.load(str(tmp_path / "run.py")).data.max_bad_fraction
    assert (type(fraction), fraction) == (float, 0)


def test_a_config_of_ones_own_starts_from_another(file, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from llava_jax import config as c\n"
        "def get_config(variant=''):\n"
        f"  config = c.start_from('{file}:large')\n"
        "  config.data.sources = c.sources(a=c.Source('a.json'), b=c.Source('b.json', epochs=2))\n"
        "  return config\n"
    )
    config = c.load(str(tmp_path / "mine.py"), {"data.sources.a.take": "first:3"})
    assert config.batch.conversations == 64
    assert {name: source.path for name, source in config.data.sources.items()} == {
        "a": "a.json",
        "b": "b.json",
    }
    assert config.data.sources["a"].take == "first:3"


def test_a_file_that_is_missing():
    with pytest.raises(ValueError, match=r"got config nowhere\.py, expected a file"):
        c.load("nowhere.py:v1")


def test_an_unknown_variant(file):
    with pytest.raises(ValueError, match="got variant 'huge', expected one of small, large"):
        c.load(f"{file}:huge")


def test_a_verbs_options_and_its_config(file):
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int)
    given = ["--n", "3", "--config", file, "--config.seed=5"]
    options, config = c.parse_arguments(parser, given)
    assert (options.n, config.seed) == (3, 5)


@pytest.mark.parametrize("argument", ["--config.seed", "--config.seed 7"])
def test_an_override_without_a_value(argument):
    with pytest.raises(ValueError, match=r"expected --config\.FIELD=VALUE"):
        c.parse_overrides([argument])


def every_variant() -> list[str]:
    found = []
    runs = {*(CHECKOUT / "configs").glob("*.py")} - {CHECKOUT / "configs/towers.py"}
    for path in sorted(runs):  # towers.py has a schema of its own: see picture_world/test_towers.py
        found += [f"{path}:{name}" for name in runpy.run_path(str(path))["VARIANTS"]]
    return found


@pytest.mark.parametrize("fidelity", ["ours", "paper"])
@pytest.mark.parametrize("name", every_variant(), ids=lambda name: name.split("/")[-1])
def test_its_data_settings_can_work(name, fidelity):
    """What opening its data would refuse at once, after hours of fetching it."""
    config = c.load(name, {"fidelity": fidelity})
    if config.data.sources:
        check_settings(config)


@pytest.mark.parametrize("name", every_variant(), ids=lambda name: name.split("/")[-1])
def test_the_configs_of_the_project(name):
    config = c.load(name)
    assert config.name == name.split("/")[-1].replace(".py:", "-")
    data, batch = config.data, config.batch
    assert data.conversation_tokens <= batch.tokens
    # More slots than its tokens could hold would cost the vision tower for nothing.
    assert batch.images <= batch.tokens // (data.image_size // data.patch_size) ** 2


SECTIONS = (
    c.Config,
    c.Data,
    c.Batch,
    c.Source,
    c.Model,
    c.Lora,
    c.Optim,
    c.Compute,
    c.Checkpoints,
    c.HeldOut,
    c.Log,
)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_is_read_by_some_code(section):
    """An option that nothing reads would be obeyed by nobody."""
    paths = [*(CHECKOUT / "llava_jax").rglob("*.py"), *(CHECKOUT / "launch").glob("*.py")]
    code = "\n".join(path.read_text() for path in paths if path.name != "config.py")
    for field in dataclasses.fields(section):
        if field.name != "fidelity":  # which config.py itself obeys
            assert re.search(rf"\.{field.name}\b", code), field.name


def test_the_default_is_the_paper():
    for file in ("stage1", "stage2", "scienceqa"):
        path = str(CHECKOUT / f"configs/{file}.py")
        assert c.load(path) == c.load(f"{path}:v1-13b")


RECIPES = {
    # conversations, epochs, learning rate: llava's own scripts and the paper's appendix.
    "stage1.py:v1-13b": (128, 1, 2e-3),
    "stage1.py:v1.5-7b": (256, 1, 1e-3),
    "stage2.py:v1-13b": (32, 3, 2e-5),
    "stage2.py:v1-lightning-7b": (128, 1, 2e-5),
    "stage2.py:v1.5-13b": (128, 1, 2e-5),
    "scienceqa.py:v1-13b": (32, 12, 2e-5),
    "lora.py:v1.5-7b": (128, 1, 2e-4),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_are_the_papers(name):
    config = c.load(str(CHECKOUT / "configs" / name))
    found = (config.batch.conversations, config.epochs, config.optim.lr)
    assert found == RECIPES[name]
    assert config.optim.warmup_ratio == 0.03
    assert config.optim.weight_decay == 0
    assert (config.optim.b1, config.optim.b2, config.optim.eps) == (0.9, 0.999, 1e-8)


def test_fidelity_to_the_paper_is_one_flag():
    path = str(CHECKOUT / "configs/stage2.py:v1.5-7b")
    ours, theirs = c.load(path), c.load(path, {"fidelity": "paper"})
    assert (ours.batch.pack, ours.batch.loss_groups) == (True, 1)
    assert (theirs.batch.pack, theirs.batch.loss_groups) == (False, 8)
    assert theirs.batch.by_length  # group_by_modality_length of its script


def test_lists_of_numbers_are_numbers(file):
    assert c.load(file, {"compute.fsdp": "4,2"}).compute.fsdp == (4, 2)
    assert c.load(file, {"compute.fsdp": "8"}).compute.fsdp == (8,)
    with pytest.raises(ValueError, match=r"config\.compute\.fsdp"):
        c.load(file, {"compute.fsdp": "four"})


def test_what_decides_is_told_from_what_may_change(file):
    config = c.load(file)
    deciding = c.deciding(config)
    assert {"optim.lr", "seed", "epochs", "batch.loss_groups", "compute.dtype"} <= deciding.keys()
    assert not [path for path in deciding if path.startswith(("data.", "checkpoints.", "log."))]
    assert "compute.fsdp" not in deciding
    assert set(deciding) <= set(c.flat(config))
