"""Errors that a user can mend. The command line prints their message alone and exits with code 2."""


class UserError(ValueError):
    """The message says what must hold, what was received, and which key or row changes it."""


class RecipeError(UserError):
    """A recipe key is unknown, missing, of the wrong type, or in conflict with another."""


class DataError(UserError):
    """A row of the dataset cannot be used; the message names the row by its id."""


class RewardError(UserError):
    """A reward function cannot be loaded, raised, or returned something that is not a list of floats or None."""


class RankError(RuntimeError):
    """Another rank of the run was killed, stopped, or failed: this one cannot go on."""


class CheckpointError(UserError):
    """No complete checkpoint, or one that belongs to another recipe."""
