"""Command line: `maskbank export`, a trained network for other programs."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from data_pipeline.errors import InputError
from data_pipeline.files import require_writable_file
from data_pipeline.terminal import run_app
from trainer.encoder import load_encoder
from trainer.export import FORMATS, TOLERANCE, Format, export_network

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")


@app.command()
def export(
    network: Annotated[
        Path,
        typer.Argument(help="Run directory, checkpoint's folder, or file of ours or of others."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    kind: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")] = "safetensors",
    size: Annotated[
        tuple[int, int],
        typer.Option(help="Height and width to trace with, pixels; others work where they can."),
    ] = (224, 224),
    initial: Annotated[
        bool, typer.Option("--initial", help="The network before training.")
    ] = False,
    device: Annotated[str, typer.Option(help="Of torch-export: cpu or cuda.")] = "cpu",
) -> None:
    """Write a trained network for other programs, and compare what they will compute.

    **safetensors**: our names, the settings as metadata; every command that takes a network reads
    it. **torchvision**: a state dict for its ResNet, without fc; features are those of here with
    replace_stride_with_dilation=[False, True, True]. **onnx**, **torch-export**: images [B,3,H,W],
    normalised as ImageNet's, to embedding [B,D,H,W] and saliency logits [B,H,W]; a linear probe's
    classes [B,C,H,W] too.

    Example: `maskbank export runs/mine --format onnx --output encoder.onnx`
    """
    chosen: Format | None = next((one for one in FORMATS if one == kind), None)
    if chosen is None:
        raise InputError(f"--format is {kind!r}; it can be {', '.join(FORMATS)}")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device is {device!r}; it can be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but this torch sees no GPU")
    require_writable_file(output)
    encoder = load_encoder(network, initial)
    written = export_network(encoder, output, chosen, size, torch.device(device))
    print(f"written: {output}")
    if written is not None:
        sides = "any size" if written.size is None else f"{written.size[0]}×{written.size[1]} alone"
        print(
            f"images of {sides}, any batch, to {', '.join(written.outputs)}; differs by "
            f"{written.difference:.1e} of the largest value ({TOLERANCE:.0e} is allowed)"
        )


def main(arguments: list[str] | None = None) -> None:
    # what a file holds beside the network is said, too
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("trainer").setLevel(logging.INFO)
    run_app(app, "maskbank export", arguments)


if __name__ == "__main__":
    main()
