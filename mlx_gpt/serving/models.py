"""The models that a server offers."""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_gpt.chat_template import ChatTemplate
from mlx_gpt.errors import UserError
from mlx_gpt.generation.engine import Engine
from mlx_gpt.settings import name_of_weights
from mlx_gpt.tokenizer import Tokenizer

SHORTEST = 1024  # tokens: a context is not cut shorter than this to make the caches fit
CACHES = 0.75  # of the memory beside the weights; the rest is for computing

log = logging.getLogger("mlx_gpt")


@dataclass(frozen=True)
class ServedModel:
    """A model that clients can use.

    Attributes:
        name: the name that clients use.
        folder: the run or model directory that it was loaded from.
        context: tokens that the model sees of each text.
        template: turns conversations into prompts; None if the model was not trained on conversations.
        engine: makes an engine for it.
    """

    name: str
    folder: Path
    tokenizer: Tokenizer
    context: int
    n_params: int
    template: ChatTemplate | None
    engine: Callable[[], Engine]


def load_models(paths: Sequence[Path], max_batch: int, context: int | None = None) -> Mapping[str, ServedModel]:
    """Load models, by name.

    Args:
        paths: runs or model directories.
        max_batch: texts that each engine generates at a time.
        context: tokens that the models see of each text; None is all that a model can, or as many as fit in memory.

    Raises:
        UserError: a model cannot be loaded, or there is too little memory.
    """

    from mlx.utils import tree_flatten

    from mlx_gpt import api, models
    from mlx_gpt.device import device
    from mlx_gpt.generation.cache import bytes_per_token
    from mlx_gpt.training.run_folder import model_directory

    folders, available, needed = [model_directory(path) for path in paths], device().usable, 0
    loaded, sizes = {}, {}
    for name, folder in zip(names_of(folders), folders, strict=True):
        model, tokenizer = api.load(folder)
        needed += sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
        if needed > available:
            raise UserError(f"The weights need {needed / 1e6:,.0f} MB, more than is free: serve a smaller model.")
        loaded[name] = folder, model, tokenizer
        rows = max_batch + 1  # one more text is being read
        sizes[name] = rows * bytes_per_token(model), models.context_length(model)
    contexts = fit_contexts(sizes, CACHES * (available - needed), context)
    needed += sum(per_token * contexts[name] for name, (per_token, _) in sizes.items())
    if needed > available:
        texts = "one text" if max_batch == 1 else f"{max_batch} texts"
        raise UserError(
            f"The weights and the caches of {texts} need {needed / 1e6:,.0f} MB, more than is free: lower --max-batch "
            "or --context."
        )
    served = {}
    for name, (folder, model, tokenizer) in loaded.items():
        sees, own = contexts[name], sizes[name][1]
        if sees < min(context or own, own):
            log.info(
                "%s uses %s of the %s tokens of its context, so that the caches fit in memory.",
                name,
                f"{sees:,}",
                f"{own:,}",
            )
        engine = functools.partial(Engine, model, tokenizer, max_batch, context=sees)
        template = ChatTemplate.of(tokenizer)
        served[name] = ServedModel(name, folder, tokenizer, sees, models.n_params(model), template, engine)
    return served


def fit_contexts(sizes: Mapping[str, tuple[int, int]], room: float, context: int | None = None) -> dict[str, int]:
    """Return how many tokens each model sees of each text.

    Args:
        sizes: by the model's name, the bytes that its caches take for each token, and the tokens that it can see.
        room: bytes for all caches.
        context: the tokens that were asked for; None is all that a model can see, or as many as fit.
    """
    contexts = {}
    # The models that need the least come first, because the others can use what they leave.
    for done, name in enumerate(sorted(sizes, key=lambda name: math.prod(sizes[name]))):
        per_token, own = sizes[name]
        fits = int(room / (len(sizes) - done) / per_token)
        if context or own <= fits:
            contexts[name] = min(context or own, own)
        else:
            contexts[name] = min(own, max(SHORTEST, fits // SHORTEST * SHORTEST))
        room -= per_token * contexts[name]
    return contexts


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the name of each model: that of its run, with a number if another model already has that name."""
    names: list[str] = []
    for folder in folders:
        name = name_of_weights(folder)
        candidates = (f"{name}-{i}" if i > 1 else name for i in itertools.count(1))
        names.append(next(candidate for candidate in candidates if candidate not in names))
    return names
