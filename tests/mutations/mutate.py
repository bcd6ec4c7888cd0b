"""Break one rule at a time in a copy of the source and see that a test turns red.

    python tests/mutations/mutate.py [NAME ...]

Prints one line per mutation; exits with 1 if one survives. Takes a few minutes; the suite itself only
checks that every mutation still fits the source (test_mutations.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

USAGE = (2, 3, 4, 5)
"""Exit codes of pytest that say nothing about the source."""
ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    """One edit of a file under src/hybrimoe, and the tests that must notice."""

    name: str
    file: str
    before: str
    after: str
    tests: str


MUTATIONS = (
    Mutation(
        "drop the slot's reference count",
        "policy/slots.py",
        "            references[s] += 1\n            held[count] = s",
        "            held[count] = s",
        "tests/policy/test_cache.py tests/policy/test_engine.py",
    ),
    Mutation(
        "evict slots that are in use",
        "policy/slots.py",
        "        if references[s] > 0 or arrival[s] > now:",
        "        if arrival[s] > now:",
        "tests/policy/test_cache.py tests/policy/test_engine.py",
    ),
    Mutation(
        "drop the wait for a copy's arrival",
        "runtime/executor.py",
        "                after += waiting  #",
        "                after += []  #",
        "tests/test_state_machine.py tests/test_hybrid.py",
    ),
    Mutation(
        "drop the wait for a slot's last use",
        "runtime/executor.py",
        "after = [self.last_use[move.slot]] if self.last_use[move.slot] is not None else []",
        "after = []",
        "tests/test_state_machine.py tests/test_hybrid.py",
    ),
    Mutation(
        "drop the generation stamp of pending copies",
        "policy/engine.py",
        "            if self.cache.generation[slot] != generation:",
        "            if False:",
        "tests/test_state_machine.py tests/policy/test_engine.py",
    ),
    Mutation(
        "drop the generation stamp of ordered copies",
        "runtime/executor.py",
        "if not passing and self.cache.generation[move.slot] != move.generation:",
        "if False:",
        "tests/test_hybrid.py",
    ),
    Mutation(
        "compute a slot without asking what it holds",
        "runtime/executor.py",
        "            if held.expert != expert or held.layer != index:",
        "            if False:",
        "tests/test_hybrid.py",
    ),
    Mutation(
        "forget the references of a layer that failed",
        "policy/engine.py",
        "        finally:\n            cache.release(held)",
        "        except ZeroDivisionError:\n            pass",
        "tests/test_faults.py tests/test_state_machine.py",
    ),
    Mutation(
        "drop the launch lock",
        "kernels/cpu/run_layer.py",
        "    with launch.lock:",
        "    if True:",
        "tests/test_concurrency.py",
    ),
    Mutation(
        "drop the engine's lock",
        "runtime/coordinator.py",
        "        self.lock = threading.Lock()",
        "        self.lock = contextlib.nullcontext()",
        "tests/test_hybrid.py",
    ),
    Mutation(
        "drop the at-fork handler",
        "simd/threads.py",
        "        self.forked = True\n",
        "        self.forked = False\n",
        "tests/test_concurrency.py",
    ),
    Mutation(
        "swap gate and up",
        "kernels/cpu/experts.py",
        "apply_gate(gate, layout.matrices == 2, gate_row, up_row)",
        "apply_gate(gate, layout.matrices == 2, up_row, gate_row)",
        "tests/test_wrap.py",
    ),
    Mutation(
        "read the wrong expert",
        "kernels/cpu/experts.py",
        "place[e] * layout.expert_bytes + s * layout.shard_bytes\n            gate_up_tile",
        "s * layout.shard_bytes\n            gate_up_tile",
        "tests/test_wrap.py",
    ),
    Mutation(
        "ignore the down bias",
        "kernels/cpu/experts.py",
        "        bias = load_f32(blob, at + bias_at)",
        "        bias = no_floats()",
        "tests/kernels/test_moe.py",
    ),
    Mutation(
        "write a file in place",
        "files.py",
        "        os.replace(part, path)",
        "        path.write_bytes(part.read_bytes()[:-1])",
        "tests/policy/test_cost.py",
    ),
)


def mutated(mutation: Mutation, folder: Path) -> Path:
    """A copy of src with one edit, always at the same place, so that compiled code is found again."""
    source = folder / "src"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    file = source / "hybrimoe" / mutation.file
    text = file.read_text()
    if text.count(mutation.before) != 1:
        raise SystemExit(f"{mutation.name}: the text to break occurs not once in {mutation.file}")
    file.write_text(text.replace(mutation.before, mutation.after))
    return source


def survives(mutation: Mutation, folder: Path) -> bool:
    """Whether its tests are still green."""
    source = mutated(mutation, folder)
    environment = os.environ | {"PYTHONPATH": str(source), "NUMBA_CACHE_DIR": f"{folder}/numba"}
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", *mutation.tests.split()]
    command += ["--hypothesis-profile", "first-failure"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode in USAGE:  # a crash by a signal counts as noticed
        raise SystemExit(f"{mutation.name}: pytest could not run\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main() -> None:
    wanted, alive = sys.argv[1:], 0
    with tempfile.TemporaryDirectory() as folder:
        for mutation in MUTATIONS:
            if wanted and mutation.name not in wanted:
                continue
            started = time.perf_counter()
            lives = survives(mutation, Path(folder))
            alive += lives
            seconds = time.perf_counter() - started
            verdict = "SURVIVES" if lives else "found"
            print(f"{verdict:9} {mutation.name} ({seconds:.0f} s)", flush=True)
    sys.exit(alive > 0)


if __name__ == "__main__":
    main()
