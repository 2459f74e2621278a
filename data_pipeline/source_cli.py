"""`maskbank shards build SOURCE`: one command a kind of source."""

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.build_cli import build_command
from data_pipeline.errors import InputError
from data_pipeline.sources.item import Listing, read_class_names
from data_pipeline.storage import as_location

build_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
_NO_MASKS = "none"

ClassNames = Annotated[Path | None, typer.Option(help="Class names, one a line, background first.")]
MaskTree = Annotated[str | None, typer.Option(help="Tree of masks with the same folders.")]
WithLabels = Annotated[bool, typer.Option(help="Take labels along where there are any.")]


@build_command(build_app)
def folder(
    images: Annotated[str, typer.Option(help="Folder or address of images, searched deeply.")],
    masks: Annotated[
        str | None, typer.Option(help="Folder of masks: same stems, or all in one folder.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Folder of class-index labels.")] = None,
    classes: ClassNames = None,
) -> Listing:
    """Images and masks in two folders, matched by relative path and stem.

    Example: `maskbank shards build folder --images photos --masks masks -o shards/train`
    """
    from data_pipeline.sources.folder import list_folder

    if (labels is None) != (classes is None):
        raise InputError(
            "--labels and --classes go together: evaluation needs a name for every class index; "
            "give both, or neither"
        )
    mask_folder = None if masks is None else as_location(masks)
    label_folder = None if labels is None else as_location(labels)
    return list_folder(as_location(images), mask_folder, label_folder, _names(classes))


@build_command(build_app, name="list")
def image_list(
    file: Annotated[
        str,
        typer.Option(
            "--list",
            help="CSV, TSV or Parquet with the columns image and, if wanted, mask, label, key, "
            "sha256.",
        ),
    ],
    classes: ClassNames = None,
) -> Listing:
    """A list of images with their masks and labels, wherever they are.

    Example: `maskbank shards build list --list samples.csv -o shards/train`
    """
    from data_pipeline.sources.image_list import list_images

    return list_images(as_location(file), _names(classes))


@build_command(build_app)
def voc(
    root: Annotated[Path, typer.Option(help="The PASCAL tree: released layout or VOCdevkit.")],
    split: Annotated[str, typer.Option(help="Name of the split's list: trainaug, train, val.")],
    masks: Annotated[str | None, typer.Option(help="Folder of masks, in the tree or not.")] = None,
    labels: WithLabels = True,
) -> Listing:
    """A split of PASCAL VOC, in the released archive's layout or VOCdevkit's.

    Example: `maskbank shards build voc --root VOCSegmentation --split trainaug
    --masks saliency_unsupervised_model -o shards/trainaug`
    """
    from data_pipeline.sources.voc import list_voc

    return list_voc(root, split, masks, labels)


@build_command(build_app)
def coco(
    root: Annotated[Path, typer.Option(help="Holds train2017/, val2017/ and annotations/.")],
    split: Annotated[str, typer.Option(help="train2017 or val2017.")],
    masks: Annotated[
        str, typer.Option(help="instances (as proposals), none, or a folder of masks.")
    ] = "instances",
    labels: Annotated[
        str, typer.Option(help="81 things, 27 super-categories of COCO-Stuff, or none.")
    ] = "81",
    instance_area: Annotated[
        float, typer.Option(help="Smaller instances are background; share of the image.")
    ] = 0.0,
    names: Annotated[
        Path | None, typer.Option("--list", help="Image ids, one a line: only these.")
    ] = None,
) -> Listing:
    """A split of COCO 2017: instances as proposals, labels of 81 or 27 classes.

    Example: `maskbank shards build coco --root coco --split val2017 --labels 27 -o shards/coco`
    """
    from data_pipeline.sources.coco import list_coco

    return list_coco(root, split, _given(masks), labels, instance_area, names)


