"""The stages by kind. Each module has DEFAULTS, its section of a config, and run(context)."""

from rlhf_jax.stages import (
    critique, feedback, online_preference, policy_gradient, ppo, preference, pretrain, reward, sft)

STAGES = {'pretrain': pretrain, 'sft': sft, 'critique': critique, 'feedback': feedback, 'reward': reward,
          'preference': preference, 'online_preference': online_preference, 'ppo': ppo, 'policy_gradient': policy_gradient}
