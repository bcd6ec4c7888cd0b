"""Seconds that each kernel takes to compile, and to come from the disk cache.

    python benchmarks/compiling.py [--quick]

Each row is a fresh process with an empty cache folder, then another one with what the first left
there. `CPU s` is processor time, so it does not depend on what else the machine does; `functions` is
how many numba compiled on the way. The last lines are what whole models need.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

from hybrimoe.modules.warming import Need, needs_for
from machine import describe, finish

ROWS = {
    **{
        f"experts {fmt}": [Need("experts", fmt, "bfloat16")] for fmt in ("int4", "int8", "bfloat16")
    },
    "experts q4_k": [Need("experts", "q4_k", "bfloat16")],
    "packing int4": [Need("packing", "int4", "bfloat16")],
    "unpacking int4": [Need("unpacking", "int4", "bfloat16")],
    "linear int4": [Need("linear", "int4", "bfloat16")],
    "norm": [Need("norm", "", "bfloat16")],
    "policies": [Need("policies")],
    "model, int4, CPU": needs_for([("int4", "bfloat16")], None, shared=False),
    "model, int4, CPU, linear int4": needs_for([("int4", "bfloat16")], "int4", shared=False),
    "model, int4, accelerator": needs_for([("int4", "bfloat16")], None, shared=True),
}
QUICK = ("experts int4", "policies")
MEASURE = """
import json, sys, time
from numba.core import event
from hybrimoe.modules.warming import Need, run_once

class Count(event.Listener):
    functions = 0
    def on_start(self, event): self.functions += 1
    def on_end(self, event): pass

count = Count()
event.register("numba:compile", count)
start = time.process_time()
for need in json.loads(sys.argv[1]):
    run_once(Need(*need))
print(json.dumps({"cpu_s": time.process_time() - start, "functions": count.functions}))
"""


def measure(needs: list[Need], folder: str) -> dict[str, float]:
    """CPU seconds of one process, and how many functions it compiled."""
    command = [sys.executable, "-c", MEASURE, json.dumps(needs)]
    environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rows")
    options = parser.parse_args()
    print(f"{describe()}\n")
    print(f"{'':32}{'CPU s':>8}{'functions':>11}{'cached s':>10}")
    results = []
    for name, needs in ROWS.items():
        if options.quick and name not in QUICK:
            continue
        with tempfile.TemporaryDirectory() as folder:
            cold, warm = measure(needs, folder), measure(needs, folder)
        row = {"name": name, **cold, "cached_s": warm["cpu_s"]}
        results.append(row)
        print(
            f"{name:32}{row['cpu_s']:8.1f}{row['functions']:11}{row['cached_s']:10.2f}", flush=True
        )
    finish("compiling", results, describe())


if __name__ == "__main__":
    main()
