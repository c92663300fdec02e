"""Limits on pictures and prompts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from config import PRESETS
from data import DataError, Question, Stream
from engine import pictures
from engine.pictures import preprocessed, prompt_length, readable, without_long
from evaluation import baselines
from evaluation.summary import limits_of, summarize
from rollout import build_prompt


def test_a_photograph_is_scaled_to_the_limits_of_the_run():
    """12 megapixels, with the released image processor: with the authors' limits, and without."""
    from transformers import Qwen2VLImageProcessor

    released = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=12_845_056)
    processor = SimpleNamespace(image_processor=released)
    photograph, icon = Image.new("RGB", (4000, 3000)), Image.new("RGB", (32, 32))
    tokens = {
        name: preprocessed(processor, [photograph, icon], PRESETS[name])[2]
        for name in ("tiny", "paper")
    }
    assert tokens == {"tiny": [15301, 4], "paper": [494, 144]}


def inline(mixed) -> Question:
    """Two pictures inside the text."""
    two = mixed[-1]
    assert len(two.images) == 2
    return replace(two, problem="Is <image> or <image> the larger one?")


@pytest.mark.parametrize("max_pixels", [0, 28 * 28 * 4])
def test_a_prompts_length_is_known_without_its_pixels(policy, mixed, text_only, cfg, max_pixels):
    cfg = replace(cfg, max_pixels=max_pixels)
    for question in [*mixed, inline(mixed), text_only]:
        made = build_prompt(policy, question, cfg)
        assert prompt_length(policy.processor, question, cfg) == len(made.token_ids)


def test_questions_that_are_too_long_are_not_trained_on_and_named(policy, mixed, cfg):
    lengths = [prompt_length(policy.processor, question, cfg) for question in mixed]
    bound = sorted(lengths)[len(mixed) // 2]
    short = [question for question, length in zip(mixed, lengths) if length <= bound]
    assert 0 < len(short) < len(mixed)
    said = []
    cfg = replace(cfg, max_prompt_tokens=bound)
    assert without_long(policy.processor, mixed, cfg, said.append) == short
    (line,) = said
    assert line.startswith(f"left out {len(mixed) - len(short)} of {len(mixed)} questions")
    assert all((question.id in line) == (question not in short) for question in mixed)
    with pytest.raises(ValueError, match="no question has a prompt of at most"):
        without_long(policy.processor, mixed, replace(cfg, max_prompt_tokens=5), said.append)


def test_no_picture_is_opened_of_a_question_that_cannot_be_too_long(
    policy, mixed, cfg, monkeypatch
):
    looked_at = []

    def count(processor, question, cfg):
        looked_at.append(question)
        return prompt_length(processor, question, cfg)

    monkeypatch.setattr(pictures, "prompt_length", count)
    cfg = replace(cfg, max_pixels=28 * 28 * 100, max_prompt_tokens=10_000)
    assert without_long(policy.processor, mixed, cfg) == mixed and not looked_at
    odd = [replace(question, problem=question.problem + "ô" * 4000) for question in mixed]
    assert without_long(policy.processor, odd, cfg) == odd and looked_at == odd  # up to 24,000


def test_in_evaluation_a_question_that_is_too_long_counts_as_wrong(policy, kb, mixed, cfg):
    lengths = [prompt_length(policy.processor, question, cfg) for question in mixed]
    cfg = replace(cfg, group_size=2, max_prompt_tokens=max(lengths) - 1)
    responses = baselines.run("agent", policy, kb, mixed, cfg)
    assert [response.question for response in responses] == [q for q in mixed for _ in range(2)]
    long = [response for response in responses if response.stop == "prompt"]
    assert len(long) == 2 * sum(length == max(lengths) for length in lengths)
    assert all(response.answer is None and not response.turns for response in long)
    assert summarize(long)["format_rate"] == 0
    assert len(summarize(responses, 2, limits_of(kb, mixed, cfg))["failures"]) > 0


@pytest.fixture
def with_a_broken_picture(mixed, tmp_path):
    """The questions, and among them one whose picture file is cut short."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(mixed[0].images[0]).read_bytes()[:-2000])
    bad = replace(mixed[0], id="bad", images=(broken,))
    return [bad, *mixed[1:]]


def test_training_passes_over_a_picture_that_cannot_be_read(with_a_broken_picture, capsys):
    """And names it; the others come in the order they have without it, also after resuming."""
    count = len(with_a_broken_picture)
    plain = Stream(with_a_broken_picture, seed=0)
    everything = [next(plain).id for _ in range(3 * count)]
    stream = Stream(with_a_broken_picture, seed=0, usable=readable)
    seen = [next(stream).id for _ in range(3 * (count - 1))]
    assert seen == [name for name in everything if name != "bad"]
    assert "left out question bad: cannot read the image" in capsys.readouterr().out
    for taken in range(count, 2 * count):
        resumed = Stream(with_a_broken_picture, 0, taken, usable=readable)
        expected = [name for name in everything[taken:] if name != "bad"]
        assert next(resumed).id == expected[0]
    with pytest.raises(DataError, match="none of 1 training questions"):
        next(Stream(with_a_broken_picture[:1], 0, usable=readable))


def test_one_picture_that_is_none_does_not_keep_a_run_from_starting(policy, mixed, cfg, tmp_path):
    """Its question is neither too long nor in the way: the stream passes over it."""
    (tmp_path / "page.png").write_text("<html>404</html>")
    questions = [replace(mixed[0], images=(tmp_path / "page.png",)), *mixed[1:]]
    cfg = replace(cfg, max_prompt_tokens=6144)
    assert without_long(policy.processor, questions, cfg) == questions


def test_a_picture_that_is_a_line_is_passed_over(mixed, tmp_path, capsys):
    """Qwen's processor refuses it, which would end a step in the middle."""
    Image.new("RGB", (2001, 10)).save(tmp_path / "line.png")
    assert not readable(replace(mixed[0], images=(tmp_path / "line.png",)))
    assert "2001 x 10 is a line" in capsys.readouterr().out
    Image.new("RGB", (2000, 10)).save(tmp_path / "thin.png")
    assert readable(replace(mixed[0], images=(tmp_path / "thin.png",)))


def test_a_lone_usable_question_is_found_wherever_an_epoch_begins(mixed):
    for taken in range(2 * len(mixed)):
        stream = Stream(mixed, 0, taken, usable=lambda question: question is mixed[3])
        assert next(stream) is mixed[3]


def test_in_evaluation_a_picture_that_cannot_be_read_counts_as_wrong(
    policy, kb, with_a_broken_picture, cfg
):
    responses = baselines.run("agent", policy, kb, with_a_broken_picture, cfg)
    first, *others = [r for r in responses if r.stop == "prompt"]
    assert first.question.id == "bad"
    assert len(others) == len(responses) // len(with_a_broken_picture) - 1
