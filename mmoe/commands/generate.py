"""Defines `mmoe generate`, which makes text, an audio clip or actions with a trained run."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmoe.commands.arguments import Addresses
from mmoe.commands.console import console
from mmoe.errors import ConfigError, brief

if TYPE_CHECKING:
    from mmoe.evaluation.predict import PredictedChunk
    from mmoe.training.run import Run


def generate(
    folder: Annotated[Path, typer.Argument(metavar="RUN")],
    overrides: Addresses = None,
    prompt: Annotated[str, typer.Option(help="text to continue, context of the audio, or an instruction")] = "",
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="[CAMERA=]PATH", help="an image before the text; of a slice, one a camera"),
    ] = None,
    audio: Annotated[Path | None, typer.Option(help="an audio clip that stands before the text")] = None,
    speak: Annotated[Path | None, typer.Option(help="write sampled audio to this wav instead of text")] = None,
    source: Annotated[
        str | None, typer.Option(help="predict actions as of this source, from --image, --state and --prompt")
    ] = None,
    state: Annotated[str | None, typer.Option(metavar="X,Y,...", help="the state of the slice, with --source")] = None,
    clip: Annotated[
        str | None,
        typer.Option(metavar="SOURCE:KEY", help="predict the actions of a prepared sample, beside the logged"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="longest audio")] = 2.0,
    temperature: Annotated[float, typer.Option(min=0, help="of text and audio; 0: always the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="0: all")] = 0,
    top_p: Annotated[float, typer.Option(help="share of probability to draw from")] = 1.0,
    seed: int = 0,
) -> None:
    """Sample text or an audio clip from a trained run, or predict actions with it."""
    images = image or []
    given = {
        "--image": images,
        "--state": state,
        "--prompt": prompt,
        "--source": source,
        "--audio": audio,
        "--speak": speak,
    }
    if clip is not None:
        _exclude(given, "--clip", ("--source", "--image", "--state", "--prompt", "--audio", "--speak"))
    elif source is not None:
        _exclude(given, "--source", ("--audio", "--speak"))
    elif speak is not None:
        _exclude(given, "--speak", ("--image", "--audio", "--state"))
    elif state is not None or len(images) > 1:
        raise ConfigError("a state and several images are a slice; name the source whose actions to predict: --source")

    from mmoe.evaluation.generate import Sampling
    from mmoe.evaluation.generate import generate as text
    from mmoe.evaluation.generate import speak as spoken
    from mmoe.evaluation.predict import predict_clip, predict_slice
    from mmoe.training.run import Run

    run = Run.load(folder, overrides=overrides or ())
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if clip is not None:
        named, parted, key = clip.partition(":")
        if not parted:
            raise ConfigError(f"--clip {brief(clip)}: write SOURCE:KEY, the source being one of {_sources(run)}")
        _show(predict_clip(run, named, key))
    elif source is not None:
        numbers = None if state is None else _numbers(state)
        _show([predict_slice(run, source, images=images, state=numbers, instruction=prompt)])
    elif speak is not None:
        length = spoken(run, speak, prompt=prompt, seconds=seconds, sampling=sampling)
        console.print(f"wrote {length:.2f} s of audio to {speak}")
    else:
        shown = Path(images[0]) if images else None
        answer = text(run, prompt, image=shown, audio=audio, max_tokens=max_tokens, sampling=sampling)
        console.verbatim(prompt + answer)


def _exclude(given: Mapping[str, object], option: str, others: tuple[str, ...]) -> None:
    if found := [other for other in others if given[other]]:
        raise ConfigError(f"{option} takes no {', '.join(found)}; leave one of them out")


def _sources(run: "Run") -> str:
    return ", ".join(run.tokenizers.actions) or "none, for no source has actions"


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--state {brief(text)}: {error}; write numbers with commas between them") from error


def _show(chunks: list["PredictedChunk"]) -> None:
    """Print the actions of chunks as columns, one line a step; what was logged stands in brackets."""
    lines = [["seconds", "step", *chunks[0].names, *chunks[0].named]]
    for chunk in chunks:
        for step, actions in enumerate(chunk.predicted):
            seconds = f"{(chunk.time_ns + step * chunk.period_ns) / 1e9:.3f}" if chunk.period_ns or not step else "?"
            cells = [f"{value:.5g}" for value in actions] + [said[step] for said in chunk.named.values()]
            if chunk.logged is not None:
                logged = ["-" if value != value else f"{value:.5g}" for value in chunk.logged[step].tolist()]
                logged += [said[step] for said in chunk.logged_named.values()]
                cells = [f"{cell} ({was})" for cell, was in zip(cells, logged)]
            lines.append([seconds, str(step), *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        console.verbatim("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
