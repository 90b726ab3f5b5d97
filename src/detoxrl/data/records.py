"""Which records does each split of a source hold?

This needs no torch.
"""

from detoxrl.data.files import Record, read_records
from detoxrl.data.layout import local_files
from detoxrl.errors import InputError, first_line
from detoxrl.runtime.hub import fetch


def read_splits(source: str, field: str) -> dict[str, list[Record]]:
    """Return the records of each split of a file, a folder or a hub data set; those of a file are the split "file".

    Raises InputError, with the setting `field`, when the source cannot be read.
    """
    files = local_files(source, field)
    if files:
        return {split: read_records(file, field) for split, file in files.items()}
    return _hub_records(source, field)


def _hub_records(name: str, field: str) -> dict[str, list[Record]]:
    """Return the records of each split of a hub data set."""
    folder = fetch(name, field)

    import datasets  # Imported here because it takes a second and files do not need it.

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        # Without checks: the sizes in a data set's card may be outdated.
        tables = datasets.load_dataset(folder, verification_mode="no_checks")
        return {str(split): table.to_list() for split, table in tables.items()}
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}, {first_line(error.__cause__ or error)}"
        remedy = "give a file, a folder or a hub id"
        raise InputError(field, name, f"cannot be read: {reason}", remedy) from error
