"""Tars in WebDataset's form: which members make a sample, damage, and odd members."""

import io
import tarfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sample import safe_key
from data_pipeline.sources.item import Failure
from data_pipeline.sources.webdataset_tars import list_tars
from tests.sample_data import encode, object_mask, picture, write
from tests.source_data import contents, pixels

Members = Sequence[tuple[str, bytes]]


def tar(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(*names: str) -> list[tuple[str, bytes]]:
    members = []
    for number, name in enumerate(names):
        members += [
            (f"{name}.jpg", encode(picture(number), "JPEG")),
            (f"{name}.json", b"{}"),
            (f"{name}.mask.png", encode(object_mask(number))),
            (f"{name}.label.png", encode(object_mask(number) * 2)),
        ]
    return members


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_neighbours_of_one_name_are_a_sample(tmp_path: Path, form: int) -> None:
    long = "a_folder_of_a_long_name/" * 6 + "b" * 50
    members = samples("a", "dog/0001", long)
    path = tar(tmp_path / "x.tar", members, form)
    listing = list_tars([str(path)], classes=("background", "one", "two", "three", "four"))
    items, failed = contents(listing)
    assert failed == {}
    assert list(items) == sorted(["a", "dog/0001", long])
    assert items["dog/0001"].source == "x.tar:dog/0001"
    for number, key in enumerate(("a", "dog/0001", long)):
        raw = items[key].read()
        assert raw.image == members[4 * number][1]
        np.testing.assert_array_equal(pixels(raw.mask), object_mask(number))
        np.testing.assert_array_equal(pixels(raw.label), object_mask(number) * 2)
    assert items["a"].sizes() == tuple(len(members[place][1]) for place in (0, 2, 3))
    assert listing.roots == (tmp_path,)
    unlabelled, _ = contents(list_tars([str(path)]))
    assert unlabelled["a"].read().label is None


def test_components_are_named_by_options(tmp_path: Path) -> None:
    image, mask = encode(picture()), encode(object_mask())
    members = [("a.b.PNG", image), ("a.seg.png", mask), ("c.png", image)]
    path = str(tar(tmp_path / "x.tar", members))
    items, failed = contents(list_tars([path], image_ext="b.png; webp", mask_ext=".SEG.png"))
    assert list(items) == ["a"]
    assert items["a"].read().mask == mask
    assert failed == {"x.tar:c": "no image among its components png"}
    items, failed = contents(list_tars([path], mask_ext=""))
    assert list(items) == ["c"]
    assert items["c"].read().mask is None
    with pytest.raises(InputError, match="--image-ext is empty"):
        list_tars([path], image_ext=" ; ")


def test_incomplete_and_ambiguous_samples_are_failures(tmp_path: Path) -> None:
    image, mask = encode(picture()), encode(object_mask())
    members = [
        ("no_mask.png", image),
        ("two.png", image),
        ("two.jpg", image),
        ("two.mask.png", mask),
        ("twice.png", image),
        ("twice.png", image),
        ("apart.png", image),
        ("good.png", image),
        ("good.mask.png", mask),
        ("only.mask.png", mask),
    ]
    items, failed = contents(list_tars([str(tar(tmp_path / "x.tar", members))]))
    assert list(items) == ["good"]
    assert failed == {
        "x.tar:no_mask": "no mask.png beside its png",
        "x.tar:two": "several images: jpg, png",
        "x.tar:twice": "its png is there twice",
        "x.tar:apart": "no mask.png beside its png",
        "x.tar:only": "no image among its components mask.png",
    }


def test_braces_and_wild_cards(tmp_path: Path) -> None:
    for number in range(8, 12):
        tar(tmp_path / f"s-{number:03d}.tar", samples(f"a{number}"))
    for pattern in ("s-{008..011}.tar", "s-*.tar", "s-0{08,09,1{0..1}}.tar"):
        items, _ = contents(list_tars([str(tmp_path / pattern)]))
        assert list(items) == ["a10", "a11", "a8", "a9"], pattern
    items, _ = contents(list_tars([str(tmp_path / "s-{010..009}.tar")]))
    assert list(items) == ["a10", "a9"]
    once = list_tars([str(tmp_path / "s-008.tar"), str(tmp_path / "s-00*.tar")])
    assert list(contents(once)[0]) == ["a8", "a9"]
    with pytest.raises(InputError, match=r"s-012\.tar is missing; .*braces"):
        list_tars([str(tmp_path / "s-{008..012}.tar")])
    with pytest.raises(InputError, match="matches no file"):
        list_tars([str(tmp_path / "t-*.tar")])
    with pytest.raises(InputError, match="no tar was given"):
        list_tars([])


def test_a_key_that_is_in_two_tars_is_given_twice(tmp_path: Path) -> None:
    paths = [str(tar(tmp_path / f"{name}.tar", samples("a"))) for name in ("x", "y")]
    entries = list(list_tars(paths).entries)
    assert [(entry.key, entry.source) for entry in entries] == [("a", "x.tar:a"), ("a", "y.tar:a")]


def test_of_a_tar_that_is_cut_off_the_samples_before_are_used(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", samples("a", "b", "c"), tarfile.USTAR_FORMAT)
    with tarfile.open(path) as archive:
        members = {member.name: member for member in archive}
    whole = path.read_bytes()
    cut = members["c.jpg"].offset_data + 100
    path.write_bytes(whole[:cut])
    items, failed = contents(list_tars([str(path)]))
    assert list(items) == ["a", "b"]
    reason = f"is cut off, or damaged, in the member at byte {members['c.jpg'].offset:,}"
    assert failed == {str(path): reason}
    path.write_bytes(whole[: members["c.json"].offset])
    items, failed = contents(list_tars([str(path)]))
    assert list(items) == ["a", "b"]
    assert failed["x.tar:c"] == "no mask.png beside its jpg"
    assert "ends without an end mark" in failed[str(path)]
    path.write_bytes(whole[: members["c.json"].offset] + b"\xff" * 2048)
    items, failed = contents(list_tars([str(path)]))
    assert list(items) == ["a", "b"]
    assert f"damaged header at byte {members['c.json'].offset:,}" in failed[str(path)]
    path.write_bytes(b"")
    assert list(contents(list_tars([str(path)]))[1]) == [str(path)]


def test_a_tar_that_shrinks_after_it_was_listed(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", samples("a"))
    items, _ = contents(list_tars([str(path)]))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(SampleError, match="has become shorter") as caught:
        items["a"].read()
    assert caught.value.stage == "image"
    path.unlink()
    with pytest.raises(SampleError, match="No such file"):
        items["a"].read()


def test_names_are_only_names(tmp_path: Path) -> None:
    names = ["/etc/passwd", "../../up", "./here", "C:\\windows"]
    items, failed = contents(list_tars([str(tar(tmp_path / "x.tar", samples(*names)))]))
    assert failed == {}
    assert set(items) == set(names)
    for item in items.values():
        assert item.read().image.startswith(b"\xff\xd8")
        assert ".." not in safe_key(item.key)
        assert not safe_key(item.key).startswith("/")


def test_links_sparse_files_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:

        def add(name: str, kind: bytes, data: bytes = b"", **fields: Any) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))

        image = encode(picture(), "JPEG")
        add("folder.jpg", tarfile.DIRTYPE)
        add("link.jpg", tarfile.SYMTYPE, linkname="/etc/passwd")
        add("hard.jpg", tarfile.LNKTYPE, linkname="a.jpg")
        add("pipe.jpg", tarfile.FIFOTYPE)
        add("sparse.jpg", tarfile.REGTYPE, image, pax_headers={"GNU.sparse.major": "1"})
        add("a.jpg", tarfile.REGTYPE, image)
    items, failed = contents(list_tars([str(path)], mask_ext=""))
    assert list(items) == ["a"]
    assert items["a"].read().image == image
    assert failed == {
        "x.tar:link": "its jpg is a link",
        "x.tar:hard": "its jpg is a link",
        "x.tar:sparse": "its jpg is a sparse file",
    }


def test_links_have_no_bytes_whatever_their_header_says(tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        for kind in (tarfile.LNKTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("other.jpg")
            info.type, info.size, info.linkname = kind, 5000, "a.jpg"
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.write(tar(tmp_path / "y.tar", samples("a")).read_bytes())
    items, failed = contents(list_tars([str(tmp_path / "x.tar")]))
    assert list(items) == ["a"]
    assert items["a"].read().image.startswith(b"\xff\xd8")
    assert failed == {"x.tar:other": "its jpg is a link"}


def test_any_damage_is_a_failure(tmp_path: Path) -> None:
    whole = tar(tmp_path / "y.tar", samples("a" * 120, "b"), tarfile.PAX_FORMAT).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 2000)):
            data[place] = rng.integers(256)
        path = write(tmp_path / "x.tar", bytes(data[: rng.integers(1, len(data) + 1)]))
        for entry in list_tars([str(path)]).entries:
            if not isinstance(entry, Failure):
                assert len(entry.read().image) == entry.sizes()[0]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_huge_record_is_not_read(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 64 << 20
    path = write(tmp_path / "x.tar", info.tobuf(tarfile.GNU_FORMAT))
    with path.open("r+b") as file:
        file.truncate(100 << 20)  # a hole, which takes no space
    tracemalloc.start()
    items, failed = contents(list_tars([str(path)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert items == {}
    assert failed == {str(path): "has a record of 67,108,864 bytes at byte 0"}
    assert peak < 4 << 20


@pytest.mark.parametrize("size", [1 << 40, -1])
def test_absurd_sizes_are_damage(tmp_path: Path, size: int) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    path = write(tmp_path / "x.tar", info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    items, failed = contents(list_tars([str(path)]))
    assert items == {}
    assert failed == {str(path): "is cut off, or damaged, in the member at byte 0"}


def test_compressed_tars_say_so(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO(b""))
    _, failed = contents(list_tars([str(path)]))
    assert "is compressed (gzip)" in failed[str(path)]


def test_tars_elsewhere(tmp_path: Path) -> None:
    members = samples("a", "b")
    path = tar(tmp_path / "x.tar", members)
    fsspec.filesystem("memory").put(str(path), f"/{tmp_path.name}/x-000.tar")
    for pattern in ("x-{000..000}.tar", "x-*.tar"):
        listing = list_tars([f"memory://{tmp_path.name}/{pattern}"])
        items, failed = contents(listing)
        assert failed == {}
        assert list(items) == ["a", "b"]
        assert items["b"].read().image == members[4][1]
        assert items["b"].read().mask == members[6][1]
        assert listing.roots == ()
    with pytest.raises(InputError, match=r"y\.tar is missing"):
        list_tars([f"memory://{tmp_path.name}/y.tar"])
