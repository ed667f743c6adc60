"""Sets of plain files, written here, small: their labels, and what is refused."""

import io
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from spikejax.data.augment import center_crop
from spikejax.data.files import file_reader
from spikejax.data.images import PHOTOGRAPHS, eval_batches, load, train_batches

WNIDS = ("n02", "n01", "n03")  # not in order, as in the real wnids.txt
WORDS = "n01\tgoldfish, Carassius\nn02\tpizza\nn03\talp\nn99\tnot in the set\n"


def jpeg(grey, size=(64, 64)):
    file = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(file, "JPEG")
    return file.getvalue()


def tiny_files(root="tiny-imagenet-200/"):
    """Member -> content; the grey level is 60 times the label, plus the number."""
    files = {"wnids.txt": "\n".join(WNIDS) + "\n", "words.txt": WORDS}
    annotations = []
    for label, wnid in enumerate(sorted(WNIDS)):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = f"{wnid}_0.JPEG\t0\t0\t62\t62\n"
        for i in range(4):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(60 * label + i)
        files[f"val/images/val_{label}.JPEG"] = jpeg(60 * label + 9)
        annotations.append(f"val_{label}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    files["val/val_annotations.txt"] = "".join(reversed(annotations))
    files["test/images/test_0.JPEG"] = jpeg(255)
    return {root + name: content for name, content in files.items()}


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def tiny(tmp_path):
    write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_files())
    return tmp_path


