"""Documents that cannot drift: the README's examples run, its tree is the real one."""

import re

import pytest

from tests.conftest import CHECKOUT

README = (CHECKOUT / "README.md").read_text()


def test_the_readmes_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:  # one after another, as a reader would paste them
        exec(compile(block, "README.md", "exec"), names)


def test_the_readmes_tree_is_the_real_one():
    tree = README.split("## The house\n```\n")[1].split("```")[0]
    told = set(re.findall(r"(?<![\w/])(\w+\.py|\w+/)", tree))
    real = {
        path.name + ("/" if path.is_dir() else "")
        for folder in ("llava_jax", "llava_jax/models")
        for path in (CHECKOUT / folder).iterdir()
        if not path.name.startswith("_")
    }
    top = {"llava_jax/", "tests/", "docs/"}
    assert told - {"layers.py"} == real - {"layers.py"} | top, "the README's tree has drifted"


@pytest.mark.parametrize(
    "document", ["README.md", *(f"docs/{p.name}" for p in (CHECKOUT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(document):
    path = CHECKOUT / document
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), f"{document} links to {target}"


def test_the_readmes_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets
