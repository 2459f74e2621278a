"""Command line of predictions: `maskbank predict …`; under torchrun the ranks share the images."""

import hashlib
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write, read_json, require_writable, write_json
from data_pipeline.progress import log_above_bars
from data_pipeline.sources.voc import VOC_CLASSES
from data_pipeline.terminal import run_app
from evaluation.commands import options as common
from evaluation.palettes import MAX_CLASSES, Bytes, class_palette, legend, object_palette
from evaluation.photographs.cluster_names import NAMES, read_named_head
from evaluation.photographs.record import FOLDER as CLUSTERS
from evaluation.photographs.record import HEAD
from evaluation.predict import PredictConfig, Predictor
from evaluation.predict_inputs import LEGEND, OUTPUT_KINDS, find_pictures
from evaluation.predict_outputs import Outputs
from evaluation.predict_run import FAILURES, Counts, predict_files
from evaluation.prototypes import PrototypeConfig
from evaluation.saved_head import SavedHead
from trainer.distributed import (
    Ranks,
    broadcast_object,
    cores_per_rank,
    end_ranks,
    same_on_all_ranks,
)
from trainer.encoder import Encoder, load_encoder

_log = logging.getLogger(__name__)
_RECORD = "classes.json"
_NO_HEAD = "none"
_IMAGENET_S_CLASSES = 1000  # the value of ignored parts
# what the server of ImageNet-S asks for beside the class folders
_METHOD = """Method name: maskbank
Training data: null
Training scheme: null
Networks: null
Paper/Project link: null
Method description: null
"""

Head = Annotated[
    Optional[str],  # noqa: UP045 (typer)
    typer.Option(
        help="File of `cluster`, `evaluate kmeans` or `linear`; default: what the run has of the "
        "first two. none: saliency masks."
    ),
]
Write = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help=f"Of {', '.join(OUTPUT_KINDS)}; with commas or repeated. Default: colour,overlay."
    ),
]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")


@app.command()
def predict(
    network: common.Network,
    images: Annotated[
        list[str], typer.Argument(help="Images, folders (searched deeply), patterns in quotes.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of predictions.")],
    head: Head = None,
    own_classifier: Annotated[
        bool, typer.Option("--own-classifier", help="That of a linear-probe checkpoint.")
    ] = False,
    write: Write = None,
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Images are resized to this side, pixels; default: the head's, or 512."),
    ] = None,
    resize: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="opencv, antialias or crop (keeps the ratio); default: as the head."),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Take images at their own size, in tiles if large.")
    ] = False,
    max_side: Annotated[int, typer.Option(help="Side of --whole's tiles, pixels.")] = 1024,
    overlap: Annotated[int, typer.Option(help="Pixels that tiles share.")] = 128,
    threshold: Annotated[
        float, typer.Option(help="Probability of an object, where there is no head.")
    ] = 0.5,
    batch_size: common.BatchSize = 16,
    resume: Annotated[
        bool,
        typer.Option("--resume/--overwrite", help="Keep outputs that are there, or make anew."),
    ] = True,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Take JPEGs that a decoder warns about.")
    ] = False,
    precision: common.Precision = "float32",
    device: common.Device = "auto",
) -> None:
    """Class maps of your images, by a trained network.

    Images that cannot be read are skipped and named in OUTPUT/failures.jsonl.

    Examples: `maskbank predict runs/voc photos --output predicted`;
    `maskbank predict runs/voc 'photos/**/*.jpg' --output predicted --write index,overlay --whole`
    """
    with same_on_all_ranks():
        kinds = _kinds(write or ["colour,overlay"])
        if batch_size < 1:
            raise InputError(f"--batch-size is {batch_size}; it must be at least 1")
        how: Any = resize  # the configuration checks it
        require_writable(output)
        config = PredictConfig(
            *(size, whole, max_side, overlap, threshold, precision),
            saliency="saliency" in kinds,
            embedding="embedding" in kinds,
            resize=how,
        )
        predictor, where = _load(network, head, own_classifier, kinds, config)
    ranks = common.start(device)
    if ranks.device.type != "cpu":
        predictor = Predictor(predictor.encoder, predictor.head, ranks.device, config)
    outputs = Outputs(output, kinds, _palette(predictor), len(predictor.classes))
    pictures = None
    if ranks.is_main:  # one rank looks, as files may come and go
        pictures = find_pictures(images, output)
        _prepare(outputs, predictor, where, overwrite=not resume)
    found = broadcast_object(pictures, ranks) or []
    counts = predict_files(
        predictor, found, outputs, ranks, batch_size, cores_per_rank(), not resume, lenient
    )
    _finish(counts, output, ranks)


def _load(
    network: Path,
    head: str | None,
    own_classifier: bool,
    kinds: tuple[str, ...],
    config: PredictConfig,
) -> tuple[Predictor, str]:
    """The network with its head, on the CPU, and what to call the head."""
    encoder = load_encoder(network)
    if "saliency" in kinds:
        encoder.require("saliency", "--write saliency", "leave that out of --write")
    chosen, where = choose_head(encoder, network, head, own_classifier)
    predictor = Predictor(encoder, chosen, "cpu", config)
    if "imagenet-s" in kinds and len(predictor.classes) > _IMAGENET_S_CLASSES:
        raise InputError(
            f"ImageNet-S has no {len(predictor.classes)} classes; leave --write imagenet-s out"
        )
    return predictor, where


def choose_head(
    encoder: Encoder, network: Path, head: str | None, own_classifier: bool
) -> tuple[SavedHead | None, str]:
    """The head that a command means, None for saliency masks, and what to call it.

    Raises:
        InputError: it is not there, or options contradict each other.
    """
    own = _own_classifier(encoder)
    if own_classifier:
        if head is not None:
            raise InputError("--own-classifier and --head are two classifiers; give one")
        if own is None:
            raise InputError(
                f"{encoder.origin} has no classifier of its own; give --head a file of "
                "`maskbank evaluate linear`"
            )
        return own, "own classifier"
    if head is not None and head != _NO_HEAD:
        found = read_named_head(Path(head))
        if found.step != encoder.step:
            _log.warning(
                "%s was made on the network at step %d, this one is at step %d: classes may be "
                "others",
                *(head, found.step, encoder.step),
            )
        return found, _digest(Path(head))
    if head is None and (default := _head_of_run(network)) is not None:
        found = read_named_head(default)
        if found.step != encoder.step:
            raise InputError(
                f"{default} was made on the network at step {found.step}, and the newest is at "
                f"step {encoder.step}; evaluate again (`maskbank evaluate kmeans`), give the older "
                "checkpoint, or --head none for saliency masks"
            )
        return found, _digest(default)
    if head is None and own is not None and "saliency" not in encoder.parts:
        return own, "own classifier"
    if head is None:
        _log.warning(
            "%s has no classes yet: every object is of the one class `object`. To get classes "
            "first, run `maskbank cluster %s --shards SHARDS` (no labels needed), or "
            "`maskbank evaluate kmeans` on labelled shards",
            *(network, network),
        )
    return None, _NO_HEAD


def _head_of_run(network: Path) -> Path | None:
    """What `evaluate kmeans` or `cluster` wrote for a run directory, or one of its checkpoints.

    Raises:
        InputError: they did so on several data sets.
    """
    if not network.is_dir():
        return None
    run = network if (network / "config.yaml").is_file() else network.resolve().parents[1]
    name = "kmeans-trained.safetensors"
    known = [run / "evaluation" / name]
    if not known[0].is_file():
        known = sorted((run / "evaluation").glob(f"*/{name}"))
    found = [path for path in (*known, run / CLUSTERS / HEAD) if path.is_file()]
    if len(found) > 1:
        raise InputError(
            f"{run} has classes of several data sets; give --head one of "
            f"{', '.join(map(str, found))}"
        )
    return found[0] if found else None


def _own_classifier(encoder: Encoder) -> SavedHead | None:
    if encoder.classifier is None:
        return None
    weight, bias = encoder.classifier
    count = len(bias)
    voc = count == len(VOC_CLASSES)  # what the released probes are of
    names = VOC_CLASSES if voc else ("background", *(f"class {i}" for i in range(1, count)))
    return SavedHead(
        kind="linear",
        tensors={"weight": weight.flatten(1), "bias": bias},
        classes=names,
        data_set="voc" if voc else "",
        size=512,
        prototype=PrototypeConfig(),
        step=encoder.step,
        resize="opencv",
    )


def _digest(path: Path) -> str:
    """Of a head's file and of the names of its clusters."""
    names = path.with_name(NAMES)
    parts = [path.read_bytes(), names.read_bytes() if names.is_file() else b""]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _kinds(words: list[str]) -> tuple[str, ...]:
    kinds = [kind.strip() for word in words for kind in word.split(",")]
    for kind in kinds:
        if kind not in OUTPUT_KINDS:
            raise InputError(f"--write is {kind!r}; it can be any of {', '.join(OUTPUT_KINDS)}")
    return tuple(dict.fromkeys(kinds))


def _palette(predictor: Predictor) -> Bytes:
    if predictor.head is None:
        return object_palette()
    return class_palette(max(MAX_CLASSES, len(predictor.classes) + 1))


def _prepare(outputs: Outputs, predictor: Predictor, head: str, overwrite: bool) -> None:
    """Makes the folder, with the legend; refuses one with predictions of another kind."""
    record: dict[str, Any] = {
        "classes": [
            {"index": index, "name": name, "colour": outputs.palette[index].tolist()}
            for index, name in enumerate(predictor.classes)
        ],
        "made_by": {
            "network": os.path.abspath(predictor.encoder.origin),
            "step": predictor.encoder.step,
            "head": head,
            "kind": predictor.kind,
            # what is written beside the classes does not change them
            **{
                name: value
                for name, value in asdict(predictor.config).items()
                if name not in ("saliency", "embedding")
            },
            "size": predictor.size,
            "resize": predictor.resize,
        },
    }
    path = outputs.folder / _RECORD
    if path.exists() and not overwrite:
        before = read_json(path, "the record of predictions", "give --output another folder")
        changed = [
            name for name, value in record["made_by"].items()
            if before.get("made_by", {}).get(name) != value
        ]  # fmt: skip
        if changed:
            raise InputError(
                f"{outputs.folder} has predictions of another {', '.join(changed)}, which would "
                "be mixed with these; give --output another folder, or --overwrite"
            )
    outputs.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, record, indent=1)
    with atomic_write(outputs.folder / LEGEND) as file:
        legend(predictor.classes, outputs.palette).save(file, "PNG")
    if "imagenet-s" in outputs.kinds:
        method = outputs.folder / "imagenet-s" / "method.txt"
        method.parent.mkdir(exist_ok=True)
        if not method.exists():
            method.write_text(_METHOD, encoding="utf-8")


def _finish(counts: Counts, output: Path, ranks: Ranks) -> None:
    """Says what was done, and ends with 1 where nothing was."""
    if ranks.is_main:
        parts = [f"{counts.done:,} predicted"]
        if counts.present:
            parts.append(f"{counts.present:,} there already")
        if counts.failed:
            parts.append(f"{counts.failed:,} skipped, see {output / FAILURES}")
        common.console.print(f"{', '.join(parts)}: {output}", soft_wrap=True, markup=False)
    end_ranks()
    if not counts.done + counts.present:
        if ranks.is_main:
            print("maskbank: no image could be read", file=sys.stderr, flush=True)
        sys.exit(1)


def main(arguments: list[str] | None = None) -> None:
    log_above_bars()
    run_app(app, "maskbank predict", arguments, on_ranks=("predict",))


if __name__ == "__main__":
    main()
