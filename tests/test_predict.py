"""Predictions: the evaluation's figures to the pixel, images of any kind, and what is written."""

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.errors import InputError, SampleError
from data_pipeline.labelled import ShardSet
from data_pipeline.pictures import read_picture
from data_pipeline.sample import decode_label
from data_pipeline.sources.imagenet_s import decode_annotation
from data_pipeline.whole_images import WholeImages
from evaluation.cluster import ClusterConfig
from evaluation.commands.kmeans import saved_clusters
from evaluation.kmeans import evaluate_kmeans
from evaluation.kmeans_config import KMeansConfig
from evaluation.linear_probe import LinearConfig, evaluate_linear, score_own_classifier
from evaluation.miou import confusion
from evaluation.palettes import MAX_CLASSES, class_palette, legend
from evaluation.predict import PredictConfig, Prediction, Predictor, largest_channel
from evaluation.predict_cli import choose_head, main
from evaluation.predict_inputs import OUTPUT_KINDS, PictureFile, find_pictures
from evaluation.predict_outputs import Outputs, colour_png, imagenet_s_png, index_png
from evaluation.predict_run import Counts, predict_files
from evaluation.prototypes import PrototypeConfig
from evaluation.saved_head import SavedHead, read_head
from evaluation.tiles import spans
from tests.evaluation_data import random_encoder, scene_shards
from tests.ranks import run_on_ranks
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import load_config, save_config
from trainer.distributed import Ranks
from trainer.encoder import Encoder, initial_network, load_encoder
from trainer.engine import network_state
from trainer.model import PixelOutput
from trainer.settings import ModelConfig

ALONE = Ranks(0, 1, torch.device("cpu"))
HALVES = PrototypeConfig("probability", 0.5, "normalized")
SIZE, BATCH = 40, 3
Palette = class_palette(MAX_CLASSES)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return scene_shards(tmp_path_factory.mktemp("scenes") / "shards", 8)


