"""The page about a run: its numbers, its pictures, and what it does with untrusted text."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import InputError
from evaluation.report import write_report
from evaluation.report_data import (
    MAX_EXAMPLES,
    Evaluation,
    read_evaluation,
    read_examples,
    read_metrics,
)
from evaluation.report_figures import (
    MAX_CLASSES,
    MAX_PICTURE,
    VOID,
    chart,
    class_palette,
    colour_segments,
    compact,
    nice_ticks,
    outlined,
    overlay,
    png_data_uri,
)
from evaluation.report_tables import (
    MAX_CONFUSION,
    class_rows,
    confusion_grid,
    duration,
    network_order,
    summary_rows,
)

SIZE = 8
HOSTILE = "<script>alert('x')</script>"
ATTRIBUTE = '" onload="alert(1)'
CURVE = ("loss", "Loss", "note", 1.0, "")
EXTERNAL = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def evaluation(protocol: str, network: str, names: list[str], mean: float) -> dict[str, Any]:
    """A result file: the last class is absent, a fifth of class 1 is called class 0."""
    count = len(names)
    confusion = (np.eye(count, dtype=int) * 100).tolist()
    confusion[1][:2] = [20, 80]
    confusion[-1] = [0] * count
    iou: list[float | None] = [mean + i for i in range(count - 1)]
    return {
        "protocol": protocol,
        "network": network,
        "step": 300,
        "miou": {"mean": mean, "std": 1.06, "values": [mean - 0.75, mean + 0.75]},
        "foreground_iou": 71.26 if network == "trained" else 22.04,
        "pixel_accuracy": 88.88,
        "per_class": [
            {"class": name, "iou": value, "pixels": 100}
            for name, value in zip(names, [*iou, None], strict=True)
        ],
        "confusion": confusion,
        "images": 1449,
        "seconds": 65.0,
        "options": {HOSTILE: HOSTILE, "clusters": count},
    }


def write_examples(path: Path, keys: list[str], size: int = SIZE) -> None:
    shape = (len(keys), size, size)
    rng = np.random.default_rng(0)
    label = np.zeros(shape, np.int16)
    label[:, : size // 2] = 1
    label[:, -1] = -1
    np.savez(
        path,
        key=np.array(keys),
        image=rng.integers(0, 255, (*shape, 3), dtype=np.uint8),
        mask=(label == 1).astype(np.uint8),
        saliency=np.full(shape, 0.5, np.float32),
        clusters=np.full(shape, 2, np.int16),
        label=label,
        embedding_rgb=np.zeros((*shape, 3), np.uint8),
    )


def metric(step: int, **more: float) -> str:
    entry: dict[str, float] = {
        "step": step, "epoch": step / 100, "loss": 3.0 - step / 200, "loss_contrastive": 2.0,
        "loss_saliency": 0.25, "accuracy": 0.625, "lr": 0.004, "images_per_second": 1234.4,
        "data_wait": 0.031, "memory_mb": 2048.0, "bank_fill": 1.0, "seconds": 25.0 * step,
    }  # fmt: skip
    return json.dumps(entry | more)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run named `shapes`, with hostile text wherever text comes from a file."""
    run = tmp_path / "shapes"
    (run / "evaluation").mkdir(parents=True)
    (run / "config.yaml").write_text(f"note: {HOSTILE}\nurl: http://example.org\n")
    lines = [metric(100), metric(200), metric(300)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 400, "lo']))
    (run / "environment.json").write_text(json.dumps({"torch": "2.9", HOSTILE: ATTRIBUTE}))
    names = ["background", HOSTILE, ATTRIBUTE, "void & co"]
    means = {"kmeans": (4.44, 43.21), "linear": (9.87, 61.04)}
    for protocol, pair in means.items():
        for network, mean in zip(("initial", "trained"), pair, strict=True):
            payload = evaluation(protocol, network, names, mean)
            (run / "evaluation" / f"{protocol}-{network}.json").write_text(json.dumps(payload))
    for network in ("initial", "trained"):
        write_examples(run / "evaluation" / f"examples-{network}.npz", ["one", HOSTILE + ATTRIBUTE])
    return run


def decode(uri: str) -> Image.Image:
    assert uri.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_page_shows_the_numbers_of_the_run(run: Path) -> None:
    assert write_report(run) == run / "report.html"
    text = Page(run / "report.html").text
    for shown in (
        "shapes",
        "43.2 % ± 1.1 over 2 runs",
        "The same network before training: 4.4 %.",
        "61.0 %",
        "The same network before training: 9.9 %.",
        "71.3 % Overlap of all that is called object",
        "Before training: 22.0 %.",
        "1,234 images/s Median over the run. 3.1 % of a step",
        "Steps 300 Updates of the weights, 3.0 passes over the pictures. Final loss 1.500.",
        "Wall time 2 h 05 min",
        "1 unreadable line of the log left out.",
        "62.5%",
        "1,449",
        "1 min 05 s",
        "torch 2.9",
    ):
        assert shown in text, shown
    assert f"{HOSTILE} called background 20.0 %" in text


def test_page_refers_to_nothing_outside_itself(run: Path) -> None:
    page = Page(write_report(run))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "base", "form"}
    links = [
        value for _, attributes in page.tags for k, value in attributes.items() if k in EXTERNAL
    ]
    assert links
    assert all(link.startswith("data:") for link in links)
    style = "".join(re.findall(r"<style>.*?</style>", page.source, re.DOTALL))
    assert "url(" not in style
    assert "@import" not in style
    assert page.source.count("http://") == 1  # the configuration's, as text
    policy = page.attributes("meta")[2]
    assert policy["content"].startswith("default-src 'none'")


