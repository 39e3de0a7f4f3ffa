"""The embedded world: a tiny model that knows invented, harmless facts, its corpora and its questions."""
