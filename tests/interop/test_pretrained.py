import dataclasses
import json
import shutil

from interop_cases import assert_same, CASES, DATA, FIXTURES, hidden_states
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rlhf_jax.errors import UserError
from rlhf_jax.interop import families, pretrained, safetensors_io
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import heads, transformer

CONFIG = transformer.ModelConfig(
  vocab_size=264, embed=16, layers=3, heads=4, kv_heads=2, head_dim=4, mlp=24
)


@pytest.fixture(scope='module')
def tokenizer():
  vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  core = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  core.add_special_tokens(['<s>', '</s>', '<pad>'])
  template = "{{ bos_token }}{{ messages[0]['content'] }}"
  return Tokenizer(core, template, bos='<s>', eos='</s>', pad='<pad>')


@pytest.fixture(scope='module')
def small_tokenizer():
  vocabulary = {'<s>': 0, '</s>': 1, '<pad>': 2, 'a': 3}
  core = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token='a'))
  core.add_special_tokens(['<s>', '</s>', '<pad>'])
  return Tokenizer(core, None, bos='<s>', eos='</s>', pad='<pad>')


def random_params(config):
  random = np.random.default_rng(0)
  shapes = jax.eval_shape(transformer.build_model(config).init, jax.random.key(0))
  return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), shapes)


def test_logits_are_those_of_transformers():
  reference = np.load(FIXTURES / 'tiny_llama.npz')
  config = pretrained.read_config(FIXTURES / 'tiny_llama')
  params = pretrained.load_parameters(FIXTURES / 'tiny_llama', config)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  hidden = hidden_states(config, params, reference['tokens'], reference['mask'])
  logits = heads.next_token_logits(transformer.build_model(config), params, hidden)
  seen = reference['mask'].astype(bool)
  np.testing.assert_allclose(logits[seen], reference['logits'][seen], atol=2e-5)


def test_scores_are_those_of_transformers():
  reference = np.load(FIXTURES / 'tiny_llama.npz')
  config = pretrained.read_config(FIXTURES / 'tiny_llama_score')
  assert config.head and config.tied
  params = pretrained.load_parameters(FIXTURES / 'tiny_llama_score', config)
  hidden = hidden_states(config, params, reference['tokens'], reference['mask'])
  scores = heads.scalar_scores(params, hidden)
  last = reference['mask'].sum(1) - 1
  np.testing.assert_allclose(scores[jnp.arange(2), last], reference['scores'], atol=2e-5)


@pytest.mark.parametrize('change', [{}, {'tied': False}, {'head': True}])
def test_export_comes_back_bit_for_bit(change, tokenizer, tmp_path):
  config = dataclasses.replace(CONFIG, **change)
  params = random_params(config)
  pretrained.export_model(tmp_path / 'out', config, params, tokenizer)
  again = pretrained.open_pretrained(tmp_path / 'out')
  assert again.config == config
  assert_same(again.load(), params)
  assert again.tokenizer.encode('Hi') == tokenizer.encode('Hi')


def test_a_reward_model_leaves_its_output_matrix_behind(tokenizer, tmp_path):
  config = dataclasses.replace(CONFIG, head=True, tied=False)
  params = random_params(config)
  pretrained.export_model(tmp_path / 'out', config, params, tokenizer)
  again = pretrained.open_pretrained(tmp_path / 'out')
  assert again.config == dataclasses.replace(config, tied=True)
  del params['unembedding']
  assert_same(again.load(), params)


def test_bfloat16_export(tokenizer, tmp_path):
  params = random_params(CONFIG)
  pretrained.export_model(tmp_path / 'out', CONFIG, params, tokenizer, dtype='bfloat16')
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
  assert_same(pretrained.load_parameters(tmp_path / 'out', CONFIG), rounded)


