"""What is counted in the text of a compiled program: operations, bytes and exchanges between chips."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import normal

from omnicodec_jax.planning import collectives, hlo
from omnicodec_jax.planning import totals as counting
from omnicodec_jax.planning.collectives import Collective
from omnicodec_jax.planning.speeds import GPUS, TPUS

PROGRAMS = Path(__file__).parent / "programs"


def totals(function, *arguments, **options) -> counting.Totals:
    return counting.totals(jax.jit(function, **options).lower(*arguments).compile().as_text() or "")


def test_flops_of_products_count_every_turn_of_a_loop():
    def ten_times(x):
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ x), None), x, None, length=10)[0]

    assert totals(ten_times, jnp.ones((16, 16))).flops == 10 * 2 * 16**3


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2,), "padding": [(3, 1)]},
        {"window_strides": (1,), "padding": [(4, 0)], "rhs_dilation": (2,)},
        {"window_strides": (1,), "padding": [(1, 2)], "lhs_dilation": (3,)},
    ],
)
def test_flops_of_convolutions_leave_out_padding_and_dilation(options):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NWC", "WIO", "NWC"), **options)

    x, kernel = normal(2, 20, 4), normal(3, 4, 6)
    ones = convolve(jnp.ones_like(x), jnp.ones_like(kernel))  # how many terms each sum has
    assert totals(convolve, x, kernel).flops == 2 * ones.sum()


def test_bytes_accessed_are_what_goes_in_and_comes_out():
    assert totals(lambda x, y: x * y + 1, normal(8, 128), normal(8, 128)).bytes_accessed == 3 * 8 * 128 * 4


def test_slice_that_is_fetched_ahead_is_not_the_whole_array():
    program = """HloModule jit_step

%fetch (array: f32[8,1024]) -> f32[2,1024] {
  %array = f32[8,1024]{1,0:T(8,128)} parameter(0)
  ROOT %part = f32[2,1024]{1,0:T(2,128)S(1)} slice(%array), slice={[0:2], [0:1024]}
}

ENTRY %main (x: f32[8,1024]) -> f32[2,1024] {
  %x = f32[8,1024]{1,0:T(8,128)} parameter(0)
  %start = ((f32[8,1024]{1,0:T(8,128)}), f32[2,1024]{1,0:T(2,128)S(1)}, s32[]{:S(2)}) async-start(%x), calls=%fetch
  %done = f32[2,1024]{1,0:T(2,128)S(1)} async-done(%start)
  ROOT %sine = f32[2,1024]{1,0:T(2,128)} sine(%done)
}
"""
    assert counting.totals(program).bytes_accessed == (2 + 2) * 1024 * 4  # into the chip's own memory, and back


def test_kernel_of_a_tpu_counts_what_it_says_and_an_array_once_however_often_it_is_given():
    program = """HloModule jit_step

