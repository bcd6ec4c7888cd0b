"""The order of the house: who may import whom, and what nobody may call."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hybrimoe

SOURCE = Path(hybrimoe.__file__).parent
ORDER = (
    *("errors", "version", "choices", "files", "sizes", "limits", "attempts", "attachments", "hub"),
    *("simd", "formats", "policy", "kernels", "config", "models", "runtime", "modules"),
    *("calibration", "sources", "simulation", "memory", "report", "session", "pretrained", "api"),
    *("__init__", "cli", "__main__"),
)
"""Ground first. A file may import only from rooms before its own, and from its own."""
MODULES = {
    ".".join(("hybrimoe", *path.relative_to(SOURCE).with_suffix("").parts)): path
    for path in sorted(SOURCE.rglob("*.py"))
}
TORCHLESS = ("torch", "transformers", "accelerate", "safetensors")
KNOW_TRANSFORMERS = ("hybrimoe.models", "hybrimoe.sources", "hybrimoe.cli")
"""Rooms that may import it: the others take what these have found."""
TENSORS = ("hybrimoe.kernels.gpu", "hybrimoe.formats.decode")
"""They take tensors, because memory of a GPU has no other face."""


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(module: str) -> set[str]:
    """The files of this package that a file imports from."""
    names = imports(MODULES[module])
    found = {name for name in names if name in MODULES}
    if "hybrimoe" in names and not found:
        found.add("hybrimoe.__init__")
    return found - {module}


def room(module: str) -> str:
    return module.split(".")[1]


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_rooms_before(module):
    own = ORDER.index(room(module))
    upward = {name for name in files_of(module) if ORDER.index(room(name)) > own}

    assert upward == set()


def test_no_files_import_each_other_in_a_circle():
    graph = {module: files_of(module) for module in MODULES}
    while graph:  # what imports nothing that is left is in no circle
        ends = {module for module, others in graph.items() if not others}
        assert ends, f"in circles, or importing from one: {sorted(graph)}"
        graph = {module: others - ends for module, others in graph.items() if module not in ends}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__init__")])
def test_nobody_hides_an_import(module):
    called = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Call)
    }

    assert called.isdisjoint({"importlib.import_module", "import_module", "__import__"})


@pytest.mark.parametrize(
    "module", [name for name in MODULES if room(name) in ("simd", "formats", "policy", "kernels")]
)
def test_cpu_kernels_and_policies_know_no_torch(module):
    if inside(module, TENSORS):
        return
    names = imports(MODULES[module])

    assert {name for name in names if inside(name, (*TORCHLESS, *TENSORS))} == set()


@pytest.mark.parametrize("module", [f"hybrimoe.{name}" for name in ORDER[:9]] + ["hybrimoe.config"])
def test_the_ground_knows_nothing_of_models(module):
    names = imports(MODULES[module])

    assert {n for n in names if inside(n, TORCHLESS)} == set()


def test_only_models_sources_and_commands_know_transformers():
    know = {m for m, p in MODULES.items() if any(inside(n, ("transformers",)) for n in imports(p))}

    assert {module for module in know if not inside(module, KNOW_TRANSFORMERS)} == set()


def test_importing_a_policy_loads_no_torch():
    code = "import sys, hybrimoe.policy.cache; print('torch' in sys.modules)"
    # The package's own __init__ offers wrap and so needs torch; a bare parent stands in for it.
    stub = (
        "import sys, types; package = types.ModuleType('hybrimoe');"
        f"package.__path__ = [{str(SOURCE)!r}]; sys.modules['hybrimoe'] = package; "
    )

    assert run(stub + code) == "False\n"


def test_importing_prints_nothing():
    assert run("import hybrimoe") == ""


def run(code: str) -> str:
    """Standard output and error of a fresh interpreter, together."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def test_all_lists_what_the_package_offers():
    public = {name for names in hybrimoe._HOMES.values() for name in names}

    assert public == set(hybrimoe.__all__)
    assert hybrimoe.__all__ == sorted(hybrimoe.__all__)


@pytest.mark.parametrize("name", hybrimoe.__all__)
def test_every_public_name_is_documented(name):
    thing = getattr(hybrimoe, name)

    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{name}(")  # what dataclass writes by itself
    if isinstance(thing, type):
        for member, value in vars(thing).items():
            if callable(value) and not member.startswith("_"):
                assert value.__doc__, f"{name}.{member} has no docstring"


def test_all_is_declared_in_the_package_only():
    assert [m for m, p in MODULES.items() if "__all__" in p.read_text()] == ["hybrimoe.__init__"]


FORBIDDEN = {"eval", "exec", "torch.load", "yaml.load", "os.system", "os.popen"}
PICKLES = ("pickle.", "marshal.", "shelve.")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles_evaluates_or_starts_a_shell(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert f"{node.module}." not in PICKLES
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            where = f"{called} in {module}, line {node.lineno}"
            assert called not in FORBIDDEN, where
            assert not called.startswith(PICKLES), where
            assert "shell" not in {keyword.arg for keyword in node.keywords}, where
