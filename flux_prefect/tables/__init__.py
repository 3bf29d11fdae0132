"""Prompt tables: where requests come from, in which format, and how templates become prompts."""

__all__: list[str] = []
