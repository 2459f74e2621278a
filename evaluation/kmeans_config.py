"""Settings of the K-means evaluation."""

from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.errors import InputError
from data_pipeline.resize import Resize, require_resize
from evaluation.cluster import ClusterConfig
from evaluation.features import require_precision
from evaluation.matching import CRITERIA, Criterion
from evaluation.miou import Mean, require_mean
from evaluation.prototypes import GIVEN_MASKS, PrototypeConfig
from evaluation.resolution import Resolution, require_resolution
from trainer.encoder import Encoder

Unit = Literal["image", "pixel"]
DEFAULT_PCA: dict[Unit, int] = {"image": 32, "pixel": 0}  # as published, and as later work has it


@dataclass(frozen=True)
class KMeansConfig:
    """The protocol; the defaults are the published ones.

    Attributes:
        size: side that images are resized to, pixels.
        prototype: how an image's vector is taken.
        cluster: how vectors are clustered.
        criterion: of the matching.
        many_to_one: every cluster takes its best class (over-clustering), instead of one cluster
            a class.
        unit: what is clustered: the foregrounds of images, the rest being background, or all pixels
            (COCO-Stuff-27, which has no background).
        batch_size: images a forward pass.
        precision: float32 or bf16.
        resize: how images become squares (`resize_image`).
        resolution: pixels that are scored: label, its own, or image, the square's.
        mean: classes of the mIoU (`miou.score`).
        fit_on: images that centres are of: test, those that are scored, or train (of pixels only).
    """

    size: int = 512
    prototype: PrototypeConfig = field(default_factory=PrototypeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    criterion: Criterion = "iou"
    many_to_one: bool = False
    unit: Unit = "image"
    batch_size: int = 16
    precision: str = "float32"
    resize: Resize = "opencv"
    resolution: Resolution = "label"
    mean: Mean = "present"
    fit_on: Literal["test", "train"] = "test"

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise InputError(f"--criterion is {self.criterion!r}; it can be iou, count or image")
        if self.unit not in ("image", "pixel"):
            raise InputError(f"--unit is {self.unit!r}; it can be image or pixel")
        if self.unit == "pixel" and self.criterion == "image":
            raise InputError("--criterion image needs --unit image: it counts images by cluster")
        if self.unit == "pixel" and self.cluster.without_foreground != "zero":
            raise InputError("--without-foreground needs --unit image: pixels have no foreground")
        if min(self.size, self.batch_size) < 1:
            raise InputError("--size and --batch-size must be at least 1")
        if self.fit_on not in ("test", "train"):
            raise InputError(f"--fit-on is {self.fit_on!r}; it can be test or train")
        if self.unit == "image" and self.fit_on == "train":
            raise InputError(
                "--fit-on train needs --unit pixel; foregrounds are clustered where scored"
            )
        require_precision(self.precision)
        require_resize(self.resize)
        require_resolution(self.resolution)
        require_mean(self.mean)

    def require(self, encoder: Encoder) -> None:
        """Raises InputError where the network cannot do this: said before any work."""
        if self.unit == "image" and self.prototype.foreground != "mask":
            encoder.require("saliency", "this", GIVEN_MASKS)
