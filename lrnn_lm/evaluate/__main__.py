"""`accelerate launch -m lrnn_lm.evaluate CHECKPOINT.. --tasks a,b`: `lrnn eval`, shared by the processes."""

import sys

from ..cli import main

main(["eval", *sys.argv[1:]])
