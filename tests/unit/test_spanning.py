"""Training dictionaries that span sites: planted structure is found, raw units, and killed runs equal others."""

import random
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from circuitflow.dictionaries import memory
from circuitflow.dictionaries.describing import files_of, read_log
from circuitflow.dictionaries.family import load_family
from circuitflow.dictionaries.kinds import Request
from circuitflow.dictionaries.memory import Estimate, check_memory, estimate, parameters
from circuitflow.dictionaries.settings import Settings
from circuitflow.dictionaries.trainer import Trainer
from circuitflow.dictionaries.wiring import Wiring, cross_layer, crosscoder, transcoder
from circuitflow.errors import UserError
from tests.fixtures.activation_store import write_store
from tests.fixtures.family_process import cross_layer_rows, crosscoder_rows, params, start, train
from tests.fixtures.training_process import steps_done

D, FEATURES, N = 16, 12, 1536
ACROSS = cross_layer([0, 1])


@pytest.fixture(scope="module")
def planted():
    return cross_layer_rows(N, D, FEATURES, 2, seed=0)


@pytest.fixture(scope="module")
def manifest(planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), "activations", planted[0], [3, 50, 80])


def family_in(folder: Path, members: int):
    return load_family([folder / name for name in files_of(members)])


def best_cosine(rows: np.ndarray, found: torch.Tensor) -> float:
    unit = found / found.norm(dim=1, keepdim=True).clamp_min(1e-9)
    return float((torch.from_numpy(rows).float() @ unit.T).max(dim=1).values.mean())


