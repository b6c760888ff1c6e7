"""Adapters in PEFT's format, in and out."""
