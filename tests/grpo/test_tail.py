"""The first whole groups of more that were asked for, and what becomes of the others. Long answers come from a fake
server; `rollout/test_servers.py` has real ones."""

import json
import time

import pytest
from grpo.engine_run import two_processes
from grpo.tiny_run import ROWS, make_trainer
from random_vlm import save_random_vlm
from rollout.fake_server import FakeServer

from r1v_rl.check import stages
from r1v_rl.data.chat import load_processor
from r1v_rl.data.dataset import as_examples
from r1v_rl.errors import RecipeError
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.tail import Asked, Tail
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.partial import Wanted, put_back, wanted, whole_groups
from r1v_rl.state_files import weight_hash
from r1v_rl.tracking.completions import read_rollouts
from r1v_rl.tracking.metrics import read_metrics
from r1v_rl.types import Completion

SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_max_model_length": 200}
WORDS = ["circles", "squares", "triangles", "shapes", "red circles", "red squares", "red triangles", "red shapes"]
TEXTS = [
    {**row, "prompt": [{"role": "user", "content": f"How many {words}?"}], "images": []}
    for row, words in zip(ROWS, WORDS, strict=True)
]
LONG = 3
"""The row whose answers are long."""
LONG_S = 1.0
WHOLE, BEGUN = [5, 6], [5]
"""What the server writes, and has written when it is stopped."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(model):
    """Answers at once, but for one row's."""
    processor = load_processor(str(model))
    text = processor.apply_chat_template(TEXTS[LONG]["prompt"], add_generation_prompt=True, tokenize=False)
    start = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    server = FakeServer(seconds=lambda body: LONG_S if body["token_ids"][: len(start)] == start else 0.0)
    yield server
    server.stop()


def make(model, folder, server, **changes):
    keys = {"over_provision": 0.5, "max_steps": 4, "save_strategy": "no", "save_rollouts": True, **SERVER, **changes}
    return make_trainer(model, folder, rows=TEXTS, vllm_server_base_url=[server.url], **keys)


def logged(folder, name: str) -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


def trained(folder, steps: int) -> list[list[dict]]:
    """The completions of each step."""
    stored = read_rollouts(folder).to_pylist()
    return [[record for record in stored if record["step"] == step] for step in range(steps)]


def rows_of(records: list[dict]) -> list[int]:
    return [int(record["example_id"].removeprefix("row")) for record in records[::4]]


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_the_first_whole_groups_are_taken_and_the_others_thrown_away(model, tmp_path, server):
    """Four generations of two prompts, an epoch of eight; each asks for a third one."""
    trainer, started = make(model, tmp_path, server), time.monotonic()
    trainer.train()
    thrown = []
    for step, records in enumerate(trained(tmp_path, 4)):
        asked = [*trainer.sampler.prompts(step, 0, 1), trainer.sampler.spare(step, 0, 1)[0]]
        assert rows_of(records) == [row for row in asked if row != LONG][:2]
        assert {tuple(record["token_ids"]) for record in records} == {tuple(WHOLE)}
        thrown.append(2 + 3 * 1 if LONG in asked else 4 * 2)
    assert 5 in thrown and logged(tmp_path, "rollout/dropped_tokens") == thrown
    assert logged(tmp_path, "rollout/dropped_tokens_frac") == [tokens / (tokens + 16) for tokens in thrown]
    assert logged(tmp_path, "rollout/dropped") == [1 / 3] * 4
    assert set(logged(tmp_path, "rollout/carried") + logged(tmp_path, "rollout/resumed")) == {0.0}
    assert max(logged(tmp_path, "rollout/seconds_generate")) < LONG_S and time.monotonic() - started < 60
    assert not logged(tmp_path, "staleness/max")


@pytest.mark.parametrize("k", [1, 2])
def test_what_is_not_whole_is_continued_for_as_long_as_it_may_be(model, tmp_path, server, k):
    trainer = make(model, tmp_path, server, partial_rollouts=k, max_steps=8)
    trainer.train()
    steps = trained(tmp_path, 8)
    asked_at = next(step for step in range(4) if LONG in trainer.sampler.prompts(step, 0, 1))
    taken_at = next(step for step, records in enumerate(steps) if LONG in rows_of(records))
    assert asked_at <= taken_at - k and logged(tmp_path, "rollout/seconds_generate")[taken_at] >= LONG_S
    group = [record for record in steps[taken_at] if record["example_id"] == f"row{LONG}"]
    assert [record["token_ids"] for record in group] == [WHOLE, *[BEGUN * k + WHOLE] * 3]
    assert {value for record in group for value in record["logprobs"]} == {-0.5}
    assert {record["weight_version"] for record in group} == {taken_at - k}
    assert logged(tmp_path, "staleness/max")[taken_at] == k == max(logged(tmp_path, "staleness/max"))
    assert rows_of(steps[taken_at])[0] == LONG, "what is left of earlier generations comes first"
    assert set(logged(tmp_path, "rollout/dropped")[:-1]) == {0.0} and logged(tmp_path, "rollout/dropped")[-1] == 1 / 3
    assert logged(tmp_path, "rollout/carried")[:-1] == [1 / 3] * 7 and logged(tmp_path, "rollout/carried")[-1] == 0.0
    assert set(logged(tmp_path, "rollout/resumed")) == {0.0, 0.5} and logged(tmp_path, "rollout/resumed")[taken_at]
    rests = [body for body in server.bodies if body["sampling_params"]["n"] == 1]
    assert {body["sampling_params"]["max_tokens"] for body in rests} == {6 - done for done in range(1, k + 1)}
    seeds = [body["sampling_params"]["seed"] for body in server.bodies]
    assert len(set(seeds)) == len(seeds)


