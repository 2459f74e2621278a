"""What a build can be asked for besides: nodes, appending, retrying, limits, duplicates, sizes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build_config import (
    BuildConfig,
    BuildOptions,
    parse_max_failures,
    parse_size,
)
from data_pipeline.dry_run import estimate
from data_pipeline.errors import InputError
from data_pipeline.index import DatasetIndex
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.quarantine import quarantine_samples
from data_pipeline.reader import SampleReader
from data_pipeline.sample import decode_grey, decode_rgb
from data_pipeline.sources.folder import list_folder
from data_pipeline.sources.generated import list_scenes
from data_pipeline.sources.item import Listing
from data_pipeline.verify import verify_shards
from data_pipeline.write_shards import build_shards
from tests.sample_data import (
    BytesItem,
    checksums,
    encode,
    flip_byte,
    folder_pair,
    object_mask,
    picture,
    write,
)

SCENES = 30


def scenes(output: Path, **options: Any) -> Manifest | None:
    return build_shards(
        list_scenes(SCENES, 0, 32), output, BuildConfig(4, "ids"), BuildOptions(**options)
    )


def item(key: str, number: int) -> BytesItem:
    return BytesItem(key, encode(picture(number), "JPEG", quality=90), encode(object_mask(number)))


def build(items: list[Any], output: Path, config: BuildConfig, **options: Any) -> Manifest:
    manifest = build_shards(Listing(items), output, config, BuildOptions(**options))
    assert manifest is not None
    return manifest


def keys(root: Path) -> list[str]:
    index = DatasetIndex(read_manifest(root))
    return [key for number in range(len(index.counts)) for key in index.shard(number).keys]


def failures(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "failures.jsonl").read_bytes().splitlines()]


# ---------------------------------------------------------------- nodes


@pytest.mark.slow
def test_two_nodes_of_three_processes_equal_one_process(tmp_path: Path) -> None:
    scenes(tmp_path / "one")
    assert scenes(tmp_path / "two", processes=3, node_rank=1, num_nodes=2) is None
    assert not (tmp_path / "two" / "manifest.json").exists()
    manifest = scenes(tmp_path / "two", processes=3, node_rank=0, num_nodes=2)
    assert manifest is not None
    assert manifest.samples == SCENES
    assert checksums(tmp_path / "two") == checksums(tmp_path / "one")
    assert not [name for name in os.listdir(tmp_path / "two") if name.startswith(".")]


def test_a_node_that_was_done_before_can_be_asked_again(tmp_path: Path) -> None:
    for rank in (2, 0, 2):
        assert scenes(tmp_path, node_rank=rank, num_nodes=3) is None
    assert scenes(tmp_path, node_rank=1, num_nodes=3) is not None
    assert scenes(tmp_path, node_rank=0, num_nodes=3) is not None
    assert scenes(tmp_path) is not None  # and so can one alone


def test_nodes_with_other_options_do_not_make_one_set(tmp_path: Path) -> None:
    assert scenes(tmp_path, node_rank=0, num_nodes=2) is None
    begun = (tmp_path / "build.json").read_bytes()
    (tmp_path / "build.json").unlink()
    for name in os.listdir(tmp_path):
        (tmp_path / name).rename(tmp_path.parent / name)
    build_shards(
        list_scenes(SCENES, 0, 32), tmp_path, BuildConfig(4, "auto"), BuildOptions(1, 1, 2)
    )
    for name in os.listdir(tmp_path.parent):
        if name.startswith("shard-"):
            (tmp_path.parent / name).rename(tmp_path / name)
    (tmp_path / "build.json").write_bytes(begun)
    with pytest.raises(InputError, match=r"of another build|of different builds"):
        scenes(tmp_path, node_rank=0, num_nodes=2)
    assert not (tmp_path / "manifest.json").exists()


def test_ranks_out_of_range_are_refused() -> None:
    for rank, nodes in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match="--node-rank is"):
            BuildOptions(node_rank=rank, num_nodes=nodes)


# ---------------------------------------------------------------- appending


def test_what_is_appended_comes_after_what_is_there(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path / "source", ["a", "b", "c"])
    output, config = tmp_path / "shards", BuildConfig(2)
    build_shards(list_folder(images, masks), output, config)
    before = checksums(output)
    folder_pair(tmp_path / "source", ["a", "b", "c", "d", "e"])
    with pytest.raises(InputError, match=r"gives 5 samples instead of 3.*--append"):
        build_shards(list_folder(images, masks), output, config)
    manifest = build_shards(list_folder(images, masks), output, config, BuildOptions(append=True))
    assert manifest is not None
    assert [entry.samples for entry in manifest.shards] == [2, 1, 2]
    after = checksums(output)
    assert {name: after[name] for name in before if name.startswith("shard")} == {
        name: value for name, value in before.items() if name.startswith("shard")
    }
    assert sorted(keys(output)) == ["a", "b", "c", "d", "e"]
    again = build_shards(list_folder(images, masks), output, config, BuildOptions(append=True))
    assert again == manifest
    assert checksums(output) == after


def test_appending_is_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no build yet"):
        build([item("a", 0)], tmp_path, BuildConfig(), append=True)
    build([item("a", 0)], tmp_path, BuildConfig())
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="is not finished"):
        build([item("a", 0), item("b", 1)], tmp_path, BuildConfig(), append=True)
    with pytest.raises(InputError, match="two things"):
        BuildOptions(append=True, retry_failed=True)


def test_keys_that_are_there_already_are_passed_over_or_given_a_prefix(tmp_path: Path) -> None:
    build([item("a", 0), item("b", 1)], tmp_path, BuildConfig())
    passed = []
    listing = Listing([item("a", 2), item("c", 3)])
    build_shards(
        listing,
        tmp_path,
        BuildConfig(),
        BuildOptions(append=True),
        lambda plan: passed.append(plan.passed_over) or (lambda done, failed: None),  # type: ignore
    )
    assert passed == [1]
    assert keys(tmp_path) == ["b", "a", "c"] or keys(tmp_path) == ["a", "b", "c"]
    build([item("a", 2)], tmp_path, BuildConfig(key_prefix="more/"), append=True)
    assert keys(tmp_path)[-1] == "more/a"


def told(root: Path) -> list[tuple[str, str]]:
    """Key and stage of every failure; as many as the manifest says."""
    found = [(failure["key"], failure["stage"]) for failure in failures(root)]
    assert read_manifest(root).failures == len(found)
    return sorted(found)


def test_failures_are_told_once_however_often_is_appended(tmp_path: Path) -> None:
    output, config = tmp_path / "shards", BuildConfig(2, duplicates="keep")
    names = ["a", "damaged", "maskless"]

    def append(*more: str, **options: bool) -> Manifest | None:
        names.extend(more)
        images, masks = folder_pair(tmp_path, names)
        (images / "damaged.jpg").write_bytes(b"")
        for name in {"maskless", "lonely"} & set(names):
            (masks / f"{name}.png").unlink()
        return build_shards(list_folder(images, masks), output, config, BuildOptions(**options))

    append()
    assert told(output) == [("damaged", "image"), ("maskless", "match")]
    append("b", append=True)
    assert told(output) == [("damaged", "image"), ("maskless", "match")]
    append("c", "lonely", append=True)
    both = [("damaged", "image"), ("lonely", "match"), ("maskless", "match")]
    assert told(output) == both
    append(retry_failed=True)
    assert told(output) == both
    images, masks = folder_pair(tmp_path / "other", ["d", "maskless"])
    (masks / "maskless.png").unlink()
    build_shards(list_folder(images, masks), output, config, BuildOptions(append=True))
    assert told(output) == [*both, ("maskless", "match")]  # another one, of another folder
    images, masks = folder_pair(tmp_path, names)  # with every mask, and undamaged
    build_shards(list_folder(images, masks), output, config, BuildOptions(append=True))
    assert told(output) == [("damaged", "image"), ("maskless", "match")]
    assert sorted(keys(output)) == ["a", "b", "c", "d", "lonely", "maskless"]


def test_what_failed_before_an_appended_build_is_retried_too(tmp_path: Path) -> None:
    output, config = tmp_path / "shards", BuildConfig(2)
    images, masks = folder_pair(tmp_path, ["a", "b"])
    good = (images / "b.jpg").read_bytes()
    (images / "b.jpg").write_bytes(b"")
    build_shards(list_folder(images, masks), output, config)
    folder_pair(tmp_path, ["a", "b", "c", "d"])
    whole = (images / "d.jpg").read_bytes()
    for name in "bd":
        (images / f"{name}.jpg").write_bytes(b"")
    build_shards(list_folder(images, masks), output, config, BuildOptions(append=True))
    assert told(output) == [("b", "image"), ("d", "image")]
    (images / "b.jpg").write_bytes(good)
    (images / "d.jpg").write_bytes(whole)
    build_shards(list_folder(images, masks), output, config, BuildOptions(retry_failed=True))
    assert told(output) == []
    assert sorted(keys(output)) == ["a", "b", "c", "d"]
    assert not verify_shards(output, "decode")
    # as after a retry that was killed between two shards of the first build
    before = checksums(output)
    for name in ("shard-000000.json", "manifest.json"):
        (output / name).unlink()
    build_shards(list_folder(images, masks), output, config)
    assert checksums(output) == before


# ---------------------------------------------------------------- duplicates


def test_exact_duplicates_are_dropped_and_told(tmp_path: Path) -> None:
    items = [item(f"s{number}", number) for number in range(12)]
    copies = [item("copy_of_s3", 3), item("t3", 3), item("u7", 7)]
    other_mask = BytesItem("v5", items[5].raw.image, encode(object_mask(5) * 0 + 1))
    config = BuildConfig(4)
    manifest = build([*items, *copies, other_mask], tmp_path / "a", config)
    assert manifest.samples == 13
    assert sorted(keys(tmp_path / "a")) == sorted(
        ["copy_of_s3", "v5", *(f"s{number}" for number in range(12) if number != 3)]
    )
    told = {
        failure["key"]: (failure["stage"], failure["reason"])
        for failure in failures(tmp_path / "a")
    }
    same = "the same image, mask and label as "
    assert told == {
        "s3": ("duplicate", same + "copy_of_s3"),
        "t3": ("duplicate", same + "copy_of_s3"),
        "u7": ("duplicate", same + "s7"),
    }
    # and again, whoever does it
    build([*items, *copies, other_mask], tmp_path / "b", config, processes=2)
    assert checksums(tmp_path / "b") == checksums(tmp_path / "a")
    build([*items, *copies, other_mask], tmp_path / "b", config)
    assert checksums(tmp_path / "b") == checksums(tmp_path / "a")
    reader = SampleReader(DatasetIndex(read_manifest(tmp_path / "a")))
    for number in range(manifest.samples):
        assert reader.read(*reader.index.locate(number)).image  # offsets fit after copying


def test_duplicates_can_be_kept(tmp_path: Path) -> None:
    config = BuildConfig(duplicates="keep")
    assert build([item("a", 0), item("b", 0)], tmp_path, config).samples == 2


def test_a_duplicate_of_what_is_there_is_not_appended(tmp_path: Path) -> None:
    build([item("x", 0), item("y", 1)], tmp_path, BuildConfig(1))
    before = {name: value for name, value in checksums(tmp_path).items() if "shard" in name}
    manifest = build([item("a", 0), item("b", 2)], tmp_path, BuildConfig(1), append=True)
    assert sorted(keys(tmp_path)) == ["b", "x", "y"]
    assert manifest.failures == 1
    assert before.items() <= checksums(tmp_path).items()


# ---------------------------------------------------------------- limits and sizes


def test_limit_takes_the_first_of_the_shuffled_order(tmp_path: Path) -> None:
    items = [item(f"s{number:02d}", number) for number in range(12)]
    build(items, tmp_path / "all", BuildConfig(20))
    build(items, tmp_path / "few", BuildConfig(20, limit=5))
    assert keys(tmp_path / "few") == keys(tmp_path / "all")[:5]


def test_shards_end_at_a_size(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, [f"s{number}" for number in range(8)])
    size = max(
        (images / f"s{n}.jpg").stat().st_size + (masks / f"s{n}.png").stat().st_size
        for n in range(8)
    )
    listing = list_folder(images, masks)
    manifest = build_shards(listing, tmp_path / "out", BuildConfig(shard_size=3 * size + 1))
    assert manifest is not None
    assert [entry.samples for entry in manifest.shards] == [3, 3, 2]
    tiny = build_shards(list_folder(images, masks), tmp_path / "one", BuildConfig(shard_size=1))
    assert tiny is not None
    assert [entry.samples for entry in tiny.shards] == [1] * 8


def test_large_images_are_made_smaller_and_others_copied(tmp_path: Path) -> None:
    small, large = picture(0, 20, 30), picture(1, 100, 60)
    label = object_mask(1, 100, 60)
    items = [
        BytesItem("small", encode(small, "JPEG"), encode(object_mask(0))),
        BytesItem("large", encode(large, "JPEG"), encode(object_mask(1, 100, 60)), encode(label)),
    ]
    manifest = build(items, tmp_path, BuildConfig(max_side=50, shuffle_seed=-1))
    reader = SampleReader(DatasetIndex(manifest))
    assert reader.index.shard(0).sizes.tolist() == [[50, 30], [20, 30]]
    assert reader.read(0, 1).image == items[0].raw.image
    found = reader.read(0, 0, label=True)
    assert decode_rgb(found.image).shape == (50, 30, 3)
    expected = np.asarray(Image.fromarray(label).resize((30, 50), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(decode_grey(found.mask or b"", "mask"), expected)
    np.testing.assert_array_equal(decode_grey(found.label or b"", "label"), expected)
    error = np.abs(
        decode_rgb(found.image).astype(int)
        - np.asarray(Image.fromarray(large).resize((30, 50), Image.Resampling.LANCZOS))
    )
    assert error.mean() < 4


def test_components_become_proposals(tmp_path: Path) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[:10, :10] = mask[20:30, 20:30] = mask[30, 30] = 255  # the last touches by a corner
    mask[5, 35] = 255  # below 1% of the area
    sample = BytesItem("a", encode(picture(0, 40, 40)), encode(mask))
    manifest = build([sample], tmp_path, BuildConfig(mask_mode="components"))
    stored = SampleReader(DatasetIndex(manifest)).read(0, 0).mask
    found = decode_grey(stored or b"", "mask")
    assert (found[0, 0], found[25, 25], found[30, 30], found[5, 35]) == (1, 2, 2, 0)
    assert np.unique(found).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "expected"), [("", 0), ("1000", 1000), ("2KB", 2000), ("1.5 MiB", 3 << 19)]
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


def test_wrong_numbers_are_told() -> None:
    for text in ("many", "-3", "5 apples", "1.2.3MB"):
        with pytest.raises(InputError, match="--shard-size is"):
            parse_size(text)
    for text in ("all", "-1", "150%", "1.5"):
        with pytest.raises(InputError, match="--max-failures is"):
            parse_max_failures(text)
    assert parse_max_failures("") is None
    assert parse_max_failures("5%") == pytest.approx(0.05)
    assert parse_max_failures("12") == 12


# ---------------------------------------------------------------- failures


def test_too_many_failures_end_the_build_and_it_can_go_on(tmp_path: Path) -> None:
    items = [item("a", 0), *(BytesItem(f"bad{n}", b"x") for n in range(5)), item("z", 1)]
    config = BuildConfig(1, shuffle_seed=-1)
    for limit in (3, 0.4, 0):
        with pytest.raises(InputError, match="more than --max-failures allows"):
            build(items, tmp_path, config, max_failures=limit)
    assert not (tmp_path / "manifest.json").exists()
    manifest = build(items, tmp_path, config, max_failures=5)
    assert (manifest.samples, manifest.failures) == (2, 5)


def test_a_folder_of_the_source_that_vanishes_is_no_failure_of_samples(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(6)]
    images, masks = folder_pair(tmp_path / "source", names)
    config = BuildConfig(2)

    def vanish(plan: object) -> Any:
        def count(done: int, failed: int) -> None:
            if done and images.exists():
                images.rename(tmp_path / "away")

        return count

    output = tmp_path / "shards"
    with pytest.raises(InputError, match=r"source/images, .* has vanished; bring it back"):
        build_shards(list_folder(images, masks), output, config, progress=vanish)
    shutil.move(tmp_path / "away", images)
    manifest = build_shards(list_folder(images, masks), output, config)
    assert manifest is not None
    assert (manifest.samples, manifest.failures) == (6, 0)


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, [f"s{number}" for number in range(7)])
    (images / "s3.jpg").write_bytes(b"broken")
    (masks / "s4.png").unlink()
    found = estimate(list_folder(images, masks), BuildConfig(4), 2)
    assert (found.samples, found.shards, found.unmatched) == (6, 2, 1)
    assert (found.tried, found.failed) == (6, 1)
    assert {failure.stage for failure in found.examples} == {"match", "image"}
    real = build_shards(list_folder(images, masks), tmp_path / "out", BuildConfig(4))
    assert real is not None
    assert 0.5 < found.bytes / real.bytes < 1.5
    write(tmp_path / "unused", b"")


@pytest.mark.slow
def test_the_array_script_builds_with_all_its_tasks(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "slurm" / "shards.sbatch"
    arguments = ["scenes", "--count", "12", "--size", "32", "--samples-per-shard", "2"]
    printed = []
    for task in (3, 4):  # an array need not start at 0
        done = subprocess.run(
            ["bash", str(script), *arguments, "--output", str(tmp_path / "array")],
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "SLURM_CPUS_PER_TASK": "2",
                "SLURM_ARRAY_TASK_ID": str(task),
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_COUNT": "2",
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        printed.append(done.stderr)
    assert "node 0 of 2 is done; the manifest is written by" in printed[0]
    assert "│ samples" in printed[1]
    build_shards(list_scenes(12, 0, 32), tmp_path / "one", BuildConfig(2))
    assert checksums(tmp_path / "array") == checksums(tmp_path / "one")


# ---------------------------------------------------------------- quarantine


def test_what_is_in_quarantine_stays_there(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path / "source", [f"s{number}" for number in range(9)])
    mended = (images / "s8.jpg").read_bytes()
    (images / "s8.jpg").write_bytes(b"broken")
    output, config = tmp_path / "shards", BuildConfig(3, shuffle_seed=-1)
    build_shards(list_folder(images, masks), output, config)
    extent = DatasetIndex(read_manifest(output)).shard(0).extent(1, "image")
    assert extent is not None
    flip_byte(output / "shard-000000.tar", extent[0] + 50)
    with (output / "shard-000001.tar").open("r+b") as file:
        file.write(bytes((output / "shard-000001.tar").stat().st_size))
    quarantine_samples(output, verify_shards(output, "hash"))
    left = ["s0", "s2", "s6", "s7"]
    assert keys(output) == left
    # neither the same build once more, nor one that appends or retries, brings them back
    build_shards(list_folder(images, masks), output, config)
    assert keys(output) == left
    folder_pair(tmp_path / "more", ["t0"])
    more = list_folder(tmp_path / "more/images", tmp_path / "more/masks")
    build_shards(more, output, BuildConfig(3, duplicates="keep"), BuildOptions(append=True))
    assert keys(output) == [*left, "t0"]
    (images / "s8.jpg").write_bytes(mended)
    build_shards(list_folder(images, masks), output, config, BuildOptions(retry_failed=True))
    assert keys(output) == [*left, "s8", "t0"]
    assert [problem.file for problem in verify_shards(output, "hash")] == []
    # a shard that is lost is written again, whole
    (output / "shard-000001.tar").unlink()
    build_shards(list_folder(images, masks), output, config)
    assert keys(output) == ["s0", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "t0"]
