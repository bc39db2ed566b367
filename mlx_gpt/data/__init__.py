"""Text files to windows of token ids."""
