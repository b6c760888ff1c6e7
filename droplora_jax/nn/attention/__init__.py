"""Attention: one dispatch, a file for each kernel."""
