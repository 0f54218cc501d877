"""Asks for optional packages, in this one place: available, or not available because ...

Nothing is imported before somebody asks, and the answer is kept for the life of the process.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from types import ModuleType

from mmoe.errors import PackageError, brief, did_you_mean


@dataclass(frozen=True)
class OptionalPackage:
    """Describes an optional package: what for, how it is imported, how it is installed, what asks for it."""

    purpose: str
    module: str
    distribution: str  # its name on the package index
    install: str  # the arguments of `pip install`
    condition: Callable[[], str | None] | None = None  # what the machine must have: None, or what it lacks
    key: str = ""  # that chooses it, with a value, or an option of a command; empty: no config does


@dataclass(frozen=True)
class Status:
    """Says whether a package is usable: `reason` is empty, or begins with "not available because"."""

    name: str
    available: bool
    version: str
    reason: str


def _no_cuda() -> str | None:
    import torch  # only here: importing it takes seconds, and preparation's workers do not need it

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no CUDA device is visible: run on a machine with an NVIDIA GPU and its driver"
    return None


def _no_grouped_gemm() -> str | None:
    if importlib.util.find_spec("grouped_gemm") is None:
        return "the package grouped_gemm, which it multiplies with, is not installed: pip install 'megablocks[gg]'"
    return _no_cuda()


OPTIONAL_PACKAGES = {
    "cuda": OptionalPackage("NVIDIA GPUs", "torch.cuda", "torch", "torch", _no_cuda),
    "decord": OptionalPackage(
        "video decoding (Linux x86-64)", "decord", "decord", "-e '.[media]'", key="data.video_backend: decord"
    ),
    "pyav": OptionalPackage("video decoding, everywhere", "av", "av", "-e '.[media]'", key="data.video_backend: pyav"),
    "pillow": OptionalPackage("images", "PIL", "pillow", "-e '.[media]'", key="data.sources.NAME.kind: image_caption"),
    "soundfile": OptionalPackage(
        "files of audio", "soundfile", "soundfile", "-e '.[media]'", key="data.sources.NAME.kind: audio_text"
    ),
    "torchaudio": OptionalPackage(
        "resampling and making of audio", "torchaudio", "torchaudio", "-e '.[media]'", key="tokenizers.audio.kind: mel"
    ),
    "plotly": OptionalPackage("pages to look at", "plotly", "plotly", "-e '.[report]'", key="evaluation.at_end: true"),
    "webdataset": OptionalPackage("reading shards as others do", "webdataset", "webdataset", "-e '.[dev]'"),
    "tensorboard": OptionalPackage(
        "scalar logs", "tensorboard", "tensorboard", "-e '.[trackers]'", key="monitoring.sinks: [{kind: tensorboard}]"
    ),
    "wandb": OptionalPackage(
        "scalar logs", "wandb", "wandb", "-e '.[trackers]'", key="monitoring.sinks: [{kind: wandb}]"
    ),
    "trackio": OptionalPackage(
        "scalar logs", "trackio", "trackio", "-e '.[trackers]'", key="monitoring.sinks: [{kind: trackio}]"
    ),
    "transformers": OptionalPackage(
        "EnCodec, DAC, Mimi; parity tests",
        "transformers",
        "transformers",
        "-e '.[codecs]'",
        key="tokenizers.audio.kind: encodec",
    ),
    "s3fs": OptionalPackage("shards on S3", "s3fs", "s3fs", "-e '.[remote]'", key="data.sources.NAME.shards: s3://..."),
    "moto": OptionalPackage("a local S3 to measure and test with", "moto", "moto", "-e '.[dev]'"),
    "aiohttp": OptionalPackage(
        "shards on web servers", "aiohttp", "aiohttp", "-e '.[remote]'", key="data.sources.NAME.shards: https://..."
    ),
    "gcsfs": OptionalPackage(
        "shards on Google Cloud Storage", "gcsfs", "gcsfs", "-e '.[remote]'", key="data.sources.NAME.shards: gs://..."
    ),
    "ray": OptionalPackage(
        "preparation on a cluster", "ray", "ray", "-e '.[prepare]'", key="mmoe prepare --engine ray"
    ),
    "datasketch": OptionalPackage(
        "near-duplicate texts", "datasketch", "datasketch", "-e '.[prepare]'", key="prepare.dedup.near: true"
    ),
    "imagehash": OptionalPackage(
        "near-duplicate images", "imagehash", "imagehash", "-e '.[prepare]'", key="prepare.dedup.near: true"
    ),
    "py3langid": OptionalPackage(
        "languages of texts", "py3langid", "py3langid", "-e '.[prepare]'", key="prepare.filters.text.languages: [en]"
    ),
    "transformer-engine": OptionalPackage(
        "expert GEMM",
        "transformer_engine",
        "transformer-engine",
        "-e '.[gpu]'",
        _no_cuda,
        key="model.moe.expert_backend: transformer_engine",
    ),
    "megablocks": OptionalPackage(
        "expert GEMM",
        "megablocks",
        "megablocks",
        "'megablocks[gg]'",
        _no_grouped_gemm,
        key="model.moe.expert_backend: megablocks",
    ),
}


@cache
def status(name: str) -> Status:
    """Return whether the package can be used here; raises PackageError for a name that is none."""
    if name not in OPTIONAL_PACKAGES:
        hint = did_you_mean(name, OPTIONAL_PACKAGES) or "."
        raise PackageError(f"{brief(name)} is not a backend{hint} Known are {', '.join(OPTIONAL_PACKAGES)}")
    package = OPTIONAL_PACKAGES[name]
    lacking = _lacking(package)
    return Status(name, not lacking, _version(package), f"not available because {lacking}" if lacking else "")


def require(name: str, key: str) -> ModuleType:
    """Import the package for a config whose `key` asks for it; raises PackageError with the reason."""
    try:
        found = status(name)
    except PackageError as error:
        raise PackageError(f"{key}: {error}") from None
    if not found.available:
        raise PackageError(f"{key} asks for {name}, {found.reason}; do that, or give {key} another value")
    return importlib.import_module(OPTIONAL_PACKAGES[name].module)


@contextmanager
def needs(purpose: str) -> Iterator[None]:
    """Turn the failed import of an optional package into a PackageError that says what brings it.

    For imports of what stands on such packages, where they are first needed: `with needs("decoding video"): ...`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        for package in OPTIONAL_PACKAGES.values():
            if package.module == module:
                raise PackageError(f"{purpose}: {_absent(package)}") from error
        raise


def _absent(package: OptionalPackage) -> str:
    return f"the package {package.distribution} is not installed: pip install {package.install}"


def _version(package: OptionalPackage) -> str:
    try:
        return metadata.version(package.distribution)
    except metadata.PackageNotFoundError:
        return ""


def _lacking(package: OptionalPackage) -> str | None:
    if importlib.util.find_spec(package.module) is None:
        return _absent(package)
    if package.condition and (lack := package.condition()):
        return lack
    try:
        importlib.import_module(package.module)
    except Exception as error:  # a broken package may raise anything while it is imported
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"importing {package.module} fails ({first}): reinstall {package.distribution} for this torch"
    return None
