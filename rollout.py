"""Rollouts: the policy thinks, acts, reads what came back, and goes on until it answers.

    question ─► <think> … </think><image_search> image 1</image_search>      the policy's turn
                <information> Image 1: Chad</information>                     what came back
                <think> … </think><text_search> capital of Chad</text_search>
                <information> Doc 1(Title: Chad) Capital, name: N'Djamena … </information>
                <think> … </think><answer> N'Djamena</answer>

At most T = `max_turns` turns may search; one more may only answer, as in the paper. A mistake makes
the turn invalid, which costs R_format:

    a turn                                                 what follows
    no thought, stray text, two actions, a "<" inside one  the first closed action is carried out
    no closed action, no such image, an empty query        an observation says what was wrong
    an empty answer                                        the response ends with it
    no answer in the last turn, or tokens spent            the response ends without an answer

A response holds the very ids that were sampled, with their log-probabilities: only an inference
server (engine/served.py) tokenises them again. A passage is tokenised as data, and can forge no
tag.
"""

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from data import Question, gold_hop
from engine.distributed import alone
from engine.pictures import preprocessed
from engine.samplers import SAMPLERS
from engine.text import message_ids, message_texts, observation_ids, tagged, words_of
from files.ranges import Amount, Count, NotNegative, Observed, Share
from model import Policy, Prompt, prompt_positions

# ------------------------------------------------------------------------------------- the loop


@dataclass
class Turn:
    thought: str
    action: str  # one of ACTIONS, or INVALID where there was none
    argument: str
    valid: bool  # exactly one thought, then one well-formed action that could be carried out
    observation: str = ""
    hits: list = field(default_factory=list)

    @property
    def call(self) -> Hashable:
        """Equal for searches that are the same one; None where the turn does not search."""
        if self.action not in SEARCHES:
            return None
        return self.action, SEARCHES[self.action].same(self.argument)


@dataclass
class Response:
    """One of a question's G responses, in the making or finished.

    The tensors have length L: the prompt, then everything sampled or observed, as the model saw it.
    A response that was written elsewhere (an endpoint, a file) has none.
    """

    question: Question
    prompt: Prompt | None
    token_ids: Tensor | None  # int64
    policy_mask: Tensor | None  # bool, True where the policy sampled the token
    logprobs: Tensor | None  # float32, under π (model.py), before top-p; 0 where not sampled
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    stop: str = ""  # one of STOPS; "" while it goes on
    weights: Tensor | None = None  # float32 (L,), corrections (engine/packing.py)
    turn_text: str = ""  # the latest turn
    observation_lines: list[str] = field(default_factory=list)  # what came back for it
    greedy: bool = False  # its tokens are the likeliest ones, at any temperature

    @property
    def own_length(self) -> int:
        """Tokens after the prompt, observed ones included."""
        return 0 if self.prompt is None else len(self.token_ids) - len(self.prompt.token_ids)

    def own_ids(self) -> Tensor:
        """Those tokens."""
        return self.token_ids[len(self.prompt.token_ids) :]

    def append(self, ids: list[int], logprobs: list[float] | None = None):
        """Sampled tokens with their log-probabilities, or observed ones without."""
        sampled = torch.full((len(ids),), logprobs is not None)
        values = torch.zeros(len(ids)) if logprobs is None else torch.tensor(logprobs)
        self.token_ids = torch.cat([self.token_ids, torch.tensor(ids, dtype=torch.long)])
        self.policy_mask = torch.cat([self.policy_mask, sampled])
        self.logprobs = torch.cat([self.logprobs, values])


def new_response(question: Question, prompt: Prompt, greedy: bool = False) -> Response:
    """A response of which only the prompt is there."""
    mask = torch.zeros(len(prompt.token_ids), dtype=torch.bool)
    return Response(question, prompt, prompt.token_ids, mask, torch.zeros(len(mask)), greedy=greedy)


def sample(policy: Policy, kb, questions, cfg, generator=None, any_left=alone, num_greedy: int = 0):
    """G responses per question, question-major: [Response]. cfg: a RolloutConfig (below).

    generator: a torch.Generator on the policy's device; None is the global one. any_left: asked
    whether any rank has responses left (engine/distributed.py). num_greedy: how many of each group,
    the first ones, are greedy. Raises ValueError when a picture cannot be read.
    """
    prompts = [build_prompt(policy, question, cfg) for question in questions]
    responses = [
        new_response(question, prompt, greedy=number < num_greedy)
        for question, prompt in zip(questions, prompts)
        for number in range(cfg.group_size)
    ]
    sampler = SAMPLERS[cfg.sampler](policy, responses, cfg, CLOSING, generator, any_left)
    run_episodes(sampler, kb, responses, cfg)
    return responses


