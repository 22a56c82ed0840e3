"""`python -m minsd`: the same program as `minsd` and `python -m minsd.generate`."""

import sys

from minsd.generate import script

if __name__ == "__main__":
    sys.exit(script())
