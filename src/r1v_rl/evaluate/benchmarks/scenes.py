"""`scenes`: questions about drawn shapes whose held-out scenes no stage trains on; rows without limit from a seed."""

from r1v_rl.data.scenes import scenes_rows
from r1v_rl.evaluate.benchmarks.base import Benchmark, Question


def read(row, position):
    return Question(row["id"], row["problem"], row["answer"], "text", images=row["images"], group=row["kind"])


def make(num_rows, seed):
    return scenes_rows("heldout", num_rows, seed, num_images=1)


BENCHMARKS = [Benchmark("scenes", "scenes (held out)", read, 500, make=make)]