def test_hostile_text_stays_text(run: Path) -> None:
    page = Page(write_report(run))
    assert "<script" not in page.source
    assert page.text.count(HOSTILE) > 8
    assert f"{HOSTILE} {ATTRIBUTE}" in page.text  # key and value of the environment
    names = {name for _, attributes in page.tags for name in attributes}
    assert not any(name.startswith("on") for name in names)
    assert any(HOSTILE in image["alt"] for image in page.attributes("img"))


def test_every_picture_decodes_and_has_a_text(run: Path) -> None:
    images = Page(write_report(run)).attributes("img")
    assert len(images) == 2 * (3 + 2 * 3)  # two rows; three cells of each network
    assert all(image["alt"] for image in images)
    assert {decode(image["src"]).size for image in images} == {(SIZE, SIZE)}
    assert images[4]["alt"].startswith("Clusters in one, trained network")


def test_tables_have_scopes_and_the_switch_has_two_networks(run: Path) -> None:
    page = Page(write_report(run))
    assert all(header.get("scope") in ("col", "row") for header in page.attributes("th"))
    radios = [i for i in page.attributes("input") if i["type"] == "radio"]
    assert [radio["id"] for radio in radios] == ["show-0", "show-1"]
    widths = re.findall(r"width:([\d.]+)%\"", page.source)
    assert {"43.2", "4.4", "61.0", "9.9"} <= set(widths)


