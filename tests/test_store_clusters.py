"""Clusters and interrupts: killed, stopped and poisoned workers, lost clients, locks, icechunk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress

import dask
import numpy as np
import pytest
import rioxarray  # noqa: F401  (registers .rio)
import store_run
import torch
import xarray as xr
import zarr
from conftest import cube
from reference import tiny_config
from test_store_runs import ENV, REGIONS, NoteLoads, bucket, down, fork, lines, pixels_of
from zarr.storage import FsspecStore, MemoryStore

import xchmv2
from xchmv2.errors import CheckpointError, CHMv2Error, StoreError
from xchmv2.inference import Predictor, clear_models, stop_forwards
from xchmv2.model import CHMv2ForDepthEstimation
from xchmv2.predict import sinks
from xchmv2.predict.tasks import SumGroup
from xchmv2.store import lock as locks
from xchmv2.store.lock import LOCK, WriterLock
from xchmv2.store.storage import delete_object, read_object, write_object

# Private imports: work is made to fail, and locks are written by hand.

distributed = pytest.importorskip("distributed")
__all__ = ["bucket"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # killed workers leave sockets


@contextmanager
def cluster_of(workers=2, default=True, **options):
    options = {"processes": True, "threads_per_worker": 1, "silence_logs": 50} | options
    store_run.forks()
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        distributed.LocalCluster(n_workers=workers, dashboard_address=":0", **options) as cluster,
        distributed.Client(cluster, set_as_default=default) as client,
    ):
        yield cluster, client


@pytest.fixture(scope="module")
def cluster():
    """Two workers in processes of their own, which a nanny starts again."""
    with cluster_of(default=False) as (_, client):
        yield client


@pytest.fixture
def client(cluster):
    until(lambda: len(pids(cluster)) == 2)
    with cluster.as_current():
        yield cluster
    for plugin in ("poison", "notes"):
        with suppress(KeyError, ValueError):
            cluster.unregister_worker_plugin(plugin)
    for pid in pids(cluster).values():  # they changed this package
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_checkpoint):
    """Pixels of a run that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed") / "h.zarr"
    write(root, tiny_checkpoint)
    return pixels_of(root)


def write(root, checkpoint, **options):
    return store_run.heights(str(checkpoint)).chmv2.to_zarr(root, progress=False, **options)


def note(client, folder):
    client.register_plugin(NoteLoads(str(folder / "loads"), str(folder / "log")), name="notes")
    return folder / "log"


def until(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextmanager
def meanwhile(action):
    """Run something in another thread, and wait for it."""
    thread = threading.Thread(target=action)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def pids(client):
    return client.run(os.getpid, on_error="ignore")


# Workers


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, 10])
def test_workers_that_die_again_and_again(tmp_path, tiny_checkpoint, undisturbed, client, kills):
    log = note(client, tmp_path)

    def kill():
        for number in range(kills):
            until(lambda n=number: len(down(lines(log))) >= min(2 + 2 * n, REGIONS - 4))
            until(lambda: len(pids(client)) == 2)
            os.kill(list(pids(client).values())[number % 2], signal.SIGKILL)

    with meanwhile(kill):
        done = write(tmp_path / "h.zarr", tiny_checkpoint)
    assert done.regions == REGIONS
    assert pixels_of(tmp_path / "h.zarr") == undisturbed


@pytest.mark.slow
def test_a_worker_that_is_stopped_for_a_while(tmp_path, tiny_checkpoint, undisturbed, client):
    log = note(client, tmp_path)

    def stop():
        until(lambda: len(down(lines(log))) >= 4)
        victim = next(iter(pids(client).values()))
        os.kill(victim, signal.SIGSTOP)
        time.sleep(2)
        os.kill(victim, signal.SIGCONT)

    with meanwhile(stop):
        write(tmp_path / "h.zarr", tiny_checkpoint)
    assert pixels_of(tmp_path / "h.zarr") == undisturbed


class Poison(distributed.WorkerPlugin):
    """Lets the inner tile group of block (1, 1) fail, at both dates."""

    name = "poison"

    def __init__(self, kind, once=None):
        self.kind, self.once = kind, once

    def setup(self, worker):
        poison(self.kind, self.once)


