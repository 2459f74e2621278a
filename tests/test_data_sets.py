"""Whole data sets where they lie, through the command line: small trees with every pixel known.

What the figures of a network that knows them must be is counted by hand (`data_set_trees.py`), not
by the code that reads the trees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import InputError
from data_pipeline.sources.voc import VOC_CLASSES
from evaluation.commands import kmeans as kmeans_command
from evaluation.commands import options
from evaluation.datasets import Place, Role, data_set
from evaluation.kmeans_config import KMeansConfig
from tests.data_set_trees import (
    BACKGROUND,
    IDS,
    IGNORED,
    OBJECT,
    VOC_IMAGES,
    block,
    coco,
    coco_instances,
    davis,
    imagenet_s,
    imagenet_s_50,
    imagenet_s_300,
    voc_archive,
    voc_devkit,
)
from tests.evaluation_command import evaluate, read_result, refused, tiny_run
from tests.evaluation_data import OracleNetwork, oracle
from tests.sample_data import HEIGHT, WIDTH, encode, palette_png, write
from trainer.encoder import Encoder, load_encoder

SIZE = 60  # three times the rows, twice the columns: images come back to their pixels exactly
SQUARE = SIZE * SIZE // (HEIGHT * WIDTH)
Tree = Callable[[Path], Path]


@dataclass(frozen=True)
class Known:
    """What is known of a tree.

    Attributes:
        name: of the data set.
        tree: builds it.
        pixels: of each class that it has.
        settings: of its published recipe: size, criterion, unit and dimensions of the PCA;
            resize, resolution, classes of the mean, and what centres are fitted on.
        images: in the split.
        options: of the command, files relative to the root.
        published: figures.
    """

    name: str
    tree: Tree
    pixels: dict[str, int]
    settings: tuple[int | str, ...]
    images: int = 3
    options: tuple[tuple[str, str], ...] = ()
    published: tuple[float, ...] = ()


VOC_PIXELS = {
    "background": 3 * BACKGROUND,
    **dict.fromkeys(("aeroplane", "boat", "tv monitor"), OBJECT),
}
VOC = (512, "iou", "image", 32, "opencv", "label", "all", "test")
COCO_81 = (320, "count", "image", 32, "opencv", "image", "present", "test")
IMAGENET_S = (512, "image", "image", 32, "opencv", "label", "present", "test")
KNOWN = {
    "voc archive": Known("voc", voc_archive, VOC_PIXELS, VOC, published=(44.2, 38.9, 35.0)),
    "VOCdevkit": Known("voc", voc_devkit, VOC_PIXELS, VOC, published=(44.2, 38.9, 35.0)),
    "COCO-Stuff-81": Known(
        "coco-stuff-81",
        coco,
        {
            "background": 3 * BACKGROUND * SQUARE,
            "person": 2 * OBJECT * SQUARE,
            "dog": OBJECT * SQUARE,
        },
        COCO_81,
        published=(3.7, 8.8),
    ),
    "COCO-Stuff-81, instances": Known(
        "coco-stuff-81",
        coco_instances,
        {
            "background": 3 * (BACKGROUND + IGNORED) * SQUARE,
            "person": 2 * OBJECT * SQUARE,
            "dog": OBJECT * SQUARE,
        },
        COCO_81,
        published=(3.7, 8.8),
    ),
    "COCO-Stuff-27": Known(
        "coco-stuff-27",
        coco,
        # three times as large; of the 30 columns the 20 in the middle, with all of the object
        {
            "person": 9 * OBJECT,
            "animal": 9 * OBJECT,
            "sky": 9 * (HEIGHT * HEIGHT - OBJECT - HEIGHT),
            "plant": 9 * (HEIGHT * HEIGHT - OBJECT - HEIGHT),
        },
        (320, "count", "pixel", 0, "crop", "image", "present", "train"),
        images=2,
        options=(("--list", "curated.txt"),),
    ),
    "ImageNet-S-50": Known(
        "imagenet-s-50",
        imagenet_s_50,
        {"background": 3 * BACKGROUND, **{IDS[50][n - 1]: OBJECT for n in (1, 7, 50)}},
        IMAGENET_S,
        published=(24.6, 24.2),
    ),
    "ImageNet-S-300": Known(
        "imagenet-s-300",
        imagenet_s_300,
        {"background": 2 * BACKGROUND, "kind 44": OBJECT, "kind 300": OBJECT},
        IMAGENET_S,
        images=2,
        options=(("--categories", "names.txt"),),
    ),
    "DAVIS 2016": Known(
        "davis-2016",
        davis,
        {"background": 3 * (BACKGROUND + IGNORED), "object": 3 * OBJECT},
        (512, "iou", "image", 32, "opencv", "label", "present", "test"),
    ),
}


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a network in a file; which one it is, `answers` says."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")  # one thread
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "knows.pt", b"")


def answers(monkeypatch: pytest.MonkeyPatch, encoder: Encoder) -> None:
    monkeypatch.setattr(options, "load_encoder", lambda path, initial: encoder)


def knowing(name: str, place: Place) -> Encoder:
    """A network that knows the labels of a data set."""
    known = data_set(name)
    roles: tuple[Role, ...] = ("test", "train") if known.fit_on == "train" else ("test",)
    return oracle([known.open(place, role) for role in roles], SIZE, known.resize)


def arguments(known: Known, network: Path, root: Path) -> list[object]:
    given = [part for option, file in known.options for part in (option, root / file)]
    return ["kmeans", network, "--data-set", known.name, "--root", root, "--device", "cpu", *given]


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("which", list(KNOWN))
def test_figures_of_a_network_that_knows_the_labels(
    which: str,
    tmp_path: Path,
    network: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = KNOWN[which]
    root = known.tree(tmp_path / "data")
    files = {option: root / file for option, file in known.options}
    place = Place(root, None, files.get("--list"), files.get("--categories"))
    answers(monkeypatch, knowing(known.name, place))
    extra = ("--size", SIZE, "--seeds", 2, "--pca", 0, "--examples", 0)
    status, _, error = evaluate(capsys, *arguments(known, network, root), *extra)
    assert status == 0, error
    assert f"checking {root}: {known.images}/{known.images}" in error
    result = read_result(tmp_path / "runs/knows", f"{known.name}/kmeans-knows")
    assert result["data_set"] == known.name
    assert result["images"] == known.images
    classes = [entry["pixels"] > 0 for entry in result["per_class"]]
    # of PASCAL's 21 those that no image has count 0
    miou = 100 * np.mean(classes) if known.name == "voc" else 100
    assert result["miou"]["values"] == pytest.approx([miou, miou])
    found = {entry["class"]: entry["pixels"] for entry in result["per_class"] if entry["pixels"]}
    assert found == known.pixels
    assert np.trace(result["confusion"]) == sum(known.pixels.values())
    assert tuple(one["value"] for one in result["published"]) == known.published
    assert (result["options"]["criterion"], result["options"]["unit"]) == known.settings[1:3]
    metrics = result["metrics"]
    assert metrics.pop("pixel accuracy") == [100, 100]
    if not known.name.startswith("imagenet-s"):
        assert metrics == {}
        return
    assert metrics["image accuracy"] == metrics["F-beta"] == [100]
    # one pixel wide: 66 along three sides, 44 around the object, and in the label 28 beside what is
    # ignored, where the prediction goes on
    objects = known.images
    boundary = 100 * (110 / 138 + objects) / (1 + objects)
    assert metrics["boundary mIoU"] == pytest.approx([boundary], abs=1e-3)
    # 96 of 570 pixels: more than 5%, less than 25%
    assert metrics["mIoU, medium small"] == [100]
    assert metrics["mIoU, small"] == metrics["boundary mIoU, large"] == [None]


def test_given_masks_are_the_foreground(
    tmp_path: Path,
    network: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a network without saliency; the masks are the upper half of each object."""
    root = voc_archive(tmp_path / "data")
    samples = data_set("voc").open(Place(root), "test")
    headless = Encoder(OracleNetwork([samples], SIZE), 0, frozenset({"backbone"}), None, "moco.pth")  # type: ignore[arg-type]
    answers(monkeypatch, headless)
    command = [*arguments(KNOWN["voc archive"], network, root), "--size", SIZE, "--pca", 0]
    status, _, said = evaluate(capsys, *command)
    assert status == 2
    # the first line: no image was looked at
    assert said.startswith(
        "maskbank: moco.pth has no saliency head, which this needs; --foreground mask"
    )
    assert not (tmp_path / "runs").exists()
    masks = ("--foreground", "mask", "--masks", "saliency", "--examples", 0, "--all-metrics")
    status, _, error = evaluate(capsys, *command, *masks)
    assert status == 0, error
    result = read_result(tmp_path / "runs/knows", "voc/kmeans-knows")
    half = OBJECT // 2
    ious = [BACKGROUND / (BACKGROUND + half), *[half / OBJECT] * 3, *[0] * 17]
    assert result["miou"]["values"] == pytest.approx([100 * np.mean(ious)] * 5)
    assert result["metrics"]["image accuracy"] == [100]
    # precision 1, recall 1/2
    assert result["metrics"]["F-beta"] == pytest.approx([100 * 1.3 * 0.5 / (0.3 + 0.5)], abs=1e-3)
    said = refused(capsys, *command, "--foreground", "mask", "--masks", "nowhere")
    assert "no folder of masks 'nowhere' below" in said


