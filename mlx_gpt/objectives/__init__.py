"""Training objectives. Each defines what a batch holds and how its loss is computed.

An objective is called with a model and a batch and returns the loss as a sum over the tokens that count, in nats, and
the sum of their weights. Therefore the results of micro-batches and ranks can be added up, and every token weighs the
same. The objective of a corpus is the one with its `kind`. It encodes the corpus and makes the windows that training
and validation read.
"""

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

from mlx_gpt.objectives.chat import Chat
from mlx_gpt.objectives.text import Text

OBJECTIVES: dict[str, type[Text]] = {"text": Text, "chat": Chat}


def objective_of(kind: str) -> type[Text]:
    """Return the objective of a corpus of this kind."""
    return next(objective for objective in OBJECTIVES.values() if objective.kind == kind)
