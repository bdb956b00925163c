"""Stands for `fit` where a test asks what the harness does: takes its arguments, and leaves what it leaves.

`cell.yaml` says what happens: `{"exit": 3}`, `{"signal": 9, "times": 2}`, `{"sleep": 1.5}`, `{"value": 0.9}`,
`{"metrics": {"groups/conv": 2.0}}`, `{"half": true}` of a checkpoint.
"""

import json
import os
import sys
import time
import zipfile
from pathlib import Path


def main() -> None:
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    cell = Path(options["--trainer.default_root_dir"], options["--name"])
    does = json.loads(Path(options["--config"]).read_text())
    with (cell / "starts").open("a") as file:
        file.write(f"{os.getpid()} {options.get('--ckpt_path', '')} {os.environ.get('OMP_NUM_THREADS')}\n")
    starts = len((cell / "starts").read_text().splitlines())
    print("started", starts, flush=True)
    run = cell / "version_0"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(run / "checkpoints" / "last.ckpt", "w") as file:
        file.writestr("data.pkl", b"weights")
    if does.get("half"):
        os.truncate(run / "checkpoints" / "last.ckpt", 20)
    time.sleep(does.get("sleep", 0))
    if starts <= does.get("times", 10**6):
        if "signal" in does:
            os.kill(os.getpid(), does["signal"])
        if "exit" in does:
            raise SystemExit(does["exit"])
    facts = {
        "seconds": 1.0,
        "device_hours": 0.1,
        "metrics": {"test/top1": does.get("value", 0.5), **does.get("metrics", {})},
    }
    facts |= {
        "peak_memory_bytes": {"host": 1 << 20},
        "packages": {"torch": "2"},
        "device": "a CPU",
        "devices": does.get("devices", 1),
    }
    (run / "run.json").write_text(json.dumps({"status": "finished", "python": "3", "git": None, **facts}))


if __name__ == "__main__":
    main()
