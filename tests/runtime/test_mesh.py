import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import mesh
from rlhf_jax.runtime.mesh import MeshOptions
from rlhf_jax.runtime.mesh_choice import MeshNeed


def layout(**axes):
  return mesh.make_layout(MeshOptions(**axes))


def test_what_is_left_goes_to_the_free_axis():
  assert dict(layout(fsdp=2, tensor=2).mesh.shape) == {
    'data': 2,
    'fsdp': 2,
    'expert': 1,
    'context': 1,
    'tensor': 2,
  }


def test_without_options_rows_are_sharded_over_all_devices():
  on = mesh.make_layout()
  assert on.mesh == layout(data=8).mesh and on.batch_shards == 8


def test_one_device_is_the_same_code():
  one = mesh.make_layout(devices=jax.devices()[:1])
  assert one.place(jnp.ones((3, 2))).shape == (3, 2)


def test_each_device_is_given_its_rows_only():
  on = layout(fsdp=2, tensor=2)
  placed = on.place({'tokens': np.arange(16).reshape(8, 2)})['tokens']
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
  assert placed[5].tolist() == [10, 11]
  assert on.place(placed) is placed


def test_a_length_that_does_not_divide_is_not_cut():
  on = layout(context=4)

  @jax.jit
  def constrain(x):
    return on.constrain(x, ('batch', 'length', 'hidden'))

  def spec(length):
    return constrain(jnp.ones((2, length, 4))).sharding.spec

  assert 'context' in spec(8) and 'context' not in spec(1)


@pytest.mark.parametrize(
  'axes',
  [dict(data=3), dict(data=4, fsdp=4), dict(data=-1, fsdp=-1), dict(data=0), dict(tensor=16)],
)
def test_a_mesh_that_does_not_fit_is_refused(axes):
  with pytest.raises(UserError, match='config.mesh: data'):
    layout(**axes)


def test_names_become_partitions():
  three = layout(fsdp=2, tensor=2)
  assert three.spec(('layers', 'embed', 'mlp')) == jax.P(None, ('fsdp', 'context'), 'tensor')
  rows = ('data', 'fsdp', 'expert')
  assert three.spec(('batch', 'length', 'hidden')) == jax.P(rows, 'context', None)


def test_two_axes_on_one_mesh_axis_are_refused():
  with pytest.raises(UserError, match="mesh axis .'tensor'. twice"):
    layout().spec(('heads', 'mlp'))


def test_a_dimension_that_does_not_divide_is_named():
  with pytest.raises(UserError, match='layers.query has heads = 9, which does not divide over 2'):
    layout(tensor=2).shardings(
      {'layers': {'query': ('heads',)}},
      {'layers': {'query': jax.ShapeDtypeStruct((9,), 'float32')}},
    )


def test_description_says_each_share():
  shapes = {'w': jax.ShapeDtypeStruct((1024, 256), 'float32')}
  text = layout(fsdp=8, data=1).describe_parameters({'w': ('embed', 'mlp')}, shapes)
  assert text.startswith('w ') and '0.125 MiB' in text


def test_each_device_has_its_rows_whatever_the_order_of_the_devices():
  mixed = np.asarray(jax.devices())[[5, 2, 7, 0, 3, 6, 1, 4]].reshape(2, 2, 1, 1, 2)
  on = mesh.Layout(jax.sharding.Mesh(mixed, tuple(mesh.AXES)))
  rows = np.arange(24).reshape(8, 3)
  placed = on.place(rows)
  for shard in placed.addressable_shards:
    d, f, _, _, _ = np.argwhere(mixed == shard.device)[0]
    np.testing.assert_array_equal(shard.data, rows[4 * d + 2 * f :][:2])
  np.testing.assert_array_equal(placed, rows)


def test_decoding_cuts_rows_over_context_and_heads_over_what_training_cuts_parameters_over():
  on = layout(data=1, fsdp=4, context=2)
  assert on.decoding.spec(('batch', 'length')) == jax.P(('data', 'fsdp', 'expert', 'context'), None)
  unchanged = jax.P(('fsdp', 'context'), 'tensor')
  assert on.decoding.spec(('embed', 'mlp')) == on.spec(('embed', 'mlp')) == unchanged
  on = layout(data=1, fsdp=4, tensor=2, rollout_tensor=4)
  assert dict(on.decoding.mesh.shape) == dict(data=1, fsdp=2, wide=2, expert=1, context=1, tensor=2)
  assert on.decoding.spec(('embed', 'mlp')) == jax.P(None, ('tensor', 'wide'))
  assert on.decoding.mesh.devices.ravel().tolist() == on.mesh.devices.ravel().tolist()
  message = 'rollout_tensor: expected 0 or a multiple of tensor .2. that divides'
  for wide in (3, 1, 16):  # does not divide, cuts tensor, is more than there are
    with pytest.raises(UserError, match=message):
      layout(data=1, fsdp=4, tensor=2, rollout_tensor=wide)


def test_presets():
  assert layout(preset='1b').mesh.shape['fsdp'] == 8
  assert layout(preset='1b').rollout_tensor == 1
  assert layout(preset='1b', fsdp=4).mesh.shape['fsdp'] == 4  # a size that is set wins
  with pytest.raises(UserError, match='expected auto or one of small, 1b, 8b, 70b'):
    layout(preset='2b')
  with pytest.raises(UserError, match='data -1 × fsdp 64 does not fit 8 device'):
    layout(preset='70b')


def test_the_preset_auto_asks_what_the_run_needs():
  with pytest.raises(UserError, match='preset: auto needs to know the models'):
    layout(preset='auto')
  need = MeshNeed(parameters=10, state=400, decoded=40, rows=8, width=8, heads=2)
  on = mesh.make_layout(MeshOptions(preset='auto'), need=need, capacity=200)
  assert on.mesh.shape['fsdp'] == 4 and on.mesh.shape['data'] == 2
  assert on.why.startswith('mesh: data 2 × fsdp 4 × tensor 1')


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device of a TPU of several slices."""

  id: int
  process_index: int
  slice_index: int
  platform: str = 'gpu'
  device_kind: str = 'chip'


@pytest.mark.parametrize('sizes,across', [((4, 2, 1, 1, 2), 'data'), ((1, 8, 1, 1, 2), 'fsdp')])
def test_the_first_axis_crosses_slices(sizes, across):
  chips = [Chip(i, i // 4, i // 8) for i in range(16)]
  array = mesh.arrange_devices(chips[8:] + chips[:8], dict(zip(mesh.AXES, sizes)))
  assert array.shape == sizes
  slices = np.vectorize(lambda chip: chip.slice_index)(array)
  halves = np.split(slices, 2, axis=list(mesh.AXES).index(across))
  assert [set(half.ravel().tolist()) for half in halves] == [{0}, {1}]


def test_slices_that_nothing_divides_over_are_refused():
  chips = [Chip(i, i, i // 2) for i in range(4)]
  with pytest.raises(UserError, match='data 1 or fsdp 1 must be a multiple of the 2 slices'):
    mesh.arrange_devices(chips, dict(zip(mesh.AXES, (1, 1, 1, 1, 4))))
