"""Training objectives. Each defines what a batch holds and how its loss is computed.

An objective is called with a model and a batch. It returns the loss in nats as a sum over the tokens that count, and
the sum of their weights. Therefore the results of micro-batches and ranks can be added up, and every token weighs the
same. An objective also encodes a corpus of its kind, and makes the windows for training and validation.
"""

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

from mlx_gpt.objectives.chat import Chat
from mlx_gpt.objectives.text import Text

OBJECTIVES: dict[str, type[Text]] = {"documents": Text, "conversations": Chat}  # by the kind of the corpus
