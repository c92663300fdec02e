"""Knowledge bases: official CLIP formula, exact search, and clear errors for broken folders."""

import json

import faiss
import numpy as np
import open_clip
import pytest
import torch
from conftest import kb_copy
from PIL import Image
from safetensors.torch import save_file

import retrieval
from atlas import encoders
from atlas.encoders import AtlasImageEncoder
from build_kb import write_index
from engine.batches import like_length
from files.records import read_lines, write_jsonl
from files.rows import JsonLines
from knowledge.check import check, images_again, refuse_not_finite, texts_again
from retrieval import ClipEncoder, KnowledgeBase, KnowledgeBaseError

BF16 = "avx512_bf16"
ACTIVATIONS = ("GELU", "QuickGELU")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small open_clip model, saved the way published ones are."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "patch_size": 8,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    }
    model = open_clip.CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=open_clip.CLIPVisionCfg(**config["vision_cfg"]),
        text_cfg=open_clip.CLIPTextCfg(**config["text_cfg"]),
    )
    weights = model.state_dict()
    for name in weights:
        if "c_fc.weight" in name or "c_proj.weight" in name:  # fresh ones are nearly straight
            weights[name] *= 3
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    return folder


def test_clip_index_by_the_official_formula(clip_folder, kb, kb_folder, tmp_path):
    encoder = ClipEncoder(clip_folder)
    records = [kb.records[row] for row in range(12)]
    images = [Image.open(kb_folder / record["image_path"]) for record in records]
    titles = [record["title"] for record in records]
    vectors = encoder.index_vectors(images, titles)
    image = encoder.encode_images(images)
    text = 2 * vectors - image
    assert np.allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)
    assert np.allclose(np.linalg.norm(text, axis=1), 1, atol=1e-5)
    assert (np.linalg.norm(vectors, axis=1) < 0.999).any()  # not normalised again
    write_index(tmp_path / retrieval.IMAGE_INDEX, vectors)
    index = retrieval.open_index(tmp_path / retrieval.IMAGE_INDEX, 12, retrieval.IMAGE_CORPUS)
    base = KnowledgeBase(kb.texts, kb.text_index, kb.text_encoder, records, index, encoder)
    for i, hits in enumerate(base.image_search(images, 3)):
        expected = image[i] @ vectors.T
        assert len(hits) == 3
        assert hits[0].row == expected.argmax()
        assert hits[0].score == pytest.approx(expected.max(), abs=1e-5)
        assert hits[0].title == titles[hits[0].row]


@pytest.mark.parametrize("quick", [False, True])
def test_the_check_names_the_activation_that_made_an_index(clip_folder, kb_folder, tmp_path, quick):
    folder = kb_copy(kb_folder, tmp_path / "kb")
    records = read_lines(folder / retrieval.IMAGE_CORPUS)
    images = [Image.open(folder / record["image_path"]) for record in records]
    encoder = ClipEncoder(clip_folder, quick_gelu=quick)
    vectors = encoder.index_vectors(images, [record["title"] for record in records])
    write_index(folder / retrieval.IMAGE_INDEX, vectors)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["encoders"]["image"] = {"kind": "clip", "name": str(clip_folder)}
    del manifest["files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    base = KnowledgeBase.open(folder)
    figures = images_again(base, folder)
    gelu, other = (figures[f"image, {name} encoded again, cosine (n=32)"] for name in ACTIVATIONS)
    assert max(gelu, other) > 0.9999
    assert gelu != other
    verdict = figures["CLIP's activation"]
    if not quick:
        assert verdict == "GELU, as searches use"
        return
    # What it says to write down makes searches use the right one.
    assert verdict.startswith("QuickGELU made this index, but searches use the other")
    (folder / "manifest.json").write_text(verdict[verdict.index('{"encoders"') :])
    base = KnowledgeBase.open(folder)
    assert images_again(base, folder)["CLIP's activation"] == "QuickGELU, as searches use"
    assert np.allclose(
        base.image_encoder.encode_images(images[:2]), encoder.encode_images(images[:2])
    )


def test_the_check_encodes_passages_again(kb):
    (figure,) = texts_again(kb).values()
    assert figure > 0.999


def test_text_search_finds_the_field(kb, entities):
    country = next(e for e in entities if e["kind"] == "country" and "capital" in e["attributes"])
    capital = country["attributes"]["capital"]["text"]
    hits = kb.text_search([f"What is the capital of {country['title']}?"], 3)[0]
    assert any(hit.title == country["title"] and capital in hit.text for hit in hits)
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)


def test_passages_are_encoded_in_bfloat16_only_where_the_cpu_has_it(monkeypatch):
    for native, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {BF16: native})
        assert retrieval.passage_dtype("cpu") == dtype
        assert retrieval.passage_dtype("cuda") == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # a processor of another make
    assert retrieval.passage_dtype("cpu") == "float32"


