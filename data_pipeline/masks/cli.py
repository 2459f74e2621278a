"""Command line of masks: `maskbank masks make …`, `maskbank masks score`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from data_pipeline.errors import InputError
from data_pipeline.files import require_writable_file
from data_pipeline.masks.make_cli import make_command
from data_pipeline.masks.methods import Method, OnnxMethod, PriorMethod, SpectralMethod
from data_pipeline.terminal import Interrupted, console, progress_bar, run_app

if TYPE_CHECKING:
    from data_pipeline.masks.score_masks import ScoreReport

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")
make_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(
    make_app,
    name="make",
    help="Make a mask for every picture of a folder: **prior** needs nothing but the pictures, "
    "**onnx** and **spectral** need weights that you have. Masks are STEM.png in the same tree, "
    "0 and 255; a picture in which nothing is salient gets none. Started again, a command goes on.",
)


@app.callback()
def masks() -> None:
    """Make saliency masks for pictures that have none, and score masks."""


@make_command(make_app, threshold="otsu", processes=2)
def prior(
    size: Annotated[
        int, typer.Option(help="Longest side that pictures are worked on at, pixels.")
    ] = 320,
) -> Method:
    """Without any weights: what stands out, and is not connected to the picture's border.

    Robust background detection (Zhu et al., CVPR 2014), refined by colours. On a CPU.

    Example: `maskbank masks make prior --images photos -o masks -p 8`
    """
    return PriorMethod(size)


@make_command(make_app)
def onnx(
    weights: Annotated[Path, typer.Option(help="ONNX file of a saliency network.")],
    preset: Annotated[
        str, typer.Option(help="What the network is: u2net, basnet, isnet; auto: as its file says.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    size: Annotated[
        int, typer.Option(help="Side that pictures are resized to; 0: the preset's.")
    ] = 0,
    mean: Annotated[str, typer.Option(help="Of RGB, instead of the preset's: 0.5,0.5,0.5")] = "",
    std: Annotated[str, typer.Option(help="Of RGB, instead of the preset's: 1,1,1")] = "",
    activation: Annotated[
        str, typer.Option(help="Of the output, instead of the preset's: none, sigmoid, minmax.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> Method:
    """With a saliency network as an ONNX file: U²-Net, BASNet, IS-Net, or another.

    Example: `maskbank masks make onnx --weights u2net.onnx --preset u2net --images photos
    -o masks`
    """
    return OnnxMethod(
        weights,
        preset,
        batch_size,
        size or None,
        _numbers("--mean", mean),
        _numbers("--std", std),
        activation or None,
        device,
    )


@make_command(make_app)
def spectral(
    weights: Annotated[
        Path, typer.Option(help="Weights of a self-supervised ViT, safetensors or torch file.")
    ],
    model: Annotated[
        str, typer.Option(help="timm's name of the network.")
    ] = "vit_small_patch16_224.dino",
    size: Annotated[
        int, typer.Option(help="Longest side that pictures are resized to, pixels.")
    ] = 480,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time, on a GPU.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> Method:
    """With a self-supervised ViT, as DINO: normalised cut over its patches (TokenCut, CVPR 2022).

    Example: `maskbank masks make spectral --weights dino_deitsmall16_pretrain.pth --images photos
    -o masks`
    """
    return SpectralMethod(model, weights, size, batch_size, device)


@app.command()
def score(
    masks: Annotated[str, typer.Option(help="Folder of masks or soft maps (0…255).")],
    truth: Annotated[str, typer.Option(help="Folder of true masks, same tree and stems.")],
    ids: Annotated[
        bool | None,
        typer.Option(
            "--ids/--no-ids",
            help="Masks hold object ids 1…254; unsaid: as their masks.json says.",
            show_default=False,
        ),
    ] = None,
    missing_as_empty: Annotated[
        bool,
        typer.Option(
            "--missing-as-empty",
            help="Score a missing mask as an empty one; or else it is left out.",
        ),
    ] = False,
    worst: Annotated[int, typer.Option(min=0, help="List so many of the lowest IoU.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write all that, as JSON.")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", "-p", min=1, help="Workers.")] = 1,
) -> None:
    """Score masks or soft maps against true ones: IoU, F-measure, MAE, S-measure.

    Example: `maskbank masks score --masks masks --truth truth --worst 10 --output score.json`
    """
    from data_pipeline.masks.score_masks import count_pairs, score_masks, write_report
    from data_pipeline.storage import as_location

    if output is not None:
        require_writable_file(output)
    truth_folder = as_location(truth)
    with progress_bar() as bar:
        pairs = count_pairs(truth_folder) if console.is_terminal else None
        task = bar.add_task("scoring masks", total=pairs)
        try:
            report = score_masks(
                as_location(masks),
                truth_folder,
                ids,
                missing_as_empty,
                worst,
                processes,
                lambda more: bar.advance(task, more),
            )
        except KeyboardInterrupt:
            raise Interrupted("interrupted; nothing was written") from None
    _show(report)
    if output is not None:
        write_report(report, output)


def _show(report: "ScoreReport") -> None:
    table = Table()
    table.add_column("mean over images")
    table.add_column("adaptive threshold", justify="right")
    table.add_column("best fixed threshold", justify="right")
    for name, mean, most, threshold in (
        ("IoU ↑", report.iou, report.iou_max, report.iou_max_threshold),
        ("F-measure, β² = 0.3 ↑", report.f_beta, report.f_beta_max, report.f_beta_max_threshold),
    ):
        table.add_row(name, f"{mean:.4f}", f"{most:.4f} at {threshold}")
    table.add_section()
    table.add_row("MAE ↓", f"{report.mae:.4f}", "")
    table.add_row("S-measure ↑", f"{report.s_measure:.4f}", "")
    table.add_section()
    table.add_row("images", f"{report.images:,}", "")
    missing = " (scored as empty)" if report.missing_as_empty else ""
    table.add_row("true masks without a mask", f"{report.missing:,}{missing}", "")
    table.add_row("masks without a true one", f"{report.extra:,}", "")
    table.add_row("[red]failed[/]" if report.failed else "failed", f"{report.failed:,}", "")
    console.print(table)
    for failure in [each for each in report.failures if each.stage not in ("missing", "extra")][:5]:
        text = f"  {failure.source}: {failure.stage}: {failure.reason}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if report.worst:
        lowest = Table(title="lowest IoU", title_justify="left")
        for heading in ("mask", "IoU", "F-measure", "MAE", "S-measure"):
            lowest.add_column(heading, justify="left" if heading == "mask" else "right")
        for each in report.worst:
            values = (each.iou, each.f_beta, each.mae, each.s_measure)
            lowest.add_row(Text(each.key), *(f"{value:.4f}" for value in values))
        console.print(lowest)


def _numbers(option: str, text: str) -> tuple[float, ...] | None:
    if not text:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"{option} is {text!r}; expected three numbers as 0.5,0.5,0.5") from None


def main(arguments: list[str] | None = None) -> None:
    run_app(app, "maskbank masks", arguments)


if __name__ == "__main__":
    main()
