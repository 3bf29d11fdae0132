"""The stand-in itself: what it promises to those who test against it."""
