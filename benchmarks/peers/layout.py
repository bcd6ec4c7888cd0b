"""Where the peers and their model files lie on disk, under one folder the user may choose."""

from __future__ import annotations

import argparse
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import shape

KT_KERNEL = "0.7.2"
LLAMA_CPP_PYTHON = "0.3.36"  # its source package carries llama.cpp under vendor/

HERE = Path(__file__).resolve().parent
DEFAULT_ROOT = Path.home() / ".cache" / "hybrimoe-peers"


@dataclass(frozen=True)
class Layout:
    """The peers' folder: a virtual environment, llama.cpp's source and build, and models."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "venv" / "bin" / "python"

    @property
    def packages_stamp(self) -> Path:
        """Names the packages installed in the virtual environment, written last."""
        return self.root / "venv" / f"kt-kernel-{KT_KERNEL}.installed"

    @property
    def llama_package(self) -> Path:
        return self.root / f"llama_cpp_python-{LLAMA_CPP_PYTHON}"

    @property
    def llama_build(self) -> Path:
        return self.llama_package / "build-bench"

    @property
    def llama_bench(self) -> Path:
        return self.llama_build / "bin" / "llama-bench"

    def missing(self) -> list[Path]:
        return [path for path in (self.packages_stamp, self.llama_bench) if not path.exists()]

    def model(self, layers: int, weights: str, expert_hidden: int = shape.F) -> Path:
        """A GGUF file of that shape, written now if it is not there yet."""
        path = self.root / "models" / f"qwen3moe-{layers}l-f{expert_hidden}-{weights}.gguf"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            command = [self.python, HERE / "write_gguf.py", layers, partial, weights]
            command += ["--expert-hidden", expert_hidden]
            subprocess.run([str(word) for word in command], check=True)
            partial.rename(path)
        return path


def add_root_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers", type=Path, default=DEFAULT_ROOT, help="the peers' folder (%(default)s)"
    )
