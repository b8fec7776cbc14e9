"""`accelerate launch -m lrnn_lm.train RECIPE [overrides]` is `lrnn train RECIPE [overrides]`."""

import sys

from ..cli import main

main(["train", *sys.argv[1:]])