def poison(kind, once=None):
    compute, kept = SumGroup.__call__, []

    def poisoned(self, chunks):
        if (self.iy, self.ix) == (2, 2) and not (once and os.path.exists(once)):
            if once:
                open(once, "w").close()
            if kind == "raises":
                raise RuntimeError("poison tile")
            if kind == "kills":
                os.kill(os.getpid(), signal.SIGKILL)
            while True:  # until the nanny ends it
                kept.append(np.ones(10**8, "u1"))
                time.sleep(0.2)
        return compute(self, chunks)

    SumGroup.__call__ = poisoned


POISONED = (
    r"the block of y 128:256, x 128:256 at 2020-07-01T00\S* could not be computed \(%s.*\), nor "
    r"could 1 other blocks; correct the cause and make the same call again(.|\n)*"
)


def refused(error):
    return pytest.raises(StoreError, match=POISONED % error)


def noted(caught):
    assert caught.value.__notes__ == [
        f"{REGIONS - 2} of {REGIONS} regions are written and kept; the same call writes the others"
    ]


def check_others(root, checkpoint, undisturbed):
    """All other regions are written; the same call writes the two that failed."""
    before = pixels_of(root)
    assert before.items() < undisturbed.items()
    assert len(undisturbed) - len(before) == 2
    done = write(root, checkpoint)
    assert (done.regions, done.present) == (2, REGIONS - 2)
    assert pixels_of(root) == undisturbed


@pytest.mark.parametrize("workers", [1, 2])
def test_a_poison_tile_in_this_process(
    tmp_path, tiny_checkpoint, undisturbed, monkeypatch, workers
):
    monkeypatch.setattr(SumGroup, "__call__", SumGroup.__call__)
    poison("raises")
    with (
        dask.config.set(scheduler="threads", num_workers=workers),
        refused("RuntimeError: poison tile") as caught,
    ):
        write(tmp_path / "h.zarr", tiny_checkpoint)
    assert isinstance(caught.value.__cause__, RuntimeError)
    noted(caught)
    monkeypatch.undo()
    check_others(tmp_path / "h.zarr", tiny_checkpoint, undisturbed)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("raises", "RuntimeError: poison tile"),
        pytest.param("kills", "KilledWorker: Attempted to run task", marks=pytest.mark.slow),
    ],
)
def test_a_poison_tile_on_a_cluster(
    tmp_path, tiny_checkpoint, undisturbed, client, monkeypatch, kind, error
):
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)
    client.register_plugin(Poison(kind))
    with refused(error) as caught:
        write(tmp_path / "h.zarr", tiny_checkpoint)
    noted(caught)
    with dask.config.set(scheduler="threads"):
        check_others(tmp_path / "h.zarr", tiny_checkpoint, undisturbed)


@pytest.mark.slow
def test_a_block_is_tried_again_if_another_killed_its_workers(
    tmp_path, tiny_checkpoint, undisturbed, client, monkeypatch
):
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)
    client.register_plugin(Poison("kills", str(tmp_path / "once")))
    assert write(tmp_path / "h.zarr", tiny_checkpoint).regions == REGIONS
    assert pixels_of(tmp_path / "h.zarr") == undisturbed


@pytest.mark.slow
def test_a_worker_that_its_nanny_ends_for_its_memory(tmp_path, tiny_checkpoint, undisturbed):
    with cluster_of(memory_limit="2 GB") as (_, client):
        client.register_plugin(Poison("fills memory", str(tmp_path / "once")))
        assert write(tmp_path / "h.zarr", tiny_checkpoint).regions == REGIONS
    assert (tmp_path / "once").exists()
    assert pixels_of(tmp_path / "h.zarr") == undisturbed


def test_a_run_of_which_everything_fails_gives_up(tmp_path, tiny_checkpoint, monkeypatch):
    def fail(self, chunks):
        raise OSError("the network is gone")

    monkeypatch.setattr(SumGroup, "__call__", fail)
    monkeypatch.setattr("xchmv2.store.writing._MOST_FAILURES", 3)
    with pytest.raises(StoreError, match=r"OSError: the network is gone\), nor could 2 other"):
        write(tmp_path / "h.zarr", tiny_checkpoint)


# Clusters without workers, clients and schedulers that go


