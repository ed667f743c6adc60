"""The lines of programs below are the TPU compiler's, of libtpu 0.0.42.1 for v5e."""

import pytest

from spikejax.tpu.traffic import cycles, hbm_bytes

MAIN = "ENTRY %main.1_spmd (param.84: f32[8]) -> f32[8] {"


def read(*lines):
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
    assert read(f"%add.1 = {array} add(%a, %b)") == size


def test_an_instruction_reads_and_writes_what_lies_in_memory():
    assert read(
        "%param.84 = f32[1024]{0:T(1024)} parameter(0)",
        "%kept = f32[2048]{0:T(1024)S(1)} negate(%param.84)",
        "ROOT %out = (f32[256]{0:T(256)}, bf16[512]{0:T(512)(2,1)S(1)}) "
        "fusion(%kept, /*index=1*/%param.84), kind=kLoop, calls=%fused, metadata={}",
    ) == 4096 + (4096 + 1024)


def test_copies_and_slices_move_a_part_once():
    """Between memory and chip one end counts; within memory both."""
    whole = "f32[3,128,256]{2,1,0:T(8,128)}"
    assert (
        read(
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
        read(
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
