"""`python -m r1v_rl COMMAND` is `r1v-rl COMMAND`; accelerate launches it this way."""

import sys

from r1v_rl.runtime import end_with_starter

if __name__ == "__main__":
    end_with_starter()
    from r1v_rl.cli import main  # a launcher may be killed while its ranks import

    sys.exit(main())
