"""Which noise method draws what was asked for most often, and at what cost?

    python -m bench.study draw STUDY --prompts shapes-two --methods plain select:attention:5 initno
    python -m minsd.judge STUDY
    python -m bench.study table STUDY --page

The program is minsd/app/study.py. This file starts it from a checkout.
"""

import sys

import bench  # noqa: F401  # sets up the import path of a bare checkout
from minsd.app.study import main

if __name__ == "__main__":
    sys.exit(main())
