"""Runs that are killed for real: processes, workers, a server; and how much memory they take."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import store_run
import xarray as xr
from faulty_s3 import s3_server
from reference import tiny_config

import xchmv2
from xchmv2.errors import StoreError
from xchmv2.model import CHMv2ForDepthEstimation
from xchmv2.store.records import open_manifest
from xchmv2.store.regions import WriteBlock
from xchmv2.store.storage import resolve_store

# Private imports: what a killed run recorded is read.

HERE = Path(__file__).parent
# The processes that are started import this checkout, wherever the installed package lies.
PYTHONPATH = os.pathsep.join([str(HERE), str(HERE.parent)])
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
REGIONS = 2 * 4 * 5


def start(store, checkpoint, log, **options):
    given = [f"{key}={value}" for key, value in options.items()]
    command = [sys.executable, HERE / "store_run.py", str(store), str(checkpoint), str(log), *given]
    return subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True)


def fork(store, checkpoint, log, **options):
    """As ``start``, in a fraction of the time."""
    given = [f"{key}={value}" for key, value in options.items()]
    return store_run.Run(store_run.main, *map(str, (store, checkpoint, log)), *given)


def finish(run):
    _, errors = run.communicate(timeout=900)
    assert run.returncode == 0, errors


def lines(log):
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def kill_after(run, log, events, wait=0.0):
    """Kill a run once it has done so much; returns whether it was still at work."""
    while run.poll() is None and len(lines(log)) < events:
        time.sleep(0.002)
    time.sleep(wait)
    alive = run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.communicate()
    return alive


def down(events):
    return {tuple(event["down"]) for event in events if "down" in event}


def insides(events):
    """Blocks whose inner group was computed."""
    found = [event["blocks"] for event in events if "group" in event]
    return [(rows[0], cols[0]) for rows, cols in found if len(rows) == len(cols) == 1]


def pixels_of(root):
    files = (Path(root) / "canopy_height" / "c").rglob("*")
    return {str(f.relative_to(root)): f.read_bytes() for f in files if f.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_checkpoint):
    """Pixels of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(fork(folder / "h.zarr", tiny_checkpoint, folder / "log"))
    return pixels_of(folder / "h.zarr")


def survive_kills(root, checkpoint, folder, kills, **options):
    """Kill a run again and again, and check after each that nothing is done twice."""
    chance = random.Random(kills)
    killed = 0
    for attempt in range(kills + 40):
        last = killed == kills
        done = open_manifest_or_none(root, options.get("endpoint"))
        before = done.done() if done else set()
        log = folder / f"log-{attempt}"
        run = fork(root, checkpoint, log, **options)
        if last:
            finish(run)
        else:
            killed += kill_after(run, log, chance.randint(0, 25), chance.uniform(0, 0.02))
        events = lines(log)
        assert not down(events) & before, "a recorded block was written again"
        per_block = {
            block: sum((r, *block) in before for r in range(2)) for block in insides(events)
        }
        for block, count in per_block.items():
            assert insides(events).count(block) + count <= 2, "a recorded block was computed again"
        if last:
            return
    pytest.fail("the run ended before it could be killed so often")


def open_manifest_or_none(root, endpoint=None):
    if endpoint is None and not Path(root).exists():
        return None
    storage = {"endpoint_url": endpoint, "key": "test", "secret": "test"} if endpoint else None
    return open_manifest(resolve_store(root, storage, read_only=True))


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_the_bytes_of_an_undisturbed_run(
    tmp_path, tiny_checkpoint, undisturbed, kills
):
    root = tmp_path / "h.zarr"
    survive_kills(root, tiny_checkpoint, tmp_path, kills, pause=0.01)
    assert pixels_of(root) == undisturbed
    assert not list(root.rglob("*.partial"))
    expected = store_run.heights(str(tiny_checkpoint)).compute()
    np.testing.assert_allclose(xchmv2.open_zarr(root), expected, atol=5e-4)


@pytest.mark.slow  # test_store_dates fails at every operation of an extension
def test_kills_while_dates_are_added_in_between(tmp_path, tiny_checkpoint, undisturbed):
    root = tmp_path / "h.zarr"
    finish(fork(root, tiny_checkpoint, tmp_path / "log"))
    for attempt, events in enumerate([1, 20]):
        log = tmp_path / f"log-{attempt}"
        assert kill_after(fork(root, tiny_checkpoint, log, extend=90, pause=0.02), log, events)
    finish(fork(root, tiny_checkpoint, tmp_path / "log-last", extend=90))
    found = xchmv2.open_zarr(root)
    assert found.sizes["time"] == 4
    assert old_pixels(root) == undisturbed


