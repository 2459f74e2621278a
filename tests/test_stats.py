"""What `maskbank shards stats` counts equals what was packed; the page is whole and safe."""

import base64
import io
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.build_config import BuildConfig
from data_pipeline.errors import InputError
from data_pipeline.index import DatasetIndex
from data_pipeline.inspect_cli import add_commands
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.quarantine import quarantine_samples
from data_pipeline.sources.item import Listing
from data_pipeline.stats import AREA_EDGES, collect_stats, draw_mask, quantiles, summary_rows
from data_pipeline.stats_page import histogram, write_page
from data_pipeline.verify import verify_shards
from data_pipeline.write_shards import build_shards
from tests.sample_data import BytesItem, build_scene_shards, encode, flip_byte, picture

CLASSES = ("background", "<b>bold</b>", "never seen")


def known_items() -> list[BytesItem]:
    """Sizes, objects and classes that one can count by hand."""
    items = []
    for number, (height, width, areas) in enumerate(
        [(10, 20, [1, 20]), (10, 40, [200]), (20, 20, []), (10, 10, [1, 1, 1, 10])]
    ):
        flat = np.zeros(height * width, np.uint8)
        places = np.cumsum([0, *areas])
        for proposal, (start, end) in enumerate(pairwise(places.tolist())):
            flat[start:end] = proposal + 1
        flat[-5:] = 255
        mask = flat.reshape(height, width)
        label = np.where(mask == 255, 255, (mask > 0) & (number < 2)).astype(np.uint8)
        image = encode(picture(number, height, width), ["JPEG", "PNG"][number % 2])
        items.append(BytesItem(f"k{number}", image, encode(mask), encode(label)))
    return items


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("known")
    manifest = build_shards(Listing(known_items(), CLASSES), root, BuildConfig(3, "ids", -1))
    assert manifest is not None
    return manifest


def test_counts_equal_those_made_by_hand(known: Manifest) -> None:
    found = collect_stats(known.root, sample=0).measures
    assert found.widths == {20: 2, 40: 1, 10: 1}
    assert found.heights == {10: 3, 20: 1}
    assert found.pixels == {200: 1, 400: 2, 100: 1}
    assert found.formats == {"jpg": 2, "png": 2}
    assert found.proposals == {2: 1, 1: 1, 0: 1, 4: 1}
    assert (found.objects, found.without_objects) == (7, 1)
    assert (found.decoded, found.unreadable, found.unusable_shards) == (4, 0, 0)
    shares = [0.005, 0.1, 0.5, 0.01, 0.01, 0.01, 0.1]
    bins = Counter(sum(edge < share for edge in AREA_EDGES) for share in shares)
    assert +found.areas == bins
    assert found.covered == {round(100 * 21 / 200): 1, 50: 1, 0: 1, 13: 1}
    assert (found.ignored, found.mask_pixels) == (20, 1100)
    assert found.class_images == {0: 4, 1: 2}
    assert found.class_pixels == {0: 1100 - 20 - 221, 1: 221}
    sizes = sum(sum(map(len, (item.raw.image,))) for item in known_items())
    assert found.bytes["image"] == sizes


def test_the_table_says_so(known: Manifest) -> None:
    rows = dict(summary_rows(collect_stats(known.root, sample=0)))
    assert rows["samples"] == "4"
    assert rows["shards"].startswith("2, ")
    assert rows["formats"] == "jpg 2, png 2"
    assert rows["width, pixels"].startswith("10 10 20 20 40 40 40  (")
    assert rows["without objects"] == "1 (25.0%)"
    assert rows["objects an image"] == "1.75, at most 4"
    assert rows["decoded"] == "4, 0 could not be"
    assert rows["class 1 <b>bold</b>"] == "2 images, 20.46% of pixels"
    assert rows["class 2 never seen"] == "0 images, 0.00% of pixels"


def test_quantiles() -> None:
    assert quantiles(Counter(range(101))) == [0, 5, 25, 50, 75, 95, 100]
    assert quantiles(Counter({7: 3})) == [7] * 7
    assert quantiles(Counter({1: 1, 1000: 1}))[0::6] == [1, 1000]