ENTRY %main (x: bf16[64,128], kernel: bf16[128,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %kernel = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %call = bf16[64,128]{1,0:T(8,128)(2,1)} custom-call(%x, %x, /*index=2*/%kernel), \
custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[64,128]{1,0}}, \
backend_config={"custom_call_config":{"body":"TUz","cost_estimate":{"flops":"2097152","transcendentals":"8"}}}
}
"""
    found = counting.totals(program)
    assert found.operations == {"bfloat16": 2097152}
    assert found.bytes_accessed == (2 * 64 + 128) * 128 * 2


def test_slices_of_a_loop_are_not_the_whole_array_each_time():
    def sum_rows(x):
        return jax.lax.scan(lambda carry, row: (carry + row, None), jnp.zeros(1024), x)[0]

    x = normal(64, 1024)
    assert totals(sum_rows, x).bytes_accessed < 6 * x.nbytes


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("x",), (AxisType.Auto,))


def test_collectives_count_by_kind_and_as_often_as_they_run(mesh):
    @jax.shard_map(mesh=mesh, in_specs=P("x"), out_specs=(P(), P("x")), check_vma=False)
    def collect(x):  # a device's part: 4 KiB
        total = jax.lax.scan(lambda carry, _: (jax.lax.psum(jnp.tanh(carry), "x"), None), x, None, length=5)[0]
        return jax.lax.all_gather(x, "x", tiled=True), total

    assert totals(collect, normal(8, 1024)).collectives == {"all-reduce": 5 * 4096, "all-gather": 8 * 4096}


def test_no_collectives_where_nothing_is_exchanged(mesh):
    rows = NamedSharding(mesh, P("x"))
    assert totals(jnp.sin, normal(8, 16), in_shardings=rows, out_shardings=rows).collectives == {}


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", (0, 2)),
        ("replica_groups=[2,4]<=[8], to_apply=%add", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%add", tuple(range(8))),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
        ("replica_groups={}, to_apply=%add", ()),
    ],
)
def test_group_of_chips_is_read_in_every_form_that_xla_writes(attributes, group):
    assert collectives.first_group(attributes) == group


@pytest.mark.parametrize(
    ("chip", "kind", "group", "seconds"),
    [
        ("a100", "all-gather", range(8), 7 / 8 / 300),  # over NVLink
        ("a100", "all-reduce", range(8), 2 * 7 / 8 / 300),
        ("a100", "all-gather", range(16), 15 / 16 / 200),  # over the eight adapters of a host
        ("a100", "all-gather", (0, 8), 1 / 2 / 25),  # every GPU of a host has its own group: over one adapter each
        ("a100", "all-gather", (0,), 0),
        ("v5e", "reduce-scatter", range(256), 255 / 256 / 200),
    ],
)
def test_exchange_takes_as_long_as_the_slowest_link_of_its_group(chip, kind, group, seconds):
    chip, exchange = (GPUS | TPUS)[chip], Collective(kind, tuple(group), "channel_id=1", 10**9)
    assert exchange.seconds(chip, per_host=8 if chip.target else 256) == pytest.approx(seconds)


def test_exchange_between_slices_is_the_part_of_a_chip_over_the_network_of_the_data_centre():
    text = """HloModule step

