"""Data modules: the test images stay untouched, splits follow their seed, bad files are named with what to do."""

import functools
import gzip
import hashlib
import http.server
import threading

import pytest
import torch

from lightning_grow import data as lgd


def idx_bytes(tensor: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, tensor.ndim]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return header + tensor.to(torch.uint8).numpy().tobytes()


def small_fashion(num_train=40, num_test=20, size=6):
    """Four files in the published format, of random pixels and balanced labels."""
    generator = torch.Generator().manual_seed(0)
    files = {}
    for part, num in (("train", num_train), ("t10k", num_test)):
        images = torch.randint(0, 256, (num, size, size), generator=generator)
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(images))
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(torch.arange(num) % 10))
    return files


@pytest.fixture
def published(monkeypatch):
    """Small files which pass for the published ones."""
    files = small_fashion()
    monkeypatch.setattr(lgd, "FASHION_MNIST_SHA256", {n: hashlib.sha256(b).hexdigest() for n, b in files.items()})
    return files


@pytest.fixture
def mirror(tmp_path):
    """A server on this machine, and the folder that it serves."""
    folder = tmp_path / "mirror"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()
        thread.join()


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("shape", [(0,), (7,), (3, 2), (2, 4, 5), (2, 1, 3, 2)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reading_an_idx_file_gives_back_what_was_written(tmp_path, shape, suffix):
    tensor = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    path = tmp_path / f"some-idx{suffix}"
    path.write_bytes(gzip.compress(idx_bytes(tensor)) if suffix else idx_bytes(tensor))
    assert torch.equal(lgd.read_idx(path), tensor)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("missing", None, "There is no data file"),
        ("page.html", b"<html>404</html>", "is not an IDX file"),
        ("empty", b"", "is not an IDX file"),
        ("floats", bytes([0, 0, 0x0D, 1, 0, 0, 0, 0]), "only unsigned bytes"),
        ("short", bytes([0, 0, 8, 1, 0, 0, 0, 9, 1]), r"promises \(9,\), that is 9 bytes, but 1 follow"),
        ("long", bytes([0, 0, 8, 1, 0, 0, 0, 1, 1, 1]), "damaged"),
        ("headless", bytes([0, 0, 8, 3, 0, 0, 0, 1]), "damaged"),
        ("cut.gz", gzip.compress(bytes(1000), mtime=0)[:-12], "damaged.*Delete it"),
        ("not.gz", b"hello", "damaged"),
        ("flipped.gz", gzip.compress(bytes(1000), mtime=0)[:-8] + bytes(8), "damaged"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, name, content, match):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(lgd.DataFileError, match=match) as caught:
        lgd.read_idx(path)
    assert str(path) in str(caught.value)


def test_digits_split_into_disjoint_parts_and_only_validation_follows_the_seed():
    modules = [lgd.Digits(seed=seed) for seed in (0, 0, 1)]
    for module in modules:
        module.setup("fit")
    first, same, other = ([m.splits[s].images for s in ("train", "val", "test")] for m in modules)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert torch.equal(first[2], other[2])
    assert not torch.equal(first[1], other[1])
    everything = torch.cat(first).flatten(1)
    assert len(everything) == 1797
    assert len(everything.unique(dim=0)) == 1797


def test_digits_keep_each_class_in_each_split():
    module = lgd.Digits()
    module.setup("fit")
    for split in module.splits.values():
        share = torch.bincount(split.labels, minlength=10) / len(split)
        torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.02, rtol=0)


def test_images_are_normalised_by_the_training_images():
    module = lgd.Digits(batch_size=5000)
    module.setup("fit")
    images, _ = next(iter(module.train_dataloader()))
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert images.shape == (1221, 1, 8, 8)


def test_a_batch_equals_its_images_one_by_one():
    split = lgd.ImageDataset(torch.arange(12).reshape(3, 1, 2, 2), torch.arange(3), mean=2.0, std=4.0)
    images, labels = split.__getitems__([2, 0])
    torch.testing.assert_close(images, torch.stack([split[2][0], split[0][0]]))
    assert labels.tolist() == [2, 0]


def test_only_training_batches_are_shuffled():
    module = lgd.Digits(batch_size=64)
    module.setup("fit")
    for loader, split in ((module.val_dataloader(), "val"), (module.test_dataloader(), "test")):
        assert torch.equal(torch.cat([y for _, y in loader]), module.splits[split].labels)
    assert not torch.equal(torch.cat([y for _, y in module.train_dataloader()]), module.splits["train"].labels)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lgd.Digits(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: lgd.Digits(val_fraction=1.0), "val_fraction must lie between 0 and 1, got 1.0"),
        (lambda: lgd.FashionMNIST(num_train=0), "num_train must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("unpacked", [False, True])
def test_fashion_mnist_reads_the_four_files_packed_or_not(tmp_path, published, unpacked):
    files = {n.removesuffix(".gz"): gzip.decompress(b) for n, b in published.items()} if unpacked else published
    write(tmp_path / "fashion", files)
    module = lgd.FashionMNIST(str(tmp_path / "fashion"), batch_size=8, val_fraction=0.25)
    module.prepare_data()
    module.setup("fit")
    assert {name: len(split) for name, split in module.splits.items()} == {"train": 30, "val": 10, "test": 20}
    images, labels = next(iter(module.test_dataloader()))
    assert images.shape == (8, 1, 6, 6)
    assert labels.tolist() == list(range(8))


def test_fewer_training_images_leave_the_test_images_alone(tmp_path, published):
    write(tmp_path / "fashion", published)
    module = lgd.FashionMNIST(str(tmp_path / "fashion"), num_train=20, val_fraction=0.5)
    module.setup("fit")
    assert {name: len(split) for name, split in module.splits.items()} == {"train": 10, "val": 10, "test": 20}


def test_a_missing_file_is_named_before_training_starts(tmp_path, published):
    published.pop("t10k-labels-idx1-ubyte.gz")
    write(tmp_path / "fashion", published)
    module = lgd.FashionMNIST(str(tmp_path / "fashion"))
    with pytest.raises(lgd.DataFileError, match=r"There is no 't10k-labels-idx1-ubyte.gz' in .*data_dir.*download"):
        module.prepare_data()


def test_a_file_with_another_checksum_is_refused_unless_it_is_meant(tmp_path, published):
    published["t10k-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(torch.full((20,), 3)))
    write(tmp_path / "fashion", published)
    with pytest.raises(lgd.DataFileError, match=r"t10k-labels.*expected SHA-256.*found.*verify=False"):
        lgd.FashionMNIST(str(tmp_path / "fashion")).setup("fit")
    module = lgd.FashionMNIST(str(tmp_path / "fashion"), verify=False, val_fraction=0.25)
    module.setup("fit")
    assert module.splits["test"].labels.tolist() == [3] * 20


def test_images_without_as_many_labels_are_refused(tmp_path, published):
    published["train-labels-idx1-ubyte.gz"] = published["t10k-labels-idx1-ubyte.gz"]
    write(tmp_path / "fashion", published)
    module = lgd.FashionMNIST(str(tmp_path / "fashion"), verify=False, val_fraction=0.25)
    with pytest.raises(lgd.DataFileError, match=r"do not belong together.*\(40, 6, 6\) and \(20,\)"):
        module.setup("fit")


def test_missing_files_are_downloaded_once_with_progress(tmp_path, published, mirror, capsys):
    address, served = mirror
    write(served, published)
    folder = tmp_path / "fashion"
    for _ in range(2):
        module = lgd.FashionMNIST(str(folder), download=True, mirrors=[address])
        module.prepare_data()
        write(served, dict.fromkeys(published, b"changed since"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == published
    assert "train-images-idx3-ubyte.gz" in capsys.readouterr().err


def test_a_damaged_download_falls_back_to_the_next_mirror(tmp_path, published, mirror):
    address, served = mirror
    write(served / "bad", {name: content[:-1] for name, content in published.items()})
    write(served / "good", published)
    module = lgd.FashionMNIST(
        str(tmp_path / "fashion"), download=True, mirrors=[f"{address}none/", f"{address}bad/", f"{address}good/"]
    )
    module.prepare_data()
    assert {path.name for path in (tmp_path / "fashion").iterdir()} == set(published)


def test_a_failed_download_says_what_was_tried_and_leaves_nothing(tmp_path, published, mirror):
    address, served = mirror
    write(served / "bad", dict.fromkeys(published, b"<html>"))
    module = lgd.FashionMNIST(str(tmp_path / "fashion"), download=True, mirrors=[f"{address}none/", f"{address}bad/"])
    with pytest.raises(lgd.DataFileError, match=r"Could not download 'train-images-idx3-ubyte.gz'") as caught:
        module.prepare_data()
    message = str(caught.value)
    assert "404" in message
    assert "does not have the published checksum" in message
    assert "put it into" in message
    assert list((tmp_path / "fashion").iterdir()) == []


def test_the_published_checksums_are_of_sha256():
    assert all(len(digest) == 64 and int(digest, 16) for digest in lgd.FASHION_MNIST_SHA256.values())
