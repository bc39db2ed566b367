"""A conversation with a model: keeps the messages, and has the model answer them."""

import dataclasses
from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import mlx.nn as nn

from mlx_gpt import models
from mlx_gpt.chat_template import ChatTemplate
from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError
from mlx_gpt.generation.engine import Engine
from mlx_gpt.generation.requests import Past, Request, room_for_answer
from mlx_gpt.generation.stop_strings import Piece
from mlx_gpt.tokenizer import Tokenizer

ANSWER_SHARE = 4  # a quarter of the context stays free for the answer, or less if the answer must be shorter


@dataclass(frozen=True)
class Exchange:
    """A message from the user, and the model's answer."""

    question: str
    answer: str


class Dialogue:
    """A conversation that grows by one exchange at a time.

    When the context is full, the model no longer sees the oldest exchanges. They stay in the conversation.

    Attributes:
        context: tokens that the model can see.
        exchanges: the conversation, without the system message.
        unseen: the number of oldest exchanges that the model no longer sees.
        limit: the highest number of tokens that the newest answer could have.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.context = models.context_length(model)
        self.exchanges: list[Exchange] = []
        self.unseen = self.limit = 0
        self._system = ""
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._repeated = 0  # counts the further answers to the newest question
        self._past: Past | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation as messages with `role` and `content`."""
        return self._messages(self.exchanges)

    @property
    def system(self) -> str:
        """The message that comes before all others and says how to answer; "" if there is none.

        Setting it raises a `UserError` if the text is too long for the context or the template refuses it. Then the
        earlier message stays.
        """
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        before, self._system = self._system, text
        try:
            self._fit([], "?", 1, "system message")
        except UserError:
            self._system = before
            raise
        self.unseen = 0

    def ask(self, question: str, config: GenerationConfig) -> Generator[Piece, None, None]:
        """Answer a message, and yield text as soon as it is certain.

        The exchange joins the conversation when the iterator ends or is closed, with the part of the answer that has
        been made by then. Without an answer the conversation stays as it was.

        Raises:
            UserError: the message does not fit into the context, or the template refuses it.
        """
        self._repeated = 0
        return self._answer(self.exchanges, question, config)

    def again(self, config: GenerationConfig) -> Generator[Piece, None, None]:
        """Answer the newest message anew, as `ask` does, with another seed than before.

        Raises:
            UserError: nothing has been answered yet, or the answer would be the same.
        """
        if not self.exchanges:
            raise UserError("There is no answer yet: write a message first.")
        if config.temperature == 0:
            raise UserError("At temperature 0 the answer would be the same: set a higher one first.")
        self._repeated += 1
        if config.seed is not None:
            config = dataclasses.replace(config, seed=config.seed + self._repeated)
        return self._answer(self.exchanges[:-1], self.exchanges[-1].question, config)

    def undo(self) -> Exchange:
        """Remove the newest exchange, and return it.

        Raises:
            UserError: there is no exchange.
        """
        if not self.exchanges:
            raise UserError("There is nothing to take back.")
        self.unseen = 0
        *self.exchanges, last = self.exchanges
        return last

    def clear(self) -> None:
        """Remove all exchanges. The system message stays."""
        self.exchanges, self.unseen = [], 0

    def _answer(
        self, before: Sequence[Exchange], question: str, config: GenerationConfig
    ) -> Generator[Piece, None, None]:
        ids, unseen = self._fit(before, question, config.max_tokens)
        earlier, self.unseen = self.unseen, unseen
        self.limit = room_for_answer(config.max_tokens, ids, self.context)
        request = Request(ids, dataclasses.replace(config, max_tokens=self.limit))
        return self._generate(request, before, question, earlier)

    def _generate(
        self, request: Request, before: Sequence[Exchange], question: str, unseen: int
    ) -> Generator[Piece, None, None]:
        """Answer; without an answer, the conversation and the number of its `unseen` exchanges stay as they were."""
        capacity = len(request.prompt) + request.config.max_tokens
        answer = ""
        try:
            engine = Engine(self._model, self._tokenizer, capacity=capacity, past=self._past)
            engine.add(request)
            while engine.busy:
                for _, piece in engine.step():
                    answer += piece.text
                    yield piece
            self._past = engine.past  # Ctrl-C can leave an engine in any state; then the earlier one stays
        finally:
            if answer.strip():
                self.exchanges = [*before, Exchange(question, answer)]
            else:
                self.unseen = unseen

    def _fit(
        self, exchanges: Sequence[Exchange], question: str, max_tokens: int, new: str = "message"
    ) -> tuple[list[int], int]:
        """Return the ids of a prompt that fits, and the number of oldest exchanges that it leaves out.

        Args:
            new: the word for the text that a person has just written, and can shorten.

        Raises:
            UserError: the prompt does not fit without any exchange, or the template refuses the messages.
        """
        room = self.context - min(max_tokens, self.context // ANSWER_SHARE)

        def ids(unseen: int) -> list[int]:
            messages = [*self._messages(exchanges[unseen:]), {"role": "user", "content": question}]
            return self._template.ids(messages, self._tokenizer)

        # Exchanges left out once stay out, so that the prompt begins like the last one, which has been read.
        first = min(self.unseen, len(exchanges))
        unseen = bisect_left(range(len(exchanges)), True, lo=first, key=lambda unseen: len(ids(unseen)) <= room)
        if len(prompt := ids(unseen)) > room:
            among = "with the system message " if self._system and new == "message" else ""
            raise UserError(
                f"The {new} is too long: {among}it has {len(prompt):,} tokens, and the model's context of "
                f"{self.context:,} leaves {room:,} beside an answer. Shorten it."
            )
        return prompt, unseen

    def _messages(self, exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self._system}] if self._system else []
        for exchange in exchanges:
            messages.append({"role": "user", "content": exchange.question})
            messages.append({"role": "assistant", "content": exchange.answer})
        return messages
