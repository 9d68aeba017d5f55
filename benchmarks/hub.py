"""Push and pull against huggingface_hub's own upload_folder and snapshot_download, on one loopback server.

    python benchmarks/hub.py --megabytes 200 --runs 5

Whole processes, in turn. Each push sends content that the server has not seen, each pull goes to a new
folder; xet is off for both, since the server (that of the tests) speaks LFS. Our push validates the adapter,
computes its digests and writes the manifest and the card; our pull checks every digest and flushes to the
device. The reference does none of that. Remote inspect is counted in requests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.interleave import Run, measure
from tests.hub.hub_process import HubServer

WIDTH = 4096
LAYERS = 32
PUSH_TARGET = PULL_TARGET = 1.3
REQUESTS_TARGET = 10
UPLOAD = (
    "import sys; from huggingface_hub import HfApi; api = HfApi(); "
    "api.create_repo(sys.argv[2], exist_ok=True); "
    "api.upload_folder(folder_path=sys.argv[1], repo_id=sys.argv[2])"
)
DOWNLOAD = (
    "import sys; from huggingface_hub import snapshot_download; "
    "snapshot_download(sys.argv[1], local_dir=sys.argv[2])"
)


def make_adapter(folder: Path, megabytes: int, seed: int) -> Path:
    """A LoRA on q_proj and v_proj of 32 layers, float32, of about that size."""
    rank = max(1, round(megabytes * 1e6 / (LAYERS * 2 * 2 * WIDTH * 4)))
    random = np.random.default_rng(seed)
    header: dict[str, object] = {}
    offset = 0
    tensors = []
    for layer in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            for factor, shape in (("A", (rank, WIDTH)), ("B", (WIDTH, rank))):
                values = random.random(shape, dtype=np.float32)
                key = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{factor}.weight"
                span = [offset, offset + values.nbytes]
                header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": span}
                offset += values.nbytes
                tensors.append(values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors:
            file.write(values.data)
    config = {
        "base_model_name_or_path": "example/base",
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="adaptertool-hub-"))
    (work / "server").mkdir()
    server = HubServer(work / "server")
    server.start()
    try:
        return compare(server, work, options.megabytes, options.runs)
    finally:
        server.stop()
        shutil.rmtree(work)


def compare(server: HubServer, work: Path, megabytes: int, runs: int) -> int:
    env = {**server.env(work / "home"), "ADAPTERTOOL_TIMEOUT": "60", "ADAPTERTOOL_TIME_LIMIT": "600"}
    env["ADAPTERTOOL_TOKEN_ENDPOINT"] = server.endpoint
    env.pop("HF_HUB_OFFLINE", None)
    program = str(Path(sys.executable).with_name("adaptertool"))
    measured: dict[str, list[Run]] = {
        name: [] for name in ("push", "upload_folder", "pull", "snapshot_download")
    }

    def run(name: str, number: int, *argv: object) -> None:
        os.sync()
        found = measure([str(item) for item in argv], name=name, number=number, env=env)
        measured[name].append(found)
        print(
            f"  round {number + 1}/{runs}  {name:<18} {found.wall_s:7.3f} s  user {found.user_s:6.3f}",
            flush=True,
        )

    repo = ""
    for number in range(runs):
        ours = make_adapter(work / "ours", megabytes, 2 * number)
        theirs = make_adapter(work / "theirs", megabytes, 2 * number + 1)
        repo, other = server.repo_name("ours"), server.repo_name("theirs")
        run("push", number, program, "push", ours, f"hf://{repo}")
        run("upload_folder", number, sys.executable, "-c", UPLOAD, theirs, other)
        run("pull", number, program, "pull", f"hf://{repo}", work / "pulled")
        run("snapshot_download", number, sys.executable, "-c", DOWNLOAD, other, work / "downloaded")
        for folder in ("ours", "theirs", "pulled", "downloaded"):
            shutil.rmtree(work / folder)
        shutil.rmtree(work / "server" / "incoming", ignore_errors=True)

    before = len(server.requests())
    measure([program, "inspect", f"hf://{repo}"], name="inspect", number=0, env=env)
    requests = len(server.requests()) - before
    failed = 0
    for name, reference, target in (
        ("push", "upload_folder", PUSH_TARGET),
        ("pull", "snapshot_download", PULL_TARGET),
    ):
        one, two = (statistics.median(run.wall_s for run in measured[key]) for key in (name, reference))
        missed = one / two > target
        failed += missed
        print(f"{name}: {one:.3f} s, {reference} {two:.3f} s, ratio {one / two:.2f} (at most {target})")
    print(f"remote inspect: {requests} requests (at most {REQUESTS_TARGET})")
    return int(bool(failed) or requests > REQUESTS_TARGET)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
