"""Trees and manifests of audio clips, as LibriSpeech and NeMo lay them out, written by soundfile."""

from pathlib import Path

import numpy as np
import soundfile

from tests.data.recordings import write_jsonl

RATE = 16_000


def tone(number: int, samples: int = RATE // 2) -> np.ndarray:
    """Samples [n] i16 unlike those of any other number."""
    time = np.arange(samples)
    wave = np.sin(time * 0.01 * (number + 2)) + 0.3 * np.sin(time * 0.0003 * (number + 3) ** 2)
    return (wave * 12_000).astype(np.int16)


def write_librispeech(folder: Path, speakers: dict[int, tuple[int, ...]], utterances: int = 2) -> dict[str, np.ndarray]:
    """<speaker>/<chapter>/<speaker>-<chapter>-<utterance>.flac with a .trans.txt each chapter; the audio by key."""
    audio = {}
    for speaker, chapters in speakers.items():
        for chapter in chapters:
            place = folder / str(speaker) / str(chapter)
            place.mkdir(parents=True)
            lines = []
            for number in range(utterances):
                name = f"{speaker}-{chapter}-{number:04d}"
                wave = tone(len(audio))
                soundfile.write(place / f"{name}.flac", wave, RATE, subtype="PCM_16")
                audio[f"{speaker}/{chapter}/{name}"] = wave
                lines.append(f"{name} WORDS OF {name}\n")
            (place / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return audio


def write_manifest(path: Path, rows: list[dict]) -> None:
    """A manifest and, for each `audio_filepath` that is not there, a second of audio."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        file = path.parent / row["audio_filepath"]
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, tone(number, RATE), RATE, subtype="PCM_16")
    write_jsonl(path, rows)
