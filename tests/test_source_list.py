"""Lists of images as CSV, TSV and Parquet: what a row makes, and what is said of a wrong one."""

import hashlib
import os
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sources.image_list import list_images
from data_pipeline.sources.item import Failure, FileItem
from data_pipeline.storage import MAX_BYTES
from tests.sample_data import folder_pair, object_mask, write
from tests.source_data import contents, pixels

CLASSES = ("background", "one", "two")


def test_rows_name_images_masks_labels_and_keys(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a", "sub/b", "c"], labels=True)
    rows = [
        "label,image,key,mask,caption",
        'labels/a.png,images/a.jpg,,masks/a.png,"a dog, and a cat"',
        f",{images / 'sub' / 'b.jpg'},,{masks / 'sub' / 'b.png'},",
        ",images/c.jpg,my name,,",
    ]
    path = write(tmp_path / "list.csv", "\n".join(rows).encode())
    listing = list_images(path, CLASSES)
    items, failed = contents(listing)
    assert failed == {}
    assert list(items) == ["images/a", "images/sub/b", "my name"]
    assert items["images/a"].source == "images/a.jpg"
    raw = items["images/a"].read()
    assert raw.image == (images / "a.jpg").read_bytes()
    np.testing.assert_array_equal(pixels(raw.mask), object_mask(0))
    np.testing.assert_array_equal(pixels(raw.label), object_mask(0))
    raw = items["images/sub/b"].read()
    np.testing.assert_array_equal(pixels(raw.mask), object_mask(1))
    assert raw.label is None
    assert items["my name"].read().mask is None
    assert listing.classes == CLASSES
    assert listing.description == {
        "source": "list",
        "list": str(path),
        "columns": "label, image, key, mask",
    }


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".csv", "image,mask\r\n\r\nimages/a.jpg,masks/a.png\r\nimages/b.jpg,masks/b.png"),
        (".CSV", '\ufeff"image","mask"\n"images/a.jpg","masks/a.png"\nimages/b.jpg, masks/b.png\n'),
        (".tsv", "image\tmask\nimages/a.jpg\tmasks/a.png\nimages/b.jpg\tmasks/b.png\n"),
    ],
)
def test_line_ends_marks_and_quotes_do_not_matter(tmp_path: Path, suffix: str, text: str) -> None:
    folder_pair(tmp_path, ["a", "b"])
    items, failed = contents(list_images(write(tmp_path / f"list{suffix}", text.encode())))
    assert failed == {}
    assert list(items) == ["images/a", "images/b"]
    np.testing.assert_array_equal(pixels(items["images/b"].read().mask), object_mask(1))


def test_wrong_rows_are_failures_with_their_lines(tmp_path: Path) -> None:
    rows = [
        "image,mask,sha256",
        "a.jpg,a.png,",
        "b.jpg,b.png",
        "c.jpg,c.png,,extra",
        ",d.png,",
        "",
        "e.jpg,e.png,1234",
        '"f.jpg"x,,',
        "g\0.jpg,,",
        "h.jpg,,",
    ]
    items, failed = contents(list_images(write(tmp_path / "list.csv", "\n".join(rows).encode())))
    assert list(items) == ["a", "h"]
    assert failed.pop("list.csv, line 8").startswith("is no row of a CSV file")
    assert failed == {
        "list.csv, line 3": "has 2 fields instead of 3: image, mask, sha256",
        "list.csv, line 4": "has 4 fields instead of 3: image, mask, sha256",
        "list.csv, line 5": "names no image",
        "list.csv, line 7": "its sha256 is '1234'; expected 64 hex digits",
        "list.csv, line 9": "has a null character",
    }


def test_an_open_quote_does_not_swallow_the_memory(tmp_path: Path) -> None:
    text = 'image\na.jpg\n"b.jpg\n' + "".join(f"{n}.jpg\n" for n in range(50_000))
    items, failed = contents(list_images(write(tmp_path / "list.csv", text.encode())))
    assert "a" in items
    assert any("field larger than field limit" in reason for reason in failed.values())


def test_a_file_without_line_ends_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "list.csv", b"image\n" + b"x" * (16 << 20))
    tracemalloc.start()
    entries = list(list_images(path).entries)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert entries
    for entry in entries:
        assert isinstance(entry, Failure)
        assert "field larger than field limit" in entry.reason
    assert peak < 8 << 20


def test_the_checksum_is_that_of_the_image(tmp_path: Path) -> None:
    images, _ = folder_pair(tmp_path, ["a", "b"])
    digest = hashlib.sha256((images / "a.jpg").read_bytes()).hexdigest()
    text = f"image,sha256\nimages/a.jpg,{digest.upper()}\nimages/b.jpg,{digest}\n"
    items, _ = contents(list_images(write(tmp_path / "list.csv", text.encode())))
    assert items["images/a"].read().image == (images / "a.jpg").read_bytes()
    with pytest.raises(SampleError, match="another sha256 than the list says") as caught:
        items["images/b"].read()
    assert caught.value.stage == "image"


