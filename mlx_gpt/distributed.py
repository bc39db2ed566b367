"""placeholder until merged"""

import os


class Ranks:
    rank, size, here, number_here = 0, 1, 1, 0

    @property
    def first(self):
        return self.rank == 0

    def broadcast(self, value):
        return value

    def total(self, *numbers):
        return list(numbers)

    def any(self, *wishes):
        return wishes

    def sum(self, arrays):
        return arrays

    def copy(self, arrays):
        return arrays

    def in_turns(self, work):
        return work()

    def __enter__(self):
        return self

    def __exit__(self, *e):
        pass


ALONE = Ranks()


def is_first():
    return os.environ.get("MLX_RANK", "0") == "0"


def join():
    return ALONE