@pytest.fixture(scope="module")
def folder(scenes: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes as image files, in their order."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(len(scenes)):
        (folder / f"{number:03d}.png").write_bytes(scenes.read(number).image)
    return folder


def own_encoder(scenes: ShardSet) -> Encoder:
    """With a classifier of its own."""
    weight = torch.randn(len(scenes.classes), 16, 1, 1, generator=torch.Generator().manual_seed(1))
    network = random_encoder().network
    return Encoder(network, 3, classifier=(weight, torch.zeros(len(scenes.classes))))


def kmeans_head(scenes: ShardSet, config: KMeansConfig) -> tuple[SavedHead, NDArray[np.int64]]:
    result, clustering = evaluate_kmeans(random_encoder(), scenes, config, ALONE)
    return saved_clusters(clustering, config, scenes.classes, "", 3), result.confusion


def evaluated(scenes: ShardSet, kind: str) -> tuple[SavedHead, NDArray[np.int64]]:
    """A head of a kind, and the evaluation's confusion matrix [C, C + 1] with it."""
    if kind in ("linear", "own classifier"):
        config = LinearConfig(SIZE, 1, BATCH, lr=1e-9, augment=False)  # as drawn: of all classes
        if kind == "linear":
            [result], classifier = evaluate_linear(random_encoder(), scenes, scenes, config, ALONE)
        else:
            [result], classifier = score_own_classifier(own_encoder(scenes), scenes, config, ALONE)
        tensors = {"weight": classifier.weight, "bias": classifier.bias}
        return SavedHead(
            "linear", tensors, scenes.classes, "", SIZE, HALVES, 3, "opencv"
        ), result.confusion
    prototype = PrototypeConfig() if kind in ("kmeans as published", "pixel-kmeans") else HALVES
    resize: Any = kind.partition(", ")[2] or "opencv"
    unit: Any = "pixel" if kind == "pixel-kmeans" else "image"
    pca = 0 if unit == "pixel" else 4
    # more clusters than classes, so that some have no class
    cluster = ClusterConfig(len(scenes.classes) + 1, pca=pca, seeds=(1,))
    config = KMeansConfig(SIZE, prototype, cluster, unit=unit, batch_size=BATCH, resize=resize)
    return kmeans_head(scenes, config)


def outputs(folder: Path, head: SavedHead | None, *kinds: str) -> Outputs:
    return Outputs(folder, kinds, Palette, 2 if head is None else len(head.classes))


@pytest.mark.parametrize(
    "kind",
    [
        *("kmeans", "kmeans as published", "kmeans, antialias"),
        *("pixel-kmeans", "linear", "own classifier"),
    ],
)
def test_files_are_predicted_as_the_evaluation_scores_them(
    scenes: ShardSet, folder: Path, tmp_path: Path, kind: str
) -> None:
    head, expected = evaluated(scenes, kind)
    encoder = own_encoder(scenes) if kind == "own classifier" else random_encoder()
    predictor = Predictor(encoder, head, config=PredictConfig(embedding=False))
    found = find_pictures([str(folder)], tmp_path)
    assert [one.name for one in found] == [f"{number:03d}" for number in range(8)]
    written = outputs(tmp_path, head, "index")
    assert predict_files(predictor, found, written, ALONE, BATCH) == Counts(8, 0, 0)
    classes = len(scenes.classes)
    matrix = np.zeros((classes, classes + 1), np.int64)
    for number, one in enumerate(found):
        prediction = decode_label(written.path(one, "index").read_bytes())
        label = decode_label(scenes.read(number).label or b"")
        matrix += confusion(label, prediction % (classes + 1), classes, classes + 1)
    assert matrix[:, : expected.shape[1]].tolist() == expected.tolist()
    assert np.count_nonzero(matrix.sum(0)) > 2  # it tells more than background apart


def test_centres_that_were_scored_are_predicted_as_a_whole(scenes: ShardSet) -> None:
    """At the same scale, whatever the ratio; a square image as it was scored, to the pixel."""
    cluster = ClusterConfig(5, pca=0, seeds=(1,))
    config = KMeansConfig(24, cluster=cluster, unit="pixel", resize="crop", batch_size=1)
    head, _ = kmeans_head(scenes, config)
    predictor = Predictor(random_encoder(), head)
    image = scenes_image(scenes, 0)
    wide = predictor.resized(image)
    height, width = image.shape[:2]
    assert wide.shape == (3, 24 * height // min(height, width), 24 * width // min(height, width))
    assert predictor.predict(image).classes.shape == (height, width)
    square = image[:30, :30]
    predictions = list(
        predictor.predict_resized(
            [predictor.resized(one) for one in (square, image)], [(30, 30), (height, width)]
        )
    )
    assert [one.classes.shape for one in predictions] == [(30, 30), (height, width)]
    squashed = Predictor(random_encoder(), head, config=PredictConfig(resize="opencv"))
    assert predictions[0].classes.tolist() == squashed.predict(square).classes.tolist()
    assert predictions[1].classes.tolist() != squashed.predict(image).classes.tolist()


def scenes_image(scenes: ShardSet, number: int) -> NDArray[np.uint8]:
    """One that is not square."""
    image = WholeImages(scenes, SIZE, 1).read(number).image
    return image[: image.shape[0] - 8] if image.shape[0] == image.shape[1] else image


def test_a_head_survives_its_file(scenes: ShardSet, tmp_path: Path) -> None:
    head, _ = evaluated(scenes, "kmeans")
    head.write(tmp_path / "head.safetensors")
    images = (WholeImages(scenes, SIZE, 1).read(i).image for i in range(len(scenes)))
    image = next(
        one for one in images if Predictor(random_encoder(), head).predict(one).classes.any()
    )
    before, after = (
        Predictor(random_encoder(), one).predict(image)
        for one in (head, read_head(tmp_path / "head.safetensors"))
    )
    assert before.classes.tolist() == after.classes.tolist()
    assert before.classes.dtype == np.int16
    assert before.vector is not None
    assert np.linalg.norm(before.vector) == pytest.approx(1)


def test_without_a_head_masks_are_where_an_object_is_likely(scenes: ShardSet) -> None:
    image = WholeImages(scenes, SIZE, 1).read(1).image
    first = Predictor(random_encoder(), config=PredictConfig(size=SIZE)).predict(image).saliency
    assert first is not None
    lower, upper = (float(np.quantile(first, share)) for share in (0.3, 0.6))
    low, high = (
        Predictor(random_encoder(), config=PredictConfig(size=SIZE, threshold=threshold))
        .predict(image)
        for threshold in (lower, upper)
    )  # fmt: skip
    assert low.saliency is not None
    assert low.classes.shape == low.saliency.shape == image.shape[:2]
    assert ((high.classes == 1) <= (low.classes == 1)).all()
    assert 0 < (high.classes == 1).sum() < (low.classes == 1).sum() < low.classes.size
    # the map is bilinear, the mask takes the nearest pixel
    assert ((low.saliency > lower) == (low.classes == 1)).mean() > 0.95
    assert low.embedding is not None
    assert low.embedding.shape == (6, SIZE // 4, SIZE // 4)
    assert low.embedding.dtype == np.float16


class PooledNetwork(nn.Module):
    """Embeddings are mean colours of 8×8 pixels: what is far away does not matter to it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig(embedding_dim=3, decoder_channels=3, output_stride=8)
        self.largest = 0

    def features(self, images: Tensor) -> Tensor:
        self.largest = max(self.largest, *images.shape[2:])
        assert images.shape[2] % 8 == images.shape[3] % 8 == 0
        return F.avg_pool2d(images, 8)

    def heads(self, features: Tensor) -> PixelOutput:
        return PixelOutput(features, features.mean(1, keepdim=True))

    def forward(self, images: Tensor) -> PixelOutput:
        return self.heads(self.features(images))


def clusters_head(kind: Any, pooling: Any = "normalized") -> SavedHead:
    centres = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]], dtype=torch.float64)
    match = torch.tensor([0, 1, 2, -1, 3] if kind == "kmeans" else [1, 2, -1, 0])
    tensors = {
        "mean": torch.zeros(3, dtype=torch.float64),
        "directions": torch.eye(3, dtype=torch.float64),
        "centres": centres,
        "class_of_cluster": match,
    }
    if kind == "linear":
        tensors = {"weight": centres.float(), "bias": torch.tensor([0, 0.1, -0.1, 0.05])}
    names = ("background", "ant", "bee", "cow")
    return SavedHead(
        kind, tensors, names, "", SIZE, PrototypeConfig("logit", 0.1, pooling), 1, "opencv"
    )


@pytest.mark.parametrize("shape", [(150, 203), (1, 300), (70, 64)])
@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("kmeans", "normalized"), ("kmeans", "weighted"), ("pixel-kmeans", ""), ("linear", "")],
)
def test_tiles_predict_what_the_whole_image_does(
    shape: tuple[int, int], kind: str, pooling: str
) -> None:
    network = PooledNetwork()
    encoder = Encoder(network, step=1)  # type: ignore[arg-type]
    head = clusters_head(kind, pooling or "normalized")
    noise = np.random.default_rng(0).integers(0, 256, (shape[0] // 16 + 1, shape[1] // 16 + 1, 3))
    image = noise.astype(np.uint8).repeat(16, 0).repeat(16, 1)[: shape[0], : shape[1]]
    whole, tiled = (
        Predictor(encoder, head, config=PredictConfig(whole=True, max_side=side, overlap=24))
        .predict(image)
        for side in (512, 70)
    )  # fmt: skip
    assert network.largest >= max(shape)  # the first was not tiled
    assert whole.classes.shape == shape
    assert tiled.classes.tolist() == whole.classes.tolist()
    assert len(np.unique(whole.classes)) > 1
    assert tiled.saliency == pytest.approx(whole.saliency, abs=1e-6)
    assert tiled.vector == pytest.approx(whole.vector, abs=1e-5)
    assert whole.vector is not None
    assert np.abs(whole.vector).sum() > 0
    assert tiled.embedding is not None
    assert tiled.embedding.shape == (3, -(-shape[0] // 8), -(-shape[1] // 8))
    np.testing.assert_array_equal(tiled.embedding, whole.embedding)
    network.largest = 0
    Predictor(encoder, head, config=PredictConfig(whole=True, max_side=70, overlap=24)).predict(
        image
    )
    assert network.largest <= 72


@pytest.mark.parametrize("stride", [8, 16])
def test_cores_of_tiles_cover_an_axis_once(stride: int) -> None:
    for length in (1, 63, 64, 65, 100, 128, 257, 1000):
        for side, overlap in ((64, 0), (64, 32), (100, 20)):
            found = spans(length, side, overlap, stride)
            assert [span.first for span in found[1:]] == [span.last for span in found[:-1]]
            assert (found[0].first, found[-1].last) == (0, length)
            for span in found:
                assert 0 <= span.start <= span.first < span.last <= span.stop <= length
                assert span.stop - span.start <= side
                assert span.start % stride == 0
            for one, after in itertools.pairwise(found):
                assert one.stop - after.start >= overlap


def test_many_classes_are_compared_a_few_at_a_time() -> None:
    logits = torch.randn(1, 37, 5, 6, generator=torch.Generator().manual_seed(0))
    logits[0, 7] = logits[0, 30] = 9  # the first of equals wins
    logits[0, 7, 2:] = -9
    at_once = largest_channel(logits, (33, 52))
    in_parts = largest_channel(logits, (33, 52), at_once=5 * 33 * 52)
    assert at_once.tolist() == in_parts.tolist()
    assert set(np.unique(at_once)) == {7, 30}


def image_file(path: Path, mode: str, size: tuple[int, int], **options: Any) -> None:
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4)).astype(np.uint8)
    if mode == "I;16":
        Image.fromarray(values[..., 0].astype(np.uint16) * 257).save(path)
        return
    picture = Image.fromarray(values[..., :3]).convert(mode)
    picture.save(path, **options)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


KINDS: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "one.png": ("RGB", (1, 1), {}),
    "thin.png": ("RGB", (1, 300), {}),
    "grey.png": ("L", (30, 20), {}),
    "rgba.png": ("RGBA", (30, 20), {}),
    "cmyk.jpg": ("CMYK", (30, 20), {}),
    "turned.jpg": ("RGB", (20, 30), {"exif": exif(6)}),
    "deep.png": ("I;16", (30, 20), {}),
    "palette.png": ("P", (30, 20), {}),
    "deflated.tif": ("RGB", (30, 20), {}),
}


@pytest.mark.parametrize("whole", [False, True])
def test_images_of_any_kind_and_damaged_ones(tmp_path: Path, whole: bool) -> None:
    source, target = tmp_path / "in" / "deep" / "er", tmp_path / "out"
    source.mkdir(parents=True)
    target.mkdir()
    for name, (mode, size, options) in KINDS.items():
        image_file(source / name, mode, size, **options)
    (source / "cut.jpg").write_bytes((source / "turned.jpg").read_bytes()[:400])
    (source / "text.png").write_bytes(b"no image")
    (source / "gone.jpg").symlink_to("nowhere")
    (source / "notes.txt").write_text("not looked at")
    predictor = Predictor(random_encoder(), config=PredictConfig(size=SIZE, whole=whole))
    found = find_pictures([str(tmp_path / "in")], target)
    written = outputs(target, None, *OUTPUT_KINDS)
    assert predict_files(predictor, found, written, ALONE, 4) == Counts(len(KINDS), 0, 3)
    for name, (_, (width, height), options) in KINDS.items():
        stem = Path(name).stem
        size = (height, width) if options else (width, height)
        for kind in ("colour", "index", "overlay", "saliency", "imagenet-s"):
            suffix = "jpg" if kind == "overlay" else "png"
            picture = Image.open(target / kind / "deep" / "er" / f"{stem}.{suffix}")
            assert picture.size == size, (name, kind)
        arrays = np.load(target / "embedding" / "deep" / "er" / f"{stem}.npz")
        assert arrays["size"].tolist() == [*size[::-1]]
        assert str(arrays["key"]) == f"deep/er/{stem}"
        assert np.isfinite(arrays["embedding"]).all()
        assert len(arrays["embedding"]) == len(arrays["vector"]) == 6
    failures = [json.loads(line) for line in (target / "failures.jsonl").read_text().splitlines()]
    assert [Path(one["path"]).name for one in failures] == ["cut.jpg", "gone.jpg", "text.png"]
    assert all(one["reason"] for one in failures)
    assert not [path for path in target.rglob("*") if path.name.startswith(".")]
    for name in ("cut.jpg", "gone.jpg", "text.png"):
        (source / name).unlink()
    again = find_pictures([str(tmp_path / "in")], target)
    assert predict_files(predictor, again, written, ALONE) == Counts(0, len(KINDS), 0)
    assert not (target / "failures.jsonl").exists()


def test_rotated_and_deep_images_are_read_as_shards_hold_them(tmp_path: Path) -> None:
    image_file(tmp_path / "plain.jpg", "RGB", (20, 30))
    image_file(tmp_path / "turned.jpg", "RGB", (20, 30), exif=exif(6))
    plain, turned = (read_picture(str(tmp_path / f"{name}.jpg")) for name in ("plain", "turned"))
    assert turned.tolist() == np.rot90(plain, -1).tolist()
    image_file(tmp_path / "deep.png", "I;16", (20, 30))
    deep = np.asarray(Image.open(tmp_path / "deep.png"))
    assert read_picture(str(tmp_path / "deep.png"))[..., 1].tolist() == (deep >> 8).tolist()
    with pytest.raises(SampleError, match="no such file"):
        read_picture(str(tmp_path / "missing.png"))


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def named(root: Path, *arguments: str, output: str = "out") -> dict[str, str]:
    found = find_pictures([str(root / one) for one in arguments], root / output)
    return {str(Path(one.path).relative_to(root)): one.name for one in found}


def test_names_mirror_the_folders_and_never_meet(tmp_path: Path) -> None:
    touch(
        tmp_path, *(f"a/{name}" for name in ("x.jpg", "x.png", "x.jpg.png", "sub/x.jpg", ".h.jpg"))
    )
    touch(tmp_path, "b/x.jpg", "a/colour/y.png", "a/note.txt", "a/way.gif", f"b/{'n' * 240}.jpg")
    assert named(tmp_path, "a") == {
        "a/colour/y.png": "colour/y",
        "a/sub/x.jpg": "sub/x",
        "a/way.gif": "way",
        "a/x.jpg": "x.jpg-2",
        "a/x.jpg.png": "x.jpg",
        "a/x.png": "x.png",
    }
    both = named(tmp_path, "a", "b", "b/x.jpg")
    assert len(set(both.values())) == len(both) == 8
    assert both["b/x.jpg"] == "b/x"
    assert max(len(name.encode()) for name in both.values()) < 210
    assert named(tmp_path, "a/**/x.jpg") == {"a/sub/x.jpg": "sub/x", "a/x.jpg": "x"}
    assert named(tmp_path, "a/s*") == {"a/sub/x.jpg": "sub/x"}
    assert named(tmp_path, "a/note.txt") == {"a/note.txt": "note"}
    assert named(tmp_path, "a/sub/x.jpg", "b/x.jpg") == {"a/sub/x.jpg": "a/sub/x", "b/x.jpg": "b/x"}
    # what was predicted before is not predicted again
    assert "a/colour/y.png" not in named(tmp_path, ".", output="a")
    for arguments, message in (
        (("c",), "no file, folder or pattern"),
        (("c*.jpg",), "no file is called"),
        (("out",), "is a folder of images itself"),
        (("empty",), "holds no image"),
    ):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            named(tmp_path, *arguments)


def decoded(data: bytes) -> tuple[str, NDArray[Any]]:
    picture = Image.open(io.BytesIO(data))
    return picture.mode, np.asarray(picture)


def test_class_maps_as_files() -> None:
    classes = np.array([[0, 1, 15], [20, -1, 2]], np.int16)
    mode, values = decoded(colour_png(classes, Palette, 21))
    assert (mode, values.tolist()) == ("P", [[0, 1, 15], [20, 255, 2]])
    colours = Image.open(io.BytesIO(colour_png(classes, Palette, 21))).convert("RGB")
    assert colours.getpixel((2, 0)) == (192, 128, 128)  # PASCAL's person
    assert colours.getpixel((1, 1)) == (224, 224, 192)  # and its void
    mode, values = decoded(index_png(classes, 21))
    assert (mode, values.tolist()) == ("L", [[0, 1, 15], [20, 255, 2]])
    many = np.array([[0, 919, -1, 256]], np.int16)
    assert decode_label(index_png(many, 920)).tolist() == many.tolist()
    mode, values = decoded(index_png(many, 920))
    assert values.tolist() == [[0, 919, 65535, 256]]
    mode, values = decoded(colour_png(many, Palette, 920))
    assert mode == "RGB"
    assert values[0].tolist() == [*Palette[[0, 919]].tolist(), [224] * 3, Palette[256].tolist()]
    assert decode_annotation(imagenet_s_png(many), 920).tolist() == [[0, 919, 65535, 256]]
    assert decoded(imagenet_s_png(many))[1][0, 1].tolist() == [919 % 256, 919 // 256, 0]


def test_overlays_are_painted_in_strips_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluation import predict_outputs

    image = np.full((40, 30, 3), 90, np.uint8)
    classes = np.zeros((40, 30), np.int16)
    classes[8:23, 5:20] = 3
    at_once = predict_outputs.overlay_file(image, classes, Palette)
    monkeypatch.setattr(predict_outputs, "_STRIP", 30 * 7)
    assert predict_outputs.overlay_file(image, classes, Palette) == at_once
    mode, painted = decoded(at_once)
    assert mode == "RGB"
    assert painted[14, 12, 0] > painted[14, 12, 2] + 20  # 128, 128, 0
    assert np.ptp(painted[35, 25].astype(int)) < 10


def test_nothing_is_written_through_a_link_out_of_the_output(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "out" / "index").mkdir(parents=True)
    (tmp_path / "out" / "index" / "sub").symlink_to(outside)
    prediction = Prediction(np.zeros((2, 2), np.int16), None, None, None)
    written = outputs(tmp_path / "out", None, "index")
    with pytest.raises(InputError, match="outside --output"):
        written.write(PictureFile("", "sub/x"), prediction, lambda: Palette[None], ("index",))
    assert not list(outside.iterdir())


def test_only_what_is_missing_is_written(folder: Path, tmp_path: Path) -> None:
    predictor = Predictor(random_encoder(), config=PredictConfig(size=16))
    found = find_pictures([str(folder)], tmp_path)[:3]
    both = outputs(tmp_path, None, "index", "colour")
    predict_files(predictor, found, both, ALONE)
    kept, gone = both.path(found[0], "colour"), both.path(found[1], "colour")
    kept.write_bytes(b"mine")
    gone.unlink()
    assert predict_files(predictor, found, both, ALONE) == Counts(1, 2, 0)
    assert kept.read_bytes() == b"mine"
    assert gone.is_file()
    assert predict_files(predictor, found, both, ALONE, overwrite=True) == Counts(3, 0, 0)
    assert kept.read_bytes() != b"mine"


def test_heads_that_do_not_fit_are_refused(scenes: ShardSet) -> None:
    head, _ = evaluated(scenes, "kmeans")
    pooled = Encoder(PooledNetwork(), step=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"network with 6 embeddings, .* has 3"):
        Predictor(pooled, head)
    blind = Encoder(PooledNetwork(), 1, frozenset(("backbone", "decoder", "embedding")))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no saliency head"):
        Predictor(blind)
    with pytest.raises(InputError, match="no saliency head"):
        Predictor(blind, clusters_head("kmeans"))
    found = Predictor(blind, clusters_head("pixel-kmeans")).predict(
        np.full((9, 9, 3), 200, np.uint8)
    )
    assert found.saliency is None
    assert found.vector is not None
    assert np.linalg.norm(found.vector) == pytest.approx(1)
    with pytest.raises(InputError, match=r"uint8 \[H, W, 3\]"):
        Predictor(pooled).predict(np.zeros((4, 4), np.uint8))


def test_legend_shows_each_class_in_its_colour() -> None:
    names = tuple(f"class {i}" for i in range(40))
    values = np.asarray(legend(names, Palette)).reshape(-1, 3)
    for index in (0, 5, 39):
        assert (values == Palette[index]).all(1).sum() > 200


def on_rank(ranks: Ranks, folder: str, output: str) -> tuple[Counts, int]:
    predictor = Predictor(random_encoder(), config=PredictConfig(size=16))
    found = find_pictures([folder], Path(output))
    counts = predict_files(predictor, found, outputs(Path(output), None, "index"), ranks, 2, 1)
    return counts, len(list(Path(output).glob("index/*")))


@pytest.mark.slow
def test_ranks_share_the_images(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for path in folder.iterdir():
        (source / path.name).symlink_to(path)
    for name in ("bad1.png", "bad2.png"):
        (source / name).write_bytes(b"no image")
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        found = run_on_ranks(on_rank, count, str(source), str(tmp_path / str(count)))
        assert found == [(Counts(8, 0, 2), 8)] * count
    alone, shared = (
        {path.name: path.read_bytes() for path in (tmp_path / count).rglob("*.*") if path.is_file()}
        for count in ("1", "2")
    )
    assert alone == shared
    assert len(alone["failures.jsonl"].splitlines()) == 2


@pytest.fixture(scope="module")
def run(scenes: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory at step 3."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run.mkdir()
    small = ["model.decoder_channels=16", "model.embedding_dim=6", "model.atrous_rates=[1,2,3]"]
    config = load_config("demo_cpu", None, small)
    save_config(config, run / "config.yaml")
    writer = CheckpointWriter(run, ALONE, 1, 0)
    state = network_state(initial_network(config), "model")
    writer.start(3, state, {}, {"progress": {"step": 3}})
    while writer.step is not None:
        writer.wait()
        writer.advance(writer.busy, bool(writer.failure))
    return run


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`maskbank predict …` in this process: exit status, and all that it said."""

    def call(*arguments: object) -> tuple[int, str]:
        threads = torch.get_num_threads()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), "--device", "cpu"])
        torch.set_num_threads(threads)
        said = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, said.out + said.err

    return call


