"""The equations of General SNN in plain numpy, one number after the other.

Written from the equations alone, for the tests to compare with; it shares no code with
spikejax. Single images [H, W, C], one time step.
"""

import math

import numpy as np


def sine(a, b):
    return 2 * np.sin(np.pi / 4 * a * np.cos(np.pi / 4 * b))


def mean(a, b):
    return (a + b) / 2


def fire(v, current):
    """The authors' neuron: (membrane that is not reset, spikes)."""
    u = 0.4 * v + current
    return u, (u >= 0.5).astype(float)


def conv3(x, kernel, bias):
    height, width, _ = x.shape
    y = np.zeros((height, width, kernel.shape[-1])) + bias
    for i in range(height):
        for j in range(width):
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < height and 0 <= j + dj < width:
                        y[i, j] += x[i + di, j + dj] @ kernel[di + 1, dj + 1]
    return y


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(xs, p):
    """p: {"inputs": {kernel, bias}, "recurrent": {kernel, bias}}; gates i f g o."""
    size = p["recurrent"]["kernel"].shape[0]
    c, h, hs = np.zeros(size), np.zeros(size), []
    for x in xs:
        gates = x @ p["inputs"]["kernel"] + p["inputs"]["bias"]
        gates = gates + h @ p["recurrent"]["kernel"] + p["recurrent"]["bias"]
        i, f, g, o = (gates[k * size : (k + 1) * size] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        hs.append(h)
    return np.array(hs)


def both_ways(xs, p):
    return np.concatenate(
        [lstm(xs, p["forwards"]), lstm(xs[::-1], p["backwards"])[::-1]], -1
    )


def corners(side, size):
    far = side - size
    return [(0, 0), (0, far), (far, 0), (far, far)]


def cut(x, size):
    return [x[y : y + size, z : z + size] for y, z in corners(len(x), size)]


def stitch(parts, side):
    """Each pixel is the mean over the windows that hold it."""
    size, channels = len(parts[0]), parts[0].shape[-1]
    out = np.zeros((side, side, channels))
    for i in range(side):
        for j in range(side):
            here = [
                part[i - y, j - z]
                for part, (y, z) in zip(parts, corners(side, size), strict=True)
                if 0 <= i - y < size and 0 <= j - z < size
            ]
            out[i, j] = sum(here) / len(here)
    return out


def conv_windows(parts, p, project):
    """Spikes of the windows: two convolutions, membranes from rest."""
    first, second = p["layers"][0], p["layers"][1]
    m1, m2, out = 0.0, 0.0, []
    for g, x in enumerate(parts):
        start = project(m1, m2) if g else 0.0
        m1, s1 = fire(m1, conv3(x, first["kernel"], first["bias"]))
        m2, s2 = fire(start, conv3(s1, second["kernel"], second["bias"]))
        out.append(s2)
    return out, None


def lstm_windows(parts, p, project, old):
    """Spikes and membranes of the windows; old are those of the block before."""
    currents = []
    for x in parts:
        h, w, c = x.shape
        ys = both_ways(x.reshape(h * w, c), p["layer"])
        currents.append(ys.reshape(h, w, -1))
    if old is None:
        old = [np.zeros_like(x) for x in currents]
    m1, z1 = fire(project(old[0], old[1]), currents[0])
    m2, z2 = fire(project(m1, old[1]), currents[1])
    m3, z3 = fire(project(old[2], m2), currents[2])
    m4, z4 = fire(project(old[3], m3), currents[3])
    return [z1, z2, z3, z4], [m1, m2, m3, m4]


def mixer(x, p, binarise, size, project, region_threshold=None, carried=None):
    """(map, membranes); binarise takes a list of windows."""
    parts = binarise(cut(x, size))
    if "layers" in p["network"]:
        spikes, membranes = conv_windows(parts, p["network"], project)
    else:
        old = None if carried is None else cut(carried, size)
        spikes, membranes = lstm_windows(parts, p["network"], project, old)
    y = stitch(spikes, len(x))
    if region_threshold is not None:
        y = np.where(y > region_threshold, 1, y)
    y = y @ p["linear"]["kernel"] + p["linear"]["bias"]
    return y, None if membranes is None else stitch(membranes, len(x))


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def merge(x, p):
    pixels = [x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]]
    return np.concatenate(pixels, -1) @ p["linear"]["kernel"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def network(image, p, binarise, project, region_threshold=None):
    """Logits of the whole network; of each stage every second block overlaps."""
    half = len(image) // 2
    pixels = image.reshape(half, 2, half, 2, -1).transpose(0, 2, 1, 3, 4)
    kernel = p["stem"]["kernel"].reshape(-1, p["stem"]["kernel"].shape[-1])
    x = pixels.reshape(half, half, -1) @ kernel + p["stem"]["bias"]
    carried = None
    for stage, blocks in p["stages"].items():
        last = stage == len(p["stages"]) - 1
        for k, block in blocks.items():
            second = k % 2 == 1 and not last
            size = 3 * len(x) // 4 if second else len(x) // 2
            region = region_threshold if second else None
            y, carried = mixer(
                x, block["mixer"], binarise, size, project, region, carried
            )
            x = x + y
            x = x + dense(gelu(dense(x, block["widen"])), block["narrow"])
        if not last:
            x = merge(x, p["merges"][stage])
            if carried is not None:
                carried = merge(carried, p["carried_merges"][stage])
    return dense(x.mean((0, 1)), p["head"])
