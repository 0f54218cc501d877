"""How fast samples of a prepared source come over the network, read as the ranks of a job would read them.

    python benchmarks/data_storage.py [s3://bucket/source] [--readers 8] [--seconds 10]

Every reader is a process: it reads the indices of the first block of shards as planning does, then takes its share
of the block's rows in their drawn order, `--ahead` samples at a time. Without an address a small simulated source is
prepared and served by a local S3 server (moto) on this machine's own cores: that shows that it works, not how fast.
"""

import argparse
import logging
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from mmoe.addresses import join_address
from mmoe.commands.console import Console
from mmoe.data.index.shard_index import SegmentTable, ShardIndex
from mmoe.data.index.shards import spans
from mmoe.data.plan.blocks import rng
from mmoe.data.storage.store import Storage, StorageConfig
from mmoe.optional import require
from mmoe.preparation.prepare import prepare
from mmoe.result import print_result
from mmoe.schema.manifest import SourceManifest
from mmoe.tokenizers.text import TextTokenizer

BLOCK_SHARDS = 16
console = Console()


def read_samples(
    reader: int, url: str, readers: int, seconds: float, ahead: int, config: StorageConfig, seed: int, barrier
) -> dict:
    """One rank: figures of what it read in `seconds` after all ranks were ready."""
    storage = Storage(config)
    began = time.perf_counter()
    manifest = SourceManifest.load(url, storage.read)
    shards = manifest.splits["train"].shards
    tars = [join_address(url, shards[i].path) for i in rng(seed, 0).permutation(len(shards))[:BLOCK_SHARDS]]
    storage.map(lambda tar: SegmentTable.read(tar, storage), tars)
    planned = time.perf_counter() - began
    indices = storage.map(lambda tar: ShardIndex.read(tar, storage), tars)
    drawn = [(index, row) for index in indices for row in range(len(index))]
    order = rng(seed, 1).permutation(len(drawn))
    barrier.wait()
    storage.stats.take()
    stop = time.perf_counter() + seconds

    def read(number: int) -> tuple[float, int]:
        if time.perf_counter() > stop:
            return 0.0, 0
        started = time.perf_counter()
        size = read_sample(*drawn[order[(number * readers + reader) % len(order)]], storage)
        return time.perf_counter() - started, size

    with ThreadPoolExecutor(ahead) as pool:
        done = []
        while time.perf_counter() < stop:
            base = len(done)
            done += pool.map(read, range(base, base + 16 * ahead))
    took = [latency for latency, size in done if size]
    return {"latencies": took, "bytes": sum(size for _, size in done), "plan_s": planned, "stats": storage.stats.take()}


def read_sample(index: ShardIndex, row: int, storage: Storage) -> int:
    """Read all members of a row; returns their bytes."""
    total = 0
    for span in spans(index.member(row, number) for number in range(index.row_members(row))):
        content = storage.read_range(index.tar, span.start, span.stop, span.members[0].name)
        total += sum(len(span.cut(content, index.tar, member.name)) for member in span.members)
    return total


@contextmanager
def local_bucket() -> Iterator[str]:
    """The address of a small source of simulated drives in a bucket on this machine."""
    require("moto", "data_storage.py without an address")
    require("s3fs", "data_storage.py without an address")
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for every request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(keys, AWS_ENDPOINT_URL=f"http://{host}:{port}")
        store = s3fs.S3FileSystem(skip_instance_cache=True)
        store.call_s3("create_bucket", Bucket="source")
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "source"
            options = {"recordings": 12, "prepare": {"shard_rows": 8}}
            prepare("simulated_drive", "-", output, text_tokenizer=TextTokenizer.bytes(), options=options)
            for path in sorted(p for p in output.rglob("*") if p.is_file()):
                store.put_file(str(path), f"source/{path.relative_to(output)}")
        yield "s3://source"
    finally:
        server.stop()


def measure(url: str, arguments: argparse.Namespace) -> dict:
    context = multiprocessing.get_context("spawn")
    config = StorageConfig(cache_folder=arguments.cache, concurrency=max(16, arguments.ahead))
    with context.Manager() as manager, context.Pool(arguments.readers) as pool:
        barrier = manager.Barrier(arguments.readers)
        work = partial(
            read_samples,
            url=url,
            readers=arguments.readers,
            seconds=arguments.seconds,
            ahead=arguments.ahead,
            config=config,
            seed=arguments.seed,
            barrier=barrier,
        )
        found = pool.map(work, range(arguments.readers), chunksize=1)
    latencies = np.concatenate([part["latencies"] for part in found])
    stats = sum((Counter(part["stats"]) for part in found), Counter())
    return {
        "url": url,
        "readers": arguments.readers,
        "ahead": arguments.ahead,
        "samples_per_s": len(latencies) / arguments.seconds,
        "mb_per_s": sum(part["bytes"] for part in found) / arguments.seconds / 1e6,
        "latency_p50_ms": 1e3 * float(np.quantile(latencies, 0.5)),
        "latency_p99_ms": 1e3 * float(np.quantile(latencies, 0.99)),
        "requests_per_sample": stats["requests"] / len(latencies),
        "retries": stats["retries"],
        "cache_hits": stats["cache_hits"],
        "cache_misses": stats["cache_misses"],
        "plan_start_s": max(part["plan_s"] for part in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", help="a prepared source: a folder, s3://, gs://, https://")
    parser.add_argument("--readers", type=int, default=8, help="processes")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--ahead", type=int, default=4, help="samples a reader has in flight")
    parser.add_argument("--cache", help="folder of the local cache; without one nothing is kept")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.url:
        figures = measure(arguments.url, arguments)
    else:
        with local_bucket() as url:
            figures = measure(url, arguments)
    for name, value in figures.items():
        console.print(f"{name:>20}  {value:,.2f}" if isinstance(value, float) else f"{name:>20}  {value}")
    print_result("data_storage", figures, {})


if __name__ == "__main__":
    main()
