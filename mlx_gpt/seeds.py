"""Seeds for random numbers that can be drawn again."""

import random


def seed_from(*numbers: int) -> int:
    """Mix several numbers, such as (seed, step, micro-step), into one 63-bit seed; each tuple has its own.

    SplitMix64's finaliser (Steele et al. 2014) mixes the numbers in one after the other.
    """
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1


def fresh_seed() -> int:
    """Return a seed that nobody can predict."""
    return random.SystemRandom().randrange(2**62)