def test_only_the_configuration_is_required(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    output = tmp_path / "pages" / "deep" / "page.html"
    assert write_report(tmp_path, output) == output
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    text = Page(output).text
    assert "seed: 1" in text
    assert text.count("Not evaluated yet.") == 2
    assert "This run has no example pictures." in text
    assert "This run has no training log." in text
    assert "Wall time not recorded" in text


@pytest.mark.parametrize(
    "kept", ["kmeans-initial.json", "linear-trained.json", "examples-initial.npz"]
)
def test_parts_of_an_evaluation_are_enough(run: Path, kept: str) -> None:
    for path in (run / "evaluation").iterdir():
        if path.name != kept:
            path.unlink()
    page = Page(write_report(run))
    assert not page.attributes("input")
    assert ("absent" in page.text) == kept.endswith("json")
    assert len(page.attributes("img")) == (12 if kept.endswith("npz") else 0)


def test_results_of_a_foreign_checkpoint_are_enough(tmp_path: Path) -> None:
    names = ["background", "cat", "dog"]
    for data_set, protocol, network in (
        ("voc", "kmeans", HOSTILE[:7]),
        ("voc", "kmeans-many-500", "moco"),
        (ATTRIBUTE[:9], "made-up", "moco"),
    ):
        folder = tmp_path / "evaluation" / data_set
        folder.mkdir(parents=True, exist_ok=True)
        payload = evaluation(protocol, network, names, 30.0) | {
            "metrics": {"J & F": [70.0, None, 72.0]},
            "published": [{"what": "MaskContrast", "value": 35.0, "metric": "mIoU"}],
        }
        (folder / f"{protocol}-{network}.json").write_text(json.dumps(payload))
    page = Page(write_report(tmp_path))
    for shown in (
        "PASCAL VOC 2012",
        "Over-clustering, each cluster its class of largest IoU, K = 500",
        "30.0 ± 1.1 (2)",
        "71.0 ± 1.4 (2)",
        "35.0 MaskContrast",
        "Made-up",
        HOSTILE[:7],
    ):
        assert shown in page.text, shown
    for absent in ("Training", "Wall time", "Configuration", "no training log"):
        assert absent not in page.text
    assert not page.attributes("pre")


def test_a_directory_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.yaml and no evaluation/"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("environment.json", "[1]"),
        ("evaluation/kmeans-trained.json", "{"),
        ("evaluation/kmeans-trained.json", "{}"),
        ("evaluation/kmeans-trained.json", '{"network": "initial"}'),
        ("evaluation/kmeans-trained.json", '{"miou": {"mean": 1}, "per_class": 3}'),
        ("evaluation/examples-trained.npz", "PK torn"),
    ],
)
def test_a_broken_file_is_named(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(Path(name).name)):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_page_that_cannot_be_finished_leaves_the_old_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_report(run).read_text()
    (run / "config.yaml").write_text("other: 1\n")

    def full_disk(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_text() == old
    assert not list(run.glob("*.part")) + list(run.glob(".*"))


def test_a_result_under_another_name_is_refused(run: Path) -> None:
    folder = run / "evaluation"
    (folder / "kmeans-initial.json").rename(folder / "kmeans-trained.json")
    with pytest.raises(InputError, match="holds kmeans-initial"):
        write_report(run)


def test_confusion_must_fit_its_classes(run: Path) -> None:
    path = run / "evaluation" / "kmeans-trained.json"
    payload = json.loads(path.read_text())
    path.write_text(json.dumps(payload | {"confusion": [[1, 2], [3, 4]]}))
    with pytest.raises(InputError, match=r"\(2, 2\) for 4 classes"):
        read_evaluation(path)


def test_examples_are_checked_and_limited(tmp_path: Path) -> None:
    path = tmp_path / "examples.npz"
    write_examples(path, [str(i) for i in range(MAX_EXAMPLES + 3)])
    arrays: dict[str, Any] | None = read_examples(path)
    assert arrays is not None
    assert {len(array) for array in arrays.values()} == {MAX_EXAMPLES}
    np.savez(path, **(arrays | {"label": arrays["label"].astype(np.float32)}))
    with pytest.raises(InputError, match="label is float32"):
        read_examples(path)
    np.savez(path, **(arrays | {"key": np.array([object()] * MAX_EXAMPLES)}))
    with pytest.raises(InputError, match="allow_pickle"):
        read_examples(path)


def test_metrics_tolerate_tears_repeats_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 20, "lr": 1}', "7", '{"lr": 2}', '{"step": 10}', '{"step": 20, "lr": 3}']
    path.write_text("\n".join([*lines, '{"step": 3']))
    assert read_metrics(path) == ([{"step": 10}, {"step": 20, "lr": 3}], 3)
    assert read_metrics(tmp_path / "none") == ([], 0)


