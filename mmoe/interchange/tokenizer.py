"""Saves a run's text tokenizer for others: the same text, in the ids of the run's vocabulary.

In the vocabulary structure tokens come before text, so a text id is the tokenizer's own id plus their number. The
exported file has the shifted ids and the structure tokens as special tokens, and puts `bos` in front of a text, as
documents have it. Ids of audio and actions have no text and no place in it. A text that spells a structure token is
text there too: whoever wants the token gives its id, or says `split_special_tokens=False`.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

from mmoe.errors import DataError
from mmoe.tokenizers.text import TextTokenizer
from mmoe.tokenizers.vocabulary import Placeholder, Structure, Vocabulary

BOS, EOS, PAD = (f"<|{token.name.lower()}|>" for token in (Structure.BOS, Structure.EOS, Structure.PAD))


def save_tokenizer(tokenizer: TextTokenizer, vocabulary: Vocabulary, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`; raises DataError where a text token looks like structure."""
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    model, offset = content["model"], vocabulary.ranges["text"].start
    structure = {token.name.lower(): int(token) for token in (*Structure, *Placeholder)}
    structure |= vocabulary.further_ids
    special = {f"<|{name}|>": id for name, id in structure.items()}
    if clash := special.keys() & model["vocab"].keys():
        raise DataError(f"the text tokenizer has a token {min(clash)}, the name of a structure token; train another")
    model["vocab"] = special | {token: id + offset for token, id in model["vocab"].items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": id, "content": token, **flags} for token, id in special.items()]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [int(Structure.BOS)], "tokens": [BOS]}},
    }
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    _check(path, tokenizer, special, offset)
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "clean_up_tokenization_spaces": False}
    # transformers before 5 adds token_type_ids, which no decoder takes, unless it is told what a model takes.
    names |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    names |= {"split_special_tokens": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


def _check(path: Path, tokenizer: TextTokenizer, special: dict[str, int], offset: int) -> None:
    """Raises DataError where the exported file would read the name of a structure token as that token."""
    exported = Tokenizer.from_file(str(path))
    exported.encode_special_tokens = True
    for name in special:
        if exported.encode(name, add_special_tokens=False).ids != (tokenizer.encode(name) + offset).tolist():
            raise DataError(
                f"the text tokenizer would read the text {name} as a structure token once that is in its vocabulary "
                "(model.ignore_merges); train another"
            )
