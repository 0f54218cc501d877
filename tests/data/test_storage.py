"""Shards far away: the same bytes as from disk, whatever the way there does, and a sentence where it ends."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mmoe.addresses import join_address, with_suffix
from mmoe.data.config import DataConfig, SourceConfig
from mmoe.data.index.shard_index import PLANNED, SegmentTable, ShardIndex
from mmoe.data.index.shards import read_member
from mmoe.data.load.decode import SampleLoader
from mmoe.data.load.stream import Stream
from mmoe.data.plan.planner import DocumentRef
from mmoe.data.plan.prepared import PreparedSources
from mmoe.data.storage import store
from mmoe.data.storage.store import Storage, StorageConfig, StorageError
from mmoe.errors import DataError
from mmoe.schema.manifest import SourceManifest
from mmoe.tokenizers.actions import ActionConfig
from mmoe.tokenizers.bundle import TokenizersConfig
from mmoe.tokenizers.vision import VisionConfig
from tests.data.servers import CREDENTIALS, FaultyServer, certificate, free_port, moto_server, upload
from tests.data.synthetic import MAKERS, fit_codec, write_source

CONTENT = np.random.default_rng(0).bytes(50_000)
SCHEMES = ("http", "s3", "gs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    for number, (name, make) in enumerate(MAKERS.items()):
        rng = np.random.default_rng(number)
        write_source(root / name, {"train": [make(rng, f"{name}-{i}") for i in range(12)]})
    fit_codec(root / "codec.safetensors")
    return root


@pytest.fixture(scope="module")
def uploaded(folder):
    """The prepared sources in a bucket, reached as a user reaches his own: by the environment."""
    with pytest.MonkeyPatch.context() as patch, moto_server() as endpoint:
        for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint}).items():
            patch.setenv(name, value)
        yield upload(folder, "bucket", endpoint)


async def no_zonal_bucket(*_) -> bool:
    """What gcsfs would ask by gRPC, which the emulator does not speak."""
    return False


@pytest.fixture
def server(monkeypatch):
    found = FaultyServer()
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": found.address}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", found.address)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    monkeypatch.setattr("gcsfs.extended_gcsfs.ExtendedGcsFileSystem._is_zonal_bucket", no_zonal_bucket)
    found.files["/bucket/shard.tar"] = CONTENT
    yield found
    found.close()


def address(server: FaultyServer, scheme: str, name: str = "shard.tar") -> str:
    return f"{server.address}/bucket/{name}" if scheme == "http" else f"{scheme}://bucket/{name}"


def storage(**settings) -> Storage:
    return Storage(StorageConfig(**({"backoff_s": 0.01, "attempts": 4, "timeout_s": 5.0} | settings)))


def setup(root: str, folder, workers: int = 0, **settings):
    config = DataConfig(
        sources={name: SourceConfig(kind="text", shards=join_address(root, name)) for name in MAKERS},
        sequence_length=160,
        window_documents=20,
        workers=workers,
        storage=StorageConfig(**settings),
    )
    sources = PreparedSources(config)
    tokenizers = TokenizersConfig(
        vision=VisionConfig(patch=8, max_patches=12),
        audio=fit_codec(folder / "codec.safetensors"),
        action=ActionConfig(chunk=4),
    ).build(sources.manifests)
    return config, sources, tokenizers


def batches(root: str, folder, steps: int, **settings) -> tuple[list, Stream]:
    config, sources, tokenizers = setup(root, folder, **settings)
    stream = Stream(
        config,
        sources,
        tokenizers,
        seed=3,
        end=10**6,
        sequences=2,
        micro_sequences=1,
        group_sequences=1,
        label_weights=np.ones(7, np.float32),
    )
    return [batch for _, data in zip(range(steps), stream.steps()) for batch in data.batches], stream


def same(a, b) -> bool:
    """Whether two batches hold the same, field by field."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__ if name != "reads")
    return a == b


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_from_a_bucket_is_the_stream_from_disk(folder, uploaded, workers, tmp_path):
    expected, _ = batches(str(folder), folder, 8)
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        found, stream = batches(uploaded, folder, 8, workers=workers, cache_folder=cache)
        assert len(found) == 16 and all(same(a, b) for a, b in zip(expected, found, strict=True))
        assert not any(batch.quarantined for batch in found)
    assert stream.reads["retries"] == 0 and stream.reads["cache_hits"] > 0  # whoever did the reading
    assert not workers or stream.dataset.decoder.storage.stats.take()["cache_hits"] < stream.reads["cache_hits"]


