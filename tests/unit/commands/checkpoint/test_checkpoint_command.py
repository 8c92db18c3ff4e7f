"""`torchtitan checkpoint`: list, verify, prune and diff."""

import re
import shutil

import pytest
import torch
from checkpoint_run import Run, TinyArgs, world_of_one  # noqa: F401
from harness import checkpoints_in
from safetensors.torch import save_file

from torchtitan import cli
from torchtitan.commands.checkpoint import diff as diff_module
from torchtitan.commands.checkpoint import listing
from torchtitan.commands.checkpoint.diff import compare_values
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.saved_tensors import SavedTensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory, world_of_one):  # noqa: F811
    folder = tmp_path_factory.mktemp("saved")
    Run(folder / "run", last_save_model_only=True, steps=6).train(6, last=True)
    return folder / "run"


@pytest.fixture
def run(saved, tmp_path):
    """A run with step-2, step-4 and the export step-6."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def checkpoint(capsys, *arguments):
    """Exit code, and what is on stdout and stderr."""
    try:
        code = cli.main(["checkpoint", *map(str, arguments)])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def names_in(run):
    return checkpoints_in(run / "checkpoint")


@pytest.mark.parametrize("inside", ["", "checkpoint"])
def test_list(run, capsys, inside):
    (run / "checkpoint" / "step-8.partial").mkdir()
    (run / "checkpoint" / "step-4" / "__0_0.distcp").unlink()
    code, out = checkpoint(capsys, "list", run / inside)
    header, two, four, six, eight = out.splitlines()
    assert code == 0
    assert header.split() == ["checkpoint", "saved", "(UTC)", "size", "kind", "state"]
    assert re.match(r"step-2 +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +\d+ kB +resumable +good", two)
    assert re.match(r"step-4 .* resumable +damaged: .*step-4/__0_0\.distcp is missing", four)
    assert re.match(r"step-6 .* model alone +good", six)
    assert re.match(r"step-8\.partial +0 B +not complete", eight)


def test_verify_names_each_damaged_file(run, capsys):
    code, out = checkpoint(capsys, "verify", run)
    assert code == 0 and out.count(" good\n") == 3
    flip(run / "checkpoint" / "step-4" / "__0_0.distcp")
    flip(run / "checkpoint" / "step-4" / "config.resolved.toml")
    flip(run / "checkpoint" / "step-6" / "manifest.json")
    code, out = checkpoint(capsys, "verify", run)
    assert code == 1 and out.count(" good\n") == 1
    for name in ("step-4/__0_0.distcp", "step-4/config.resolved.toml", "step-6/manifest.json"):
        assert f"{run}/checkpoint/{name} is damaged" in out
    assert checkpoint(capsys, "verify", run / "checkpoint" / "step-2")[0] == 0
    assert checkpoint(capsys, "verify", run / "checkpoint" / "step-4")[0] == 1


@pytest.mark.parametrize(
    ("action", "step"), [("verify", "damaged_files"), ("verify", "read"), ("list", "read")]
)
def test_what_a_live_run_prunes_meanwhile_is_not_damaged(run, capsys, monkeypatch, action, step):
    step_2, step_4 = (run / "checkpoint" / f"step-{n}" for n in (2, 4))
    look = getattr(Manifest, step)

    def look_late(*of):
        shutil.rmtree(step_2, ignore_errors=True)
        return look(*of)

    monkeypatch.setattr(listing, "list_checkpoints", lambda root: [step_2, step_4])
    monkeypatch.setattr(Manifest, step, look_late)
    code, out = checkpoint(capsys, action, run)
    assert code == 0 and "damaged" not in out and out.count("good") == 1
    assert (f"{step_2} was deleted meanwhile\n" in out) == (action == "verify")


def test_a_link_that_leads_nowhere_is_listed(run, capsys):
    (run / "checkpoint" / "step-8").symlink_to(run / "unmounted")
    problem = f"step-8 is a link to {run}/unmounted, which does not exist"
    code, out = checkpoint(capsys, "list", run)
    assert code == 0 and re.search(rf"^step-8 +0 B +damaged: .*{problem}$", out, re.M)
    assert out.count("step-8 ") == 2 and "not complete" not in out
    code, out = checkpoint(capsys, "verify", run)
    assert code == 1 and problem in out and out.count(" good\n") == 3


@pytest.mark.parametrize(
    ("where", "step"),
    [(Manifest, "read_whole"), (Manifest, "damaged_files"), (listing, "delete")],
)
def test_prune_beside_a_run_that_deletes_the_same(run, capsys, monkeypatch, where, step):
    step_2 = run / "checkpoint" / "step-2"
    act = getattr(where, step)

    def act_late(*of):
        shutil.rmtree(step_2, ignore_errors=True)
        return act(*of)

    monkeypatch.setattr(where, step, act_late)
    code, out = checkpoint(capsys, "prune", run, "--keep", 1)
    assert code == 0 and out.endswith(f"{run}/checkpoint: 2 left\n")
    assert out.startswith(f"{step_2} was deleted meanwhile\n") == (where is listing)
    assert "deleted /" not in out
    assert names_in(run) == ["step-4", "step-6"]


def test_prune_keeps_the_last_good_ones_by_their_checksums(run, capsys):
    code, out = checkpoint(capsys, "prune", run, "--keep", 1, "--dry-run")
    assert code == 0 and "would delete" in out and "step-2" in out and ": 2 left\n" in out
    assert names_in(run) == ["step-2", "step-4", "step-6"]

    flip(run / "checkpoint" / "step-4" / "__0_0.distcp")
    code, out = checkpoint(capsys, "prune", run, "--keep", 1)
    assert code == 0 and "deleted" not in out.replace("nor deleted", "")
    assert "neither counted nor deleted: step-4" in out
    assert names_in(run) == ["step-2", "step-4", "step-6"]

    flip(run / "checkpoint" / "step-4" / "__0_0.distcp")
    code, out = checkpoint(capsys, "prune", run, "--keep", 1)
    assert code == 0 and f"deleted {run}/checkpoint/step-2" in out
    assert names_in(run) == ["step-4", "step-6"]


def test_prune_keeps_those_of_every_so_many_steps_and_of_named_ones(run, capsys):
    code, out = checkpoint(capsys, "prune", run, "--keep", 1, "--keep-every", 2)
    assert code == 0 and "deleted" not in out and len(names_in(run)) == 3
    code, out = checkpoint(capsys, "prune", run, "--keep", 1, "--keep-steps", 2, 4)
    assert code == 0 and "deleted" not in out and len(names_in(run)) == 3
    code, out = checkpoint(capsys, "prune", run, "--keep", 1, "--keep-every", 4)
    assert code == 0 and names_in(run) == ["step-4", "step-6"]


def test_diff_of_equal_and_of_different_steps(run, capsys):
    step_2, step_4 = (run / "checkpoint" / f"step-{n}" for n in (2, 4))
    code, out = checkpoint(capsys, "diff", step_2, step_2)
    assert code == 0 and re.fullmatch(r"\d+ entries are equal, 0 differ; fields: 0 differ\n", out)

    code, out = checkpoint(capsys, "diff", step_2, step_4)
    assert code == 1
    assert re.search(r"^step +2 +4$", out, re.M)
    assert re.search(r"^lr_scheduler\.step +2 and 4$", out, re.M)
    saved = [diff_module.Side(str(step)) for step in (step_2, step_4)]
    a, b = (whole(side, "model.output.weight") for side in saved)
    expected = (a - b).abs().max().item()
    line = re.search(r"^model\.output\.weight +values +(\S+) +(\S+)$", out, re.M)
    assert float(line[1]) == pytest.approx(expected, rel=5e-3)
    assert float(line[2]) == pytest.approx(expected / a.abs().max().item(), rel=5e-3)


def whole(side, key):
    out = torch.empty(side.entries[key].size.numel())
    side.reader(key)(0, out)
    return out


def test_diff_of_other_models_and_configs(run, tmp_path, capsys):
    other = Run(tmp_path / "other", args=TinyArgs(dim=8, n_layers=3), global_batch_size=6)
    other.train(2)
    steps = [folder / "checkpoint" / "step-2" for folder in (run, tmp_path / "other")]
    code, out = checkpoint(capsys, "diff", *steps)
    assert code == 1
    assert re.search(r"^model\.args\.dim +4 +8$", out, re.M)
    assert re.search(r"^config\.training\.steps +6 +10$", out, re.M)
    assert re.search(r"^model\.output\.weight +shapes \[16, 4\] and \[16, 8\]$", out, re.M)
    assert re.search(rf"^model\.layers\.2\.bias +only in {steps[1]}$", out, re.M)


def test_diff_has_a_line_for_the_optimizer_that_one_lacks(run, tmp_path, capsys):
    step_2, weights = run / "checkpoint" / "step-2", tmp_path / "weights"
    assert checkpoint(capsys, "average", step_2, step_2, "--out", weights)[0] == 0
    code, out = checkpoint(capsys, "diff", step_2, weights)
    assert code == 1
    count = re.search(rf"^optimizer\.\* \((\d+) entries\) +only in {step_2}$", out, re.M)
    assert int(count[1]) > 5 and "\noptimizer.state" not in out
    entries = diff_module.Side(str(step_2)).entries
    others = [key for key in entries if not key.startswith("model.")]
    assert f"\n{len(entries) - len(others)} entries are equal, {len(others)} differ" in out


def test_diff_reads_in_pieces_of_bounded_size(run, capsys, monkeypatch):
    """A tensor of any size is never in memory as a whole."""
    sizes = []
    read = SavedTensor.read

    def spy(self, start, out):
        sizes.append(len(out))
        read(self, start, out)

    monkeypatch.setattr(SavedTensor, "read", spy)
    monkeypatch.setattr(diff_module, "PIECE", 10)
    step_2, step_4 = (run / "checkpoint" / f"step-{n}" for n in (2, 4))
    code, _ = checkpoint(capsys, "diff", step_2, step_4)
    assert code == 1 and max(sizes) == 10 and len(sizes) > 60


def test_diff_with_a_checkpoint_that_its_run_prunes_meanwhile(run, capsys, monkeypatch):
    step_2, step_4 = (run / "checkpoint" / f"step-{n}" for n in (2, 4))
    read = SavedTensor.read

    def read_late(self, start, out):
        shutil.rmtree(step_2, ignore_errors=True)
        read(self, start, out)

    monkeypatch.setattr(SavedTensor, "read", read_late)
    code, out = checkpoint(capsys, "diff", step_2, step_4)
    assert code == 2
    assert f"error: {step_2}/__0_0.distcp is missing: its folder was deleted meanwhile" in out


def test_diff_of_hugging_face_folders(run, tmp_path, capsys):
    for name, shift in (("a", 0.0), ("b", 0.5)):
        (tmp_path / name).mkdir()
        state = {"w": torch.ones(3, 4), "v": torch.full((2,), shift), "n": torch.arange(3)}
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(f'{{"theta": {1 + shift}}}')
    assert checkpoint(capsys, "diff", tmp_path / "a", tmp_path / "a")[0] == 0
    code, out = checkpoint(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert re.search(r"^config\.theta +1\.0 +1\.5$", out, re.M)
    assert re.search(r"^v +values +0\.5 +inf$", out, re.M) and "2 entries are equal" in out
    assert checkpoint(capsys, "verify", tmp_path / "a")[0] == 0
    code, out = checkpoint(capsys, "diff", tmp_path / "a", run / "checkpoint" / "step-2")
    assert code == 2 and "convert from-hf" in out


def test_nan_is_equal_to_nan_alone_and_imaginary_parts_count():
    nan, inf = float("nan"), float("inf")

    def difference(a, b):
        reads = [lambda start, out, t=t: out.copy_(t[start : start + len(out)]) for t in (a, b)]
        return compare_values(*reads, len(a), (a.dtype, b.dtype))[0]

    a = torch.tensor([1.0, nan, inf, -inf])
    assert difference(a, a.clone()) == 0
    assert difference(a, torch.tensor([1.0, 0.0, inf, -inf])) == inf
    assert difference(a, torch.tensor([1.0, nan, inf, inf])) == inf
    big = torch.tensor([2**40, 2**40 + 1])
    assert difference(big, big + torch.tensor([0, 3])) == 3
    assert difference(big << 20, (big << 20) + torch.tensor([0, 1])) == 1
    assert difference(torch.tensor([True]), torch.tensor([False])) == 1
    turned = torch.tensor([1 + 2j, 3 + 4j])
    assert difference(turned, turned.clone()) == 0
    assert difference(turned, turned + torch.tensor([0, 0.5j])) == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "nowhere"], "nowhere: no such folder"),
        (["list", "file"], "file: no such folder"),
        (["verify", "nowhere/step-2"], "nowhere/step-2: no such folder"),
        (["prune", "nowhere", "--keep", "1"], "holds no step-N folders"),
        (["prune", "nowhere", "--keep", "0"], "--keep 0: must be at least 1"),
        (
            ["prune", "nowhere", "--keep", "1", "--keep-every", "-1"],
            "--keep-every -1: must be 0 or more",
        ),
        (
            ["prune", "nowhere", "--keep", "1", "--keep-steps", "0", "-1"],
            "--keep-steps -1: must be 0 or more",
        ),
        (["diff", "nowhere", "nowhere"], "nowhere: no such folder"),
        (["list", "nothing://a"], "fsspec does not support nothing://"),
    ],
)
def test_mistakes_end_with_one_message(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, out = checkpoint(capsys, *arguments)
    assert code == 2 and words in out and "Traceback" not in out and out.count("error:") == 1


@pytest.mark.parametrize("name", [".metadata", "config.resolved.toml"])
def test_diff_makes_nothing_of_a_damaged_file(run, capsys, name):
    """Of `.metadata`, a flipped bit may ask for any amount of memory."""
    two, four = run / "checkpoint" / "step-2", run / "checkpoint" / "step-4"
    flip(four / name)
    code, out = checkpoint(capsys, "diff", two, four)
    assert code == 2 and f"{four / name} is damaged: CRC-32" in out


def test_the_folder_above_runs_names_them(tmp_path, capsys):
    (tmp_path / "one" / "checkpoint" / "step-2").mkdir(parents=True)
    code, out = checkpoint(capsys, "list", str(tmp_path))
    assert code == 2 and f"Runs in it: {tmp_path / 'one'}" in out


def test_exports_are_in_the_order_of_their_steps(tmp_path):
    for name in ("step-10-hf", "step-2-hf", "step-100-hf"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
    found = [folder.name for folder in listing.checkpoints_of(str(tmp_path))]
    assert found == ["step-2-hf", "step-10-hf", "step-100-hf"]
