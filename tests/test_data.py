"""Question files as their publishers ship them."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import DataError, load_questions, read_records
from files.images import image_bytes, image_key, open_image
from files.records import write_jsonl


def picture(color, kind="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (60, 40), color).save(out, kind)
    return out.getvalue()


def mmhops_rows(n=6):
    rows = []
    for i in range(n):
        shown = [picture("red"), picture("blue", "JPEG")][: 1 + i % 2]
        rows.append(
            {
                "id": f"MMhops_test_{i:05d}",
                "problem": "<image>" * len(shown) + f"Question {i}?",
                "answer": "4",
                "answer_eval": ["3.6", "4.4"],
                "split": ["Bridge", "Compare"][i % 2],
                "problem_type": "Numerical",
                "pictures": [{"bytes": data, "path": f"{i}.png"} for data in shown],
            }
        )
    return rows


def check(questions, folder):
    images = [image for q in questions for image in q.images]
    assert [len(q.images) for q in questions] == [1, 2, 1, 2, 1, 2]
    assert questions[1].split == "Compare"
    assert questions[0].answer_eval == ("3.6", "4.4")
    assert all(Image.open(image).size == (60, 40) for image in images)
    assert {image.parent for image in images} == {folder / "images"}
    assert questions[1].images[1].suffix == ".jpg"


def test_mmhops_parquet_in_several_files(tmp_path):
    rows = mmhops_rows()
    (tmp_path / "data").mkdir()
    for part in range(2):
        pq.write_table(
            pa.Table.from_pylist(rows[3 * part : 3 * part + 3]),
            tmp_path / "data" / f"test-0000{part}-of-00002.parquet",
        )
    check(load_questions(tmp_path, "test"), tmp_path)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    check(load_questions(tmp_path, "test"), tmp_path)  # unpacked once
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert "pictures" not in next(read_records(tmp_path, "test"))[1]  # scoring reads no pictures
    elsewhere = load_questions(tmp_path, "test", limit=2, images=tmp_path / "else")
    assert len(elsewhere) == 2
    assert elsewhere[1].images[0].parent == tmp_path / "else"
    with pytest.raises(DataError, match="holds no train questions"):
        load_questions(tmp_path, "train")


def test_mmhops_from_the_datasets_cache(tmp_path):
    rows = [row for row in mmhops_rows() if row["split"] == "Bridge"]
    plain = [row | {"pictures": row["pictures"][0]["bytes"]} for row in rows]
    table = pa.Table.from_pylist(plain)
    with pa.ipc.new_stream(str(tmp_path / "mmhops-test.arrow"), table.schema) as out:
        out.write_table(table)
    ids = [q.id for q in load_questions(tmp_path, "test")]
    assert ids == ["MMhops_test_00000", "MMhops_test_00002", "MMhops_test_00004"]


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="test.parquet is not a readable parquet file"):
        load_questions(tmp_path, "test")


def test_infoseek(tmp_path):
    (tmp_path / "images" / "00").mkdir(parents=True)
    (tmp_path / "images" / "oven_1.JPEG").write_bytes(picture("red", "JPEG"))
    (tmp_path / "images" / "00" / "oven_2.jpg").write_bytes(picture("blue", "JPEG"))
    records = [
        {
            "data_id": "infoseek_val_1",
            "image_id": "oven_1",
            "question": "How tall?",
            "answer": ["12"],
            "answer_eval": [{"wikidata": 12.0, "range": [10.8, 13.2]}],
            "data_split": "val_unseen_entity",
            "entity_text": "Eiffel Tower",
        },
        {
            "data_id": "infoseek_val_2",
            "image_id": "oven_2",
            "question": "Who?",
            "answer": ["Ann", "Anne"],
            "answer_eval": ["Ann", "Anne"],
            "data_split": "val_unseen_question",
        },
    ]
    (tmp_path / "infoseek_val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    types = tmp_path / "types.jsonl"
    types.write_text(
        '{"data_id": "infoseek_val_1", "question_type": "numerical"}\n'
        '{"data_id": "infoseek_val_2", "question_type": "time"}\n'
    )
    images = tmp_path / "images"
    (images / "00" / "oven_2.txt").write_text("a text beside it")
    (tmp_path / "other.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match='other.jsonl.*a type needs "data_id"'):
        load_questions(tmp_path, "validation", images=images, qtypes=tmp_path / "other.jsonl")
    first, second = load_questions(tmp_path, "validation", images=images, qtypes=types)
    assert second.images == (images / "00" / "oven_2.jpg",)
    assert first.problem == "<image>How tall?"
    assert first.problem_type == "Numerical"
    assert first.answer_eval == ("10.8", "13.2")
    assert first.split == "val_unseen_entity"
    assert (first.num_steps, first.passed) == (2, ("Eiffel Tower",))  # which tower, how tall
    assert (second.num_steps, second.passed) == (2, ())
    assert second.problem_type == "Time"
    assert second.images[0].name == "oven_2.jpg"
    without_types = load_questions(tmp_path / "infoseek_val.jsonl", images=images)
    assert [q.problem_type for q in without_types] == ["Numerical", "String"]
    with pytest.raises(DataError, match="--images"):
        load_questions(tmp_path, "val")
    (images / "00" / "oven_2.jpg").unlink()
    with pytest.raises(DataError, match="infoseek_val.jsonl:2: image oven_2 is not under"):
        load_questions(tmp_path, "val", images=images)


def test_evqa(tmp_path):
    (tmp_path / "images" / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "images" / "val" / "Quercus").mkdir(parents=True)
    (tmp_path / "images" / "a" / "b" / "c" / "abcd.jpg").write_bytes(picture("red", "JPEG"))
    (tmp_path / "images" / "val" / "Quercus" / "x.jpg").write_bytes(picture("blue", "JPEG"))
    (tmp_path / "images" / "val_id2name.json").write_text('{"77": "val/Quercus/x.jpg"}')
    (tmp_path / "test.csv").write_text(
        "question,answer,question_type,wikipedia_title,dataset_name,dataset_image_ids\n"
        '"Where, now?",Rome|Roma,2_hop,Colosseum|Vespasian,landmarks,abcd|ffff\n'
        "Which?,oak&&fir,multi_answer,Acorn,inaturalist,77\n"
    )
    first, second = load_questions(tmp_path, "test", images=tmp_path / "images")
    assert first.id == "test_0"
    assert first.problem == "<image>Where, now?"
    assert first.answer_eval == ("Rome", "Roma")
    assert (first.num_steps, first.passed) == (3, ("Colosseum", "Vespasian"))
    assert second.images[0].name == "x.jpg"
    assert second.answer_eval == ("oak, fir", "oak and fir")
    assert second.split == "multi_answer"
    assert (second.num_steps, second.passed) == (2, ("Acorn",))


def test_limit_and_shuffle(tmp_path):
    record = {
        "problem": "?",
        "answer": "x",
        "answer_eval": ["x"],
        "problem_type": "String",
        "split": "Bridge",
    }
    write_jsonl(tmp_path / "test.jsonl", ({"id": str(i)} | record for i in range(50)))
    assert [q.id for q in load_questions(tmp_path, limit=3)] == ["0", "1", "2"]
    shuffled = [q.id for q in load_questions(tmp_path, limit=10, seed=1)]
    again = [q.id for q in load_questions(tmp_path, limit=10, seed=1)]
    assert shuffled == again
    assert shuffled != [str(i) for i in range(10)]


def test_an_image_has_one_key_and_its_pixels_survive_being_sent(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture("red"))
    tall = Image.effect_noise((40, 60), 50)
    wide = Image.frombytes("L", (60, 40), tall.tobytes())
    assert image_key(path) == image_key(str(path)) == str(path)
    assert image_key(tall) == image_key(tall.copy())
    assert image_key(tall) != image_key(wide)  # the same bytes in another shape
    assert image_bytes(path) == path.read_bytes()
    received = Image.open(io.BytesIO(image_bytes(tall)))
    assert image_key(received) == image_key(tall)
    assert open_image(received).mode == "RGB"
