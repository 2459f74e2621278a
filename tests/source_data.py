"""What a listing holds, in the order of keys, for the tests of sources."""

import io
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.sources.item import Failure, Item, Listing


def contents(listing: Listing) -> tuple[dict[str, Item], dict[str, str]]:
    """Samples by key, and reasons by source of what could not be matched."""
    items: dict[str, Item] = {}
    failures: dict[str, str] = {}
    for entry in listing.entries:
        if isinstance(entry, Failure):
            assert entry.source not in failures
            failures[entry.source] = entry.reason
        else:
            assert entry.key not in items
            items[entry.key] = entry
    return dict(sorted(items.items())), failures


def pixels(data: Any) -> Any:
    """Values of an image file, or of an array as it is."""
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data))) if isinstance(data, bytes) else data