def folder(root, held_out="val"):
    for split, count in (("train", 5), (held_out, 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                file = root / split / name / f"{i}.{'JPEG' if i else 'jpg'}"
                file.write_bytes(jpeg(60 * label + i, (20 + i, 30 - i)))
            (root / split / name / "README.txt").write_text("not an image")
    return root


def refused(match, name, data_dir):
    with pytest.raises(ValueError, match=match) as caught:
        train_batches(load(name, data_dir).train, 2, seed=0, crop=center_crop(8))
    assert "\n" not in str(caught.value)


# Tiny-ImageNet


def test_tiny_imagenet_is_read_from_its_zip(tiny):
    found = load("tiny_imagenet", tiny)
    assert found.shape == (64, 64, 3) and found.num_classes == 3
    assert found.class_names == ("goldfish", "pizza", "alp")
    assert (len(found.train), len(found.test)) == (12, 3)
    for source, numbers in ((found.train, range(4)), (found.test, [9])):
        batch = source.take(range(len(source)))
        levels = sorted(batch["image"][:, 5, 5, 0])
        assert levels == [60 * label + i for label in range(3) for i in numbers]
        assert np.array_equal(batch["image"][:, 0, 0, 0] // 60, batch["label"])
    assert np.allclose(found.mean, 61.5 / 255)


@pytest.mark.parametrize("root", ["", "a/b/", "tiny-imagenet-10/"])
def test_any_single_zip_of_the_layout_will_do(tmp_path, root):
    write_zip(tmp_path / "pets.zip", tiny_files(root))
    found = load("tiny_imagenet", tmp_path)
    assert len(found.train) == 12 and len(found.test) == 3


def test_the_zip_of_the_official_name_comes_first(tiny):
    (tiny / "another.zip").write_bytes(b"")
    assert len(load("tiny_imagenet", tiny).train) == 12


def test_the_records_of_a_zip_go_to_another_process(tiny):
    train = load("tiny_imagenet", tiny).train
    first = train.take([0])["image"]  # the zip is open now
    again = pickle.loads(pickle.dumps(train))
    assert np.array_equal(again.take([0])["image"], first)
    assert len(pickle.dumps(train)) < 2000  # names, not images


def test_tiny_imagenet_without_a_zip_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(r"got tiny.* Give --data-dir, or download http", "tiny_imagenet", None)
    refused(rf"layout, got {tmp_path}/tin.*No such file", "tiny_imagenet", tmp_path)
    for name in ("a.zip", "b.zip"):
        (tmp_path / name).touch()
    refused(r"or one zip of its layout, got", "tiny_imagenet", tmp_path)


def test_a_zip_of_another_layout_is_refused(tmp_path):
    write_zip(tmp_path / "a.zip", {"train/cat/1.JPEG": b""})
    refused(r"got .*a\.zip: .*no item named 'wnids.txt'", "tiny_imagenet", tmp_path)


def test_a_truncated_zip_is_refused(tiny):
    path = tiny / "tiny-imagenet-200.zip"
    path.write_bytes(path.read_bytes()[:-40])
    refused(rf"layout, got {path}: File is not a zip", "tiny_imagenet", tiny)


def test_a_flipped_byte_in_a_zip_names_the_file(tmp_path):
    stored = tmp_path / "a.zip"
    with zipfile.ZipFile(stored, "w") as archive:
        for name, content in tiny_files().items():
            archive.writestr(name, content)
    content = bytearray(stored.read_bytes())
    start = content.index(b"train/n03/images/n03_2.JPEG")
    content[start + 200] ^= 1
    stored.write_bytes(content)
    refused(
        r"train in .*a\.zip: expected readable.* Bad CRC.*/n03_2\.JPEG.*Copy it again",
        "tiny_imagenet",
        tmp_path,
    )


def test_a_damaged_image_in_a_zip_is_named(tmp_path):
    files = tiny_files()
    name = "tiny-imagenet-200/train/n03/images/n03_2.JPEG"
    write_zip(tmp_path / "a.zip", files | {name: files[name][:-20]})
    refused(
        rf"^tiny_imagenet, train in .*a\.zip: .* at {name}, got: .*truncated",
        "tiny_imagenet",
        tmp_path,
    )


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("val/val_annotations.txt", "val_0.JPEG n01", "got .*a.zip: list index out"),
        ("wnids.txt", b"\xff\xfe", "got .*a.zip: 'utf-8' codec can't"),
        ("wnids.txt", "n02\nn01\nn03\nn04\n", "got none of the class n04"),
        ("wnids.txt", "n02\nn01\nn0", "got the class n03 too"),
        ("words.txt", b"0" * (2**24 + 1), "words.txt has more than 16777216 bytes"),
    ],
)
def test_damaged_texts_in_a_zip_are_refused(tmp_path, name, content, match):
    write_zip(tmp_path / "a.zip", tiny_files("") | {name: content})
    refused(match, "tiny_imagenet", tmp_path)


def test_a_text_of_a_zip_with_a_flipped_byte_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", tiny_files(""))
    content = bytearray(path.read_bytes())
    content[content.index(b"val/val_annotations.txt") + 30] ^= 1
    path.write_bytes(content)
    refused(r"got .*a\.zip: ", "tiny_imagenet", tmp_path)


def test_images_without_a_known_class_are_refused(tmp_path):
    files = tiny_files("")
    files["train/n07/images/n07_0.JPEG"] = jpeg(1)
    write_zip(tmp_path / "a.zip", files)
    refused(r"a\.zip/train/CLASS, got the class n07 too", "tiny_imagenet", tmp_path)


def test_a_missing_test_image_is_noticed(tmp_path):
    files = tiny_files("")
    del files["val/images/val_1.JPEG"]
    write_zip(tmp_path / "a.zip", files)
    refused(r"no item named 'val/images/val_1\.JPEG'", "tiny_imagenet", tmp_path)


# Folders


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_a_folder_of_photographs_is_a_set(tmp_path, held_out):
    found = load("folder", folder(tmp_path, held_out))
    assert found.shape == (None, None, 3) and found.class_names == ("cat", "dog")
    assert (found.mean, found.std) == PHOTOGRAPHS
    assert (len(found.train), len(found.test)) == (10, 4)
    batch = next(iter(eval_batches(found.train, 10, crop=center_crop(8))))
    assert batch["image"].shape == (10, 8, 8, 3)
    assert list(batch["image"][:, 0, 0, 0]) == [*range(5), *range(60, 65)]
    assert list(batch["label"]) == [0] * 5 + [1] * 5


def test_the_path_of_a_folder_is_its_set(tmp_path, monkeypatch):
    folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    found = load("photos/")
    assert found.class_names == ("cat", "dog") and len(found.train) == 10
    refused(r"images .* in nowhere/train/CLASS, got none", "nowhere/", None)
    # Without a slash it is a name, which TFDS does not know; "toto" it has.
    refused(r"got 'photos'\. For the images in that folder: photos/", "photos", None)
    refused(r"without --data-dir, got photos/ and data\. Leave", "photos/", "data")


def test_a_class_may_have_no_test_image(tmp_path):
    folder(tmp_path)
    for file in (tmp_path / "val/dog").iterdir():
        file.unlink()
    assert len(load("folder", tmp_path).test) == 2


def test_names_of_files_may_be_any(tmp_path):
    folder(tmp_path)
    (tmp_path / "train/cat/été 日本.JPEG").write_bytes(jpeg(33, (9, 9)))
    train = load("folder", tmp_path).train
    assert 33 in train.take(range(11), center_crop(4))["image"]


def test_hidden_files_and_folders_without_images_do_not_count(tmp_path):
    folder(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "cat/._1.JPEG").write_bytes(b"of macOS")
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
        (tmp_path / split / ".ipynb_checkpoints/1.JPEG").write_bytes(jpeg(1))
        (tmp_path / split / "empty").mkdir()
    found = load("folder", tmp_path)
    assert found.class_names == ("cat", "dog")
    assert (len(found.train), len(found.test)) == (10, 4)


def test_a_folder_of_another_layout_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(r"images .* in train/CLASS, got none\. Give --data-dir", "folder", None)
    refused(rf"images .* in {tmp_path}/train/CLASS, got none", "folder", tmp_path)
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "train/cat/1.JPEG").write_bytes(jpeg(1))
    refused(rf"images .* in {tmp_path}/val/CLASS, got none", "folder", tmp_path)


