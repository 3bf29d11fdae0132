"""Prefect's two UIs and the page of a batch, in a real Chromium."""
