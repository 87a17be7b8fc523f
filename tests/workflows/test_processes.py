"""Two processes of one job against one process: the same figures, and what becomes of the job when one of them ends."""

import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import HashStore

from finetune import api
from finetune.cli.main import main
from finetune.errors import ConfigError
from finetune.runs.cache_folder import list_cache
from finetune.runs.folder import RunFolder
from finetune.runs.processes import Processes
from tests.training.exact_resume import write_images

PROJECT = Path(__file__).resolve().parents[2]
OPTIONS = ["--model", "lenet5", "--image-size", "32", "--scenario", "large-different", "--head-start", "random"]
LOOP = [*OPTIONS, "--epochs", "3", "--batch-size", "7", "--workers", "0"]
SAVES_OFTEN = """
import sys
from finetune.training import checkpoint, step
checkpoint.TRAINING_PER_SAVE = 0
{more}
from finetune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def launcher(*words: str, restarts: int = 0) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return [*command, "--max-restarts", str(restarts), *words]


def launch(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        launcher(*words, **options), env=environment, cwd=PROJECT, capture_output=True, text=True, check=False
    )


NORM = ["--model", "timm/test_resnet", "--no-use-pretrained", "--image-size", "32", "--scenario", "large-different"]


def test_batch_norm_of_two_processes_sees_what_that_of_one_does(data: Path, tmp_path: Path) -> None:
    # Of 31 images the last batch is a single one: a process has none.
    options = [*NORM, "--epochs", "2", "--batch-size", "5", "--workers", "0", "--quiet"]
    runs = [tmp_path / "one", tmp_path / "two", tmp_path / "apart"]
    assert main(["train", str(data), *options, "--output", str(runs[0])]) == 0
    for run, more in ((runs[1], ["--sync-batch-norm"]), (runs[2], [])):
        done = launch("-m", "finetune", "train", str(data), *options, *more, "--output", str(run))
        assert done.returncode == 0, done.stderr
    expected, found, apart = map(numbers, runs)
    losses = [name for name in expected if "loss" in name]
    assert {name: found[name] for name in losses} == pytest.approx({name: expected[name] for name in losses}, abs=1e-5)
    assert any(abs(apart[name] - expected[name]) > 1e-3 for name in losses)


ONE_WITHOUT_IMAGES = """
import copy, torch
from torch import distributed, nn
from finetune.runs.processes import Processes
from finetune.training.schedules import Schedule
from finetune.training.step import Learner, train_step
from finetune.training.sync_norm import SharedStatistics