def test_normalisation_that_is_part_of_the_convolutions_changes_no_picture(
    kb, kb_folder, monkeypatch
):
    images = [Image.open(path) for path in sorted((kb_folder / "images").glob("*.png"))[:8]]
    folded = kb.image_encoder
    monkeypatch.setattr(encoders, "fold_normalisation", lambda net: None)
    plain = AtlasImageEncoder(kb_folder / "encoders" / "image")
    counts = [
        sum(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.net.modules())
        for encoder in (plain, folded)
    ]
    assert counts[0] > 40 and counts[1] == 0
    assert np.abs(plain.encode_images(images) - folded.encode_images(images)).max() < 1e-5


def test_passages_keep_their_order_and_have_the_vectors_of_sentence_transformers(kb):
    texts = [f"passage: {kb.texts[row]}" for row in range(0, 480, 20)]
    theirs = kb.text_encoder.model.encode(texts, normalize_embeddings=True)
    exact = kb.text_encoder.encode(texts)
    rounded = kb.text_encoder.encode(texts, "bfloat16")
    assert len({len(text) for text in texts}) > 10  # so they were sorted
    assert np.abs(exact - theirs).max() < 1e-5
    assert (rounded * exact).sum(1).min() > 0.9999
    assert rounded.dtype == exact.dtype == np.float32


def test_a_querys_vector_does_not_depend_on_the_others_of_its_batch(kb):
    queries = [f"capital of {kb.records[row]['title']}" for row in range(16)]
    together = kb.text_encoder.encode_queries(queries)
    alone = np.concatenate([kb.text_encoder.encode_queries([query]) for query in queries])
    assert np.abs(together - alone).max() < 1e-5


def test_queries_that_are_multiplied_together_find_what_each_finds_alone(
    kb, kb_folder, monkeypatch
):
    default = faiss.cvar.distance_compute_blas_threshold
    monkeypatch.setattr(retrieval, "LARGE", 1)
    path = kb_folder / retrieval.TEXT_INDEX
    index = retrieval.open_index(path, len(kb.texts), retrieval.TEXT_CORPUS)
    try:
        assert faiss.cvar.distance_compute_blas_threshold < default
        queries = [f"capital of {record['title']}" for record in kb.records] * 4
        assert len(queries) > 32  # so many are multiplied, and one is not
        vectors = kb.text_encoder.encode_queries(queries)
        together = retrieval.search(index, vectors, 3)
        alone = [retrieval.search(index, vectors[i : i + 1], 3)[0] for i in range(len(vectors))]
    finally:
        faiss.cvar.distance_compute_blas_threshold = default
    for ours, theirs in zip(together, alone):
        assert [row for _, row in ours] == [row for _, row in theirs]
        assert np.allclose(ours, theirs, atol=1e-5)


def test_batches_hold_every_row_once_and_are_not_too_large():
    lengths = np.random.default_rng(0).integers(1, 256, 500).tolist()
    batches = like_length(lengths, 1024)
    assert sorted(row for batch in batches for row in batch) == list(range(500))
    assert all(len(batch) * lengths[batch[-1]] <= 1024 for batch in batches)
    assert sum(len(batch) * lengths[batch[-1]] for batch in batches) < 1.05 * sum(lengths)
    assert like_length([3000, 1, 3000], 1024) == [[1], [0], [2]]


def test_image_search_finds_other_pictures_of_the_same_thing(kb, kb_folder):
    checks = read_lines(kb_folder / "check" / "image.jsonl")
    found = kb.image_search([kb_folder / c["image"] for c in checks], 1)
    for kind, least in (("augmented", 0.9), ("waved", 0.85)):
        right = [hits[0].row == c["row"] for c, hits in zip(checks, found) if c["kind"] == kind]
        assert len(right) >= 20
        assert np.mean(right) >= least


def test_identical_queries_are_encoded_once(kb):
    fresh = KnowledgeBase(
        kb.texts,
        kb.text_index,
        kb.text_encoder,
        kb.records,
        kb.image_index,
        kb.image_encoder,
        cache_size=3,
    )
    first = fresh.text_search(["area of Chad"] * 8 + ["population of Chad"], 2)
    assert (fresh.queries, fresh.encoded) == (9, 2)
    again = fresh.text_search(["area of Chad"], 2)
    assert fresh.encoded == 2
    assert again[0] == first[0]
    fresh.text_search(["a", "b", "c", "d", "e"], 1)
    assert len(fresh.vectors["text"]) <= 3  # bounded, and a batch larger than the bound still works


def test_a_path_and_a_pil_image_find_the_same(kb, kb_folder):
    path = kb_folder / kb.records[3]["image_path"]
    by_path, by_image = kb.image_search([path, Image.open(path)], 2)
    assert by_path == by_image
    assert by_path[0].row == 3
    encoded = kb.encoded
    kb.image_search([str(path), Image.open(path)], 1)
    assert kb.encoded == encoded  # both are remembered