def old_pixels(root):
    """Pixels of the two dates that a store was begun with."""
    found = pixels_of(root)
    return {name: data for name, data in found.items() if "/c/0/" in name or "/c/1/" in name}


def test_a_reader_keeps_what_it_opened_while_another_process_adds_dates(tmp_path, tiny_checkpoint):
    root = tmp_path / "h.zarr"
    finish(fork(root, tiny_checkpoint, tmp_path / "log"))
    # Extended by a date before both and one between them, which other readers may see at once.
    readers = [xchmv2.open_zarr(root), xr.open_zarr(root).canopy_height]
    lazily = xr.open_zarr(root, chunks=None).canopy_height
    before = readers[0].compute()
    run = fork(root, tiny_checkpoint, tmp_path / "log-2", extend=-90, pause=0.01)
    looks, sizes = 0, set()
    while run.poll() is None or not looks:
        for reader in readers:
            np.testing.assert_array_equal(reader.compute(), before)
        plain = xr.open_zarr(root).canopy_height
        np.testing.assert_array_equal(plain.sel(time=before.time), before)
        looks, sizes = looks + 1, sizes | {plain.sizes["time"]}
    finish(run)
    np.testing.assert_array_equal(lazily, before)
    assert sizes <= {2, 4}
    found = xchmv2.open_zarr(root)
    assert found.sizes["time"] == 4
    assert found.indexes["time"].is_monotonic_increasing
    np.testing.assert_array_equal(found.sel(time=before.time), before)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGSTOP")
def test_a_suspended_writer_that_wakes_up_writes_into_no_other_date(tmp_path, tiny_checkpoint):
    root = tmp_path / "h.zarr"
    first = fork(root, tiny_checkpoint, tmp_path / "log", pause=0.02)
    while len(down(lines(tmp_path / "log"))) < 3:
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    (root / "xchmv2" / "lock.json").unlink()  # another machine takes it over after some minutes
    finish(fork(root, tiny_checkpoint, tmp_path / "log-2", extend=-90))
    whole = pixels_of(root)
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=900)
    assert first.returncode
    assert "StoreError" in errors
    assert pixels_of(root) == whole


@pytest.fixture(scope="module")
def bucket():
    """An S3-compatible server on loopback."""
    with s3_server() as address:
        yield address


@pytest.mark.slow  # test_store_faults fails at operations on one
@pytest.mark.parametrize("kills", [1, 10])
def test_kills_on_an_s3_server(tmp_path, tiny_checkpoint, bucket, undisturbed, kills):
    import s3fs

    files = s3fs.S3FileSystem(endpoint_url=bucket, key="test", secret="test")
    files.mkdir(f"forest-{kills}")
    address = f"s3://forest-{kills}/h.zarr"
    survive_kills(address, tiny_checkpoint, tmp_path, kills, endpoint=bucket, pause=0.02)
    top = f"forest-{kills}/h.zarr/"
    found = {
        name.removeprefix(top): files.cat(name) for name in files.find(f"{top}canopy_height/c")
    }
    assert found == undisturbed
    opened = xchmv2.open_zarr(
        address, storage_options={"endpoint_url": bucket, "key": "test", "secret": "test"}
    )
    assert opened.odc.crs.epsg == 32633
    files.clear_instance_cache()


def test_a_second_process_is_refused_while_the_first_writes(tmp_path, tiny_checkpoint):
    root, log = tmp_path / "h.zarr", tmp_path / "log"
    first = fork(root, tiny_checkpoint, log, pause=0.05)
    while len(lines(log)) < 2:
        time.sleep(0.01)
    with pytest.raises(StoreError, match=f"process {first.pid}"):
        store_run.heights(str(tiny_checkpoint)).chmv2.to_zarr(root, progress=False)
    finish(first)


def test_a_write_that_the_system_refuses_names_the_region(tmp_path, tiny_checkpoint):
    """Files may grow to nothing, as on a full disk: the system itself refuses the write."""
    given = [tmp_path / "h.zarr", tiny_checkpoint, tmp_path / "log"]
    run = store_run.Run(fill_the_disk, *map(str, given))
    _, errors = run.communicate(timeout=900)
    assert "StoreError: canopy_height, 2020-07-01" in errors
    assert "could not be written (" in errors
    assert "File too large" in errors
    finish(fork(*given))
    assert len(down(lines(tmp_path / "log"))) == REGIONS


