"""`python tests/support_table.py`: measure all families and rewrite the table in docs/models.md.

The table goes between the two `<!-- families -->` lines; without them it is printed.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import families
from parity import CLOSE, TOKENS, Parity, measure

MODELS = Path(__file__).parents[1] / "docs" / "models.md"
MARKER = "<!-- families -->"
HEAD = (
    "| family (experts class) | float32 | greedy tokens | bfloat16 NMSE | |\n|---|--:|--:|--:|---|"
)


def row(result: Parity) -> str:
    """One family as a line of Markdown."""
    folder, experts = result.name.split(".")
    halves = result.bfloat16
    good = (
        max(result.float32, result.padded, result.single) <= 1
        and result.greedy in (None, TOKENS)
        and halves.routed <= CLOSE
        and halves.before_move <= CLOSE
        and (halves.free <= CLOSE or halves.moved)
        and result.restored
    )
    greedy = "no head" if result.greedy is None else f"{result.greedy}/{TOKENS}"
    worst = 1e-4 * max(result.float32, result.padded, result.single)
    note = f" ({halves.free:.0e} with its own ties)" if halves.free > CLOSE else ""
    verdict = "yes" if good else "**no**"
    return (
        f"| {folder} ({experts}) | {worst:.0e} | {greedy} | {halves.routed:.0e}{note} | {verdict} |"
    )


def table() -> str:
    """Markdown for every decorated family of the installed transformers."""
    torch.set_num_threads(1)
    names = families.decorated()
    rows = [
        f"| {name} | | | | skipped: {families.SKIPPED[name]} |"
        if name in families.SKIPPED
        else row(measure(name))
        for name in names
    ]
    return "\n".join(
        [
            f"transformers {transformers.__version__}: {len(names)} families, each a tiny random "
            "model, wrapped against unwrapped. float32: largest error of a logit, relative to 1 + "
            "its size, over a batch, a left-padded batch and one token. bfloat16: NMSE while both "
            "models take the same experts; where a router's tie fell the other way by rounding, "
            "the NMSE with that is in brackets.",
            "",
            HEAD,
            *rows,
        ]
    )


def main() -> int:
    """Write the table; fail if a family does."""
    text = table()
    parts = MODELS.read_text().split(MARKER) if MODELS.exists() else []
    if len(parts) == 3:
        MODELS.write_text(f"{parts[0]}{MARKER}\n{text}\n{MARKER}{parts[2]}")
    else:
        print(text)
    return 1 if "**no**" in text else 0


if __name__ == "__main__":
    sys.exit(main())