def test_transformers_opens_an_export(tokenizer, tmp_path):
  transformers = pytest.importorskip('transformers')
  pretrained.export_model(tmp_path / 'lm', CONFIG, random_params(CONFIG), tokenizer)
  config = transformers.AutoConfig.from_pretrained(tmp_path / 'lm')
  assert type(config).__name__ == 'LlamaConfig'
  assert config.architectures == ['LlamaForCausalLM']
  assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (16, 4, 2)
  assert (config.rope_parameters['rope_theta'], config.rms_norm_eps) == (10000.0, 1e-5)
  assert (config.tie_word_embeddings, config.max_position_embeddings) == (True, 2048)
  ends = transformers.GenerationConfig.from_pretrained(tmp_path / 'lm')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'lm')
  for ids in (config, ends, theirs):
    assert ids.bos_token_id == tokenizer.bos_id
    assert ids.eos_token_id == tokenizer.eos_id
    assert ids.pad_token_id == tokenizer.pad_id
  assert theirs.chat_template == tokenizer.template
  reward = dataclasses.replace(CONFIG, head=True)
  params = random_params(reward)
  pretrained.export_model(tmp_path / 'reward', reward, params, tokenizer)
  config = transformers.AutoConfig.from_pretrained(tmp_path / 'reward')
  assert config.architectures == ['LlamaForSequenceClassification']
  assert config.num_labels == 1
  assert config.reward_bias == float(params['score']['bias'])


@pytest.mark.parametrize('change', [{}, {'tied': False}, {'head': True}])
def test_transformers_computes_the_same_from_an_export(change, tokenizer, tmp_path):
  torch = pytest.importorskip('torch')
  import transformers

  config = dataclasses.replace(CONFIG, **change)
  params = jax.tree.map(lambda x: 0.3 * x, random_params(config))
  pretrained.export_model(tmp_path / 'out', config, params, tokenizer)
  kind = transformers.LlamaForCausalLM
  if config.head:
    kind = transformers.LlamaForSequenceClassification
  model = kind.from_pretrained(tmp_path / 'out').eval()
  tokens = np.random.default_rng(0).integers(0, 256, (2, 7))
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  hidden = hidden_states(config, params, tokens, np.ones_like(tokens))
  if config.head:
    ours = heads.scalar_scores(params, hidden)[:, -1:] - params['score']['bias']
  else:
    ours = heads.next_token_logits(transformer.build_model(config), params, hidden)
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize('case', CASES)
def test_every_family_comes_back_bit_for_bit_as_language_and_as_reward_model(
  case, small_tokenizer, tmp_path
):
  language = pretrained.read_config(DATA / case)
  for config in (language, dataclasses.replace(language, head=True, tied=True)):
    params = random_params(config)
    pretrained.export_model(tmp_path / 'out', config, params, small_tokenizer)
    again = pretrained.open_pretrained(tmp_path / 'out')
    assert again.config == config
    loaded = again.load()
    if 'norm_bias' in params and config.head:  # holds the score's bias, see below
      del loaded['norm_bias'], params['norm_bias'], loaded['score'], params['score']
    assert_same(loaded, params)


def test_the_bias_of_a_score_is_folded_into_the_last_norms(small_tokenizer, tmp_path):
  """transformers' classifiers have no bias; GPT-2's last norm has one that serves."""
  language = pretrained.read_config(DATA / 'gpt2')
  config = dataclasses.replace(language, head=True, tied=True)
  params = random_params(config)
  pretrained.export_model(tmp_path / 'out', config, params, small_tokenizer)
  assert 'reward_bias' not in json.loads((tmp_path / 'out' / 'config.json').read_text())
  again = pretrained.load_parameters(tmp_path / 'out', config)
  assert again['score']['bias'] == 0
  tokens = np.random.default_rng(0).integers(3, 64, (2, 12))
  ours, theirs = (
    heads.scalar_scores(each, hidden_states(config, each, tokens, np.ones_like(tokens)))
    for each in (params, again)
  )
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert abs(params['score']['bias']) > 0.1


