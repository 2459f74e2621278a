"""What a notebook does with a network: the README's lines, and every kind of picture."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.resize import resize_image
from data_pipeline.whole_images import normalise
from tests.evaluation_command import tiny_run
from tests.evaluation_data import random_encoder
from tests.sample_data import picture

README = Path(__file__).parent.parent / "README.md"
SIZE = 40


def test_the_readme_s_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (lines,) = [one for one in snippets if "load_encoder" in one]
    tiny_run(tmp_path / "runs" / "mine")
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(("cat.jpg", "dog.png")):
        Image.fromarray(picture(number)).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    assert "size=512" in lines
    found: dict[str, torch.Tensor] = {}
    exec(lines.replace("size=512", "size=64"), found)
    assert found["embeddings"].shape == (2, 6, 64, 64)
    assert found["saliency"].shape == found["objects"].shape == (2, 64, 64)


def test_pictures_are_prepared_as_in_evaluation(tmp_path: Path) -> None:
    encoder = random_encoder()
    image = picture(0)
    expected = normalise(resize_image(image, SIZE))[None]
    Image.fromarray(image).save(tmp_path / "a.png")
    channels_first = torch.tensor(image).permute(2, 0, 1)
    for one in (
        image,
        Image.fromarray(image),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        channels_first,
        channels_first[None],
        image[None],
        [image],
    ):
        assert torch.equal(encoder.images(one, SIZE), expected)
    both = encoder.images([tmp_path / "a.png", np.ascontiguousarray(image[:, ::-1])], SIZE)
    assert torch.equal(both[0], expected[0])
    assert not torch.equal(both[1], expected[0])
    assert both.dtype == torch.float32
    smooth = normalise(resize_image(image, SIZE, "antialias"))[None]
    assert torch.equal(encoder.images(image, SIZE, "antialias"), smooth)
    embeddings, saliency = encoder.embed(both)
    assert embeddings.shape == (2, 6, SIZE, SIZE)
    assert saliency.shape == (2, SIZE, SIZE)


def test_pictures_of_any_mode_are_taken_upright(tmp_path: Path) -> None:
    encoder = random_encoder()
    image = picture(1)
    grey = image[..., 0]
    as_grey = encoder.images(np.repeat(grey[..., None], 3, 2), SIZE)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    for one in (grey, Image.fromarray(grey), deep):
        assert torch.equal(encoder.images(one, SIZE), as_grey)
    upright = encoder.images(image, SIZE)
    assert torch.equal(encoder.images(Image.fromarray(image).convert("RGBA"), SIZE), upright)
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(image)))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right brings it upright
    turned.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(encoder.images(tmp_path / "turned.png", SIZE), upright)
    with Image.open(tmp_path / "turned.png") as opened:
        assert torch.equal(encoder.images(opened, SIZE), upright)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    encoder = random_encoder()
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    wrong = (
        (tmp_path / "missing.jpg", r"missing\.jpg cannot be used: there is no such file"),
        (tmp_path / "broken.jpg", r"broken\.jpg cannot be used: cannot be decoded"),
        ([picture(0), np.zeros((4, 4, 3))], r"picture 1 is float64 \[4, 4, 3\]"),
        (np.zeros((3, 4, 4), np.uint8), r"picture 0 is uint8 \[3, 4, 4\] \(is a tensor"),
        (np.zeros((0, 4, 3), np.uint8), r"picture 0 is uint8 \[0, 4, 3\]"),
        (torch.zeros(3, 4, 4), "picture 0 is float32"),
        ([], "no pictures were given"),
        (7, "int is not a picture"),
        ([None], "picture 0 is NoneType; expected a path, a PIL image"),
    )
    for pictures, message in wrong:
        with pytest.raises(InputError, match=message):
            encoder.images(pictures, SIZE)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="size is 0"):
        encoder.images(picture(0), 0)
    with pytest.raises(InputError, match="it can be opencv or antialias"):
        encoder.images(picture(0), SIZE, "crop")


@pytest.mark.parametrize("method", ["embed", "embeddings"])
def test_embedding_says_what_it_takes(method: str) -> None:
    embed = getattr(random_encoder(), method)
    for images, found in (
        (Image.new("RGB", (4, 4)), "the images are Image; expected"),
        (picture(0), "the images are ndarray"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"uint8 \[1, 3, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"float32 \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), r"float32 \[1, 1, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8), r"of shape \[0, 3, 8, 8\]"),
    ):
        with pytest.raises(InputError, match=found + r".*encoder\.images"):
            embed(images)