def test_a_cluster_without_workers_says_so(tmp_path, tiny_checkpoint):
    height = store_run.heights(str(tiny_checkpoint)).chunk()
    with cluster_of(0, processes=False) as (_, client):
        with (
            dask.config.set({"xchmv2.worker-timeout": "1 s"}),
            pytest.warns(UserWarning, match=r"there is no worker; waiting 1 s for one, or as .*"),
            pytest.raises(CHMv2Error, match=r"found no worker for 1 s; .*call again: what is"),
        ):
            sinks.run_sinks(
                [height.data], {(0, 0, 0): len}, name="no-workers", done=lambda *given: None
            )
        until(lambda: not client.cluster.scheduler.tasks, 30)  # nothing is left to compute


def test_waiting_ends_when_a_worker_comes(monkeypatch):
    monkeypatch.setattr(sinks, "_QUIET", 0.1)
    array, ended = xr.DataArray(np.ones((2, 2))).chunk().data, []
    with (
        cluster_of(0, processes=False) as (cluster, _),
        pytest.warns(UserWarning, match=r"no worker; waiting 600 s") as caught,
        meanwhile(lambda: (until(lambda: caught.list, 30), cluster.scale(1))),
    ):
        sinks.run_sinks([array], {(0, 0): len}, name="late", done=lambda *g: ended.append(g))
    assert ended == [((0, 0), 1)]


def test_workers_with_a_gpu_that_go(monkeypatch):
    """Workers that forward no tiles do not count where others declared a GPU."""
    monkeypatch.setattr(sinks, "_QUIET", 0.05)
    known = {"a": {"resources": {"GPU": 1}}, "b": {}}
    monkeypatch.setattr(sinks, "list_workers", lambda client: dict(known))
    with cluster_of(1, processes=False) as (_, client):
        futures = [client.submit(time.sleep, 3, pure=False)]
        waiting = sinks._completed(client, futures)
        lost = threading.Timer(0.5, known.pop, ["a"])
        lost.start()
        with (
            dask.config.set({"xchmv2.worker-timeout": "500 ms"}),
            pytest.warns(UserWarning, match=r"there is no worker that declares a GPU"),
            pytest.raises(CHMv2Error, match=r"found no worker that declares a GPU for"),
        ):
            list(waiting)
        lost.join()


def write_on(address, root, checkpoint):
    with distributed.Client(address):
        write(root, checkpoint)


@pytest.mark.slow
def test_a_client_that_is_killed(tmp_path, tiny_checkpoint, undisturbed, client):
    log, root = note(client, tmp_path), tmp_path / "h.zarr"
    run = store_run.Run(write_on, client.scheduler.address, root, tiny_checkpoint)
    until(lambda: len(down(lines(log))) >= 4 or run.poll() is not None)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    done = write(root, tiny_checkpoint)
    assert done.regions
    assert done.present
    assert pixels_of(root) == undisturbed


@pytest.mark.slow
def test_a_cluster_that_is_restarted(tmp_path, tiny_checkpoint, undisturbed):
    root = tmp_path / "h.zarr"
    with cluster_of(1) as (_, client):
        log = note(client, tmp_path)

        def restart():
            until(lambda: len(down(lines(log))) >= 4)
            with distributed.Client(client.scheduler.address, set_as_default=False) as other:
                other.restart(wait_for_workers=False)

        with (
            meanwhile(restart),
            pytest.raises(CHMv2Error, match=r"found that a task was cancelled; .* call again"),
        ):
            write(root, tiny_checkpoint)
    assert write(root, tiny_checkpoint).present >= 4
    assert pixels_of(root) == undisturbed