distributed.init_process_group("gloo")
rank = distributed.get_rank()
processes = Processes(rank=rank, count=2, local_rank=rank, local_count=2, group=distributed.group.WORLD)
torch.manual_seed(0)
layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).train()
batch = torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 0]), list("abcd")
ghost = torch.randn(1, 3, 12, 12), torch.tensor([0]), ["ghost"]
for parts in (1, 2):
    pair = copy.deepcopy(network), copy.deepcopy(network)
    for model, share, more in (
        (pair[0], batch, {}),
        (
            pair[1],
            None if rank else batch,
            {"processes": processes, "shared_statistics": SharedStatistics(processes), "sample": lambda: ghost},
        ),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = Schedule.of(None, optimizer)
        criterion = nn.CrossEntropyLoss()
        learner = Learner(model=model, criterion=criterion, optimizer=optimizer, schedule=schedule, parts=parts, **more)
        train_step(learner, share)
    for name, tensor in pair[0].state_dict().items():
        torch.testing.assert_close(pair[1].state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
distributed.destroy_process_group()
"""


def test_a_process_without_images_changes_no_gradient(tmp_path: Path) -> None:
    script = tmp_path / "one_without_images.py"
    script.write_text(ONE_WITHOUT_IMAGES)
    done = launch(str(script))
    assert done.returncode == 0, done.stderr


FOLDS_SHARED = """
import numpy as np, torch
from torch import distributed
from finetune.features.extract import Features
from finetune.features.probe import are_folds_shared, solve_probe
from finetune.runs.processes import join_processes

processes = join_processes("cpu")
solved = []
probe_module = __import__("finetune.features.probe", fromlist=["solve"])
solve = probe_module.solve
probe_module.solve = lambda problems, **more: solved.append(len(problems.image_weights_BN)) or solve(problems, **more)
generator = np.random.default_rng(0)
for counts in ([600] * 60, [40] * 60, [2] * 3):
    classes_N = np.repeat(np.arange(len(counts)), counts)
    centres_KD = generator.normal(size=(len(counts), 24))
    features_ND = (centres_KD[classes_N] + generator.normal(size=(len(classes_N), 24))).astype(np.float32)
    train = Features(features_ND=features_ND, class_indices_N=classes_N)
    alone = solve_probe(train, class_count=len(counts), seed=0)
    of_all, solved[:] = solved[0], []
    shared = solve_probe(train, class_count=len(counts), seed=0, processes=processes)
    assert solved[0] == len(range(of_all)[processes.rank :: 2]), (solved, of_all)
    solved.clear()
    if are_folds_shared(len(train), len(counts)):
        assert shared.summary() == alone.summary()
        assert np.array_equal(shared.weight_KD, alone.weight_KD) and np.array_equal(shared.bias_K, alone.bias_K)
    else:
        assert abs(shared.logits(features_ND) - alone.logits(features_ND)).max() < 1e-2
    assert processes.gather(shared.summary()) == [shared.summary()] * 2
"""


def test_the_folds_of_a_large_probe_are_shared_and_its_bits_are_those_of_one_process(tmp_path: Path) -> None:
    script = tmp_path / "folds_shared.py"
    script.write_text(FOLDS_SHARED)
    done = launch(str(script))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "data"
    write_images(folder)
    return folder


def numbers(run: Path) -> dict[str, float]:
    """Every number of every event but for times, by where it stands."""
    events = RunFolder(run).events()
    return {
        f"{place}/{event['event']}/{name}": value
        for place, event in enumerate(events)
        for name, value in event.items()
        if isinstance(value, float) and name not in ("seconds", "computing_seconds")
    }


def plain_rows(text: str) -> list[tuple[str, ...]]:
    """Rows of predictions in CSV, probabilities as far as any number of threads gives them."""
    return [(row.pop("probability")[:7], *row.values()) for row in csv.DictReader(text.splitlines())]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_train_evaluate_and_predict_as_one_does(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", str(data), "--output", str(one), *LOOP]) == 0
    found = launch("-m", "finetune", "train", str(data), "--output", str(two), *LOOP)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(str(two)) == 1  # one of them speaks
    expected = numbers(one)
    assert numbers(two) == pytest.approx(expected, abs=1e-6)
    assert any("train_loss" in name for name in expected)
    for mine, theirs in zip(rows(one / "predictions.csv"), rows(two / "predictions.csv"), strict=True):
        assert float(mine.pop("probability")) == pytest.approx(float(theirs.pop("probability")), abs=2e-6)
        assert mine == theirs
    assert json.loads((two / "environment.json").read_text())["processes"] == 2

    capsys.readouterr()
    words = ["evaluate", str(two), str(data), "--split", "all", "--batch-size", "5", "--format", "json"]
    assert main(words) == 0
    alone, together = json.loads(capsys.readouterr().out), json.loads(launch("-m", "finetune", *words).stdout)
    assert together.pop("log_loss") == pytest.approx(alone.pop("log_loss"), abs=1e-6)
    assert together == alone
    bad = data.parent / "bad.png"
    bad.write_bytes(b"")
    words = ["predict", str(two), str(data / "train"), str(bad), "--format", "csv", "--batch-size", "4"]
    assert main(words) == 3
    assert plain_rows(launch("-m", "finetune", *words).stdout) == plain_rows(capsys.readouterr().out)


def test_two_processes_run_the_frozen_layers_once_for_both(flowers: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}  # as two on two cores have
    phases = ["--phases", "head:1,top1:1", "--boundary-cache", "always", "--views", "1", "--batch-size", "16"]
    runs = []
    for name, start in (("one", [sys.executable]), ("two", launcher())):
        environment["FINETUNE_CACHE"] = str(tmp_path / f"cache-{name}")
        runs.append(tmp_path / name)
        words = ["-m", "finetune", "train", str(flowers), "--output", str(runs[-1]), *phases]
        found = subprocess.run([*start, *words], env=environment, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
    one, two = (numbers(run) for run in runs)
    assert two == pytest.approx(one, abs=1e-6)
    computed = [event["computed"] for event in RunFolder(runs[1]).events() if event["event"] == "features"]
    images = len(rows(runs[1] / "split.csv"))
    assert computed == [math.ceil(images / 2)]


HARNESS = """
import sys
import torch
from torch import nn
from torch.utils.data import TensorDataset, Dataset
from finetune.data.loaders import evaluation_loader, then_none, training_loader
from finetune.evaluation.infer import predict_batches
from finetune.runs.processes import ALONE, join_processes
from finetune.training.loop import evaluate_loss, run_epochs
from finetune.training.progress import Progress
from finetune.training.schedules import Schedule
from finetune.training.step import Learner


class Images(Dataset):
    def __init__(self, count):
        generator = torch.Generator().manual_seed(count)
        self.images = torch.randn(count, 3, 4, 4, generator=generator)
        self.class_indices = [index % 3 for index in range(count)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index = key[1] if isinstance(key, tuple) else key
        return self.images[index], self.class_indices[index], f"{index}.png"


def learner_of(processes, weights):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model[2].eval().train = lambda mode=True: model[2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return Learner(
        model=model, criterion=nn.CrossEntropyLoss(weight=weights), optimizer=optimizer,
        schedule=Schedule.of(None, optimizer), max_grad_norm=1.0, parts=2, processes=processes,
    )


def trained(processes, count, batch_size, weights):
    data, learner, progress = Images(count), learner_of(processes, weights), Progress()
    loaders = {
        "train": training_loader(data, batch_size=batch_size, seed=3, processes=processes),
        "valid": evaluation_loader(data, batch_size=batch_size, processes=processes),
    }
    run_epochs(learner, loaders, 2, progress=progress)
    predictions = predict_batches(
        learner.network, loaders["valid"], device=torch.device("cpu"), processes=processes
    )
    assert list(predictions.image_paths) == [f"{index}.png" for index in range(count)], predictions.image_paths
    assert predictions.probabilities_NK.shape == (count, 3)
    return progress.history, predictions, evaluate_loss(learner, loaders["valid"])


processes = join_processes("cpu")
assert processes.count == 2
assert processes.gather(processes.rank) == [0, 1]
assert processes.gather_shares(processes.share("abcde")) == list("abcde")
assert processes.any(processes.rank == 1) and not processes.any(False)
assert processes.from_main(lambda: processes.rank) == 0
for count in range(1, 18):
    for batch_size in range(1, 7):
        weights = torch.tensor([1.0, 2.0, 0.5]) if batch_size % 2 else None
        (mine, together, totals), (alone, single, whole) = (
            trained(each, count, batch_size, weights) for each in (processes, ALONE)
        )
        assert totals.images == whole.images == count
        for name, values in alone.series().items():
            if name != "seconds":
                torch.testing.assert_close(torch.tensor(mine.series()[name]), torch.tensor(values), rtol=0, atol=1e-6)
        assert abs(mine.start_loss - alone.start_loss) < 1e-6 and mine.best_epoch == alone.best_epoch
        assert abs(together.probabilities_NK - single.probabilities_NK).max() < 1e-6
        assert (together.class_indices_N == single.class_indices_N).all()
norm = nn.BatchNorm1d(2)
if processes.is_main:
    print("all the same", flush=True)
try:
    processes.from_main(lambda: 1 / 0)
except ZeroDivisionError:
    assert processes.is_main
except SystemExit as error:
    assert error.code == 1 and not processes.is_main
else:
    raise AssertionError("nothing was raised")
processes.wait()
"""


def test_metrics_and_counts_are_those_of_one_process_whatever_the_sizes(tmp_path: Path) -> None:
    script = tmp_path / "harness.py"
    script.write_text(HARNESS)
    found = launch(str(script))
    assert found.returncode == 0, found.stderr
    assert found.stdout == "all the same\n"


HANGING = """
import sys
import time
from datetime import timedelta
from finetune.errors import RunError
from finetune.runs import processes as room

room.EPOCH_TIMEOUT = timedelta(seconds=2)
processes = room.join_processes("cpu")
if not processes.is_main:
    time.sleep(4)  # long work, for which the other waits
assert processes.gather(processes.rank) == [0, 1]
if processes.is_main:
    try:
        with room.peer_faults():
            processes.in_epoch().wait()
    except RunError as error:
        print(error.message, flush=True)
else:
    time.sleep(6)  # it hangs in an epoch
"""


def test_a_process_that_hangs_in_an_epoch_is_given_up_and_one_at_long_work_is_waited_for(tmp_path: Path) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    assert "another process of this job has ended or does not answer" in launch(str(script)).stdout


def saving_often(tmp_path: Path, more: str = "") -> str:
    script = tmp_path / "train.py"
    script.write_text(SAVES_OFTEN.format(more=more))
    return str(script)


def when_epochs(run: Path, count: int) -> None:
    """Wait until `count` epochs are recorded."""
    for _ in range(2400):
        if sum(event["event"] == "epoch" for event in RunFolder(run).events()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{run} did not come to epoch {count}")


LONG = [*OPTIONS, "--epochs", "40", "--batch-size", "7", "--workers", "0", "--averaging", "ema"]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The model that two processes make whom nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = launch(saving_often(folder), "train", str(data), "--output", str(folder / "calm"), *LONG)
    assert found.returncode == 0, found.stderr
    return (folder / "calm" / "model.safetensors").read_bytes()


def kill_rank(rank: int) -> Callable[[subprocess.Popen[str]], None]:
    def kill(job: subprocess.Popen[str]) -> None:
        workers = psutil.Process(job.pid).children()
        (worker,) = (each for each in workers if each.environ().get("RANK") == str(rank))
        worker.kill()

    return kill


def terminate(job: subprocess.Popen[str]) -> None:
    job.send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_the_launcher_restarts_a_killed_job_and_it_ends_at_the_same_weights(
    data: Path, tmp_path: Path, undisturbed: bytes
) -> None:
    run, ended = tmp_path / "run", _disturbed(data, tmp_path, kill_rank(1), restarts=3)
    assert ended.returncode == 0
    assert (run / "model.safetensors").read_bytes() == undisturbed
    epochs = [event["epoch"] for event in RunFolder(run).events() if event["event"] == "epoch"]
    assert epochs == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_within_a_minute(
    data: Path, tmp_path: Path, undisturbed: bytes, rank: int
) -> None:
    run, ended = tmp_path / "run", _disturbed(data, tmp_path, kill_rank(rank))
    assert ended.returncode != 0
    found = launch(saving_often(tmp_path), "train", "--output", str(run), "--resume")
    assert found.returncode == 0, found.stderr
    assert (run / "model.safetensors").read_bytes() == undisturbed


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
def test_two_machines_train_as_one_does(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launchers of one process each, that share no cache."""
    options = ["small-different" if word == "large-different" else word for word in LOOP] + [
        "--boundary-cache",
        "always",
    ]
    assert main(["train", str(data), "--output", str(tmp_path / "one"), *options]) == 0
    shape = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    words = ["-m", "finetune", "train", str(data), "--output", str(tmp_path / "two"), *options]
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *shape, "--node-rank", str(rank), *words],
            env={**os.environ, "PYTHONPATH": str(PROJECT), "FINETUNE_CACHE": str(tmp_path / f"cache-{rank}")},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for machine in machines:
        _, said = machine.communicate(timeout=300)
        assert machine.returncode == 0, said
    assert numbers(tmp_path / "two") == pytest.approx(numbers(tmp_path / "one"), abs=1e-6)
    for rank in range(2):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / f"cache-{rank}"))
        kept = [each for each in list_cache() if each.kind == "activations"]
        assert sum(each.rows for each in kept) >= 43, "each has the features of all images"


@pytest.mark.slow
def test_killed_processes_of_two_machines_are_restarted_and_they_end_at_the_same_weights(
    data: Path, tmp_path: Path
) -> None:
    """Only the machine on which a process was killed counts a restart, and which that is changes."""

    def kill_at(epoch: int, rank: int, machines: Sequence[subprocess.Popen[str]]) -> None:
        when_epochs(tmp_path / "killed", epoch)
        workers = [worker for machine in machines for worker in psutil.Process(machine.pid).children()]
        next(each for each in workers if each.environ()["RANK"] == str(rank)).kill()

    calm = _on_two_machines(data, tmp_path, tmp_path / "calm")
    killed = _on_two_machines(
        data,
        tmp_path,
        tmp_path / "killed",
        disturb=lambda machines: [kill_at(epoch, rank, machines) for epoch, rank in ((4, 1), (16, 0))],
    )
    assert killed.model.read_bytes() == calm.model.read_bytes()
    assert [event["epoch"] for event in killed.events() if event["event"] == "epoch"] == list(range(1, 41))


def _on_two_machines(
    data: Path,
    tmp_path: Path,
    run: Path,
    *,
    disturb: Callable[[Sequence[subprocess.Popen[str]]], object] = lambda machines: None,
) -> RunFolder:
    """Train in `run` under two launchers of one process each that meet on loopback, and do something to them."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", run.name]
    shape = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", *meeting]
    words = [saving_often(tmp_path), "train", str(data), "--output", str(run), *LONG]
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *shape, *words],
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        disturb(machines)
        for machine in machines:
            _, said = machine.communicate(timeout=300)
            assert machine.returncode == 0, said
    finally:
        for machine in machines:
            machine.kill()
    return RunFolder(run)


def test_a_budget_goes_on_running_when_its_job_is_restarted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HashStore()
    monkeypatch.setattr(api, "join_processes", lambda device: Processes(store=store))
    options = {"model": "lenet5", "scenario": "large-different", "epochs": 1, "workers": 0, "overwrite": True}
    api.train(data, output=tmp_path / "run", budget="10m", **options)
    began = float(store.get("began, rank 0"))
    assert 0 < time.time() - began < 600
    store.set("began, rank 0", str(began - 1000))
    monkeypatch.setattr(api, "join_processes", lambda device: Processes(store=store, is_restarted=True))
    store.delete_key("run folder")
    with pytest.raises(ConfigError, match="--budget 600s does not do: to start took 100"):
        api.train(data, output=tmp_path / "run", budget="10m", **options)


@pytest.mark.slow
def test_a_terminated_job_saves_its_state_and_goes_on_from_it(data: Path, tmp_path: Path, undisturbed: bytes) -> None:
    run, ended = tmp_path / "run", _disturbed(data, tmp_path, terminate, workers=1)
    assert ended.returncode != 0
    assert not (run / "model.safetensors").exists()
    found = launch(saving_often(tmp_path), "train", "--output", str(run), "--resume")
    assert found.returncode == 0, found.stderr
    assert (run / "model.safetensors").read_bytes() == undisturbed


def _disturbed(
    data: Path,
    tmp_path: Path,
    disturb: Callable[[subprocess.Popen[str]], None],
    *,
    restarts: int = 0,
    workers: int = 0,
) -> subprocess.Popen[str]:
    """Train in tmp_path/run, do something to the job in the middle, and wait for its end.

    That may take a minute, and where the job is restarted what is left of the training.
    """
    words = [
        saving_often(tmp_path),
        "train",
        str(data),
        "--output",
        str(tmp_path / "run"),
        *LONG,
        "--workers",
        str(workers),
    ]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(launcher(*words, restarts=restarts), env=environment, text=True, stderr=-3) as job:
        try:
            when_epochs(tmp_path / "run", 4)
            disturb(job)
            job.wait(180 if restarts else 60)
        finally:
            job.kill()
    return job


@pytest.mark.slow
def test_a_restarted_job_leaves_the_runs_of_others_alone(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", str(data), "--output", str(run), *OPTIONS, "--epochs", "0", "--workers", "0"]) == 0
    before = (run / "model.safetensors").read_bytes()
    found = launch("-m", "finetune", "train", str(data), "--output", str(run), *LOOP, restarts=1)
    assert found.returncode != 0
    assert found.stderr.count(f"error: {run} is not empty") == 2
    assert (run / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_one_process_under_the_launcher_is_restarted_too(data: Path, tmp_path: Path) -> None:
    words = [saving_often(tmp_path), "train", str(data), "--output", str(tmp_path / "run"), *LONG]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [word if word != "2" else "1" for word in launcher(restarts=1)] + words
    with subprocess.Popen(command, env=environment, text=True, stderr=-3) as job:
        try:
            when_epochs(tmp_path / "run", 4)
            kill_rank(0)(job)
            assert job.wait(180) == 0
        finally:
            job.kill()
    epochs = [event["epoch"] for event in RunFolder(tmp_path / "run").events() if event["event"] == "epoch"]
    assert epochs == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_job_and_says_why(data: Path, tmp_path: Path, rank: int) -> None:
    more = f"""
import os
from finetune.errors import DataError
take = step.train_step
def failing(learner, batch, *, step):
    if step == 9 and os.environ["RANK"] == "{rank}":
        raise DataError("this image has vanished", "put it back")
    return take(learner, batch, step=step)
from finetune.training import loop
loop.train_step = failing
"""
    started = time.monotonic()
    run = tmp_path / "run"
    found = launch(saving_often(tmp_path, more), "train", str(data), "--output", str(run), *LONG)
    assert time.monotonic() - started < 60
    assert found.returncode != 0
    assert "error: this image has vanished" in found.stderr
    assert "another process of this job has ended" in found.stderr
    assert found.stderr.count("Traceback") <= 1  # the launcher's own
    assert any(RunFolder(run).checkpoints.glob("step-*"))
