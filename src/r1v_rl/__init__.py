"""RL post-training for vision-language reasoners: multimodal GRPO with rule-based rewards, and what feeds it."""

from r1v_rl.runtime import prepare as _prepare

_prepare()