@pytest.mark.slow
def test_a_scheduler_that_is_killed(tmp_path, tiny_checkpoint, undisturbed):
    root, file = tmp_path / "h.zarr", tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0"]
    command += ["--scheduler-file", str(file), "--dashboard-address", ":0"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1"]
    worker += ["--scheduler-file", str(file), "--dashboard-address", ":0"]
    quiet = {"env": ENV, "stderr": subprocess.DEVNULL}
    with (
        subprocess.Popen(command, **quiet) as scheduler,
        dask.config.set({"distributed.comm.timeouts.connect": "2 s"}),
    ):
        until(file.exists)
        with (
            subprocess.Popen(worker, **quiet) as working,
            distributed.Client(scheduler_file=str(file)) as client,
        ):
            log = note(client, tmp_path)

            def kill():
                until(lambda: len(down(lines(log))) >= 4)
                scheduler.kill()

            with meanwhile(kill), pytest.raises(CHMv2Error, match=r"call again: what is written"):
                write(root, tiny_checkpoint)
            working.kill()
    assert write(root, tiny_checkpoint).present >= 4
    assert pixels_of(root) == undisturbed


# The model


def test_a_model_that_is_replaced_meanwhile(tmp_path, tiny_checkpoint, undisturbed, client):
    model, root = tmp_path / "model", tmp_path / "h.zarr"
    shutil.copytree(tiny_checkpoint, model)
    log = note(client, tmp_path)

    def replace():
        until(lambda: len(down(lines(log))) >= 4)
        torch.manual_seed(7)
        other = CHMv2ForDepthEstimation(tiny_config())
        other.save_pretrained(tmp_path / "other")
        os.replace(tmp_path / "other" / "model.safetensors", model / "model.safetensors")
        client.run(clear_models)  # as a worker that is new

    with meanwhile(replace), pytest.raises(CheckpointError, match=r"planned with, sha256 \w+"):
        write(root, model)
    assert pixels_of(root).items() <= undisturbed.items()
    shutil.copy(tiny_checkpoint / "model.safetensors", model / "model.safetensors")
    with dask.config.set(scheduler="threads"):
        write(root, model)
    assert pixels_of(root) == undisturbed


def test_a_model_that_is_replaced_while_it_is_loaded(tmp_path, tiny_checkpoint, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    height = store_run.heights(str(model))
    load = CHMv2ForDepthEstimation.from_pretrained.__func__

    def replaced(cls, folder, **options):
        found = load(cls, folder, **options)
        CHMv2ForDepthEstimation(tiny_config()).save_pretrained(model)
        return found

    monkeypatch.setattr(CHMv2ForDepthEstimation, "from_pretrained", classmethod(replaced))
    clear_models()
    with pytest.raises(CheckpointError, match="weights the prediction was planned with"):
        height.chmv2.to_zarr(tmp_path / "h.zarr", progress=False)


# Ctrl-C

INTERRUPTED = rf"(\d+) of {REGIONS} regions are written and kept; the same call writes the others"


def interrupt(run, log, events=4):
    """Press Ctrl-C once so much is written; returns what the process said."""
    until(lambda: len(down(lines(log))) >= events or run.poll() is not None)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=300)
    return errors


def goes_on(root, checkpoint, undisturbed, said):
    """The lock is gone, and the same call writes what is missing."""
    assert not (root / LOCK).exists()
    assert not list(root.rglob("*.partial"))
    done = write(root, checkpoint)
    # A cluster may have written a region that the client had not heard of yet.
    assert int(re.search(INTERRUPTED, said)[1]) <= done.present < REGIONS
    assert pixels_of(root) == undisturbed


def test_control_c_in_threads(tmp_path, tiny_checkpoint, undisturbed):
    root, log = tmp_path / "h.zarr", tmp_path / "log"
    run = fork(root, tiny_checkpoint, log, pause=0.1)
    said = interrupt(run, log)
    assert re.fullmatch(f"KeyboardInterrupt: {INTERRUPTED}", said.splitlines()[-1])
    assert "dask" not in said  # none of its frames
    goes_on(root, tiny_checkpoint, undisturbed, said)


def test_a_second_control_c_ends_it_at_once(tmp_path, tiny_checkpoint):
    log = tmp_path / "log"
    run = fork(tmp_path / "h.zarr", tiny_checkpoint, log, pause=200)  # two groups are in work
    until(lambda: len(lines(log)) == 2)
    run.send_signal(signal.SIGINT)
    until(lambda: not (tmp_path / "h.zarr" / LOCK).exists())
    time.sleep(2)
    begun = time.monotonic()
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=300)
    assert time.monotonic() - begun < 100


