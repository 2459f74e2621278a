"""Heads as files: what is written comes back, and what strangers write is checked."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.errors import InputError
from evaluation.cluster import Clusters
from evaluation.prototypes import PrototypeConfig
from evaluation.saved_head import SavedHead, clusters_as_tensors, read_head

CLASSES = ("background", "ant", "bee")


def clustered() -> SavedHead:
    draw = np.random.default_rng(0)
    clusters = Clusters(draw.normal(size=4), draw.normal(size=(4, 3)), draw.normal(size=(2, 3)))
    tensors = clusters_as_tensors(clusters, [0, 2, -1])
    return SavedHead(
        "kmeans", tensors, CLASSES, "voc", 160, PrototypeConfig("probability"), 9, "antialias"
    )


def classifier() -> SavedHead:
    tensors = {"weight": torch.randn(3, 6), "bias": torch.randn(3)}
    return SavedHead("linear", tensors, CLASSES, "", 512, PrototypeConfig(), 0, "opencv")


@pytest.mark.parametrize("head", [clustered(), classifier()])
def test_what_is_written_comes_back(head: SavedHead, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "head.safetensors"
    head.write(path)
    found = read_head(path)
    assert replace(found, tensors={}) == replace(head, tensors={})
    assert found.tensors.keys() == head.tensors.keys()
    for name, tensor in head.tensors.items():
        assert torch.equal(found.tensors[name], tensor)


def test_clusters_assign_as_before(tmp_path: Path) -> None:
    head = clustered()
    head.write(tmp_path / "head.safetensors")
    vectors = np.random.default_rng(1).normal(size=(50, 4))
    found = read_head(tmp_path / "head.safetensors").clusters.assign(vectors)
    assert found.tolist() == head.clusters.assign(vectors).tolist()
    assert set(found.tolist()) == {0, 1}


def broken(**changes: Any) -> SavedHead:
    return replace(clustered(), **changes)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (broken(kind="linear"), "of kind 'linear' with centres"),
        (broken(kind="tree"), "of kind 'tree'"),
        (broken(size=1 << 20), "size 1048576"),
        (broken(resize="cubic"), "resize 'cubic'"),
        (broken(classes=("background",)), "1 classes"),
        (broken(classes=("background", "ant")), "do not fit together"),
        (broken(tensors={**clustered().tensors, "mean": torch.zeros(7)}), "do not fit together"),
        (
            broken(tensors={**clustered().tensors, "class_of_cluster": torch.zeros(1).long()}),
            "do not fit together",
        ),
        (replace(classifier(), classes=(*CLASSES, "cow")), "do not fit together"),
    ],
)
def test_parts_that_do_not_fit_are_refused(head: SavedHead, said: str, tmp_path: Path) -> None:
    head.write(tmp_path / "head.safetensors")
    with pytest.raises(InputError, match=said):
        read_head(tmp_path / "head.safetensors")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        read_head(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no head at all")
    with pytest.raises(InputError, match="holds no head"):
        read_head(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match=r"it is no head.*give kmeans-NETWORK"):
        read_head(tmp_path / "plain.safetensors")
    meta = {"format": "maskbank-head-1", "head": json.dumps([1])}
    save_file({"a": torch.zeros(1)}, tmp_path / "list.safetensors", meta)
    with pytest.raises(InputError, match="holds no head"):
        read_head(tmp_path / "list.safetensors")
