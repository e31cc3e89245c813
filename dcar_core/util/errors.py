"""Every error that this project raises on purpose. Messages say what was given and what would do.

DcarError
|- DataError             annotations, galleries and their metadata
|  `- ImageError         one picture that cannot be read
|- CaptionError          captions cannot be asked for: the key, the model, the address, or another run's journal
|  `- EndpointError      one request that was refused or never answered
|- ModelError            a backbone that is unknown, unsupported or cannot be loaded
|  `- RuntimeUnavailableError  an encoder runtime that cannot be had here
|- CheckpointError       trainables that are missing, broken or belong to another backbone
|- TrainingError         a run that cannot start, or cannot go on from the state it finds
|  `- DivergedError      its loss is no number any more
|- ArtifactError         a published index that is missing, incomplete or corrupted
|  |- FingerprintError   an index built by another encoder than the one that serves it
|  `- StoreUnavailableError  the vector store does not respond
|- GateError             a rebuilt index ranks worse than the one that is served
|- LockedError           another writer holds the index
`- MissingExtraError     an optional dependency is not installed
"""


class DcarError(Exception):
    """Base of the tree. exit_code: of a command that it ends; see docs/reference/exit-codes.md."""

    exit_code = 1


class DataError(DcarError):
    """Annotations or a gallery cannot be used as they are."""

    exit_code = 3


class ImageError(DataError):
    """One picture cannot be read; the message is the reason, without its name."""


class CaptionError(DcarError):
    """Captions cannot be asked for: the key, the model, the address, or the journal of another run."""


class EndpointError(CaptionError):
    """One request was refused, or never answered; the message is the reason."""


class ModelError(DcarError):
    """The backbone is unknown, unsupported or cannot be loaded."""

    exit_code = 4


class RuntimeUnavailableError(ModelError):
    """An encoder runtime cannot be had here, or its cached export cannot be used; the message is the reason."""


class CheckpointError(DcarError):
    """The checkpoint is missing, broken or belongs to another backbone."""

    exit_code = 4


class TrainingError(DcarError):
    """A training run cannot start, or cannot go on from the state it finds."""


class DivergedError(TrainingError):
    """The loss is no number any more."""


class ArtifactError(DcarError):
    """A published index is missing, incomplete or corrupted."""


class FingerprintError(ArtifactError):
    """The index was built by another encoder than the one at hand."""


class StoreUnavailableError(ArtifactError):
    """What holds an index's vectors does not answer; it may soon."""


class GateError(DcarError):
    """A rebuilt index ranks worse than the one that is served."""

    exit_code = 6


class LockedError(DcarError):
    """Another writer is at work on the same index."""

    exit_code = 5


class MissingExtraError(DcarError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: pip install 'dcar[{extra}]'")
