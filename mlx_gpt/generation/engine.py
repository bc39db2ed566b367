"""Generates many texts at a time: each prompt is read, then all texts are decoded together, one token per step.

Texts enter and leave between two steps (continuous batching: Yu et al. 2022, Orca). A prompt is read in chunks, one per
step, so that texts in progress wait for one chunk at most.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt import models
from mlx_gpt.detokenizer import Detokenizer
from mlx_gpt.device import Device, device
from mlx_gpt.errors import UserError
from mlx_gpt.generation.cache import make_cache
from mlx_gpt.generation.requests import Continuation, Past, Picked, Prompt, Request, choose
from mlx_gpt.generation.sampling import Logprobs, likeliest, listed
from mlx_gpt.generation.stop_strings import Piece, Reason, Token
from mlx_gpt.seeds import fresh_seed
from mlx_gpt.tokenizer import Tokenizer


class Engine:
    """Decodes the texts of requests together, one token of each per `step`.

    A text is the same alone and together with others, up to the rounding of sums, because it has its own random
    numbers, keys and values.

    Attributes:
        made: the tokens of all texts so far.
        past: the cache of the text that ended last, for the next engine; None while texts are made side by side.
        context: tokens that the model sees of each text.

    Args:
        max_batch: texts at a time; further ones wait.
        capacity: tokens that each text may have in the cache; by default `context`.
        on: the device; by default the one that MLX computes on.
        past: tokens that another engine has read. A prompt that begins with the same tokens is read from there on.
        context: tokens that the model sees of each text; by default as many as it has positions.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        max_batch: int = 1,
        capacity: int | None = None,
        on: Device | None = None,
        past: Past | None = None,
        context: int | None = None,
    ) -> None:
        self.max_batch, self.made, self.past = max_batch, 0, past
        self._tokenizer = tokenizer
        self.context, self._entries = context or models.context_length(model), models.vocab_size(model)
        self._device = on or device()
        self._model = self._device.decoder(model.eval(), max_batch)
        self._cache = make_cache(model, max_batch, capacity or self.context)
        # The model has these ids only because its vocabulary was padded to a round size.
        self._unknown_v = (
            mx.arange(self._entries) >= tokenizer.vocab_size if tokenizer.vocab_size < self._entries else None
        )
        self._queue: deque[Prompt] = deque()
        self._reading: Prompt | None = None
        self._rows: list[Continuation] = []  # as in the cache
        self._tokens_b = mx.array([], mx.uint32)  # the newest of each row
        self._full: list[Continuation] = []  # their context is full; they are read again
        self._picked: list[Picked] = []  # what the device is computing

    @property
    def waiting(self) -> int:
        """Requests that wait for others to end."""
        return sum(not prompt.again for prompt in self._queue)

    @property
    def active(self) -> int:
        """Texts that are being read or decoded."""
        reading = [
            prompt for prompt in (self._reading, *self._queue) if prompt and (prompt.again or prompt is self._reading)
        ]
        return len(self._rows) + len(self._full) + sum(len(prompt.texts) for prompt in reading)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._queue or self._reading or self._rows or self._full or self._picked)

    def add(self, request: Request) -> None:
        """Queue a request; `step` returns its text.

        Raises:
            UserError: the request asks for more texts than are decoded at a time.
        """
        count = request.config.num_samples
        if count > self.max_batch:
            raise UserError(f"{count} texts were asked for, but at most {self.max_batch} are made at a time.")
        seed = fresh_seed() if request.config.seed is None else request.config.seed
        texts = [Continuation(request, i, seed + i, self._tokenizer, self._entries) for i in range(count)]
        self._queue.append(self._prompt(texts, request.prompt))

    def drop(self, request: Request) -> None:
        """Drop a request: it gets no more text, and its rows are free at the next step."""
        self._queue = deque(prompt for prompt in self._queue if prompt.request is not request)
        if self._reading and self._reading.request is request:
            self._reading = None
        for texts in (self._full, *(picked.texts for picked in self._picked)):
            for text in texts:
                text.dropped |= text.request is request

    def step(self) -> list[tuple[Request, Piece]]:
        """Advance every text, and return the text of the step before: the device computes while the caller works."""
        before, self._picked = self._picked, []
        self._leave()
        self._decode()
        self._read()
        return [told for picked in before for told in self._tell(picked)]

    def _leave(self) -> None:
        """Free the rows of the texts that have ended, and of those whose context is full."""
        staying = list(range(len(self._rows)))
        for row in reversed(range(len(self._rows))):
            text = self._rows[row]
            full = self._cache.rows.lengths[row] == self.context
            if full and not text.over:
                self._full.append(text)
            if full or text.over:
                self._keep(text, self._cache.rows.lengths[row])
                self._cache.remove(row)
                # The last text takes the row, as in the cache.
                self._rows[row], staying[row] = self._rows[-1], staying[-1]
                self._rows.pop()
                staying.pop()
        if len(staying) < len(self._tokens_b):
            self._tokens_b = self._tokens_b[mx.array(staying, mx.uint32)]

    def _keep(self, text: Continuation, length: int) -> None:
        """Keep the cache of a text, unless other texts will be written over it."""
        # A text that was read again after its context was full has fewer tokens there than all of its own.
        if self.max_batch == 1 and length == len(text.request.prompt) + text.picked - 1:
            self.past = Past([*text.request.prompt, *text.ids][:length], self._cache)

    def _decode(self) -> None:
        """Compute the next token of each text."""
        if self._rows:
            self._cache.rows.grow(1)
            x_btc = models.hidden(self._model, self._tokens_b[:, None], self._cache.layers)
            logits_bv = models.head(self._model, x_btc[:, -1])
            self._tokens_b = self._pick(logits_bv, self._rows)

    def _read(self) -> None:
        """Read a chunk of the next prompt. When all of it has been read, its texts join the others."""
        self._full = [text for text in self._full if not text.over]
        for text in [text for text in self._full if len(text.ids) == text.picked]:
            # It continues from the second half of its context, read again at the first positions.
            self._full.remove(text)
            recent = [*text.request.prompt, *text.ids][-max(1, self.context // 2) :]
            self._queue.appendleft(self._prompt([text], recent, again=True))
        if not self._reading and self._queue:
            first = self._queue[0]
            if first.again or self.active + len(first.texts) <= self.max_batch:
                self._reading = self._queue.popleft()
                self._begin(self._reading)
        if self._reading:
            prompt = self._reading
            logits_v = self._read_chunk(prompt)
            if prompt.done:
                self._reading = None
                logits_bv = mx.broadcast_to(logits_v, (len(prompt.texts), self._entries))
                tokens_b = self._pick(logits_bv, prompt.texts)
                self._picked[-1].prompt_logprobs = prompt.logprobs
                if all(text.over for text in prompt.texts):
                    return  # no later step would compute the rows that are copied here, and free the prompt's cache
                if self.past and self.past.cache is self._cache:
                    self.past = None  # its row is used again
                self._tokens_b = mx.concatenate([self._tokens_b, tokens_b])
                for text in prompt.texts:
                    self._cache.add(prompt.cache)
                    self._rows.append(text)

    def _prompt(self, texts: list[Continuation], ids: Sequence[int], again: bool = False) -> Prompt:
        cache = make_cache(self._model, 1, min(self.context, self._padded(len(ids))))
        return Prompt(texts, ids, cache, again)

    def _begin(self, prompt: Prompt) -> None:
        """Begin to read a prompt, and skip the tokens at its beginning that have been read before."""
        if self.past and not prompt.again and not prompt.request.prompt_too:
            # The last token is always read, because the next one is picked from its logits.
            prompt.cache.begin_with(self.past.cache, self.past.shared(prompt.ids[:-1]))
        else:
            prompt.cache.rows.begin()

    def _read_chunk(self, prompt: Prompt) -> mx.array:
        """Read the next chunk of a prompt, and return the logits (V,) of the token after it."""
        start = prompt.cache.rows.lengths[0]
        ids = prompt.ids[start : start + self._device.chunk]
        # MLX keeps a compiled function for each size, so there should be few sizes.
        padding = min(self._padded(len(ids)), prompt.cache.rows.capacity - start) - len(ids)
        prompt.cache.rows.grow(len(ids) + padding)
        x_tc = models.hidden(self._model, mx.array([[*ids, *[0] * padding]]), prompt.cache.layers)[0, : len(ids)]
        prompt.cache.rows.lengths[0] = start + len(ids)
        if prompt.logprobs is not None:
            logits_tv = self._known(models.head(self._model, x_tc))
            if following := prompt.ids[start + 1 : start + 1 + len(ids)]:  # the last token may be alone in its chunk
                k = max(1, prompt.request.alternatives or 0)
                prompt.logprobs.append(likeliest(logits_tv[: len(following)], mx.array(following, mx.uint32), k))
                mx.async_eval(prompt.logprobs[-1])
            return logits_tv[-1]
        logits_bv = models.head(self._model, x_tc[-1:])
        mx.async_eval(logits_bv)
        return logits_bv[0]

    def _padded(self, count: int) -> int:
        """Return the next power of two or, above a chunk, the next multiple of a chunk."""
        size = self._device.chunk
        return -(-count // size) * size if count > size else 1 << (count - 1).bit_length()

    def _known(self, logits_bv: mx.array) -> mx.array:
        """Return the logits in float32, with -inf for ids that are not tokens."""
        logits_bv = logits_bv.astype(mx.float32)
        return logits_bv if self._unknown_v is None else mx.where(self._unknown_v, -mx.inf, logits_bv)

    def _pick(self, logits_bv: mx.array, texts: Sequence[Continuation]) -> mx.array:
        """Return the next token of each text, (B,), which the device starts to compute."""
        logits_bv = self._known(logits_bv)
        tokens_b = choose(logits_bv, texts)
        asked = [text.request.alternatives for text in texts if text.request.alternatives is not None]
        logprobs = likeliest(logits_bv, tokens_b, max(1, *asked)) if asked else None
        mx.async_eval(tokens_b, logprobs)
        for text in texts:
            text.picked += 1
        self._picked.append(Picked(list(texts), tokens_b, logprobs))
        return tokens_b

    def _tell(self, picked: Picked) -> Iterator[tuple[Request, Piece]]:
        """Yield the text that these tokens make certain."""
        ids = picked.tokens_b.tolist()
        logprobs = listed(picked.logprobs) if picked.logprobs else [(None, ())] * len(ids)
        for text, token, (logprob, alternatives) in zip(picked.texts, ids, logprobs, strict=True):
            request = text.request
            text.ids.append(token)
            if text.dropped or text.text.reason:
                continue  # the token was picked before the text's end was known
            self.made += 1
            if picked.prompt_logprobs is not None:
                yield request, Piece(text.sample, "", tokens=self._prompt_tokens(request, picked.prompt_logprobs))
            reason: Reason = "length" if len(text.ids) == request.config.max_tokens else ""
            if token in self._tokenizer.ends and request.ends:
                reason = "end"
            for piece in text.text.add(token, reason, logprob, alternatives[: request.alternatives]):
                yield request, piece

    def _prompt_tokens(self, request: Request, logprobs: list[Logprobs]) -> tuple[Token, ...]:
        """Return the tokens of a prompt, each with the probability that the model gave it."""
        texts = Detokenizer(self._tokenizer)
        thoughts = [(None, ()), *(thought for chunk in logprobs for thought in listed(chunk))]
        return tuple(
            Token(token, texts.add(token), logprob, alternatives[: request.alternatives])
            for token, (logprob, alternatives) in zip(request.prompt, thoughts, strict=True)
        )
