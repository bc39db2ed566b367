"""Turns text files into windows of token ids."""