def test_a_run_goes_on_with_what_it_had_begun(model, tmp_path, server):
    changes = {"partial_rollouts": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    whole = make(model, tmp_path / "run", server, **changes)
    whole.train()
    taken = [rows_of(records) for records in trained(tmp_path / "run", 6)]
    taken_at = next(step for step, rows in enumerate(taken) if LONG in rows)
    server.bodies.clear()
    resumed = make(model, tmp_path / "run", server, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{taken_at}"))
    first = [body["sampling_params"]["n"] for body in server.bodies[:5]]
    assert sorted(first) == [1, 1, 1, 4, 4], "three completions were begun, and continued"
    assert [rows_of(records) for records in trained(tmp_path / "run", 6)] == taken
    assert weight_hash(resumed.model.state_dict()) == weight_hash(whole.model.state_dict())


def run_on_two(engine, model, folder, url) -> None:
    keys = {**SERVER, "over_provision": 0.5, "partial_rollouts": 1, "max_steps": 4, "save_strategy": "no"}
    trainer = make_trainer(model, folder, rows=TEXTS, vllm_server_base_url=[url], **keys)
    seen, rollout = {"rows": [], "resumed": []}, trainer._rollout

    def keeping(generation):
        batch = rollout(generation)
        seen["rows"].append(batch.rows)
        seen["resumed"].append(max(map(len, batch.completion_ids)) > len(WHOLE))
        return batch

    trainer._rollout = keeping
    trainer.train()
    seen["weights"] = weight_hash(trainer.accelerator.unwrap_model(trainer.model).state_dict())
    (folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))


def test_every_process_waits_for_its_own_groups(model, tmp_path, server):
    two_processes("ddp", run_on_two, model, tmp_path, server.url)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["weights"] == second["weights"]
    assert all(len(rows) == 2 for seen in (first, second) for rows in seen["rows"])
    assert any(first["resumed"] + second["resumed"]) and first["resumed"] != second["resumed"]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"over_provision": 1.5}, "`over_provision` must be from 0 to 1, .*received 1.5"),
        ({"partial_rollouts": -1}, "`partial_rollouts` 0 or more; received 0.0 and -1"),
        ({"over_provision": 0.0, "partial_rollouts": 1}, "set `over_provision` above 0, such as 0.25"),
        ({"vllm_mode": "colocate"}, r"`over_provision` \(0.25\) needs .* set `use_vllm: true` and `vllm_mode: server`"),
        ({"max_staleness": 1}, r"`max_staleness` \(1\) exclude each other: set one of them to 0"),
        ({"dynamic_sampling": 2}, r"`dynamic_sampling` \(2\) exclude each other"),
        ({"partial_rollouts": 1, "vllm_importance_sampling_correction": False}, "_sampling_correction: true`"),
        ({"partial_rollouts": 1, "generation_kwargs": {"presence_penalty": 0.5}}, "has presence_penalty, which counts"),
    ],
    ids=["share", "negative", "nothing left", "in process", "ahead", "resampled", "uncorrected", "penalty"],
)
def test_what_cannot_be_is_refused(tmp_path, keys, message):
    keys = {**SERVER, **({} if "partial_rollouts" in keys and len(keys) == 1 else {"over_provision": 0.25}), **keys}
    with pytest.raises(RecipeError, match=message):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **keys)


def test_a_dataset_must_have_the_rows(model, tmp_path, server):
    """Said by `r1v-rl check`, too."""
    message = "asks for 9 prompts a generation, the dataset has 8 rows: lower it"
    with pytest.raises(RecipeError, match=message):
        make(model, tmp_path, server, per_device_train_batch_size=24)
    args = make(model, tmp_path, server, per_device_train_batch_size=16).args
    assert stages._rollout_batch(as_examples(TEXTS), args)[0].endswith("2 rollouts an epoch")
    args.over_provision, args.generation_batch_size = 0.5, 24
    with pytest.raises(RecipeError, match=message):
        stages._rollout_batch(as_examples(TEXTS), args)