@pytest.fixture(scope="module")
def trained(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cross_layer")
    train(manifest, folder, params("topk", ACROSS, epochs=20.0, dead_after=1000, checkpoints=[0.5]))
    return folder


def test_a_cross_layer_transcoder_finds_what_is_written_to_each_layer(planted, trained: Path):
    family, decoders = family_in(trained, 2), planted[1]
    for (source, target), rows in decoders.items():
        assert best_cosine(rows, family.decoder(source, f"mlp.{target}")) > 0.9
        others = np.roll(rows, 1, axis=1)
        assert best_cosine(others, family.decoder(source, f"mlp.{target}")) < 0.7


def test_weights_read_and_write_raw_vectors(planted, trained: Path):
    family = family_in(trained, 2)
    x = {site: torch.from_numpy(rows[48:64]) for site, rows in planted[0].items()}  # a held-out block
    made = family.reconstruct(family.encode(x, torch.arange(16)), x)
    last = read_log(trained / "log.jsonl")[-1]["held_out"]
    assert set(last["fvu_of"]) == {"mlp.0", "mlp.1"}
    for site, y in made.items():
        missed = (y - x[site])[1:].square().sum() / (x[site] - x[site].mean(0))[1:].square().sum()
        assert float(missed) < 0.3
        assert last["fvu_of"][site] < 0.2
    assert not family.members[0].b_dec[D:].any()  # the bias of the second site is with the second member
    assert family.members[1].b_dec.any()
    # decoder rows keep the same unit: the root mean square over both of the scales
    scales = family.members[0].notes["scale"]
    unit = ((scales["mlp.0"] ** 2 + scales["mlp.1"] ** 2) / 2) ** 0.5
    normalised = torch.cat([family.decoder(0, site) * unit / scales[site] for site in family.writes], 1)
    torch.testing.assert_close(normalised.norm(dim=1), torch.ones(24), rtol=1e-4, atol=0)


def test_checkpoints_are_families_of_their_step(trained: Path):
    steps = read_log(trained / "log.jsonl")[-1]["step"]
    folder = trained / "checkpoints" / f"step_{round(steps / 2)}"
    assert family_in(folder, 2).members[1].notes["step"] == round(steps / 2)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_of_one_layer_and_its_skip_connection(
    planted, manifest: Path, tmp_path: Path, skip: bool
):
    wanted = params("topk", transcoder(0), skip, epochs=12.0, dead_after=1000)
    out = train(manifest, tmp_path, wanted)
    family = family_in(tmp_path, 1)
    (member,) = family.members
    assert (member.reads, member.writes) == (("mlp_in.0",), ("mlp.0",))
    assert (member.W_skip is not None) is skip
    assert best_cosine(planted[1][0, 0], member.W_dec) > (0.6 if skip else 0.9)
    x = {site: torch.from_numpy(rows[800:816]) for site, rows in planted[0].items()}
    y = family.reconstruct(family.encode(x, torch.arange(16)), x)["mlp.0"]
    logged = read_log(tmp_path / "log.jsonl")[-1]["held_out"]["fvu"]
    missed = (y - x["mlp.0"])[1:].square().sum() / (x["mlp.0"] - x["mlp.0"].mean(0))[1:].square().sum()
    assert float(missed) == pytest.approx(logged, abs=0.15)
    assert out.details["writes"] == [["mlp.0"]]


def test_a_crosscoder_finds_shared_and_exclusive_features(tmp_path: Path):
    sites, first, second = crosscoder_rows(N, D, FEATURES, seed=2)
    store = write_store(tmp_path, "activations", sites, [3, 50])
    train(
        store,
        tmp_path / "run",
        params("batchtopk", crosscoder(["resid.1", "resid.2"]), epochs=20.0, dead_after=1000),
    )
    family = family_in(tmp_path / "run", 1)
    scales = family.members[0].notes["scale"]
    assert scales["resid.2"] / scales["resid.1"] == pytest.approx(4, rel=0.15)
    rows = [family.decoder(0, site) / scales[site] for site in family.writes]
    planted = torch.from_numpy(np.concatenate([first, second], 1)).float()
    joined = torch.cat(rows, 1)
    cosine = planted / planted.norm(dim=1, keepdim=True) @ (joined / joined.norm(dim=1, keepdim=True)).T
    best = cosine.max(dim=1)
    assert float(best.values.mean()) > 0.9
    share = (rows[1].norm(dim=1) / (rows[0].norm(dim=1) + rows[1].norm(dim=1)))[best.indices]
    assert bool(((share[:6] > 0.3) & (share[:6] < 0.7)).all())
    assert float(share[6:9].max()) < 0.3
    assert float(share[9:].min()) > 0.7


def files(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.endswith(".tmp")}


@pytest.mark.parametrize(
    ("kind", "members", "skip"),
    [("batchtopk", ACROSS, True), ("jumprelu", ACROSS, False), ("topk", transcoder(1), True)],
)
def test_a_run_killed_and_resumed_equals_one_never_killed(manifest, tmp_path, kind, members, skip):
    wanted = params(kind, members, skip, epochs=8.0, dead_after=300, checkpoints=[0.5])
    train(manifest, tmp_path / "whole", wanted)
    folder, moments = tmp_path / "killed", random.Random(3)
    process = start(manifest, folder, wanted, interval=0.02)
    while not steps_done(folder) and process.is_alive():
        time.sleep(0.005)
    time.sleep(moments.uniform(0, 0.03))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed: make it longer"
    assert steps_done(folder) > 0
    train(manifest, folder, wanted)
    assert files(folder) == files(tmp_path / "whole")


def test_a_finished_family_is_not_repeated(manifest, trained, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("a finished run took a step"))
    wanted = params("topk", ACROSS, epochs=20.0, dead_after=1000, checkpoints=[0.5])
    before = files(trained)
    again = train(manifest, trained, wanted)
    assert files(trained) == before
    assert again.details["checkpoints"]
    assert len(again.details["notes"]) == 2


def test_a_row_is_left_out_where_any_site_says_so(tmp_path: Path):
    sites, _ = cross_layer_rows(512, D, FEATURES, 1, seed=1)
    sites["mlp_in.0"] *= 100  # so that the limit of one site is none of the other
    sites["mlp_in.0"][40] *= 1e3
    sites["mlp.0"][100] *= 1e3
    store = write_store(tmp_path, "activations", sites, [3])
    wanted = params("topk", transcoder(0), epochs=1.0, outlier_ratio=20.0)
    out = train(store, tmp_path / "run", wanted)
    notes = out.details["notes"][0]
    assert notes["share_left_out_by_norm"] == pytest.approx(2 / (512 - 16))
    assert notes["max_norm"]["mlp_in.0"] > 30 * notes["max_norm"]["mlp.0"]
    (member,) = family_in(tmp_path / "run", 1).members
    assert member.skip.max_norm == notes["max_norm"]["mlp_in.0"]  # at inference only what is read is known


def request(kind: str = "topk", d_dict: int = 10, skip: bool = False) -> Request:
    wanted = params(kind, ACROSS, skip, d_dict=d_dict)
    return Request("two layers", 4, Settings.of(wanted["settings"]), Wiring.of(ACROSS))


def test_memory_is_estimated_before_training(caplog, monkeypatch):
    # layer 0: 10·(4 + 8 + 1) + 8 weights; layer 1: 10·(4 + 4 + 1) + 4
    assert parameters(request()) == [138, 94]
    needed = estimate(request(), rows=1000, row_bytes=32, held_out=100)
    assert needed.rows == 1000 * 32
    assert needed.weights == 4 * 4 * (138 + 94)
    assert needed.saved == 4 * 3 * 138
    assert needed.batches == 4 * 16 * (6 * 64 + 2 * 100)
    monkeypatch.setattr("circuitflow.dictionaries.memory.free_memory", lambda: needed.total)
    check_memory(request(), needed, torch.device("cpu"))
    monkeypatch.setattr("circuitflow.dictionaries.memory.free_memory", lambda: needed.total - 1)
    with pytest.raises(
        UserError, match=r"^Training the dictionaries of two layers needs about .* lower d_dict"
    ):
        check_memory(request(), needed, torch.device("cpu"))
    assert str(Estimate(2_000_000_000, 0, 0, 0)).startswith(
        "2.00 GB of memory (2.00 GB for weights and Adam, "
    )
    assert str(Estimate(300_000, 50_000, 0, 0)).startswith(
        "0.3 MB of memory (0.3 MB for weights and Adam, 0.1 MB to"
    )


def test_a_skip_connection_takes_memory():
    assert parameters(request(skip=True)) == [138 + 16, 94 + 16]


@pytest.mark.parametrize(
    ("device", "cpu", "sentence"),
    [
        (3999, 10**6, r"4\.00 GB of them on cuda, where 4\.00 GB are free; lower d_dict"),
        (4000, 5999, r"6\.00 GB of them on the CPU, where 6\.00 GB are free; lower buffer_rows"),
        (4000, 6000, None),
    ],
)
def test_memory_of_the_device_and_of_the_cpu_are_both_checked(monkeypatch, device, cpu, sentence):
    unit = 10**6
    needed = Estimate(weights=3000 * unit, saved=1000 * unit, rows=5000 * unit, batches=1000 * unit)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (device * unit, 0))
    monkeypatch.setattr(memory, "free_memory", lambda: cpu * unit)
    with nullcontext() if sentence is None else pytest.raises(UserError, match=sentence):
        check_memory(request(), needed, torch.device("cuda"))


