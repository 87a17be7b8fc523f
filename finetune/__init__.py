"""finetune: turn a folder of labelled images into a classifier you can trust."""

__version__ = "0.1.0"
