"""rlaif: train a language model towards a written constitution, online."""

__version__ = "0.1.0"
