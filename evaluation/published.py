"""Published figures, to stand beside ours: MaskContrast (Van Gansbeke et al., ICCV 2021) and later.

Each belongs to a data set, a protocol and the training that it is of; percent.
"""

from dataclasses import dataclass

from data_pipeline.sources.voc import VOC_CLASSES


@dataclass(frozen=True)
class Published:
    """One figure of a paper.

    Attributes:
        what: the training behind it.
        value: percent.
        metric: mIoU unless another is named.
    """

    what: str
    value: float
    metric: str = "mIoU"


_SUPERVISED = "MaskContrast, supervised saliency, ImageNet start"
_SUPERVISED_MOCO = "MaskContrast, supervised saliency, MoCo start"
_UNSUPERVISED = "MaskContrast, unsupervised saliency, MoCo v2 start"
_MOCO = "MoCo v2 alone"

PUBLISHED: dict[tuple[str, str], tuple[Published, ...]] = {
    ("voc", "kmeans"): (
        Published(_SUPERVISED, 44.2),
        Published(_SUPERVISED_MOCO, 38.9),
        Published(_UNSUPERVISED, 35.0),
    ),
    ("voc", "linear"): (Published(_SUPERVISED, 63.9), Published(_UNSUPERVISED, 58.4)),
    ("voc", "linear-crf"): (Published(_SUPERVISED, 65.5), Published(_UNSUPERVISED, 59.5)),
    ("voc", "retrieval-7"): (
        Published(_SUPERVISED, 62.3),
        Published(_UNSUPERVISED, 53.4),
        Published(_MOCO, 48.0),
    ),
    ("voc", "retrieval-21"): (
        Published(_SUPERVISED, 49.6),
        Published(_UNSUPERVISED, 43.3),
        Published(_MOCO, 39.0),
    ),
    ("coco-stuff-81", "kmeans"): (
        Published("MaskContrast", 3.7),
        Published("MaskContrast", 8.8, "pixel accuracy"),
    ),
    ("imagenet-s-50", "kmeans"): (
        Published("MaskContrast, with saliency, validation", 24.6),
        Published("MaskContrast, with saliency, test", 24.2),
    ),
}


def published_figures(
    data_set: str, protocol: str, classes: tuple[str, ...]
) -> tuple[Published, ...]:
    """What has been published for a row; empty where nothing at hand has.

    And for other data in PASCAL's layout, which bring class names of their own.
    """
    if data_set == "voc" and not set(classes) <= set(VOC_CLASSES):
        return ()
    return PUBLISHED.get((data_set, protocol), ())