def test_chart_keeps_what_was_logged() -> None:
    entries = [{"step": 10 * i, "loss": float(i)} for i in range(1, 1001)]
    drawn = chart([*entries, {"step": 10_010}, {"step": 10_020, "loss": float("nan")}], CURVE)
    assert drawn["latest"] == "1k"
    assert drawn["skipped"] == 1
    assert len(drawn["hits"]) == 120
    assert drawn["hits"][0]["text"] == "5 at 50"  # mean of the first nine
    assert drawn["band"].endswith("Z")
    assert [label for _, label in drawn["y_ticks"]] == ["0", "250", "500", "750", "1k"]
    single = chart([{"step": 5, "loss": 2.0}], CURVE)
    assert single["latest"] == "2"
    assert not single["band"]
    assert len(single["hits"]) == 1
    assert chart([{"step": 5}], CURVE)["latest"] == ""


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (451, 649, [450, 500, 550, 600, 650]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_cover(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_numbers_as_text() -> None:
    assert [duration(s) for s in (None, 12, 200, 7500)] == [
        "not recorded", "12 s", "3 min 20 s", "2 h 05 min",
    ]  # fmt: skip
    assert [compact(v) for v in (0, 0.004, 2.5, 12_000, 3e6)] == ["0", "0.004", "2.5", "12k", "3M"]


def test_palette_is_that_of_pascal_voc() -> None:
    assert class_palette(5).tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128],
    ]  # fmt: skip
    full = class_palette(MAX_CLASSES)
    assert full.shape == (MAX_CLASSES, 3)
    assert full.dtype == np.uint8
    assert full[15].tolist() == [192, 128, 128]  # person
    assert full[VOID].tolist() == [224, 224, 224]
    assert len(np.unique(full[[*range(256), VOID]], axis=0)) == 257


def test_segments_are_painted_and_outlined() -> None:
    segments = np.zeros((6, 6), np.int16)
    segments[2:4, 2:4] = 1
    assert colour_segments(segments)[2, 2].tolist() == [128, 0, 0]
    painted = overlay(np.full((6, 6, 3), 100, np.uint8), segments, alpha=0.5)
    assert painted.shape == (6, 6, 3)
    assert painted.dtype == np.uint8
    assert painted[0, 0].tolist() == [113, 113, 113]
    assert painted[2, 2].tolist() == [114, 50, 50]
    assert painted[1, 2].tolist() == painted[3, 3].tolist() == [255, 255, 255]


def test_outlines_are_of_the_class_with_white_around() -> None:
    segments = np.zeros((12, 12), np.int16)
    segments[2:9, 2:9] = 1
    segments[11, 11] = VOID
    drawn = outlined(np.full((12, 12, 3), 100, np.uint8), segments)
    assert drawn[5].tolist() == [
        [colour] * 3 if isinstance(colour, int) else colour
        for colour in (100, 255, *[[128, 0, 0]] * 2, *[100] * 3, *[[128, 0, 0]] * 2, 255, 100, 100)
    ]
    assert drawn[11, 11].tolist() == [224] * 3


def test_pictures_are_reduced() -> None:
    picture = np.zeros((2 * MAX_PICTURE, 2 * MAX_PICTURE, 3), np.uint8)
    assert decode(png_data_uri(picture)).size == (MAX_PICTURE, MAX_PICTURE)
    assert decode(png_data_uri(picture[:3, :5, 0])).size == (5, 3)


def scores(network: str, iou: list[float | None], **more: Any) -> Evaluation:
    """A result of the classes a, b, c, of which b is absent."""
    count = len(iou)
    return Evaluation(
        **{
            "data_set": "", "protocol": "kmeans", "network": network, "measure": "mIoU",
            "step": None, "foreground_iou": None, "pixel_accuracy": None, "images": None,
            "seconds": None, "values": [10.0, 12.0], "metrics": {}, "published": [],
            "classes": [f"c{i}" for i in range(count)], "iou": iou,
            "pixels": [10.0, 0.0, 30.0][:count], "confusion": np.zeros((count, count), np.int64),
            "unmatched": np.zeros(count, np.int64), "options": {},
        }
        | more
    )  # fmt: skip


