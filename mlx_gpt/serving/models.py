"""The models that a server offers."""

import functools
import itertools
import logging
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

log = logging.getLogger(__name__)


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

    folders, available = [model_directory(path) for path in paths], device().usable
    loaded = [(name, folder, *api.load(folder)) for name, folder in zip(names_of(folders), folders, strict=True)]
    needed = sum(weight.nbytes for _, _, model, _ in loaded for _, weight in tree_flatten(model.parameters()))
    room = CACHES * (available - needed) / len(loaded)
    served = {}
    for name, folder, model, tokenizer in loaded:
        per_token = bytes_per_token(model) * (max_batch + 1)  # one more text is being read
        own = models.context_length(model)
        sees = min(context or own, own)
        if not context and per_token * own > room:
            sees = min(own, max(SHORTEST, int(room / per_token) // SHORTEST * SHORTEST))
        needed += per_token * sees
        if needed > available:
            raise UserError(
                f"The weights and the caches of {max_batch} texts need {needed / 1e6:,.0f} MB, more than is free: "
                f"lower --max-batch{' or --context' if sees > SHORTEST else ''}."
            )
        if sees < min(context or own, own):
            log.info("The context of %s is %s of its %s tokens, so that the caches fit in memory.", name, sees, own)
        engine = functools.partial(Engine, model, tokenizer, max_batch, context=sees)
        template = ChatTemplate.of(tokenizer)
        served[name] = ServedModel(name, folder, tokenizer, sees, models.n_params(model), template, engine)
    return served


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the name of each model: that of its run, with a number if another model already has that name."""
    names: list[str] = []
    for folder in folders:
        name = name_of_weights(folder)
        candidates = (f"{name}-{i}" if i > 1 else name for i in itertools.count(1))
        names.append(next(candidate for candidate in candidates if candidate not in names))
    return names
