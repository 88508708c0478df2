"""Clusters for real: a scheduler and workers in processes of their own, labelled and not."""

import asyncio
import dataclasses
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cloudpickle
import dask
import numpy as np
import pytest
import reference
import torch
from conftest import cube, no_compute
from dask.core import flatten
from packaging.version import Version

distributed = pytest.importorskip("distributed")

from distributed.deploy.subprocess import SubprocessScheduler  # noqa: E402

import xchmv2  # noqa: E402
from xchmv2.errors import CheckpointError, CHMv2Error, ConfigError, DemoModelWarning, DeviceError  # noqa: E402
from xchmv2.inference import (  # noqa: E402
    PACKAGES,
    ModelSpec,
    WorkerReport,
    clear_models,
    forward_resources,
    models,
    resolve_model,
    tiles_forwarded,
    validate_versions,
    warn_of_demo,
    workers,
)
from xchmv2.inference.workers import use_forward_threads  # noqa: E402
from xchmv2.model import CHMv2ForDepthEstimation  # noqa: E402
from xchmv2.model.checkpoint import resolve_checkpoint  # noqa: E402
from xchmv2.predict import warming  # noqa: E402

# Private imports: what workers hold is asked of them.

ROOT = Path(__file__).parents[1]
GRID = dict(tile=64, overlap=16, block=96)
HUB_ID, SHARDED = "somebody/tiny-chmv2", "somebody/tiny-chmv2-shards"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def save_model(folder, seed):
    torch.manual_seed(seed)
    CHMv2ForDepthEstimation(reference.tiny_config()).save_pretrained(folder)
    return folder


