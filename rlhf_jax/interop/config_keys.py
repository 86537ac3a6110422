"""Keys of config.json that are common to all families.

The tables list the values that each key may have, and the keys that are ignored
because they do not change what a model computes. The keys of a single family are
in families.py. Sources: the configuration classes of transformers 4 and 5, and
the files that are published with the models of these families.
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

FIELD_VALUES: dict[str, Allowed] = {  # field of ModelConfig → the values that its key may have
  'vocab_size': COUNT,
  'embed': COUNT,
  'layers': whole_number(1, 10_000),  # lists are made of them
  'heads': COUNT,
  'kv_heads': or_null(COUNT),  # null: the number of heads
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
GENERAL_KEYS: dict[str, Allowed] = {  # keys of every family
  'model_type': TEXT,
  'architectures': or_null(list_of(TEXT)),
  'reward_bias': NUMBER,  # a key of our own: the number that is added to the score
}
ROPE_KEYS: dict[str, Allowed] = {  # keys of families with rotary positions
  'rope_theta': POSITIVE,  # transformers 4, together with rope_scaling
  'rope_scaling': or_null(TABLE),
  'rope_parameters': or_null(TABLE),  # transformers 5
  'original_max_position_embeddings': or_null(whole_number(2)),
}
ROPE_TABLE_KEYS: dict[str, Allowed] = {  # keys in rope_scaling and rope_parameters, of any type
  'rope_type': TEXT,
  'type': TEXT,  # the old name of rope_type
  'rope_theta': POSITIVE,
  'partial_rotary_factor': FRACTION,
}
# Further keys of those tables; model_config.ROPE_SCALINGS lists which types have which of them.
ROPE_NUMBERS: dict[str, Allowed] = {
  'factor': or_null(POSITIVE),
  'low_freq_factor': or_null(POSITIVE),
  'high_freq_factor': or_null(POSITIVE),
  'original_max_position_embeddings': or_null(whole_number(2)),
  'short_factor': or_null(list_of(POSITIVE)),
  'long_factor': or_null(list_of(POSITIVE)),
  'attention_factor': or_null(POSITIVE),
}
WINDOW_KEYS: dict[str, Allowed] = {  # keys of the families that have them among their defaults
  'sliding_window': or_null(COUNT),
  'use_sliding_window': SWITCH,
  'max_window_layers': whole_number(0),
  'sliding_window_pattern': COUNT,
  'no_rope_layer_interval': COUNT,
}
LAYER_TYPES = or_null(list_of(one_of(LOCAL, GLOBAL)))

# Key of config.json → the values that our decoder implements. They apply to every
# family that does not read the key; any other value is refused.
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
  'partial_rotary_factor': (1.0, None),  # rotary positions rotate the whole head
  'rope_interleaved': (False, None),
  'use_sliding_window': (False, None),
  'use_mrope': (False, None),
}

TRAINING_KEYS = (  # ignored: dropout is never applied here
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
GENERATION_KEYS = (  # ignored: the commands and stages have sampling options of their own
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
BOOKKEEPING_KEYS = (  # ignored: they do not change what a model computes
  '_attn_implementation',
  '_attn_implementation_autoset',
  '_commit_hash',
  '_name_or_path',
  '_sliding_window_pattern',  # layer_types has the same information
  'attn_implementation',
  'auto_map',  # the model's own code, which transformers runs only with trust_remote_code
  'chunk_size_feed_forward',  # computes the same numbers in chunks
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
  'num_labels',  # known from the shape of the score
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
TOKEN_KEYS = (  # ignored here: tokenizer.py reads special tokens, with `eos_token_id`
  'bos_token_id',
  'eos_token_id',
  'pad_token_id',
  'sep_token_id',
  'unk_token_id',
)
IGNORED_KEYS = frozenset((*TRAINING_KEYS, *GENERATION_KEYS, *BOOKKEEPING_KEYS, *TOKEN_KEYS))
