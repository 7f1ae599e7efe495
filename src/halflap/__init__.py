"""halflap: train, compress, evaluate and run hybrid attention and state-space language models."""

__version__ = "0.1.0"
