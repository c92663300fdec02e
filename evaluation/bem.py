"""BEM: does an answer mean the same as the reference? The second half of E-VQA's metric.

    python -m evaluation.bem convert --saved-model answer_equivalence_bem_1 --vocab vocab.txt --out bem     # once
    python evaluate.py --score predictions.jsonl --references test.csv --benchmark evqa --bem bem

BEM (Bulian et al. 2022) is a BERT that reads candidate, reference and question, and says whether the two answers are
equivalent. Its authors published it as a TensorFlow SavedModel; `convert` writes it as a Hugging Face folder, without
TensorFlow: it reads the variables' file format (an SSTable of names, types, shapes and offsets, and a file of raw numbers).
`--vocab` is the vocabulary of the uncased BERT-base. A reproduction trained elsewhere and already in Hugging Face format
serves too, but is another model: the score names the folder it was made with.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import DataError


class Bem:
    """Answer equivalence (Bulian et al. 2022): a BERT classifier in Hugging Face format, P(equivalent | candidate, reference, question)."""

    def __init__(self, folder: Path | str):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = (
            AutoModelForSequenceClassification.from_pretrained(folder).to(self.device).eval()
        )

    def scores(self, triples: list[tuple[str, str, str]], batch: int = 64) -> list[float]:
        """Of (candidate, reference, question): [CLS] candidate [SEP] reference [SEP] question [SEP], segments 0, 1, 2."""
        ids = (
            self.tokenizer(
                [text for triple in triples for text in triple], add_special_tokens=False
            )["input_ids"]
            if triples
            else []
        )
        last, out = self.model.config.type_vocab_size - 1, []
        for start in range(0, len(triples), batch):
            rows, kinds = [], []
            for i in range(start, min(start + batch, len(triples))):
                parts = [part + [self.tokenizer.sep_token_id] for part in ids[3 * i : 3 * i + 3]]
                parts[0] = [self.tokenizer.cls_token_id] + parts[0]
                rows.append(torch.tensor(sum(parts, [])[:512]))
                kinds.append(
                    torch.tensor([min(n, last) for n, part in enumerate(parts) for _ in part][:512])
                )
            pad = torch.nn.utils.rnn.pad_sequence
            inputs = {
                "input_ids": pad(rows, batch_first=True),
                "token_type_ids": pad(kinds, batch_first=True),
                "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
            }
            with torch.inference_mode():
                out += (
                    self.model(**{k: v.to(self.device) for k, v in inputs.items()})
                    .logits.float()
                    .softmax(-1)[:, 1]
                    .tolist()
                )
        return out


# ------------------------------------------------------------------------------ from TensorFlow's format


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, next position) of a base-128 number."""
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at


