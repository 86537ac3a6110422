"""What a compiled program says, beside what it was written to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.planning import hlo

P = jax.sharding.PartitionSpec


def test_products_and_collectives_of_loops_count_as_often_as_they_run():
  """Five layers, each cut over eight devices along its inputs: five gathers, or one sum each, and a loop that may end early."""
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ('x',))
  lay = lambda *names: jax.NamedSharding(mesh, P(*names))

  def run(x, layers):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(w, lay(None, None))
      return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), lay('x', None)), None
    x, _ = jax.lax.scan(layer, x, layers)
    more = lambda state: (state[0] < 7) & (state[1].sum() > 0)
    return jax.lax.while_loop(more, lambda state: (state[0] + 1, jnp.tanh(state[1] @ layers[0])), (0, x))[1]

  shapes = (jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=lay('x', None)),
            jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=lay(None, 'x', None)))
  said = hlo.read_program(jax.jit(run).lower(*shapes).compile().as_text(), [0, 0, 0, 0, 1, 1, 1, 1])
  assert said.flops == (5 + 7) * 2 * 2 * 64 * 64  # two rows on a device
  gathers = [one for one in said.collectives if one.kind == 'all-gather']
  assert {one.group for one in gathers} == {8} and all(one.across for one in said.collectives)
  assert sum(one.sent for one in gathers) == pytest.approx((5 + 1) * 64 * 64 * 4 * 7 / 8)
  assert sum(one.times for one in gathers) == 6


TPU = '''HloModule jit_step

%all-reduce-scatter.1 (input.1: bf16[64,32]) -> bf16[16,32] {
  %input.1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %slice.1 = bf16[16,32]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={16,32}
}

%begin (param_0: bf16[4,64]) -> bf16[16,64] {
  %param_0 = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=7, replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, dimensions={0}, use_global_device_ids=true
  ROOT %custom-call.1 = bf16[16,64]{1,0:T(8,128)(2,1)} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%end (param_0.1: bf16[4,64]) -> bf16[16,64] {
  %param_0.1 = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=7, replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, dimensions={0}, use_global_device_ids=true
}

%body (p: (s32[], bf16[4,64])) -> (s32[], bf16[4,64]) {
  %p = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,64]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %row = bf16[4,64,1]{1,0,2:T(8,128)(2,1)} bitcast(%x)
  %w = bf16[8,32,64]{2,1,0:T(8,128)(2,1)} constant({...})
  %heads = bf16[4,8,32]{2,0,1:T(8,128)(2,1)} convolution(%row, %w), window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_0oi->b0f
  %q = bf16[2,8,4,16,64]{4,3,2,1,0:T(8,128)(2,1)} constant({...})
  %k = bf16[2,16,8,64,1]{4,3,2,1,0:T(8,128)(2,1)} constant({...})
  %logits = f32[2,8,4,16,16]{4,3,2,1,0:T(8,128)} convolution(%q, %k), window={size=2x8x1 stride=1x7x1 lhs_dilate=2x8x1}, dim_labels=012bf_0o1i2->012bf
  %gathered = bf16[16,64]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%begin
  %whole = bf16[16,64]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%end
  %two = u32[]{:T(128)} constant(2)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p), index=0
  %next = u32[]{:T(128)S(6)} add(%i.1, %two)
  ROOT %out = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)}) tuple(%next, %x)
}

%condition (p.1: (s32[], bf16[4,64])) -> pred[] {
  %limit = u32[]{:T(128)} constant(12)
  %p.1 = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[4,64], g: bf16[64,32]) -> bf16[16,32] {
  %a = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(1)
  %t = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)}) tuple(%a)
  %sent = (bf16[4,64]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%a, %t), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %loop = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)}) while(%t), condition=%condition, body=%body
  ROOT %reduced = bf16[16,32]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
'''


def test_how_a_tpu_writes_it():
  """Heads and batches as windows, loops without a count, in steps of two, one gather in two fusions, a reduce-scatter as a fusion, a send
  between slices."""
  said = hlo.read_program(TPU, [0, 0, 0, 0, 1, 1, 1, 1])
  heads = 2 * 4 * 8 * 32 * 64
  windows = said.flops / 6 - heads
  assert windows == 2 * (2 * 8 * 4) * 16 * 16 * 64  # each head with its own key only
  assert sorted((one.kind, one.group, one.across, one.times, one.sent) for one in said.collectives) == [
      ('all-gather', 4, True, 6, 6 * 16 * 64 * 2 * 3 / 4), ('reduce-scatter', 4, False, 1, 64 * 32 * 2 * 3 / 4),
      ('send', 2, True, 1, 4 * 64 * 2)]


@pytest.mark.parametrize('text, groups', [
    ('replica_groups={{0,2},{1,3}}, x', [[0, 2], [1, 3]]),
    ('replica_groups=[2,2]<=[4], x', [[0, 1], [2, 3]]),
    ('replica_groups=[2,2]<=[2,2]T(1,0), x', [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
    ('source_target_pairs={{0,1},{1,0},{2,2}}, x', [[0, 1], [1, 0]]),
    ('replica_groups={}, x', [[0, 1, 2, 3]])])
def test_groups(text, groups):
  assert sorted(map(sorted, hlo._parse_groups(text, 4))) == sorted(map(sorted, groups))


def test_cublas_products():
  text = '''HloModule m

ENTRY %main (a: bf16[3,8,16], b: bf16[3,16,4]) -> bf16[3,8,4] {
  %a = bf16[3,8,16]{2,1,0} parameter(0)
  %b = bf16[3,16,4]{2,1,0} parameter(1)
  ROOT %gemm = (bf16[3,8,4]{2,1,0}, s8[4]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"]}}}
}
'''
  assert hlo.read_program(text).flops == 2 * 3 * 8 * 16 * 4