def test_a_class_to_test_on_that_is_not_trained_on_is_refused(tmp_path):
    (folder(tmp_path) / "val/owl").mkdir()
    (tmp_path / "val/owl/1.JPEG").write_bytes(jpeg(1))
    refused(rf"{tmp_path}/val/CLASS, got the class owl too", "folder", tmp_path)


def test_a_file_that_went_away_is_named(tmp_path):
    train = load("folder", folder(tmp_path)).train
    (tmp_path / "train/cat/1.JPEG").unlink()
    with pytest.raises(
        ValueError, match=r"readable files.* No such file.*train/cat/1\.JPEG"
    ):
        train.take(range(10), center_crop(4))


def test_a_damaged_file_is_named(tmp_path):
    found = load("folder", folder(tmp_path))
    file = tmp_path / "val/dog/1.JPEG"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"^folder, val in .* at val/dog/1\.JPEG, "):
        found.test.take(range(4), center_crop(4))


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def png_of_size(width, height):
    """A PNG whose header asks for so many pixels; its data end after one."""
    png = bytearray(encoded(np.zeros((1, 1), np.uint8)))
    struct.pack_into(">II", png, 16, width, height)
    struct.pack_into(">I", png, 29, zlib.crc32(png[12:29]))
    return bytes(png)


def test_sixteen_bits_are_read_as_eight(tmp_path):
    folder(tmp_path)
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for k, pixels in enumerate((grey, grey.astype(np.uint16) * 257)):
        (tmp_path / f"train/cat/1{k}.png").write_bytes(encoded(pixels))
    train = load("folder", tmp_path).train
    rows = [n for n in range(len(train)) if "png" in train.records([n])[0].place]
    for image in train.take(rows, center_crop(8))["image"]:
        expected = np.asarray(
            center_crop(8)(Image.fromarray(grey).convert("RGB"), None)
        )
        assert len(rows) == 2 and np.array_equal(image, expected)


@pytest.mark.parametrize(
    "content, match",
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
        (encoded(np.ones((9, 9), np.float32), "TIFF"), "cannot identify"),
        (png_of_size(2**13, 2**13 + 1), r"more than 67108864 pixels: \(8192, 8193"),
        (png_of_size(2**14, 2**14), "exceeds limit .* pixels"),
    ],
)
def test_other_formats_and_bombs_are_refused(tmp_path, content, match):
    (folder(tmp_path) / "train/cat/0.png").write_bytes(content)
    train = load("folder", tmp_path).train
    match = rf"image \(JPEG, PNG, GIF, BMP\) at train/cat/0.png, got: .*{match}"
    with pytest.raises(ValueError, match=match) as caught:
        train.take([0, 1], center_crop(8))
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_zip_of_it_hold_the_same(tmp_path):
    root = folder(tmp_path / "files")
    names = [str(p.relative_to(root)) for p in sorted(root.glob("train/*/*.J*"))]
    files = {name: (root / name).read_bytes() for name in names}
    zipped = file_reader(write_zip(tmp_path / "a.zip", files), names, [3] * 8)
    plain = file_reader(root, names, [3] * 8)
    for a, b in zip(zipped([0, 5]), plain([0, 5]), strict=True):
        assert a == b and a.label == 3


# The real thing


def test_ten_classes_of_tiny_imagenet(data_dir):
    path = data_dir.parent / "tiny_imagenet_10"
    if not path.is_dir():
        pytest.skip(f"no Tiny-ImageNet: {path} is not there")
    found = load("tiny_imagenet", path)
    assert (len(found.train), len(found.test)) == (5000, 500)
    assert found.class_names[:3] == ("goldfish", "king penguin", "Persian cat")
    assert found.num_classes == 10
    assert np.array_equal(np.bincount(found.test.cached().labels), [50] * 10)
    batch = found.train.take(range(0, 5000, 25))  # some of them are grey
    assert batch["image"].shape == (200, 64, 64, 3)
    colour = batch["image"].mean((1, 2))
    means = [colour[batch["label"] == k].mean(0) for k in (0, 9)]
    assert means[0][0] > means[0][2] + 30  # goldfish are gold
    assert means[1][2] > means[1][0]  # alps are not