class Rows(Dataset):
    """Documents by number, decoded wherever the loader decodes them."""

    def __init__(self, decoder: SampleLoader):
        self.decoder = decoder

    def __getitem__(self, row: int) -> np.ndarray:
        ref = DocumentRef(3, row // 7, row % 7, 0, 0, 1, False, True)
        self.decoder.prefetch([ref])
        return self.decoder(ref)[0].token_ids


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_open_connections_of_their_own(folder, uploaded, method):
    """The parent has read from the bucket: its event loop is there when the worker is forked, and is not used."""
    ours, theirs = (
        SampleLoader(sources.files("train"), tokenizers, "pyav", storage=sources.storage)
        for _, sources, tokenizers in (setup(str(folder), folder), setup(uploaded, folder))
    )
    rows = range(12)
    before = [Rows(theirs)[row] for row in rows]
    loader = DataLoader(
        Rows(theirs), sampler=rows, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=60
    )
    for row, mine, loaded in zip(rows, before, loader, strict=True):
        assert np.array_equal(Rows(ours)[row], mine) and np.array_equal(mine, np.asarray(loaded))
    assert np.array_equal(Rows(theirs)[0], before[0])  # and the parent's still works


def test_members_of_a_document_are_one_request(folder, uploaded):
    _, sources, tokenizers = setup(uploaded, folder)
    decoder = SampleLoader(sources.files("train"), tokenizers, "pyav", storage=sources.storage)
    index = decoder.index(3, 0)
    slices = int(index.row_segments(0)["slice"].max()) + 1
    assert index.member_offsets[1] > 3
    sources.storage.stats.take()
    decoder(DocumentRef(3, 0, 0, 0, 0, slices, False, True))
    assert sources.storage.stats.take()["requests"] == 1
    refs = [DocumentRef(3, 0, row, 0, 0, 1, False, True) for row in range(4)]
    decoder.prefetch(refs)
    requested = sources.storage.stats
    for ref in refs:
        decoder(ref)
    assert requested.take()["requests"] == 4
    text = [DocumentRef(0, 0, row, 0, 0, 1, False, True) for row in range(4)]
    decoder.index(0, 0)
    sources.storage.stats.take()
    decoder.prefetch(text)
    assert sources.storage.stats.take()["requests"] == 0  # the ids stand in the index


def test_a_bad_shard_is_said_when_its_part_is_decoded_and_a_dead_store_at_once(folder, server):
    for path in (folder / "clip").rglob("*.*"):
        server.files[f"/bucket/clip/{path.relative_to(folder / 'clip')}"] = path.read_bytes()
    root = f"{server.address}/bucket"
    config, _, tokenizers = setup(str(folder), folder)
    config = DataConfig(
        sources={"clip": SourceConfig(kind="text", shards=f"{root}/clip")},
        sequence_length=160,
        storage=StorageConfig(attempts=2, backoff_s=0.01),
    )
    sources = PreparedSources(config)
    server.files["/bucket/clip/train/shard-000001.tar"] += bytes(10240)
    decoder = SampleLoader(sources.files("train"), tokenizers, "pyav", storage=sources.storage)
    good, bad = (DocumentRef(0, shard, 0, 0, 0, 1, False, True) for shard in range(2))
    decoder.prefetch([bad, good, good])
    assert len(decoder(good)[0]) == len(decoder(good)[0]) > 0
    with pytest.raises(DataError, match="shard-000001.tar is not the tar its index describes") as caught:
        decoder(bad)
    assert not isinstance(caught.value, StorageError)
    server.always = 503
    with pytest.raises(StorageError, match="shard-000000.tar could not be read in 2 attempts.*so clip-0.* cannot"):
        decoder.prefetch([good])
        decoder(good)


def test_manifest_index_and_members_are_read_from_a_bucket(folder, uploaded):
    far, near = Storage(), folder / "clip"
    manifest = SourceManifest.load(f"{uploaded}/clip", far.read)
    assert manifest == SourceManifest.load(near)
    for shard in manifest.splits["train"].shards:
        tar = join_address(f"{uploaded}/clip", shard.path)
        index, local = ShardIndex.read(tar, far), ShardIndex.read(near / shard.path)
        table = SegmentTable.read(tar, far)
        index.check_tar(far)
        assert index.keys == local.keys and index.tar == tar
        assert all(np.array_equal(table.segments[name], local.segments[name]) for name in PLANNED)
        name, offset, size = index.row_member(0, 1)
        full = f"{index.keys[0]}.{name}"
        assert read_member(tar, offset, size, full, far) == read_member(local.tar, offset, size, full)


def test_a_large_index_is_read_by_its_columns(tmp_path, server, monkeypatch):
    monkeypatch.setattr("mmoe.data.index.file.ONE_REQUEST", 0)
    rng = np.random.default_rng(0)
    write_source(tmp_path / "s", {"train": [MAKERS["clip"](rng, f"c-{i}", 4) for i in range(40)]}, 1000)
    tar = tmp_path / "s" / "train" / "shard-000000.tar"
    server.files["/bucket/shard.parquet"] = tar.with_suffix(".parquet").read_bytes()
    far = storage()
    table, local = SegmentTable.read(address(server, "http"), far), ShardIndex.read(tar)
    assert all(np.array_equal(table.segments[name], local.segments[name]) for name in PLANNED)
    server.always = 503
    with pytest.raises(StorageError, match="shard.parquet could not be read in 4 attempts"):
        SegmentTable.read(address(server, "http"), far)
    server.always, server.files["/bucket/shard.parquet"] = None, b"something else" * 100
    with pytest.raises(DataError, match="shard.parquet cannot be read as a shard index"):
        SegmentTable.read(address(server, "http"), far)


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize(
    "faults", [[503], [503, 500, 503], ["close"], ["reset", "close"], ["cut"], [429, "cut", "close"]], ids=str
)
def test_faults_that_pass_are_tried_again_and_counted(server, scheme, faults):
    far = storage()
    server.faults = list(faults)
    assert far.read_range(address(server, scheme), 1000, 9000) == CONTENT[1000:9000]
    counts = far.stats.take()
    seen = sum(fault != "reset" for fault in faults)  # aiohttp repeats a request that got no answer at all, once
    assert seen <= counts["retries"] <= len(faults) and server.gets == len(faults) + 1
    assert counts["requests"] == counts["retries"] + 1 and counts["waited_s"] >= 0.005 * seen
    assert far.stats.take()["requests"] == 0


def test_threads_that_come_first_at_once_share_one_set_of_connections_and_counts(monkeypatch):
    together, make = threading.Barrier(4), store._Process

    def made(config):
        together.wait(10)  # all four found none
        return make(config)

    monkeypatch.setattr(store, "_Process", made)
    far = storage()
    with ThreadPoolExecutor(4) as pool:
        stats = [each.result() for each in [pool.submit(lambda: far.stats) for _ in range(4)]]
    assert len({id(each) for each in stats}) == 1 and far.stats is stats[0]


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_store_that_refuses_connections_for_a_while_is_tried_again(server, scheme, monkeypatch):
    port, opened = free_port(), []
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    far, done = storage(attempts=12, backoff_s=0.1), threading.Event()

    def open_it():
        while not far.stats.retries and not done.wait(0.01):
            pass
        opened.append(FaultyServer(port))
        opened[0].files = server.files

    later = threading.Thread(target=open_it)
    later.start()
    url = f"http://127.0.0.1:{port}/bucket/shard.tar" if scheme == "http" else "s3://bucket/shard.tar"
    try:
        assert far.read_range(url, 0, 4000) == CONTENT[:4000] and far.stats.take()["retries"] > 0
    finally:
        done.set()
        later.join()
        opened[0].close()


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:{port}", "http://no-such-host.invalid"], ids=["refused", "dns"])
def test_a_store_that_cannot_be_connected_to_is_given_up_after_its_attempts(server, scheme, endpoint, monkeypatch):
    endpoint = endpoint.format(port=free_port())
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    url = f"{endpoint}/bucket/shard.tar" if scheme == "http" else "s3://bucket/shard.tar"
    far = storage(attempts=3)
    with pytest.raises(StorageError, match="could not be read in 3 attempts .*connect.*data.storage.attempts"):
        far.read(url)
    assert far.stats.take()["retries"] == 2


def test_a_certificate_that_is_not_trusted_is_said_at_once(server, tmp_path, monkeypatch):
    theirs, ours = certificate(tmp_path)
    secure = FaultyServer(tls=theirs)
    secure.files = server.files
    try:
        far = storage()
        with pytest.raises(StorageError, match="certificate is not trusted.*SSL_CERT_FILE"):
            far.read(f"{secure.address}/bucket/shard.tar")
        assert far.stats.take()["retries"] == 0
        monkeypatch.setitem(fsspec.config.conf, "https", {"ssl": ours})
        assert storage().read(f"{secure.address}/bucket/shard.tar") == CONTENT
    finally:
        secure.close()


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize("fault, said", [(503, "503|SlowDown|reduce"), ("close", ""), ("hang", "Timeout")])
def test_faults_that_stay_end_in_a_sentence_in_time(server, scheme, fault, said):
    far = storage(timeout_s=0.7, attempts=3)
    server.always = fault
    began = time.monotonic()
    with pytest.raises(StorageError, match=rf"shard.tar could not be read in 3 attempts .*{said}.*data.storage.attem"):
        far.read_range(address(server, scheme), 0, 4000, "k.jpg")
    assert time.monotonic() - began < 30  # not for ever: a busy machine takes longer than the attempts do
    # On a busy machine an attempt may run out of time before its request arrives.
    assert 1 <= server.gets <= 3 and far.stats.take()["retries"] == 2


def test_pauses_grow_and_differ(server, monkeypatch):
    pauses = []
    monkeypatch.setattr("mmoe.data.storage.store.time.sleep", pauses.append)
    server.always = 503
    for _ in range(2):
        with pytest.raises(StorageError):
            storage(attempts=10, backoff_s=1.0).read_range(address(server, "http"), 0, 10)
    pauses = [p for p in pauses if p > 0]
    first, second = pauses[:9], pauses[9:]
    assert first != second and all(min(2**i, 30) / 2 <= p <= min(2**i, 30) for i, p in enumerate(first))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("status, said", [(403, "may not be read"), (404, "does not exist"), (400, "refuses the req")])
def test_refusals_are_said_at_once(server, scheme, status, said):
    far = storage()
    server.always = status
    with pytest.raises(DataError, match=rf"bucket/shard.tar .*{said}") as caught:
        far.read_range(address(server, scheme), 0, 4000, "k.jpg")
    assert isinstance(caught.value, StorageError) == (status != 404)
    assert server.gets == 1 and far.stats.take()["retries"] == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_truncated_object_is_told_from_a_cut_answer(server, scheme):
    far, url = storage(), address(server, scheme)
    for start in (len(CONTENT) - 100, len(CONTENT) + 100):
        with pytest.raises(DataError, match="shard.tar is truncated: k.jpg ends at byte") as caught:
            far.read_range(url, start, start + 4000, "k.jpg")
        assert not isinstance(caught.value, StorageError)
    assert far.stats.take()["retries"] == 0


def test_a_server_without_ranges_is_named(server):
    server.always = "whole"
    with pytest.raises(StorageError, match="does not support range requests"):
        storage().read_range(address(server, "http"), 0, 100)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_cache_answers_until_the_object_changes(server, scheme, tmp_path):
    url = address(server, scheme)
    far = storage(cache_folder=str(tmp_path))
    for _ in range(3):
        assert far.read_range(url, 0, 4000) == CONTENT[:4000] and far.read(url) == CONTENT
    assert server.gets == 2
    again = storage(cache_folder=str(tmp_path))  # another process of the node
    assert again.read_range(url, 0, 4000) == CONTENT[:4000] and server.gets == 2
    assert again.stats.take()["cache_hits"] == 1
    server.files["/bucket/shard.tar"] = CONTENT[::-1]
    later = storage(cache_folder=str(tmp_path))
    assert later.read_range(url, 0, 4000) == CONTENT[::-1][:4000] and server.gets == 3


def test_a_range_longer_than_a_request_comes_in_pieces(server, monkeypatch):
    monkeypatch.setattr("mmoe.data.storage.store._REQUEST_BYTES", 7000)
    far = storage(concurrency=3)
    server.faults = [None, 503, "close"]
    assert far.read_range(address(server, "s3"), 100, 45_000) == CONTENT[100:45_000]
    assert far.stats.take()["requests"] == 7 + 2


def test_no_shell_and_no_unknown_address_is_opened(tmp_path):
    for url, said in (
        ("pipe:cat x", "shell command"),
        ("pipe://cat x", "not an address"),
        ("simplecache::s3://b/x", "not an address"),
        ("nonsense://b/x", "not an address"),
    ):
        with pytest.raises(DataError, match=said):
            Storage().read_range(url, 0, 10)
    with pytest.raises(DataError, match="nowhere/source.json does not exist.*run `mmoe prepare`"):
        SourceManifest.load(tmp_path / "nowhere")


def test_no_room_for_the_cache_is_no_fault_of_a_sample(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmoe.data.storage.cache.ByteCache.put", full)
    with pytest.raises(StorageError, match="data.storage.cache_folder .*No space left.*data.storage.cache_bytes"):
        storage(cache_folder=str(tmp_path)).read_range(address(server, "http"), 0, 10)


def test_addresses_are_joined_alike_near_and_far():
    assert join_address("s3://b/x/", "train/a.tar") == "s3://b/x/train/a.tar" and join_address("/d", "a") == "/d/a"
    assert with_suffix("s3://b.c/train/a.tar", ".parquet") == "s3://b.c/train/a.parquet"
    assert with_suffix("s3://b.c/train/a", ".parquet") == "s3://b.c/train/a.parquet"


def test_a_storage_can_be_sent_to_another_process(server):
    far = storage(attempts=2)
    assert far.read_range(address(server, "s3"), 0, 10) == CONTENT[:10]
    sent = pickle.loads(pickle.dumps(far))
    assert sent.config == far.config and sent.read_range(address(server, "s3"), 0, 10) == CONTENT[:10]
