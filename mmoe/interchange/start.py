"""Takes the first weights of a run from another run or from a Hugging Face folder (`training.start_from`)."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmoe.checkpoint.manager import CheckpointManager
from mmoe.errors import ConfigError
from mmoe.interchange.families import NEUTRAL, NEUTRAL_MOE
from mmoe.interchange.huggingface import Pretrained, fill_model
from mmoe.models.decoder import ModelConfig
from mmoe.models.init import initial_value
from mmoe.models.moe.layer import MoEConfig
from mmoe.recipe.training import StartConfig
from mmoe.runtime.agreement import ProcessGroupRanks
from mmoe.tokenizers.text import TextTokenizer
from mmoe.training.fingerprint import check_unchanged, fingerprint
from mmoe.training.run import UNWATCHED, Run, is_run, open_sources, read_config, saved_fingerprint

logger = logging.getLogger(__name__)

VOCABULARY_TABLES = ("embeddings.token.weight", "unembedding.weight")
MATRICES = ("gate", "up", "down")


def start(run: Run, config: StartConfig) -> None:
    """Give the model of `run` the weights that `config` names, and say which of its parameters keep their own."""
    for sentence in take_weights(run, config):
        logger.info(sentence)


def take_weights(run: Run, config: StartConfig) -> list[str]:
    """Give the model of `run` the weights that `config` names; returns what there is to say of them.

    All ranks of the run call this. Each reads the weights whole into its memory, and copies its part of them.
    Raises ConfigError where the function that the weights were trained for is not the one that the run computes.
    """
    weights, source = _load(run, config)
    _check_same_function(source, run.config.model, config.weights)
    given = _Expanded(weights, source, run.config.model, config.noise, run.config.training.seed)
    here = run.model.state_dict()
    fill_model(run.model, ((name, given[name]) for name in here if name in given))
    # Stages of a pipeline hold some of the names each. The first rank has all sizes, and is the one that speaks.
    sizes = ProcessGroupRanks().gather({name: value.numel() for name, value in here.items()})
    own = {name: size for part in sizes for name, size in part.items()}
    kept, unused = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    taken = sum(own[name] for name in own.keys() & given.keys())
    said = [f"{config.weights}: {taken:,} parameters of {run.folder} begin with these weights"]
    for what, names in (("keep their initial values", kept), ("of the weights are not used", unused)):
        if names:
            said.append(f"{len(names)} parameters {what}: {', '.join(names)}")
    return said


def _load(run: Run, config: StartConfig) -> tuple[Mapping[str, Tensor], ModelConfig]:
    """The weights by our names, their token tables with the ids of `run`, and the model they are of."""
    if is_run(config.weights):
        folder, other = Path(config.weights), read_config(config.weights, UNWATCHED)
        sources, tokenizers = open_sources(other)
        _check_tokenizer(tokenizers.text, run, config.weights)
        if tokenizers.vocabulary != run.tokenizers.vocabulary:
            raise ConfigError(
                f"training.start_from: the vocabulary of {config.weights} is not that of this run; "
                "give both the same tokenizers.*, and sources of the same cameras"
            )
        state: dict[str, Any] = {"model": {}, "trainer": {}}  # whatever was saved
        CheckpointManager(folder / "checkpoints", other.checkpoint).load(state, config.step)
        check_unchanged(saved_fingerprint(state), fingerprint(sources, tokenizers), folder, only="tokenizers.")
        return state["model"], other.model
    if config.step is not None:
        raise ConfigError(f"training.start_from.step is {config.step}, but {config.weights} is no run; leave it out")
    pretrained = Pretrained(config.weights)
    weights = dict(pretrained)
    pretrained.check_read()
    text = run.tokenizers.vocabulary.ranges["text"]
    if pretrained.text_ids is not None:  # written by `mmoe export`: ids mean there what they mean here
        if pretrained.text_ids != [text.start, text.stop] or (
            pretrained.vocabulary_size != run.tokenizers.vocabulary.size
        ):
            raise ConfigError(
                f"training.start_from: {config.weights} has {pretrained.vocabulary_size} ids, text at "
                f"{pretrained.text_ids}, this run {run.tokenizers.vocabulary.size}, text at {[text.start, text.stop]}; "
                "give this run the tokenizers.* of the run that was exported"
            )
        return weights, pretrained.config
    tokenizer = Path(config.weights) / "tokenizer.json"
    if tokenizer.is_file():
        _check_tokenizer(TextTokenizer.load(tokenizer), run, config.weights)
    if pretrained.vocabulary_size < len(text):
        raise ConfigError(
            f"training.start_from: {config.weights} has {pretrained.vocabulary_size} ids, fewer than the {len(text)} "
            f"of this run's text tokenizer; set tokenizers.text.path to {tokenizer}"
        )
    tables = {name: _text_rows(run, name, weights[name]) for name in VOCABULARY_TABLES if name in weights}
    return weights | tables, pretrained.config


def _text_rows(run: Run, name: str, theirs: Tensor) -> Tensor:
    """The run's initial table with their rows in its range of text ids."""
    text = run.tokenizers.vocabulary.ranges["text"]
    model = run.config.model
    shape = torch.Size((run.tokenizers.vocabulary.size, model.d_model))
    table = initial_value(name, shape, run.config.training.seed, model.init_std, model.n_layers)
    table[text.start : text.stop] = theirs[: len(text)].to(table)
    return table


