"""Prompt tables: their sources, their formats, and the templates that prompts are rendered from."""

__all__: list[str] = []
