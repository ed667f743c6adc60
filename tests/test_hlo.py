"""Programs below are XLA's text, of JAX 0.10.2 on CPU and libtpu 0.0.42.1 for v5e."""

import pytest

from spikejax.tpu.hlo import Collective, collectives, cycles, hbm_bytes

HEADER = (
    "HloModule jit_step, is_scheduled=true, entry_computation_layout={()->()}, "
    "num_partitions=8\n"
)


def read(*lines):
    return collectives(HEADER + "\n".join(lines))


def test_all_reduce_of_several_arrays_on_tpu():
    (found,) = read(
        "  %all-reduce.2 = (f32[1024,2048]{1,0:T(8,128)S(1)}, "
        "bf16[2048,1024]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/f32[]{:T(128)}) "
        "all-reduce(%fusion.7, %fusion, %p), channel_id=1, "
        "replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, "
        'use_global_device_ids=true, to_apply=%add.clone, metadata={op_name="jit(s)"}'
    )
    size = 4 * 1024 * 2048 + 2 * 1024 * 2048 + 4
    assert found == Collective("all-reduce", 4, 1, size)
    assert found.sent == 2 * size * 3 / 4


@pytest.mark.parametrize(
    "groups, devices",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("{}", 8),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", 8),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_0','axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 4),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", 2),
    ],
)
def test_groups(groups, devices):
    (found,) = read(
        "  %all-gather.1 = f32[64,32]{1,0} all-gather(%p), channel_id=2, "
        f"replica_groups={groups}, dimensions={{0}}"
    )
    assert found == Collective("all-gather", devices, 1, 64 * 32 * 4)
    assert found.sent == pytest.approx(64 * 32 * 4 * (devices - 1) / devices)


def test_a_start_counts_and_its_done_does_not():
    groups = "replica_groups={{0,1,2,3},{4,5,6,7}}"
    found = read(
        f"  %a = f32[8]{{0}} all-reduce-start(%x), channel_id=1, {groups}",
        "  %b = f32[8]{0} all-reduce-done(%a)",
        "  %c = (f32[2]{0}, f32[8]{0}) all-gather-start(%y), channel_id=2, " + groups,
        "  %d = f32[8]{0} all-gather-done(%c)",
        "  %e = (bf16[16]{0}, bf16[16]{0}, u32[], u32[]) collective-permute-start(%z), "
        "channel_id=3, source_target_pairs={{0,1},{1,0}}",
        "  %f = bf16[16]{0} collective-permute-done(%e)",
    )
    assert found == (
        Collective("all-gather", 4, 1, 32),
        Collective("all-reduce", 4, 1, 32),
        Collective("collective-permute", 8, 1, 32),
    )
    assert [operation.sent for operation in found] == [24, 48, 32]


def test_reduce_scatter_is_measured_by_what_goes_in():
    """As an operation, and as TPU writes it: an all-reduce of which a part is kept."""
    (plain,) = read(
        "  %r = f32[256,2048]{1,0} reduce-scatter(%g), channel_id=1, "
        "replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add"
    )
    (fused,) = read(
        "%all-reduce-scatter (input: f32[1024,2048]) -> f32[256,2048] {",
        "  %all-reduce.2 = f32[1024,2048]{1,0:T(8,128)} all-reduce(%input), "
        "channel_id=6, replica_groups={{0,1,2,3}}, to_apply=%add.1.clone",
        "}",
    )
    assert plain == fused == Collective("reduce-scatter", 4, 1, 4 * 1024 * 2048)


def test_pieces_of_one_operation_count_once():
    """Overlapped with other work, it stands in several computations."""
    piece = (
        "  %all-gather.{} = bf16[256,2048]{{1,0}} all-gather(%param), channel_id={}, "
        'replica_groups=[4,2]<=[8], dimensions={{0}}, metadata={{op_name="a(b)"}}'
    )
    found = read(
        "%first (param: bf16[128,2048]) -> bf16[256,2048] {",
        piece.format(24, 7),
        "}",
        "%second (param: bf16[128,2048]) -> bf16[256,2048] {",
        piece.format(26, 7),
        "}",
        "ENTRY %main (p: f32[8]) -> f32[8] {",
        piece.format(28, 8),
        "}",
    )
    assert found == (Collective("all-gather", 2, 2, 2 * 256 * 2048 * 2),)