@pytest.mark.parametrize("which", [name for name in KNOWN if name != "VOCdevkit"])
def test_published_settings_are_the_defaults(
    which: str,
    tmp_path: Path,
    network: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = KNOWN[which]
    root = known.tree(tmp_path / "data")
    files = {option: root / file for option, file in known.options}
    place = Place(root, None, files.get("--list"), files.get("--categories"))
    answers(monkeypatch, knowing(known.name, place))
    seen: list[Any] = []

    def instead(subject: Any, samples: Any, config: KMeansConfig, *rest: Any, **more: Any) -> None:
        seen.extend([samples, config, rest, more])
        raise InputError("seen")

    monkeypatch.setattr(kmeans_command, "run_kmeans", instead)
    assert refused(capsys, *arguments(known, network, root)) == "seen"
    samples, config, rest, more = seen
    assert (
        *(config.size, config.criterion, config.unit, config.cluster.pca),
        *(config.resize, config.resolution, config.mean, config.fit_on),
    ) == known.settings
    assert (more["fit_samples"] is not None) is (config.fit_on == "train")
    assert config.cluster.seeds == (1234, 1235, 1236, 1237, 1238)
    assert (config.cluster.method, config.cluster.clusters) == ("minibatch", 0)
    assert (config.prototype.foreground, config.prototype.threshold) == ("logit", 0.5)
    classes = {"voc": 21, "coco-stuff-81": 81, "coco-stuff-27": 28, "davis-2016": 2}
    expected = classes.get(known.name) or 1 + int(known.name.rpartition("-")[2])
    assert len(samples.classes) == expected
    assert rest[0] == known.name
    assert rest[-1] is known.name.startswith("imagenet-s"), "its measures"


# ---------------------------------------------------------------- what is wrong is said first


@pytest.fixture
def said(
    tmp_path: Path,
    network: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """What a command on a PASCAL tree says before any work is done or anything is written."""
    samples = data_set("voc").open(Place(voc_archive(tmp_path / "intact")), "test")
    answers(monkeypatch, oracle([samples], SIZE))
    monkeypatch.setattr(kmeans_command, "run_kmeans", lambda *_: pytest.fail("work was done"))

    def run(root: Path, *more: object, name: str = "voc") -> str:
        command = ("kmeans", network, "--data-set", name, "--root", root, "--device", "cpu")
        text = refused(capsys, *command, *more)
        assert not (tmp_path / "runs").exists()
        return text

    return run


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("voc", r"is no PASCAL tree: it has neither images/ nor JPEGImages/; give --root"),
        ("coco-stuff-81", "no images for --split 'val2017'"),
        ("imagenet-s-50", "no folder 'validation'"),
        ("davis-2016", "JPEGImages/480p is not a folder; give --root"),
    ],
)
def test_a_wrong_root(tmp_path: Path, said: Callable[..., str], name: str, message: str) -> None:
    (tmp_path / "other/photos").mkdir(parents=True)
    text = said(tmp_path / "other", name=name)
    assert message in text
    assert str(tmp_path / "other") in text
    assert said(tmp_path / "gone", name=name) == f"--root {tmp_path / 'gone'} is not a folder"


