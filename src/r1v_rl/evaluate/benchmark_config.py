"""The recipe keys of benchmarks: which ones, where they are, how they are asked, judged, resumed and compared."""

from dataclasses import dataclass, field
from pathlib import Path

from r1v_rl.config import nearest_key
from r1v_rl.errors import RecipeError
from r1v_rl.evaluate.benchmarks import BENCHMARKS
from r1v_rl.evaluate.prompts import DIRECT, Instructions
from r1v_rl.evaluate.published import PUBLISHED
from r1v_rl.recipe_values import convert
from r1v_rl.scoring.chat_model import ChatModel
from r1v_rl.scoring.config import JudgeEndpointConfig


@dataclass
class BenchmarkConfig(JudgeEndpointConfig):
    """Keys of `r1v-rl evaluate` for benchmarks."""

    benchmarks: list[str] | None = field(
        default=None, metadata={"help": f"Instead of held-out rows, any of: {', '.join(BENCHMARKS)}."}
    )
    benchmark_root: str | None = field(
        default=None, metadata={"help": "Folder with a folder for each benchmark; unset = each from its hub id."}
    )
    benchmark_paths: dict | str | None = field(
        default=None, metadata={"help": "Folder, file or hub id of single ones, such as {mmmu: /data/MMMU}."}
    )
    benchmark_size: int | None = field(default=None, metadata={"help": "The first so many rows of each; unset = all."})
    cot: bool = field(default=True, metadata={"help": "Ask for a chain of thought; false = for the answer alone."})
    choice_instruction: str | None = field(
        default=None, metadata={"help": "Text after a question with options; unset = ours, see docs/evaluate.md."}
    )
    open_instruction: str | None = field(
        default=None, metadata={"help": "Text after any other question; unset = ours, see docs/evaluate.md."}
    )
    greedy: bool = field(
        default=False, metadata={"help": "One answer a question, the most likely tokens, no penalty of repetition."}
    )
    resume: bool | None = field(
        default=None,
        metadata={
            "help": "Go on with the answers of an unfinished run: unset = where recipe and model are the same, true = "
            "or stop with an error, false = begin anew."
        },
    )
    compare: list[str] | None = field(
        default=None,
        metadata={"help": "Beside our numbers: r1v (the paper's), or folders of other runs, tested item by item."},
    )
    answer_judge: str = field(
        default="rules",
        metadata={
            "help": "Who judges answers: the rules alone, or the judge too where they cannot read one.",
            "choices": ["rules", "llm"],
        },
    )

    def check_benchmarks(self) -> None:
        """Raises RecipeError where a benchmark, a comparison or the judge is not as it must be."""
        for key in ("benchmark_paths", "judge_kwargs"):
            if isinstance(value := getattr(self, key), str):
                setattr(self, key, convert(value, dict))
        for name in [*(self.benchmarks or ()), *(self.benchmark_paths or {})]:
            if name not in BENCHMARKS:
                raise RecipeError(
                    f"`benchmarks` must be of {', '.join(BENCHMARKS)}; received {name!r}."
                    f"{nearest_key(name, BENCHMARKS)}"
                )
        for name in self.compare or ():
            if name not in PUBLISHED and not Path(name).is_dir():
                raise RecipeError(f"`compare` must be {', '.join(PUBLISHED)} or the folder of a run, received {name!r}")
        if self.answer_judge == "llm" and self.judge_model is None:
            raise RecipeError(
                "`answer_judge: llm` needs `judge_model` (and `judge_base_url`, where it is not OpenAI's)"
            )

    def instructions(self) -> Instructions:
        """What questions end with."""
        ours = Instructions() if self.cot else DIRECT
        choice = ours.choice if self.choice_instruction is None else self.choice_instruction
        return Instructions(choice, ours.open if self.open_instruction is None else self.open_instruction)

    def judge(self) -> ChatModel | None:
        """The judge of what the rules cannot read, where the recipe wants one."""
        if self.answer_judge != "llm":
            return None
        assert not isinstance(self.judge_kwargs, str)
        parameters = {"temperature": 0.0} if self.judge_kwargs is None else self.judge_kwargs
        return ChatModel(str(self.judge_model), self.judge_base_url, self.judge_api_key_env, parameters=parameters)