def test_types_of_a_bit_and_of_a_byte():
    line = "  %a = {} all-to-all(%x), channel_id=1, replica_groups={{{{0,1}}}}"
    for array, size in {
        "pred[3,5]{1,0}": 15,
        "s8[7]{0}": 7,
        "f8e4m3fn[7]{0}": 7,
        "u4[6]{0}": 3,
        "f32[]": 4,
    }.items():
        assert read(line.format(array))[0].bytes == size


def test_a_program_without():
    assert read("  %fusion = f32[8]{0} fusion(%all-reduce.1), calls=%f") == ()


MAIN = "ENTRY %main.1_spmd (param.84: f32[8]) -> f32[8] {"


def traffic(*lines):
    return hbm_bytes("\n".join([MAIN, *(f"  {line}" for line in lines), "}"]))


@pytest.mark.parametrize(
    "array, size",
    [
        ("f32[]{:T(128)}", 4),
        ("f32[64]{0:T(128)}", 4 * 128),
        ("bf16[1024,2048]{1,0:T(8,128)(2,1)}", 2 * 1024 * 2048),
        # 64 channels, the fastest axis, fill up to 128; the batch of 60 is next, to 64
        ("bf16[60,56,56,64]{3,0,2,1:T(8,128)(2,1)}", 2 * 56 * 56 * 64 * 128),
        ("f32[3,3,7,5]{2,3,1,0:T(4,128)}", 4 * 3 * 3 * 8 * 128),
        ("pred[3,5]", 15),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),  # on the chip
    ],
)
def test_an_array_takes_whole_tiles(array, size):
    assert traffic(f"%add.1 = {array} add(%a, %b)") == size


def test_an_instruction_reads_and_writes_what_lies_in_memory():
    assert traffic(
        "%param.84 = f32[1024]{0:T(1024)} parameter(0)",
        "%kept = f32[2048]{0:T(1024)S(1)} negate(%param.84)",
        "ROOT %out = (f32[256]{0:T(256)}, bf16[512]{0:T(512)(2,1)S(1)}) "
        "fusion(%kept, /*index=1*/%param.84), kind=kLoop, calls=%fused, metadata={}",
    ) == 4096 + (4096 + 1024)


def test_copies_and_slices_move_a_part_once():
    """Between memory and chip one end counts; within memory both."""
    whole = "f32[3,128,256]{2,1,0:T(8,128)}"
    assert (
        traffic(
            f"%w = {whole} parameter(0)",
            f"%s = (({whole}), f32[1,128,256]{{2,1,0:T(8,128)S(1)}}, s32[]{{:S(2)}}) "
            "slice-start(%w), slice={[0:1], [0:128], [0:256]}",
            "%d = f32[1,128,256]{2,1,0:T(8,128)S(1)} slice-done(%s)",
            "%c = f32[3,128,256]{2,1,0:T(8,128)S(1)} custom-call(%d, %d, %w), "
            'custom_call_target="ConcatBitcast"',
        )
        == 4 * 128 * 256
    )
    assert (
        traffic(
            "%c = (f32[64]{0:T(128)}, f32[64]{0:T(128)}, u32[]{:S(2)}) copy-start(%p)",
            "%d = f32[64]{0:T(128)} copy-done(%c)",
        )
        == 2 * 4 * 128
    )


def test_the_inside_of_an_instruction_does_not_count_and_a_body_of_a_loop_does():
    line = "  %a = f32[1024]{0:T(1024)} add(%x, %y)"
    program = "\n".join(
        [
            "%fused_computation.1 (x: f32[1024]) -> f32[1024] {",
            line,
            "}",
            "%region_1 (a: f32[], b: f32[]) -> f32[] {",
            line,
            "}",
            "%body (s: (f32[1024])) -> (f32[1024]) {",
            line,
            "}",
            MAIN,
            "  %p = f32[1024]{0:T(1024)} parameter(0)",
            "  %f = f32[1024]{0:T(1024)S(1)} fusion(%p), calls=%fused_computation.1",
            "  %r = f32[]{:T(128)S(1)} reduce(%f), to_apply=%region_1",
            "  %w = (f32[1024]{0:T(1024)}) while(%p), condition=%c, body=%body",
            "}",
        ]
    )
    assert hbm_bytes(program) == 4096 + 4096


def test_cycles_are_summed():
    line = '%f = f32[] fusion(%a), backend_config={{"x":1,"estimated_cycles":"{}"}}'
    assert cycles("\n".join(map(line.format, (1418548, 52)))) == 1418600
    assert cycles("%a = f32[] add(%b, %c)") == 0


def test_a_broadcast_sends_all_of_it():
    assert Collective("collective-broadcast", 4, 1, 32).sent == 32