def message(data: bytes) -> dict[int, list]:
    """A protocol buffer's fields, {number: values}; nested messages stay bytes."""
    fields, at = {}, 0
    while at < len(data):
        tag, at = varint(data, at)
        if tag & 7 == 0:
            value, at = varint(data, at)
        elif tag & 7 == 2:
            size, at = varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            size = {1: 8, 5: 4}[tag & 7]
            value, at = data[at : at + size], at + size
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def block_entries(data: bytes, offset: int, size: int):
    """(key, value) of an SSTable block; keys share prefixes with the key before."""
    if data[offset + size] != 0:
        raise DataError(
            "the variables' index is compressed, which TensorFlow does not do; is the file damaged?"
        )
    block, at, key = data[offset : offset + size], 0, b""
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    while at < end:
        shared, at = varint(block, at)
        own, at = varint(block, at)
        length, at = varint(block, at)
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def read_variables(folder: Path) -> dict[str, np.ndarray]:
    """{full name: array} of the float32 variables of a SavedModel, or of a checkpoint with the same two files."""
    index = folder / "variables" / "variables.index"
    if not index.exists():
        raise DataError(f"{folder} is no SavedModel: it has no variables/variables.index")
    data, numbers = (
        index.read_bytes(),
        index.with_name("variables.data-00000-of-00001").read_bytes(),
    )
    if data[-8:] != 0xDB4775248B80FB57.to_bytes(8, "little"):
        raise DataError(f"{index} is not a TensorFlow variables index")
    _, at = varint(data, len(data) - 48)
    _, at = varint(data, at)
    offset, at = varint(data, at)
    entries = {}
    for _, handle in block_entries(data, offset, varint(data, at)[0]):
        start, at = varint(handle, 0)
        entries |= dict(block_entries(data, start, varint(handle, at)[0]))
    names, arrays = {}, {}
    for key, value in entries.items():
        entry = message(value)
        start, size = entry.get(4, [0])[0], entry.get(5, [0])[0]
        if key == b"_CHECKPOINTABLE_OBJECT_GRAPH":
            raw = numbers[
                start : start + size
            ]  # a string tensor: its length, a checksum, the bytes
            graph = raw[varint(raw, 0)[1] + 4 :]
            for node in message(graph).get(1, []):
                for attribute in message(node).get(2, []):
                    fields = message(attribute)
                    if 3 in fields:
                        names[fields[3][0]] = fields.get(2, [fields[3][0]])[0].decode()
        elif key and entry.get(1) == [1]:
            shape = (
                [message(d).get(1, [0])[0] for d in message(entry[2][0]).get(2, [])]
                if 2 in entry
                else []
            )
            arrays[key] = np.frombuffer(numbers, np.float32, size // 4, start).reshape(shape)
    return {names.get(key, key.decode()): array for key, array in arrays.items()}


# Names in BERT's first release and in TensorFlow's Model Garden, and Hugging Face's.
RULES = [
    (
        r"(?:bert/embeddings/word_embeddings|word_embeddings/embeddings)$",
        "bert.embeddings.word_embeddings.weight",
    ),
    (
        r"(?:bert/embeddings/position_embeddings|position_embeddings?/embeddings)$",
        "bert.embeddings.position_embeddings.weight",
    ),
    (
        r"(?:bert/embeddings/token_type_embeddings|type_embeddings/embeddings)$",
        "bert.embeddings.token_type_embeddings.weight",
    ),
    (r"embeddings/(?:LayerNorm|layer_norm)/(gamma|beta)$", "bert.embeddings.LayerNorm.{1}"),
    (
        r"layer_(\d+)/(?:attention/self|self_attention)/(query|key|value)/(kernel|bias)$",
        "bert.encoder.layer.{1}.attention.self.{2}.{3}",
    ),
    (
        r"layer_(\d+)/(?:attention/output/dense|self_attention/attention_output)/(kernel|bias)$",
        "bert.encoder.layer.{1}.attention.output.dense.{2}",
    ),
    (
        r"layer_(\d+)/(?:attention/output/LayerNorm|self_attention_layer_norm)/(gamma|beta)$",
        "bert.encoder.layer.{1}.attention.output.LayerNorm.{2}",
    ),
    (
        r"layer_(\d+)/(?:intermediate/dense|intermediate)/(kernel|bias)$",
        "bert.encoder.layer.{1}.intermediate.dense.{2}",
    ),
    (
        r"layer_(\d+)/(?:output/dense|output)/(kernel|bias)$",
        "bert.encoder.layer.{1}.output.dense.{2}",
    ),
    (
        r"layer_(\d+)/(?:output/LayerNorm|output_layer_norm)/(gamma|beta)$",
        "bert.encoder.layer.{1}.output.LayerNorm.{2}",
    ),
    (r"(?:bert/pooler/dense|pooler_transform)/(kernel|bias)$", "bert.pooler.dense.{1}"),
    (r"(?:^|/)(?:output_weights)$", "classifier.weight"),
    (r"(?:^|/)(?:output_bias)$", "classifier.bias"),
    (
        r"(?:^|/)(?:classifier|logits|predictions/transform/logits)(?:/dense)?/(kernel|bias)$",
        "classifier.{1}",
    ),
]
ENDINGS = {"kernel": "weight", "gamma": "weight", "beta": "bias"}


def convert(saved_model: Path, vocab: Path, out: Path):
    """Write the Hugging Face folder. Raises DataError, naming them, when variables are left over or parameters missing."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    state, unknown, heads = {}, [], 0
    for name, array in read_variables(saved_model).items():
        match, target = next(
            ((m, t) for rule, t in RULES if (m := re.search(rule, name))), (None, "")
        )
        if match is None:
            unknown.append(name)
            continue
        target = re.sub(
            r"\{(\d)\}",
            lambda m: ENDINGS.get(match.group(int(m.group(1))), match.group(int(m.group(1)))),
            target,
        )
        heads = array.shape[1] if array.ndim == 3 and name.endswith("query/kernel") else heads
        tensor = torch.from_numpy(array.copy())
        if name.endswith(
            "kernel"
        ):  # TensorFlow multiplies from the other side; Model Garden keeps heads apart
            first = (
                array.shape[0]
                if target.endswith(("query.weight", "key.weight", "value.weight"))
                or array.ndim == 2
                else array.shape[0] * array.shape[1]
            )
            tensor = tensor.reshape(first, -1).T.contiguous()
        elif target.endswith("bias"):
            tensor = tensor.reshape(-1)
        state[target] = tensor
    try:
        words, hidden = state["bert.embeddings.word_embeddings.weight"].shape
        config = BertConfig(
            vocab_size=words,
            hidden_size=hidden,
            num_hidden_layers=1 + max(int(k.split(".")[3]) for k in state if ".layer." in k),
            num_attention_heads=heads or max(1, hidden // 64),
            hidden_act="gelu_pytorch_tanh",
            intermediate_size=len(state["bert.encoder.layer.0.intermediate.dense.bias"]),
            max_position_embeddings=len(state["bert.embeddings.position_embeddings.weight"]),
            type_vocab_size=len(state["bert.embeddings.token_type_embeddings.weight"]),
            num_labels=len(state["classifier.bias"]),
        )
        model = BertForSequenceClassification(config)
        model.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{saved_model} does not hold the BERT this reads ({str(error)[:300]}); variables not recognised: {unknown[:10]}"
        ) from None
    model.save_pretrained(out)
    BertTokenizer(str(vocab), do_lower_case=True).save_pretrained(out)
    print(f"wrote {out}; not used: {unknown or 'nothing'}")


@dataclass
class Convert:
    """Write the published TensorFlow BEM as a Hugging Face folder."""

    saved_model: Path
    vocab: Path
    out: Path = Path("bem")


if __name__ == "__main__":
    import tyro

    args = tyro.extras.subcommand_cli_from_dict({"convert": Convert})
    try:
        convert(args.saved_model, args.vocab, args.out)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