@pytest.mark.parametrize('case', CASES)
def test_transformers_computes_the_same_of_every_family(case, small_tokenizer, tmp_path):
  torch = pytest.importorskip('torch')
  import transformers

  language = pretrained.read_config(DATA / case)
  tokens = np.random.default_rng(0).integers(3, 64, (2, 12))
  params = pretrained.load_parameters(DATA / case, language)
  pretrained.export_model(tmp_path / 'lm', language, params, small_tokenizer)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'lm', attn_implementation='eager'
  ).eval()
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  hidden = hidden_states(language, params, tokens, np.ones_like(tokens))
  ours = heads.next_token_logits(transformer.build_model(language), params, hidden)
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)
  if not families.FAMILIES[language.family].has_classifier:
    return
  reward = dataclasses.replace(language, head=True, tied=True)
  score = {
    'kernel': jnp.asarray(np.random.default_rng(1).normal(size=32), jnp.float32),
    'bias': jnp.float32(0.5),
  }
  pretrained.export_model(tmp_path / 'reward', reward, {**params, 'score': score}, small_tokenizer)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / 'reward', attn_implementation='eager'
  ).eval()
  assert model.num_labels == 1
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()[:, 0]
  ours = heads.scalar_scores({'score': score}, hidden)[:, -1]
  if language.norm != 'layer':  # where it is folded into the last norm
    ours = ours - 0.5
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)


