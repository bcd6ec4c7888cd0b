"""Imports point down, the public names are complete, and nothing dangerous is called."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hybrimoe

SOURCE = Path(hybrimoe.__file__).parent
MODULES = {
    ".".join(("hybrimoe", *path.relative_to(SOURCE).with_suffix("").parts)): path
    for path in sorted(SOURCE.rglob("*.py"))
}
FLOORS = ("kernels", "policy", "runtime")
ALLOWED = {
    "kernels": {"kernels", "errors", "caching", "linking"},
    "policy": {"policy", "errors", "caching", "linking"},
    "runtime": {"runtime", "policy", "kernels", "errors", "config", "compiling"},
}
TORCHLESS = ("torch", "transformers", "accelerate", "safetensors")
KNOW_TRANSFORMERS = {"hybrimoe.runtime.adapters"} | {
    f"hybrimoe.runtime.loading.{name}"
    for name in ("quantizer", "skeleton", "converting", "opening", "gguf_file", "stored_numbers")
}
GPU_KERNELS = tuple(
    f"hybrimoe.kernels.{name}"
    for name in ("torch_pairs", "torch_experts", "torch_k", "triton_experts")
)
"""They take tensors, because memory of a GPU has no other face."""
PROGRAMS = {f"hybrimoe.{name}" for name in ("cli", "commands", "model_commands", "named_models")}
"""They load a model and a tokenizer as any user would."""


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


def floor(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "faces"


def inside(name: str, packages: set[str] | tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    if floor(module) == "faces":
        return
    allowed = {f"hybrimoe.{name}" for name in ALLOWED[floor(module)]}
    ours = {name for name in imports(MODULES[module]) if inside(name, ("hybrimoe",))}

    assert {name for name in ours if name != "hybrimoe" and not inside(name, allowed)} == set()


@pytest.mark.parametrize("module", [name for name in MODULES if floor(name) in FLOORS[:2]])
def test_cpu_kernels_and_policies_know_no_torch(module):
    if module in GPU_KERNELS:
        return
    names = imports(MODULES[module])

    assert {name for name in names if inside(name, (*TORCHLESS, *GPU_KERNELS))} == set()


@pytest.mark.parametrize("module", ["hybrimoe.caching", "hybrimoe.errors", "hybrimoe.config"])
def test_errors_and_settings_know_nothing_of_models(module):
    names = imports(MODULES[module])

    assert {n for n in names if inside(n, TORCHLESS)} == set()
    assert {n for n in names if inside(n, ("hybrimoe.runtime", "hybrimoe.kernels"))} == set()


def test_only_adapters_loading_and_the_programs_know_transformers():
    know = {m for m, p in MODULES.items() if any(inside(n, ("transformers",)) for n in imports(p))}

    assert know - PROGRAMS <= KNOW_TRANSFORMERS


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
