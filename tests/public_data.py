"""Public data that isn't shipped: where it lies when it is here, and what a test that is skipped would have shown."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def folder(name: str) -> Path:
    """Of a set: what `make data-NAME` wrote, or a folder beside the clone that holds the same files."""
    places = (ROOT / "data" / name, ROOT.parent / "shared" / "data" / name)
    return next((p for p in places if p.is_dir()), places[0])


def needs(name: str, shows: str) -> pytest.MarkDecorator:
    """Skips a test where the set isn't here, and says what the test would have shown: a clause after "that"."""
    said = f"data/{name} isn't here (make data-{name}); it would have shown that {shows}"
    return pytest.mark.skipif(not folder(name).is_dir(), reason=said)
