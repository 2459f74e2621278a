"""Sources in a bucket, on a server that speaks S3."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.errors import InputError
from data_pipeline.sources.folder import list_folder
from data_pipeline.sources.image_list import list_images
from data_pipeline.sources.webdataset_tars import list_tars
from tests.s3_server import s3_server, why_not
from tests.sample_data import folder_pair, object_mask, write
from tests.source_data import contents, pixels
from tests.test_source_tars import samples, tar

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.mark.slow
def test_sources_in_a_bucket(tmp_path: Path, bucket: str) -> None:
    images, masks = folder_pair(tmp_path, ["a", "sub/b", "no_mask"])
    (masks / "no_mask.png").unlink()
    digest = hashlib.sha256((images / "a.jpg").read_bytes()).hexdigest()
    rows = f"image,mask,sha256\nimages/a.jpg,{bucket}/masks/a.png,{digest}\n"
    write(tmp_path / "list.csv", rows.encode())
    members = samples("x", "y")
    tar(tmp_path / "t-000.tar", members)
    fsspec.filesystem("s3").put(f"{tmp_path}/", bucket, recursive=True)

    items, failed = contents(list_folder(f"{bucket}/images", f"{bucket}/masks"))
    assert failed == {"no_mask.jpg": "no mask of that stem"}
    assert list(items) == ["a", "sub/b"]
    raw = items["sub/b"].read()
    assert raw.image == (images / "sub" / "b.jpg").read_bytes()
    np.testing.assert_array_equal(pixels(raw.mask), object_mask(1))

    items, failed = contents(list_images(f"{bucket}/list.csv"))
    assert failed == {}
    np.testing.assert_array_equal(pixels(items["images/a"].read().mask), object_mask(0))

    items, failed = contents(list_tars([f"{bucket}/t-{{000..000}}.tar", f"{bucket}/t-*.tar"]))
    assert failed == {}
    assert items["y"].read().image == members[4][1]
    assert items["y"].read().mask == members[6][1]

    for address in (f"{bucket}/nowhere", "s3://nowhere/images"):
        with pytest.raises(InputError, match="nowhere"):
            list_folder(address)