@pytest.mark.slow
def test_command(
    run: Path, scenes: ShardSet, folder: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    given = (run, folder, "--output", out, "--size", 16)
    status, said = command(*given)
    assert status == 0, said
    assert "8 predicted" in said
    assert len(list((out / "colour").iterdir())) == len(list((out / "overlay").iterdir())) == 8
    record = json.loads((out / "classes.json").read_text())
    assert [one["name"] for one in record["classes"]] == ["background", "object"]
    assert (out / "legend.png").is_file()
    assert "8 there already" in command(*given)[1]
    # another head, and one that is of another step
    assert record["made_by"]["resize"] == "opencv"
    head, _ = evaluated(scenes, "kmeans")
    default = run / "evaluation" / "kmeans-trained.safetensors"
    head.write(default)
    status, said = command(*given)
    assert status == 2
    assert "another head" in said
    status, said = command(*given, "--overwrite", "--write", "index, imagenet-s")
    assert (status, "8 predicted" in said) == (0, True)
    assert "class folders" not in (out / "imagenet-s" / "method.txt").read_text()
    record = json.loads((out / "classes.json").read_text())
    assert [one["name"] for one in record["classes"]] == list(scenes.classes)
    late = SavedHead(head.kind, head.tensors, head.classes, "", SIZE, HALVES, 9, "opencv")
    late.write(default)
    status, said = command(run, folder, "--output", tmp_path / "late")
    assert status == 2
    assert "at step 9" in said
    assert choose_head(load_encoder(run), run, "none", False) == (None, "none")
    default.unlink()
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    status, said = command(run, tmp_path / "bad.jpg", "--output", tmp_path / "bad")
    assert (status, "1 skipped" in said) == (1, True)
    for wrong, message in (
        (("--write", "gif"), "can be any of colour"),
        (("--own-classifier",), "no classifier of its own"),
        (("--max-side", 10), "at least 64"),
        (("--resize", "cubic"), "--resize is 'cubic'; it can be opencv, antialias, crop"),
        (("--resize", "antialias"), "resize, which would be mixed with these"),
        (("--head", tmp_path / "none"), "there is no file"),
    ):
        status, said = command(*given, *wrong)
        assert status == 2
        assert message in said


def test_the_classifier_of_a_probe(run: Path) -> None:
    network = load_encoder(run).network
    classifier = (torch.randn(21, 16, 1, 1), torch.zeros(21))
    parts: Any = frozenset(("backbone", "decoder"))
    encoder = Encoder(network, 0, parts, classifier)
    for own in (True, False):  # there is nothing else
        head, _ = choose_head(encoder, Path("probe.pth"), None, own)
        assert head is not None
        assert (head.kind, head.classes[15], head.data_set) == ("linear", "person", "voc")
    found = Predictor(encoder, head, config=PredictConfig(size=24))
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    assert len(np.unique(found.predict(image).classes)) > 1
    both = Encoder(network, 0, classifier=classifier)
    assert choose_head(both, Path("probe.pth"), None, False)[0] is None