def run_episodes(sampler, kb, responses: list[Response], cfg):
    """Every response to its end, in place. The loop is the same for every sampler (engine/)."""
    active = responses
    for turn in range(cfg.max_turns + 1):
        sampler.read(active)  # 1) the prompt; later, what came back
        sampler.write(active)  # 2) the policy writes a turn: ids and log-probs
        act(active, kb, sampler.tokenizer, cfg, last_turn=turn == cfg.max_turns)  # 3) it happens
        # no break where none is left: other ranks may need this one's forward passes (samplers.py)
        active = [response for response in active if not response.stop]


def act(active: list[Response], kb, tokenizer, cfg, last_turn: bool):
    """Carry out each response's latest turn, or end the response (STOPS).

    tokenizer: the policy's; None where responses are texts, without tokens and their budget.
    """
    calls = {name: [] for name in SEARCHES}  # [(response, what to search for)]
    # 1) What does each turn ask for?
    for response in active:
        turn = parse_turn(response.turn_text)
        response.turns.append(turn)
        spent = response.own_length >= cfg.max_tokens
        if turn.action == "answer":
            response.answer, response.stop = turn.argument, "answer"
            turn.valid = turn.valid and bool(turn.argument)  # an empty one is no answer
        elif last_turn or spent:
            response.stop = "turns" if last_turn else "length"
            turn.valid = False
        elif turn.action in SEARCHES:
            search = SEARCHES[turn.action]
            wanted, problem = search.parse(turn.argument, response.question)
            if problem:
                report_mistake(response, problem)
            else:
                calls[turn.action].append((response, wanted))
        else:
            report_mistake(response, NO_ACTION)
    # 2) One batched search of each kind.
    for name, search in SEARCHES.items():
        asked = [(response.question, wanted) for response, wanted in calls[name]]
        found = search.run(kb, asked, cfg) if asked else []
        for (response, wanted), hits in zip(calls[name], found):
            response.turns[-1].hits = hits
            response.observation_lines = search.lines(wanted, hits) or [NOTHING_FOUND]
    # 3) What came back is appended, where it fits.
    for response in active:
        if response.stop or tokenizer is None:
            continue
        ids = observation_ids(tokenizer, response.observation_lines, cfg.max_obs_tokens)
        if response.own_length + len(ids) + 1 > cfg.max_tokens:  # 1: for the next turn
            response.stop = "length"
        else:
            response.append(ids)
            response.turns[-1].observation = tokenizer.decode(ids)


def report_mistake(response: Response, message: str):
    """The turn is invalid; the observation will say why."""
    response.observation_lines = [message]
    response.turns[-1].valid = False


# ---------------------------------------------------------------------- what the policy can do


@dataclass(frozen=True)
class Search:
    """All that the rest of the code needs to know of a search that the policy may ask for."""

    instruction: str  # what the prompt says of it
    corpus: str  # image | text: whose rows its hits are
    # (argument, question) → what to search for; and the problem, "" where there is none
    parse: Callable[[str, object], tuple[object, str]]
    # (knowledge base, [(question, what to search for)], cfg) → the hits of each
    run: Callable[[object, list, object], list[list]]
    # (what was searched for, its hits) → the lines that the policy reads
    lines: Callable[[object, list], list[str]]
    same: Callable[[str], Hashable]  # calls whose arguments give equal keys are one call


def image_number(argument: str) -> int:
    """The number in "image 2" or "2"; 0 where there is none."""
    match = re.fullmatch(r"(?:image\s*)?(\d{1,3})", argument.strip().lower())
    return int(match.group(1)) if match else 0


def parse_image_number(argument: str, question) -> tuple[int | None, str]:
    number, count = image_number(argument), len(question.images)
    if 1 <= number <= count:
        return number, ""
    plural = "" if count == 1 else "s"
    return None, f"There is no such image; this question has {count} image{plural}."


def search_images(kb, calls: list, cfg) -> list[list]:
    found = kb.image_search([q.images[number - 1] for q, number in calls], cfg.image_topk)
    if cfg.oracle_image:
        found = [gold_hits(q, number, hits) for (q, number), hits in zip(calls, found)]
    return found


def search_texts(kb, calls: list, cfg) -> list[list]:
    return kb.text_search([query for _, query in calls], cfg.topk)


def gold_hits(question, number: int, hits: list) -> list:
    """What the gold chain says that the image shows, in the place of what was found."""
    hop = gold_hop(question, number)
    return [replace(hits[0], title=hop.result, row=hop.rows[0])] if hop and hits else hits


def image_lines(number: int, hits: list) -> list[str]:
    """The nearest article's title, or several with their scores."""
    if len(hits) == 1:
        return [f"Image {number}: {hits[0].title}"]
    return [f"Image {number}: {hit.title} ({hit.score:.2f})" for hit in hits]


def text_lines(hits: list) -> list[str]:
    return [f"Doc {i}(Title: {hit.title}) {hit.text}" for i, hit in enumerate(hits, 1)]


