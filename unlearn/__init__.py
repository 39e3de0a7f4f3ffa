"""Remove hazardous knowledge from a language model, and measure honestly whether it is gone."""

__version__ = "0.1.0"
