"""BEM: does an answer mean the same as the reference? The second half of E-VQA's metric.

    python -m evaluation.bem convert --saved-model answer_equivalence_bem_1 --vocab vocab.txt
    python evaluate.py --score predictions.jsonl --references test.csv --benchmark evqa --bem bem

BEM (Bulian et al. 2022) is a BERT that reads candidate, reference and question, and says whether
the two answers are equivalent. Its authors published it as a TensorFlow SavedModel; `convert`
writes it once as a Hugging Face folder, `bem`, without TensorFlow. `--vocab` is the vocabulary of
the uncased BERT-base. A reproduction trained elsewhere and already in Hugging Face format serves
too, but is another model: the score names the folder it was made with.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import DataError
from files.records import FAULTS, refuse_code
from files.terminal import fail

LONGEST = 512  # tokens that a BERT reads


class Bem:
    """P(equivalent | candidate, reference, question), of a classifier in Hugging Face format."""

    def __init__(self, folder: Path | str):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        refuse_code(folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        self.model = model.to(self.device).eval()

    def scores(self, triples: list[tuple[str, str, str]], batch: int = 64) -> list[float]:
        """Of each (candidate, reference, question), in order, in 0–1."""
        out = []
        for start in range(0, len(triples), batch):
            rows = [self.encode(triple) for triple in triples[start : start + batch]]
            ids = pad_sequence([ids for ids, _ in rows], batch_first=True)  # (N, L)
            segments = pad_sequence([segments for _, segments in rows], batch_first=True)
            real = pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True)
            with torch.inference_mode():
                logits = self.model(  # (N, 2)
                    input_ids=ids.to(self.device),
                    token_type_ids=segments.to(self.device),
                    attention_mask=real.to(self.device),
                ).logits
            out += logits.float().softmax(-1)[:, 1].tolist()
        return out

    def encode(self, triple: tuple[str, str, str]) -> tuple[Tensor, Tensor]:
        """Token ids and segments, (L,) each:

        [CLS] candidate [SEP] reference [SEP] question [SEP]
          0       0       0       1       1      2       2
        """
        last = self.model.config.type_vocab_size - 1  # a model with two segments says 1 again
        texts = self.tokenizer(list(triple), add_special_tokens=False)["input_ids"]
        ids = [self.tokenizer.cls_token_id]
        segments = [0]
        for number, text in enumerate(texts):
            part = [*text, self.tokenizer.sep_token_id]
            ids += part
            segments += [min(number, last)] * len(part)
        return torch.tensor(ids[:LONGEST]), torch.tensor(segments[:LONGEST])


# ---------------------------------------------------------------------- TensorFlow's file format
# variables.index is an SSTable (LevelDB's table format): blocks of (key, value), then a block that
# says where the blocks are, then a footer that says where that block is. A value is a protocol
# buffer with a variable's type, shape and place in the other file, which holds raw numbers.

FOOTER = 48  # bytes: two places as varints, padding, and the magic number
MAGIC = 0xDB4775248B80FB57
DT_FLOAT = 1  # TensorFlow's number of the type float32


def read_variables(folder: Path) -> dict[str, np.ndarray]:
    """{full name: array} of the float32 variables of a SavedModel, or of a checkpoint with the same
    two files. Raises DataError."""
    # 1) the files
    index = folder / "variables" / "variables.index"
    if not index.exists():
        raise DataError(f"{folder} is no SavedModel: it has no variables/variables.index")
    table = index.read_bytes()
    numbers = index.with_name("variables.data-00000-of-00001").read_bytes()
    if table[-8:] != MAGIC.to_bytes(8, "little"):
        raise DataError(f"{index} is not a TensorFlow variables index")

    # 2) footer → block of blocks → {key: entry}
    at = len(table) - FOOTER
    _, _, at = read_place(table, at)  # the block of meta data
    offset, size, _ = read_place(table, at)
    entries = {}
    for _, place in block_entries(table, offset, size):
        offset, size, _ = read_place(place, 0)
        entries |= dict(block_entries(table, offset, size))

    # 3) every float32 variable by its key, and the graph of objects, which knows the full names
    names = {}
    arrays = {}
    for key, value in entries.items():
        entry = message(value)  # BundleEntryProto: 1 type, 2 shape, 4 offset, 5 size in bytes
        kind, offset, size = (entry.get(number, [0])[0] for number in (1, 4, 5))
        if key == b"_CHECKPOINTABLE_OBJECT_GRAPH":
            names = full_names(numbers[offset : offset + size])
        elif key and kind == DT_FLOAT:
            array = np.frombuffer(numbers, np.float32, size // 4, offset)
            arrays[key] = array.reshape(tensor_shape(entry))
    return {names.get(key, key.decode()): array for key, array in arrays.items()}


def tensor_shape(entry: dict) -> list[int]:
    """Of a BundleEntryProto: field 2 holds a field 2 per dimension, whose field 1 is its size."""
    if 2 not in entry:
        return []
    dimensions = message(entry[2][0]).get(2, [])
    return [message(dimension).get(1, [0])[0] for dimension in dimensions]


def full_names(tensor: bytes) -> dict[bytes, str]:
    """{key: full name} of a TrackableObjectGraph, which is stored as a tensor of one string: its
    length, a checksum of four bytes, the string."""
    _, at = varint(tensor, 0)
    names = {}
    for node in message(tensor[at + 4 :]).get(1, []):
        for attribute in message(node).get(2, []):
            fields = message(attribute)  # SerializedTensor: 2 full name, 3 key
            if 3 in fields:
                key = fields[3][0]
                names[key] = fields.get(2, [key])[0].decode()
    return names


def block_entries(data: bytes, offset: int, size: int):
    """Yield (key, value) of an SSTable block. A key stores how much it shares with the key before,
    and its own rest. The block ends in a list of restarts, four bytes each, and their number."""
    if data[offset + size] != 0:
        raise DataError(
            "the variables' index is compressed, which TensorFlow does not do; is the file damaged?"
        )
    block = data[offset : offset + size]
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * restarts
    at = 0
    key = b""
    while at < end:
        shared, at = varint(block, at)
        own, at = varint(block, at)
        length, at = varint(block, at)
        key = key[:shared] + block[at : at + own]
        at += own
        yield key, block[at : at + length]
        at += length


def read_place(data: bytes, at: int) -> tuple[int, int, int]:
    """(offset, size, next position) of a block."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return offset, size, at