def test_control_c_ends_a_group_after_its_batch(tiny_checkpoint, monkeypatch):
    height, windows = store_run.heights(str(tiny_checkpoint)), []
    launch = Predictor._launch

    def launched(self, window, batch, size, *, spread):
        windows.append(window)
        stop_forwards()
        return launch(self, window, batch, size, spread=spread)

    monkeypatch.setattr(Predictor, "_launch", launched)
    with pytest.raises(InterruptedError, match="the prediction was interrupted"):
        height[0, :120, :120].compute(scheduler="sync")
    assert len(windows) == len({id(window) for window in windows})  # one batch of each


@pytest.mark.slow
def test_control_c_on_a_cluster(tmp_path, tiny_checkpoint, undisturbed, client):
    log, root = note(client, tmp_path), tmp_path / "h.zarr"
    run = store_run.Run(write_on, client.scheduler.address, root, tiny_checkpoint)
    said = interrupt(run, log)
    assert re.search(f"KeyboardInterrupt: {INTERRUPTED}", said)
    goes_on(root, tiny_checkpoint, undisturbed, said)


SHELL = """
import sys, torch, store_run
from xchmv2.cli import main
torch.set_num_threads(1)
store_run.note_work(sys.argv.pop(1), 0.1)
main()
"""


def test_control_c_in_a_shell(tmp_path, tiny_checkpoint):
    image, root, log = tmp_path / "image.tif", tmp_path / "h.zarr", tmp_path / "log"
    scene = cube((420, 540)).drop_attrs()
    scene.to_array("band").rio.to_raster(image)
    words = [sys.executable, "-c", SHELL, log, "predict", image, root, "--model", tiny_checkpoint]
    words += ["--tile", 64, "--overlap", 16, "--block", 128, "--bands", "1,2,3"]
    run = subprocess.Popen(list(map(str, words)), env=ENV, stderr=subprocess.PIPE, text=True)
    said = interrupt(run, log)
    assert run.returncode == 130, said
    last = said.splitlines()[-1]
    assert re.fullmatch(r"interrupted: \d+ of 20 regions are written and kept; the .*", last)
    assert "Traceback" not in said
    assert not (root / LOCK).exists()


@pytest.mark.slow
def test_control_c_in_a_notebook(tmp_path, tiny_checkpoint, undisturbed):
    manager = pytest.importorskip("jupyter_client.manager")
    pytest.importorskip("ipykernel")
    root, log = tmp_path / "h.zarr", tmp_path / "log"
    kernel, notebook = manager.start_new_kernel(env=ENV, startup_timeout=300)
    try:
        cell = f"import store_run; store_run.main({str(root)!r}, {str(tiny_checkpoint)!r}, "
        notebook.execute(f"{cell}{str(log)!r}, 'pause=0.1')")
        until(lambda: len(down(lines(log))) >= 4)
        kernel.interrupt_kernel()
        reply = notebook.get_shell_msg(timeout=300)["content"]
        assert reply["ename"] == "KeyboardInterrupt"
        goes_on(root, tiny_checkpoint, undisturbed, reply["evalue"])
        notebook.execute(f"{cell}{str(tmp_path / 'again')!r})")
        assert notebook.get_shell_msg(timeout=300)["content"]["status"] == "ok"
    finally:
        notebook.stop_channels()
        kernel.shutdown_kernel(now=True)


