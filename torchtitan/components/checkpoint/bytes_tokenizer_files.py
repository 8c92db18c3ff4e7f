"""Write the tokenizer `bytes` as files that `transformers.AutoTokenizer` opens."""

from __future__ import annotations

import json
from pathlib import Path

from torchtitan.components.tokenizer import BytesTokenizer

BOS, EOS = "<|bos|>", "<|eos|>"


def write_bytes_tokenizer(folder: Path, add_bos: bool = False) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` with the ids of `BytesTokenizer`.

    Args:
        add_bos: begin texts with BOS, unless they are encoded without special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    # A byte-level BPE without merges: every byte is a token. The vocabulary must name bytes by
    # GPT-2's characters: themselves if printable in Latin-1, the others in order by those from 256.
    characters = pre_tokenizers.ByteLevel.alphabet()
    bytes_in_their_order = sorted(range(256), key=lambda byte: (chr(byte) not in characters, byte))
    vocabulary = dict(zip(sorted(characters), bytes_in_their_order, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    assert tokenizer.token_to_id(BOS) == BytesTokenizer.bos_id
    assert tokenizer.token_to_id(EOS) == BytesTokenizer.eos_id
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS}:1 $B:1",
            special_tokens=[(BOS, BytesTokenizer.bos_id)],
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
