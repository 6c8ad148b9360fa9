"""The supervised trainer: `trl.SFTTrainer` on packed rows of pictures and text, any parts trainable, exact resume."""

from collections.abc import Sequence
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from r1v_rl.data.chat import load_processor
from r1v_rl.data.dataset import as_examples
from r1v_rl.errors import RecipeError, UserError
from r1v_rl.models.blank_picture import BlankPicture
from r1v_rl.models.families import token_positions, vision_inputs
from r1v_rl.models.logprobs import Scored, add_logprob_head, check_head
from r1v_rl.models.packing import enable_packing
from r1v_rl.models.parts import freeze_all_but
from r1v_rl.models.vision_features import VisionFeatures
from r1v_rl.sft.collation import Collator, RowDataset
from r1v_rl.sft.config import SFTConfig
from r1v_rl.sft.packing import RowBatches, RowLoader, pack, shuffled
from r1v_rl.sft.rows import TargetRows
from r1v_rl.tracking.callbacks import drop_default_console, tracking_callbacks
from r1v_rl.training.engines import check_devices, prepare_engine, shards_weights
from r1v_rl.training.launch import DEFAULT_TRAINABLE, load_model
from r1v_rl.training.optimizer import parameter_groups
from r1v_rl.training.other_ranks import ACCUMULATION, PER_DEVICE, RANKS, Rows
from r1v_rl.training.resume import KEYS_OF_AN_UPDATE, ExactResume
from r1v_rl.training.signals import StopOnSignal

_NO_ROWS = Dataset.from_dict({"row": [0]})


