"""Where the tests find what is bundled."""

from pathlib import Path

TINY_MOE = Path(__file__).parent / "assets" / "tiny-moe"