def message(data: bytes) -> dict[int, list]:
    """A protocol buffer's fields, {number: values}; nested messages stay bytes.

    >>> message(bytes([0x08, 0x96, 0x01, 0x12, 0x02]) + b"hi")
    {1: [150], 2: [b'hi']}
    """
    fields = {}
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, at = varint(data, at)
        else:
            if wire_type == 2:  # its length comes first
                size, at = varint(data, at)
            else:  # 64 or 32 bits
                size = {1: 8, 5: 4}[wire_type]
            value = data[at : at + size]
            at += size
        fields.setdefault(number, []).append(value)
    return fields


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, next position) of a number in base 128, low digits first; a high bit says "go on".

    >>> varint(bytes([0x96, 0x01]), 0)
    (150, 2)
    """
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        shift += 7
        at += 1
        if byte < 128:
            return value, at


# ----------------------------------------------------- TensorFlow's names to Hugging Face's

# Names in BERT's first release and in TensorFlow's Model Garden, and Hugging Face's; {} is filled
# with what the parentheses matched.
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
    (r"embeddings/(?:LayerNorm|layer_norm)/(gamma|beta)$", "bert.embeddings.LayerNorm.{}"),
    (
        r"layer_(\d+)/(?:attention/self|self_attention)/(query|key|value)/(kernel|bias)$",
        "bert.encoder.layer.{}.attention.self.{}.{}",
    ),
    (
        r"layer_(\d+)/(?:attention/output/dense|self_attention/attention_output)/(kernel|bias)$",
        "bert.encoder.layer.{}.attention.output.dense.{}",
    ),
    (
        r"layer_(\d+)/(?:attention/output/LayerNorm|self_attention_layer_norm)/(gamma|beta)$",
        "bert.encoder.layer.{}.attention.output.LayerNorm.{}",
    ),
    (
        r"layer_(\d+)/(?:intermediate/dense|intermediate)/(kernel|bias)$",
        "bert.encoder.layer.{}.intermediate.dense.{}",
    ),
    (
        r"layer_(\d+)/(?:output/dense|output)/(kernel|bias)$",
        "bert.encoder.layer.{}.output.dense.{}",
    ),
    (
        r"layer_(\d+)/(?:output/LayerNorm|output_layer_norm)/(gamma|beta)$",
        "bert.encoder.layer.{}.output.LayerNorm.{}",
    ),
    (r"(?:bert/pooler/dense|pooler_transform)/(kernel|bias)$", "bert.pooler.dense.{}"),
    (r"(?:^|/)(?:output_weights)$", "classifier.weight"),
    (r"(?:^|/)(?:output_bias)$", "classifier.bias"),
    (
        r"(?:^|/)(?:classifier|logits|predictions/transform/logits)(?:/dense)?/(kernel|bias)$",
        "classifier.{}",
    ),
]
ENDINGS = {"kernel": "weight", "gamma": "weight", "beta": "bias"}


def convert(saved_model: Path, vocab: Path, out: Path):
    """Write the Hugging Face folder. Raises DataError when parameters are missing, and names the
    variables that were not recognised."""
    from transformers import BertForSequenceClassification, BertTokenizer

    variables = read_variables(saved_model)
    state = {}
    unknown = []
    for name, array in variables.items():
        target = hugging_face_name(name)
        if target is None:
            unknown.append(name)
        else:
            state[target] = hugging_face_tensor(array, name, target)
    try:
        model = BertForSequenceClassification(bert_config(state, variables))
        model.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{saved_model} does not hold the BERT this reads ({str(error)[:300]}); "
            f"variables not recognised: {unknown[:10]}"
        ) from None
    model.save_pretrained(out)
    BertTokenizer(str(vocab), do_lower_case=True).save_pretrained(out)
    print(f"wrote {out}; not used: {unknown or 'nothing'}")


def hugging_face_name(name: str) -> str | None:
    """None for what is no parameter of this BERT.

    >>> hugging_face_name("transformer/layer_3/self_attention/query/kernel")
    'bert.encoder.layer.3.attention.self.query.weight'
    """
    for rule, target in RULES:
        match = re.search(rule, name)
        if match:
            return target.format(*(ENDINGS.get(part, part) for part in match.groups()))
    return None


def hugging_face_tensor(array: np.ndarray, name: str, target: str) -> Tensor:
    """TensorFlow multiplies from the other side, and Model Garden keeps heads apart."""
    tensor = torch.from_numpy(array.copy())
    if name.endswith("kernel"):
        # (in, out); query, key and value also (in, heads, d), attention's output (heads, d, out)
        by_head = target.endswith(("query.weight", "key.weight", "value.weight"))
        inputs = array.shape[0]
        if array.ndim == 3 and not by_head:
            inputs *= array.shape[1]
        return tensor.reshape(inputs, -1).T.contiguous()  # (out, in)
    if target.endswith("bias"):
        return tensor.reshape(-1)
    return tensor


def bert_config(state: dict[str, Tensor], variables: dict[str, np.ndarray]):
    """The configuration that these shapes say. Raises KeyError where a parameter is missing."""
    from transformers import BertConfig

    words, hidden = state["bert.embeddings.word_embeddings.weight"].shape
    layers = {int(name.split(".")[3]) for name in state if ".layer." in name}
    heads = max(1, hidden // 64)  # BERT's own rule, where heads are not kept apart
    for name, array in variables.items():
        if array.ndim == 3 and name.endswith("query/kernel"):
            heads = array.shape[1]
    return BertConfig(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=1 + max(layers),
        num_attention_heads=heads,
        hidden_act="gelu_pytorch_tanh",
        intermediate_size=len(state["bert.encoder.layer.0.intermediate.dense.bias"]),
        max_position_embeddings=len(state["bert.embeddings.position_embeddings.weight"]),
        type_vocab_size=len(state["bert.embeddings.token_type_embeddings.weight"]),
        num_labels=len(state["classifier.bias"]),
    )


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
    except FAULTS as error:
        fail(error)
