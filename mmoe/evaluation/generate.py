"""Samples from a run for `mmoe generate`: text that continues a prompt, and audio written to a wav.

Every token is sampled among the ids that are legal at its place and the whole document is run again for the next
one: there is no key-value cache, so n tokens cost n forward passes (fine for a look at a small run).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmoe.config.base import Config
from mmoe.data.load.stream import make_collator
from mmoe.data.plan.planner import DocumentRef
from mmoe.errors import ConfigError, DataError
from mmoe.evaluation.inference import inference
from mmoe.modalities.document import Document, DocumentBuilder
from mmoe.optional import needs
from mmoe.precision.upcast import upcast
from mmoe.schema.batch import PackedBatch
from mmoe.schema.channels import CANCELLED, find_silence
from mmoe.schema.modality import Modality
from mmoe.schema.sample import NO_PAIR
from mmoe.tokenizers.audio import Layout, code_order, deserialize, serialize
from mmoe.tokenizers.vocabulary import Structure
from mmoe.training.run import Run


class Sampling(Config):
    """Says how a token is drawn from the legal ones."""

    temperature: float = Field(default=0.8, ge=0)  # 0: always the likeliest
    top_k: int = Field(default=0, ge=0)  # only so many of the likeliest; 0: all
    top_p: float = Field(default=1.0, gt=0, le=1)  # only the likeliest that together have this probability
    seed: int = Field(default=0, ge=0)

    def draw(self, logits: Tensor, legal: Tensor, generator: torch.Generator) -> int:
        """Draw one of the ids `legal` [n] by the model's `logits` [V] of all V ids."""
        scores = upcast(logits)[legal].cpu()
        if self.temperature == 0:
            return int(legal[scores.argmax()])
        p, order = (scores / self.temperature).softmax(0).sort(descending=True, stable=True)
        if self.top_k:
            p[self.top_k :] = 0
        p[p.cumsum(0) - p >= self.top_p] = 0  # the first one always stays
        return int(legal[order[torch.multinomial(p, 1, generator=generator)]])


class CodeGrammar:
    """Says which codebooks may come next in a stream of audio codes, and whether it may end, by the layout itself.

    A stream of at most `most_frames` frames is legal when `code_order` of some number of frames begins with its
    codebooks; it may end when it is all of one.
    """

    def __init__(self, codebooks: int, layout: Layout, most_frames: int) -> None:
        frames = range(1, most_frames + 1)
        self._orders = {n: code_order(n, codebooks, layout)[1].astype(np.int16) for n in frames}
        self._possible = list(frames)
        self.length = 0

    def legal(self) -> tuple[list[int], bool]:
        """Return the codebooks that may come next, and whether the stream may end here."""
        orders = [self._orders[n] for n in self._possible]
        codebooks = {int(order[self.length]) for order in orders if self.length < len(order)}
        return sorted(codebooks), any(self.length == len(order) for order in orders)

    def advance(self, codebook: int) -> None:
        """Take the next code of the stream, which is of this `codebook`."""
        at = self.length
        self._possible = [n for n in self._possible if at < len(self._orders[n]) and self._orders[n][at] == codebook]
        self.length += 1


@dataclass(frozen=True)
class _Prompt:
    """What stands before the first generated token; `patches` with their positions, `audio` and `text` as ids."""

    patches: tuple[np.ndarray, np.ndarray] | None
    audio: np.ndarray | None
    text: np.ndarray

    def builder(self, run: Run) -> DocumentBuilder:
        builder = DocumentBuilder.from_tokenizers(run.tokenizers)
        builder.structure(Structure.BOS)
        if self.patches is not None:
            builder.image(*self.patches, pair=NO_PAIR)
        if self.audio is not None:
            builder.audio(self.audio, 0, NO_PAIR)
        return builder


def generate(
    run: Run,
    prompt: str,
    *,
    image: Path | None = None,
    audio: Path | None = None,
    max_tokens: int = 64,
    sampling: Sampling | None = None,
) -> str:
    """Sample the text that follows `prompt`, up to the end the model chooses or `max_tokens`.

    `image` and `audio` stand before the prompt as in training (image or audio, then its text). Raises
    ConfigError where prompt and answer do not fit a sequence, DataError for a file that cannot be read.
    """
    sampling, tokenizers = sampling or Sampling(), run.tokenizers
    texts = tokenizers.vocabulary.ranges["text"]
    legal = torch.tensor([Structure.EOS, *texts])
    start = _Prompt(
        None if image is None else read_image(run, image),
        _audio(run, audio),
        texts.start + tokenizers.text.encode(prompt).astype(np.int64),
    )

    def document(generated: list[int]) -> Document:
        builder = start.builder(run)
        builder.text(np.r_[start.text, generated].astype(np.int64), NO_PAIR)
        return builder.finish()

    check_fits(run, len(document([])) + max_tokens)
    generator = torch.Generator().manual_seed(sampling.seed)
    generated: list[int] = []
    with inference(run):
        while len(generated) < max_tokens:
            token = sampling.draw(_logits(run, document(generated), -1), legal, generator)
            if token == Structure.EOS:
                break
            generated.append(token)
    return tokenizers.text.decode(np.array(generated, np.int64) - texts.start)


