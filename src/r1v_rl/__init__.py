"""RL post-training for vision-language reasoners: multimodal GRPO with rule-based rewards, and the recipes that feed it."""

from r1v_rl.runtime import prepare as _prepare

_prepare()
