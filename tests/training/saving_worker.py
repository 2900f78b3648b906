"""One rank whose first checkpoint is written only when the second one is due; prints the order of events.

python saving_worker.py CONFIG overrides...
"""

import sys
import threading
import time

from mc2_hpc.cli import main
from mc2_hpc.training import saving, trainer

events: list[str] = []
next_save = threading.Event()
begin, publish, write = saving.CheckpointWriter.begin, saving.CheckpointWriter._publish, saving.write_tensors
count = trainer.Trainer._count


def count_and_note(run, batch):
    count(run, batch)
    events.append(f"trained {run.progress.step}")


def write_late(path, tensors):
    if path.name.startswith("model"):
        if "checkpoint.background=false" not in sys.argv:
            if not next_save.wait(60):
                events.append("training waited for the files")
            time.sleep(0.5)  # a save that does not wait for this one would overtake it
        events.append(f"wrote {path.parent.name}")
    write(path, tensors)


def publish_and_note(writer, manifest):
    events.append(f"published {writer.step}")
    return publish(writer, manifest)


def begin_and_note(writer, engine, *, step, **rest):
    if step == 20:
        next_save.set()
    begin(writer, engine, step=step, **rest)
    events.append(f"copied {step}")


saving.CheckpointWriter.begin, saving.CheckpointWriter._publish = begin_and_note, publish_and_note
saving.write_tensors, trainer.Trainer._count = write_late, count_and_note
code = main(["train", *sys.argv[1:]])
print("\n".join(events))
sys.exit(code)