# A new search is one entry here: tags, prompt, regexes and R_action follow. What comes back is
# text; pictures enter with the prompt only. The tiny policy has to be taught a new tag (tiny/).
SEARCHES = {
    "image_search": Search(
        "If you are not sure which entity an image shows, look it up with "
        "<image_search>image n</image_search>, where n is the number of the image.",
        corpus="image",
        parse=parse_image_number,
        run=search_images,
        lines=image_lines,
        same=image_number,  # "1" is "image 1"
    ),
    "text_search": Search(
        "If you lack knowledge, search for it with <text_search>query</text_search>.",
        corpus="text",
        parse=lambda query, question: (query, "" if query else "The query is empty."),
        run=search_texts,
        lines=lambda query, hits: text_lines(hits),
        same=words_of,
    ),
}
ACTIONS = (*SEARCHES, "answer")
INVALID = "invalid"  # there was no action; a turn with one may be invalid, too
NOTHING_FOUND = "Nothing was found."
NO_ACTION = "No action was found. Think, then search or answer, each in its tags."
STOPS = {  # why a response ends; all but the last are decided in `act`
    "answer": "it answered",
    "turns": "its last turn, which may only answer, did not",
    "length": "its tokens are spent, or what came back does not fit into them",
    "prompt": "too long, or its picture unreadable: evaluation/ask.py did not ask it",
}
NAMES = "|".join(ACTIONS)
CLOSING = tuple(f"</{name}>" for name in ACTIONS)  # what ends a turn
# valid: one thought without another in it, then one action whose argument holds no "<"
WHOLE_TURN = re.compile(
    rf"\s*<think>((?:(?!</?think>).)*)</think>\s*<({NAMES})>([^<]*)</\2>\s*", re.DOTALL
)
INSTRUCTIONS = (
    "Answer the question about the image. Whenever you receive new information, first reason about "
    "it between <think> and </think>. "
    + " ".join(search.instruction for search in SEARCHES.values())
    + " What is found comes back between <information> and </information>. Search as often as you "
    "need to. When you know the answer, give it briefly, without explanation, as "
    "<answer>answer</answer>.\nQuestion: "
)


# fmt: off
@dataclass
class RolloutConfig:
    group_size: Count = 8        # G, responses per question
    max_turns: Amount = 4        # T, turns that may search; one more may answer
    temperature: NotNegative = 1.0  # 0 is greedy
    top_p: Share = 1.0           # the authors used 0.99; stored log-probs are those before it
    max_turn_tokens: Count = 512  # new tokens per turn
    max_obs_tokens: Observed = 1024  # tokens per observation
    max_tokens: Count = 4096     # sampled and observed tokens after the prompt
    min_pixels: Amount = 0       # of a picture: smaller ones are scaled up; 0: the checkpoint's own
    max_pixels: Amount = 0       # larger ones are scaled down; 0: the checkpoint's own
    max_prompt_tokens: Amount = 0  # longer ones are not trained on, and count as wrong; 0: no limit
    topk: Count = 3              # passages per text search
    image_topk: Count = 1        # titles per image search
    instructions: str = INSTRUCTIONS  # what stands before the question
    oracle_image: bool = False   # ablation: image search answers with the gold entity if known
    sampler: Literal["shared", "generate"] = "shared"  # who writes the turns: engine/samplers.py
    graph: bool = True           # …"shared", on a GPU: a token is decoded by a CUDA graph
# fmt: on


# ------------------------------------------------------------------------------ text and tokens


def parse_turn(text: str) -> Turn:
    """What a turn does. Lenient in what it finds, strict in what it calls valid.

    >>> turn = parse_turn("<think> it is Chad</think><text_search> capital of Chad</text_search>")
    >>> turn.thought, turn.action, turn.argument, turn.valid
    ('it is Chad', 'text_search', 'capital of Chad', True)
    >>> parse_turn("it is Chad</think><answer>Chad</answer>").valid
    False
    >>> parse_turn("I do not know").action
    'invalid'
    """
    whole = WHOLE_TURN.fullmatch(text)
    if whole:
        thought, action, argument = whole.groups()
        return Turn(thought.strip(), action, argument.strip(), True)
    thought, action = tagged(text, ["think"]), tagged(text, ACTIONS)
    said = thought.inside if thought else text[: action.start] if action else text
    name, argument = (action.name, action.inside) if action else (INVALID, "")
    return Turn(said.strip(), name, argument.strip(), False)


def build_prompt(policy: Policy, question: Question, cfg) -> Prompt:
    """Tokenise a question and preprocess its pictures, once for all of its responses.

    Raises ValueError when a picture cannot be read, or the chat template loses a part.
    """
    # 1) The pictures, and how many tokens each takes.
    pixels, grid, slots = preprocessed(policy.processor, question.images, cfg)
    # 2) One user message: the instructions and the question, its pictures where it names them.
    texts = message_texts(cfg.instructions, question.problem)
    ids = message_ids(policy.processor, texts, slots)
    ids = torch.tensor(ids + list(question.opening))
    # 3) Where each token is.
    positions = prompt_positions(policy.model, ids.to(policy.device), grid)
    return Prompt(ids, positions.cpu(), pixels, grid)
