"""Who may import whom: the rules, and the checker that test_layers.py runs over every file."""

import ast
import sys
from collections.abc import Iterator

# A room imports rooms of its own layer and below. New in llava_jax/? Give it a layer here.
LAYERS = {
    1: "config config_tree conversation image batch llm_client picture_world files cli pages "
    "allocator",
    2: "tokenizer data datagen",
    3: "models",
    4: "weights model_folder sharding optim processes metrics flops",
    5: "step program claiming checkpoint engine planner",
    6: "evals",
    7: "api starting held_out telling demonstration server",
    8: "__init__",
}
LAYER = {room: layer for layer, rooms in LAYERS.items() for room in rooms.split()}

# Rooms that may import less than their layer would let them.
ONLY_ROOMS = {
    "models": {"models", "batch"},
    "evals": {"evals", *LAYERS[1].split()},
    "server": {"server", "engine", *LAYERS[1].split()},
}
NEVER_ROOMS = {
    room: {"data", "datagen"}
    for room in [*LAYERS[4].split(), "step", "program", "claiming", "checkpoint", "engine"]
}

# Layer 1 lists what it may import from outside; the others what they may not.
LAYER_1_OUTSIDE = {"numpy", "PIL"}
LAYER_1_EXTRA = {
    "config": "ml_collections",
    "config_tree": "ml_collections",
    "llm_client": "openai",
    "files": "etils",
}
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax"}
NEVER_OUTSIDE = {
    "tokenizer": DEVICE_LIBRARIES,
    "data": DEVICE_LIBRARIES,
    "datagen": DEVICE_LIBRARIES,
    # Models know neither files nor tokenizers nor configs.
    "models": set(
        "ml_collections etils pathlib os io shutil orbax optax grain tensorflow_datasets "
        "sentencepiece tokenizers transformers torch safetensors".split()
    ),
}

# Two names of one class; and what a model would need to know of meshes.
PARTITION_SPEC = {"jax.sharding.PartitionSpec", "jax.P"}
MESHES = {"jax.sharding", "jax.make_mesh", "jax.set_mesh", "jax.NamedSharding", "jax.shard_map"}


def problems(path: str, source: str) -> list[str]:
    """What the file at `path` (relative to the checkout) imports against the rules."""
    folder, *inside = path.removesuffix(".py").split("/")
    tree = ast.parse(source)
    imported = sorted(set(_imports(tree, path)))
    found = list(_into_the_scripts(folder, inside, imported))
    if folder == "configs":
        found += [
            f"imports {name}; a config imports only llava_jax.config"
            for name in imported
            if not (_is_standard(name) or _within(name, {"llava_jax.config", "configs"}))
        ]
    elif folder == "llava_jax":
        found += _of_a_room(inside, imported, {*imported, *_dotted_names(tree)})
    return [f"{path}: {problem}" for problem in found]


def _into_the_scripts(folder: str, inside: list[str], imported: list[str]) -> Iterator[str]:
    for name in imported:
        if _within(name, {"configs", "launch", "tests"}) and (folder, *inside) != (
            "launch",
            "demo",
        ):
            yield f"imports {name}; nobody imports configs, tests or a verb of launch (but demo)"


def _of_a_room(inside: list[str], imported: list[str], names: set[str]) -> Iterator[str]:
    room = inside[0]
    if room not in LAYER:
        yield f"is in no layer; give it a layer in {__name__}"
        return
    # Pre-training the small towers is a training run, kept next to the world they see.
    pretraining = inside[:2] == ["picture_world", "towers"]
    layer = 5 if pretraining else LAYER[room]

    for name in imported:
        top, *rest = name.split(".")
        if top == "llava_jax":
            other = rest[0] if rest and rest[0] in LAYER else "__init__"
            if name == "llava_jax.__version__" or other == room:
                continue
            if other in NEVER_ROOMS.get(room, ()):
                yield f"imports {name}; {room} never knows {other}"
            elif LAYER[other] > layer:
                yield f"imports {name}; {other} is of a higher layer"
            elif room in ONLY_ROOMS and other not in ONLY_ROOMS[room]:
                yield f"imports {name}; {room} may import {', '.join(sorted(ONLY_ROOMS[room]))}"
        elif layer == 1 and not (
            _is_standard(name) or top in LAYER_1_OUTSIDE or top == LAYER_1_EXTRA.get(room)
        ):
            yield f"imports {name}; layer 1 is the standard library, NumPy and Pillow"
        elif top in NEVER_OUTSIDE.get(room, ()):
            yield f"imports {name}; {room} never knows {top}"

    if room == "models":
        if meshes := sorted(name for name in names if _within(name, MESHES)):
            yield f"uses {meshes[0]}; models know names of dims, not meshes"
    elif room != "sharding" and names & PARTITION_SPEC:
        yield "uses PartitionSpec; all of them are in sharding.py"


def _imports(tree: ast.AST, path: str) -> Iterator[str]:
    """Absolute names of all imports, wherever they stand: `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.split("/")[: -node.level] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _dotted_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def _within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names
