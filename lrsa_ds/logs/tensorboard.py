"""TensorBoard: event files in `tensorboard/` of the output directory."""

from typing import Any

from lrsa_ds.errors import LRSAError
from lrsa_ds.logs.tracker import Entry, Tracker

DIRECTORY = "tensorboard"


def check_tensorboard() -> None:
    """Raises LRSAError if TensorBoard is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise LRSAError(
            f"log.tensorboard=true needs TensorBoard ({error}): pip install 'lrsa-ds[tensorboard]', or set it to false."
        ) from error


class TensorBoard(Tracker):
    """`log.tensorboard=true`."""

    service = "TensorBoard"
    _writer: Any = None

    def begin(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.output_dir / DIRECTORY))
        self._writer.add_text("config", _as_markdown([self.identity.config]))

    def write(self, entry: Entry) -> None:
        import matplotlib.image

        writer, step = self._writer, entry.step
        for name, value in entry.values.items():
            writer.add_scalar(name, value, step)
        for name, rows in entry.tables.items():
            writer.add_text(name, _as_markdown(rows), step)
        for name, path in entry.pictures.items():
            writer.add_image(name, matplotlib.image.imread(path), step, dataformats="HWC")
        if entry.summary:
            writer.add_text("summary", _as_markdown([dict(entry.summary)]), step)
        writer.flush()

    def finish(self) -> None:
        self._writer.close()

    def give_up(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _as_markdown(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    clean = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in clean)
