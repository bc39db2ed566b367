"""A server for models: OpenAI's API for programs, and a page for people."""
