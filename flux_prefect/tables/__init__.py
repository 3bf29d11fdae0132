"""Prompt tables: where requests come from, in which format, and how templates become prompts."""
