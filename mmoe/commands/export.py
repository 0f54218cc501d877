"""Defines `mmoe export`, which writes a run's text path for transformers."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmoe.commands.arguments import Addresses


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN")],
    overrides: Addresses = None,
    *,
    out: Annotated[Path, typer.Option(help="folder to write; an earlier export in it is replaced")],
    format: Annotated[Literal["hf"], typer.Option(help="hf: Hugging Face config.json and safetensors")] = "hf",
    step: Annotated[int | None, typer.Option(help="checkpoint to export; default: the latest")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="of the weights; default: as trained")
    ] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="largest size of one file of weights")] = 5_000_000_000,
) -> None:
    """Write the text path of a run as a Llama, Qwen3, Mixtral or Qwen3-MoE that transformers loads."""
    import torch

    from mmoe.interchange.export import export as write
    from mmoe.training.run import Run

    kind = None if dtype is None else getattr(torch, dtype)
    write(Run.load(folder, step, overrides or ()), out, dtype=kind, shard_bytes=shard_bytes)