def shardings_of(config, **sizes):
  """Returns shardings of a mesh that the layouts of runtime/mesh.py would not choose."""
  auto = (jax.sharding.AxisType.Auto,) * len(sizes)
  mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)
  rules = {
    'vocab': 'tensor',
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
  }
  rules = {name: axis for name, axis in rules.items() if axis in sizes}
  with_head = transformer.build_model(dataclasses.replace(config, head=True))  # one leaf more

  def place(axes):
    return jax.NamedSharding(mesh, jax.P(*map(rules.get, axes)))

  return jax.tree.map(place, with_head.axes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize('case', ['llama3', 'gpt2', 'phi3', 'mixtral'])
def test_each_device_reads_its_part_of_sharded_files(case, small_tokenizer, tmp_path, monkeypatch):
  config = pretrained.read_config(DATA / case)
  whole = pretrained.load_parameters(DATA / case, config)
  pretrained.export_model(tmp_path / 'out', config, whole, small_tokenizer, shard_bytes=20_000)
  files = sorted((tmp_path / 'out').glob('model-*.safetensors'))
  assert len(files) > 2
  assert all(path.stat().st_size < 24_000 for path in files)
  read = []

  def counted(directory):
    shapes, fetch = safetensors_io.open_weights(directory)

    def count(name, slices):
      part = fetch(name, slices)
      read.append(part.nbytes)
      return part

    return shapes, count

  monkeypatch.setattr(pretrained, 'open_weights', counted)
  again = pretrained.load_parameters(tmp_path / 'out', config, shardings_of(config, fsdp=8))
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
  small = sum(leaf.nbytes for leaf in jax.tree.leaves(again) if leaf.sharding.is_fully_replicated)
  assert sum(read) == total  # 8 devices, an eighth each; what all of them hold is read once
  assert max(read) <= max(config.vocab_size, config.mlp) * config.embed * 4 / 8
  assert small < total / 20  # biases and norms of heads
  assert_same(again, whole)


def test_parts_on_three_axes_and_back(tokenizer, tmp_path):
  params = random_params(CONFIG)
  pretrained.export_model(tmp_path / 'out', CONFIG, params, tokenizer)
  places = shardings_of(CONFIG, data=2, fsdp=2, tensor=2)
  again = pretrained.load_parameters(tmp_path / 'out', CONFIG, places)
  assert_same(again, params)
  assert again['layers']['query'].addressable_shards[0].data.shape == (3, 8, 2, 4)
  pretrained.export_model(tmp_path / 'again', CONFIG, again, tokenizer)
  first = (tmp_path / 'out/model.safetensors').read_bytes()
  assert (tmp_path / 'again/model.safetensors').read_bytes() == first


def test_a_second_output_matrix_is_a_copy_or_an_error(tmp_path):
  weights = safetensors.numpy.load_file(DATA / 'gpt2/model.safetensors')
  shutil.copytree(DATA / 'gpt2', tmp_path / 'm')
  config = pretrained.read_config(tmp_path / 'm')
  want = pretrained.load_parameters(tmp_path / 'm', config)
  # As OpenAI's file has them.
  short = {name.removeprefix('transformer.'): value for name, value in weights.items()}
  mask = {'h.0.attn.bias': np.ones((1, 1, 16, 16), np.float32)}
  copy = {**short, **mask, 'lm_head.weight': weights['transformer.wte.weight']}
  safetensors.numpy.save_file(copy, tmp_path / 'm/model.safetensors')
  assert_same(pretrained.load_parameters(tmp_path / 'm', config), want)
  copy['lm_head.weight'] = 2 * copy['lm_head.weight']
  safetensors.numpy.save_file(copy, tmp_path / 'm/model.safetensors')
  message = 'lm_head.weight is not transformer.wte.weight, expected so .*tie_word_embeddings'
  with pytest.raises(UserError, match=message):
    pretrained.load_parameters(tmp_path / 'm', config)
  message = 'missing lm_head.weight .config.json says that it is not tied'
  with pytest.raises(UserError, match=message):
    pretrained.load_parameters(DATA / 'gpt2', dataclasses.replace(config, tied=False))


def test_a_language_model_opened_for_scoring_has_no_head_yet(tokenizer, tmp_path):
  params = random_params(CONFIG)
  pretrained.export_model(tmp_path / 'out', CONFIG, params, tokenizer)
  with_head = dataclasses.replace(CONFIG, head=True)
  assert_same(pretrained.load_parameters(tmp_path / 'out', with_head), params)


def test_export_replaces_exports_and_nothing_else(tokenizer, tmp_path):
  first = random_params(CONFIG)
  second = jax.tree.map(lambda x: 2 * x, first)
  pretrained.export_model(tmp_path / 'out', CONFIG, first, tokenizer)
  pretrained.export_model(tmp_path / 'out', CONFIG, second, tokenizer)
  assert_same(pretrained.load_parameters(tmp_path / 'out', CONFIG), second)
  assert [path.name for path in tmp_path.iterdir()] == ['out']
  (tmp_path / 'out/thesis.tex').touch()
  with pytest.raises(UserError, match='out: holds other files'):
    pretrained.export_model(tmp_path / 'out', CONFIG, first, tokenizer)
  assert (tmp_path / 'out/thesis.tex').exists()


@pytest.mark.parametrize(
  'change, message',
  [
    (
      {'layers': 1},
      r'unknown model.layers.1.*; and 6 more$',
    ),
    (
      {'layers': 3},
      r'missing model.layers.2.input_layernorm.weight; .*; and 6 more$',
    ),
    (
      {'mlp': 41},
      r'model.layers.0.mlp.gate_proj.weight is \[40, 24\], expected \[41, 24\]',
    ),
  ],
)
def test_tensors_that_do_not_fit_are_listed(change, message):
  config = pretrained.read_config(FIXTURES / 'tiny_llama')
  with pytest.raises(UserError, match=message):
    pretrained.load_parameters(FIXTURES / 'tiny_llama', dataclasses.replace(config, **change))


def test_files_that_cannot_be_read_are_named(tmp_path):
  def refused(message, name=None):
    """Expects the message of opening a name, or of loading the directory m."""
    with pytest.raises(UserError, match=message) as error:
      if name is not None:
        pretrained.open_pretrained(name)
      else:
        config = pretrained.read_config(tmp_path / 'm')
        pretrained.load_parameters(tmp_path / 'm', config)
    assert '\n' not in str(error.value)

  shutil.copytree(FIXTURES / 'tiny_llama', tmp_path / 'm')
  part = tmp_path / 'm/model-00002-of-00003.safetensors'
  part.write_bytes(part.read_bytes()[:2000])
  refused('model-00002-of-00003.safetensors: damaged')
  part.unlink()
  refused('model-00002-of-00003.safetensors: not found')
  (tmp_path / 'm/model.safetensors.index.json').unlink()
  refused('m: no model.safetensors')
  (tmp_path / 'm/pytorch_model.bin').touch()
  refused('only pickled weights .*save_pretrained')
  (tmp_path / 'm/config.json').write_text('{,')
  refused('config.json: not JSON')
  (tmp_path / 'm/config.json').unlink()
  refused('config.json: not found')
  refused(
    "no/such: not found; expected 'smollm2', a .gguf file, a Hugging Face directory, or "
    'ORG/NAME on the hub',
    './no/such',
  )
  refused('a.gguf: not found', tmp_path / 'a.gguf')
  (tmp_path / 'a.gguf').write_bytes(b'GGUX' * 10)
  refused('a.gguf: not a whole GGUF file', tmp_path / 'a.gguf')


def test_gguf(tmp_path):
  """A file as llama.cpp writes it, rows of query and key in pairs."""
  gguf = pytest.importorskip('gguf')
  params = random_params(dataclasses.replace(CONFIG, tied=False))

  def paired(x):
    return x.reshape(x.shape[0] // 4, 2, 2, 16).swapaxes(1, 2).reshape(x.shape)

  writer = gguf.GGUFWriter(tmp_path / 'm.gguf', 'llama')
  writer.add_block_count(3)
  writer.add_context_length(50)
  writer.add_embedding_length(16)
  writer.add_feed_forward_length(24)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_rope_dimension_count(4)
  writer.add_rope_freq_base(20000.0)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = ['<s>', '</s>', '<pad>', *letters, 'ab', 'Ġab', 'x1', 'x2', '<m>']
  writer.add_token_list(words)
  writer.add_token_types([3] * 3 + [1] * (len(words) - 4) + [4])
  writer.add_token_merges(['a b', 'Ġ ab'])
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(1)
  writer.add_pad_token_id(1)
  writer.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}")
  ends = {
    'token_embd': params['embedding'],
    'output_norm': params['norm'],
    'output': params['unembedding'].T,
  }
  for name, value in ends.items():
    writer.add_tensor(name + '.weight', np.ascontiguousarray(value))
  for i in range(3):
    p = {name: np.asarray(leaf[i]) for name, leaf in params['layers'].items()}
    for name, value in {
      'attn_norm': p['attention_norm'],
      'ffn_norm': p['mlp_norm'],
      'ffn_gate': p['gate'].T,
      'ffn_up': p['up'].T,
      'ffn_down': p['down'].T,
      'attn_q': paired(p['query'].reshape(16, 16).T),
      'attn_k': paired(p['key'].reshape(16, 8).T),
      'attn_v': p['value'].reshape(16, 8).T,
      'attn_output': p['output'].reshape(16, 16).T,
    }.items():
      writer.add_tensor(f'blk.{i}.{name}.weight', np.ascontiguousarray(value))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  config, again, tokenizer = pretrained.load_gguf_parameters(tmp_path / 'm.gguf')
  assert config == dataclasses.replace(CONFIG, tied=False, rope_theta=20000.0, max_length=50)
  assert_same(again, params)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
  word = {word: i for i, word in enumerate(words)}
  assert tokenizer.encode('ab ab12') == [word['ab'], word['Ġab'], word['1'], word['2']]
  second = jax.sharding.SingleDeviceSharding(jax.devices()[1])
  places = jax.tree.map(lambda _: second, params)
  assert_same(pretrained.load_gguf_parameters(tmp_path / 'm.gguf', places)[1], params)


def test_smollm2_golden_numbers(smollm2):
  """Recorded from transformers with bfloat16 weights, float32 arithmetic."""
  params = smollm2.load()
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
  prompt = smollm2.tokenizer.prompt([{'role': 'user', 'content': 'What is the capital of France?'}])
  tokens = np.zeros((1, len(prompt) + 8), np.int32)
  tokens[0, : len(prompt)] = prompt
  model = transformer.build_model(smollm2.config)

  @jax.jit
  def logprobs(params, tokens, count):
    mask = jnp.arange(tokens.shape[1])[None] < count
    hidden = hidden_states(smollm2.config, params, tokens, mask)
    return jax.nn.log_softmax(heads.next_token_logits(model, params, hidden))[0]

  output = []
  for count in range(len(prompt), len(prompt) + 8):
    values = np.asarray(logprobs(params, tokens, count))
    if not output:
      first = values
    output.append(int(values[count - 1].argmax()))
    tokens[0, count] = output[-1]
  assert output == [504, 3575, 282, 4649, 314, 7042, 30, 2]
  assert smollm2.tokenizer.decode(output) == 'The capital of France is Paris.'
  last = first[len(prompt) - 1]
  assert np.argsort(-last)[:5].tolist() == [504, 60, 15319, 2219, 7026]
  np.testing.assert_allclose(
    np.sort(last)[:-6:-1], [-1.86429, -1.96259, -2.28135, -2.80408, -2.90044], atol=2e-3
  )
  np.testing.assert_allclose(
    first[np.arange(8), prompt[1:9]],
    [-7.79043, -1.03960, -4.18321, -0.71957, -1.69808, -3.19211, -1.83266, -0.17645],
    atol=2e-3,
  )


def copy_of_llama(folder):
  """Copies a directory with one file of weights, and returns the copy and the tensors."""
  shutil.copytree(DATA / 'llama', folder)
  return folder, safetensors.numpy.load_file(folder / 'model.safetensors')


def write(folder, tensors, name='model.safetensors'):
  safetensors.numpy.save_file(tensors, folder / name, metadata={'format': 'pt'})


def refused(folder, message):
  with pytest.raises(UserError, match=message):
    pretrained.load_parameters(folder, pretrained.read_config(folder))


def test_two_sets_of_weights_are_refused(tmp_path):
  folder, tensors = copy_of_llama(tmp_path / 'm')
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': dict.fromkeys(tensors, 'model.safetensors')}))
  pretrained.load_parameters(folder, pretrained.read_config(folder))  # one set with an index
  write(folder, tensors, 'part.safetensors')
  index.write_text(json.dumps({'weight_map': dict.fromkeys(tensors, 'part.safetensors')}))
  refused(folder, 'two sets of weights, model.safetensors and the files that model.safetensors.ind')


def test_index_and_files_must_agree(tmp_path):
  folder, tensors = copy_of_llama(tmp_path / 'm')
  (folder / 'model.safetensors').unlink()
  index = folder / 'model.safetensors.index.json'
  weight_map = dict.fromkeys(tensors, 'a.safetensors')
  weight_map['model.norm.weight'] = 'b.safetensors'
  index.write_text(json.dumps({'weight_map': weight_map}))
  write(folder, tensors, 'a.safetensors')
  write(folder, {'model.norm.weight': tensors['model.norm.weight']}, 'b.safetensors')
  refused(folder, 'model.norm.weight is in a.safetensors and in b.safetensors too')
  write(folder, {'other': tensors['model.norm.weight']}, 'b.safetensors')
  refused(folder, 'model.norm.weight is not in b.safetensors, where the index has it')
  index.write_text(json.dumps({'weight_map': {'a': '../a.safetensors'}}))
  refused(folder, 'expected a weight_map of tensors and the files beside it')


@pytest.mark.parametrize(
  'value, message',
  [
    (np.nan, r'model.norm.weight has numbers that are not finite .NaN or infinity.'),
    (-np.inf, 'model.norm.weight has numbers that are not finite'),
    (np.int8(3), 'model.norm.weight is of I8, expected one of F64, F32, F16, BF16'),
  ],
)
def test_weights_that_are_no_numbers_are_refused(value, message, tmp_path):
  folder, tensors = copy_of_llama(tmp_path / 'm')
  norm = tensors['model.norm.weight'].astype(np.float32)
  norm[5] = value
  tensors['model.norm.weight'] = norm if isinstance(value, float) else norm.astype(np.int8)
  write(folder, tensors)
  refused(folder, message)


@pytest.mark.parametrize('row', [0, 33, 63])
def test_a_second_output_matrix_that_differs_in_any_row_is_refused(row, tmp_path):
  shutil.copytree(DATA / 'llama3', tmp_path / 'm')
  tensors = safetensors.numpy.load_file(tmp_path / 'm' / 'model.safetensors')
  matrix = tensors['model.embed_tokens.weight'].copy()
  tensors['lm_head.weight'] = matrix
  write(tmp_path / 'm', tensors)
  pretrained.load_parameters(tmp_path / 'm', pretrained.read_config(tmp_path / 'm'))
  matrix[row, 7] += 1
  write(tmp_path / 'm', tensors)
  refused(tmp_path / 'm', 'lm_head.weight is not model.embed_tokens.weight')


def test_what_the_system_refuses_to_write_is_its_error(tmp_path):
  tensors = {'a': np.zeros(2, np.float32)}
  with pytest.raises(FileNotFoundError):  # the library has one error for all
    safetensors_io.write_tensors(tmp_path / 'none/model.safetensors', tensors, None)