def speak(run: Run, path: Path, *, prompt: str = "", seconds: float = 2.0, sampling: Sampling | None = None) -> float:
    """Sample an audio clip, decode it with the run's codec and write it to `path` (wav); returns its length in seconds.

    The document is ``bos prompt audio_start codes audio_end``. In training an audio clip stands before its text, so a
    prompt in front of it is no more than context. The audio ends where the model ends it, after `seconds` at most.
    Raises ConfigError for a run without an audio codec and where the audio fits no sequence.
    """
    sampling, tokenizers = sampling or Sampling(), run.tokenizers
    codec, vocabulary = tokenizers.audio, tokenizers.vocabulary
    if codec is None:
        raise ConfigError(f"{run.folder}: tokenizers.audio is null, so this run has no codec to make audio with")
    text = vocabulary.ranges["text"].start + tokenizers.text.encode(prompt).astype(np.int64)
    frames = int(codec.num_frames(round(seconds * codec.sample_rate), codec.sample_rate))
    if frames < 1:
        raise ConfigError(f"an audio clip of {seconds} s has no code frame; ask for more seconds")
    with needs("writing audio"):
        import soundfile
    start = _Prompt(None, None, text)
    check_fits(run, 3 + len(text) + frames * codec.codebooks)

    def document(generated: list[int]) -> Document:
        builder = start.builder(run)
        builder.text(start.text, NO_PAIR)
        builder.audio(np.array(generated, np.int64), 0, NO_PAIR)
        return builder.finish()

    codes = _sample_codes(run, document, frames, sampling)
    wave = codec.decode(codes)
    soundfile.write(path, wave, codec.sample_rate)
    return len(wave) / codec.sample_rate


def _sample_codes(
    run: Run, document: Callable[[list[int]], Document], most_frames: int, sampling: Sampling
) -> np.ndarray:
    """Codes [T, Q], T <= `most_frames`; `document` lays out the ids so far, closed by `audio_end`."""
    codec, config = run.tokenizers.audio, run.tokenizers.config.audio
    assert codec is not None  # as `speak` has seen
    assert config is not None
    first, size = run.tokenizers.vocabulary.ranges["audio"].start, codec.codebook_size
    grammar = CodeGrammar(codec.codebooks, config.layout, most_frames)
    generator = torch.Generator().manual_seed(sampling.seed)
    generated: list[int] = []
    with inference(run):
        while True:
            codebooks, may_end = grammar.legal()
            legal = [i for q in codebooks for i in range(first + q * size, first + (q + 1) * size)]
            if may_end:
                legal.append(int(Structure.AUDIO_END))
            # The token before `audio_end`, which sees nothing that comes after it.
            logits = _logits(run, document(generated), -2)
            token = sampling.draw(logits, torch.tensor(legal), generator)
            if token == Structure.AUDIO_END:
                break
            generated.append(token)
            grammar.advance((token - first) // size)
    flat = (np.array(generated) - first) % size
    return deserialize(flat, len(flat) // codec.codebooks, codec.codebooks, config.layout)


def document_batch(run: Run, document: Document, source: int = 0) -> PackedBatch:
    """Make the batch that holds this document alone, as one of the source of this number."""
    patches = len(document.values[Modality.VISION][1]) if Modality.VISION in document.values else 0
    size = {"sequence_length": len(document), "patches_per_sequence": patches}
    collate = make_collator(
        run.config.data.model_copy(update=size), run.tokenizers, run.config.losses.ce.label_weights()
    )
    origin = DocumentRef(source, 0, 0, 0, 0, 1, False, True)
    return collate([[(origin, [document])]], groups=[0]).to(run.device)


def _logits(run: Run, document: Document, at: int) -> Tensor:
    """What the model expects after position `at` of the document: [V]."""
    return run.model.logits(run.model(document_batch(run, document)).hidden[0, at][None])[0]


def read_image(run: Run, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read an image file as the model is given it: patches and their positions.

    Raises ConfigError for a run that never saw an image, DataError for a file that cannot be read.
    """
    if not run.tokenizers.value_dims[Modality.VISION]:
        raise ConfigError(f"{run.folder} was trained without images, so it cannot read {path}; leave --image out")
    with needs("decoding images"):
        from mmoe.data.load.media import image_size, load_image
    data, vision = _read(path), run.tokenizers.vision
    rows, columns = vision.grid(*image_size(data, str(path)))
    pixels = load_image(data, str(path), (rows * vision.config.patch, columns * vision.config.patch))
    frames = np.repeat(pixels[None], vision.config.tubelet, axis=0)
    return vision.encode(frames, rows, columns), vision.positions(rows, columns)


def _audio(run: Run, path: Path | None) -> np.ndarray | None:
    if path is None:
        return None
    codec, config = run.tokenizers.audio, run.tokenizers.config.audio
    if codec is None or config is None:
        raise ConfigError(f"{run.folder} was trained without audio, so it cannot read {path}; leave --audio out")
    with needs("decoding audio"):
        from mmoe.data.load.media import audio_info, audio_levels, load_audio
    data = _read(path)
    samples, _ = audio_info(data, str(path))
    if find_silence(*audio_levels(data, 0, samples, str(path))) == CANCELLED:
        raise DataError(
            f"{path} is silent, since its channels cancel out when they are mixed; give a file of one of them"
        )
    wave, rate = load_audio(data, 0, samples, str(path))
    codes, codebook = serialize(codec.encode(wave, rate), config.layout)
    return run.tokenizers.vocabulary.audio_ids(codes, codebook)


def _read(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give the path of a readable file") from error


def check_fits(run: Run, needed: int) -> None:
    """Raise ConfigError where so many positions fit no sequence of the run."""
    room = run.config.data.sequence_length
    if needed > room:
        raise ConfigError(
            f"prompt and answer take up to {needed} positions, but data.sequence_length of {run.folder} is {room}; "
            "shorten the prompt or ask for less"
        )