def test_histograms_hold_every_value_once() -> None:
    draw = np.random.default_rng(0)
    for low, high, unit in (
        (0, 1, 1),
        (5, 5, 1),
        (16, 32, 1),
        (100, 99_999, 100),
        (1, 10**8, 10**6),
    ):
        values = Counter(
            (draw.integers(low, high + 1, 500) // unit * unit + (low if unit == 1 else 0)).tolist()
        )
        chart = histogram("t", "n", values, unit)
        counts = [int(bar["text"].split(": ")[1].split(" (")[0]) for bar in chart["bars"]]
        assert sum(counts) == chart["total"] == 500
        assert len(counts) <= 31
        ends = [bar["x"] + bar["width"] for bar in chart["bars"]]
        assert max(ends) <= 360
        assert min(bar["y"] for bar in chart["bars"]) == pytest.approx(16)


def test_a_draw_is_seeded_and_stays_in_its_bounds(tmp_path: Path) -> None:
    build_scene_shards(tmp_path, 20, size=24, samples_per_shard=6)
    first = collect_stats(tmp_path, sample=7, seed=1, pictures=3)
    assert (first.measures.decoded, len(first.measures.pictures)) == (7, 3)
    assert collect_stats(tmp_path, sample=7, seed=1, pictures=3) == first
    assert collect_stats(tmp_path, sample=7, seed=1, pictures=3, processes=2) == first
    other = collect_stats(tmp_path, sample=7, seed=2, pictures=3)
    assert other.measures.pictures != first.measures.pictures
    assert other.measures.widths == first.measures.widths  # of all samples, whatever is drawn
    everything = collect_stats(tmp_path, sample=0, pictures=50)
    assert (everything.measures.decoded, len(everything.measures.pictures)) == (20, 20)
    assert collect_stats(tmp_path, sample=999, pictures=50) == everything


def test_damage_is_counted(tmp_path: Path) -> None:
    manifest = build_scene_shards(tmp_path, 12, size=24, samples_per_shard=4)
    place = DatasetIndex(manifest).shard(0).extent(1, "mask.png")
    assert place is not None
    flip_byte(tmp_path / "shard-000000.tar", place[0] + 40)
    (tmp_path / "shard-000001.json").unlink()
    found = collect_stats(tmp_path, sample=0, pictures=12).measures
    assert (found.unusable_shards, found.decoded, found.unreadable) == (1, 7, 1)
    assert (found.widths.total(), len(found.pictures)) == (8, 7)
    quarantine_samples(tmp_path, verify_shards(tmp_path))
    stats = collect_stats(tmp_path, sample=0)
    assert dict(summary_rows(stats))["in quarantine"] == "1"
    assert (stats.measures.unusable_shards, stats.measures.decoded) == (0, 11)
    for entry in read_manifest(tmp_path).shards:
        (tmp_path / entry.index).unlink()
    with pytest.raises(InputError, match="not one shard index in"):
        collect_stats(tmp_path)


def test_a_mask_is_drawn_where_it_is() -> None:
    image = np.full((6, 8, 3), 100, np.uint8)
    mask = np.zeros((6, 8), np.uint8)
    mask[2:5, 2:7] = 1
    mask[5] = 255
    drawn = draw_mask(image, mask)
    np.testing.assert_array_equal(drawn[:2, :2], image[:2, :2])
    assert (drawn[3, 3] != 100).any()
    assert len(set(drawn[5, 3].tolist())) == 1 or (drawn[5, 3] == 255).all()
    assert (drawn[2, 3] == 255).all()  # outlined


# ---------------------------------------------------------------- the page


class Page(HTMLParser):
    """Tags, text, and every address that the page asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escapes_names(known: Manifest, tmp_path: Path) -> None:
    target = tmp_path / "new" / "stats.html"
    write_page(collect_stats(known.root, sample=0, pictures=4), target)
    text = target.read_text()
    page = Page(text)
    assert page.tags["script"] == page.tags["link"] - 1 == page.tags["b"] - page.tags["svg"] == 0
    assert page.tags["img"] == 4
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "<b>bold</b>" in page.text
    assert "20.46" in page.text
    for source in page.sources[1:]:
        data = base64.b64decode(source.partition("base64,")[2])
        assert Image.open(io.BytesIO(data)).format == "JPEG"
    assert list(target.parent.iterdir()) == [target]


def test_a_page_without_masks_and_labels(tmp_path: Path) -> None:
    items = [BytesItem("only", encode(picture()))]
    assert build_shards(Listing(items), tmp_path / "shards", BuildConfig()) is not None
    stats = collect_stats(tmp_path / "shards", pictures=5)
    write_page(stats, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "No sample has a mask" in page.text
    assert (page.tags["img"], page.tags["svg"]) == (1, 3)
    assert dict(summary_rows(stats))["with masks"] == "0"


def test_the_command_prints_a_table_and_writes_the_page(known: Manifest, tmp_path: Path) -> None:
    shutil.copytree(known.root, tmp_path / "shards")
    app = typer.Typer()
    add_commands(app)
    arguments = ["stats", str(tmp_path / "shards"), "--html", str(tmp_path / "s.html")]
    done = CliRunner().invoke(app, [*arguments, "--pictures", "2", "-p", "1"])
    assert done.exit_code == 0, done.output
    assert "1.75, at most 4" in done.output
    assert f"written: {tmp_path / 's.html'}\n" in done.output
    assert Page((tmp_path / "s.html").read_text()).tags["img"] == 2