def test_an_engine_that_cannot_stop_is_refused(model, tmp_path, server):
    trainer = make(model, tmp_path, server)
    trainer._engine = TransformersEngine(trainer.model, trainer._tokenizer, eos_token_ids=[2], banned_token_ids=[])
    with pytest.raises(RecipeError, match=r"needs rollout servers \(`vllm_mode: server`\).*TransformersEngine"):
        trainer.train()


# ---- the parts ------------------------------------------------------------------------------------------------------


def group(*lengths: int, partial: int = 0) -> list[Completion]:
    """Completions of these lengths, the last ones partial."""
    whole = len(lengths) - partial
    return [Completion([5] * n, [-0.5] * n, "", False, 3, i >= whole) for i, n in enumerate(lengths)]


def test_who_is_taken_and_who_is_left():
    """Four needed of seven: first who may wait no longer, then in the order of asking."""
    tail = Tail(4, 0.6, 2)
    asked = [Asked(row, None) for row in range(7)]
    for one, made in zip(asked, [(1, 1), (2, 2), (9, 1), (4, 4), (5, 5), (6, 6), ()], strict=True):
        one.completions = group(*made, partial=1 if one.row in (2,) else 0)
    asked[5].carried = 2
    enough = tail.enough(asked)
    assert not enough({0, 1, 3, 4}) and not enough({0, 1, 5}) and enough({0, 1, 3, 5}) and enough({0, 1, 2, 3, 5})
    taken, metrics = tail.take(asked, is_last=False)
    assert [one.row for one in taken] == [0, 1, 3, 5]
    assert [(one.row, one.carried) for one in tail._left] == [(2, 1), (4, 1), (6, 1)]
    assert metrics["rollout/carried"] == 3 / 7 and metrics["rollout/resumed"] == 1 / 4
    assert metrics["rollout/dropped"] == metrics["rollout/dropped_tokens"] == 0
    assert tail.fresh_rows([1, 2, 3, 4], [4, 5, 6, 7]) == [1, 2, 3, 4], "as many are left as are asked for beyond"
    tail._left.pop()
    assert tail.fresh_rows([1, 2, 3, 5], [4, 6, 7]) == [1, 2, 3, 5, 6], "row 4 is asked for already"


def test_at_the_end_and_without_partial_rollouts_nothing_is_left():
    for tail, is_last in ((Tail(1, 1.0, 0), False), (Tail(1, 1.0, 3), True)):
        asked = [Asked(0, None, group(2, 2)), Asked(1, None, group(7, 3, partial=1))]
        taken, metrics = tail.take(asked, is_last=is_last)
        assert [one.row for one in taken] == [0] and tail._left == []
        assert metrics["rollout/dropped"] == 0.5 and metrics["rollout/dropped_tokens"] == 10
        assert metrics["rollout/dropped_tokens_frac"] == 10 / 14


def test_what_is_left_comes_back_from_a_checkpoint():
    tail, again = Tail(1, 1.0, 2), Tail(1, 1.0, 2)
    asked = [Asked(4, "prompt 4", group(2, 2)), Asked(7, "prompt 7", group(7, 3, partial=1)), Asked(5, "prompt 5")]
    tail.take(asked, is_last=False)
    again.restore(tail.state(), lambda rows: [f"prompt {row}" for row in rows])
    assert again._left == tail._left and len(again._left) == 2


def test_only_what_is_missing_is_asked_for():
    begun = [[], group(6, 6), group(6, 2, 0, partial=2)]
    asked = wanted(begun)
    assert [(one.group, one.place, one.token_ids) for one in asked] == [(0, None, []), (2, 1, [5, 5]), (2, 2, [])]
    sampling = {"n": 3, "max_tokens": 10, "min_tokens": 1, "temperature": 0.7}
    assert asked[0].parameters(sampling) == sampling
    assert asked[1].parameters(sampling) == {"n": 1, "max_tokens": 8, "min_tokens": 0, "temperature": 0.7}
    assert [whole_groups(asked, answered, 3) for answered in (set(), {0}, {0, 1}, {0, 1, 2})] == [
        {1}, {0, 1}, {0, 1}, {0, 1, 2},
    ]  # fmt: skip
    more = group(4)
    assert put_back(begun, asked, [group(1, 1, 1), None, more]) == [group(1, 1, 1), begun[1], [*begun[2][:2], *more]]


def test_tokens_keep_their_logprobs_and_the_oldest_weights_count():
    before = Completion([5, 6], [-0.1, -0.2], "", True, 3, is_partial=True)
    assert Wanted(0, 1, before).continued([7], [-0.3], 4) == ([5, 6, 7], [-0.1, -0.2, -0.3], 3)
    nothing_yet = Completion([], [], "", True, 3, is_partial=True)
    assert (
        Wanted(0, 1, nothing_yet).continued([7], [-0.3], 4) == Wanted(0).continued([7], [-0.3], 4) == ([7], [-0.3], 4)
    )
