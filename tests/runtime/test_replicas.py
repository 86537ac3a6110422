import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import replicas


def test_copies_that_differ_are_named():
  mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  sharded = NamedSharding(mesh, PartitionSpec('tensor'))
  everywhere = NamedSharding(mesh, PartitionSpec())
  whole = NamedSharding(mesh, PartitionSpec('data', 'tensor'))
  arrays = {
    'key': jax.device_put(jax.random.key(0), everywhere),
    'step': jax.device_put(jnp.int32(3), everywhere),
    'half': jax.device_put(jnp.ones((8, 3), jnp.bfloat16), sharded),
    'no_copies': jax.device_put(jnp.ones((2, 4)), whole),
  }
  replicas.check_replicas(arrays, 'run')
  pieces = []
  for number, device in enumerate(sharded.addressable_devices_indices_map((8, 3))):
    values = np.ones((2, 3), np.float32)
    values[1, 2] += 1e-6 * (number == 5)  # one bit or two of one copy
    pieces.append(jax.device_put(values, device))
  arrays['wrong'] = jax.make_array_from_single_device_arrays((8, 3), sharded, pieces)
  with pytest.raises(UserError, match='run: wrong differs between device 1 of .* and device 5 of'):
    replicas.check_replicas(arrays, 'run')