def test_a_missing_list(tmp_path: Path, said: Callable[..., str]) -> None:
    root = voc_archive(tmp_path / "data")
    (root / "sets/val.txt").rename(root / "sets/trainval.txt")
    text = said(root)
    assert "no split 'val' in" in text
    assert "--split can be one of: trainval" in text
    davis(tmp_path / "davis")
    (tmp_path / "davis/ImageSets/480p/val.txt").unlink()
    assert "no split 'val' in" in said(tmp_path / "davis", name="davis-2016")
    text = said(coco(tmp_path / "coco"), "--list", tmp_path / "none.txt", name="coco-stuff-27")
    assert "none.txt" in text


def test_missing_labels_are_named_and_counted(tmp_path: Path, said: Callable[..., str]) -> None:
    root = voc_archive(tmp_path / "data")
    lost = [root / "SegmentationClass" / f"{name}.png" for name in list(VOC_IMAGES)[1:]]
    for path in lost:
        path.unlink()
    text = said(root)
    assert "2 of 3 samples are incomplete, and evaluation needs every one" in text
    assert f"2007_000061: no label: {lost[0]} is missing; 2008_000001: no label:" in text
    frames = davis(tmp_path / "davis")
    (frames / "Annotations/480p/cows/00001.png").unlink()
    assert "1 of 3 samples are incomplete" in said(frames, name="davis-2016")
    tree = imagenet_s_50(tmp_path / "imagenet")
    next((tree / "ImageNetS50/validation-segmentation").rglob("*.png")).unlink()
    assert "1 of 3 samples are incomplete" in said(tree, name="imagenet-s-50")
    maps = coco(tmp_path / "coco")
    (maps / "stuffthingmaps/val2017/000000000285.png").unlink()
    assert "000000000285: no label" in said(maps, name="coco-stuff-27")