def groups(root: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]) -> int | None:
    """What is free on a machine of 9000 kB with these files of control groups."""
    (root / "own").write_text(own)
    (root / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable:   9000 kB\n")
    for name, text in files.items():
        (root / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "groups" / name).write_text(text)
    for name, file in (("OWN_GROUPS", "own"), ("GROUPS", "groups"), ("MEMORY", "meminfo")):
        monkeypatch.setattr(memory, name, root / file)
    return memory.free_memory()


OLD = {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "8000000\n"}


def test_limits_of_a_job_are_found_above_its_own_group(tmp_path, monkeypatch):
    job = {
        "memory/slurm/job_7/memory.limit_in_bytes": "5000000\n",
        "memory/slurm/job_7/memory.usage_in_bytes": "3000000\n",
        "memory/slurm/job_7/memory.stat": "active_file 9\ntotal_active_file 250000\ntotal_inactive_file 500000\n",
    }
    own = "9:cpu,cpuacct:/x\n4:memory:/slurm/job_7/step_0\n0::/\n"
    assert groups(tmp_path, monkeypatch, own, OLD | job) == 5_000_000 - 3_000_000 + 750_000
    assert groups(tmp_path, monkeypatch, "4:memory:/other\n", OLD) == 9000 * 1024


def test_limits_of_the_second_version(tmp_path, monkeypatch):
    files = {
        "job_7/memory.max": "4000000\n", "job_7/memory.current": "1000000\n", "job_7/memory.stat": "inactive_file 10\n",
        "job_7/step_0/memory.max": "max\n", "job_7/step_0/memory.current": "900000\n",
    }  # fmt: skip
    assert groups(tmp_path, monkeypatch, "0::/job_7/step_0\n", files) == 3_000_010


def test_a_container_has_its_own_group_at_the_root(tmp_path, monkeypatch):
    files = {"memory.max": "3000000\n", "memory.current": "4000000\n"}
    assert groups(tmp_path, monkeypatch, "0::/docker/abc\n", files) == 0


def test_a_system_that_does_not_say(tmp_path, monkeypatch):
    for name in ("OWN_GROUPS", "GROUPS", "MEMORY"):
        monkeypatch.setattr(memory, name, tmp_path / "nothing")
    assert memory.free_memory() is None


def test_kinds_for_one_site_are_refused(manifest, tmp_path):
    wanted = params("topk", transcoder(0))
    with pytest.raises(UserError, match=r"Kind 'gated' is for one site alone"):
        train(manifest, tmp_path, {**wanted, "settings": {**wanted["settings"], "kind": "gated"}})


def test_sites_that_the_store_lacks_are_named(manifest, tmp_path):
    with pytest.raises(UserError, match=r"has no array 'mlp_in\.7'"):
        train(manifest, tmp_path, params("topk", transcoder(7)))
    assert list(tmp_path.iterdir()) == []
