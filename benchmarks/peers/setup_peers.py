"""Install kt-kernel and build llama.cpp's llama-bench under one folder.

Run: python benchmarks/peers/setup_peers.py [--peers DIR] [--jobs N]

Needs a C++ compiler and a Python that has torch (the one hybrimoe is installed in). A finished
step is skipped, so a second call does nothing and an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

from layout import KT_KERNEL, LLAMA_CPP_PYTHON, Layout, add_root_option

# What kt-kernel imports without a GPU; its own list pins another torch and Triton.
PACKAGES = ["typer", "rich", "pyyaml", "safetensors", "packaging", "gguf", "cmake", "ninja"]

# Only what llama-bench needs, for this CPU.
LLAMA_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_root_option(parser)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiler processes")
    arguments = parser.parse_args()
    layout = Layout(arguments.peers.expanduser().resolve())

    if not layout.packages_stamp.exists():
        install_packages(layout)
    if not layout.llama_package.exists():
        unpack_llama_cpp(layout)
    if not layout.llama_bench.exists():
        build_llama_bench(layout, arguments.jobs)
    print(f"The peers are ready in {layout.root}")


def install_packages(layout: Layout) -> None:
    """A virtual environment with kt-kernel, which borrows this interpreter's torch."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise SystemExit("This Python has no torch: run me with the one hybrimoe is installed in.")
    venv.create(layout.python.parents[1], with_pip=True)
    borrowed = Path(torch.origin).parents[1]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = layout.python.parents[1] / "lib" / version / "site-packages"
    # A .pth line comes after the environment's own packages, so these win over borrowed ones.
    (packages / "borrowed.pth").write_text(f"{borrowed}\n")
    pip(layout, "install", *PACKAGES)
    pip(layout, "install", "--no-deps", f"kt-kernel=={KT_KERNEL}")
    layout.packages_stamp.touch()


def unpack_llama_cpp(layout: Layout) -> None:
    """The source package, unpacked beside its place first so that half a tree is never kept."""
    with tempfile.TemporaryDirectory(dir=layout.root) as folder:
        package = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
        source_only = ("--no-deps", "--no-binary", "llama-cpp-python")
        pip(layout, "download", *source_only, "--dest", folder, package)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        (Path(folder) / layout.llama_package.name).rename(layout.llama_package)


def build_llama_bench(layout: Layout, jobs: int) -> None:
    tools = layout.python.parent
    options = [f"-D{name}={value}" for name, value in LLAMA_OPTIONS.items()]
    options.append(f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}")
    source = layout.llama_package / "vendor" / "llama.cpp"
    run(tools / "cmake", "-S", source, "-B", layout.llama_build, "-G", "Ninja", *options)
    # Lowest priority: the build takes many minutes, and the machine stays usable meanwhile.
    build = (tools / "cmake", "--build", layout.llama_build, "--target", "llama-bench")
    run("nice", "-n", "19", *build, "--parallel", jobs)


def pip(layout: Layout, *words: str) -> None:
    run(layout.python, "-m", "pip", "--disable-pip-version-check", *words)


def run(*words: object) -> None:
    command = [str(word) for word in words]
    print("+", *command, flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