def test_labels_that_cannot_be(tmp_path: Path, said: Callable[..., str]) -> None:
    root = voc_archive(tmp_path / "values")
    for name in list(VOC_IMAGES)[:2]:
        label = block(21, 0, 255).astype(np.uint8)
        write(root / "SegmentationClass" / f"{name}.png", palette_png(label))
    text = said(root)
    assert f"{root}/images/2007_000032.jpg" in text
    assert "21" in text
    assert "(and 1 more); evaluation needs every sample" in text

    root = voc_archive(tmp_path / "sizes")
    small = block(1, 0, 255)[:10].astype(np.uint8)
    write(root / "SegmentationClass" / "2008_000001.png", palette_png(small))
    text = said(root)
    assert f"{root}/images/2008_000001.jpg" in text
    assert "30" in text
    assert "10" in text

    tree = imagenet_s(50, IDS[50], [1, 50], tmp_path / "classes")
    file = next((tree / "ImageNetS50/validation-segmentation").rglob("*.png"))
    write(file, encode(np.full((HEIGHT, WIDTH, 3), [51, 0, 0], np.uint8)))
    assert "has class 51, but there are only classes 0…50" in said(tree, name="imagenet-s-50")


def test_options_that_do_not_fit(
    tmp_path: Path, said: Callable[..., str], capsys: pytest.CaptureFixture[str], network: Path
) -> None:
    root = voc_archive(tmp_path / "data")
    text = said(root, name="pascal")
    assert text.startswith("--data-set is 'pascal'; it can be voc, coco-stuff-81, coco-stuff-27, ")
    assert text.endswith("davis-2016")
    assert "no split 'testing' in" in said(root, "--split", "testing")
    shards = ("kmeans", network, "--shards", tmp_path)
    for option, value in (("--split", "val"), ("--root", root), ("--masks", "saliency")):
        text = refused(capsys, *shards, option, value)
        assert text == f"{option} belongs to --data-set; shards are one split already"
    text = refused(capsys, "kmeans", network, "--data-set", "voc")
    assert text == "--data-set needs --root, the folder that it lies in"
    text = refused(capsys, "kmeans", network)
    assert text == "give --shards FOLDER, or --data-set NAME with --root FOLDER"


def test_a_real_run_on_a_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stands in for anything: checkpoint, data set, pictures, files."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    run, root = tiny_run(tmp_path / "run"), voc_devkit(tmp_path / "data")
    assert load_encoder(run).step == 12
    place = ("kmeans", run, "--data-set", "voc", "--root", root, "--device", "cpu")
    quick = ("--size", SIZE, "--foreground", "probability", "--seeds", 1)
    status, out, error = evaluate(capsys, *place, *quick)
    assert status == 0, error
    result = read_result(run, "voc/kmeans-trained")
    assert [entry["class"] for entry in result["per_class"]] == list(VOC_CLASSES)
    assert result["per_class"][1]["pixels"] == OBJECT
    assert "published: mIoU 44.2, MaskContrast, supervised saliency, ImageNet start" in out
    page = (run / "evaluation/voc/kmeans-trained.md").read_text()
    assert "44.2 (MaskContrast, supervised saliency, ImageNet start)" in page
    with np.load(run / "evaluation/voc/examples-trained.npz") as examples:
        assert examples["key"].tolist() == list(VOC_IMAGES)


def test_the_table_follows_the_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    run, root = tiny_run(tmp_path / "run"), coco(tmp_path / "data")
    place = ("--root", root, "--device", "cpu", "--size", SIZE, "--rows", "kmeans")
    curated = ("--list", root / "curated.txt")
    names = ("resize", "resolution", "mean", "fit_on")
    changed = ("--resize", "opencv", "--mean", "all")
    for more, row, expected in (
        ((), "kmeans", ("crop", "image", "present", "train")),
        (changed, "kmeans@mean=all,resize=opencv", ("opencv", "image", "all", "train")),
    ):
        command = ("table", run, "--data-set", "coco-stuff-27", *place, *curated, *more)
        status, _, error = evaluate(capsys, *command)
        assert status == 0, error
        found = read_result(run, f"coco-stuff-27/{row}-trained")["options"]
        assert tuple(found[name] for name in names) == expected
    (root / "train2017").rename(root / "away")
    assert "no images for --split 'train2017'" in refused(capsys, *command)
