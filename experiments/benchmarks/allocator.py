"""What it gains that freed memory is kept: ``python -m experiments.benchmarks.allocator``.

Three epochs of the quickstart without observers, and one step of it with the validation and test of 10,000 images each,
with ``keep_freed_memory`` and as glibc does by itself. Seconds and peak memory as in each run's record; interleaved, a
process for each, median of several rounds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.benchmarks.timing import in_turn, medians, versions

QUICKSTART = Path(__file__).parents[1] / "quickstart.yaml"
ROUNDS = 3
JOBS = {
    "training": ["--trainer.max_epochs", "3"],
    "evaluation": [
        *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"),
        *("--data", "Synthetic", "--data.num_images", "100_000", "--data.image_size", "32"),
        *("--data.num_classes", "10", "--data.channels", "1", "--data.batch_size", "128"),
    ],
}
# A variable of glibc's, even if it is empty, keeps ``keep_freed_memory`` from doing anything.
ENVIRONMENTS: dict[str, dict[str, str]] = {"kept": {}, "by glibc": {"GLIBC_TUNABLES": ""}}


def main() -> None:
    """Print the results, then everything as JSON."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for job, options in JOBS.items():
        peaks: dict[str, list[float]] = {name: [] for name in ENVIRONMENTS}

        def measure(name: str, options: list[str] = options, peaks: dict[str, list[float]] = peaks) -> list[float]:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "dyn_lightning.fit", "--config", str(QUICKSTART), *options]
                command += ["--observe", "false", "--trainer.enable_progress_bar", "false"]
                environment = os.environ | ENVIRONMENTS[name]
                subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
                record = json.loads(next(Path(folder).rglob("run.json")).read_text())
                peaks[name].append(record["peak_memory_bytes"]["host"] / 2**20)
                return [1e3 * record["seconds"]]

        times = medians(in_turn(measure, [*ENVIRONMENTS], ROUNDS))
        results[job] = {
            name: {"ms": times[name], "peak_mib": round(statistics.median(peaks[name]), 1)} for name in ENVIRONMENTS
        }
        kept, default = results[job].values()
        print(
            f"{job:10}  kept {kept['ms'] / 1e3:6.2f} s, {kept['peak_mib']:.0f} MiB  "
            f"by glibc {default['ms'] / 1e3:6.2f} s, {default['peak_mib']:.0f} MiB  "
            f"ratio {kept['ms'] / default['ms']:.2f}",
            flush=True,
        )
    print(json.dumps(results | {"rounds": ROUNDS, "versions": versions()}))


if __name__ == "__main__":
    main()
