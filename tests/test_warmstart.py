"""The warm start: worlds are consistent, episodes are laid out like rollouts, and the shipped folder is what its command makes."""

import json
import random
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import WARMSTART

import rollout
from data import load_questions
from mmhops import build
from mmhops.build import World
from model import load_policy, token_logprobs
from retrieval import KnowledgeBase
from tiny import warmstart
from tiny.counterfactual import Counterfactual, Names
from tiny.model import build_tiny
from tiny.teacher import say
from train import PRESETS


@pytest.fixture(scope="module")
def teacher(kb, kb_folder):
    return warmstart.Teacher(kb, World(kb_folder), topk=2)


def test_a_counterfactual_world_is_consistent_and_forgets_the_facts(kb_folder):
    world = World(kb_folder)
    names, texts = Names(world), [text for text in world.texts if "Population" in text][:20]
    one, two = Counterfactual(names, random.Random(0)), Counterfactual(names, random.Random(1))
    for text in texts:
        title = text.split("\n")[0].strip('"')
        assert one(text) == one(text) != two(text) and one(text) != text and one(title) in one(text)
    titles = [text.split("\n")[0].strip('"') for text in texts]
    assert sum(one(title) != title for title in titles) > 0.8 * len(
        titles
    )  # a draw may give a name to itself
    assert len(set(one.map.values())) == len(one.map)  # no two names became one


def test_an_honest_episode_reads_its_answer_in_the_passages(teacher, questions):
    honest = 0
    for question in [q for q in questions if q.split == "Bridge"][:40]:
        turns = teacher.episode(question, "good", max_turns=4)
        *searches, (last, _) = turns
        actions = [rollout.parse_turn(text) for text, _ in turns]
        assert (
            all(action.valid for action in actions)
            and actions[-1].kind == "answer"
            and len(searches) <= 4
        )
        if actions[-1].thought != "I will guess":
            honest += 1
            assert any(actions[-1].argument in line for line in searches[-1][1])
    assert honest > 30


def test_careless_episodes_are_what_they_are_called(teacher, questions):
    bridge = [q for q in questions if q.split == "Bridge" and q.num_steps == 3][
        :20
    ]  # of four turns, one is to spare
    for question in bridge:
        malformed = teacher.episode(question, "malformed", max_turns=4)
        assert any(not rollout.parse_turn(text).valid for text, _ in malformed)
        early = teacher.episode(question, "early", max_turns=4)
        assert len(early) <= question.num_steps


def test_answers_are_learnt_by_heart_beside_searching(teacher, questions):
    args, cfg = warmstart.Args(batch=8, remember_steps=60, by_heart=2, lr=9e-3), PRESETS["tiny"]
    model, processor = load_policy(WARMSTART, torch.float32)

    def remembers():
        """Log-probability of answering each of three questions rightly at once; the third is not among the known."""
        made = [
            warmstart.response(
                processor,
                q,
                rollout.build_prompt(model, processor, q, cfg),
                [(say("I remember", "answer", q.answer), None)],
                cfg,
            )
            for q in questions[:3]
        ]
        with torch.no_grad():
            return [row.sum().item() for row in token_logprobs(model, made)[0]]

    before = remembers()
    losses = list(warmstart.learn("remember", args, cfg, teacher, questions, model, processor))
    after = remembers()
    assert (
        len(losses) == 60
        and all(a > b + 5 and a > -5 for a, b in zip(after[:2], before[:2]))
        and after[2] < min(after[:2])
    )


@pytest.mark.slow
def test_the_shipped_folder_is_what_the_command_makes(tmp_path):
    """The first twenty losses of the recorded run; needs the knowledge base that `make kb` builds."""
    recipe = json.loads((WARMSTART / "recipe.json").read_text())["warmstart"]
    args = warmstart.Args(
        **{f.name: recipe[f.name] for f in fields(warmstart.Args) if f.name in recipe}
        | {"out": tmp_path, "kb": Path("data/kb"), "data": tmp_path / "mmhops"}
    )
    if not args.kb.exists():
        pytest.skip("no data/kb; type: make data")
    build.build(args.kb, args.data, guessable=1.0, say=lambda *_: None)
    cfg, world, train = PRESETS["tiny"], World(args.kb), load_questions(args.data, "train")
    build_tiny(tmp_path, warmstart.corpus(world, train), seed=args.seed)
    assert (tmp_path / "tokenizer.json").read_text() == (WARMSTART / "tokenizer.json").read_text()
    teacher = warmstart.Teacher(KnowledgeBase.open(args.kb), world, cfg.topk, args.seed)
    learning = warmstart.learn(
        "read", args, cfg, teacher, train, *load_policy(tmp_path, torch.float32)
    )
    assert [loss for loss, _ in zip(learning, range(20))] == pytest.approx(
        recipe["losses"]["0 read"][:20], rel=1e-3
    )
