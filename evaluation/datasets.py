"""The data sets of the published evaluations: their layout, splits, and what their rows need.

Values are those of the paper's table (MaskContrast, section 4 and supplementary; for ImageNet-S and
COCO-Stuff the later papers that report it); see `published.py` for the figures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.errors import InputError
from data_pipeline.labelled import ListedSet
from data_pipeline.resize import Resize
from data_pipeline.sources.coco import list_coco
from data_pipeline.sources.davis import list_davis
from data_pipeline.sources.imagenet_s import list_imagenet_s
from data_pipeline.sources.item import Listing
from data_pipeline.sources.voc import list_voc
from evaluation.matching import Criterion
from evaluation.miou import Mean
from evaluation.resolution import Resolution

Role = Literal["train", "bank", "test"]


@dataclass(frozen=True)
class Place:
    """Where a data set lies.

    Attributes:
        root: its folder.
        masks: folder of saliency masks, below `root` or not; None takes none.
        names: file with one image a line: only these (COCO-Stuff-27's curated split).
        categories: ImageNet-S's list of categories; None takes WordNet ids.
    """

    root: Path
    masks: str | None = None
    names: Path | None = None
    categories: Path | None = None


@dataclass(frozen=True)
class DataSet:
    """One data set and its published protocol.

    Attributes:
        name: on the command line and in results.
        title: for people.
        splits: that classifiers learn on, that the retrieval bank is made of, and that is scored.
        list_split: lists one of its splits.
        size: side that images are resized to, pixels.
        criterion, unit, resolution, fit_on: of K-means (`kmeans_config.py`).
        resize: how images become squares (`resize_image`).
        mean: classes of the mIoU (`miou.score`).
    """

    name: str
    title: str
    splits: dict[Role, str]
    list_split: Callable[[Place, str], Listing]
    size: int = 512
    criterion: Criterion = "iou"
    unit: Literal["image", "pixel"] = "image"
    resolution: Resolution = "label"
    fit_on: Literal["test", "train"] = "test"
    resize: Resize = "opencv"
    mean: Mean = "present"

    def open(self, place: Place, role: Role, split: str | None = None) -> ListedSet:
        """One split where it lies.

        Raises:
            InputError: folders, lists or files are missing.
        """
        return ListedSet(self.list_split(place, split or self.splits[role]), place.root)


def _voc(place: Place, split: str) -> Listing:
    return list_voc(place.root, split, place.masks)


def _coco(labels: str) -> Callable[[Place, str], Listing]:
    def listed(place: Place, split: str) -> Listing:
        # the list is of the images that are scored
        names = place.names if split == "val2017" else None
        return list_coco(place.root, split, place.masks, labels, names=names)

    return listed


def _imagenet_s(size: int) -> Callable[[Place, str], Listing]:
    def listed(place: Place, split: str) -> Listing:
        masks = None if place.masks is None else Path(place.masks)
        return list_imagenet_s(place.root, size, split, masks, categories=place.categories)

    return listed


def _davis(place: Place, split: str) -> Listing:
    return list_davis(place.root, split, 2016, place.masks)


_COCO: dict[Role, str] = {"train": "train2017", "bank": "train2017", "test": "val2017"}
_IMAGENET_S: dict[Role, str] = {"train": "train-semi", "bank": "train-semi", "test": "validation"}

DATA_SETS = {
    one.name: one
    for one in (
        DataSet(
            "voc",
            "PASCAL VOC 2012",
            {"train": "trainaug", "bank": "train", "test": "val"},
            _voc,
            mean="all",
        ),
        DataSet(
            *("coco-stuff-81", "COCO-Stuff-81", _COCO, _coco("81"), 320, "count"),
            resolution="image",
        ),
        DataSet(
            *("coco-stuff-27", "COCO-Stuff-27", _COCO, _coco("27"), 320, "count", "pixel"),
            resolution="image",
            fit_on="train",
            resize="crop",
        ),
        *(
            DataSet(
                *(f"imagenet-s-{size}", f"ImageNet-S-{size}", _IMAGENET_S, _imagenet_s(size)),
                criterion="image",
            )
            for size in (50, 300, 919)
        ),
        DataSet(
            "davis-2016", "DAVIS 2016", {"train": "train", "bank": "train", "test": "val"}, _davis
        ),
    )
}


def data_set(name: str) -> DataSet:
    """A data set by name; InputError with the names there are."""
    if name not in DATA_SETS:
        raise InputError(f"--data-set is {name!r}; it can be {', '.join(DATA_SETS)}")
    return DATA_SETS[name]