def test_a_missing_image_fails_when_it_is_read(tmp_path: Path) -> None:
    items, _ = contents(list_images(write(tmp_path / "list.csv", b"image\nnowhere.jpg\n")))
    with pytest.raises(SampleError, match=r"nowhere\.jpg cannot be read \(No such file"):
        items["nowhere"].read()


def test_what_would_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(InputError, match=r"pipe\.csv is no file, and a list is read twice"):
        list_images(tmp_path / "pipe.csv")
    items, _ = contents(list_images(write(tmp_path / "list.csv", b"image\n/dev/zero\npipe.csv\n")))
    for item in items.values():
        with pytest.raises(SampleError, match="is no file"):
            item.read()
    assert len(items) == 2


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,mask", "has no column 'image': it has path, mask; the first row should"),
        ("", "has no column 'image': it has none"),
        ("image,masks", "has a column 'masks', which is not read; rename it to 'mask'"),
        ("image,Label", "has a column 'Label', which is not read; rename it to 'label'"),
        ("image,mask,mask", "has the column 'mask' twice"),
        ("image,label", "a column 'label' and --classes go together"),
    ],
)
def test_a_wrong_header_says_what_is_missing_and_what_is_there(
    tmp_path: Path, header: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        list_images(write(tmp_path / "list.csv", header.encode()))


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.csv cannot be read \(No such file"):
        list_images(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match=r"--list needs \.csv, \.tsv or \.parquet"):
        list_images(write(tmp_path / "list.txt", b"image\n"))
    with pytest.raises(InputError, match="--classes go together"):
        list_images(write(tmp_path / "list.csv", b"image\n"), CLASSES)
    with pytest.raises(InputError, match="not UTF-8"):
        list_images(write(tmp_path / "list.csv", b"image\xe9\n"))
    late = list_images(write(tmp_path / "late.csv", b"image\n" + b"a.jpg\n" * 5000 + b"\xe9\n"))
    with pytest.raises(InputError, match="not UTF-8"):
        list(late.entries)
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="is no Parquet file, or damaged"):
        list_images(write(tmp_path / "list.parquet", b"image\n" * 100))


def parquet(where: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    files.write_table(pyarrow.table(columns), where)
    return where


def test_parquet_lists(tmp_path: Path) -> None:
    folder_pair(tmp_path, ["a", "b"])
    path = parquet(
        tmp_path / "list.parquet",
        image=["images/a.jpg", "images/b.jpg", None],
        mask=["masks/a.png", None, "masks/b.png"],
        key=[1, 2, 3],
        score=[0.5, 0.25, 0.125],
    )
    items, failed = contents(list_images(path))
    assert list(items) == ["1", "2"]
    assert failed == {"list.parquet, row 3": "names no image"}
    np.testing.assert_array_equal(pixels(items["1"].read().mask), object_mask(0))
    assert items["2"].read().mask is None
    with pytest.raises(InputError, match="has no column 'image': it has path"):
        list_images(parquet(tmp_path / "wrong.parquet", path=["a.jpg"]))


def test_lists_and_images_elsewhere(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a", "b"])
    top = f"memory://{tmp_path.name}"
    text = f"image,mask\nimages/a.jpg,{masks / 'a.png'}\n{top}/images/b.jpg,masks/b.png\n"
    write(tmp_path / "list.csv", text.encode())
    fsspec.filesystem("memory").put(str(tmp_path), f"/{tmp_path.name}", recursive=True)
    listing = list_images(f"{top}/list.csv")
    items, failed = contents(listing)
    assert failed == {}
    assert list(items) == ["images/a", "images/b"]
    assert listing.roots == ()
    np.testing.assert_array_equal(pixels(items["images/a"].read().mask), object_mask(0))
    raw = items["images/b"].read()
    assert raw.image == (images / "b.jpg").read_bytes()
    np.testing.assert_array_equal(pixels(raw.mask), object_mask(1))
    local, _ = contents(list_images(tmp_path / "list.csv"))
    assert list(local) == ["images/a", f"{tmp_path.name}/images/b"]
    assert local[f"{tmp_path.name}/images/b"].read().image == raw.image


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    peaks = []
    for count in (2000, 10_000):
        rows = "".join(f"a_rather_long_name_{number:08d}.jpg\n" for number in range(count))
        path = write(tmp_path / f"{count}.csv", b"image\n" + rows.encode())
        tracemalloc.start()
        assert sum(1 for _ in list_images(path).entries) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000  # rows that were kept would be 800 kB


def test_a_file_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    with image.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole: it takes no space
    with pytest.raises(SampleError, match=r"a\.jpg cannot be read \(more than 1,073,741,824 bytes"):
        FileItem("a", "a.jpg", image, None, None).read()
