"""What all families share of config.json: the values that keys may have, and the keys that count
for nothing.

What is particular to a family stands in families.py. Sources: the configuration classes of
transformers 4 and 5, and the files that are published with the models of these families.
"""

from rlhf_jax.interop.known_keys import (
  Allowed,
  COUNT,
  FRACTION,
  list_of,
  NUMBER,
  one_of,
  or_null,
  POSITIVE,
  SWITCH,
  TABLE,
  TEXT,
  whole_number,
)

# The kinds of layers in `layer_types`.
LOCAL = 'sliding_attention'
GLOBAL = 'full_attention'

FIELD_VALUES: dict[str, Allowed] = {  # field of ModelConfig → the values of its key
  'vocab_size': COUNT,
  'embed': COUNT,
  'layers': COUNT,
  'heads': COUNT,
  'kv_heads': or_null(COUNT),  # null: as many as heads
  'head_dim': COUNT,
  'mlp': COUNT,
  'norm_eps': POSITIVE,
  'tied': SWITCH,
  'max_length': COUNT,
  'activation': TEXT,
  'qkv_bias': SWITCH,
  'output_bias': SWITCH,
  'mlp_bias': SWITCH,
  'attention_scalar': POSITIVE,
  'attention_cap': or_null(POSITIVE),
  'logit_cap': or_null(POSITIVE),
  'rope_layers': or_null(list_of(Allowed('0 and 1', [0, 1].__contains__))),
  'rope_local_theta': POSITIVE,
  'rope_fraction': FRACTION,
  'experts': COUNT,
  'experts_per_token': COUNT,
  'renormalise': SWITCH,
}
GENERAL_KEYS: dict[str, Allowed] = {  # of every family
  'model_type': TEXT,
  'architectures': or_null(list_of(TEXT)),
  'reward_bias': NUMBER,  # ours: what is added to the score
}
ROPE_KEYS: dict[str, Allowed] = {  # of families with rotary positions
  'rope_theta': POSITIVE,  # with rope_scaling: transformers 4
  'rope_scaling': or_null(TABLE),
  'rope_parameters': or_null(TABLE),  # transformers 5
  'original_max_position_embeddings': or_null(whole_number(2)),
}
ROPE_TABLE_KEYS: dict[str, Allowed] = {  # in the two tables of any kind
  'rope_type': TEXT,
  'type': TEXT,  # its old name
  'rope_theta': POSITIVE,
  'partial_rotary_factor': FRACTION,
}
ROPE_NUMBERS: dict[str, Allowed] = {  # of the kinds that have them, see model_config.ROPE_SCALINGS
  'factor': or_null(POSITIVE),
  'low_freq_factor': or_null(POSITIVE),
  'high_freq_factor': or_null(POSITIVE),
  'original_max_position_embeddings': or_null(whole_number(2)),
  'short_factor': or_null(list_of(POSITIVE)),
  'long_factor': or_null(list_of(POSITIVE)),
  'attention_factor': or_null(POSITIVE),
}
WINDOW_KEYS: dict[str, Allowed] = {  # of families that have them
  'sliding_window': or_null(COUNT),
  'use_sliding_window': SWITCH,
  'max_window_layers': whole_number(0),
  'sliding_window_pattern': COUNT,
  'no_rope_layer_interval': COUNT,
}
LAYER_TYPES = or_null(list_of(one_of(LOCAL, GLOBAL)))

# Key of config.json → the values that are computed here, in every family that does not read it.
GENERAL_ONLY: dict[str, tuple] = {
  'quantization_config': (None,),
  'is_causal': (True, None),
  'use_bidirectional_attention': (False, None),
  'is_encoder_decoder': (False, None),
  'add_cross_attention': (False, None),
  'tie_encoder_decoder': (False, None),
  'pruned_heads': ({}, None),
  'attention_bias': (False, None),
  'mlp_bias': (False, None),
  'partial_rotary_factor': (1.0, None),  # the whole head turns
  'rope_interleaved': (False, None),
  'use_sliding_window': (False, None),
  'use_mrope': (False, None),
}

TRAINING_KEYS = (  # dropout is never applied here
  'attention_dropout',
  'attn_pdrop',
  'classifier_dropout',
  'embd_pdrop',
  'hidden_dropout',
  'initializer_range',
  'output_router_logits',
  'pretraining_tp',
  'resid_pdrop',
  'router_aux_loss_coef',
  'router_jitter_noise',
  'tf_legacy_loss',
  'use_bfloat16',
)
GENERATION_KEYS = (  # the commands and stages have options of their own
  'assistant_confidence_threshold',
  'assistant_lookbehind',
  'bad_words_ids',
  'begin_suppress_tokens',
  'cache_implementation',
  'decoder_start_token_id',
  'diversity_penalty',
  'do_sample',
  'early_stopping',
  'encoder_no_repeat_ngram_size',
  'encoder_repetition_penalty',
  'epsilon_cutoff',
  'eta_cutoff',
  'exponential_decay_length_penalty',
  'forced_bos_token_id',
  'forced_eos_token_id',
  'length_penalty',
  'max_length',
  'max_new_tokens',
  'min_length',
  'no_repeat_ngram_size',
  'num_assistant_tokens',
  'num_assistant_tokens_schedule',
  'num_beam_groups',
  'num_beams',
  'num_return_sequences',
  'output_scores',
  'prefix',
  'remove_invalid_values',
  'repetition_penalty',
  'return_dict_in_generate',
  'suppress_tokens',
  'target_lookbehind',
  'task_specific_params',
  'temperature',
  'top_k',
  'top_p',
  'typical_p',
  'use_cache',
)
BOOKKEEPING_KEYS = (
  '_attn_implementation',
  '_attn_implementation_autoset',
  '_commit_hash',
  '_name_or_path',
  '_sliding_window_pattern',  # layer_types say it
  'attn_implementation',
  'auto_map',  # code of its own, which transformers runs only where it is told to
  'chunk_size_feed_forward',  # the same numbers in pieces
  'dtype',
  'experts_implementation',
  'finetuning_task',
  'id2label',
  'is_decoder',
  'is_llama_config',
  'label2id',
  'max_sequence_length',
  'model_max_length',
  'name_or_path',
  'num_labels',  # the shape of the score says it
  'output_attentions',
  'output_hidden_states',
  'problem_type',
  'return_dict',
  'tokenizer_class',
  'torch_dtype',
  'torchscript',
  'transformers.js_config',
  'transformers_version',
  'unsloth_fixed',
  'unsloth_version',
  'use_return_dict',
)
TOKEN_KEYS = (  # the tokenizer's files say them; `eos_token_id` is read with them
  'bos_token_id',
  'eos_token_id',
  'pad_token_id',
  'sep_token_id',
  'unk_token_id',
)
IGNORED_KEYS = frozenset((*TRAINING_KEYS, *GENERATION_KEYS, *BOOKKEEPING_KEYS, *TOKEN_KEYS))
