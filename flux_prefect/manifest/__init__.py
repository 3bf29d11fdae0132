"""The record of a batch: one record a row, written as the batch goes on, and the sums over them."""

__all__: list[str] = []
