"""What a fresh process needs of memory to write a large file of tensors and to read it in slices: three counts of
bytes, the last one for the library's own way of writing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save

from minillm.bench.memory import extra_peak
from minillm.disk import DISK, Sink
from minillm.tensor_files import open_tensors, write_tensors

MIB = 2**20
TENSORS, EACH = 4, 32 * MIB


def main() -> None:
    """Prints the counts."""
    cpu = torch.device("cpu")
    tensors = {str(number): torch.full((EACH // 4,), float(number)) for number in range(TENSORS)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.safetensors"

        def write(path: Path = path) -> None:
            file = DISK.create(path)
            write_tensors(Sink(DISK, file), tensors)
            DISK.close(file)

        def read() -> None:
            with open_tensors(path) as found:
                assert all(float(found.rows(str(number), 7, 9).sum()) == 2 * number for number in range(TENSORS))

        write(Path(folder) / "first.safetensors")  # what libraries take once is not the file's
        print(extra_peak(write, device=cpu), extra_peak(read, device=cpu))
        print(extra_peak(lambda: save(tensors), device=cpu))


if __name__ == "__main__":
    main()