def fill_the_disk(*given):
    """Run, but let no file grow once the first block is being written."""
    import resource

    write = WriteBlock._write

    def full(self, *given):
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
        write(self, *given)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    WriteBlock._write = full
    store_run.main(*given)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a killed worker leaves its sockets
def test_a_worker_that_dies_costs_nothing_but_its_own_work(
    tmp_path, tiny_checkpoint, undisturbed, capsys
):
    distributed = pytest.importorskip("distributed")
    root, log, loads = tmp_path / "h.zarr", tmp_path / "log", tmp_path / "loads"
    store_run.forks()
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.register_plugin(NoteLoads(str(loads), str(log)))
        victim = next(iter(client.run(os.getpid).values()))

        def kill():
            while len(down(lines(log))) < 8:
                time.sleep(0.01)
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        height = store_run.heights(str(tiny_checkpoint))
        done = height.chmv2.to_zarr(root, progress=True)
        killer.join()
    assert done.regions == REGIONS
    assert f"{REGIONS}/{REGIONS}" in capsys.readouterr().err  # right on a cluster too
    # Workers make the same batches as one machine, so the same bytes.
    assert pixels_of(root) == undisturbed
    pids = loads.read_text().split()
    assert str(victim) in pids
    assert len(pids) == len(set(pids)) >= 2  # one load each, whoever took the place of the dead


try:
    from distributed import WorkerPlugin
except ImportError:
    WorkerPlugin = object


class NoteLoads(WorkerPlugin):
    """Notes each load of a model, and the work, of every worker there will be."""

    def __init__(self, loads, log):
        self.loads, self.log = loads, log

    def setup(self, worker):
        import torch

        from xchmv2.model import CHMv2ForDepthEstimation

        torch.set_num_threads(1)
        store_run.note_work(self.log, 0.02)
        load = CHMv2ForDepthEstimation.from_pretrained.__func__

        def noted(cls, *given, **options):
            with open(self.loads, "a") as file:
                file.write(f"{os.getpid()}\n")
            return load(cls, *given, **options)

        CHMv2ForDepthEstimation.from_pretrained = classmethod(noted)


class Mean(CHMv2ForDepthEstimation):
    def height(self, pixel_values, *, spread=False):
        return pixel_values.mean(dim=1), None


def pixels(block_info):
    (top, bottom), (left, right) = block_info[None]["array-location"]
    return (np.arange(top, bottom)[:, None] * 7 + np.arange(left, right) * 3).astype("u1")


def write_generated(side, block, store, answer):
    """Write a generated scene; answers by how much the peak of memory grew [MiB]."""
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    sizes = tuple(min(block, side - start) for start in range(0, side, block))
    empty = np.empty((0, 0), "u1")
    band = da.map_blocks(pixels, chunks=(sizes, sizes), dtype="u1", meta=empty)
    axes = {"y": 5e6 - 0.6 * np.arange(side), "x": 5e5 + 0.6 * np.arange(side)}
    scene = xr.Dataset({n: (("y", "x"), band) for n in ("red", "green", "blue")}, axes)
    height = scene.odc.assign_crs(32633).chmv2.predict(Mean(tiny_config()), block=block)
    before = peak()
    height.chmv2.to_zarr(store, progress=False)
    answer.send(peak() - before)


def memory_of(side, block, store):
    """Memory that a process takes to write a generated scene [MiB]."""
    ours, theirs = store_run.forks().Pipe(duplex=False)
    run = store_run.Run(write_generated, side, block, str(store), theirs)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    with ours, theirs:
        return ours.recv()


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(
    ("side", "block"), [(2560, 512), pytest.param(20480, 4096, marks=pytest.mark.slow)]
)
def test_memory_does_not_grow_with_the_scene(tmp_path, side, block):
    small = memory_of(side, block, tmp_path / "small.zarr")
    large = memory_of(2 * side, block, tmp_path / "large.zarr")
    print(f"memory for {side} px: {small:.0f} MiB, {2 * side} px: {large:.0f} MiB")
    assert large < 1.15 * small + 16  # a larger graph; a byte per pixel would take 19 MiB