@pytest.mark.slow
def test_processes_start_once_for_a_run(tmp_path, tiny_checkpoint, undisturbed, monkeypatch):
    """Of dask's own scheduler, after many threads have computed; they take long to start."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the last digits depend on it
    with dask.config.set(scheduler="threads", num_workers=32):
        store_run.heights(str(tiny_checkpoint)).compute()
    for kind in ("spawn", "fork"):
        root, own = tmp_path / kind, {"multiprocessing.context": kind, "num_workers": 2}
        with dask.config.set({"scheduler": "processes", **own}):
            write(root, tiny_checkpoint)
        assert pixels_of(root) == undisturbed


# Locks


def holder(**fields):
    """The lock of a process on another machine, which was renewed now."""
    with WriterLock(MemoryStore()) as lock:
        found = json.loads(lock._content())
    return {**found, "host": "elsewhere", **fields}


def put_lock(store, content):
    write_object(store, LOCK, content if type(content) is bytes else json.dumps(content).encode())


@pytest.mark.parametrize(
    "content",
    [b"5", b"[]", b"null", b'"x"', b"{", b"", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"true"]
    + [{}, {"renewed": "abc"}, {"pid": 7}]
    + [holder(pid=pid) for pid in ("7", None, [7], 7.0, True, 0, -1, 10**30)]
    + [holder(renewed=when) for when in ("abc", None, [], float("nan"), float("inf"), 10**400)]
    + [holder(host=5), holder(place=None), holder(token={}), holder(started=0)],
    ids=lambda content: str(content)[:30],
)  # fmt: skip
def test_a_lock_that_this_package_did_not_write_is_nobodys(monkeypatch, content):
    monkeypatch.setattr(locks, "_CONFIRM", 0.0)
    store = MemoryStore()
    put_lock(store, content)
    with WriterLock(store) as lock:
        lock.validate()
        put_lock(store, content)
        with pytest.raises(StoreError, match="took over writing"):
            lock.validate()


@pytest.mark.parametrize("ahead", [-1e9, -3600, 3600, 1e300])
@pytest.mark.parametrize("event", ["none", "renewed", "removed"])
def test_clocks_of_other_machines_may_be_wrong(monkeypatch, ahead, event):
    """A process whose lock seems to be stale, or of the future, lives if it renews it."""
    monkeypatch.setattr(locks, "_WATCH", 0.3)
    monkeypatch.setattr(locks, "_CONFIRM", 0.0)
    store, theirs = MemoryStore(), holder(renewed=time.time() + ahead)
    put_lock(store, theirs)

    def act():
        time.sleep(0.1)
        if event == "renewed":
            put_lock(store, {**theirs, "renewed": theirs["renewed"] * 2 + 1})
        if event == "removed":
            delete_object(store, LOCK)

    says = (
        rf"process {theirs['pid']} on elsewhere seems to have stopped writing to .*; waiting 0 s "
        "to see whether it renews its lock"
    )
    refusal = pytest.raises(StoreError, match="on elsewhere is writing to")
    with (
        meanwhile(act),
        pytest.warns(UserWarning, match=says),
        refusal if event == "renewed" else nullcontext(),
    ):
        WriterLock(store).__enter__().__exit__()


def test_a_lock_of_another_machine_that_was_renewed_is_refused_at_once():
    store = MemoryStore()
    put_lock(store, holder())
    with pytest.raises(StoreError, match=r"elsewhere is writing.*3 minutes after its last renewal"):
        WriterLock(store).__enter__()


@pytest.mark.parametrize("offered", [True, False])
def test_object_stores_create_the_lock_only_once(bucket, monkeypatch, offered):
    s3fs, name = pytest.importorskip("s3fs"), f"locks-{offered}".lower()
    options = {"endpoint_url": bucket, "key": "test", "secret": "test"}
    s3fs.S3FileSystem(**options).mkdir(name)
    store = FsspecStore.from_url(f"s3://{name}/h.zarr", storage_options=options)
    put = store.fs._pipe_file
    if not offered:  # a server that knows no conditions writes whatever the header says
        monkeypatch.setattr(store.fs, "_pipe_file", lambda *given, mode="": put(*given))
    waits = []
    monkeypatch.setattr(locks.time, "sleep", waits.append)
    with WriterLock(store) as lock:
        assert waits == ([] if offered else [locks._CONFIRM])
        if offered:
            assert locks._create(store, b"another")
            lock.validate()
    assert read_object(store, LOCK) is None
    store.fs.clear_instance_cache()


def test_a_run_looks_at_its_lock_about_once_a_second(tiny_checkpoint, monkeypatch):
    looks, begun = [], time.monotonic()
    monkeypatch.setattr(WriterLock, "validate", lambda lock: looks.append(lock))
    write(MemoryStore(), tiny_checkpoint)
    assert 2 <= len(looks) <= time.monotonic() - begun + 2


# icechunk


@pytest.fixture
def repo(tmp_path):
    icechunk = pytest.importorskip("icechunk")
    return icechunk.Repository.create(
        icechunk.local_filesystem_storage(str(tmp_path / "canopy.icechunk"))
    )


def messages(repo, branch="main"):
    return [snapshot.message for snapshot in repo.ancestry(branch=branch)][::-1][1:]


COMMITS = ["dates of canopy heights", *(f"canopy heights 202{n}-07-01T" for n in (0, 1))]


def check_commits(repo, expected, **options):
    found = messages(repo, **options)
    assert len(found) == len(expected)
    assert all(map(str.startswith, found, expected))


@pytest.fixture(scope="module")
def expected(tiny_checkpoint):
    return store_run.heights(str(tiny_checkpoint)).compute()


def test_each_date_is_committed_to_a_repository(tiny_checkpoint, repo, expected):
    assert write(repo, tiny_checkpoint, regions={"y": slice(0, 128)}).regions == 10
    check_commits(repo, COMMITS)
    assert write(repo, tiny_checkpoint).present == 10
    check_commits(repo, COMMITS + COMMITS[1:])
    assert write(repo, tiny_checkpoint).regions == 0
    xr.testing.assert_allclose(xchmv2.open_zarr(repo).compute(), expected, atol=5e-4)
    scene = store_run.scene()
    more = scene.assign_coords(time=scene.time - np.timedelta64(9, "D"))
    heights = [store_run.heights(str(tiny_checkpoint), more.isel(time=[date])) for date in (0, 1)]
    heights[0].chmv2.to_zarr(repo, progress=False)
    assert xchmv2.open_zarr(repo).sizes["time"] == 3
    repo.create_branch("dev", repo.lookup_branch("main"))
    heights[1].chmv2.to_zarr(repo, progress=False, storage_options={"branch": "dev"})
    assert xchmv2.open_zarr(repo).sizes["time"] == 3
    opened = xchmv2.open_zarr(repo, storage_options={"branch": "dev"})
    assert opened.sizes["time"] == 4


def test_what_was_written_before_an_error_is_committed(
    tiny_checkpoint, repo, expected, monkeypatch
):
    monkeypatch.setattr(SumGroup, "__call__", SumGroup.__call__)
    poison("raises")
    with refused("RuntimeError: poison tile") as caught:
        write(repo, tiny_checkpoint)
    noted(caught)
    check_commits(repo, COMMITS)
    monkeypatch.undo()
    assert write(repo, tiny_checkpoint).regions == 2
    xr.testing.assert_allclose(xchmv2.open_zarr(repo).compute(), expected, atol=5e-4)


def test_another_commit_meanwhile_is_no_loss(tiny_checkpoint, repo, monkeypatch):
    compute, others = SumGroup.__call__, []

    def disturbed(self, chunks):
        if not others:
            session = repo.writable_session("main")
            others.append(session)
            zarr.open_group(session.store, mode="r+").attrs["note"] = "mine"
            session.commit("another")
        return compute(self, chunks)

    monkeypatch.setattr(SumGroup, "__call__", disturbed)
    with pytest.raises(StoreError, match=r"committed to the branch 'main' meanwhile.*call again"):
        write(repo, tiny_checkpoint)
    assert write(repo, tiny_checkpoint).regions == REGIONS


def test_a_repository_on_a_cluster(tmp_path, tiny_checkpoint, repo, expected, client):
    height = store_run.heights(str(tiny_checkpoint))
    session = repo.writable_session("main")
    with pytest.raises(StoreError, match=r"changes that are not committed; pass the repository"):
        write(session, tiny_checkpoint)
    for store in (repo, repo.writable_session("main")):
        with pytest.raises(StoreError, match=r"found compute=False for icechunk; write now"):
            height.chmv2.to_zarr(store, compute=False)
    assert write(repo, tiny_checkpoint, regions={"time": 0}).regions == REGIONS // 2
    session = repo.writable_session("main")
    assert write(session, tiny_checkpoint, regions={"y": slice(0, 128)}).regions == 5
    session.commit("by hand")
    assert write(repo, tiny_checkpoint).regions == REGIONS // 2 - 5
    xr.testing.assert_allclose(xchmv2.open_zarr(repo).compute(), expected, atol=5e-4)
    icechunk = pytest.importorskip("icechunk")
    memory = icechunk.Repository.create(icechunk.in_memory_storage())
    with pytest.raises(StoreError, match=r"an icechunk repository in this process's memory"):
        write(memory, tiny_checkpoint)