def _check_tokenizer(theirs: TextTokenizer, run: Run, where: str) -> None:
    if theirs.fingerprint != run.tokenizers.text.fingerprint:
        raise ConfigError(
            f"training.start_from: the text tokenizer of {where} is not that of this run; set tokenizers.text.path "
            "to its file, and prepare the sources with it"
        )


def _check_same_function(source: ModelConfig, target: ModelConfig, where: str) -> None:
    ours, theirs = (_function(config) for config in (target, source))
    if differing := [key for key in ours if ours[key] != theirs[key]]:
        key = differing[0]
        raise ConfigError(
            f"training.start_from: model.{key} is {ours[key]}, but the weights of {where} are of {theirs[key]}; "
            "set it to that"
        )
    if target.moe is None and source.moe is not None:
        raise ConfigError(f"training.start_from: the weights of {where} have experts and model.moe is null; set it")
    if target.moe is None:
        return
    upcycled = [n for n in range(target.n_layers) if target.moe.in_layer(n) and not _has_experts(source, n)]
    if lost := [n for n in range(target.n_layers) if _has_experts(source, n) and not target.moe.in_layer(n)]:
        raise ConfigError(
            f"training.start_from: layer {lost[0]} has experts in {where}, and is dense in model.moe; "
            "set model.moe.layer_freq and first_k_dense so that it has them"
        )
    if source.moe is not None:
        _check_same_experts(source.moe, target.moe, where)
    if upcycled and target.moe.intermediate_size != source.intermediate_size:
        raise ConfigError(
            f"training.start_from: model.moe.intermediate_size is {target.moe.intermediate_size}, but an expert begins "
            f"as a copy of the dense network of {where}, which is {source.intermediate_size} wide; set "
            "model.moe.intermediate_size to that"
        )
    if upcycled and (target.moe.routed_scaling_factor != 1 or not target.moe.norm_topk_prob):
        raise ConfigError(
            "training.start_from: copies of a dense network stand for it only when their weights add up to 1; "
            "set model.moe.norm_topk_prob to true and model.moe.routed_scaling_factor to 1.0"
        )


def _function(config: ModelConfig) -> dict[str, object]:
    """What decides about the function of the dense part."""
    return config.model_dump(exclude=NEUTRAL | {"moe", "head_dim", "intermediate_size"}) | {
        "head_dim": config.head_width
    }


def _check_same_experts(source: MoEConfig, target: MoEConfig, where: str) -> None:
    exclude = NEUTRAL_MOE | {"layer_freq", "first_k_dense", "capacity_factor"}
    theirs, ours = source.model_dump(exclude=exclude), target.model_dump(exclude=exclude)
    same_scores = {"softmax", "softmax_topk"} if source.norm_topk_prob and target.norm_topk_prob else set()
    for key, value in ours.items():
        if value != theirs[key] and not (key == "score_func" and {value, theirs[key]} <= same_scores):
            raise ConfigError(
                f"training.start_from: model.moe.{key} is {value}, but the weights of {where} are of {theirs[key]}; "
                "set it to that"
            )


def _has_experts(config: ModelConfig, number: int) -> bool:
    return config.moe is not None and config.moe.in_layer(number)


class _Expanded(Mapping[str, Tensor]):
    """`weights`, the dense networks of layers that have experts in `target` made into theirs when they are asked for.

    An expert is a copy (Komatsuzaki et al. 2023, "Sparse Upcycling") plus Gaussian noise of `noise` times the
    standard deviation of each matrix. Shared experts begin with zeros in `down`, so that their output is zero.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], source: ModelConfig, target: ModelConfig, noise: float, seed: int
    ) -> None:
        self.weights, self.target, self.noise, self.seed = weights, target, noise, seed
        numbers = [n for n in range(target.n_layers) if _has_experts(target, n) and not _has_experts(source, n)]
        layers = [f"decoder.blocks.{n}.feed_forward." for n in numbers]
        self._experts = {f"{at}experts.{matrix}": f"{at}{matrix}.weight" for at in layers for matrix in MATRICES}
        shared = layers if target.moe is not None and target.moe.n_shared_experts else []
        self._zeros = {f"{at}shared.down.weight" for at in shared}
        self._names = sorted((weights.keys() - self._experts.values()) | self._experts.keys() | self._zeros)

    def __getitem__(self, name: str) -> Tensor:
        moe = self.target.moe
        if moe is not None and name in self._experts:
            return self._copies(name, self.weights[self._experts[name]].T, moe.n_experts)
        if moe is not None and name in self._zeros:
            return torch.zeros(self.target.d_model, moe.n_shared_experts * moe.intermediate_size)
        return self.weights[name]

    def _copies(self, name: str, dense: Tensor, experts: int) -> Tensor:
        copies = dense.expand(experts, *dense.shape)
        if not self.noise:
            return copies
        normal = initial_value(f"{name}.upcycling", copies.shape, self.seed, 1.0, self.target.n_layers)
        return copies + self.noise * dense.std() * normal.to(dense) / normal.std()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
