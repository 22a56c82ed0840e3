"""The subject: where an image starts. One file per method; each names its paper."""

from . import initial

__all__ = ["initial"]