def test_classes_are_sorted_and_joined_by_name() -> None:
    rows = class_rows(
        [
            {"initial": scores("initial", [5.0, 6.0, 7.0]), "moco": scores("moco", [1, None, 2])},
            {"initial": scores("initial", [8.0, 9.0], protocol="linear")},
        ]
    )
    assert [row["name"] for row in rows] == ["c2", "c0", "c1"]
    assert rows[0]["share"] == 75.0
    assert rows[0]["colour"] == "rgb(0 128 0)"
    # now and before, in each column; the network before training alone is no trained one
    assert [row["cells"] for row in rows] == [
        [(2, 7.0), (None, None)],
        [(1, 5.0), (None, 8.0)],
        [(None, 6.0), (None, 9.0)],
    ]
    assert class_rows([]) == []


def test_every_figure_has_a_row() -> None:
    figures = {"pixel accuracy": [50.0, 52.0, 54.0], "F": []}
    published = [(44.2, "paper", "mIoU"), (8.8, "other", "pixel accuracy")]
    voc: dict[str, Any] = {"data_set": "voc", "metrics": figures, "published": published}
    evaluations = [scores("trained", [1.0], **voc), scores("a", [1.0], values=[3.0])]
    assert network_order(["initial", "b", "trained", "a"]) == ["trained", "a", "b", "initial"]
    rows = summary_rows(evaluations, ["trained", "a"])
    assert [(row["data_set"], row["measure"], row["main"]) for row in rows] == [
        ("PASCAL VOC 2012", "mIoU", True),
        ("PASCAL VOC 2012", "pixel accuracy", False),
        ("PASCAL VOC 2012", "F", False),
        ("", "mIoU", True),
    ]
    cells = [[cell and (cell.mean, cell.std, cell.count) for cell in row["cells"]] for row in rows]
    assert cells == [
        [(11.0, pytest.approx(2**0.5), 2), None],
        [(52.0, 2.0, 3), None],
        [None, None],
        [None, (3.0, None, 1)],
    ]
    assert [row["published"] for row in rows] == [[(44.2, "paper")], [(8.8, "other")], [], []]


def test_confusion_keeps_the_largest_classes() -> None:
    count = MAX_CONFUSION + 2
    counts = np.diag(np.arange(count)) * 100
    counts[5, 9] = 500
    grid = confusion_grid(scores("trained", [1.0] * count, confusion=counts, pixels=[1.0] * count))
    assert grid["names"][0] == "c2"
    assert len(grid["names"]) == MAX_CONFUSION
    assert grid["hidden"] == 2
    assert grid["mistakes"] == [("c5", "c9", 50.0)]


def test_pixels_without_a_class_are_part_of_their_row(run: Path) -> None:
    path = run / "evaluation" / "kmeans-trained.json"
    payload = json.loads(path.read_text())
    path.write_text(json.dumps(payload | {"unmatched": [0, 100, 0, 0]}))
    loaded = read_evaluation(path)
    assert confusion_grid(loaded)["mistakes"] == [(HOSTILE, "background", 10.0)]
    path.write_text(json.dumps(payload | {"unmatched": [1]}))
    with pytest.raises(InputError, match=r"unmatched is \(1,\) for 4 classes"):
        read_evaluation(path)


def test_ignored_pixels_are_no_proposal(run: Path) -> None:
    path = run / "evaluation" / "examples-trained.npz"
    arrays = dict(np.load(path))
    arrays["mask"][0, :2], arrays["mask"][0, 2:4], arrays["mask"][0, 4:] = 1, 3, 255
    np.savez(path, **arrays)
    images = Page(write_report(run)).attributes("img")
    assert images[1]["alt"] == "2 mask proposals of one"
