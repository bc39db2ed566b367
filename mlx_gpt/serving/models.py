"""The models that a server offers."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_gpt.chat_template import ChatTemplate
from mlx_gpt.errors import UserError
from mlx_gpt.generation.engine import Engine
from mlx_gpt.settings import name_of_weights
from mlx_gpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A model that clients can use.

    Attributes:
        name: the name that clients use.
        folder: the run or model directory that it was loaded from.
        n_positions: length of its context, in tokens.
        template: turns conversations into prompts; None if the model was not trained on conversations.
        engine: makes an engine for it.
    """

    name: str
    folder: Path
    tokenizer: Tokenizer
    n_positions: int
    n_params: int
    template: ChatTemplate | None
    engine: Callable[[], Engine]


def load_models(paths: Sequence[Path], max_batch: int) -> Mapping[str, ServedModel]:
    """Load models, by name.

    Args:
        paths: runs or model directories.
        max_batch: texts that each engine generates at a time.

    Raises:
        UserError: a model cannot be loaded, or there is too little memory.
    """

    from mlx.utils import tree_flatten

    from mlx_gpt import api, models
    from mlx_gpt.device import device
    from mlx_gpt.generation.cache import bytes_per_token
    from mlx_gpt.training.run_folder import model_directory

    folders = [model_directory(path) for path in paths]
    served = {}
    available, needed = device().usable, 0
    for name, folder in zip(names_of(folders), folders, strict=True):
        model, tokenizer = api.load(folder)
        positions = models.context_length(model)
        needed += sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
        needed += bytes_per_token(model) * positions * max_batch
        if needed > available:
            raise UserError(
                f"The weights and the caches of {max_batch} texts need {needed / 1e6:,.0f} MB, more than is free: "
                "lower --max-batch."
            )
        engine = functools.partial(Engine, model, tokenizer, max_batch)
        template = ChatTemplate.of(tokenizer)
        served[name] = ServedModel(name, folder, tokenizer, positions, models.n_params(model), template, engine)
    return served


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the name of each model: that of its run, with a number if another model already has that name."""
    names: list[str] = []
    for folder in folders:
        name = name_of_weights(folder)
        candidates = (f"{name}-{i}" if i > 1 else name for i in itertools.count(1))
        names.append(next(candidate for candidate in candidates if candidate not in names))
    return names
