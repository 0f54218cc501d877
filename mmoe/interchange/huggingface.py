"""Exchanges weights of the text path with folders that Hugging Face's `from_pretrained` and `save_pretrained` know."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmoe.errors import DataError
from mmoe.interchange.families import family_of, from_huggingface, to_huggingface
from mmoe.interchange.folder import TensorReader, read_json, write_weights
from mmoe.interchange.names import WeightRow, weight_rows
from mmoe.models.decoder import MultimodalModel
from mmoe.models.embeddings import ModelInputs
from mmoe.parallel.materialize import assign

SHARD_BYTES = 5_000_000_000
VOCABULARY_KEY = "mmoe_text_ids"  # of config.json: [start, stop) of the text ids, where structure ids come first
# What an export writes; a folder that holds anything else is not overwritten.
WRITTEN = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model*.safetensors*")


@dataclass(frozen=True)
class Exported:
    """Says what `save` wrote, in parameters; `left_out` are the parts of the model that text does not go through."""

    architecture: str
    parameters: int
    left_out: dict[str, int]


class Pretrained(Mapping[str, Tensor]):
    """Maps our names to the weights of a Hugging Face folder, in our layouts, each read when it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Read the config of `folder`; raise DataError where it cannot be read, or is of a model ours cannot be."""
        self.folder = Path(folder)
        where = self.folder / "config.json"
        tree = read_json(where)
        family, self.config = from_huggingface(tree, str(where))
        self.vocabulary_size: int = tree["vocab_size"]
        self.text_ids: list[int] | None = tree.get(VOCABULARY_KEY)
        self.bos_eos_pad = [tree.get(f"{name}_token_id") for name in ("bos", "eos", "pad")]
        self._file = TensorReader(self.folder)
        self._rows = {row.ours: row for row in weight_rows(self.config, family.experts)}

    def __getitem__(self, name: str) -> Tensor:
        return self._rows[name].read(self._file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def build(self) -> MultimodalModel:
        """Build the model with these weights, in their dtype; what text does not go through has initial values."""
        model = self.config.build(ModelInputs(self.vocabulary_size), seed=0)
        model = model.to(self["embeddings.token.weight"].dtype)
        fill_model(model, self.items())
        self.check_read()
        return model

    def check_read(self) -> None:
        """Raise DataError where the files hold a tensor that nothing asked for: part of the model would be lost."""
        ignored = {"lm_head.weight"} if self.config.tie_embeddings else set()
        left = [n for n in self._file.unread() if n not in ignored and not n.endswith("rotary_emb.inv_freq")]
        if left:
            raise DataError(
                f"{self.folder} holds {len(left)} tensors that its config.json does not speak of ({left[0]}); "
                "it is not a model that mmoe can be"
            )


@torch.no_grad()
def fill_model(model: MultimodalModel, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors into those of their names in `model`, of which this rank may hold a part.

    Raises DataError where a shape differs."""
    parameters = model.state_dict()
    for name, value in weights:
        if value.shape != parameters[name].shape:
            raise DataError(
                f"{name} is {list(value.shape)}, the model has {list(parameters[name].shape)}; "
                "the weights do not fit their config"
            )
        assign(parameters[name], value)


def save(
    model: MultimodalModel,
    folder: str | Path,
    *,
    positions: int,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    extra: dict[str, object] | None = None,
) -> Exported:
    """Write config.json and safetensors of the model's text path; `dtype` None keeps that of the weights.

    `positions` is the length of the sequences it was trained on, `extra` further keys of config.json. An earlier
    export in `folder` is replaced. Raises ConfigError where the family cannot express the model.
    """
    folder, config = Path(folder), model.decoder.config
    family = family_of(config)
    state = model.state_dict()
    table = weight_rows(config, family.experts)
    dtype = dtype or model.embeddings.token.weight.dtype
    tree = to_huggingface(config, model.embeddings.token.weight.shape[0], positions) | (extra or {})
    tree |= {"torch_dtype": str(dtype).removeprefix("torch.")}
    _clear(folder)
    write_weights(folder, _tensors(table, state), shard_bytes, dtype)
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    written = {row.ours for row in table}
    left: Counter[str] = Counter()
    for name, value in state.items():
        if name not in written:
            left[".".join(name.split(".")[: 1 if name.startswith(("action", "contrastive")) else 2])] += value.numel()
    if inside := [part for part in left if part.startswith("decoder")]:
        raise AssertionError(f"{inside[0]} is in the text path, but not in mmoe.interchange.names")
    return Exported(family.architecture, sum(state[name].numel() for name in written), dict(left))


def _tensors(table: list[WeightRow], state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for row in table:
        yield from row.write(state[row.ours])


def _clear(folder: Path) -> None:
    """An empty folder; raises DataError where files would be lost that no export wrote."""
    if folder.exists():
        foreign = [path.name for path in folder.iterdir() if not any(path.match(pattern) for pattern in WRITTEN)]
        if foreign:
            raise DataError(f"{folder} holds {foreign[0]}, which no export wrote; name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
