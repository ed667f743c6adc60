import importlib.util

import pytest

from spikejax.tpu import chips
from spikejax.tpu.chips import CHIPS, GIB, find_slice, tpu_devices


def test_the_figures_are_of_their_order():
    """Each chip needs 140 to 600 operations for a byte of memory to be busy."""
    for chip in CHIPS.values():
        assert 140 < chip.flops / chip.hbm_bandwidth < 600
        assert 15 * GIB < chip.hbm < 96 * GIB
        assert chip.hbm_bandwidth > 6 * chip.link_bandwidth


@pytest.mark.parametrize(
    "topology, chips, rings, links",
    [
        ("v5e:1x1", 1, (False, False), 0),
        ("v5e:2x2", 4, (False, False), 2),
        ("v5e:8x16", 128, (False, True), 3),
        ("v6e:16x16", 256, (True, True), 4),
        ("v4:2x2x1", 4, (False, False, False), 2),
        ("v5p:2x2x4", 16, (False, False, False), 3),
        ("v5p:4x4x8", 128, (True, True, True), 6),
    ],
)
def test_links_of_a_chip_at_the_corner(topology, chips, rings, links):
    found = find_slice(topology)
    assert (found.name, found.chips, found.rings) == (topology, chips, rings)
    assert found.bandwidth == links * found.chip.link_bandwidth


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:2by2", "v5e:2x", "2x2"])
def test_a_name_that_is_no_topology(topology):
    expected = (
        r"topology: expected a chip \(v4, v5e, v5p, v6e\) and a shape, such as "
        f"v5e:16x16, got '{topology}'."
    )
    with pytest.raises(ValueError, match=expected):
        find_slice(topology)


def test_a_shape_that_the_chip_does_not_have():
    """libtpu itself would take the first two."""
    for shape in ("32x32", "2x2x2", "3x3", "0x4"):
        with pytest.raises(ValueError) as error:
            find_slice(f"v5e:{shape}")
        assert str(error.value) == (
            f"topology: expected a slice that v5e has, got 'v5e:{shape}'. Take 1x1, "
            "2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16."
        )
    for shape in ("2x2", "4x4x6", "16x16x20", "0x4x4"):
        with pytest.raises(ValueError, match="or multiples of 4, up to 4096 chips"):
            find_slice(f"v4:{shape}")


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        tpu_devices(find_slice("v5e:2x4"))
    assert str(error.value) == (
        "plan: expected the TPU compiler, libtpu, which is not installed. "
        "In a clone: pip install -e '.[tpu]' (no TPU is needed)."
    )


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no TPU compiler: pip install -e '.[tpu]'",
)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:16x16", "v4:2x2x1", "v6e:2x4"])
def test_every_chip_is_one_device(topology):
    where = find_slice(topology)
    assert len(tpu_devices(where)) == where.chips


def test_chips_have_the_figures_of_their_data_sheets():
    """Bfloat16 operations, bytes of memory and of a link per second."""
    figures = {
        n: (c.flops, c.hbm_bandwidth, c.link_bandwidth) for n, c in CHIPS.items()
    }
    assert figures["v5p"] == (459e12, 2765e9, 100e9)
    assert figures["v6e"] == (918e12, 1638e9, 100e9)
