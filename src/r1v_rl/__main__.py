"""`python -m r1v_rl COMMAND` is `r1v-rl COMMAND`; accelerate launches it this way."""

import os
import sys

from r1v_rl.cli import main
from r1v_rl.runtime import DIE_WITH_PARENT, die_with_parent

if __name__ == "__main__":
    if starter := os.environ.get(DIE_WITH_PARENT):
        die_with_parent(int(starter))
    sys.exit(main())