def test_nothing_to_search(kb):
    assert kb.text_search([], 3) == []
    assert kb.image_search([], 3) == []


@pytest.fixture
def broken(kb_folder, tmp_path):
    return kb_copy(kb_folder, tmp_path / "kb")


def test_a_missing_file(broken):
    (broken / retrieval.TEXT_CORPUS).unlink()
    with pytest.raises(KnowledgeBaseError, match="lacks text/text_corpus.jsonl"):
        KnowledgeBase.open(broken)


def test_a_truncated_file(broken):
    path = broken / retrieval.TEXT_INDEX
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(KnowledgeBaseError, match="manifest says"):
        KnowledgeBase.open(broken)
    (broken / "manifest.json").unlink()
    with pytest.raises(KnowledgeBaseError, match="not a FAISS index"):
        KnowledgeBase.open(broken)


def test_index_and_corpus_of_different_builds(broken):
    manifest = retrieval.read_manifest(broken)
    del manifest["files"]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with open(broken / retrieval.TEXT_CORPUS, "a") as file:
        file.write('{"id": 0, "contents": "one too many\\nx"}\n')
    with pytest.raises(KnowledgeBaseError, match="not of one build"):
        KnowledgeBase.open(broken)


def test_a_row_whose_id_is_not_its_place(broken):
    rows = JsonLines(broken / retrieval.TEXT_CORPUS)
    assert rows[1]["id"] == 1
    (broken / "other.jsonl").write_text('{"id": 0}\n{"id": 2}\n')
    rows = JsonLines(broken / "other.jsonl")
    assert len(rows) == 2
    with pytest.raises(KnowledgeBaseError, match="line 2: the id is 2, but ids must be row"):
        rows[1]


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "{", '"x"', '{"files": []}', '{"files": {"a": 3}}', '{"files": {"a": {}}}']
    + ['{"encoders": []}', '{"encoders": {"text": {"kind": "e5"}}}', "[" * 100_000],
)
def test_a_manifest_that_is_none_is_refused_by_name(broken, content):
    (broken / "manifest.json").write_text(content)
    with pytest.raises(KnowledgeBaseError, match="manifest.json is no manifest"):
        KnowledgeBase.open(broken)


@pytest.mark.parametrize(
    "row", ["[0]", "{}", "null", '{"id": null}', "{", '{"id": 0}', '{"id": 0, "contents": [1]}']
)
def test_a_row_of_a_corpus_that_is_none_is_refused_when_it_is_opened(broken, row):
    path = broken / retrieval.TEXT_CORPUS
    path.write_text("".join([row + "\n", *path.open().readlines()[1:]]))
    (broken / "manifest.json").write_text(
        json.dumps(retrieval.read_manifest(broken) | {"files": {}})
    )
    with pytest.raises(KnowledgeBaseError, match="text_corpus.jsonl, line 1: no row"):
        KnowledgeBase.open(broken)


def test_an_index_of_something_else_than_numbers_is_refused(broken, kb):
    vectors = kb.text_index.reconstruct_n(0, kb.text_index.ntotal)  # (N, d)
    vectors[5:] = np.inf
    write_index(broken / retrieval.TEXT_INDEX, vectors)
    manifest = retrieval.read_manifest(broken) | {"files": {}}
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(KnowledgeBaseError, match="not finite; build it again"):
        KnowledgeBase.open(broken)  # which looks at some rows; `check` looks at all
    index = faiss.read_index(str(broken / retrieval.TEXT_INDEX))
    with pytest.raises(KnowledgeBaseError, match="row 5: build it again"):
        refuse_not_finite(index, "the index", at_once=2)


def test_check_counts_what_is_found(kb_folder, broken):
    texts = read_lines(kb_folder / "check" / "text.jsonl")[:4]
    images = read_lines(kb_folder / "check" / "image.jsonl")[:4]
    for check_ in images:
        check_["image"] = str(kb_folder / check_["image"])
    images[0]["kind"] = "wrong"
    images[0]["row"] += 1
    write_jsonl(broken / "check" / "text.jsonl", [*texts, {"query": "x", "rows": [-1]}])
    write_jsonl(broken / "check" / "image.jsonl", images)
    figures = check(broken)
    assert figures["checksums"] == "match"
    recalls = [figures[f"text R@{k} (n=5)"] for k in (1, 2, 3)]
    assert recalls == sorted(recalls)
    assert 0 < recalls[2] <= 0.8
    assert figures["image R@1 wrong (n=1)"] == 0


def test_check_notices_a_changed_file(broken):
    path = broken / retrieval.TEXT_CORPUS
    path.write_bytes(path.read_bytes().replace(b"Capital", b"Capitol", 1))
    with pytest.raises(KnowledgeBaseError, match="not the file the manifest describes"):
        check(broken)
