"""Every error a user can meet: what is wrong, and the fix."""


class NnqmdError(Exception):
    """An error that a user can cause and mend.

    Parameters
    ----------
    what : str
        What is wrong, in one sentence.
    fix : str
        What to do about it.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\nFix: {self.fix}" if self.fix else self.what


class ModelError(NnqmdError):
    """The model file is missing, is not a model, or cannot do what is asked."""


class UnknownElementError(ModelError):
    """A structure holds an element that the model was not trained for."""


class InputError(NnqmdError):
    """An input file (i-PI XML, training configuration, structure) cannot be used."""


class DataError(NnqmdError):
    """A data set, a trajectory or its units are unusable or contradict each other."""


class AddressError(NnqmdError):
    """A port or socket file is in use, stale, or not allowed."""


class OutputError(NnqmdError):
    """An output directory or file cannot be written."""


class PoolError(NnqmdError):
    """The pool of workers cannot answer."""


class StructureError(PoolError):
    """Structures that no worker could evaluate, or whose forces may not reach a simulation.

    Parameters
    ----------
    what, fix : str
        As for every error.
    suspects : tuple of int
        Places of these structures in the force set that was asked.
    """

    def __init__(self, what: str, fix: str = "", suspects: tuple[int, ...] = ()) -> None:
        super().__init__(what, fix)
        self.suspects = suspects


class ProgramError(NnqmdError):
    """Another program (i-PI, the trainer, the compiler) is missing or failed."""
