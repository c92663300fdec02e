"""How tests/fixtures/bem-* were made: two tiny BERT classifiers as TensorFlow writes them, and what
TensorFlow computes with them. "first" names its variables as BERT's first release does, "garden" as
TensorFlow's Model Garden.

    pip install tensorflow && python tests/make_bem_fixture.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf

HIDDEN, LAYERS, INNER, POSITIONS = 16, 2, 24, 24
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "what",
    "is",
    "the",
    "capital",
    "of",
    "paris",
    "city",
    "france",
    "?",
    "##s",
    "a",
    "in",
]
IDS = [
    [2, 10, 3, 7, 11, 9, 10, 3, 5, 6, 7, 8, 9, 12, 13, 3],
    [2, 11, 3, 10, 3, 5, 6, 8, 13, 3, 0, 0, 0, 0, 0, 0],
]
SEGMENTS = [
    [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2],
    [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0],
]


def names(style: str, heads: int):
    """{our name: (name in the file, shape)}."""
    h, d = HIDDEN, HIDDEN // heads
    garden = style == "garden"
    out = {
        "word": (
            "word_embeddings/embeddings" if garden else "bert/embeddings/word_embeddings",
            (len(WORDS), h),
        ),
        "position": (
            "position_embedding/embeddings" if garden else "bert/embeddings/position_embeddings",
            (POSITIONS, h),
        ),
        "segment": (
            "type_embeddings/embeddings" if garden else "bert/embeddings/token_type_embeddings",
            (3, h),
        ),
    }
    for p, n in (("gamma", h), ("beta", h)):
        out[f"norm/{p}"] = (
            f"embeddings/layer_norm/{p}" if garden else f"bert/embeddings/LayerNorm/{p}",
            (n,),
        )
    for i in range(LAYERS):
        base = f"transformer/layer_{i}" if garden else f"bert/encoder/layer_{i}"
        for part in ("query", "key", "value"):
            out[f"{i}/{part}/kernel"] = (
                f"{base}/{'self_attention' if garden else 'attention/self'}/{part}/kernel",
                (h, heads, d) if garden else (h, h),
            )
            out[f"{i}/{part}/bias"] = (
                f"{base}/{'self_attention' if garden else 'attention/self'}/{part}/bias",
                (heads, d) if garden else (h,),
            )
        for name, first, second, kernel in (
            (
                "out",
                "attention/output/dense",
                "self_attention/attention_output",
                (heads, d, h) if garden else (h, h),
            ),
            ("up", "intermediate/dense", "intermediate", (h, INNER)),
            ("down", "output/dense", "output", (INNER, h)),
        ):
            out[f"{i}/{name}/kernel"] = (f"{base}/{second if garden else first}/kernel", kernel)
            out[f"{i}/{name}/bias"] = (f"{base}/{second if garden else first}/bias", (kernel[-1],))
        for name, first, second in (
            ("norm1", "attention/output/LayerNorm", "self_attention_layer_norm"),
            ("norm2", "output/LayerNorm", "output_layer_norm"),
        ):
            for p in ("gamma", "beta"):
                out[f"{i}/{name}/{p}"] = (f"{base}/{second if garden else first}/{p}", (h,))
    for p, shape in (("kernel", (h, h)), ("bias", (h,))):
        out[f"pool/{p}"] = (f"pooler_transform/{p}" if garden else f"bert/pooler/dense/{p}", shape)
    out["class/kernel"] = (
        ("classifier/logits/kernel", (h, 2)) if garden else ("output_weights", (2, h))
    )
    out["class/bias"] = ("classifier/logits/bias" if garden else "output_bias", (2,))
    return out


class Bert(tf.Module):
    def __init__(self, style: str, heads: int):
        rng = np.random.default_rng(len(style))
        self.heads, self.style = heads, style
        self.weights = {
            key: tf.Variable(
                (rng.normal(size=shape) * 0.5 + ("gamma" in key)).astype(np.float32), name=name
            )
            for key, (name, shape) in names(style, heads).items()
        }
        # what a SavedModel also holds
        self.step = tf.Variable(7, dtype=tf.int64, name="global_step")

    def matrix(self, key):
        """A kernel as (in, out); Model Garden keeps heads apart, on either side."""
        kernel = self.weights[key]
        if kernel.shape[0] == HIDDEN:
            return tf.reshape(kernel, (HIDDEN, -1))
        return tf.reshape(kernel, (-1, kernel.shape[-1]))

    def dense(self, x, key):
        return x @ self.matrix(f"{key}/kernel") + tf.reshape(self.weights[f"{key}/bias"], (-1,))

    def norm(self, x, key):
        mean, variance = tf.nn.moments(x, -1, keepdims=True)
        return (x - mean) / tf.sqrt(variance + 1e-12) * self.weights[f"{key}/gamma"] + self.weights[
            f"{key}/beta"
        ]

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, None), tf.int32),
            tf.TensorSpec((None, None), tf.int32),
        ]
    )
    def __call__(self, ids, segments):
        w, shape = self.weights, tf.shape(ids)
        x = (
            tf.gather(w["word"], ids)
            + w["position"][: shape[1]]
            + tf.gather(w["segment"], segments)
        )
        x, bias = self.norm(x, "norm"), tf.where(ids == 0, -1e9, 0.0)[:, None, None]
        for i in range(LAYERS):
            q, k, v = (
                tf.transpose(
                    tf.reshape(self.dense(x, f"{i}/{p}"), (shape[0], shape[1], self.heads, -1)),
                    (0, 2, 1, 3),
                )
                for p in ("query", "key", "value")
            )
            p = tf.nn.softmax(
                q @ tf.transpose(k, (0, 1, 3, 2)) / (HIDDEN / self.heads) ** 0.5 + bias
            )
            x = self.norm(
                x
                + self.dense(
                    tf.reshape(tf.transpose(p @ v, (0, 2, 1, 3)), (shape[0], shape[1], HIDDEN)),
                    f"{i}/out",
                ),
                f"{i}/norm1",
            )
            x = self.norm(
                x + self.dense(tf.nn.gelu(self.dense(x, f"{i}/up"), approximate=True), f"{i}/down"),
                f"{i}/norm2",
            )
        pooled = tf.tanh(self.dense(x[:, 0], "pool"))
        kernel = w["class/kernel"]
        if self.style == "first":  # (classes, hidden)
            kernel = tf.transpose(kernel)
        return pooled @ kernel + w["class/bias"]


for style, heads in (("first", 1), ("garden", 2)):
    folder = Path(__file__).parent / "fixtures" / f"bem-{style}"
    model = Bert(style, heads)
    shutil.rmtree(folder, ignore_errors=True)
    logits = model(tf.constant(IDS), tf.constant(SEGMENTS)).numpy().tolist()
    tf.saved_model.save(model, str(folder))
    for extra in [p for p in folder.iterdir() if p.name != "variables"]:  # the graph is not read
        shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "expected.json").write_text(
        json.dumps({"ids": IDS, "segments": SEGMENTS, "logits": logits})
    )