@build_command(build_app)
def imagenet(
    root: Annotated[str, typer.Option(help="Folder or address that holds train/ and val/.")],
    split: Annotated[str, typer.Option(help="train, val; empty: class folders in root.")] = "train",
    masks: MaskTree = None,
) -> Listing:
    """ImageNet, or any tree of a folder a class.

    Example: `maskbank shards build imagenet --root imagenet --masks masks -o shards/imagenet`
    """
    from data_pipeline.sources.imagenet import list_imagenet

    return list_imagenet(as_location(root), split, None if masks is None else as_location(masks))


@build_command(build_app, name="imagenet-s")
def imagenet_s(
    root: Annotated[Path, typer.Option(help="Holds ImageNetS50, ImageNetS300 or ImageNetS919.")],
    split: Annotated[str, typer.Option(help="train, train-semi, validation or test.")] = "train",
    size: Annotated[int, typer.Option(help="Classes: 50, 300 or 919.")] = 50,
    masks: MaskTree = None,
    labels: WithLabels = True,
    categories: Annotated[
        Path | None, typer.Option(help="The release's list of categories; else WordNet ids.")
    ] = None,
) -> Listing:
    """A split of ImageNet-S, whose annotations hold R + 256·G.

    Example: `maskbank shards build imagenet-s --root ImageNetS --split validation -o shards/val`
    """
    from data_pipeline.sources.imagenet_s import list_imagenet_s

    tree = None if masks is None else Path(masks)
    return list_imagenet_s(root, size, split, tree, labels, categories)


@build_command(build_app)
def davis(
    root: Annotated[Path, typer.Option(help="Holds JPEGImages/ and Annotations/.")],
    split: Annotated[str, typer.Option(help="train, val or another list.")],
    year: Annotated[int, typer.Option(help="Of the task: 2016 or 2017.")] = 2016,
    masks: Annotated[
        str, typer.Option(help="annotations, none, or a folder of masks.")
    ] = "annotations",
    labels: WithLabels = True,
    resolution: Annotated[str, typer.Option(help="Folder name of the frames.")] = "480p",
) -> Listing:
    """Frames of DAVIS 2016 or 2017.

    Example: `maskbank shards build davis --root DAVIS --split val -o shards/davis`
    """
    from data_pipeline.sources.davis import list_davis

    return list_davis(root, split, year, _given(masks), labels, resolution)


@build_command(build_app)
def webdataset(
    tars: Annotated[
        list[str], typer.Option(help="Tars: paths, addresses, {000..012}, *; may be repeated.")
    ],
    image_ext: Annotated[
        str, typer.Option(help="Components that are images, separated by ;")
    ] = "jpg;jpeg;png;webp",
    mask_ext: Annotated[str, typer.Option(help="Component that is the mask; empty: none.")] = (
        "mask.png"
    ),
    label_ext: Annotated[
        str, typer.Option(help="Component that is the label; read with --classes.")
    ] = "label.png",
    classes: ClassNames = None,
) -> Listing:
    """WebDataset tars that others made, brought into form. (`shards reindex` leaves them be.)

    Example: `maskbank shards build webdataset --tars 'cc12m/{00000..01242}.tar' -o shards/cc12m`
    """
    from data_pipeline.sources.webdataset_tars import list_tars

    return list_tars(tars, image_ext, mask_ext, label_ext, _names(classes))


@build_command(build_app)
def scenes(
    count: Annotated[int, typer.Option(help="Scenes to generate.")] = 1000,
    size: Annotated[int, typer.Option(help="About how many pixels a side.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the series; another for another split.")] = 0,
) -> Listing:
    """Generated scenes with masks and labels: data to try everything on.

    Example: `maskbank shards build scenes --count 1000 -o shards/scenes`
    """
    from data_pipeline.sources.generated import list_scenes

    return list_scenes(count, seed, size)


def _names(classes: Path | None) -> tuple[str, ...]:
    return () if classes is None else read_class_names(classes)


def _given(masks: str) -> str | None:
    return None if masks == _NO_MASKS else masks
