"""Defines `mmoe generate`, which makes text, or an audio clip, with a trained run."""

from pathlib import Path
from typing import Annotated

import typer

from mmoe.commands.arguments import Addresses
from mmoe.commands.console import console


def generate(
    folder: Annotated[Path, typer.Argument(metavar="RUN")],
    overrides: Addresses = None,
    prompt: Annotated[str, typer.Option(help="text to continue, or context of the audio")] = "",
    image: Annotated[Path | None, typer.Option(help="an image that stands before the text")] = None,
    audio: Annotated[Path | None, typer.Option(help="an audio clip that stands before the text")] = None,
    speak: Annotated[Path | None, typer.Option(help="write sampled audio to this wav instead of text")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="longest audio")] = 2.0,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="0: all")] = 0,
    top_p: Annotated[float, typer.Option(help="share of probability to draw from")] = 1.0,
    seed: int = 0,
) -> None:
    """Sample text, or an audio clip, from a trained run."""
    from mmoe.evaluation.generate import Sampling
    from mmoe.evaluation.generate import generate as text
    from mmoe.evaluation.generate import speak as spoken
    from mmoe.training.run import Run

    run = Run.load(folder, overrides=overrides or ())
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if speak is not None:
        length = spoken(run, speak, prompt=prompt, seconds=seconds, sampling=sampling)
        console.print(f"wrote {length:.2f} s of audio to {speak}")
        return
    answer = text(run, prompt, image=image, audio=audio, max_tokens=max_tokens, sampling=sampling)
    console.print(prompt + answer, highlight=False)