def split_model(whole, folder):
    """Write a checkpoint again, in two shards."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(whole, folder)
    (folder / "model.safetensors").unlink()
    tensors = load_file(whole / "model.safetensors")
    index = {}
    for number in (1, 2):
        part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 2]}
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(part, folder / name)
        index.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


class FakeHub(BaseHTTPRequestHandler):
    """What the hub's client asks of the hub, for repositories in folders."""

    folders: dict
    asked: list

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path = self.path.split("?")[0]
        self.asked.append((self.command, path))
        found = re.fullmatch(r"/(?:api/models/)?(\w+/[\w-]+)/(\w+)/[^/]+(?:/(.+))?", path)
        folder = self.folders[found[1]]
        if found[2] == "resolve" and (folder / found[3]).is_file():
            data = (folder / found[3]).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.send(200, data, headers, body=body)
        elif found[2] == "resolve":
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body=body)
        else:
            listed = [self.describe(file) for file in sorted(folder.iterdir())]
            siblings = [{"rfilename": file["path"], **file} for file in listed]
            known = {"id": found[1], "modelId": found[1], "sha": COMMIT, "siblings": siblings}
            answer = listed if found[2] == "tree" else known
            self.send(200, json.dumps(answer).encode(), {}, body=body)

    def describe(self, file):
        size = file.stat().st_size
        known = {"type": "file", "path": file.name, "size": size, "oid": "0" * 40, "blobId": "0"}
        if file.suffix == ".safetensors":
            sha = hashlib.sha256(file.read_bytes()).hexdigest()
            known["lfs"] = {"size": size, "oid": sha, "sha256": sha, "pointerSize": 134}
        return known

    def send(self, status, data, headers, *, body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def fake_hub(tmp_path_factory):
    """Address, folders and list of requests of a hub with two repositories, one in shards."""
    root = tmp_path_factory.mktemp("hub")
    folders = {HUB_ID: save_model(root / "whole", seed=3)}
    folders[SHARDED] = split_model(folders[HUB_ID], root / "shards")
    handler = type("Handler", (FakeHub,), {"folders": folders, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folders, handler.asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Home folders of workers: ~/same is the same in all, ~/other differs, ~/one is in one."""
    root = tmp_path_factory.mktemp("homes")
    for name in ("plain", "gpu-1", "gpu-2"):
        (root / name).mkdir()
    for number, name in enumerate(("gpu-1", "gpu-2")):
        save_model(root / name / "same", seed=1)
        save_model(root / name / "other", seed=number)
    save_model(root / "gpu-1" / "one", seed=1)
    return root


def environment(home, hub_address="http://127.0.0.1:1"):
    return {
        "HOME": str(home),
        "HF_HOME": str(home / "hub"),
        "HF_ENDPOINT": hub_address,
        "HF_HUB_OFFLINE": "0",  # whatever it is around the tests: the hub is on loopback
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="module")
def client(homes, fake_hub, tmp_path_factory):
    """Client of a mixed cluster: one plain worker, two that declare a GPU."""
    scratch = str(tmp_path_factory.mktemp("scratch"))
    nannies = {
        name: {
            "cls": distributed.Nanny,
            "options": {
                "nthreads": 2,
                "resources": {"GPU": 1} if "gpu" in name else None,
                "env": {**environment(homes / name, fake_hub[0]), "OMP_NUM_THREADS": "1"},
                "local_directory": scratch,
                # Else a worker's log forgets what it read by the time it has done the rest.
                "config": {"distributed.admin.low-level-log-length": 1_000_000},
            },
        }
        for name in ("plain", "gpu-1", "gpu-2")
    }
    # The scheduler in a process of its own, as on most clusters: no setting of ours reaches it.
    scheduler = {
        "cls": SubprocessScheduler,
        "options": {"scheduler_kwargs": {"dashboard": False, "host": "127.0.0.1"}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with (
            distributed.SpecCluster(workers=nannies, scheduler=scheduler) as cluster,
            distributed.Client(cluster) as client,
        ):
            client.wait_for_workers(3)
            yield client


@pytest.fixture(scope="module")
def spec(client):
    """The model of ~/same, which does not exist on the client, in all GPU workers."""
    return xchmv2.warmup(client, "~/same")


def ran(client):
    """Names of workers by what they ran since the last call: kinds of tasks."""

    def executed(dask_worker):
        log = [entry for entry in dask_worker.state.log if entry[1:3] == ("executing", "memory")]
        dask_worker.state.log.clear()
        return dask_worker.name, {str(entry[0]) for entry in log}

    found = {}
    for name, keys in client.run(executed).values():
        for key in keys:
            kinds = re.findall(r"chmv2-(\w+)", key)
            found.setdefault(kinds[0] if kinds else "source", set()).add(name)
    return found


def forwarded(client):
    return dict(client.run(lambda dask_worker: (dask_worker.name, tiles_forwarded())).values())


def slow_cube(shape, **chunks):
    """Imagery whose every chunk takes a moment to read, so that all workers get some."""

    def read(block):
        time.sleep(0.02)
        return block

    return (
        cube(shape)
        .chunk(**chunks)
        .map(
            lambda band: (
                band.copy(data=band.data.map_blocks(read, dtype=band.dtype))
                if band.ndim == 2
                else band
            )
        )
    )


class TestWarmup:
    def test_the_client_needs_no_weights(self, client, spec, homes):
        assert not Path("~/same").expanduser().exists()
        expected = resolve_checkpoint(homes / "gpu-1" / "same")
        assert (spec.weights_sha256, spec.config_sha256) == (
            expected.weights_sha256,
            expected.config_sha256,
        )
        assert (spec.model, spec.device, spec.dtype) == ("~/same", "auto", "float32")
        assert spec.config == reference.tiny_config()

    def test_reports_tell_of_each_worker_that_forwards(self, spec):
        assert {report.name for report in spec.workers} == {"gpu-1", "gpu-2"}
        for report in spec.workers:
            if not torch.cuda.is_available():
                assert (report.device, report.card, report.hardware) == ("cpu", None, "CPU")
            # The nanny said OMP_NUM_THREADS=1; forwards take turns, so one gets all threads.
            assert (report.dask_threads, report.torch_threads) == (2, 2)
            assert report.address.startswith("tcp://")
        assert re.search(r"<~/same, weights \w{12}, float32>\n  gpu-1 on .*: \w+ \(", repr(spec))

    def test_a_forward_gets_the_threads_of_its_worker(self, client, spec):
        def threads():
            use_forward_threads()
            return torch.get_num_threads()

        assert client.submit(threads, pure=False).result() == 2

    def test_each_process_loads_it_once_and_graphs_carry_no_more_than_the_spec(self, client, spec):
        def loaded():
            from xchmv2.inference import models as held

            return {key[0]: id(found.model) for key, found in held._predictors.items()}

        before = {k: v[spec.weights_sha256] for k, v in client.run(loaded).items() if v}
        # Not their addresses: on a busy machine a nanny may have started one anew since.
        assert len(before) == len(spec.workers)
        lazy = cube((200, 200)).chunk(y=100, x=100).chmv2.predict(spec, **GRID)
        lazy.compute()
        xchmv2.warmup(client, "~/same")
        after = {k: v[spec.weights_sha256] for k, v in client.run(loaded).items() if v}
        assert after == before
        own = [v for k, v in lazy.__dask_graph__().items() if str(k).startswith("('chmv2")]
        assert own
        assert max(len(pickle.dumps(task)) for task in own) < 4000
        models = {task[0].job.model for task in own if hasattr(task[0], "job")}
        assert {type(model) for model in models} == {ModelSpec}

    def test_planning_by_spec_is_lazy_and_gives_the_keys_of_the_same_model(self, spec, homes):
        imagery = cube((200, 200)).chunk(y=100, x=100)
        with no_compute():
            first = imagery.chmv2.predict(spec, **GRID)
            second = imagery.chmv2.predict(spec.plain, **GRID)
        assert first.data.name == second.data.name
        assert first.attrs["chmv2_weights_sha256"] == spec.weights_sha256
        other = imagery.chmv2.predict(spec, dtype="bfloat16", **GRID)
        assert other.attrs["chmv2_dtype"] == "bfloat16"

    def test_result_is_that_of_this_process(self, spec, homes):
        imagery = cube((200, 260)).chunk(y=100, x=130)
        found = imagery.chmv2.predict(spec, **GRID).compute()
        here = imagery.chmv2.predict(homes / "gpu-1" / "same", device="cpu", **GRID)
        np.testing.assert_allclose(found, here.compute(scheduler="sync"), atol=5e-4)

    def test_a_worker_without_the_files_says_so_at_once(self, client):
        with pytest.raises(
            CHMv2Error,
            match=r"expected every worker that forwards tiles to find '~/one', found 1 of 2 that "
            r"cannot: worker 'gpu-2' \(tcp://[\d.:]+\) on [\w.]+: CheckpointError: expected a "
            r"folder with config.json.*does not exist here.*--resources 'GPU=1'",
        ):
            xchmv2.warmup(client, "~/one")

    def test_workers_that_hold_different_files(self, client):
        with pytest.raises(
            CheckpointError,
            match=r"the same files of '~/other' everywhere, found weights \w{12} and config \w{12} "
            r"on worker 'gpu-\d' .*; weights \w{12} and config \w{12} on worker 'gpu-\d' .*copy",
        ):
            xchmv2.warmup(client, "~/other")

    def test_a_spec_must_be_met(self, client, spec):
        again = xchmv2.warmup(client, spec)
        assert again.plain == spec.plain
        coarse = dataclasses.replace(spec, dtype="bfloat16")
        assert xchmv2.warmup(client, coarse).plain == coarse.plain
        assert xchmv2.warmup(client, coarse, dtype="float32").plain == spec.plain
        with pytest.raises(CheckpointError, match=r"and 1 more; weights 0+ and .* on the client"):
            xchmv2.warmup(client, dataclasses.replace(spec, weights_sha256="0" * 64))

    def test_a_folder_that_lies_here_too(self, client, homes, monkeypatch):
        folder = homes / "gpu-1" / "same"
        assert xchmv2.warmup(client, folder).model == str(folder)
        monkeypatch.chdir(homes / "gpu-1")
        assert xchmv2.warmup(client, "same").model == str(folder)

    def test_spread_of_a_model_without_bins_is_refused_while_planning(self, spec):
        config = reference.tiny_config(number_output_channels=1)
        unfit = dataclasses.replace(spec, config=config)
        with pytest.raises(ConfigError, match=r"bin"):
            cube((64, 64)).chunk().chmv2.predict(unfit, layers="bin_spread", **GRID)

    def test_live_models_are_refused(self, client):
        model = reference.whole_tile_model()
        with pytest.raises(CheckpointError, match=r"every worker can load.*save_pretrained"):
            xchmv2.warmup(client, model)
        live = ModelSpec("live:0", None, "0", "0", "cpu", "float32")
        with pytest.raises(CheckpointError, match=r"every worker can load.*save_pretrained"):
            cube((64, 64)).chunk().chmv2.predict(live, **GRID)

    @pytest.mark.parametrize("options", [dict(device="gpu"), dict(dtype="float16")])
    def test_unknown_device_or_dtype(self, client, options):
        with pytest.raises(DeviceError, match=r"'auto'"):
            xchmv2.warmup(client, "~/same", **options)

    def test_devices_that_the_workers_lack(self, client):
        with pytest.raises(CHMv2Error, match=r"2 of 2 that cannot.*the device 'cuda:99' on this"):
            xchmv2.warmup(client, "~/same", device="cuda:99")

    def test_no_client_or_no_worker(self):
        with pytest.raises(CHMv2Error, match=r"distributed.Client for use outside.*found 'tcp:"):
            xchmv2.warmup("tcp://127.0.0.1:8786")
        with (
            distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as empty,
            distributed.Client(empty, set_as_default=False) as client,
            pytest.raises(CHMv2Error, match=r"at least one worker, found none.*wait_for_workers"),
        ):
            xchmv2.warmup(client, "demo")

    def test_an_asynchronous_client(self):
        async def try_it():
            async with (
                distributed.Scheduler(dashboard_address=":0", port=0) as scheduler,
                distributed.Client(scheduler.address, asynchronous=True) as client,
            ):
                assert workers.workers_dtype(client, "auto", "auto") == "float32"
                with pytest.raises(CHMv2Error, match=r"found an asynchronous client"):
                    xchmv2.warmup(client, "demo")

        asyncio.run(try_it())


class TestPlanning:
    def test_folders_of_the_workers_alone_need_their_word(self, client):
        with pytest.raises(
            CheckpointError,
            match=r"spec = xchmv2.warmup\(client, model\).*; otherwise correct the path",
        ):
            cube((64, 64)).chunk().chmv2.predict("/nowhere/here", **GRID)

    def test_the_workers_choose_the_precision(self, client, spec, homes, monkeypatch):
        # What this process has does not count.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **asked: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        folder = homes / "gpu-1" / "same"
        assert resolve_model(folder, in_process=True).dtype == "bfloat16"
        assert resolve_model(folder).dtype == "float32"
        assert resolve_model(folder, dtype="bfloat16").dtype == "bfloat16"
        assert resolve_model(folder, device="cpu").dtype == "float32"

    def test_one_worker_without_bfloat16_is_enough(self):
        assert workers.common_dtype(["bfloat16", "bfloat16"]) == "bfloat16"
        assert workers.common_dtype(["bfloat16", "float32"]) == "float32"
        assert workers.common_dtype([]) == "float32"


class TestHub:
    def test_workers_fetch_it_and_the_client_does_not(self, client, fake_hub):
        _, folders, asked = fake_hub
        folder = folders[HUB_ID]
        asked.clear()
        found = xchmv2.warmup(client, HUB_ID)
        assert (found.model, found.revision) == (HUB_ID, COMMIT)
        assert found.weights_sha256 == resolve_checkpoint(folder).weights_sha256
        fetched = [path for method, path in asked if method == "GET" and "safetensors" in path]
        assert len(fetched) == 2  # one cache per home
        heights = cube((100, 100)).chunk().chmv2.predict(found, **GRID).compute()
        here = cube((100, 100)).chmv2.predict(folder, device="cpu", **GRID)
        np.testing.assert_allclose(heights, here, atol=5e-4)

    def test_planning_fetches_no_weights(self, fake_hub, tmp_path):
        address, folders, asked = fake_hub
        asked.clear()
        code = f"""
            import json
            from dataclasses import asdict
            from xchmv2.inference.models import _find_unloaded
            for model in {list(folders)}:
                found = asdict(_find_unloaded(model))
                found["files"] = sorted(path.name for path in found["folder"].iterdir())
                print(json.dumps(found, default=str))
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, **environment(tmp_path, address)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        for line, (model, folder) in zip(lines, folders.items(), strict=True):
            found, expected = json.loads(line), resolve_checkpoint(folder)
            assert (found["model_id"], found["revision"]) == (model, COMMIT)
            assert found["weights_sha256"] == expected.weights_sha256
            assert found["config_sha256"] == expected.config_sha256
            assert "config.json" in found["files"]
            assert not any(name.endswith(".safetensors") for name in found["files"])
        assert not any(path.endswith(".safetensors") for method, path in asked if method == "GET")

    def test_a_hub_that_tells_no_hash_or_nothing_at_all(self, monkeypatch, tmp_path):
        import huggingface_hub

        folder = tmp_path / "snapshots" / COMMIT
        save_model(tmp_path / "whole", seed=3)
        folder.mkdir(parents=True)
        shutil.copy(tmp_path / "whole" / "config.json", folder)

        def download(repo_id, *, revision, allow_patterns):
            if "model.safetensors" in allow_patterns:
                shutil.copy(tmp_path / "whole" / "model.safetensors", folder)
            return str(folder)

        def refuse(*args, **options):
            raise OSError("the hub is away")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
        with pytest.raises(CheckpointError, match=r"the hash of.*OSError.*away.*xchmv2.warmup"):
            models._find_unloaded(HUB_ID)
        nothing = type("Info", (), {"siblings": None})()
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: nothing)
        found = models._find_unloaded(HUB_ID)
        assert found.weights_sha256 == resolve_checkpoint(tmp_path / "whole").weights_sha256
        assert found == models._find_unloaded(HUB_ID)  # the weights lie here now


SMALL = dict(tile=32, overlap=8, block=64)


class TestForwardsOnGPUs:
    def computed(self, client, compute):
        """Run something, and check where forwards and the rest of it went."""
        ran(client)
        before = forwarded(client)
        compute()
        after = forwarded(client)
        counts = {name: after[name] - before[name] for name in after}
        where = ran(client)
        assert counts["plain"] == 0
        assert counts["gpu-1"] + counts["gpu-2"] > 0
        assert where.get("groups", set()) <= {"gpu-1", "gpu-2"}
        return where

    def fresh(self, spec, seed):
        """A prediction that no worker holds any part of, large enough to keep all of them busy."""
        imagery = slow_cube((400, 400), y=64, x=64)
        return imagery.chmv2.predict(spec, value_range=(0, seed), **SMALL)

    @pytest.mark.parametrize("how", ["compute", "zarr", "persist"])
    def test_plain_dask_after_warmup(self, client, spec, how, tmp_path):
        lazy = self.fresh(spec, hash(how) % 997 + 1000)
        actions = {
            "compute": lazy.compute,
            "zarr": lambda: lazy.drop_vars("spatial_ref").to_zarr(
                tmp_path / "heights.zarr", consolidated=False
            ),
            "persist": lambda: distributed.wait(lazy.persist()),
        }
        where = self.computed(client, actions[how])
        assert "plain" in where["source"]

    def test_fused_with_all_that_surrounds_it(self, client, spec):
        """A small image is one task from reading to the result."""
        imagery = cube((64, 64)).to_dataarray("band").chunk(band=3, y=-1, x=-1)
        for seed in range(1000, 1004):
            lazy = imagery.chmv2.predict(spec, value_range=(0, seed), **SMALL) + 1
            self.computed(client, lazy.compute)

    def test_annotations_suffice_where_layers_are_kept(self, client, spec):
        """The recipe for graphs of our own: cull, and hand over layers as they are."""
        client.unregister_scheduler_plugin(warming.ForwardsOnGPUs.name)
        try:
            lazy = self.fresh(spec, 2000)
            groups = [n for n in lazy.data.dask.layers if n.startswith("chmv2-groups-")]
            assert lazy.data.dask.layers[groups[0]].annotations == {"resources": {"GPU": 0.5}}
            others = {
                name for name, layer in lazy.data.dask.layers.items() if layer.annotations
            } - set(groups)
            assert not others
            keys = list(flatten(lazy.data.__dask_keys__()))
            culled = lazy.data.dask.cull(set(keys))
            found = []
            where = self.computed(client, lambda: found.extend(client.get(culled, keys, sync=True)))
            assert "plain" in where["source"]
            assert sum(block.size for block in found) == 400 * 400
            lazy = self.fresh(spec, 2001)
            self.computed(client, lambda: lazy.compute(optimize_graph=False))
            lazy = self.fresh(spec, 2002)
            with dask.config.set({"array_optimize": None}):
                self.computed(client, lazy.compute)
        finally:
            client.register_plugin(warming.ForwardsOnGPUs())

    @pytest.mark.skipif(
        Version(distributed.__version__) < Version("2026.8"),
        reason="older versions keep annotations while they optimise",
    )
    def test_without_either_they_run_anywhere(self, client, spec):
        """What this module is for: dask's optimisation alone loses the annotation."""
        client.unregister_scheduler_plugin(warming.ForwardsOnGPUs.name)
        try:
            # Not even this setting of the client helps: the scheduler optimises.
            with dask.config.set({"optimization.fuse.active": False}):
                lazy = self.fresh(spec, 3000)
                # The plain worker is given a tile, and has no model.
                with pytest.raises(CheckpointError, match=r"does not exist here"):
                    lazy.compute()
        finally:
            client.register_plugin(warming.ForwardsOnGPUs())

    def test_annotations_do_not_change_keys(self, client, spec, monkeypatch):
        imagery = cube((128, 128)).chunk(y=64, x=64)
        labelled = imagery.chmv2.predict(spec, **SMALL)
        monkeypatch.setattr(workers, "active_client", lambda: None)
        assert forward_resources() is None
        bare = imagery.chmv2.predict(spec, **SMALL)
        assert set(bare.__dask_graph__()) == set(labelled.__dask_graph__())
        assert not any(layer.annotations for layer in bare.data.dask.layers.values())

    def test_annotations_of_the_user_are_kept(self, client, spec):
        imagery = cube((128, 128)).chunk(y=64, x=64)
        with dask.annotate(priority=7):
            lazy = imagery.chmv2.predict(spec, **SMALL)
        found = {n[:12]: layer.annotations for n, layer in lazy.data.dask.layers.items()}
        assert found["chmv2-groups"] == {"resources": {"GPU": 0.5}, "priority": 7}
        with dask.annotate(resources={"A100": 1}):
            lazy = imagery.chmv2.predict(spec, value_range=(0, 250), **SMALL)
        found = {n[:12]: layer.annotations for n, layer in lazy.data.dask.layers.items()}
        assert found["chmv2-groups"] == {"resources": {"A100": 1}}

    def test_how_much_of_the_resource(self):
        assert workers.gpu_share([]) is None
        assert workers.gpu_share([0, 0]) is None
        assert workers.gpu_share([1, 1, 0]) == 0.5
        assert workers.gpu_share([2, 0.25]) == 0.125

    def test_a_cluster_without_gpus_is_left_alone(self):
        with (
            distributed.LocalCluster(
                n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
            ) as cluster,
            distributed.Client(cluster, set_as_default=False) as client,
            client.as_current(),
        ):
            warn_of_demo.cache_clear()
            with pytest.warns(DemoModelWarning, match=r"trained on synthetic forest alone"):
                spec = xchmv2.warmup(client, "demo")
            lazy = cube((64, 64)).chunk().chmv2.predict(spec, **GRID)
            assert not any(layer.annotations for layer in lazy.data.dask.layers.values())
            assert np.isfinite(client.compute(lazy).result()).all()
        clear_models()


def documented(name):
    """A block of docs/clusters.md that is marked as one that runs."""
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- runnable: {name} -->\n```\w+\n(.*?)```", text, re.DOTALL)[1]


def command(name, address):
    """A documented command line, for the scheduler at another address and this Python."""
    program, kind, *options = shlex.split(documented(name).replace("tcp://127.0.0.1:8786", address))
    assert program == "dask"
    return [sys.executable, "-m", f"distributed.cli.dask_{kind}", *options]


@contextmanager
def process(arguments, log, **environ):
    """A process of a cluster that writes to a log."""
    with log.open("wb") as file:
        running = subprocess.Popen(
            arguments, env={**os.environ, **environ}, stdout=file, stderr=file, cwd=ROOT
        )
        try:
            yield running
        finally:
            running.terminate()
            running.wait()


def held_models():
    module = sys.modules.get("xchmv2.inference.models")
    return [key[0] for key in module._predictors] if module else []


# Late workers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def names(client):
    """Addresses of workers by name."""
    workers = client.scheduler_info()["workers"]
    return {info["name"]: address for address, info in workers.items()}


def wait_until(condition, seconds=600):
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "waited in vain"
        time.sleep(0.05)


class TestLateAndLostWorkers:
    def test_workers_that_join_later(self, client, homes, tmp_path):
        """One with the model, one without: they are started together to save time."""
        empty = tmp_path / "empty"
        empty.mkdir()
        spec = xchmv2.warmup(client, "~/same")
        arguments = command("gpu worker", client.scheduler.address)
        poor, log = [*arguments, "--name", "poor"], tmp_path / "poor.log"
        with (
            process(arguments, tmp_path / "gpu.log", **environment(homes / "gpu-2")),
            process(poor, log, **environment(empty)) as refused,
        ):
            wait_until(lambda: "gpu" in names(client))
            address = names(client)["gpu"]
            info = client.scheduler_info()["workers"][address]
            assert (info["nthreads"], info["resources"]) == (4, {"GPU": 1})
            found = client.run(held_models, workers=[address])
            assert spec.weights_sha256 in found[address]
            # Its nanny does not start it over and over.
            wait_until(lambda: refused.poll() is not None)
            assert "poor" not in names(client)
        assert re.search(r"CheckpointError: expected a folder with config", log.read_text())
        wait_until(lambda: "gpu" not in names(client))

    def test_a_killed_worker_comes_back_with_the_model(self, client, spec):
        spec = xchmv2.warmup(client, spec)
        victim = next(report for report in spec.workers if report.name == "gpu-2")
        pid = client.run(os.getpid, workers=[victim.address])[victim.address]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid not in client.run(os.getpid, on_error="ignore").values())
        wait_until(lambda: names(client).get("gpu-2", victim.address) != victim.address)
        address = names(client)["gpu-2"]
        assert client.run(os.getpid, workers=[address])[address] != pid
        # Before its first task.
        assert spec.weights_sha256 in client.run(held_models, workers=[address])[address]

    def test_a_worker_of_other_versions_leaves(self, caplog):
        with (
            distributed.LocalCluster(
                n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
            ) as cluster,
            distributed.Client(cluster, set_as_default=False) as client,
        ):
            ours = client.get_versions(packages=_VERSIONED)["client"]["packages"]
            spec = ModelSpec("~/nowhere", None, "0" * 64, "0", "cpu", "float32")
            idle = warming._LoadModel(spec, ours, only_gpus=True)
            client.register_plugin(idle)  # declares no GPU, needs no model
            assert len(names(client)) == 1
            unfit = warming._LoadModel(spec, {**ours, "zarr": "2.0"}, only_gpus=True)
            with pytest.raises(CHMv2Error, match=r"zarr \S+ \(client: 2.0\) on worker '0'"):
                client.register_plugin(unfit)
            wait_until(lambda: not names(client))
        assert "worker 0 leaves the cluster: expected the same versions" in caplog.text


_VERSIONED = [name for name in PACKAGES if name != "python"]


class TestVersions:
    """With what a real client returns, and one thing in it changed."""

    @pytest.fixture
    def told(self, client):
        return client.get_versions(packages=_VERSIONED)

    def check(self, client, told, monkeypatch):
        monkeypatch.setattr(client, "get_versions", lambda packages: told)
        return validate_versions(client, PACKAGES)

    def test_equal_ones_pass(self, client, told, monkeypatch):
        assert self.check(client, told, monkeypatch)["torch"].startswith("2.")

    @pytest.mark.parametrize(
        ("package", "version", "passes"),
        [
            ("torch", "{}+cu999", True),
            ("numpy", "{}.7", True),
            ("numpy", "1.0", False),
            ("dask", "{}.1", False),
            ("xchmv2", "9.9", False),
            ("torch", None, False),
            ("python", "3.2.1.final.0", False),
        ],
    )
    def test_on_a_worker(self, client, told, monkeypatch, package, version, passes):
        address, info = next(iter(told["workers"].items()))
        ours = told["client"]["packages"][package]
        info["packages"][package] = version and version.format(str(ours).split("+")[0])
        if passes:
            self.check(client, told, monkeypatch)
            return
        shown = info["packages"][package] or "missing"
        with pytest.raises(
            CHMv2Error,
            match=rf"the same versions.*found {package} {re.escape(shown)} \(client: .*\) on "
            rf"worker '[\w-]+' \({address}\) on .*; install the client's versions",
        ):
            self.check(client, told, monkeypatch)

    def test_on_the_scheduler(self, client, told, monkeypatch):
        told["scheduler"]["packages"]["zarr"] = None  # it needs none
        self.check(client, told, monkeypatch)
        told["scheduler"]["packages"]["torch"] = None
        with pytest.raises(CHMv2Error, match=r"torch missing .* on the scheduler"):
            self.check(client, told, monkeypatch)

    @pytest.mark.parametrize("party", ["scheduler", "worker"])
    def test_another_version_is_refused_without_warmup(
        self, client, spec, told, monkeypatch, tmp_path, party
    ):
        """While planning, and where an older plan is computed region by region; no task is sent."""
        imagery = cube((64, 64)).chunk()
        lazy = imagery.chmv2.predict(spec, **GRID)
        info = told["scheduler"] if party == "scheduler" else next(iter(told["workers"].values()))
        info["packages"]["xchmv2"] = "0.1.0"
        asked = []
        monkeypatch.setattr(client, "get_versions", lambda packages: asked.append(packages) or told)
        ran(client)
        refused = pytest.raises(
            CHMv2Error,
            match=rf"expected the same versions .*, found xchmv2 0\.1\.0 \(client: [\d.a-z]+\) on "
            rf"(the )?{party} ?.*; install the client's versions there",
        )
        with refused:
            imagery.chmv2.predict(spec, **GRID)
        with refused:
            imagery.chmv2.plan(spec, **GRID)
        with refused:
            lazy.chmv2.to_zarr(tmp_path / "heights.zarr", progress=False)
        assert asked == [["xchmv2"]] * 3
        assert not ran(client)

    def test_workers_beyond_three_are_counted(self, client, told, monkeypatch):
        info = next(iter(told["workers"].values()))
        info["packages"]["xchmv2"] = "0.1.0"
        told["workers"] = {f"tcp://worker-{number}": info for number in range(5)}
        with pytest.raises(CHMv2Error, match=r"worker-2'.*; and on 2 more; install"):
            self.check(client, told, monkeypatch)

    def test_the_version_of_this_package_is_among_those_compared(self):
        assert PACKAGES[0] == "xchmv2"


class TestDocumentation:
    def test_laptop(self, tmp_path):
        (tmp_path / "laptop.py").write_text(documented("laptop.py"))
        done = subprocess.run(
            [sys.executable, "laptop.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        head, worker, mean = done.stdout.splitlines()
        assert head.startswith("<demo, weights ")
        assert ", 2 dask threads, 2 torch threads, loaded in " in worker
        assert 0 <= float(mean) < 96
        assert "DemoModelWarning" in done.stderr

    def test_scheduler_and_workers_by_hand(self, tmp_path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        address = f"tcp://127.0.0.1:{port}"
        scheduler = [port if a == "8786" else a for a in command("scheduler", address)]
        with (
            process([*scheduler, "--dashboard-address", ":0"], tmp_path / "scheduler.log"),
            process(command("cpu worker", address), tmp_path / "worker.log"),
            distributed.Client(address, set_as_default=False, timeout=600) as client,
        ):
            client.wait_for_workers(1, timeout=600)
            (info,) = client.scheduler_info()["workers"].values()
            assert (info["name"], info["nthreads"], info["resources"]) == ("cpu", 2, {})

    def test_slurm(self):
        pytest.importorskip("dask_jobqueue")
        code = documented("slurm") + "\nprint(cluster.job_script())"
        script = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=600)
        for line in ("#SBATCH -p gpu", "#SBATCH --cpus-per-task=4", "#SBATCH --gres=gpu:1"):
            assert line in script
        assert re.search(r"--nthreads 4.* --resources GPU=1 --lifetime 11h50m", script)

    def test_all_code_is_python(self):
        text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(blocks) == 6
        for block in blocks:
            compile(block, "clusters.md", "exec")


def report(name, card, host="h1"):
    return WorkerReport(name, host, f"tcp://{name}", "cuda:0", card, "NVIDIA X", 4, 1, 0.0)


def test_shared_gpus_are_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warming._warn_of_shared_gpus([report("a", "u1"), report("b", "u2")])
        warming._warn_of_shared_gpus([report("a", None), report("b", None)])
    with pytest.warns(
        UserWarning,
        match=r"2 worker processes share one GPU \(NVIDIA X\) on h1: a, c\. .*LocalCUDACluster",
    ) as got:
        warming._warn_of_shared_gpus([report("a", "u1"), report("b", "u2"), report("c", "u1")])
    assert len(got) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_processes_on_a_real_gpu(tiny_checkpoint):
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        with pytest.warns(UserWarning, match=r"2 worker processes share one GPU"):
            spec = xchmv2.warmup(client, tiny_checkpoint)
        assert len({report.card for report in spec.workers}) == 1
        assert spec.dtype == "bfloat16"
        found = cube((128, 128)).chunk(y=64, x=64).chmv2.predict(spec, **GRID).compute()
        assert np.isfinite(found).all()


def test_importing_the_package_imports_no_distributed():
    code = (
        "import sys, xchmv2; assert 'distributed' not in sys.modules; "
        "assert 'warmup' in dir(xchmv2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
