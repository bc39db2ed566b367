"""From files to windows of token ids."""
