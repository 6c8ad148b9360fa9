"""`python -m r1v_rl COMMAND` is `r1v-rl COMMAND`; accelerate launches it this way."""

import sys

from r1v_rl.cli import main

if __name__ == "__main__":
    sys.exit(main())