class SFTTrainer(ExactResume, trl.SFTTrainer):
    """Supervised fine-tuning of a vision-language model, with TRL's constructor, keys and metric names.

    Rows are read from any dataset with a target text; the loss is on that text alone. Where TRL pads, this trainer can
    pack: pictures and text of many samples in one sequence, none of which sees another.

    Args:
        model: A vision-language model, or the folder or hub id of one.
        args: The recipe.
        train_dataset: `datasets.Dataset` (columns as in the README), a list of rows, or a list of `Example`.
        eval_dataset: Likewise; its loss is `eval_loss`.
        processing_class: The processor; that of `model` where unset.
        callbacks: As in `transformers.Trainer`.
        optimizers: As in `transformers.Trainer`.
        peft_config: Train a LoRA adapter of this configuration instead of whole parts.
    """

    args: SFTConfig
    must_agree = (
        *KEYS_OF_AN_UPDATE,
        "packing", "padding_free", "max_length", "filter_overlong_rows", "loss_weighting", "train_sampling_strategy",
        "dataloader_drop_last", "average_tokens_across_devices",
    )  # fmt: skip

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig,
        train_dataset: Dataset | Sequence,
        eval_dataset: Dataset | Sequence | None = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
    ):
        check_devices(args)
        policy = load_model(model, args.model_init_kwargs) if isinstance(model, str) else model
        args.model_init_kwargs = None  # used up
        processor = processing_class or load_processor(policy.name_or_path)
        if peft_config is not None and args.trainable is not None:
            raise RecipeError(
                "`trainable` and a LoRA adapter exclude each other: name the parts that train in full in "
                "`lora_modules_to_save`, which is saved with the adapter"
            )
        if args.eval_strategy != "no" and eval_dataset is None:
            raise RecipeError(f"`eval_strategy: {args.eval_strategy}` needs held-out rows: set `eval_dataset_name`")
        freeze_all_but(policy, list(args.trainable or DEFAULT_TRAINABLE))
        self._flat = args.packing or args.padding_free
        if self._flat:
            enable_packing(policy)
        add_logprob_head(policy, temperature=1.0, float32_head=False, logprobs_only=True, top1=True)
        self._features = _kept_features(policy, args)
        self._stop = StopOnSignal()
        if peft_config is not None:
            check_head(policy, peft_config)
            set_seed(args.seed)  # every process starts with the same adapter
        packing, padding_free = args.packing, args.padding_free
        args.packing = args.padding_free = False  # TRL's own, which is for text
        super().__init__(
            model=policy,
            args=args,
            data_collator=lambda rows: rows,
            train_dataset=_NO_ROWS,  # the rows follow; TRL has nothing to prepare
            eval_dataset=None if eval_dataset is None else _NO_ROWS,
            processing_class=processor,
            callbacks=[*tracking_callbacks(args), self._stop, *(callbacks or [])],
            optimizers=optimizers,
            peft_config=peft_config,
        )
        args.packing, args.padding_free = packing, padding_free
        drop_default_console(self)
        prepare_engine(self)
        needs_blank = BlankPicture.is_needed(self.model, shards=shards_weights(self.accelerator))
        self._blank = BlankPicture(processor, self.accelerator.device, self._features) if needs_blank else None
        self.model_accepts_loss_kwargs = True  # the loss does its own scaling
        self._train_rows = self._read(train_dataset)
        self.train_dataset = self._plan(self._train_rows)
        if eval_dataset is not None:
            self._eval_rows = self._read(eval_dataset)
            self.eval_dataset = self._plan(self._eval_rows)

    # ---- rows -----------------------------------------------------------------------------------------------------

    def _read(self, dataset: Dataset | Sequence) -> TargetRows:
        assert not isinstance(self.args.chat_template_kwargs, str)
        return TargetRows(
            as_examples(dataset),
            self.processing_class,
            max_length=self.args.max_length,
            filter_overlong=self.args.filter_overlong_rows,
            template_kwargs=self.args.chat_template_kwargs,
        )

    def _plan(self, rows: TargetRows) -> RowDataset:
        """Which samples share a row: as many as fit where rows are packed, else one."""
        if not self.args.packing:
            order = shuffled(len(rows), self._data_seed) if self.args.shuffle_dataset else range(len(rows))
            return RowDataset([[sample] for sample in order])
        in_order = self.args.train_sampling_strategy == "sequential" and not self.args.shuffle_dataset
        order = range(len(rows)) if in_order else shuffled(len(rows), self._data_seed)
        return RowDataset(pack(rows.lengths, order, self.args.max_length))

    @property
    def _data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    def get_train_dataloader(self) -> DataLoader:
        """This process's share of the rows; which they are follows from seed and epoch alone."""
        args = self.args
        shuffle = args.train_sampling_strategy == "random"
        return self._loader(
            self._train_rows, self.train_dataset, args.train_batch_size, shuffle, args.dataloader_drop_last
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The held-out rows, in order."""
        if eval_dataset is None or eval_dataset is self.eval_dataset:
            return self._loader(self._eval_rows, self.eval_dataset, self.args.eval_batch_size, False, False)
        rows = self._read(eval_dataset)
        return self._loader(rows, self._plan(rows), self.args.eval_batch_size, False, False)

    def _loader(self, rows: TargetRows, planned: Any, batch_size: int, shuffle: bool, drop_last: bool) -> DataLoader:
        args = self.args
        batches = RowBatches(
            len(planned),
            batch_size,
            shuffle=shuffle,
            seed=self._data_seed,
            drop_last=drop_last,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        collator = Collator(
            rows,
            flat=self._flat,
            pad_token_id=self._tokenizer.pad_token_id,
            loss_weighting=args.loss_weighting,
            with_pixels=self._features is None or rows is not self._train_rows,
        )
        workers = args.dataloader_num_workers
        return RowLoader(
            planned,
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            generator=torch.Generator(),  # leaves the global one alone
        )

    def data_hash(self) -> str:
        return self._train_rows.data_hash()

    def rows_on_any_ranks(self) -> Rows:
        rows: dict[str, tuple[str, ...]] = {}
        if self.args.dataloader_drop_last:
            rows["the rows of a micro-step (`dataloader_drop_last` leaves out what fills none)"] = (PER_DEVICE, RANKS)
        if not self.args.average_tokens_across_devices:
            rows["the rows of a rank (each has its own mean: `average_tokens_across_devices: false`)"] = (
                PER_DEVICE, ACCUMULATION,
            )  # fmt: skip
        return {**super().rows_on_any_ranks(), **rows}

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """The weighted mean of the targets' negative log-likelihood, over all rows of the step on every process."""
        mode = "train" if self.model.training else "eval"
        scored = Scored(inputs["positions"], inputs["targets"], inputs.get("image_rows"))
        taken = self._model_inputs(inputs)
        if self._blank is not None:
            self._blank.add_to(taken, scored)
        scores = model(scored=scored, **taken)
        losses = -scores.logprobs
        if self.args.loss_type == "dft":
            losses = losses * scores.logprobs.exp().detach()
        total = inputs["weights"].sum() if num_items_in_batch is None else num_items_in_batch
        loss = (losses * inputs["weights"]).sum() / total
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # what DDP averages away
        self._add_metrics(mode, inputs, scores)
        return (loss, scores) if return_outputs else loss

    def _model_inputs(self, inputs: dict) -> dict[str, Any]:
        """`input_ids`, what says who sees whom, and the pictures as pixels or as kept features."""
        taken = {"input_ids": inputs["input_ids"], **vision_inputs(inputs), **self._places(inputs)}
        if "images" in inputs and "pixel_values" not in inputs:
            assert self._features is not None
            rows = self._train_rows
            taken["pixel_values"] = self._features.of_named(
                inputs["images"],
                lambda images: rows.vision_inputs(images)["pixel_values"],
                rows.num_tiles,
                self.accelerator.device,
            )
        return taken

    def _places(self, inputs: dict) -> dict[str, Any]:
        """Who sees whom, and the tokens' positions where the model does not count 0, 1, 2, ..."""
        device, grid = self.accelerator.device, inputs.get("image_grid_thw")
        if grid is not None and inputs["image_rows"] is not None:
            grid = grid[inputs["image_rows"]]
        if "layout" in inputs:
            (ids,), segments = inputs["input_ids"].tolist(), inputs["layout"].segments
            own = token_positions(self.model, [ids[segment.start : segment.end] for segment in segments], grid)
            return inputs["layout"].forward_kwargs(device, dict(enumerate(own or [])))
        mask = inputs["attention_mask"]
        rows = zip(inputs["input_ids"], mask.sum(1).tolist(), strict=True)
        places = {"attention_mask": mask}
        if own := token_positions(self.model, [ids[:length].tolist() for ids, length in rows], grid):
            positions = pad_sequence([positions.T for positions in own], batch_first=True)  # (B, T, 3)
            places["position_ids"] = positions.permute(2, 0, 1).to(device)
        return places

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """The sum of the target tokens' weights over the step's micro-batches, of every process."""
        total = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total

    def _add_metrics(self, mode: str, inputs: dict, scores: Any) -> None:
        """TRL's metrics, and how full the rows are."""
        sums = [scores.entropies.detach().sum(), scores.is_top1.sum(), inputs["targets"].numel()]
        sums += [inputs["num_tokens"], inputs["input_ids"].numel(), inputs["num_samples"]]
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.accelerator.device) for v in sums])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, reduction="sum")
        entropy, correct, targets, tokens, slots, samples = values.tolist()
        metrics = self._metrics[mode]
        metrics["entropy"].append(entropy / targets)
        metrics["mean_token_accuracy"].append(correct / targets)
        metrics["packing/padding_share"].append(1 - tokens / slots)
        metrics["packing/samples_per_batch"].append(samples / self.accelerator.num_processes)
        if mode == "train":
            self._total_train_tokens += int(tokens)
        metrics["num_tokens"] = [self._total_train_tokens]

    # ---- what the libraries ask for ---------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args, decayed=set(self.get_decay_parameter_names(model)))
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """`eval_loss` and TRL's other metrics of held-out rows."""
        if eval_dataset is None and self.eval_dataset is None:
            raise UserError("there are no held-out rows to evaluate: set `eval_dataset_name`")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _exact_state(self) -> dict:
        return {**super()._exact_state(), "num_tokens": self._total_train_tokens}

    def _restore(self, state: dict) -> None:
        super()._restore(state)
        self._total_train_tokens = state["num_tokens"]

    def floating_point_ops(self, inputs: dict) -> int:
        return 0  # transformers' estimate knows nothing of pictures and frozen parts

    def _send_telemetry(self) -> None:
        """TRL's report to its makers is not sent."""


def _kept_features(model: PreTrainedModel, args: SFTConfig) -> VisionFeatures | None:
    """The features cache that the recipe asks for.

    Raises:
        RecipeError: If there cannot be one.
    """
    if args.vision_features != "cache":
        return None
    reason = VisionFeatures.why_not(model)
    if reason is None and args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        reason = "ZeRO-3 gathers weights inside of the model's own forward only"
    if reason is not None:
        raise RecipeError(f"`vision_features: cache` cannot be: {reason}. Set `vision_features: recompute`.")
    return VisionFeatures(model, cache_bytes=args.vision_cache_memory_bytes)
