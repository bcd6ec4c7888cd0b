"""Sections of a long benchmark: each has its time, fails alone, and leaves its results on disk."""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybrimoe.files import write_atomically


class Section:
    """What one section has found so far, and how much time it has left."""

    def __init__(self, run: "Sections", name: str, seconds: float) -> None:
        self.run, self.name = run, name
        self.deadline = time.monotonic() + seconds
        self.content: dict[str, Any] = {"rows": [], "checks": [], "skipped": []}

    def left(self) -> float:
        """Seconds until the section should end."""
        return self.deadline - time.monotonic()

    def out_of_time(self, what: str) -> bool:
        """Whether there is no time for one thing more, which is then noted as skipped."""
        if self.left() > 0:
            return False
        self.content["skipped"].append(what)
        return True

    def row(self, **values: Any) -> None:
        """One line of the section's table; on disk before the next thing is tried."""
        rows = self.content["rows"]
        if not rows or rows[-1].keys() != values.keys():
            print("  " + "  ".join(f"{name:>{_width(name)}}" for name in values), flush=True)
        rows.append(values)
        self.run.save()
        print(
            "  " + "  ".join(f"{_text(v):>{_width(name)}}" for name, v in values.items()),
            flush=True,
        )

    def check(self, name: str, passed: bool, **values: Any) -> None:
        """One thing that must be true."""
        self.content["checks"].append({"check": name, "passed": bool(passed), **values})
        self.run.save()
        if not passed:
            print(f"  FAILED {name}: {values}", flush=True)

    def attempt(self, what: str, action: Callable[..., Any], *arguments: Any) -> None:
        """Call a part; if it fails, the section goes on, and the traceback is kept."""
        if self.out_of_time(what):
            return
        try:
            action(*arguments)
        except Exception:  # whatever a driver may raise: the parts behind it still count
            self.content.setdefault("errors", []).append(
                {"part": what, "traceback": traceback.format_exc()}
            )
            self.run.save()
            print(f"  ERROR in {what}:\n{traceback.format_exc()}", flush=True)


class Sections:
    """All sections of one run and the file they are written to."""

    def __init__(self, path: Path, machine: dict[str, Any], minutes: float) -> None:
        self.path, self.started = path, time.monotonic()
        self.seconds = minutes * 60
        self.results: dict[str, Any] = {"machine": machine, "minutes": minutes, "sections": {}}
        self.save()

    def run(self, name: str, share: float, body: Callable[[Section], None]) -> None:
        """Run one section for at most its share of the whole time, and of what is left of it."""
        left = self.seconds - (time.monotonic() - self.started)
        print(f"\n{name} ({max(left, 0):.0f} s left)", flush=True)
        section = Section(self, name, min(share * self.seconds, left))
        self.results["sections"][name] = section.content
        start = time.monotonic()
        section.attempt(name, body, section)
        checks = section.content["checks"]
        section.content["seconds"] = time.monotonic() - start
        if checks:
            print(
                f"  {sum(c['passed'] for c in checks)} of {len(checks)} checks passed", flush=True
            )
        if section.content["skipped"]:
            print(f"  no time for {', '.join(section.content['skipped'])}", flush=True)
        self.save()

    @property
    def failed(self) -> list[str]:
        """Sections with a failed check or an error."""
        return [
            name
            for name, content in self.results["sections"].items()
            if content.get("errors") or not all(check["passed"] for check in content["checks"])
        ]

    def save(self) -> None:
        """Write all there is; a reader sees the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.results, indent=1).encode())


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _width(name: str) -> int:
    """Columns wide enough for their name, for a number, and for the names in the first few."""
    return max(len(name), 27 if name == "runner" else 14 if name == "preset" else 8)
