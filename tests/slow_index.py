"""A knowledge base that is made slowly, to be killed meanwhile."""

import time

import numpy as np

import knowledge.index as indexing
from knowledge.pieces import by_words


class Letters:
    """An encoder of letter counts: quick, and the same on every machine."""

    def encode_passages(self, texts):
        return np.array([[t.count(c) for c in "abcdefghijklmnop"] for t in texts], np.float32)

    def encode_queries(self, texts):
        return self.encode_passages(texts)

    def encode_images(self, images):
        return np.stack([np.asarray(i.resize((2, 2)), np.float32).reshape(-1) for i in images])


class SlowLetters(Letters):
    def encode_passages(self, texts):
        time.sleep(0.1)
        return super().encode_passages(texts)


def build(source, path, out, **options):
    indexing.build(
        source,
        path,
        out,
        None,
        {"text": {"kind": "e5", "name": "x"}, "image": {"kind": "atlas", "name": "x"}},
        lambda title, sections: by_words(title, sections, 20),
        "test",
        say=lambda *_: None,
        **{"load": lambda *_: Letters()} | options,
    )


def build_slowly(folder):
    """Of folder/articles to folder/cut; folder/joining is touched before shards are joined."""
    join = indexing.join_shards

    def joined(*args):
        (folder / "joining").touch()
        time.sleep(60)
        return join(*args)

    indexing.SHARD, indexing.join_shards = 5, joined
    build("markdown", folder / "articles", folder / "cut", load=lambda *_: SlowLetters())