ENTRY %main (x: f32[256,1024]) -> f32[256,1024] {
  %x = f32[256,1024]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (f32[256,1024]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="all-reduce.4_0",_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[256,1024]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE",_xla_megascale_target="{1,2}x{0:3}"}
  ROOT %all-reduce = f32[256,1024]{1,0} all-reduce(%x), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
    found = counting.totals(text)
    within, between = sorted(found.exchanges, key=lambda exchange: exchange.slices)
    assert (between.kind, between.slices, between.size) == ("all-reduce", 2, 2**20)
    assert between.is_slow(per_host=4)
    assert between.seconds(TPUS["v5e"], per_host=4) == pytest.approx(2 * (1 / 2) * 2**20 / 3.125e9)
    assert not within.is_slow(per_host=4)
    assert found.bytes_accessed == 2**20 + 2**20 + 4 + 2 * 2**20  # sent, received with a number beside it, reduced


@pytest.mark.parametrize(("target", "slices"), [("{1,2}x{0:3}", 2), ("{1:16}x{0:255}", 16), ("{1:2,5}x{0}", 3)])
def test_slices_of_an_exchange_are_counted(target, slices):
    assert collectives.num_slices(f'_xla_megascale_target="{target}"') == slices


# -- Programs for GPUs: products and convolutions are calls of libraries


def test_library_calls_of_a_gpu_are_counted():
    """The program: a convolution, two of each channel by itself, five products in float32 and one in bfloat16."""
    found = counting.totals((PROGRAMS / "a100_float32.txt").read_text())
    taps = 7 * 1000 - 2 * (3 + 2 + 1)  # those that padding takes up do nothing
    convolutions = 2 * 3 * 96 * (40 * taps + taps + 7 * 1999)  # the last is of a padded copy of its input
    products = 5 * 2 * 3 * 1999 * 96 * 96
    bfloat16 = 2 * 4 * 56 * 56 * 40  # 50 x 33 filled up to 56 x 40
    assert found.operations == {"float32 highest": convolutions + products, "bfloat16": bfloat16}


def test_gradients_by_library_calls_of_a_gpu_are_counted():
    """The program: the gradients of sum(gelu(conv(x, k)) @ w) with respect to w and k, on eight GPUs."""
    found = counting.totals((PROGRAMS / "a100_gradient.txt").read_text())
    forward = 2 * 2 * 64 * 128 * 2047 * 7
    backward = 2 * 2 * 64 * 128 * (2047 * 7 - 1)  # one tap lies in padding
    products = 2 * (2 * 4096 * 128 * 256)  # of 2 x 2047 filled up to 4096
    assert found.operations == {"bfloat16": forward + backward + products}
    assert found.collectives == {"all-reduce": 2 * (128 * 256 + 7 * 64 * 128)}
    ((exchange, times),) = found.exchanges.items()
    assert (exchange.group, times) == (tuple(range(8)), 1)


def test_convolution_that_adds_a_bias_by_itself_is_counted_like_others():
    text = (PROGRAMS / "a100_gradient.txt").read_text()
    fused = text.replace("__cudnn$convForward", "__cudnn$convBiasActivationForward")
    assert fused != text
    assert counting.totals(fused).operations == counting.totals(text).operations


def test_workspace_of_a_library_call_is_no_traffic():
    found = counting.totals((PROGRAMS / "a100_gradient.txt").read_text())
    assert found.bytes_accessed < 40 * 2**20  # the two workspaces of the products have 4 MiB each
    workspace = "s8[4194304]{0}"
    _, _, larger = (PROGRAMS / "a100_gradient.txt").read_text().partition("ENTRY")
    assert larger.count(workspace) == 2
    text = (PROGRAMS / "a100_gradient.txt").read_text().replace(workspace, "s8[8388608]{0}")
    assert counting.totals(text).bytes_accessed == found.bytes_accessed


def test_elements_of_tuples_are_read_as_jax_0_11_writes_them():
    """JAX 0.10 writes a line for each element that is taken out of a tuple."""
    text = (PROGRAMS / "a100_gradient.txt").read_text()
    taken = {}
    lines = []
    for line in text.splitlines():
        if found := re.fullmatch(r"\s*%(\S+) = \S+ get-tuple-element\(%(\S+)\), index=(\d+).*", line):
            taken[found[1]] = f"{found[2]}#{found[3]}"
        else:
            lines.append(re.sub(r"%([\w.-]+)", lambda name: f"%{taken.get(name[1], name[1])}", line))
    assert len(set(taken.values())) > 3
    assert counting.totals("\n".join(lines)) == counting.totals(text)


def test_elements_of_elements_have_their_types():
    text = """HloModule step

ENTRY %main (x: f32[8,128]) -> f32[16] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %call = (f32[8,128]{1,0:T(8,128)}, (s32[2]{0}, /*index=1*/f32[16]{0}), u8[0]{0}) custom-call(%x)
  ROOT %sine = f32[16]{0} sine(%call#1#1)
}
"""
    computations, entry = hlo.parse(text)
    (found,) = hlo.operand_types(computations[entry], computations[entry]["sine"])
    assert (hlo.dtype(found), hlo.sizes(found)) == ("f32", [16])
    assert counting.totals(text).bytes_accessed == 2 * 8 * 128 * 4 + 2 * 4 + 16 * 4 + 2 * 16 * 4


# -- Programs for TPUs: arrays are kept in tiles


@pytest.mark.parametrize(
    ("type", "size"),
    [  # the allocations of a program for a v5e, as libtpu 0.0.42 reports them
        ("f32[96,96]{1,0:T(8,128)}", 49152),
        ("f32[3,1000,40]{1,2,0:T(8,128)}", 491520),
        ("f32[3,1999,96]{1,2,0:T(8,128)}", 2359296),
        ("f32[7,1,96]{2,1,0:T(1,128)}", 3584),
        ("bf16[4,50,33]{1,0,2:T(4,128)(2,1)}", 33792),
        ("bf16[4,50,50]{2,0,1:T(4,128)(2,1)}", 51200),
        # no tiles, none of several arrays, no axis at all
        ("f32[3,1000,40]{2,1,0}", 480000),
        ("(f32[8,128]{1,0:T(8,128)}, bf16[1,1]{1,0:T(8,128)(2,1)})", 4096 + 2048),
        ("s32[]{:T(128)}", 512),
        ("pred[]", 1),
    ],
)
def test_bytes_of_an_array_include_the_padding_of_its_tiles(type, size):
    assert hlo.num_bytes(type) == size


def test_padding_is_read_and_written_with_the_rest():
    text = """HloModule padded
ENTRY %main (x: f32[3,1000,40]) -> f32[3,1000,40] {
  %x = f32[3,1000,40]{1,2,0:T(8,128)} parameter(0)
  ROOT %y = f32[3,1000,40]{1,2,0:T(8,128)} negate(%x)
}
"""
    assert counting.totals(text).bytes_accessed == 2 * 3 * 40 * 1024 * 4 > 2 * math.prod((3, 1000, 40)) * 4
