"""The breakdown of a plan by part and by operation."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from tiny import normal

from omnicodec_jax.planning import hlo, parts
from omnicodec_jax.planning.parts import OpName
from omnicodec_jax.planning.speeds import TPUS
from omnicodec_jax.planning.totals import Count, counts

CHIP = TPUS["v5e"]
STEP = """HloModule jit_train_step

ENTRY %main (x: f32[1024,1024], kernel: f32[1024,1024]) -> f32[1024,1024] {
  %x = f32[1024,1024]{1,0} parameter(0)
  %kernel = f32[1024,1024]{1,0} parameter(1)
  %product = f32[1024,1024]{1,0} dot(%x, %kernel), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(train_step)/jvp(Codec)/Codec.encode/encoder/conv_in/dot_general" stack_frame_id=7}
  %copied = f32[1024,1024]{0,1} copy(%product)
  %gradient = f32[1024,1024]{1,0} dot(%x, %copied), lhs_contracting_dims={0}, rhs_contracting_dims={0}, \
metadata={op_name="jit(train_step)/transpose(jvp(Codec))/Codec.encode/encoder/conv_out/dot_general"}
  %sine = f32[1024,1024]{1,0} sine(%gradient), metadata={op_name="jit(train_step)/jvp(Codec)/decoder/sin"}
  ROOT %moved = f32[1024,1024]{1,0} subtract(%sine, %x), metadata={op_name="jit(train_step)/optimizer/sub"}
}
"""
ARRAY = 4 * 1024**2


def counted(text: str) -> list[Count]:
    return list(counts(*hlo.parse(text)))


@pytest.mark.parametrize(
    ("op_name", "path", "operation"),
    [
        ("jit(train_step)/optimizer/mul", ("optimizer",), "mul"),
        (
            "jit(train_step)/jvp(Net)/Net.encode/encoder/checkpoint/cond/branch_0_fun/dot_general",
            ("Net", "encoder"),
            "dot_general",
        ),
        ("jit(f)/transpose(jvp(Net))/layer_0/jit(clip)/max", ("Net", "layer_0"), "max (backward)"),
        ("jit(f)/transpose(jvp(jvp()))/while/body/closed_call/add", (), "add (backward)"),
        ("jit(f)/Net.encode/quantizer._quantize/while/body/gather", ("Net", "quantizer"), "gather"),
        ("jit(f)/step.<locals>.run/Net.encode/quantizer/jit(_where)/sub", ("Net", "quantizer"), "sub"),
        ("state['past']", (), "argument"),
        ("", (), ""),
    ],
)
def test_part_of_an_instruction_is_read_from_its_name(op_name, path, operation):
    assert OpName.parse(op_name) == OpName(path, operation)


def test_parts_add_up_and_a_copy_belongs_to_what_it_copies():
    found = {row.name: row for row in parts.by_part(counted(STEP), CHIP)}
    assert {name: row.bytes_accessed / ARRAY for name, row in found.items()} == {
        "Codec": 10,
        "Codec/encoder": 8,
        "Codec/encoder/conv_in": 5,
        "Codec/encoder/conv_out": 3,
        "Codec/decoder": 2,
        "optimizer": 3,
    }
    assert found["Codec"].flops == found["Codec/encoder"].flops == 2 * 2 * 1024**3
    assert found["optimizer"].seconds == pytest.approx(3 * ARRAY / CHIP.bandwidth)


def test_operations_of_the_backward_pass_stand_by_themselves():
    found = {row.name: row.bytes_accessed / ARRAY for row in parts.by_operation(counted(STEP), CHIP)}
    assert found == {"dot_general": 5, "dot_general (backward)": 3, "sin": 2, "sub": 3}


def test_breakdown_is_two_tables_with_what_is_in_a_part_below_it():
    table = parts.breakdown(STEP, CHIP)
    lines = [line.split()[:2] for line in table.splitlines()]
    assert lines[:5] == [["part", "GB"], ["all", "0.05"], ["Codec", "0.04"], ["encoder", "0.03"], ["conv_in", "0.02"]]
    assert ["operation", "GB"] in lines


def test_compiled_program_has_the_parts_of_its_modules():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(64, name="second")(jnp.sin(nn.Dense(64, name="first")(x)))

    x = normal(256, 64)
    params = jax.jit(Net().init)(jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda params: Net().apply(params, x).sum()))
    program = counted(gradient.lower(params).compile().as_text() or "")
    names = {row.name for row in parts.by_part(program, CHIP)}
    assert {"Net/first", "Net"} <= names
