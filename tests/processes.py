"""Fresh processes: a test runs code in one, and the code measures the memory of its own process.

`run(CODE)` is the last line that CODE prints, as JSON. CODE starts with the names of `COMMON`; what
it measures it imports from here.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMON = """
import gc, json, os, signal, sys, threading, time, warnings, weakref
from pathlib import Path
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
import torch, transformers, hybrimoe
from processes import Peak, anonymous
warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
"""
SAMPLER = """
import os, select, sys, time
status = os.open(f"/proc/{sys.argv[1]}/status", os.O_RDONLY)
def anonymous():
    text = os.pread(status, 4096, 0)
    return int(text[text.index(b"RssAnon:") + 8:].split(None, 1)[0]) * 1024
peak = samples = 0
while True:
    peak, samples = max(peak, anonymous()), samples + 1
    if select.select([0], [], [], 0.0005)[0]:
        if not os.read(0, 1):
            break
        os.write(1, b"%d %d\\n" % (max(peak, anonymous()), samples))
"""
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc"
)


def command(code: str, *arguments: object) -> list[str]:
    """What starts a process with `code`."""
    return [sys.executable, "-c", COMMON + code, *map(str, arguments)]


def environment() -> dict[str, str]:
    """Where a process finds this module."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def start(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A process and how it ended."""
    return subprocess.run(
        command(code, *arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def run(code: str, *arguments: object) -> Any:
    """The last line that a process prints, as JSON; it must end well."""
    done = start(code, *arguments)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def anonymous() -> int:
    """Bytes of memory of this process that are no map of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell RssAnon")


class Peak:
    """The most anonymous memory that was taken since, in bytes.

    Another process watches, because a thread would wait for the interpreter's lock when it matters.
    Free memory that malloc keeps is given back first: else what is measured would use that up before
    it took any.
    """

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.before = anonymous()
        self.sampler = subprocess.Popen(
            [sys.executable, "-S", "-c", SAMPLER, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.bytes()  # it has started
        return self

    def bytes(self) -> int:
        """Until now."""
        os.write(self.sampler.stdin.fileno(), b"?")
        peak, self.samples = map(int, self.sampler.stdout.readline().split())
        return peak - self.before

    def __exit__(self, *_: object) -> None:
        self.last = self.bytes()
        self.sampler.communicate()
