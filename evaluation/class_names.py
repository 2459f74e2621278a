"""Classes of one data set by the names of another: PASCAL's aeroplane is COCO's airplane."""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from data_pipeline.sample import IGNORED
from evaluation.pixel_scores import ClassMap

BACKGROUND = "background"
_SYNONYMS = {
    "aeroplane": "airplane",
    "plane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tvmonitor": "tv",
    "television": "tv",
    "bike": "bicycle",
    "pottedplants": "pottedplant",
}


def canonical(name: str) -> str:
    """One spelling of a name: small letters without spaces, `_` or `-`; one of all synonyms."""
    plain = "".join(name.lower().replace("_", " ").replace("-", " ").split())
    return _SYNONYMS.get(plain, plain)


def shared_classes(known: tuple[str, ...], wanted: tuple[str, ...]) -> dict[str, str]:
    """Names of `wanted` to those of `known` that mean the same; background is no class here."""
    by_name = {canonical(name): name for name in known}
    return {
        name: by_name[canonical(name)]
        for name in wanted
        if canonical(name) in by_name and canonical(name) != BACKGROUND
    }


def map_classes(known: tuple[str, ...], wanted: tuple[str, ...], unknown: str) -> ClassMap:
    """How a classifier of the classes `known` is scored on a data set of the classes `wanted`.

    What it predicts beyond the data set's classes counts as background there, as its pixels do in
    such labels; where the data set has no background, as no class: wrong wherever it is.

    Args:
        known: names of the classifier.
        wanted: names of the data set.
        unknown: what becomes of pixels of classes that the classifier does not know: ignore, or
            background.

    Raises:
        InputError: no class is shared, or pixels shall become background where there is none.
    """
    if unknown not in ("ignore", BACKGROUND):
        raise InputError(f"--unknown is {unknown!r}; it can be ignore or background")
    if not shared_classes(known, wanted):
        raise InputError(
            "the classifier shares no class with the data set besides background: it knows "
            f"{_few(known)}, and the data set has {_few(wanted)}; compare the names of the classes"
        )
    places: dict[str, int] = {}
    for place, name in enumerate(wanted):
        places.setdefault(canonical(name), place)
    background = places.get(BACKGROUND)
    if unknown == BACKGROUND and background is None:
        raise InputError("--unknown background needs a data set with a class background")
    nothing = len(wanted) if background is None else background
    of_prediction: NDArray[np.int64] = np.array(
        [places.get(canonical(name), nothing) for name in known], np.int64
    )
    names = {canonical(name) for name in known}
    instead = background if unknown == BACKGROUND and background is not None else IGNORED
    of_label: NDArray[np.int16] = np.array(
        [place if canonical(name) in names else instead for place, name in enumerate(wanted)],
        np.int16,
    )
    return ClassMap(len(wanted), of_label, of_prediction)


def _few(names: tuple[str, ...]) -> str:
    shown = [name for name in names if canonical(name) != BACKGROUND]
    return ", ".join(shown[:5]) + (", …" if len(shown) > 5 else "")
