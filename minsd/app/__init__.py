"""The program behind `python -m minsd.generate`: options, requests, jobs, runs. The model itself is
minsd/pipeline.py.
"""

from dataclasses import dataclass


@dataclass
class Tally:
    """How many images of a run are saved so far, for the message that ends it early."""

    made: int = 0
    wanted: int = 0
