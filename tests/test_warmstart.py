"""The warm start: consistent worlds, episodes laid out like rollouts, a folder that is remade."""

import json
import random
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import WARMSTART

import rollout
from config import PRESETS
from data import load_questions
from mmhops import build
from mmhops.build import Graph
from model import load_policy
from retrieval import KnowledgeBase
from tiny import warmstart
from tiny.counterfactual import Counterfactual, Names
from tiny.model import build_tiny
from tiny.teacher import Teacher


@pytest.fixture(scope="module")
def teacher(kb, kb_folder):
    return Teacher(kb, Graph(kb_folder), topk=2)


def parsed(turns):
    return [rollout.parse_turn(turn.text) for turn in turns]


# ------------------------------------------------------------------------------ worlds


def test_a_counterfactual_world_is_consistent_and_forgets_the_facts(kb_folder):
    graph = Graph(kb_folder)
    names = Names(graph)
    one = Counterfactual(names, random.Random(0))
    two = Counterfactual(names, random.Random(1))
    texts = [text for text in graph.texts if "Population" in text][:20]
    titles = [text.split("\n")[0].strip('"') for text in texts]
    for text, title in zip(texts, titles):
        assert one(text) == one(text) != two(text)
        assert one(text) != text and one(title) in one(text)
    # a draw may give a name to itself
    assert sum(one(title) != title for title in titles) > 0.8 * len(titles)
    assert len(set(one.map.values())) == len(one.map)  # no two names became one


# ------------------------------------------------------------------------------ the teacher


def test_an_honest_episode_reads_its_answer_in_the_passages(teacher, questions):
    honest = 0
    for question in [q for q in questions if q.split == "Bridge"][:40]:
        turns = teacher.episode(question, "good", max_turns=4)
        *searches, last = parsed(turns)
        assert all(action.valid for action in [*searches, last])
        assert last.action == "answer" and len(searches) <= 4
        if last.thought != "I will guess":
            honest += 1
            assert any(last.argument in line for line in turns[-2].lines)
    assert honest > 30


@pytest.fixture
def three_steps(questions):
    """Bridge questions after whose three searches one of four turns is to spare."""
    return [q for q in questions if q.split == "Bridge" and q.num_steps == 3][:20]


def test_an_early_episode_guesses_before_it_has_looked_everything_up(teacher, three_steps):
    for question in three_steps:
        turns = teacher.episode(question, "early", max_turns=4)
        assert len(turns) <= question.num_steps
        assert parsed(turns)[-1].thought == "I will guess"


def test_a_malformed_turn_is_repeated_only_where_no_action_can_be_read(teacher, three_steps):
    repeated = 0
    for question in three_steps * 2:
        turns = teacher.episode(question, "malformed", max_turns=4)
        actions = parsed(turns)
        [bad] = [i for i, action in enumerate(actions) if not action.valid]
        if actions[bad].action == "invalid":
            repeated += 1
            assert turns[bad].lines[0].startswith("No action was found")
            assert actions[bad + 1].valid and turns[bad + 1].text.startswith(turns[bad].text)
    assert 0 < repeated < 40


def test_a_wrong_episode_leaves_a_text_search_out(teacher, three_steps):
    for question in three_steps:
        turns = teacher.episode(question, "wrong", max_turns=4)
        assert all(action.valid for action in parsed(turns))
        assert len(turns) == question.num_steps  # one search less, and the answer


def test_a_wrong_comparison_looks_up_the_images_alone(teacher, questions):
    for question in [q for q in questions if q.split == "Compare"][:10]:
        turns = teacher.episode(question, "wrong", max_turns=4)
        kinds = [turn.action for turn in parsed(turns)]
        assert kinds == ["image_search", "image_search", "answer"]


# ------------------------------------------------------------------------------ learning


def test_answers_are_learnt_by_heart_beside_searching(teacher, questions):
    args = warmstart.Args(batch=8, remember_steps=60, by_heart=2, lr=9e-3)
    cfg = PRESETS["tiny"]
    policy = load_policy(WARMSTART, torch.float32)

    def remembers():
        """Log-probability of answering each of three questions at once; two are known."""
        made = []
        for question in questions[:3]:
            prompt = rollout.build_prompt(policy, question, cfg)
            turn = warmstart.remembered_turn(question)
            made.append(
                warmstart.scripted_response(policy.tokenizer, question, prompt, [turn], cfg)
            )
        with torch.no_grad():
            return policy.logprobs(made)[0].sum(1).tolist()

    before = remembers()
    losses = list(warmstart.learn("remember", args, cfg, teacher, questions, policy))
    after = remembers()
    assert len(losses) == 60
    for i in (0, 1):
        assert after[i] > before[i] + 5 and after[i] > -5
    assert after[2] < min(after[:2])


@pytest.mark.slow
def test_the_shipped_folder_is_what_the_command_makes(tmp_path):
    """The first twenty losses of the recorded run; needs the knowledge base `make kb` builds."""
    kb_folder = Path("data/kb")
    if not kb_folder.exists():
        pytest.skip("no data/kb; type: make data")
    recipe = json.loads((WARMSTART / "recipe.json").read_text())["warmstart"]
    recorded = {f.name: recipe[f.name] for f in fields(warmstart.Args) if f.name in recipe}
    paths = {"kb": kb_folder, "data": tmp_path / "mmhops", "out": tmp_path}
    args = warmstart.Args(**recorded | paths)
    build.build(args.kb, args.data, guessable=1.0, say=lambda *_: None)
    cfg = PRESETS["tiny"]
    graph = Graph(args.kb)
    train = load_questions(args.data, "train")

    build_tiny(tmp_path, warmstart.corpus(graph, train), seed=args.seed)
    assert (tmp_path / "tokenizer.json").read_text() == (WARMSTART / "tokenizer.json").read_text()
    teacher = Teacher(KnowledgeBase.open(args.kb), graph, cfg.topk, args.seed)
    policy = load_policy(tmp_path, torch.float32)
    learning = warmstart.learn("read", args, cfg, teacher, train, policy)
    losses = [loss for loss, _ in zip(learning, range(20))]
    assert losses == pytest.approx(recipe["losses"]["0 read"][:20], rel=1e-3)
