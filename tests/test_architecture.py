"""Holds who imports what, and how long files are, over the syntax trees of the packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("atod_gym", "env_servers", "atod_train")
MAX_LINES = {"package": 600, "tests": 600}

# The one place of each optional package that the environments may use.
OPTIONAL_IN_GYM = {
    "alfworld": "atod_gym.envs.alfworld.official",
    "textworld": "atod_gym.envs.alfworld.official",
    "fast_downward": "atod_gym.envs.alfworld.official",
}
# Rooms of the trainer, lowest first: a module imports from its own room and from those before it.
TRAINER_ROOMS = (
    "records config batch distributed progress memory files",
    "algorithm",
    "models",
    "teachers",
    "rollout",
    "reports",
    "evaluation",
    "training",
    "presets",
    "studies",
    "doctor cli",
    "adapters examples",
)

GYM_LIBRARIES = {"numpy", "gymnasium", "requests", "urllib3", "pooch", "tqdm", "filelock", "tomli"}


def sources(package: str) -> dict[str, Path]:
    """Module name -> file of every module of a package."""
    found = {}
    for path in sorted((REPOSITORY / package).rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, at_import_only: bool) -> Iterator[str]:
    """The modules that a file imports; `from a import b` gives `a.b`."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children = node.orelse if at_import_only else [*node.body, *node.orelse]
            for child in children:
                yield from visit(child)
        elif not (at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def third_party(path: Path, *, at_import_only: bool = False) -> set[str]:
    """Top-level names outside the standard library that a file imports."""
    names = {name.partition(".")[0] for name in imports(path, at_import_only=at_import_only)}
    return {name for name in names if name not in sys.stdlib_module_names}


def test_environments_import_little_and_never_torch() -> None:
    for module, path in sources("atod_gym").items():
        for name in third_party(path) - GYM_LIBRARIES - {"atod_gym"}:
            # Adapters are for outside libraries, each imported where it is used.
            if module.startswith("atod_gym.adapters.examples."):
                assert name not in {"torch", "atod_train", "env_servers"}, (module, name)
            elif module.startswith("atod_gym.adapters."):
                assert name not in third_party(path, at_import_only=True), (module, name)
                assert name not in {"atod_train", "env_servers"}, (module, name)
            else:
                assert module == OPTIONAL_IN_GYM.get(name), (module, name)
                assert name not in third_party(path, at_import_only=True), (module, name)


def test_servers_import_no_environments_and_torch_only_to_encode() -> None:
    for module, path in sources("env_servers").items():
        imported = third_party(path)
        assert not imported & {"gymnasium", "atod_gym", "atod_train"}, module
        if module == "env_servers.retrieval.encoder":
            imported = third_party(path, at_import_only=True)
        assert not imported & {"torch", "transformers"}, module


def test_the_trainer_does_not_import_servers() -> None:
    for module, path in sources("atod_train").items():
        # A teacher's server answers errors, and lives and ends, as all servers do.
        allowed = (
            {
                "env_servers.endpoints",
                "env_servers.options",
                "env_servers.process",
                "env_servers.service",
            }
            if module == "atod_train.teachers.server"
            else set()
        )
        for name in imports(path, at_import_only=False):
            if name.startswith("env_servers"):
                assert name in allowed or name.rpartition(".")[0] in allowed, (module, name)


@pytest.mark.slow
def test_the_trainer_names_no_environment() -> None:
    names = re.compile("alfworld|webshop|search.?qa", re.IGNORECASE)
    for module, path in sources("atod_train").items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        docstrings = {
            node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        found = {text for text in texts - docstrings if names.search(text)}
        identifiers = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        identifiers |= set(imports(path, at_import_only=False))
        found |= {name for name in identifiers if names.search(name)}
        # Presets and examples are data, and one environment is the default: nothing depends on it.
        if module != "atod_train.presets" and ".examples." not in module:
            assert found <= {"atod/ALFWorld-v0"}, (module, found)


def test_no_module_needs_one_operating_system() -> None:
    for package in PACKAGES:
        for module, path in sources(package).items():
            names = {name.partition(".")[0] for name in imports(path, at_import_only=False)}
            assert not names & {"fcntl", "resource", "pwd", "grp", "termios", "msvcrt"}, module


def test_the_algorithm_imports_no_other_room() -> None:
    path = sources("atod_train").get("atod_train.algorithm.atod")
    if path is None:
        pytest.skip("no algorithm yet")
    assert third_party(path) == {"torch"}


def test_rooms_of_the_trainer_import_downwards() -> None:
    modules = sources("atod_train")
    ranks = {name: rank for rank, names in enumerate(TRAINER_ROOMS) for name in names.split()}
    for module, path in modules.items():
        if module == "atod_train":
            continue
        for name in imports(path, at_import_only=False):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != "atod_train":
                room, other = module.split(".")[1], target.split(".")[1]
                assert ranks[other] <= ranks[room], f"{module} imports {target}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_cycles(package: str) -> None:
    modules = sources(package)
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for name in imports(path, at_import_only=True):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                graph[module].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_importing_the_environments_imports_nothing_heavy() -> None:
    code = (
        "import sys, atod_gym\n"
        "heavy = {'torch', 'transformers', 'textworld', 'alfworld', 'fast_downward', 'requests',"
        " 'urllib3', 'matplotlib', 'atod_gym.envs.alfworld.env', 'atod_gym.envs.webshop.env'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_files_stay_short(folder: str) -> None:
    lengths = {
        str(path.relative_to(REPOSITORY)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    most = MAX_LINES["tests" if folder == "tests" else "package"]
    assert {name: length for name, length in lengths.items() if length > most} == {}
