"""A sampler for a chat model that sees pictures, behind any OpenAI-compatible address.

A turn is a chat message, and what came back is the user's reply. There are no token ids, so nothing
can be trained.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from files.records import whole_characters


@dataclass
class Endpoint:
    """Where the model is, and how patiently it is asked. The key is read from OPENAI_API_KEY."""

    base_url: str
    model: str
    workers: int = 16  # requests at a time
    retries: int = 5  # per request

    @cached_property
    def client(self):
        return open_client(self.base_url, self.retries, seconds=300)


def api_key() -> str:
    return os.environ.get("OPENAI_API_KEY", "none")


def open_client(base_url: str, retries: int, seconds: float):
    """A client of an OpenAI-compatible server. seconds: for one request, of retries + 1."""
    from openai import OpenAI

    return OpenAI(base_url=base_url, api_key=api_key(), max_retries=retries, timeout=seconds)


def complete(client, **request):
    """A chat completion. Raises ConnectionError when the endpoint fails for good."""
    from openai import OpenAIError

    try:
        done = client.chat.completions.create(**request)
        if not done.choices:
            raise OpenAIError("it sent no choice")
        return done
    except OpenAIError as error:
        raise ConnectionError(
            f"the model's endpoint failed ({type(error).__name__}: {error}); "
            "what it has answered is kept, type the command again"
        ) from None


def text_of(completion) -> str:
    """What a completion says."""
    return whole_characters(completion.choices[0].message.content or "")


class EndpointSampler:
    """`read` and `write` as in samplers.py.

    Raises ConnectionError when the endpoint fails for good.
    """

    tokenizer = None

    def __init__(self, endpoint: Endpoint, cfg, first_message, next_message, stops: list[str], cut):
        """
        first_message: response → the content of the user's first message
        next_message: response → the content of the user's following ones
        stops: the texts that end a turn
        cut: (reply, was it stopped at one of them?) → the turn
        """
        self.endpoint, self.cfg = endpoint, cfg
        self.first_message, self.next_message = first_message, next_message
        self.stops, self.cut = stops, cut
        self.client = endpoint.client
        self.chats = {}  # {id of a response: messages}

    def read(self, active: list):
        for response in active:
            chat = self.chats.get(id(response))
            if chat is None:
                content = self.first_message(response)
                self.chats[id(response)] = [{"role": "user", "content": content}]
            else:
                chat.append({"role": "assistant", "content": response.turn_text})
                chat.append({"role": "user", "content": self.next_message(response)})

    def write(self, active: list):
        with ThreadPoolExecutor(self.endpoint.workers) as pool:
            for response, text in zip(active, pool.map(self.reply, active)):
                response.turn_text = text

    def reply(self, response) -> str:
        done = complete(
            self.client,
            model=self.endpoint.model,
            messages=self.chats[id(response)],
            temperature=self.cfg.temperature,
            top_p=self.cfg.top_p,
            max_tokens=self.cfg.max_turn_tokens,
            stop=self.stops,
        )
        return self.cut(text_of(done), done.choices[0].finish_reason == "stop")
