"""Masks from ONNX networks: what enters, what comes out, what is refused."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.masks.onnx_network import PRESETS, OnnxNetwork

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
helper = pytest.importorskip("onnx.helper")

FLOAT, HALF, UINT8 = 1, 10, 2  # onnx.TensorProto's numbers
SIZE = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1), "activation": "none"}


def tensor(name: str, values: Any) -> Any:
    return onnx.numpy_helper.from_array(np.asarray(values), name)


def channel(number: int) -> tuple[list[Any], list[Any]]:
    """Nodes and constants that give one channel of x as y, [B, 1, H, W]."""
    node = helper.make_node("Gather", ["x", "index"], ["y"], axis=1)
    return [node], [tensor("index", np.array([number]))]


def save(
    path: Path,
    nodes: Sequence[Any],
    constants: Sequence[Any] = (),
    batch: int | str = "batch",
    sides: tuple[int | str, int | str] = (SIZE, SIZE),
    channels: int = 3,
    kind: int = FLOAT,
    outputs: Sequence[str] = ("y",),
) -> Path:
    """An ONNX network of x [batch, channels, *sides] with these nodes."""
    entering = helper.make_tensor_value_info("x", kind, [batch, channels, *sides])
    leaving = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    graph = helper.make_graph(list(nodes), "graph", [entering], leaving, list(constants))
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def pictures(count: int = 3, height: int = SIZE, width: int = SIZE) -> list[NDArray[np.uint8]]:
    """Pictures of noise, none of which reaches 255."""
    rng = np.random.default_rng(5)
    return [rng.integers(0, 240 - 9 * n, (height, width, 3), np.uint8) for n in range(count)]


def stretched(values: NDArray[Any]) -> NDArray[np.float64]:
    values = values.astype(np.float64)
    return np.asarray((values - values.min()) / (values.max() - values.min()))


# ---------------------------------------------------------------- what enters, what comes out


@pytest.mark.parametrize("batch", ["batch", 1, 2])
def test_a_channel_comes_back_exactly(tmp_path: Path, batch: int | str) -> None:
    path = save(tmp_path / "red.onnx", *channel(0), batch=batch)
    network = OnnxNetwork.load(path, batch_size=2, **PLAIN)
    assert network.batch_size == (2 if batch == "batch" else 1)
    images = pictures(3)
    maps = network.predict(images)
    assert len(maps) == 3
    for image, found in zip(images, maps, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, image[..., 0] / 255, atol=1e-6)
    assert network.predict([]) == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_normalisation_is_per_channel(tmp_path: Path, number: int) -> None:
    path = save(tmp_path / "net.onnx", *channel(number))
    network = OnnxNetwork.load(path, activation="sigmoid")
    (image,) = pictures(1)
    values = (image[..., number] / 255 - MEAN[number]) / STD[number]
    np.testing.assert_allclose(network.predict([image])[0], 1 / (1 + np.exp(-values)), atol=1e-6)


def test_presets_divide_by_the_maximum_or_by_255(tmp_path: Path) -> None:
    assert [(name, preset.size) for name, preset in PRESETS.items()] == [
        ("auto", None),
        ("u2net", 320),
        ("basnet", 256),
        ("isnet", 1024),
    ]
    path = save(tmp_path / "net.onnx", *channel(1))
    (image,) = pictures(1)
    top = int(image.max())
    assert top < 255
    expected = {
        "auto": (image[..., 1] / 255 - MEAN[1]) / STD[1],
        "u2net": (image[..., 1] / top - MEAN[1]) / STD[1],
        "basnet": (image[..., 1] / top - MEAN[1]) / STD[1],
        "isnet": image[..., 1] / 255 - 0.5,
    }
    for preset, values in expected.items():
        network = OnnxNetwork.load(path, preset, activation="sigmoid")
        found = network.predict([image])[0]
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-values)), atol=1e-6, err_msg=preset)
        found = OnnxNetwork.load(path, preset).predict([image])[0]  # all are published with min-max
        np.testing.assert_allclose(found, stretched(image[..., 1]), atol=1e-5, err_msg=preset)


def test_the_first_of_seven_outputs_is_taken(tmp_path: Path) -> None:
    nodes, constants = [], []
    for number in range(7):  # d0 is blue, the others are red
        constants.append(tensor(f"index{number}", np.array([0 if number else 2])))
        inputs = ["x", f"index{number}"]
        nodes.append(helper.make_node("Gather", inputs, [f"d{number}"], axis=1))
    outputs = [f"d{number}" for number in range(7)]
    path = save(tmp_path / "u2net.onnx", nodes, constants, outputs=outputs)
    image = pictures(1)[0]
    found = OnnxNetwork.load(path, "u2net").predict([image])[0]
    np.testing.assert_allclose(found, stretched(image[..., 2]), atol=1e-5)


def test_a_map_without_channel_axis_and_of_another_size(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["x", "index"], ["red"], axis=1),  # a scalar: no channel axis
        helper.make_node("Slice", ["red", "starts", "ends", "axes", "steps"], ["y"]),
    ]
    constants = [tensor("index", np.array(0))]
    for name, values in (("starts", (0, 0)), ("ends", (99, 99)), ("axes", (1, 2))):
        constants.append(tensor(name, np.array(values)))
    constants.append(tensor("steps", np.array((2, 2))))
    path = save(tmp_path / "half.onnx", nodes, constants)
    image = pictures(1)[0]
    found = OnnxNetwork.load(path, **PLAIN).predict([image])[0]
    half = (image[::2, ::2, 0] / 255).astype(np.float32)
    expected = Image.fromarray(half).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    assert found.shape == (SIZE, SIZE)
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-6)


def test_pictures_of_any_size_get_maps_of_their_size(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", *channel(0), sides=(24, 40))
    network = OnnxNetwork.load(path, **PLAIN)
    assert network.size == (24, 40)
    images = []
    for height, width in ((7, 300), (64, 50), (1, 1)):
        image = np.zeros((height, width, 3), np.uint8)
        image[:, : width // 2, 0] = 200
        images.append(image)
    maps = network.predict(images)
    assert [found.shape for found in maps] == [(7, 300), (64, 50), (1, 1)]
    assert np.abs(maps[0][:, :130] - 200 / 255).max() < 1e-6
    assert maps[0][:, 170:].max() < 1e-6
    assert np.abs(maps[1][:, 27:]).max() < 1e-6


def test_sizes_of_networks_that_take_any(tmp_path: Path) -> None:
    path = save(tmp_path / "any.onnx", *channel(0), sides=("h", "w"))
    assert OnnxNetwork.load(path, "basnet").size == (256, 256)
    assert OnnxNetwork.load(path, "basnet", size=48).size == (48, 48)
    assert OnnxNetwork.load(path, size=64).size == (64, 64)
    with pytest.raises(InputError, match=r"any size; give the size .* u2net, basnet, isnet"):
        OnnxNetwork.load(path)
    fixed = save(tmp_path / "fixed.onnx", *channel(0))
    assert OnnxNetwork.load(fixed, "u2net").size == (SIZE, SIZE)
    with pytest.raises(InputError, match=r"size 64 was given, but .*fixed\.onnx fixes"):
        OnnxNetwork.load(fixed, size=64)


def test_float16_networks_run(tmp_path: Path) -> None:
    path = save(tmp_path / "half.onnx", *channel(0), kind=HALF)
    image = pictures(1)[0]
    found = OnnxNetwork.load(path, **PLAIN).predict([image])[0]
    np.testing.assert_allclose(found, image[..., 0] / 255, atol=5e-4)


def test_a_flat_map_becomes_zeros(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", *channel(0))
    image = np.full((20, 30, 3), 120, np.uint8)
    for preset in PRESETS:
        assert not OnnxNetwork.load(path, preset).predict([image])[0].any()
    black = np.zeros((20, 30, 3), np.uint8)  # divided by its maximum
    assert not OnnxNetwork.load(path, "u2net").predict([black])[0].any()


# ---------------------------------------------------------------- neighbours and names


def test_neighbours_change_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes, constants, width, entering = [], [], 3, "x"
    for number, (features, leaving) in enumerate([(16, "a"), (24, "b"), (1, "y")]):
        weight = rng.standard_normal((features, width, 3, 3)).astype(np.float32) / width
        constants.append(tensor(f"w{number}", weight))
        nodes.append(
            helper.make_node("Conv", [entering, f"w{number}"], [f"c{number}"], pads=[1] * 4)
        )
        nodes.append(helper.make_node("Softsign", [f"c{number}"], [leaving]))
        width, entering = features, leaving
    network = OnnxNetwork.load(save(tmp_path / "net.onnx", nodes, constants), batch_size=5)
    assert network.batch_size == 5
    images = pictures(7, 40, 50)
    alone = [network.predict([image])[0] for image in images]
    for order in (range(7), [6, 0, 3], [2, 1]):
        for index, found in zip(order, network.predict([images[i] for i in order]), strict=True):
            np.testing.assert_array_equal(found, alone[index])


def test_a_network_that_mixes_its_batch_is_run_one_by_one(tmp_path: Path) -> None:
    nodes, constants = channel(0)
    nodes[0].output[0] = "red"
    nodes += [
        helper.make_node("ReduceMax", ["red"], ["top"], keepdims=0),  # over the whole batch
        helper.make_node("Div", ["red", "top"], ["y"]),
    ]
    path = save(tmp_path / "mixes.onnx", nodes, constants)
    network = OnnxNetwork.load(path, **PLAIN)
    assert network.batch_size == 1
    images = pictures(3)
    for image, found in zip(images, network.predict(images), strict=True):
        np.testing.assert_allclose(found, image[..., 0] / image[..., 0].max(), atol=1e-6)


def test_a_batch_of_one_behind_a_dynamic_label(tmp_path: Path) -> None:
    nodes, constants = channel(0)
    nodes[0].output[0] = "red"
    nodes.append(helper.make_node("Reshape", ["red", "shape"], ["y"]))
    constants.append(tensor("shape", np.array([1, 1, SIZE, SIZE])))
    network = OnnxNetwork.load(save(tmp_path / "one.onnx", nodes, constants), **PLAIN)
    assert network.batch_size == 1
    images = pictures(2)
    np.testing.assert_allclose(network.predict(images)[1], images[1][..., 0] / 255, atol=1e-6)


def test_the_name_tells_files_and_settings_apart(tmp_path: Path) -> None:
    red = save(tmp_path / "net.onnx", *channel(0))
    green = save(tmp_path / "other" / "net.onnx", *channel(1))
    names = [
        OnnxNetwork.load(red).name,
        OnnxNetwork.load(green).name,
        OnnxNetwork.load(red, "u2net").name,
        OnnxNetwork.load(red, activation="sigmoid").name,
        OnnxNetwork.load(red, mean=(0, 0, 0)).name,
    ]
    assert len(set(names)) == 5
    assert all(name.startswith("onnx-net-") for name in names)
    again = Path(shutil.copytree(tmp_path, tmp_path / "copy") / "net.onnx")
    assert OnnxNetwork.load(again, batch_size=1, threads=2).name == names[0]


# ---------------------------------------------------------------- what is refused


def test_files_that_are_no_networks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.onnx does not exist; give the ONNX file"):
        OnnxNetwork.load(tmp_path / "gone.onnx")
    with pytest.raises(InputError, match="is not a file; give the ONNX file"):
        OnnxNetwork.load(tmp_path)
    whole = save(tmp_path / "whole.onnx", *channel(0)).read_bytes()
    for content in (b"", b"no network", b"ORTMORTMORTM" * 9, whole[: len(whole) // 2]):
        path = tmp_path / "bad.onnx"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.onnx cannot be (read|opened).*copy it here"):
            OnnxNetwork.load(path)


def test_files_in_onnxruntimes_own_format_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", *channel(0))
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "net.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    with pytest.raises(InputError, match=r"net\.ort cannot be opened as an ONNX network"):
        OnnxNetwork.load(tmp_path / "net.ort")


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"channels": 1}, "of 1 channels; expected one input"),
        ({"channels": 40, "sides": (40, 3)}, "with the channels second"),
        ({"kind": UINT8}, r"tensor\(uint8\).*of floating point"),
        ({"batch": 1000}, "fixes its batch to 1000"),
        ({"sides": (SIZE, 100_000)}, "4096 is the most"),
    ]
    for number, (changed, reason) in enumerate(cases):
        path = save(tmp_path / f"{number}.onnx", *channel(0), **changed)
        with pytest.raises(InputError, match=reason) as caught:
            OnnxNetwork.load(path)
        assert str(path) in str(caught.value)
    values = [helper.make_tensor_value_info(name, FLOAT, [1, 3, 8, 8]) for name in "xyz"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "y"], ["z"])], "g", values[:2], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "two.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"x tensor\(float\) \[1, 3, 8, 8\], y .*one input"):
        OnnxNetwork.load(tmp_path / "two.onnx")


def test_outputs_that_do_not_fit(tmp_path: Path) -> None:
    mean = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    flat = helper.make_node("ReduceMean", ["x"], ["y"], axes=[0, 1], keepdims=0)
    cases = {
        "classes": ([mean], r"is \[1, 3\] for a batch of 1"),
        "flat": ([flat], r"is \[32, 32\] for a batch of 1"),
        "three": ([helper.make_node("Identity", ["x"], ["y"])], r"is \[1, 3, 32, 32\]"),
        "list": ([helper.make_node("SequenceConstruct", ["x"], ["y"])], "not a tensor of numbers"),
    }
    for name, (nodes, reason) in cases.items():
        path = tmp_path / f"{name}.onnx"
        if name == "list":
            entering = helper.make_tensor_value_info("x", FLOAT, ["b", 3, SIZE, SIZE])
            leaving = helper.make_tensor_sequence_value_info("y", FLOAT, None)
            graph = helper.make_graph(nodes, "graph", [entering], [leaving])
            opset = [helper.make_opsetid("", 17)]
            model = helper.make_model(graph, opset_imports=opset, ir_version=8)
            path.write_bytes(model.SerializeToString())
        else:
            save(path, nodes)
        with pytest.raises(InputError, match=reason) as caught:
            OnnxNetwork.load(path)
        assert f"{name}.onnx" in str(caught.value)
        assert "as first output" in str(caught.value)


def test_an_output_of_another_batch(tmp_path: Path) -> None:
    nodes, constants = channel(0)
    nodes[0].output[0] = "red"
    nodes.append(helper.make_node("ReduceMean", ["red"], ["y"], axes=[0]))
    path = save(tmp_path / "net.onnx", nodes, constants, batch=2)
    with pytest.raises(
        InputError, match=r"is \[1, 1, 32, 32\] for a batch of 2; expected one map a"
    ):
        OnnxNetwork.load(path)


def test_values_just_outside_are_clipped(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", *channel(0))
    image = np.full((SIZE, SIZE, 3), 255, np.uint8)
    image[0] = 0
    settings = {**PLAIN, "mean": (4e-4, 0, 0), "std": (0.9990, 1, 1)}
    found = OnnxNetwork.load(path, **settings).predict([image])[0]
    assert (found.min(), found.max()) == (0, 1)


def test_values_that_are_no_saliency(tmp_path: Path) -> None:
    nodes, constants = channel(0)
    nodes[0].output[0] = "red"
    nodes.append(helper.make_node("Log", ["red"], ["y"]))
    path = save(tmp_path / "log.onnx", nodes, constants)
    with pytest.raises(InputError, match=r"log\.onnx gives NaN or infinite values"):
        OnnxNetwork.load(path)  # normalised values below zero
    network = OnnxNetwork.load(path, mean=(-1, 0, 0), activation="sigmoid")
    image = pictures(1)[0]
    expected = 1 / (1 + np.exp(-np.log(image[..., 0] / 255 / 0.229 + 1 / 0.229)))
    np.testing.assert_allclose(network.predict([image])[0], expected, atol=1e-6)
    red = save(tmp_path / "red.onnx", *channel(0))
    with pytest.raises(InputError, match=r"red\.onnx gives values from -1\..* take the activation"):
        OnnxNetwork.load(red, activation="none")


def test_a_size_that_the_network_cannot_run_at(tmp_path: Path) -> None:
    nodes, constants = channel(0)
    nodes[0].output[0] = "red"
    nodes.append(helper.make_node("Add", ["red", "plane"], ["y"]))
    constants.append(tensor("plane", np.zeros((1, 1, 48, 48), np.float32)))
    path = save(tmp_path / "net.onnx", nodes, constants, sides=("h", "w"))
    assert OnnxNetwork.load(path, size=48).size == (48, 48)
    with pytest.raises(InputError, match=r"does not run on \[1, 3, 320, 320\]: .*give the size"):
        OnnxNetwork.load(path, "u2net")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"preset": "u3net"}, "'u3net'; it can be one of: auto, u2net, basnet, isnet"),
        ({"activation": "relu"}, "'relu'; it can be one of: none, sigmoid, minmax"),
        ({"device": "tpu"}, "'tpu'; it can be one of: cpu, cuda"),
        ({"batch_size": 0}, "batch size 0"),
        ({"threads": 0}, "threads 0"),
        ({"size": 8}, "size 8 is not in 16…4096"),
        ({"mean": (0.5, 0.5)}, r"mean \[0.5, 0.5\] is not three numbers"),
        ({"std": (1, 1, float("nan"))}, "std .* is not three numbers"),
        ({"std": (1, 0, 1)}, "is not above 0"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, arguments: dict[str, Any], reason: str) -> None:
    path = save(tmp_path / "net.onnx", *channel(0))
    with pytest.raises(InputError, match=reason):
        OnnxNetwork.load(path, **arguments)


def test_cuda_is_refused_where_onnxruntime_has_none(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in runtime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    path = save(tmp_path / "net.onnx", *channel(0))
    with pytest.raises(InputError, match=r"device cuda: .*install onnxruntime-gpu"):
        OnnxNetwork.load(path, device="cuda")


# ---------------------------------------------------------------- data in other files


def outside(path: Path, location: str, backwards: bool = False) -> Path:
    """A network that adds a plane of values, which lie in another file, to the red channel."""
    nodes, constants = channel(0)
    nodes[0].output[0] = "red"
    nodes.append(helper.make_node("Add", ["red", "plane"], ["y"]))
    plane = onnx.TensorProto(name="plane", data_type=FLOAT, dims=[1, 1, SIZE, SIZE])
    plane.data_location = onnx.TensorProto.EXTERNAL
    plane.external_data.add(key="location", value=location)
    save(path, nodes, [*constants, plane])
    if backwards:  # the value before its key, which protobuf takes as well
        key = b"\n\x08location"
        value = b"\x12" + bytes([len(location)]) + location.encode()
        content = path.read_bytes()
        assert content.count(key + value) == 1
        path.write_bytes(content.replace(key + value, value + key))
    return path


def test_data_beside_the_model_is_read_and_named(tmp_path: Path) -> None:
    path = outside(tmp_path / "net.onnx", "net.onnx.data")
    with pytest.raises(InputError, match=r"net\.onnx cannot be opened"):
        OnnxNetwork.load(path, **PLAIN)
    names = []
    for value in (0.0, 0.05):
        np.full(SIZE * SIZE, value, np.float32).tofile(tmp_path / "net.onnx.data")
        network = OnnxNetwork.load(path, **{**PLAIN, "std": (2, 2, 2)})
        image = pictures(1)[0]
        expected = image[..., 0] / 510 + value
        np.testing.assert_allclose(network.predict([image])[0], expected, atol=1e-6)
        names.append(network.name)
    assert names[0] != names[1]


def test_data_elsewhere_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    np.zeros(SIZE * SIZE, np.float32).tofile(secret)
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "link.bin").symlink_to(secret)
    for location in ("../secret.bin", str(secret), "link.bin", "a/../../secret.bin"):
        path = outside(folder / "net.onnx", location)
        with pytest.raises(InputError, match=r"net\.onnx names data outside its own folder"):
            OnnxNetwork.load(path, **PLAIN)
        path = outside(folder / "net.onnx", location, backwards=True)  # onnxruntime's own check
        with pytest.raises(InputError, match=r"net\.onnx cannot be opened"):
            OnnxNetwork.load(path, **PLAIN)
    path = outside(folder / "net.onnx", "*/_ORT_MEM_ADDR_/*")
    with pytest.raises(InputError, match="names data outside its own folder"):
        OnnxNetwork.load(path, **PLAIN)


def test_an_old_onnxruntime_gets_no_data_in_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = outside(tmp_path / "net.onnx", "net.onnx.data")
    np.zeros(SIZE * SIZE, np.float32).tofile(tmp_path / "net.onnx.data")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(runtime, "__version__", "1.23.2")
    with pytest.raises(InputError, match=r"install onnxruntime>=1\.24"):
        OnnxNetwork.load(path, **PLAIN)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    OnnxNetwork.load(save(tmp_path / "one.onnx", *channel(0)), **PLAIN)
