"""Wrong command lines of every script: one line on stderr, exit code 1, and no work.

Each command of the table is followed by what its line says, as far as it fits here.
"""

import importlib
import shlex

import pytest
from test_cli import command

TABLE = r"""
digits --steps many
    flags: expected an integer after --steps, got 'many'. --help explains it.
digits --steps
    flags: expected an integer after --steps, got none. --help explains it.
digits --steps 0
    steps: expected 1 to 2147483647, got 0.
digits --steps 100000000000000000000
    steps: expected 1 to 2147483647, got 100000000000000000000.
digits --steps ''
    flags: expected a value after each flag, got ''.
digits --steps=
    flags: expected a value after each flag, got '--steps='.
digits --epochs inf
    epochs: expected a finite number, got inf.
digits --epochs 0
    epochs: expected more than 0, at most a million, got 0.0.
digits --epochs ten
    flags: expected a number after --epochs, got 'ten'. --help explains it.
digits --batch-size 0
    batch_size: expected at least 1, got 0.
digits --batch-size 100000000 --neuron lif
    train_batches: expected batch_size >= 1, shard (process, processes) with 0 <=
digits --seed -1
    seed: expected 0 to 2**32 - 1, got -1.
digits --seed 4294967296
    seed: expected 0 to 2**32 - 1, got 4294967296.
digits --optimizer SGD
    flags: expected one of sgd, adamw, lamb after --optimizer, got 'SGD'.
digits --learning-rate 0
    learning_rate: expected more than 0, got 0.0.
digits --learning-rate inf
    learning_rate: expected a finite number, got inf.
digits --learning-rate 0,1
    flags: expected a number after --learning-rate, got '0,1'. --help explains it.
digits --learning-rate-batch 0
    learning_rate_batch: expected at least 1 image, got 0.
digits --warmup 1
    warmup: expected a part of the training, 0 <= warmup < 1, got 1.0.
digits --weight-decay -1
    weight_decay: expected 0 or more, got -1.0.
digits --clip -1
    clip: expected 0 (off) or more, got -1.0.
digits --ema 1
    ema: expected 0 (off) <= ema < 1, got 1.0.
digits --norm-groups 5
    norm_groups: expected a divisor of the batch size, got 5.
digits --evaluate-every 0
    evaluate_every: expected more than 0 epochs, got 0.0.
digits --save-every 0
    save_every: expected at least 1 step, got 0.
digits --workdir ''
    flags: expected a value after each flag, got ''.
digits --workdir file --neuron lif
    file: File exists. Check the path, its permissions, and the space on its disk.
digits --workdir file/run --neuron lif
    file/run: Not a directory. Check the path, its permissions, and the space on its
digits --workdir 'a#b'
    workdir: expected a path without #, which Orbax cannot read back,
digits --workdir 'a\b'
    workdir: expected a path without \, which Orbax cannot read back,
digits --workdir
    flags: expected a path after --workdir, got none. --help explains it.
digits --data cifar1O
    data: expected digits, fake, tiny_imagenet, folder or a TFDS set, got 'cifar1O'.
digits --data ./photos
    data: expected digits, fake, tiny_imagenet, folder or a TFDS set, got './photos'.
digits --data mnist --neuron lif --data-dir empty
    mnist: expected one prepared set in empty, got none. Run: python -m
digits --data folder --neuron lif --data-dir nowhere
    folder: expected images (.jpeg, .jpg, .png) of the classes of train in
digits --data tiny_imagenet --neuron lif --data-dir empty
    tiny_imagenet: expected tiny-imagenet-200.zip or one zip of its layout, got
digits --augment flip
    flags: expected one of none, crop-flip, reflect-flip, autoaugment, inception
digits --augment inception
    image_size: expected a number with --augment inception, got none. Take 224, or 64
digits --from nowhere --neuron lif
    from: expected the folder of a finished run, or of one with an intact checkpoint,
digits --image-size 0
    image_size: expected 1 to 10000, got 0.
digits --image-size 1000000
    image_size: expected 1 to 10000, got 1000000.
digits --model vgg
    flags: expected --model with a name that --help lists, got 'vgg'. Did you mean
digits --model resnet20 --pool avg
    pool: expected a network for ImageNet, those for CIFAR do not pool, got 'avg' for
digits --model convnet --widht 2
    flags: expected those of this script, got --widht. Did you mean --width?
digits --neuron lif --num-threshold 3
    flags: expected those of this script, got --num-threshold. Did you mean --num-t
digits --leraning-rate 3
    flags: expected those of this script, got --leraning-rate. Did you mean --learning-
digits --lr 3
    flags: expected those of this script, got --lr. --help lists them.
digits --model convnet --width 2
    flags: expected a flag of --model convnet (--pool, --dtype), got --width, which is
digits --model resnet20 --width -1
    width: expected more than 0, at most 100, got -1.0.
digits --model resnet20 --width 1e9
    width: expected more than 0, at most 100, got 1000000000.0.
digits --model general-cnn --width -1 --neuron lif
    width: expected more than 0, at most 100, got -1.0.
digits --model general-cnn --dtype bfloat16
    flags: expected a flag of --model general-cnn (--width, --binarise), got --dtype
digits --model general-cnn --norm-groups 2 --neuron lif
    norm_groups: expected 1 for a General SNN, which has no norms, got 2.
digits --model resnet20 --residual none
    flags: expected one of plain, sew, ms after --residual, got 'none'. --help explains
digits --model resnet20 --remat all
    flags: expected one of none, blocks after --remat, got 'all'. --help explains it.
digits --model resnet20 --dtype float16
    flags: expected one of float32, bfloat16 after --dtype, got 'float16'. --help
digits --model general-cnn --binarise straight-through --neuron relu
    binarise: expected bernoulli for --neuron relu: it needs no spikes, got
digits --model dense
    model: expected a network over images, got dense, which is over sequences.
digits --neuron lfi
    flags: expected --neuron mt-parallel, mt-cascade, i-lif, lif, plif, if, alif, relu
digits --neuron lif --num-thresholds 3
    flags: expected a flag of --neuron lif (--surrogate), got --num-thresholds, which is
digits --neuron relu --time-steps 4
    time_steps: expected 1 for --neuron relu: it has no state, got 4.
digits --num-thresholds 0
    num_thresholds: expected 1 to 64, got 0.
digits --num-thresholds 3000
    num_thresholds: expected 1 to 64, got 3000.
digits --time-steps 0
    time_steps: expected 1 to 10000, got 0.
digits --time-steps 2
    time_steps: expected one --neuron with it, got 2 for all five networks, which have
digits --time-steps 1000000000 --neuron lif
    time_steps: expected 1 to 10000, got 1000000000.
digits --loss mse
    flags: expected one of rate, tet after --loss, got 'mse'. --help explains it.
digits --loss tet
    loss: expected rate for one time step, where losses are equal, got tet.
digits --label-smoothing 1
    label_smoothing: expected 0 <= p < 1, got 1.0.
digits --workers -1
    workers: expected 0 to 1000, got -1.
digits --fsdp 0
    fsdp: expected at least 1, got 0.
digits --fsdp 3 --neuron lif
    fsdp: expected a divisor of the 8 device(s), got 3. Take 1 or 2 or 4 or 8.
digits --profile yes
    flags: expected --NAME before each value, got yes. --help lists them.
digits --coordinator-address 10.0.0.1
    coordinator_address: expected HOST:PORT with --num-processes and --process-id, or
digits --coordinator-address h:99999 --num-processes 2 --process-id 0
    coordinator_address: expected a port up to 65535, got 'h:99999'.
digits --num-processes 2
    coordinator_address: expected HOST:PORT with --num-processes and --process-id, or
digits --process-id 1
    coordinator_address: expected HOST:PORT with --num-processes and --process-id, or
digits --coordinator-address h:1 --num-processes 2 --process-id 2
    process_id: expected 0 to 1, got 2.
digits --coordinator-address h:1 --num-processes 0 --process-id 0
    num_processes: expected at least 1, got 0.
digits --coordinator-address auto --num-processes 2
    coordinator_address: expected HOST:PORT with --num-processes and --process-id, or
digits --join-timeout 0
    join_timeout: expected 1 to 86400 seconds, got 0.
digits --batc 3
    flags: expected those of this script, got --batc. Did you mean --batch-size?
digits --learning-rat 3
    flags: expected those of this script, got --learning-rat. Did you mean
digits --zzz
    flags: expected those of this script, got --zzz. --help lists them.
digits runs/one
    flags: expected --NAME before each value, got runs/one. --help lists them.
digits --neuron
    flags: expected one of mt-parallel, mt-cascade, i-lif, lif, plif, if, alif, relu
digits --model
    flags: expected one of resnet18, resnet19, resnet20, resnet18-imagenet, resnet34,
digits --steps 3 --steps=4
    flags: expected each flag once, got --steps twice. Take one of them.
digits --epochs 1e12 --neuron lif
    epochs: expected more than 0, at most a million, got 1000000000000.0.
cifar10 --widht 2
    flags: expected those of this script, got --widht. Did you mean --width?
cifar10 --model gru --neuron relu
    model: expected a network over images, got gru, which is over sequences.
cifar10 --pool avg
    pool: expected a network for ImageNet, those for CIFAR do not pool, got 'avg' for
cifar10 --model convnet --width 2
    flags: expected a flag of --model convnet (--pool, --dtype), got --width, which is
cifar10
    cifar10: expected one prepared set
cifar10 --data-dir nowhere
    cifar10: expected one prepared set in nowhere, got none. Run: python -m
cifar10 --data imagenet
    data: expected digits, fake, tiny_imagenet, folder or a TFDS set, got 'imagenet'.
cifar10 --data mnist_corrupted
    mnist_corrupted: expected one prepared set
cifar10 --batch-size 1e3
    flags: expected an integer after --batch-size, got '1e3'. --help explains it.
cifar10 --stream x.npz
    flags: expected those of this script, got --stream. --help lists
cifar10 resnet19
    recipe: expected one of mt-resnet20, mt-whitened, lif-whitened, relu-whitened,
cifar100 resnet19
    flags: expected --NAME before each value, got resnet19. --help lists them.
cifar100 --data-dir empty
    cifar100: expected one prepared set in empty, got none. Run: python -m
cifar100 --save-every 1.5
    flags: expected an integer after --save-every, got '1.5'. --help explains it.
tinyimagenet --data-dir empty
    tiny_imagenet: expected tiny-imagenet-200.zip or one zip of its layout, got
tinyimagenet --data-dir file
    tiny_imagenet: expected tiny-imagenet-200.zip or one zip of its layout, got
tinyimagenet --norm-groups 2
    norm_groups: expected 1 for a General SNN, which has no norms, got 2.
tinyimagenet --num-thresholds 2
    flags: expected a flag of --neuron lif (--surrogate), got --num-thresholds, which is
tinyimagenet --residual ms
    flags: expected a flag of --model general-cnn (--width, --binarise), got --residual
imagenet resnet34
    recipe: expected plan or one of mt-resnet34, lif-resnet34, relu-resnet34,
imagenet plan resnet34
    recipe: expected plan or one of mt-resnet34, lif-resnet34, relu-resnet34,
imagenet plan --topology v5e:3x3
    topology: expected a slice that v5e has, got 'v5e:3x3'. Take 1x1, 2x2, 2x4, 4x4,
imagenet plan --topology v9:2x2
    topology: expected a chip (v4, v5e, v5p, v6e) and a shape, such as v5e:16x16, got
imagenet plan --topology v5e
    topology: expected a chip (v4, v5e, v5p, v6e) and a shape, such as v5e:16x16, got
imagenet plan --data tiny_imagenet
    flags: expected those of this script, got --data. --help lists them.
imagenet plan --image-size None
    flags: expected an integer after --image-size, got 'None'. --help explains it.
imagenet plan --image-size 0
    image_size: expected 1 to 10000, got 0.
imagenet plan --image-siz 64
    flags: expected those of this script, got --image-siz. Did you mean --image-size?
imagenet plan --compare yes
    flags: expected --NAME before each value, got yes. --help lists them.
imagenet lif-resnet34 --num-thresholds 2
    flags: expected a flag of --neuron lif (--surrogate), got --num-thresholds, which is
imagenet relu-resnet34 --time-steps 2
    time_steps: expected 1 for --neuron relu: it has no state, got 2.
imagenet --data-dir nowhere
    imagenet2012: expected one prepared set in nowhere, got none. Run: python -m
imagenet --topology v5e:2x2
    flags: expected those of this script, got --topology. --help lists them.
imagenet --plan
    flags: expected those of this script, got --plan. --help lists them.
general --network lif
    flags: expected one of all, bernoulli, straight-through, multi-threshold, relu,
general --num-thresholds 3
    flags: expected a flag of --neuron lif (--surrogate), got --num-thresholds, which is
general --time-steps 4
    time_steps: expected no such flag, as --network all sets it, got 4.
general --neuron mt-parallel
    neuron: expected no such flag, as --network all sets it, got mt-parallel.
general --binarise straight-through
    binarise: expected no such flag, as --network all sets it, got straight-through.
general --model convnet
    model: expected general-cnn or general-lstm, got convnet.
general --model general-plain --network relu
    model: expected general-cnn or general-lstm, got general-plain.
general --model general-lstm
    model: expected no such flag, as --network all sets it, got general-lstm.
general --data-dir empty
    cifar10: expected one prepared set in empty, got none. Run: python -m
convert --bits 0
    QuantReLU: expected 1 to 8 bits, got 0.
convert --bits 9
    QuantReLU: expected 1 to 8 bits, got 9.
convert --noise -1
    QuantReLU: expected noise of 0 or more, got -1.0.
convert --noise nan
    QuantReLU: expected noise of 0 or more, got nan.
convert --num-thresholds 3000
    num_thresholds: expected 1 to 64, got 3000.
convert --quant-epochs -1
    quant_epochs: expected more than 0, got -1.0.
convert --quant-learning-rate 0
    quant_learning_rate: expected more than 0, got 0.0.
convert --max-steps 0
    max_steps: expected 1 to 10000, got 0.
convert --max-steps 100000
    max_steps: expected 1 to 10000, got 100000.
convert --test-images 0
    test_images: expected at least 1, got 0.
convert --neuron lif
    flags: expected one of relu after --neuron, got 'lif'. --help explains it.
convert --time-steps 4
    time_steps: expected 1 for --neuron relu: it has no state, got 4.
convert --relu nowhere
    read: expected a folder with the config.json of a run, got nowhere.
convert --sweep yes
    flags: expected --NAME before each value, got yes. --help lists them.
convert --quant-steps 3
    flags: expected those of this script, got --quant-steps. Did you mean --quant-epoch
convert --model resnet20 --pool avg
    pool: expected a network for ImageNet, those for CIFAR do not pool, got 'avg' for
dvs_cifar10 --data empty
    empty: expected recordings (.aedat, .aedat4, .raw, .dat, .bin, .npz, .npy, .txt,
dvs_cifar10 --data-dir nowhere
    cifar10-dvs: expected cifar10-dvs, nmnist, dvs128-gesture, ncaltech101 or a
dvs_cifar10 --data nmnist --data-dir empty
    nmnist: expected cifar10-dvs, nmnist, dvs128-gesture, ncaltech101 or a
dvs_cifar10 --side 0
    side: expected 1 to 10000, got 0.
dvs_cifar10 --side big
    flags: expected an integer after --side, got 'big'. --help explains it.
dvs_cifar10 --window-ms 0
    window_ms: expected 0.001 to 1e9, got 0.0.
dvs_cifar10 --drop 1
    drop: expected 0 <= p < 1, got 1.0.
dvs_cifar10 --noise -1
    noise: expected 0 to 100, got -1.0.
dvs_cifar10 --noise inf
    noise: expected a finite number, got inf.
dvs_cifar10 --frames count
    flags: expected one of number, duration, voxel, surface after --frames, got
dvs_cifar10 --augment crop-flip
    flags: expected one of none, roll, flip-roll after --augment, got 'crop-flip'.
dvs_cifar10 --stream x.npz
    stream: expected a network of --frames duration, as a stream has no end after which
dvs_cifar10 --stream x.npz --frames duration
    cifar10-dvs: expected cifar10-dvs, nmnist, dvs128-gesture, ncaltech101 or a
dvs_cifar10 --image-size 4
    flags: expected those of this script, got --image-size. --help lists
dvs_cifar10 --neuron relu
    time_steps: expected 1 for --neuron relu: it has no state, got 10.
dvs_cifar10 --stream '' --frames duration
    flags: expected a value after each flag, got ''.
speech --model resnet20 --neuron lif
    model: expected a network over sequences, got resnet20, which is over images.
selfcheck --data-dir empty
    flags: expected those of this script, got --data-dir. --help lists them.
prepare
    data: expected digits, fake, tiny_imagenet, folder or a TFDS set, got ''. See
prepare minst
    data: expected digits, fake, tiny_imagenet, folder or a TFDS set, got 'minst'. Did
prepare ''
    flags: expected a value after each flag, got ''.
prepare cifar10 mnist
    flags: expected --NAME before each value, got mnist. --help lists them.
prepare cifar10 --datadir x
    flags: expected those of this script, got --datadir. Did you mean --data-dir?
prepare cifar10 --data-dir
    flags: expected a path after --data-dir, got none. --help explains it.
prepare folder
    prepare folder: expected a TFDS set, got one that needs no preparing. Train: --data
prepare tiny_imagenet
    prepare tiny_imagenet: expected a TFDS set, got one that needs no preparing. Train:
prepare digits
    prepare digits: expected a TFDS set, got one that needs no preparing. Train: --data
prepare fake
    prepare fake: expected a TFDS set, got one that needs no preparing. Train: --data
prepare cifar10
    prepare cifar10: expected TensorFlow, which preparing needs (training does not),
"""
LINES = TABLE.strip().splitlines()
ROWS = list(zip(LINES[::2], map(str.strip, LINES[1::2]), strict=True))
SCRIPTS = "digits cifar10 cifar100 tinyimagenet imagenet general convert dvs_cifar10"
SCRIPTS += " speech selfcheck"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to run in, with a file and an empty folder, and no data sets."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    return tmp_path


@pytest.mark.parametrize(("line", "text"), ROWS, ids=[line for line, _ in ROWS])
def test_a_wrong_command_is_one_line(folder, monkeypatch, capsys, line, text):
    name, *words = shlex.split(line)
    if "--workdir" not in words and name != "prepare":
        words += ["--workdir", "new"]
    script = importlib.import_module(f"experiments.{name}")
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, *words, script=script)
    out, err = capsys.readouterr()
    assert exit.value.code == 1 and out == ""
    assert text in err and err.count("\n") == 1 and "Traceback" not in err
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == ["empty", "file"] and not list((folder / "empty").iterdir())


def test_the_table_has_every_script():
    named = {line.split()[0] for line, _ in ROWS}
    assert named == {*SCRIPTS.split(), "prepare"} and len(ROWS) >= 120
