import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import mesh


def layout(**axes):
  return mesh.make({**mesh.DEFAULTS, **axes})


def test_what_is_left_goes_to_the_free_axis():
  assert dict(layout(fsdp=2, tensor=2).mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2, 'expert': 1}


def test_one_device_is_the_same_code():
  one = mesh.make(mesh.DEFAULTS, jax.devices()[:1])
  assert one.place(jnp.ones((3, 2))).shape == (3, 2)


@pytest.mark.parametrize('axes', [dict(data=3), dict(data=4, fsdp=4), dict(data=-1, fsdp=-1), dict(data=0), dict(tensor=16)])
def test_a_mesh_that_does_not_fit_is_refused(axes):
  with pytest.raises(UserError, match='config.mesh: data'):
    layout(**axes)


def test_names_become_partitions():
  three = layout(fsdp=2, tensor=2)
  assert three.spec(('layers', 'embed', 'mlp')) == jax.P(None, 'fsdp', 'tensor')
  assert three.spec(('batch', 'length', 'hidden')) == jax.P(('data', 'fsdp', 'expert'), None, None)


def test_two_axes_on_one_mesh_axis_are_refused():
  with pytest.raises(UserError, match="mesh axis .'tensor'. twice"):
    layout().spec(('heads', 'mlp'))


def test_a_dimension_that_does_not_divide_is_named():
  with pytest.raises(UserError, match='layers.query has heads = 9, which does not divide over 2'):
    layout(tensor=2).shardings({'layers': {'query': ('heads',)}}, {'layers': {'query': jax.ShapeDtypeStruct((9,), 'float32')}})


def test_description_says_each_share():
  text = layout(fsdp=8, data=1).describe({'w': ('embed', 'mlp')}, {'w': jax.ShapeDtypeStruct((1024, 256), 'float32')})
  assert text.startswith('w ') and '0.125 MiB' in text
