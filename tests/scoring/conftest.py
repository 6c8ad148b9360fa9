import pytest

from r1v_rl.scoring import GraderPool


@pytest.fixture(scope="session")
def pool():
    """A pool whose workers are up, so that a test's clock shows judging alone."""
    with GraderPool(num_workers=2) as pool:
        pool.judge_answers([r"\boxed{x+1}", r"\boxed{x+2}"], ["1+x", "2+x"])
        yield pool
